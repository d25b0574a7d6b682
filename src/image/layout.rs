//! Images in an OCI layout folder of this host (OCI image specification, `image-layout.md`).

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use oci_client::manifest::OciImageIndex;

use super::digest::Digest;
use super::error::Error;
use super::manifest::Descriptor;
use super::source::DOCUMENT_MAX;

/// The annotation that carries a tag in a layout's index.
pub(super) const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// One image in a layout folder.
#[derive(Debug)]
pub(super) struct Layout {
    image: String,
    dir: PathBuf,
    tag: String,
}

impl Layout {
    pub(super) fn new(image: &str, dir: &Path, tag: &str) -> Self {
        Self {
            image: image.to_owned(),
            dir: dir.to_owned(),
            tag: tag.to_owned(),
        }
    }

    pub(super) fn image(&self) -> &str {
        &self.image
    }

    /// The manifest or index with our tag. Several entries with one tag (one for each platform, as umoci
    /// writes them) become an index of their own.
    pub(super) fn root(&self) -> Result<(Digest, Vec<u8>), Error> {
        if !self.dir.join("oci-layout").is_file() {
            return Err(Error::NotFound {
                image: self.image.clone(),
                registry: String::new(),
            });
        }
        let bytes = self.read(&self.dir.join("index.json"))?;
        let malformed = |reason: String| Error::Malformed {
            image: self.image.clone(),
            reason,
        };
        let mut index: OciImageIndex = serde_json::from_slice(&bytes)
            .map_err(|error| malformed(format!("index.json of the layout is no image index ({error})")))?;
        index.manifests.retain(|entry| {
            entry
                .annotations
                .as_ref()
                .and_then(|all| all.get(REF_NAME))
                .is_some_and(|name| *name == self.tag)
        });
        match index.manifests.as_slice() {
            [] => Err(Error::NotFound {
                image: self.image.clone(),
                registry: String::new(),
            }),
            [entry] => {
                let digest: Digest = entry
                    .digest
                    .parse()
                    .map_err(|error| malformed(format!("its index.json is wrong: {error}")))?;
                let bytes = self.document(&digest)?;
                let found = Digest::of(&bytes);
                if found != digest {
                    return Err(self.damaged(&digest, format!("has the digest {found}")));
                }
                Ok((digest, bytes))
            }
            _ => {
                let bytes = serde_json::to_vec(&index)
                    .map_err(|error| malformed(format!("its index.json is wrong: {error}")))?;
                Ok((Digest::of(&bytes), bytes))
            }
        }
    }

    /// A small blob, whole; the caller verifies it.
    pub(super) fn document(&self, digest: &Digest) -> Result<Vec<u8>, Error> {
        self.read(&self.blob_path(digest))
    }

    /// A layer's file.
    pub(super) fn open(&self, descriptor: &Descriptor) -> Result<File, Error> {
        let path = self.blob_path(&descriptor.digest);
        let file = self.open_file(&path)?;
        let length = file
            .metadata()
            .map_err(|error| self.unreadable(&path, error))?
            .len();
        if length != descriptor.size {
            let reason = format!("has {length} bytes instead of {}", descriptor.size);
            return Err(self.damaged(&descriptor.digest, reason));
        }
        Ok(file)
    }

    /// A blob is not what it should be; `reason` is the rest of a sentence about it.
    pub(super) fn damaged(&self, blob: &Digest, reason: String) -> Error {
        Error::DamagedLayout {
            image: self.image.clone(),
            path: self.blob_path(blob),
            reason,
        }
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.dir.join("blobs").join("sha256").join(digest.hex())
    }

    fn open_file(&self, path: &Path) -> Result<File, Error> {
        // Asked before opening: a pipe would hold us until somebody writes to it.
        let metadata = std::fs::metadata(path).map_err(|error| self.unreadable(path, error))?;
        if !metadata.is_file() {
            return Err(self.unreadable(path, io::Error::other("it is no plain file")));
        }
        File::open(path).map_err(|error| self.unreadable(path, error))
    }

    fn read(&self, path: &Path) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        let file = self.open_file(path)?;
        file.take(DOCUMENT_MAX + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| self.unreadable(path, error))?;
        if bytes.len() as u64 > DOCUMENT_MAX {
            let size = bytes.len() as u64;
            return Err(Error::TooLarge {
                image: self.image.clone(),
                what: "manifest",
                size,
                limit: DOCUMENT_MAX,
            });
        }
        Ok(bytes)
    }

    /// A file that the layout should have and does not is damage; any other failure is the host's.
    fn unreadable(&self, path: &Path, error: io::Error) -> Error {
        if error.kind() == io::ErrorKind::NotFound {
            return Error::DamagedLayout {
                image: self.image.clone(),
                path: path.to_owned(),
                reason: "is missing".to_owned(),
            };
        }
        Error::Storage {
            path: path.to_owned(),
            source: error,
        }
    }
}
