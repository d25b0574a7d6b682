//! Finds an image's signatures where its registry keeps them.
//!
//! | where | what stands there |
//! |---|---|
//! | tag `sha256-HEX.sig` | a manifest whose layers are simple signing payloads |
//! | OCI referrers, artifact type [`ARTIFACT`] | the same |
//! | OCI referrers, layer type [`BUNDLE`] | a sigstore bundle |

use std::ops::ControlFlow;
use std::path::PathBuf;

use serde::Serialize;

use super::super::digest::Digest;
use super::super::error::{Error, quoted};
use super::super::manifest::{self, Descriptor, Document, Manifest};
use super::super::reference::Reference;
use super::super::source::Source;
use super::attached;
use super::key::Key;
use super::payload::{self, Signed};

const SIMPLE: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
const BUNDLE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
const SIGNATURE: &str = "dev.cosignproject.cosign/signature";

/// Most signatures of one image that are looked at. Whoever may push can add some; nobody needs so many.
const SIGNATURES_MAX: usize = 32;

/// Most referring artifacts that are looked at.
const REFERRERS_MAX: usize = 16;

/// Largest payload or bundle, in bytes. A payload has some hundred; a bundle with its log entry some thousand.
const PAYLOAD_MAX: u64 = 256 * 1024;

/// A signature that an image has where it comes from, and what it is worth here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Signature {
    /// Whose signature it is given as: the image's manifest's, or the index's that led to it.
    pub of: Digest,
    /// The file of the operator's key that made it; none where no key of the image's rule did.
    pub key: Option<PathBuf>,
    /// The repository that it is signed as by that key, where it names one.
    pub repository: Option<String>,
    /// Why it does not count although that key made it, or why nothing can be said of it.
    pub refused: Option<String>,
}

/// What a signature comes to.
#[derive(Debug)]
pub(super) enum Judgement<'a> {
    /// It is one of this image under this name.
    Counts {
        key: &'a Key,
        repository: Option<String>,
    },
    /// It is one of something else.
    Wrong { key: &'a Key, reason: String },
    /// No key of ours made it.
    Foreign,
}

/// Why no signature counted.
#[derive(Debug, Default)]
pub(super) struct Reasons {
    found: usize,
    /// By a key of ours, for another image or repository.
    wrong: Option<String>,
}

impl Reasons {
    /// One more signature was found; none where it could not be read.
    pub(super) fn see(&mut self, judgement: Option<Judgement<'_>>) {
        self.found += 1;
        if let Some(Judgement::Wrong { reason, .. }) = judgement {
            self.wrong = Some(reason);
        }
    }

    pub(super) fn written(self) -> String {
        match (self.found, self.wrong) {
            (0, _) => "it has no signature".to_owned(),
            (_, Some(wrong)) => wrong,
            (1, None) => "its signature is not by a key of that rule".to_owned(),
            (count, None) => format!("none of its {count} signatures is by a key of that rule"),
        }
    }
}

/// The fingerprint of the key that signed `digest`, and the repository that it is signed as.
pub(super) async fn find(
    source: &Source,
    digest: &Digest,
    reference: &Reference,
    keys: &[Key],
    reasons: &mut Reasons,
) -> Result<Option<(Digest, Option<String>)>, Error> {
    let look = |signed: Option<Signed>| match signed.map(|signed| judge(&signed, digest, reference, keys)) {
        Some(Judgement::Counts { key, repository }) => ControlFlow::Break((key.fingerprint, repository)),
        other => {
            reasons.see(other);
            ControlFlow::Continue(())
        }
    };
    walk(source, digest, reference, look).await
}

/// All signatures that `digest` has.
pub(super) async fn all(
    source: &Source,
    digest: &Digest,
    reference: &Reference,
    keys: &[Key],
) -> Result<Vec<Signature>, Error> {
    let mut all = Vec::new();
    let look = |signed: Option<Signed>| {
        let judgement = signed.map(|signed| judge(&signed, digest, reference, keys));
        let (key, repository, refused) = match judgement {
            Some(Judgement::Counts { key, repository }) => (Some(key), repository, None),
            Some(Judgement::Wrong { key, reason }) => (Some(key), None, Some(reason)),
            Some(Judgement::Foreign) => (None, None, None),
            None => (None, None, Some("it cannot be read".to_owned())),
        };
        all.push(Signature {
            of: *digest,
            key: key.map(|key| key.file.clone()),
            repository,
            refused,
        });
        ControlFlow::<()>::Continue(())
    };
    walk(source, digest, reference, look).await?;
    Ok(all)
}

/// Shows every signature of `digest`, until one ends the walk; none where one cannot be read.
async fn walk<T>(
    source: &Source,
    digest: &Digest,
    reference: &Reference,
    mut look: impl FnMut(Option<Signed>) -> ControlFlow<T>,
) -> Result<Option<T>, Error> {
    if let Some(bytes) = attached::tagged(source, reference, &format!("sha256-{}.sig", digest.hex())).await?
        && let Ok(Document::Image(manifest)) = manifest::parse(&bytes)
        && let Some(found) = among(source, &manifest, &mut look).await?
    {
        return Ok(Some(found));
    }
    for referrer in attached::referrers(source, reference, digest)
        .await?
        .iter()
        .take(REFERRERS_MAX)
    {
        let Some(bytes) = readable(source.manifest(referrer).await)? else {
            if let ControlFlow::Break(found) = look(None) {
                return Ok(Some(found));
            }
            continue;
        };
        if let Ok(Document::Image(manifest)) = manifest::parse(&bytes)
            && let Some(found) = among(source, &manifest, &mut look).await?
        {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Shows the signatures of one manifest.
async fn among<T>(
    source: &Source,
    manifest: &Manifest,
    look: &mut impl FnMut(Option<Signed>) -> ControlFlow<T>,
) -> Result<Option<T>, Error> {
    let signatures = manifest
        .layers
        .iter()
        .filter(|layer| [SIMPLE, BUNDLE].contains(&layer.media_type.as_str()) && layer.size <= PAYLOAD_MAX);
    for layer in signatures.take(SIGNATURES_MAX) {
        let bytes = readable(source.config(layer).await)?;
        if let ControlFlow::Break(found) = look(bytes.and_then(|bytes| read(layer, bytes))) {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// What stands there; none where it is gone, too large or another than it should be. Registries tidy up, and anybody who may push
/// can leave such a thing beside an image: that must not keep the signatures beside it from counting.
fn readable(bytes: Result<Vec<u8>, Error>) -> Result<Option<Vec<u8>>, Error> {
    match bytes {
        Ok(bytes) => Ok(Some(bytes)),
        Err(
            Error::NotFound { .. }
            | Error::TooLarge { .. }
            | Error::Corrupt { .. }
            | Error::DamagedLayout { .. },
        ) => Ok(None),
        Err(error) => Err(error),
    }
}

fn read(layer: &Descriptor, bytes: Vec<u8>) -> Option<Signed> {
    if layer.media_type == BUNDLE {
        Signed::bundle(&bytes)
    } else {
        Signed::simple(bytes, layer.annotations.get(SIGNATURE)?)
    }
}

/// Does this signature count for the digest and the reference? First the key, and only then what is said.
pub(super) fn judge<'a>(
    signed: &Signed,
    digest: &Digest,
    reference: &Reference,
    keys: &'a [Key],
) -> Judgement<'a> {
    let by = |key: &&Key| {
        let mut signatures = signed.signatures.iter().take(SIGNATURES_MAX);
        signatures.any(|signature| key.signed(&signed.message, signature))
    };
    let Some(key) = keys.iter().find(by) else {
        return Judgement::Foreign;
    };
    let reason = match signed.claim() {
        None => "what is signed by a key of that rule is no signature of an image".to_owned(),
        Some(claim) if !claim.digests.contains(digest) => "its signature is one of another image".to_owned(),
        Some(claim) => match claim.repository {
            Some(name) if !payload::names(&name, reference) => {
                format!("it is signed as {}", quoted(&name))
            }
            repository => return Judgement::Counts { key, repository },
        },
    };
    Judgement::Wrong { key, reason }
}
