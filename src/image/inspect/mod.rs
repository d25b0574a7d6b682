//! The header check: no QEMU tool, and no libvirt, sees a file that has not passed here.
//!
//! QEMU trusts what a disk says about itself. A qcow2 can name another file as its backing file or its data
//! file, and QEMU, which runs with more rights than the image's author, opens that file. So the header is read
//! by us first, with bounds on everything that it claims.

mod layer;
mod qcow2;
mod raw;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::{Error, quoted};

pub(super) use layer::{Backing, Said, layer};

/// How a disk's bytes are to be read. QEMU is always told, and never left to guess.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// Sector by sector.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

/// What an image must not do; each is a class of attack or of damage.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Hostility {
    /// An archive entry with an absolute name.
    #[error("an archive entry has the absolute name {}", quoted(.0))]
    AbsoluteName(String),
    /// An archive entry that climbs out of the archive.
    #[error("an archive entry climbs out with `..`: {}", quoted(.0))]
    ParentName(String),
    /// A link where a disk, a kernel or their folders should be.
    #[error("{} is a link in the archive; only plain files are taken", quoted(.0))]
    Link(String),
    /// A device, pipe or other special file at such a place.
    #[error("{} is a special file in the archive; only plain files are taken", quoted(.0))]
    SpecialFile(String),
    /// It unpacks to far more than it was sent as, for nothing.
    #[error("it is a bomb: what it unpacks to beside its disk is far more than what was sent")]
    Bomb,
    /// Two readers of the archive would see two different contents.
    #[error("the archive is ambiguous: {0}")]
    AmbiguousArchive(&'static str),
    /// The disk names another file to read from.
    #[error("its disk names a backing file")]
    BackingFile,
    /// The disk keeps its data in another file.
    #[error("its disk names an external data file")]
    DataFile,
    /// The disk is encrypted.
    #[error("its disk is encrypted")]
    Encrypted,
    /// The disk needs features that we do not know.
    #[error("its disk has unknown incompatible features (bits {0:#x})")]
    UnknownFeature(u64),
    /// The disk was not closed cleanly, or says of itself that it is damaged.
    #[error(
        "its disk is marked as {0}; `qemu-img check -r all` or `qemu-img convert` mends it before it is pushed"
    )]
    Unclean(&'static str),
    /// A table of the disk lies outside of its file.
    #[error("the {0} of its disk lies outside of the file")]
    TableOutside(&'static str),
    /// Tables of the disk share bytes.
    #[error("tables of its disk overlap")]
    TablesOverlap,
    /// A number in the disk's header is out of its bounds.
    #[error("its disk has an impossible {0}")]
    Impossible(&'static str),
    /// The disk is of another format, which QEMU would recognise if it were left to guess.
    #[error("its disk is in the format {0}; only qcow2 and raw are taken")]
    ForeignFormat(&'static str),
}

/// A disk that has passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Inspected {
    pub(super) format: DiskFormat,
    /// What the guest sees, in bytes.
    pub(super) virtual_size: u64,
}

/// Why a disk did not pass.
#[derive(Debug)]
pub(super) enum Finding {
    Hostile(Hostility),
    /// Larger than allowed; its size in bytes.
    TooLarge(u64),
    /// The file could not be read.
    Io(io::Error),
}

impl From<Hostility> for Finding {
    fn from(class: Hostility) -> Self {
        Self::Hostile(class)
    }
}

impl From<io::Error> for Finding {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Bytes that can be read at any place; a file, or a slice in tests.
trait ReadAt {
    fn length(&self) -> io::Result<u64>;
    /// Fills `buffer` from `offset`; the caller has checked that the bytes are there.
    fn fill(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for File {
    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn fill(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }
}

/// Does a file that starts so claim to be a qcow2?
pub(super) fn is_qcow2(head: &[u8]) -> bool {
    head.starts_with(&qcow2::MAGIC)
}

/// Checks the disk at `path`. `limit` is the largest virtual size, in bytes.
///
/// Costs at most 8 MiB of memory and one pass over the disk's tables.
pub(super) fn disk(path: &Path, limit: u64, image: &str) -> Result<Inspected, Error> {
    let file = File::open(path).map_err(Error::storage(path))?;
    check(&file, limit).map_err(|finding| named(finding, path, limit, image))
}

/// Would these bytes be taken for a raw disk, if they were a file? `read` fills a buffer from an offset.
pub(super) fn is_raw(length: u64, read: impl Fn(&mut [u8], u64) -> io::Result<()>) -> io::Result<bool> {
    match check(&Read { length, read }, u64::MAX) {
        Ok(seen) => Ok(seen.format == DiskFormat::Raw),
        Err(Finding::Io(error)) => Err(error),
        Err(_) => Ok(false),
    }
}

/// Bytes that are no file.
struct Read<F> {
    length: u64,
    read: F,
}

impl<F: Fn(&mut [u8], u64) -> io::Result<()>> ReadAt for Read<F> {
    fn length(&self) -> io::Result<u64> {
        Ok(self.length)
    }

    fn fill(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        (self.read)(buffer, offset)
    }
}

/// A finding as the error that says whose it is.
fn named(finding: Finding, path: &Path, limit: u64, image: &str) -> Error {
    match finding {
        Finding::Hostile(class) => Error::Hostile {
            image: image.to_owned(),
            class,
        },
        Finding::TooLarge(size) => Error::TooLarge {
            image: image.to_owned(),
            what: "virtual disk",
            size,
            limit,
        },
        Finding::Io(source) => Error::Storage {
            path: path.to_owned(),
            source,
        },
    }
}

fn check(disk: &impl ReadAt, limit: u64) -> Result<Inspected, Finding> {
    let mut magic = [0; 4];
    let length = disk.length()?;
    if length >= 4 {
        disk.fill(&mut magic, 0)?;
    }
    if is_qcow2(&magic) {
        Ok(Inspected {
            format: DiskFormat::Qcow2,
            virtual_size: qcow2::check(disk, limit)?,
        })
    } else {
        Ok(Inspected {
            format: DiskFormat::Raw,
            virtual_size: raw::check(disk, limit)?,
        })
    }
}

/// Checks a file that is in memory.
#[cfg(any(test, fuzzing))]
pub(super) fn bytes(disk: &[u8], limit: u64) -> Result<Inspected, Finding> {
    check(&disk, limit)
}

#[cfg(any(test, fuzzing))]
impl ReadAt for &[u8] {
    fn length(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn fill(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        // Panics where the caller has not checked: that is the promise.
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        buffer.copy_from_slice(&self[start..start + buffer.len()]);
        Ok(())
    }
}
