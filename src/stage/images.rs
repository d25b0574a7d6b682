//! Images outside a job: what the operator asks for by hand goes the way that a job's image goes.

use super::order;
use crate::image::{Asker, Credentials, Limits, PullPolicy, Reference, Request, Store};
use crate::outcome::Failure;
use crate::settings::Settings;
use crate::start;

/// The store of these settings.
///
/// # Errors
/// It cannot be made or read.
pub fn store(settings: &Settings) -> Result<Store, Failure> {
    Ok(Store::open(&settings.state_dir.join("store"))?)
}

/// What is asked for an image under these settings.
///
/// # Errors
/// No guest can run on this host's architecture.
pub fn request(
    settings: &Settings,
    reference: Reference,
    policies: Vec<PullPolicy>,
    credentials: Credentials,
    asker: Asker,
) -> Result<Request, Failure> {
    Ok(Request {
        architecture: start::host_arch()?.name().to_owned(),
        policies,
        credentials,
        registries: order::registries(&settings.images)?,
        limits: Limits {
            max_disk: settings.images.max_disk,
            keep_free: settings.images.keep_free,
        },
        reference,
        asker,
    })
}

/// The host's own logins: the operator who asks for an image by its name may use them for it.
///
/// # Errors
/// An auth file of the settings cannot be used.
pub fn credentials(settings: &Settings) -> Result<Credentials, Failure> {
    order::host_credentials(&settings.images)
}
