//! Images outside a job: what the operator asks for by hand goes the way that a job's image goes.

use super::order;
use crate::image::{Asker, Credentials, Limits, PullPolicy, Reference, Request, Requirements, Store};
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

/// What guests of this host are made for: `x86_64` or `aarch64`.
///
/// # Errors
/// No guest can run on this host's architecture.
pub fn architecture() -> Result<&'static str, Failure> {
    Ok(start::host_arch()?.name())
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
        architecture: architecture()?.to_owned(),
        policies,
        credentials,
        registries: order::registries(&settings.images)?,
        limits: Limits {
            max_disk: settings.images.max_disk,
            keep_free: settings.images.keep_free,
        },
        requirements: requirements(settings, &reference),
        reference,
        asker,
    })
}

/// The operator's rules for an image.
fn requirements(settings: &Settings, reference: &Reference) -> Requirements {
    let full = reference.to_string();
    let mut names = vec![full];
    if let Reference::Registry {
        registry,
        repository,
        tag,
        ..
    } = reference
    {
        names.push(format!("{registry}/{repository}"));
        names.extend(tag.iter().map(|tag| format!("{registry}/{repository}:{tag}")));
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let rules = settings.rules(&names);
    Requirements {
        require_digest: rules.require_digest.unwrap_or_default(),
        signed_by: rules.signed_by.unwrap_or_default(),
    }
}

/// The host's own logins: the operator who asks for an image by its name may use them for it.
///
/// # Errors
/// An auth file of the settings cannot be used.
pub fn credentials(settings: &Settings) -> Result<Credentials, Failure> {
    order::host_credentials(&settings.images)
}
