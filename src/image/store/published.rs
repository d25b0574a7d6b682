//! Which SHA-512 the bytes of an image have: `sha512/HEX`, by the digest of the image, which is the SHA-256 of the same bytes.
//!
//! Both were computed here over one reading of a disk on a web server. So whoever is told the same SHA-512 again, by the list
//! beside the disk, knows the digest without reading the disk. It goes with the image.

use std::path::PathBuf;

use super::files::{read_record, serialised};
use super::{Digest, Error, Store};

/// The folder of these notes.
pub(super) const SHA512: &str = "sha512";

impl Store {
    fn sha512_path(&self, digest: &Digest) -> PathBuf {
        self.dir.join(SHA512).join(digest.hex())
    }

    /// The SHA-512 that an image's bytes were seen to have, in hexadecimal digits; none when that is not known.
    pub(in crate::image) fn sha512(&self, digest: &Digest) -> Result<Option<String>, Error> {
        read_record(&self.sha512_path(digest))
    }

    /// Remembers it of an image that is here.
    pub(in crate::image) fn note_sha512(&self, digest: &Digest, sum: &str) -> Result<(), Error> {
        let path = self.sha512_path(digest);
        self.write_small(&path, &serialised(&sum, &path)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_of_an_image_goes_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let [here, gone, removed] = [&b"here"[..], b"gone", b"removed"].map(Digest::of);
        std::fs::create_dir(dir.path().join("disks").join(here.hex())).unwrap();
        for digest in [here, gone, removed] {
            assert_eq!(store.sha512(&digest).unwrap(), None);
            store.note_sha512(&digest, "ab").unwrap();
            assert_eq!(store.sha512(&digest).unwrap().as_deref(), Some("ab"));
        }
        store.forget_traces(&removed).unwrap();
        assert_eq!(store.sha512(&removed).unwrap(), None);
        store.tidy().unwrap();
        assert_eq!(store.sha512(&gone).unwrap(), None);
        assert!(store.sha512(&here).unwrap().is_some());
        // What cannot be read is nothing.
        std::fs::write(store.sha512_path(&gone), "{").unwrap();
        assert_eq!(store.sha512(&gone).unwrap(), None);
    }
}
