//! What is remembered of images' signatures: `verdicts/HEX.json`, by the digest of the image.

use std::fs;
use std::path::PathBuf;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::files::{read_record, remove, serialised};
use super::{Digest, Error, Store};

impl Store {
    fn verdicts(&self) -> PathBuf {
        self.dir.join("verdicts")
    }

    fn verdict_path(&self, digest: &Digest) -> PathBuf {
        self.verdicts().join(format!("{}.json", digest.hex()))
    }

    /// What is remembered of an image; none when nothing is, or nothing that can be read.
    pub(in crate::image) fn verdict<T: DeserializeOwned>(&self, digest: &Digest) -> Result<Option<T>, Error> {
        read_record(&self.verdict_path(digest))
    }

    /// Remembers something of an image that is here, and forgets what was remembered of images that are gone.
    pub(in crate::image) fn keep_verdict(
        &self,
        digest: &Digest,
        verdict: &impl Serialize,
    ) -> Result<(), Error> {
        let path = self.verdict_path(digest);
        self.write_small(&path, &serialised(verdict, &path)?)?;
        let dir = self.verdicts();
        for entry in fs::read_dir(&dir).map_err(Error::storage(&dir))? {
            let entry = entry.map_err(Error::storage(&dir))?.path();
            let hex = entry
                .file_stem()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            if !Digest::from_hex(hex).is_ok_and(|digest| self.disk_dir(&digest).is_dir()) {
                remove(&entry)?;
            }
        }
        Ok(())
    }
}
