//! What was found about an image's signature, so that an image in the store starts without its registry.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::super::digest::Digest;
use super::super::error::Error;
use super::super::store::Store;

/// `verdicts/HEX.json` in the store, by the digest of the image's manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::image) struct Verdict {
    version: u32,
    /// The image.
    digest: Digest,
    /// What was signed: the image's manifest, or the index that led to it.
    signed: Digest,
    /// The fingerprint of the key.
    pub(super) key: Digest,
    /// The repository that it was signed as.
    pub(super) repository: Option<String>,
    checked: Timestamp,
}

const VERSION: u32 = 1;

impl Verdict {
    pub(super) fn new(digest: Digest, signed: Digest, key: Digest, repository: Option<String>) -> Self {
        Self {
            version: VERSION,
            digest,
            signed,
            key,
            repository,
            checked: Timestamp::now(),
        }
    }

    /// Remembers it. The image must be in the store already: what is remembered of others is swept.
    pub(in crate::image) fn keep(&self, store: &Store) -> Result<(), Error> {
        store.keep_verdict(&self.digest, self)
    }
}

/// What is remembered of an image.
pub(super) fn read(store: &Store, digest: &Digest) -> Result<Option<Verdict>, Error> {
    let verdict: Option<Verdict> = store.verdict(digest)?;
    Ok(verdict.filter(|verdict| verdict.version == VERSION && verdict.digest == *digest))
}
