//! Writes a file and leaves holes where there would be zeros.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::ledger::{Ledger, Making};
use super::progress::Meter;
use super::room::Room;
use crate::image::error::Error;
use crate::image::store::sum::Running;
use crate::kill::{self, Point};

/// A piece that becomes a hole when it is all zeros: the cluster of a qcow2, and a multiple of every file
/// system's block.
const BLOCK: usize = 64 * 1024;

/// Bytes written between two looks at the free space, each of which asks for as many: what must stay free is not touched.
const LOOK_EVERY: u64 = 4 << 20;

static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// A file in the making.
pub(in crate::image) struct SparseFile {
    state: Arc<Mutex<State>>,
    meter: Arc<Meter>,
    ledger: Arc<Ledger>,
}

struct State {
    file: File,
    path: PathBuf,
    room: Room,
    /// Length so far, the block in hand included.
    length: u64,
    /// Bytes that an earlier process has written and that are passed by.
    there: u64,
    /// The block in hand, not written yet. It ends at [`State::length`].
    block: Vec<u8>,
    /// Bytes that are no holes, since the last look at the free space.
    since_look: u64,
    /// Final length, where it is known.
    expected: Option<u64>,
    /// The sum of what was written; none for a file whose beginning another process has written.
    sum: Option<Running>,
}

impl SparseFile {
    /// Makes the file, or goes on with what the ledger says that there is of it. `expected` is its final length, for the
    /// message when the disk is full.
    pub(in crate::image) fn create(
        path: &Path,
        room: Room,
        meter: Arc<Meter>,
        ledger: Arc<Ledger>,
        expected: Option<u64>,
    ) -> Result<Self, Error> {
        let there = ledger.there(path).unwrap_or_default();
        let open = || {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(path)?;
            // What a killed process wrote behind what it has noted is not known to be right. A file that is cut to nothing is
            // written to the disk when it is closed, as ext4 does it for those who replace files so; a new one need not wait.
            if file.metadata()?.len() != there {
                file.set_len(there)?;
            }
            Ok(file)
        };
        let file = open().map_err(|error| room.write_failed(path, error, expected.unwrap_or_default()))?;
        kill::point(Point::LayerBegun);
        let state = Arc::new(Mutex::new(State {
            file,
            path: path.to_owned(),
            room,
            length: 0,
            there,
            block: Vec::with_capacity(BLOCK),
            since_look: LOOK_EVERY,
            expected,
            sum: (there == 0).then(Running::default),
        }));
        let making: Arc<Mutex<dyn Making>> = Arc::clone(&state) as _;
        ledger.made(path, making);
        Ok(Self { state, meter, ledger })
    }

    /// Appends what was just read.
    pub(in crate::image) fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let mut state = lock(&self.state);
        self.ledger.in_file(state.length, bytes.len());
        self.meter.add_unpacked(bytes.len());
        state.write(bytes)
    }

    /// Ends the file with its last hole; its length in bytes.
    pub(in crate::image) fn finish(self) -> Result<u64, Error> {
        let mut state = lock(&self.state);
        state.flush()?;
        if let Some(sum) = state.sum.take() {
            self.ledger.summed(&state.path, sum.finish());
        }
        let end = state.file.set_len(state.length);
        end.map_err(|error| state.failed(error, 0))?;
        Ok(state.length)
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Making for State {
    fn pause(&mut self) -> Result<u64, Error> {
        self.flush()?;
        Ok(self.length)
    }
}

impl State {
    fn write(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        let passed = usize::try_from(self.there.saturating_sub(self.length)).unwrap_or(usize::MAX);
        let passed = passed.min(bytes.len());
        self.length += passed as u64;
        bytes = &bytes[passed..];
        while !bytes.is_empty() {
            // Blocks of the file, wherever it was paused.
            let filled = usize::try_from(self.length % BLOCK as u64).unwrap_or_default();
            let take = bytes.len().min(BLOCK - filled);
            if take == BLOCK {
                self.put(&bytes[..BLOCK], self.length)?;
            } else {
                self.block.extend_from_slice(&bytes[..take]);
            }
            self.length += take as u64;
            if filled + take == BLOCK {
                self.flush()?;
            }
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
            if let Some(sum) = &mut self.sum {
                sum.add_zeros(block.len() as u64);
            }
            return Ok(());
        }
        if let Some(sum) = &mut self.sum {
            sum.add(block);
        }
        if self.since_look >= LOOK_EVERY {
            let coming = self
                .expected
                .map_or(LOOK_EVERY, |length| length.saturating_sub(at));
            self.room.require(coming.min(LOOK_EVERY))?;
            self.since_look = 0;
        }
        let missing = self
            .expected
            .unwrap_or_default()
            .saturating_sub(at)
            .max(block.len() as u64);
        self.file
            .write_all_at(block, at)
            .map_err(|error| self.failed(error, missing))?;
        self.since_look += block.len() as u64;
        Ok(())
    }

    fn failed(&self, error: std::io::Error, missing: u64) -> Error {
        self.room.write_failed(&self.path, error, missing)
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
        write_noting(pieces, &path, &Arc::default(), usize::MAX);
        (dir, path)
    }

    /// Writes a file, and turns the ledger's page before one of the pieces.
    fn write_noting(pieces: &[Vec<u8>], path: &Path, ledger: &Arc<Ledger>, noted: usize) -> Option<u64> {
        let room = Room::new("vm", path.parent().unwrap(), 0);
        let ledger = Arc::clone(ledger);
        let mut there = None;
        let mut file = SparseFile::create(path, room, Arc::default(), Arc::clone(&ledger), None).unwrap();
        for (number, piece) in pieces.iter().enumerate() {
            if number == noted {
                there = Some(ledger.page().unwrap().unwrap().files["disk"]);
            }
            file.write(piece).unwrap();
        }
        let total: usize = pieces.iter().map(Vec::len).sum();
        assert_eq!(file.finish().unwrap(), total as u64);
        there
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

        #[test]
        fn another_process_goes_on_behind_what_is_there(
            shape in prop::collection::vec((0_usize..200_000, any::<bool>()), 2..6),
            noted in 0_usize..6,
        ) {
            let pieces: Vec<Vec<u8>> = shape
                .iter()
                .map(|&(length, data)| (0..=250_u8).cycle().take(length).map(|byte| if data { byte } else { 0 }).collect())
                .collect();
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("disk");
            let noted = noted % pieces.len();
            let there = write_noting(&pieces, &path, &Arc::default(), noted).unwrap();
            prop_assert_eq!(there, pieces[..noted].concat().len() as u64);
            let ledger = Arc::new(Ledger::default());
            ledger.begin(Vec::new(), std::iter::once(("disk".to_owned(), there)).collect());
            // What is there goes by: whatever is written in its place is not looked at.
            let mut again = pieces.clone();
            again[..noted].iter_mut().for_each(|piece| piece.fill(0));
            write_noting(&again, &path, &ledger, usize::MAX);
            prop_assert!(std::fs::read(path).unwrap() == pieces.concat());
        }
    }
}
