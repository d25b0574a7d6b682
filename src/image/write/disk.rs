//! The disk that is about to be written: a guest's bytes, and the file as it is.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use rustix::fs::SeekFrom;

/// What a guest sees of a disk.
pub(in crate::image) trait Guest {
    /// Bytes.
    fn size(&self) -> u64;
    /// Fills `buffer` from `offset`; all of it lies within the disk.
    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// The first stretch at or behind `from` that may hold anything but zeros.
    fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>>;
}

/// A raw disk, holes and all.
#[derive(Debug)]
pub(in crate::image) struct Raw {
    file: File,
    size: u64,
}

impl Raw {
    pub(in crate::image) fn open(path: &Path) -> io::Result<Self> {
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

    fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        if from >= self.size {
            return Ok(None);
        }
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(from)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            // A file system that knows no holes.
            Err(rustix::io::Errno::INVAL) => return Ok(Some(from..self.size)),
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(&self.file, SeekFrom::Hole(start))?;
        Ok((start < self.size).then(|| start..end.min(self.size)))
    }
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

    fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        Ok((from < self.size()).then(|| from..self.size()))
    }
}
