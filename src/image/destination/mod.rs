//! Where an image is written: a registry or a layout folder, with the few calls that a writer needs.
//!
//! A writer asks whether a blob is there, mounts or uploads what is missing, and stores the manifest last: then the image
//! appears whole. Blobs may be written by several tasks at once.

use bytes::Bytes;

use super::digest::Digest;
use super::error::Error;
use super::reference::Reference;
use super::registry::credentials::Credentials;
use super::registry::{Purpose, Registries, Session, Target, Unanswered, Upload};

mod layout;

use layout::{Blob, LayoutWriter};

/// Where one image is written.
#[derive(Debug)]
pub(super) enum Destination {
    Registry(Box<Session>),
    Layout(LayoutWriter),
}

/// A blob on its way there, whose digest is known at its end.
#[derive(Debug)]
pub(super) enum Stream {
    Registry(Box<Upload>),
    Layout(Blob),
}

impl Destination {
    /// Opens what a reference names. A registry is not asked yet; a layout folder is made if it does not exist.
    pub(super) async fn open(
        reference: &Reference,
        credentials: &Credentials,
        registries: &Registries,
    ) -> Result<Self, Error> {
        let image = reference.to_string();
        match reference {
            Reference::Layout { dir, .. } => Ok(Self::Layout(LayoutWriter::open(dir, &image)?)),
            Reference::File { .. } | Reference::Web { .. } => Err(Error::Unsupported {
                image,
                reason: "images are written to registries and layout folders only".to_owned(),
            }),
            Reference::Registry {
                registry,
                repository,
                tag,
                digest,
            } => {
                let name = match (digest, tag) {
                    (Some(digest), _) => digest.to_string(),
                    (None, Some(tag)) => tag.clone(),
                    (None, None) => "latest".to_owned(),
                };
                let session = Session::open(Target {
                    image: &image,
                    registry,
                    repository,
                    name,
                    credentials,
                    registries,
                    purpose: Purpose::Write,
                })
                .await?;
                Ok(Self::Registry(Box::new(session)))
            }
        }
    }

    /// The registry that is waited for, where that takes long.
    pub(super) fn unanswered(&self) -> Option<Unanswered> {
        match self {
            Self::Registry(session) => session.unanswered(),
            Self::Layout(_) => None,
        }
    }

    /// The size of a blob in bytes, if it is there.
    pub(super) async fn has_blob(&self, digest: &Digest) -> Result<Option<u64>, Error> {
        match self {
            Self::Registry(session) => session.has_blob(digest).await,
            Self::Layout(layout) => layout.has_blob(digest),
        }
    }

    /// Takes a blob over from another repository of the same registry; false where that is not possible.
    pub(super) async fn mount(&self, digest: &Digest, from: &str) -> Result<bool, Error> {
        match self {
            Self::Registry(session) => session.mount(digest, from).await,
            Self::Layout(_) => Ok(false),
        }
    }

    /// Writes a blob that is in memory. Whether it is there already is not asked.
    pub(super) async fn upload(&self, digest: &Digest, bytes: Bytes) -> Result<(), Error> {
        match self {
            Self::Registry(session) => session.upload(digest, bytes).await,
            Self::Layout(layout) => layout.put_blob(digest, bytes).await,
        }
    }

    /// Begins a blob that comes piece by piece.
    pub(super) async fn stream(&self) -> Result<Stream, Error> {
        match self {
            Self::Registry(session) => Ok(Stream::Registry(Box::new(session.upload_stream()))),
            Self::Layout(layout) => layout.blob().await.map(Stream::Layout),
        }
    }

    /// Stores a manifest or an index under a tag, or under its own digest. Its blobs must be there.
    pub(super) async fn put_manifest(
        &self,
        name: &str,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<Digest, Error> {
        match self {
            Self::Registry(session) => session.put_manifest(name, media_type, bytes).await,
            Self::Layout(layout) => layout.put_manifest(name, media_type, bytes).await,
        }
    }
}

impl Stream {
    /// Adds bytes.
    pub(super) async fn write(&mut self, bytes: Bytes) -> Result<(), Error> {
        match self {
            Self::Registry(upload) => upload.write(bytes).await,
            Self::Layout(blob) => blob.write(bytes).await,
        }
    }

    /// Ends the blob, which has this digest: what was written must be hashed on its way here.
    pub(super) async fn finish(self, digest: &Digest) -> Result<(), Error> {
        match self {
            Self::Registry(upload) => upload.finish(digest).await,
            Self::Layout(blob) => blob.finish(digest).await,
        }
    }

    /// Gives the blob up.
    pub(super) async fn cancel(self) {
        match self {
            Self::Registry(upload) => upload.cancel().await,
            Self::Layout(blob) => drop(blob),
        }
    }
}
