//! Finds an image's signatures where its registry keeps them.
//!
//! | where | what stands there |
//! |---|---|
//! | tag `sha256-HEX.sig` | a manifest whose layers are simple signing payloads |
//! | OCI referrers, artifact type [`ARTIFACT`] | the same |
//! | OCI referrers, layer type [`BUNDLE`] | a sigstore bundle |

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

/// Why no signature counted.
#[derive(Debug, Default)]
pub(super) struct Reasons {
    found: usize,
    /// By a key of ours, for another image or repository.
    wrong: Option<String>,
}

impl Reasons {
    /// One more signature was found.
    pub(super) fn see(&mut self) {
        self.found += 1;
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
    if let Some(bytes) = attached::tagged(source, reference, &format!("sha256-{}.sig", digest.hex())).await?
        && let Ok(Document::Image(manifest)) = manifest::parse(&bytes)
        && let Some(found) = among(source, &manifest, digest, reference, keys, reasons).await?
    {
        return Ok(Some(found));
    }
    for referrer in attached::referrers(source, reference, digest)
        .await?
        .iter()
        .take(REFERRERS_MAX)
    {
        let bytes = source.manifest(referrer).await?;
        if let Ok(Document::Image(manifest)) = manifest::parse(&bytes)
            && let Some(found) = among(source, &manifest, digest, reference, keys, reasons).await?
        {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Looks at the signatures of one manifest.
async fn among(
    source: &Source,
    manifest: &Manifest,
    digest: &Digest,
    reference: &Reference,
    keys: &[Key],
    reasons: &mut Reasons,
) -> Result<Option<(Digest, Option<String>)>, Error> {
    let signatures = manifest
        .layers
        .iter()
        .filter(|layer| [SIMPLE, BUNDLE].contains(&layer.media_type.as_str()) && layer.size <= PAYLOAD_MAX);
    for layer in signatures.take(SIGNATURES_MAX) {
        let bytes = source.config(layer).await?;
        reasons.see();
        if let Some(signed) = read(layer, bytes)
            && let Some(found) = judge(&signed, digest, reference, keys, reasons)
        {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

fn read(layer: &Descriptor, bytes: Vec<u8>) -> Option<Signed> {
    if layer.media_type == BUNDLE {
        Signed::bundle(&bytes)
    } else {
        Signed::simple(bytes, layer.annotations.get(SIGNATURE)?)
    }
}

/// Does this signature count for the digest and the reference? First the key, and only then what is said.
pub(super) fn judge(
    signed: &Signed,
    digest: &Digest,
    reference: &Reference,
    keys: &[Key],
    reasons: &mut Reasons,
) -> Option<(Digest, Option<String>)> {
    let by = |key: &&Key| {
        let mut signatures = signed.signatures.iter().take(SIGNATURES_MAX);
        signatures.any(|signature| key.signed(&signed.message, signature))
    };
    let key = keys.iter().find(by)?;
    let claim = signed.claim();
    let wrong = match claim {
        None => "what is signed by a key of that rule is no signature of an image".to_owned(),
        Some(claim) if !claim.digests.contains(digest) => "its signature is one of another image".to_owned(),
        Some(claim) => match claim.repository {
            Some(name) if !payload::names(&name, reference) => {
                format!("it is signed as {}", quoted(&name))
            }
            repository => return Some((key.fingerprint, repository)),
        },
    };
    reasons.wrong = Some(wrong);
    None
}
