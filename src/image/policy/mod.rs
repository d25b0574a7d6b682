//! The operator's rules for images: which must be named by digest, and which must be signed, by whom.
//!
//! ```text
//! reference ─▶ require_digest ─▶ … resolved … ─▶ verdict remembered? ─▶ yes: go on, without the registry
//!                                                     │ no
//!                                                     ▼
//!                       signatures at the registry ─▶ payload ─▶ key ─▶ verdict, kept beside the image
//! ```
//!
//! A signature counts when one of the operator's keys made it, when what it signs is the digest of the image's manifest or
//! of the index that the reference led to, and when the repository that it names, if it names one, is the one that was
//! asked for. No service is asked: neither a transparency log nor a certificate authority. A signature that is withdrawn
//! at the registry goes on to count where it has been seen; taking the key out of the rule ends that.

mod attached;
mod key;
mod payload;
mod signatures;
mod verdict;

use std::path::PathBuf;

use super::digest::Digest;
use super::error::Error;
use super::reference::Reference;
use super::source::Source;
use super::store::Store;
use key::Key;
#[cfg(any(test, fuzzing))]
pub(super) use payload::fuzz_payload;
pub use signatures::Signature;
pub(super) use verdict::Verdict;

/// The rules' names, as the settings spell them.
const REQUIRE_DIGEST: &str = "require_digest";
const SIGNED_BY: &str = "signed_by";

/// What may have a signature of its own, each once.
fn each(digest: &Digest, root: &Digest) -> Vec<Digest> {
    let mut each = vec![*digest, *root];
    each.dedup();
    each
}

/// The rules for one image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Requirements {
    /// The reference must have a digest.
    pub require_digest: bool,
    /// Files with public keys in PEM, one of which must have signed the image; empty: no signature is asked for.
    pub signed_by: Vec<PathBuf>,
}

/// The rules for one request, with the keys at hand.
#[derive(Debug)]
pub(super) struct Rules<'a> {
    image: String,
    reference: &'a Reference,
    keys: Vec<Key>,
}

impl<'a> Rules<'a> {
    /// Reads the keys, and refuses what the reference alone tells.
    pub(super) fn new(
        requirements: &Requirements,
        reference: &'a Reference,
        image: &str,
    ) -> Result<Self, Error> {
        let pinned = reference.digest().is_some();
        if requirements.require_digest && !pinned {
            return Err(Error::AgainstRule {
                image: image.to_owned(),
                rule: REQUIRE_DIGEST,
                reason: "it is named without a digest".to_owned(),
            });
        }
        let keys = requirements.signed_by.iter().map(|path| Key::read(path));
        Ok(Self {
            image: image.to_owned(),
            reference,
            keys: keys.collect::<Result<_, _>>()?,
        })
    }

    /// Is an image of the store known to meet the rules? Asks nobody.
    pub(super) fn are_met(&self, store: &Store, digest: &Digest) -> Result<bool, Error> {
        if self.keys.is_empty() {
            return Ok(true);
        }
        let verdict = verdict::read(store, digest)?;
        Ok(verdict.is_some_and(|verdict| self.believes(&verdict)))
    }

    /// A verdict by a key that still counts, for the repository that is asked for now.
    fn believes(&self, verdict: &Verdict) -> bool {
        let named = |name: &String| payload::names(name, self.reference);
        self.keys.iter().any(|key| key.fingerprint == verdict.key)
            && verdict.repository.as_ref().is_none_or(named)
    }

    /// Checks the image at its source. `root` is the digest that the reference led to, `digest` the one of the manifest for
    /// this platform; the verdict, where the rules ask for a signature and none is remembered, is to be kept once
    /// the image is in the store.
    pub(super) async fn check(
        &self,
        store: &Store,
        source: &Source,
        root: &Digest,
        digest: &Digest,
    ) -> Result<Option<Verdict>, Error> {
        if self.are_met(store, digest)? {
            return Ok(None);
        }
        let mut reasons = signatures::Reasons::default();
        for signed in each(digest, root) {
            let found = signatures::find(source, &signed, self.reference, &self.keys, &mut reasons).await?;
            if let Some((key, repository)) = found {
                return Ok(Some(Verdict::new(*digest, signed, key, repository)));
            }
        }
        Err(self.refused(reasons.written()))
    }

    /// All signatures that the image has at its source, whether the rules ask for one or not.
    pub(super) async fn signatures(
        &self,
        source: &Source,
        root: &Digest,
        digest: &Digest,
    ) -> Result<Vec<Signature>, Error> {
        let mut all = Vec::new();
        for signed in each(digest, root) {
            all.extend(signatures::all(source, &signed, self.reference, &self.keys).await?);
        }
        Ok(all)
    }

    /// An image of the store that only its registry could tell more about.
    pub(super) fn unknown(&self) -> Error {
        self.refused(
            "its signature was not checked on this host yet, and the pull policy forbids to ask for it"
                .to_owned(),
        )
    }

    fn refused(&self, reason: String) -> Error {
        Error::AgainstRule {
            image: self.image.clone(),
            rule: SIGNED_BY,
            reason,
        }
    }
}

#[cfg(test)]
mod tests;
