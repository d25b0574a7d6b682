//! What is attached to an image where it comes from.

use oci_client::manifest::ImageIndexEntry;

use super::super::digest::Digest;
use super::super::error::Error;
use super::super::layout::Layout;
use super::super::manifest::{self, Descriptor, Document};
use super::super::reference::Reference;
use super::super::registry::Referrer;
use super::super::source::{Kind, Source};

/// What signatures are called in a list of referrers. cosign 2 lists its bundles under an empty config's type where it writes
/// the list itself.
const SIGNATURES: [&str; 3] = [
    "application/vnd.dev.cosign.artifact.sig.v1+json",
    "application/vnd.dev.sigstore.bundle.v0.3+json",
    "application/vnd.oci.empty.v1+json",
];

/// The manifest or index with another tag, in the image's own repository or layout; none when there is none.
pub(super) async fn tagged(
    source: &Source,
    reference: &Reference,
    tag: &str,
) -> Result<Option<Vec<u8>>, Error> {
    match (&source.kind, reference) {
        (Kind::Registry(session), _) => session.tagged(tag).await,
        (Kind::Layout(layout), Reference::Layout { dir, .. }) => {
            match Layout::new(layout.image(), dir, tag).root() {
                Ok((_, bytes)) => Ok(Some(bytes)),
                Err(Error::NotFound { .. }) => Ok(None),
                Err(error) => Err(error),
            }
        }
        // A single file has nothing beside it that could be signed.
        (Kind::Layout(_) | Kind::File(_) | Kind::Web(_), _) => Ok(None),
    }
}

/// Manifests that refer to this one and may be signatures.
pub(super) async fn referrers(
    source: &Source,
    reference: &Reference,
    digest: &Digest,
) -> Result<Vec<Descriptor>, Error> {
    if let Kind::Registry(session) = &source.kind {
        let all = session.referrers(digest).await?;
        let may_sign = |one: &Referrer| {
            one.artifact_type
                .as_deref()
                .is_none_or(|kind| SIGNATURES.contains(&kind))
        };
        return Ok(all
            .into_iter()
            .filter(may_sign)
            .map(|one| one.descriptor)
            .collect());
    }
    let tag = format!("sha256-{}", digest.hex());
    let index = tagged(source, reference, &tag).await?;
    Ok(match index.as_deref().map(manifest::parse) {
        Some(Ok(Document::Index(entries))) => entries.iter().filter_map(descriptor).collect(),
        _ => Vec::new(),
    })
}

fn descriptor(entry: &ImageIndexEntry) -> Option<Descriptor> {
    Some(Descriptor {
        media_type: entry.media_type.clone(),
        digest: entry.digest.parse().ok()?,
        size: entry.size.try_into().ok()?,
        annotations: entry.annotations.clone().unwrap_or_default(),
    })
}
