//! What a pull cannot do without: hashing, unpacking and writing, each by itself on all of this machine's processors.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};

use super::cannot;
use crate::outcome::Failure;

/// What is hashed and unpacked at a time: a chunk as the native format has them on average.
const CHUNK: usize = 64 << 10;
/// What is written at a time: no more than a processor's own cache holds.
const PIECE: usize = 256 << 10;
/// Into how many parts the data is divided for those who write it: more than a host has processors.
const PROCESSORS_MAX: u64 = 256;
/// How much of the disk is hashed and unpacked; the whole would take this often the time.
const SAMPLE: u64 = 256 << 20;
/// zstd's default, and the native format's.
const LEVEL: i32 = 3;

/// Times for as many bytes as the disk has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Floor {
    pub(super) hash: Duration,
    pub(super) unpack: Duration,
    pub(super) write: Duration,
}

impl Floor {
    /// One after the other. Each has all processors to itself, so that who does all three needs about as long.
    pub(super) fn together(self) -> Duration {
        self.hash + self.unpack + self.write
    }

    /// The slowest of the three.
    pub(super) fn slowest(self) -> Duration {
        self.hash.max(self.unpack).max(self.write)
    }
}

/// Measures with the first `size` bytes of `disk`; `scratch` is written and removed. Blocks for some seconds.
pub(super) fn measure(disk: &Path, size: u64, scratch: &Path) -> Result<Floor, Failure> {
    let chunks = sample(disk, size).map_err(|e| cannot("read", disk, &e))?;
    let packed = on_all_processors(&chunks, |chunk| zstd::bulk::compress(chunk, LEVEL))
        .0
        .into_iter()
        .collect::<io::Result<Vec<_>>>()
        .map_err(|e| Failure::system(format!("cannot pack a chunk: {e}")))?;
    let hash = on_all_processors(&chunks, |chunk| Sha256::digest(chunk)).1;
    let unpack = on_all_processors(&packed, |frame| {
        zstd::bulk::decompress(frame, CHUNK).map(|chunk| chunk.len())
    })
    .1;
    let sampled: usize = chunks.iter().map(Vec::len).sum();
    drop((chunks, packed));
    // Reading it is no part of what is measured.
    super::registry::read(disk).map_err(|e| cannot("read", disk, &e))?;
    let begin = Instant::now();
    copy(disk, size, scratch).map_err(|e| cannot("write", scratch, &e))?;
    let write = begin.elapsed();
    std::fs::remove_file(scratch).map_err(|e| cannot("remove", scratch, &e))?;
    // Too few bytes for a difference.
    #[expect(clippy::cast_precision_loss, reason = "a ratio")]
    let whole = |time: Duration| time.mul_f64(size as f64 / sampled.max(1) as f64);
    Ok(Floor {
        hash: whole(hash),
        unpack: whole(unpack),
        write,
    })
}

/// Chunks from all over the data.
fn sample(disk: &Path, size: u64) -> io::Result<Vec<Vec<u8>>> {
    let file = File::open(disk)?;
    let step = (size / SAMPLE.min(size).max(1)).max(1) * CHUNK as u64;
    let starts = (0..size).step_by(usize::try_from(step).unwrap_or(CHUNK));
    starts
        .map(|at| {
            let mut chunk = Vec::with_capacity(CHUNK);
            let mut left = CHUNK.min(usize::try_from(size - at).unwrap_or(CHUNK));
            chunk.resize(left, 0);
            while left > 0 {
                let done = chunk.len() - left;
                let count = file.read_at(&mut chunk[done..], at + done as u64)?;
                if count == 0 {
                    break;
                }
                left -= count;
            }
            Ok(chunk)
        })
        .collect()
}

/// Does something with each of many, and says how long that took.
fn on_all_processors<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> (Vec<R>, Duration) {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let share = items.len().div_ceil(processors).max(1);
    let begin = Instant::now();
    let results = std::thread::scope(|scope| {
        let threads: Vec<_> = items
            .chunks(share)
            .map(|part| scope.spawn(|| part.iter().map(&work).collect::<Vec<R>>()))
            .collect();
        threads
            .into_iter()
            .flat_map(|thread| match thread.join() {
                Ok(results) => results,
                Err(panic) => std::panic::resume_unwind(panic),
            })
            .collect()
    });
    (results, begin.elapsed())
}

/// Writes the data once more, in as many parts as there are processors. As with a pull, nobody waits until the system has brought
/// it to the disk.
fn copy(disk: &Path, size: u64, to: &Path) -> io::Result<()> {
    let (from, out) = (File::open(disk)?, File::create(to)?);
    out.set_len(size)?;
    let share = size
        .div_ceil(PROCESSORS_MAX)
        .next_multiple_of(PIECE as u64)
        .max(1);
    let parts: Vec<u64> = (0..size)
        .step_by(usize::try_from(share).unwrap_or(usize::MAX))
        .collect();
    let copied = on_all_processors(&parts, |&begin| {
        let end = (begin + share).min(size);
        let (mut buffer, mut at) = (vec![0; PIECE], begin);
        while at < end {
            let most = usize::try_from(end - at).unwrap_or(PIECE).min(PIECE);
            let count = from.read_at(&mut buffer[..most], at)?;
            if count == 0 {
                break;
            }
            out.write_all_at(&buffer[..count], at)?;
            at += count as u64;
        }
        io::Result::Ok(())
    });
    copied.0.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_three_take_time_and_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, scratch) = (dir.path().join("disk"), dir.path().join("scratch"));
        std::fs::write(&disk, vec![7; 3 << 20]).unwrap();
        let floor = measure(&disk, 3 << 20, &scratch).unwrap();
        assert!(floor.hash > Duration::ZERO && floor.unpack > Duration::ZERO && floor.write > Duration::ZERO);
        assert!([floor.hash, floor.unpack, floor.write].contains(&floor.slowest()));
        assert!(!scratch.exists());
    }
}
