//! What refers to a manifest: signatures, bills of materials (OCI distribution specification 1.1, "Listing Referrers").

use std::sync::atomic::Ordering;

use serde::Deserialize;

use super::super::digest::Digest;
use super::super::error::Error;
use super::super::manifest::{Descriptor, OCI_IMAGE_INDEX_MEDIA_TYPE};
use super::endpoint::Endpoint;
use super::{MANIFESTS, Session};

/// Most pages of referrers that are read.
const PAGES_MAX: usize = 16;

/// Most referrers that are looked at; an image has a few.
const REFERRERS_MAX: usize = 1024;

/// A manifest that refers to another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::image) struct Referrer {
    pub(in crate::image) descriptor: Descriptor,
    pub(in crate::image) artifact_type: Option<String>,
}

impl Session {
    /// The manifest or index with another tag of the repository; none when there is none.
    pub(in crate::image) async fn tagged(&self, tag: &str) -> Result<Option<Vec<u8>>, Error> {
        self.first_that_knows(async |endpoint: &Endpoint| {
            let url = endpoint.url(&format!("manifests/{tag}"))?;
            let page = endpoint.page(url, &MANIFESTS.join(", ")).await?;
            Ok(page.map(|(bytes, _)| bytes))
        })
        .await
    }

    /// Everything that refers to a manifest of the repository. A registry that does not know the question is asked for the
    /// tag that stands in for it.
    ///
    /// A mirror that knows of none is not the last word: mirrors often copy images without what refers to them.
    pub(in crate::image) async fn referrers(&self, digest: &Digest) -> Result<Vec<Referrer>, Error> {
        let found = self.first_that_knows(async |endpoint: &Endpoint| {
            let found = endpoint.referrers(digest).await?;
            Ok((!found.is_empty()).then_some(found))
        });
        Ok(found.await?.unwrap_or_default())
    }

    /// Asks the endpoint that serves, and then those that it stands in for. What the registry itself says is the last word.
    async fn first_that_knows<T>(
        &self,
        ask: impl AsyncFn(&Endpoint) -> Result<Option<T>, Error>,
    ) -> Result<Option<T>, Error> {
        let serving = self.serving.load(Ordering::Relaxed);
        let mut last = Ok(None);
        for endpoint in &self.endpoints[serving..] {
            last = ask(endpoint).await;
            match &last {
                Ok(None) => {}
                Err(error) if error.lets_the_next_endpoint_try() => {}
                Ok(Some(_)) | Err(_) => break,
            }
        }
        last
    }
}

impl Endpoint {
    async fn referrers(&self, digest: &Digest) -> Result<Vec<Referrer>, Error> {
        let mut found = Vec::new();
        let mut next = Some(self.url(&format!("referrers/{digest}"))?);
        let mut fallback = true;
        for _ in 0..PAGES_MAX {
            let Some(url) = next.take() else {
                return Ok(found);
            };
            let mut page = self.page(url, OCI_IMAGE_INDEX_MEDIA_TYPE).await?;
            if page.is_none() && fallback {
                let tag = self.url(&format!("manifests/sha256-{}", digest.hex()))?;
                page = self.page(tag, OCI_IMAGE_INDEX_MEDIA_TYPE).await?;
            }
            fallback = false;
            let Some((bytes, following)) = page else {
                return Ok(found);
            };
            found.extend(parse(&bytes).ok_or_else(|| {
                self.unreachable(format!("its list of referrers of {digest} cannot be read"))
            })?);
            if found.len() > REFERRERS_MAX {
                break;
            }
            next = following;
        }
        Err(self.unreachable(format!(
            "it lists more than {REFERRERS_MAX} referrers of {digest}"
        )))
    }
}

/// Reads an index; entries that we could not fetch anyway are passed over.
fn parse(bytes: &[u8]) -> Option<Vec<Referrer>> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Entry {
        #[serde(default)]
        media_type: String,
        digest: String,
        size: u64,
        artifact_type: Option<String>,
        annotations: Option<std::collections::BTreeMap<String, String>>,
    }
    #[derive(Deserialize)]
    struct Index {
        manifests: Vec<Entry>,
    }
    let index: Index = serde_json::from_slice(bytes).ok()?;
    let read = |entry: Entry| {
        Some(Referrer {
            descriptor: Descriptor {
                media_type: entry.media_type,
                digest: entry.digest.parse().ok()?,
                size: entry.size,
                annotations: entry.annotations.unwrap_or_default(),
            },
            artifact_type: entry.artifact_type,
        })
    };
    Some(index.manifests.into_iter().filter_map(read).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn referrers_are_read_from_an_index() {
        let digest = Digest::of(b"signature");
        let index = format!(
            r#"{{"schemaVersion": 2, "manifests": [
                {{"mediaType": "m", "digest": "{digest}", "size": 7, "artifactType": "a", "annotations": {{"k": "v"}}}},
                {{"mediaType": "m", "digest": "sha512:00", "size": 7}}
            ]}}"#
        );
        let found = parse(index.as_bytes()).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(
            (
                found[0].descriptor.digest,
                found[0].descriptor.size,
                found[0].artifact_type.as_deref()
            ),
            (digest, 7, Some("a"))
        );
        assert_eq!(found[0].descriptor.annotations["k"], "v");
        for nothing in ["", "{}", "[]", r#"{"manifests": [{"size": -1}]}"#] {
            assert!(parse(nothing.as_bytes()).is_none(), "{nothing}");
        }
    }
}
