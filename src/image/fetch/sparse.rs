//! Writes a file and leaves holes where there would be zeros.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::progress::Meter;
use super::room::Room;
use crate::image::error::Error;
use crate::kill::{self, Point};

/// A piece that becomes a hole when it is all zeros: the cluster of a qcow2, and a multiple of every file
/// system's block.
const BLOCK: usize = 64 * 1024;

/// Bytes written between two looks at the free space. Small against any sensible reserve.
const LOOK_EVERY: u64 = 32 << 20;

static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// A file in the making.
pub(in crate::image) struct SparseFile {
    file: File,
    path: PathBuf,
    room: Room,
    meter: Arc<Meter>,
    /// Length so far, the block in hand included.
    length: u64,
    /// The block in hand, not written yet.
    block: Vec<u8>,
    /// Bytes that are no holes, since the last look at the free space.
    since_look: u64,
    /// Final length, where it is known.
    expected: Option<u64>,
}

impl SparseFile {
    /// Makes the file, which must not exist. `expected` is its final length, for the message when the disk
    /// is full.
    pub(in crate::image) fn create(
        path: &Path,
        room: Room,
        meter: Arc<Meter>,
        expected: Option<u64>,
    ) -> Result<Self, Error> {
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(|error| room.write_failed(path, error, expected.unwrap_or_default()))?;
        kill::point(Point::LayerBegun);
        Ok(Self {
            file,
            path: path.to_owned(),
            room,
            meter,
            length: 0,
            block: Vec::with_capacity(BLOCK),
            since_look: 0,
            expected,
        })
    }

    /// Appends.
    pub(in crate::image) fn write(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            let take = bytes.len().min(BLOCK - self.block.len());
            if take == BLOCK {
                self.put(&bytes[..BLOCK], self.length)?;
            } else {
                self.block.extend_from_slice(&bytes[..take]);
            }
            self.length += take as u64;
            if self.block.len() == BLOCK {
                self.flush()?;
            }
            self.meter.add_unpacked(take);
            bytes = &bytes[take..];
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Error> {
        let block = std::mem::take(&mut self.block);
        self.put(&block, self.length - block.len() as u64)?;
        self.block = block;
        self.block.clear();
        Ok(())
    }

    fn put(&mut self, block: &[u8], at: u64) -> Result<(), Error> {
        if block == &ZEROS[..block.len()] {
            return Ok(());
        }
        if self.since_look >= LOOK_EVERY {
            self.room.require(LOOK_EVERY)?;
            self.since_look = 0;
        }
        let missing = self
            .expected
            .unwrap_or_default()
            .saturating_sub(at)
            .max(block.len() as u64);
        self.file
            .write_all_at(block, at)
            .map_err(|error| self.room.write_failed(&self.path, error, missing))?;
        self.since_look += block.len() as u64;
        Ok(())
    }

    /// Ends the file with its last hole and brings it to the disk; its length in bytes.
    pub(in crate::image) fn finish(mut self) -> Result<u64, Error> {
        self.flush()?;
        let end = self.file.set_len(self.length).and_then(|()| self.file.sync_all());
        end.map_err(|error| self.room.write_failed(&self.path, error, 0))?;
        Ok(self.length)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use proptest::prelude::*;

    use super::*;

    fn write(pieces: &[Vec<u8>]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let room = Room::new("vm", dir.path(), 0);
        let mut file = SparseFile::create(&path, room, Arc::default(), None).unwrap();
        for piece in pieces {
            file.write(piece).unwrap();
        }
        let total: usize = pieces.iter().map(Vec::len).sum();
        assert_eq!(file.finish().unwrap(), total as u64);
        (dir, path)
    }

    #[test]
    fn zeros_take_no_room() {
        let (_dir, path) = write(&[vec![0; 8 << 20], vec![1; BLOCK], vec![0; 8 << 20]]);
        let metadata = path.metadata().unwrap();
        assert_eq!(metadata.len(), (16 << 20) + BLOCK as u64);
        assert!(
            metadata.blocks() * 512 <= 2 * BLOCK as u64,
            "{} blocks",
            metadata.blocks()
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn what_is_read_is_what_was_written(shape in prop::collection::vec((0_usize..200_000, any::<bool>()), 0..6)) {
            let pieces: Vec<Vec<u8>> = shape
                .iter()
                .map(|&(length, data)| (0..=250_u8).cycle().take(length).map(|byte| if data { byte } else { 0 }).collect())
                .collect();
            let (_dir, path) = write(&pieces);
            prop_assert!(std::fs::read(path).unwrap() == pieces.concat());
        }
    }
}
