//! What a guest sees of a disk: of a raw file, and of a qcow2 with the files under it.
//!
//! Only files that passed the header check are opened, each with the format that it was found or said to have; nothing is
//! probed.

mod qcow2;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::SeekFrom;

use super::error::Error;
use super::inspect::DiskFormat;
use qcow2::Qcow2;
#[cfg(any(test, fuzzing))]
pub(super) use qcow2::fuzz as fuzz_qcow2;

/// Most files that lie upon each other. libvirt's snapshots of years stay below.
pub(super) const DEPTH_MAX: usize = 64;

/// What a guest sees of a disk.
pub(super) trait Guest {
    /// Bytes.
    fn size(&self) -> u64;
    /// Fills `buffer` from `offset`; all of it lies within the disk.
    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// The first stretch of this range, which lies within the disk, that may hold anything but zeros. What lies behind the range
    /// is not looked at: whoever asks for a small one must not wait for a large disk.
    fn next_data(&self, within: Range<u64>) -> io::Result<Option<Range<u64>>>;
}

/// A raw disk, holes and all.
#[derive(Debug)]
pub(super) struct Raw {
    file: File,
    size: u64,
}

impl Raw {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        Ok(Self { file, size })
    }
}

impl Guest for Raw {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn next_data(&self, within: Range<u64>) -> io::Result<Option<Range<u64>>> {
        if within.is_empty() {
            return Ok(None);
        }
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(within.start)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            // A file system that knows no holes.
            Err(rustix::io::Errno::INVAL) => return Ok(Some(within)),
            Err(error) => return Err(error.into()),
        };
        if start >= within.end {
            return Ok(None);
        }
        let end = rustix::fs::seek(&self.file, SeekFrom::Hole(start))?;
        Ok(Some(start..end.min(within.end)))
    }
}

/// Opens files that lie upon each other, the topmost first. Each has passed the header check, and none but the last stands
/// alone.
pub(super) fn stacked(files: &[(PathBuf, DiskFormat)]) -> Result<Box<dyn Guest + Send>, Error> {
    let mut guest: Option<Box<dyn Guest + Send>> = None;
    for (path, format) in files.iter().rev() {
        let opened: io::Result<Box<dyn Guest + Send>> = match format {
            DiskFormat::Raw => Raw::open(path).map(|raw| Box::new(raw) as _),
            DiskFormat::Qcow2 => Qcow2::open(path, guest.take()).map(|qcow2| Box::new(qcow2) as _),
        };
        guest = Some(opened.map_err(Error::storage(path))?);
    }
    guest.ok_or_else(|| Error::Storage {
        path: PathBuf::new(),
        source: io::ErrorKind::NotFound.into(),
    })
}

#[cfg(test)]
impl<T: AsRef<[u8]>> Guest for T {
    fn size(&self) -> u64 {
        self.as_ref().len() as u64
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap();
        buffer.copy_from_slice(&self.as_ref()[start..start + buffer.len()]);
        Ok(())
    }

    fn next_data(&self, within: Range<u64>) -> io::Result<Option<Range<u64>>> {
        Ok((!within.is_empty()).then_some(within))
    }
}
