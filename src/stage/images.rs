//! Images outside a job: what the operator asks for by hand goes the way that a job's image goes.

use std::pin::Pin;
use std::sync::Arc;

use super::order;
use crate::image::{
    Asker, Credentials, Limits, MakeRoom, PullPolicy, Reference, Registries, RegistryOptions, Request,
    Requirements, Store,
};
use crate::outcome::Failure;
use crate::reap::Images;
use crate::settings::Settings;
use crate::start;

/// The store of these settings.
///
/// # Errors
/// It cannot be made or read.
pub fn store(settings: &Settings) -> Result<Store, Failure> {
    let store = Store::open_for(&settings.state_dir.join("store"), settings.images.partial_ttl)?;
    Ok(store.with_room_by(Arc::new(Tidier(settings.clone()))))
}

/// Removes images as these settings want them kept.
#[derive(Debug)]
struct Tidier(Settings);

impl MakeRoom for Tidier {
    fn make_room(&self, coming: u64, lacking: u64) -> Pin<Box<dyn Future<Output = u64> + Send + '_>> {
        Box::pin(async move {
            let max_size = self.0.images.max_size;
            if lacking == 0 && max_size.is_none() {
                return 0;
            }
            let made = async { Images::open(&self.0)?.make_room(coming, lacking, max_size).await };
            made.await.unwrap_or_else(|failure: Failure| {
                // Whoever needs the room says that there is none.
                tracing::warn!("no room is made in the store: {failure}");
                0
            })
        })
    }
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
        registries: registries(settings)?,
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

/// How registries are spoken to under these settings.
///
/// # Errors
/// An entry of `images.private_registries` makes no sense.
pub fn registries(settings: &Settings) -> Result<Registries, Failure> {
    let images = &settings.images;
    let private = images.private_registries.iter().map(|entry| {
        entry
            .to_string()
            .parse()
            .map_err(|e| Failure::system(format!("images.private_registries: {e}")))
    });
    let each = images.registries.iter().map(|(name, table)| {
        let options = RegistryOptions {
            mirrors: table.mirrors.iter().map(|mirror| mirror.0.clone()).collect(),
            plain_http: table.plain_http,
            ca_file: table.ca_file.clone(),
            client_cert: table.client_cert.clone(),
            client_key: table.client_key.clone(),
        };
        (name.0.clone(), options)
    });
    Ok(Registries {
        plain_http: images.plain_http.clone(),
        ca_files: images.ca_files.clone(),
        private: private.collect::<Result<_, _>>()?,
        each: each.collect(),
    })
}

/// The host's own logins: the operator who asks for an image by its name may use them for it.
///
/// # Errors
/// An auth file of the settings cannot be used.
pub fn credentials(settings: &Settings) -> Result<Credentials, Failure> {
    order::host_credentials(&settings.images)
}
