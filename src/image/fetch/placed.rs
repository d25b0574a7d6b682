//! Files whose bytes arrive in any order. Zeros stay holes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::FallocateFlags;

use super::progress::Meter;
use super::room::Room;
use crate::image::error::Error;

/// A piece that stays a hole when it is all zeros: the cluster of a qcow2, and a multiple of every file system's block.
const BLOCK: usize = 64 * 1024;

/// Bytes written between two looks at the free space. Small against any sensible reserve.
const LOOK_EVERY: u64 = 32 << 20;

static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// A file of known length in the making; several threads write to it.
#[derive(Debug)]
pub(super) struct PlacedFile {
    file: File,
    path: PathBuf,
    room: Room,
    meter: Arc<Meter>,
    /// Bytes written since the last look at the free space.
    since_look: AtomicU64,
}

impl PlacedFile {
    /// Makes the file, or goes on with what an earlier process made of it.
    pub(super) fn open(path: &Path, length: u64, room: Room, meter: Arc<Meter>) -> Result<Self, Error> {
        let open = || {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(path)?;
            file.set_len(length)?;
            Ok(file)
        };
        let file = open().map_err(|error| room.write_failed(path, error, 0))?;
        Ok(Self {
            file,
            path: path.to_owned(),
            room,
            meter,
            since_look: AtomicU64::new(0),
        })
    }

    /// Writes bytes where there are only zeros, or the same bytes, so far.
    pub(super) fn write(&self, bytes: &[u8], at: u64) -> Result<(), Error> {
        if self.since_look.load(Ordering::Relaxed) >= LOOK_EVERY {
            self.since_look.store(0, Ordering::Relaxed);
            self.room.require_next(LOOK_EVERY)?;
        }
        // Blocks of the file, not of what is written: only a whole block can stay a hole.
        let lead = BLOCK - usize::try_from(at % BLOCK as u64).unwrap_or_default();
        let mut run = 0..0;
        let mut next = 0;
        let mut end = lead.min(bytes.len());
        while next < bytes.len() {
            let block = &bytes[next..end];
            if *block == ZEROS[..block.len()] {
                self.put(&bytes[run.clone()], at + run.start as u64)?;
                run = end..end;
            } else {
                run.end = end;
            }
            (next, end) = (end, (end + BLOCK).min(bytes.len()));
        }
        self.put(&bytes[run.clone()], at + run.start as u64)?;
        self.meter.add_unpacked(bytes.len());
        Ok(())
    }

    fn put(&self, bytes: &[u8], at: u64) -> Result<(), Error> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.since_look.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.file
            .write_all_at(bytes, at)
            .map_err(|error| self.failed(error, bytes.len() as u64))
    }

    /// Makes a place all zeros again, which may hold bytes that were never verified.
    pub(super) fn clear(&self, at: u64, length: u64) -> Result<(), Error> {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, hole, at, length) {
            Ok(()) => Ok(()),
            // A file system without holes.
            Err(rustix::io::Errno::OPNOTSUPP) => {
                let mut at = at;
                let end = at + length;
                while at < end {
                    let count = usize::try_from(end - at).unwrap_or(BLOCK).min(BLOCK);
                    self.put(&ZEROS[..count], at)?;
                    at += count as u64;
                }
                Ok(())
            }
            Err(error) => Err(self.failed(error.into(), 0)),
        }
    }

    fn failed(&self, error: io::Error, missing: u64) -> Error {
        self.room.write_failed(&self.path, error, missing)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use proptest::prelude::*;

    use super::*;

    fn file(length: u64) -> (tempfile::TempDir, PlacedFile) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        let room = Room::new("vm", dir.path(), 0);
        let file = PlacedFile::open(&path, length, room, Arc::default()).unwrap();
        (dir, file)
    }

    #[test]
    fn zeros_take_no_room_and_what_is_cleared_is_given_back() {
        let (_dir, file) = file(64 << 20);
        let mut bytes = vec![0; 8 << 20];
        bytes[1 << 20] = 1;
        file.write(&bytes, 3).unwrap();
        file.file.sync_all().unwrap();
        let data = file.path.metadata().unwrap();
        assert_eq!(data.len(), 64 << 20);
        assert!(
            data.blocks() * 512 <= 2 * BLOCK as u64,
            "{} blocks",
            data.blocks()
        );
        file.clear(0, 64 << 20).unwrap();
        assert_eq!(file.path.metadata().unwrap().blocks(), 0);
        assert_eq!(file.path.metadata().unwrap().len(), 64 << 20);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn what_is_read_is_what_was_written(
            shape in prop::collection::vec((0_usize..200_000, any::<bool>()), 1..8),
        ) {
            let mut whole = Vec::new();
            let mut parts = Vec::new();
            for (length, data) in shape {
                let bytes: Vec<u8> = (0..=250_u8).cycle().take(length).map(|b| if data { b } else { 0 }).collect();
                parts.push((whole.len() as u64, bytes.clone()));
                whole.extend(bytes);
            }
            let (_dir, file) = file(whole.len() as u64);
            // Every second first: they come in any order.
            let (odd, even): (Vec<_>, Vec<_>) = parts.into_iter().enumerate().partition(|(number, _)| number % 2 == 1);
            for (_, (at, bytes)) in odd.into_iter().chain(even) {
                file.write(&bytes, at).unwrap();
            }
            prop_assert!(std::fs::read(&file.path).unwrap() == whole);
        }
    }
}
