//! Images in the formats that others read: what a disk becomes on its way into a registry, a layout folder or a file.
//!
//! ```text
//! Draft ─▶ file as it is, or qcow2 made while it is read ─▶ tar ─▶ packed on all cores ─▶ blobs of the destination
//! ```
//!
//! | format | modules |
//! |---|---|
//! | our own | `native` |
//! | containerDisk | `container_disk` |
//! | sardinecake | `sardinecake` |
//! | plain qcow2 artifact | `qcow2` |
//!
//! Everything is a stream: no copy of the disk lies anywhere meanwhile, and memory does not grow with it. The same disk and
//! labels give the same digests, whoever writes them when.

mod chain;
mod container_disk;
mod disk;
mod documents;
mod draft;
mod feed;
mod native;
mod pack;
mod qcow2;
mod sardinecake;

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use super::destination::Destination;
use super::digest::{Digest, Hasher};
use super::error::Error;
use super::inspect::DiskFormat;
use super::manifest::Descriptor;
use super::progress::{Progress, told_of_silence};
use super::reference::Reference;
use super::registry::Registries;
use super::registry::credentials::Credentials;
use super::view::{Guest as _, Raw};
use crate::record::{self, Unnamed};
use disk::Body;
use documents::{Document, Unpacked};
use feed::Read;

pub(super) use disk::fill;
pub use draft::Draft;
pub use native::Native;
pub use pack::Packing;

/// The media type of a plain disk, which is that of its artifact, too.
const QCOW2_TYPE: &str = "application/vnd.qemu.qcow2";

/// What KubeVirt's own builder puts there: such an image starts nothing by itself.
const NO_ENTRYPOINT: &str = "no-entrypoint";

/// A format that images are written in.
#[derive(Debug, Clone, Copy)]
pub enum Format<'a> {
    /// Our own: chunks, of which only those are sent that no earlier image has.
    Native(Native<'a>),
    /// KubeVirt's containerDisk: the disk as it is, in a packed tar.
    ContainerDisk(Packing),
    /// sardinecake's: a qcow2 in gzip, in parts.
    Sardinecake,
    /// One blob that is a qcow2, as ORAS pushes it.
    Qcow2,
}

/// An image that was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// The digest of its manifest.
    pub digest: Digest,
    /// What its blobs have together, in bytes.
    pub size: u64,
}

/// Where an image is written, and with which rights.
#[derive(Debug, Clone, Copy)]
pub struct Addressee<'a> {
    /// The name that it gets: a tag of a registry's repository or of a layout folder.
    pub reference: &'a Reference,
    /// Logins that may be used.
    pub credentials: &'a Credentials,
    /// How registries are reached.
    pub registries: &'a Registries,
}

/// Writes an image. It appears under its name when all of it is there.
///
/// # Errors
/// What the destination refuses, a disk that cannot be read, [`Error::CannotHold`], or [`Error::Unnameable`] where the name
/// is a digest.
pub async fn write(
    draft: &Draft,
    format: Format<'_>,
    to: Addressee<'_>,
    progress: &dyn Progress,
) -> Result<Written, Error> {
    let name = match to.reference {
        Reference::Layout { tag, .. }
        | Reference::Registry {
            tag: Some(tag),
            digest: None,
            ..
        } => tag,
        Reference::Registry { .. } | Reference::File { .. } | Reference::Web { .. } => {
            return Err(Error::Unnameable {
                image: to.reference.to_string(),
            });
        }
    };
    let destination = Destination::open(to.reference, to.credentials, to.registries).await?;
    let work = Work {
        draft,
        to,
        destination: &destination,
        progress,
    };
    told_of_silence(progress, || destination.unanswered(), work.all(format, name)).await
}

/// One image on its way out.
struct Work<'a> {
    draft: &'a Draft,
    to: Addressee<'a>,
    destination: &'a Destination,
    progress: &'a dyn Progress,
}

impl Work<'_> {
    async fn all(&self, format: Format<'_>, name: &str) -> Result<Written, Error> {
        let (manifest, size) = match format {
            Format::Native(how) => self.native(how).await?,
            Format::ContainerDisk(packing) => self.container_disk(packing).await?,
            Format::Sardinecake => self.sardinecake().await?,
            Format::Qcow2 => self.plain().await?,
        };
        let media_type = &manifest.descriptor.media_type;
        let digest = self
            .destination
            .put_manifest(name, media_type, manifest.bytes.into())
            .await?;
        Ok(Written { digest, size })
    }

    async fn container_disk(&self, packing: Packing) -> Result<(Document, u64), Error> {
        let draft = self.draft;
        let body = Body::of(draft)?;
        let mut kernel = Vec::new();
        if let Some(boot) = &draft.boot {
            let initrd = boot
                .initrd
                .as_ref()
                .map(|initrd| (container_disk::INITRD, initrd));
            for (name, path) in [(container_disk::KERNEL, &boot.kernel)].into_iter().chain(initrd) {
                kernel.push((name, Raw::open(path).map_err(Error::storage(path))?));
            }
        }
        let total = body.length() + kernel.iter().map(|(_, file)| file.size()).sum::<u64>();
        let read = Arc::new(Read::default());
        let (meter, disk) = (Arc::clone(&read), draft.disk.clone());
        let make = move |outlet: &mut feed::Outlet| {
            let mut packer = pack::Packer::new(outlet, packing, None)?;
            let mut hashed = Hashed::new(&mut packer);
            let mut archive = container_disk::Archive::new(&mut hashed);
            for (name, file) in &kernel {
                archive.add(name, file.size(), &mut |out| disk::copy(file, &meter, out))?;
            }
            archive.add(container_disk::DISK, body.length(), &mut |out| {
                body.copy(&meter, out)
            })?;
            archive.finish()?;
            let diff_id = hashed.finish();
            packer.finish()?;
            Ok(diff_id)
        };
        let make = move |outlet: &mut feed::Outlet| make(outlet).map_err(Error::storage(disk));
        let (blobs, diff_id) = feed::send(self.destination, &read, total, self.progress, make).await?;
        let media_type = match packing {
            Packing::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Packing::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        };
        let layers = layers(&blobs, |_| media_type.to_owned());
        let unpacked = Unpacked {
            diff_id,
            made_by: "cannery: the disk of a virtual machine".to_owned(),
        };
        let config = documents::config(
            &draft.architecture,
            &draft.labels,
            Some(NO_ENTRYPOINT),
            &[unpacked],
        );
        self.send_document(&config).await?;
        let manifest = documents::manifest(None, &config.descriptor, &layers, &Default::default());
        Ok((manifest, size(&layers)))
    }

    async fn sardinecake(&self) -> Result<(Document, u64), Error> {
        let draft = self.draft;
        self.without_kernel("a sardinecake image")?;
        let domain = sardinecake::domain(&draft.hints, &draft.machine);
        let domain = Document::new(sardinecake::DOMAIN_TYPE, domain.into_bytes());
        self.send_document(&domain).await?;
        let source = Body::qcow2(draft)?;
        let read = Arc::new(Read::default());
        let (meter, disk) = (Arc::clone(&read), draft.disk.clone());
        let total = source.length();
        let make = move |outlet: &mut feed::Outlet| {
            let mut cutter =
                sardinecake::Cutter::new(sardinecake::PART, |bytes: Option<&[u8]>| match bytes {
                    Some(bytes) => outlet.write_all(bytes),
                    None => outlet.cut(),
                });
            let mut packer = pack::Packer::new(&mut cutter, Packing::Gzip, Some(sardinecake::DISK_NAME))?;
            let mut hashed = Hashed::new(&mut packer);
            source.copy(&meter, &mut hashed)?;
            let diff_id = hashed.finish();
            packer.finish()?;
            cutter.finish()?;
            Ok(diff_id)
        };
        let make = move |outlet: &mut feed::Outlet| make(outlet).map_err(Error::storage(disk));
        let (blobs, diff_id) = feed::send(self.destination, &read, total, self.progress, make).await?;
        let mut all = vec![domain.descriptor.clone()];
        all.extend(layers(&blobs, sardinecake::part_type));
        let unpacked = [
            Unpacked {
                diff_id: domain.descriptor.digest,
                made_by: "cannery: the description of a machine".to_owned(),
            },
            Unpacked {
                diff_id,
                made_by: format!("cannery: {}", sardinecake::DISK_NAME),
            },
        ];
        let config = documents::config(&draft.architecture, &draft.labels, None, &unpacked);
        self.send_document(&config).await?;
        let manifest = documents::manifest(None, &config.descriptor, &all, &Default::default());
        Ok((manifest, size(&all)))
    }

    async fn plain(&self) -> Result<(Document, u64), Error> {
        let draft = self.draft;
        self.without_kernel("a plain qcow2")?;
        let source = Body::qcow2(draft)?;
        let read = Arc::new(Read::default());
        let (meter, disk) = (Arc::clone(&read), draft.disk.clone());
        let total = source.length();
        let make = move |outlet: &mut feed::Outlet| source.copy(&meter, outlet).map_err(Error::storage(disk));
        let (blobs, ()) = feed::send(self.destination, &read, total, self.progress, make).await?;
        let mut layers = layers(&blobs, |_| QCOW2_TYPE.to_owned());
        for layer in &mut layers {
            let title = (documents::TITLE.to_owned(), sardinecake::DISK_NAME.to_owned());
            layer.annotations.extend([title]);
        }
        let config = documents::empty();
        self.send_document(&config).await?;
        // An artifact has no config of its own to carry labels.
        let manifest = documents::manifest(Some(QCOW2_TYPE), &config.descriptor, &layers, &draft.labels);
        Ok((manifest, size(&layers)))
    }

    fn without_kernel(&self, format: &'static str) -> Result<(), Error> {
        match self.draft.boot {
            None => Ok(()),
            Some(_) => Err(Error::CannotHold {
                format,
                what: "the kernel that this machine starts from; a containerDisk or a native image can",
            }),
        }
    }

    async fn send_document(&self, document: &Document) -> Result<(), Error> {
        let bytes = document.bytes.clone().into();
        self.destination.upload(&document.descriptor.digest, bytes).await
    }
}

/// Writes the disk into a new file, which appears under its name when it is whole; one that is there is left alone. The file's
/// length in bytes comes back.
///
/// # Errors
/// [`Error::Storage`].
pub async fn save(
    draft: &Draft,
    format: DiskFormat,
    path: &Path,
    progress: &dyn Progress,
) -> Result<u64, Error> {
    if path.symlink_metadata().is_ok() {
        return Err(Error::storage(path)(io::ErrorKind::AlreadyExists.into()));
    }
    let made = make(draft, format, record::folder_of(path), progress).await?;
    made.name(path).map_err(Error::storage(path))?;
    Ok(path.metadata().map_err(Error::storage(path))?.len())
}

/// Writes the disk into a file that is to get its name in `dir`, by whoever calls.
///
/// # Errors
/// [`Error::Storage`].
pub async fn make(
    draft: &Draft,
    format: DiskFormat,
    dir: &Path,
    progress: &dyn Progress,
) -> Result<Unnamed, Error> {
    let read = Arc::new(Read::default());
    let meter = Arc::clone(&read);
    let (source, folder) = (draft.clone(), dir.to_owned());
    let work = tokio::task::spawn_blocking(move || disk::make(&source, format, &folder, &meter));
    let made = feed::told(&|| read.so_far(), draft.virtual_size, progress, work).await;
    made.unwrap_or_else(|ended| feed::unwound(ended, dir))
}

fn layers(blobs: &[feed::Blob], media_type: impl Fn(usize) -> String) -> Vec<Descriptor> {
    let descriptor = |(number, blob): (usize, &feed::Blob)| Descriptor {
        media_type: media_type(number),
        digest: blob.digest,
        size: blob.size,
        annotations: Default::default(),
    };
    blobs.iter().enumerate().map(descriptor).collect()
}

fn size(layers: &[Descriptor]) -> u64 {
    layers.iter().map(|layer| layer.size).sum()
}

/// Hashes what passes through.
struct Hashed<W> {
    inner: W,
    hasher: Hasher,
}

impl<W> Hashed<W> {
    fn new(inner: W) -> Self {
        Self {
            inner,
            hasher: Hasher::default(),
        }
    }

    fn finish(self) -> Digest {
        self.hasher.finish()
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
