//! Talks to registries (OCI distribution specification 1.1; Docker's token authentication).
//!
//! ```text
//! Session ── the registry's mirrors, then itself; which of them serves
//!    └─ Endpoint ── one of them: redirects, retries, pauses          (endpoint, weather, silence)
//!         ├─ Tokens ── proves who we are                             (token, challenge, credentials, helper)
//!         └─ clients ── TLS, time limits, which addresses are good   (transport, trust)
//! ```
//!
//! | what is said | where |
//! |---|---|
//! | manifests and small blobs | [`Session`] |
//! | layers, in parts | [`range`] |
//! | everything that is written | [`push`] |
//! | signatures and the like | [`referrers`] |

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use reqwest::header::ACCEPT;
use reqwest::{Method, StatusCode};

pub(super) mod challenge;
pub(super) mod credentials;
mod endpoint;
mod helper;
mod login;
mod push;
mod range;
mod referrers;
mod silence;
mod token;
mod transport;
mod trust;
mod weather;
mod web;

pub(super) use endpoint::Purpose;
pub(super) use login::knows;
pub use login::{AuthFile, Keeper, verify_login};
pub(super) use push::Upload;
pub(super) use referrers::Referrer;
pub(super) use silence::Unanswered;
pub use trust::{Private, Registries, RegistryOptions};
#[cfg(any(test, fuzzing))]
pub(super) use weather::fuzz as fuzz_retry_after;
#[cfg(any(test, fuzzing))]
pub(super) use web::fuzz as fuzz_sums;
pub(super) use web::{Address, WebFile};

use self::endpoint::{Answer, Ask, Endpoint};
pub(super) use self::range::Ranged;
use self::weather::Failure;
use super::digest::Digest;
use super::error::Error;
use super::manifest::{
    Descriptor, IMAGE_MANIFEST_LIST_MEDIA_TYPE, IMAGE_MANIFEST_MEDIA_TYPE, OCI_IMAGE_INDEX_MEDIA_TYPE,
    OCI_IMAGE_MEDIA_TYPE,
};
use super::source::DOCUMENT_MAX;
use credentials::Credentials;

/// All kinds of manifests that can be read.
const MANIFESTS: [&str; 4] = [
    OCI_IMAGE_MEDIA_TYPE,
    OCI_IMAGE_INDEX_MEDIA_TYPE,
    IMAGE_MANIFEST_MEDIA_TYPE,
    IMAGE_MANIFEST_LIST_MEDIA_TYPE,
];

/// Which image, and how to get there.
#[derive(Debug)]
pub(super) struct Target<'a> {
    /// The reference, for errors.
    pub(super) image: &'a str,
    pub(super) registry: &'a str,
    pub(super) repository: &'a str,
    /// What the reference names: a tag or a digest.
    pub(super) name: String,
    pub(super) credentials: &'a Credentials,
    pub(super) registries: &'a Registries,
    pub(super) purpose: Purpose,
}

/// A conversation about one repository. Many tasks may take part in it at once.
#[derive(Debug)]
pub(super) struct Session {
    image: String,
    name: String,
    /// Mirrors, if any, and the registry itself.
    endpoints: Vec<Arc<Endpoint>>,
    /// Index of the one that serves.
    serving: AtomicUsize,
}

impl Session {
    /// Begins a conversation. Nothing is said yet; logins are looked up, each endpoint's own.
    pub(super) async fn open(target: Target<'_>) -> Result<Self, Error> {
        // What is written goes to the registry itself.
        let mirrors = match target.purpose {
            Purpose::Read => target.registries.options(target.registry).mirrors,
            Purpose::Write => Vec::new(),
        };
        let names: Vec<&str> = mirrors
            .iter()
            .map(String::as_str)
            .chain([target.registry])
            .collect();
        let mut endpoints = Vec::new();
        for (number, registry) in names.iter().enumerate() {
            let login = target.credentials.find(registry, target.repository).await?;
            let spare = number + 1 < names.len();
            let endpoint = Endpoint::new(
                target.image,
                registry,
                target.repository,
                login,
                target.registries,
                target.purpose,
                spare,
            )?;
            endpoints.push(Arc::new(endpoint));
        }
        Ok(Self {
            image: target.image.to_owned(),
            name: target.name,
            endpoints,
            serving: AtomicUsize::new(0),
        })
    }

    /// A conversation with one endpoint, in which no manifest is asked for.
    fn with(image: &str, endpoint: Endpoint) -> Self {
        Self {
            image: image.to_owned(),
            name: String::new(),
            endpoints: vec![Arc::new(endpoint)],
            serving: AtomicUsize::new(0),
        }
    }

    pub(super) fn image(&self) -> &str {
        &self.image
    }

    /// How many transfers at once the registry takes now; fewer after it has answered that it has too much.
    pub(super) fn width(&self) -> usize {
        // One that sends the whole for each part is better asked for one at a time.
        if self.ignores_ranges() {
            1
        } else {
            self.endpoint().gate.width()
        }
    }

    /// Has it sent a whole blob where a part was asked for?
    pub(super) fn ignores_ranges(&self) -> bool {
        self.endpoint().ignores_ranges()
    }

    fn endpoint(&self) -> Arc<Endpoint> {
        let serving = self.serving.load(Ordering::Relaxed);
        Arc::clone(&self.endpoints[serving.min(self.endpoints.len() - 1)])
    }

    /// The endpoint to ask when `failed` has given up; the error where there is none.
    fn after(&self, failed: &Arc<Endpoint>, error: Error) -> Result<Arc<Endpoint>, Error> {
        let position = self
            .endpoints
            .iter()
            .position(|endpoint| Arc::ptr_eq(endpoint, failed))
            .unwrap_or_default();
        if position + 1 >= self.endpoints.len() || !error.lets_the_next_endpoint_try() {
            return Err(error);
        }
        tracing::info!(mirror = failed.registry, "{error}; asking the next one");
        self.serving.fetch_max(position + 1, Ordering::Relaxed);
        Ok(Arc::clone(&self.endpoints[position + 1]))
    }

    /// The registry that is waited for, where that takes long.
    pub(super) fn unanswered(&self) -> Option<Unanswered> {
        self.endpoint().unanswered()
    }

    /// Has it given all that it was asked for without a login so far?
    pub(super) async fn is_anonymous(&self) -> bool {
        let endpoint = self.endpoint();
        endpoint.login.is_none() || !endpoint.tokens().was_challenged().await
    }

    /// The manifest or index that the reference names.
    pub(super) async fn root(&self) -> Result<(Digest, Vec<u8>), Error> {
        let bytes = self
            .small(
                &format!("manifests/{}", self.name),
                "manifest",
                &MANIFESTS.join(", "),
            )
            .await?;
        let found = Digest::of(&bytes);
        if let Ok(asked) = self.name.parse::<Digest>()
            && asked != found
        {
            let reason = format!(
                "{} sent the manifest {found} for {asked}",
                self.endpoint().registry
            );
            return Err(Error::Corrupt {
                image: self.image.clone(),
                blob: None,
                reason,
            });
        }
        Ok((found, bytes))
    }

    /// A manifest by digest; the caller verifies it.
    pub(super) async fn manifest(&self, digest: &Digest) -> Result<Vec<u8>, Error> {
        self.small(&format!("manifests/{digest}"), "manifest", &MANIFESTS.join(", "))
            .await
    }

    /// A small blob, whole; the caller verifies it.
    pub(super) async fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, Error> {
        self.small(&format!("blobs/{}", descriptor.digest), "config", "*/*")
            .await
    }

    async fn small(&self, path: &str, what: &'static str, accept: &str) -> Result<Vec<u8>, Error> {
        let root = format!("manifests/{}", self.name);
        let mut endpoint = self.endpoint();
        loop {
            let ask = Ask::new(Method::GET, endpoint.url(path)?).with(ACCEPT, accept);
            let result = endpoint
                .persistently(ask.url.path(), async || {
                    let answer = endpoint.ask(&ask).await?;
                    if answer.response.status() != StatusCode::OK {
                        return Err(if path == root {
                            endpoint.no_image(&answer)
                        } else {
                            endpoint.no(&answer, path)
                        });
                    }
                    endpoint.whole(answer.response, what, DOCUMENT_MAX).await
                })
                .await;
            match result {
                Ok(bytes) => return Ok(bytes),
                Err(error) => endpoint = self.after(&endpoint, error)?,
            }
        }
    }

    /// A part of a blob. Many parts may be on their way at once; what comes is not verified.
    pub(super) fn range(&self, descriptor: &Descriptor, range: Range<u64>) -> Ranged<'_> {
        Ranged::new(self, descriptor, range)
    }
}

impl Endpoint {
    /// What an answer means that does not give the image itself.
    fn no_image(&self, answer: &Answer) -> Failure {
        if answer.response.status() == StatusCode::NOT_FOUND {
            let (image, registry) = (self.image.clone(), self.registry.clone());
            return Failure::Final(Error::NotFound { image, registry });
        }
        self.no(answer, "the image")
    }

    /// What an answer means that does not give what was asked for.
    fn no(&self, answer: &Answer, path: &str) -> Failure {
        let status = answer.response.status();
        match status {
            // Storage behind a registry answers so when the address that it was asked at has expired.
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if !answer.home => {
                weather::weather(format!("its storage answered {}", status.as_u16()))
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Failure::Final(self.denied()),
            StatusCode::NOT_FOUND => Failure::Final(Error::Corrupt {
                image: self.image.clone(),
                blob: None,
                reason: format!("{} has lost {path}", self.registry),
            }),
            _ => self.refused(status, answer.response.headers(), "it"),
        }
    }
}

#[cfg(test)]
mod tests;
