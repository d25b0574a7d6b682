//! A disk that is a file by itself: on this host, or on a web server.
//!
//! It becomes an image of one layer, so that all else goes its usual way. Its identity is the digest of its bytes.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde_json::json;

use super::digest::{Digest, Hasher};
use super::error::Error;
use super::manifest::{Descriptor, OCI_IMAGE_MEDIA_TYPE};

/// Bytes that are read and hashed at once.
const BLOCK: usize = 1 << 20;

/// The manifest of an image that is this file.
pub(super) fn manifest(name: &str, digest: &Digest, size: u64) -> Vec<u8> {
    let empty = b"{}";
    let document = json!({
        "schemaVersion": 2,
        "mediaType": OCI_IMAGE_MEDIA_TYPE,
        "config": {
            "mediaType": "application/vnd.oci.empty.v1+json",
            "digest": Digest::of(empty),
            "size": empty.len(),
        },
        "layers": [{
            "mediaType": "application/octet-stream",
            "digest": digest,
            "size": size,
            "annotations": {"org.opencontainers.image.title": name},
        }],
    });
    document.to_string().into_bytes()
}

/// A file of this host.
#[derive(Debug, Clone)]
pub(super) struct LocalFile {
    image: String,
    path: PathBuf,
    /// What its bytes must hash to, where the reference says so.
    expected: Option<Digest>,
}

impl LocalFile {
    pub(super) fn new(image: &str, path: &Path, expected: Option<Digest>) -> Self {
        Self {
            image: image.to_owned(),
            path: path.to_owned(),
            expected,
        }
    }

    pub(super) fn image(&self) -> &str {
        &self.image
    }

    /// Reads the file to its end, for its digest; and the manifest.
    pub(super) fn root(&self) -> Result<(Digest, Vec<u8>), Error> {
        let mut file = self.opened()?;
        let (mut hasher, mut size) = (Hasher::default(), 0);
        let mut buffer = vec![0; BLOCK];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => {
                    hasher.update(&buffer[..count]);
                    size += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::storage(&self.path)(error)),
            }
        }
        let found = hasher.finish();
        if self.expected.is_some_and(|expected| expected != found) {
            return Err(Error::NotAsPinned {
                image: self.image.clone(),
                reason: format!("has the digest {found}"),
            });
        }
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        Ok((found, manifest(&name, &found, size)))
    }

    /// The file, if it still has its length.
    pub(super) fn open(&self, descriptor: &Descriptor) -> Result<File, Error> {
        let file = self.opened()?;
        let length = file.metadata().map_err(Error::storage(&self.path))?.len();
        if length != descriptor.size {
            return Err(Error::Changed {
                image: self.image.clone(),
                reason: format!("had {} bytes and has {length} now", descriptor.size),
            });
        }
        Ok(file)
    }

    fn opened(&self) -> Result<File, Error> {
        let not_found = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => Error::NotFound {
                image: self.image.clone(),
                registry: String::new(),
            },
            _ => Error::storage(&self.path)(error),
        };
        // Asked before opening: a pipe would hold us until somebody writes to it.
        if !std::fs::metadata(&self.path).map_err(not_found)?.is_file() {
            return Err(Error::Unsupported {
                image: self.image.clone(),
                reason: "it is no plain file".to_owned(),
            });
        }
        File::open(&self.path).map_err(not_found)
    }
}
