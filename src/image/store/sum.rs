//! What a file of an image must still hash to, however long it lies here.
//!
//! A disk may have a thousand times more holes than data, so the sum is defined over the data alone: the file is looked at in
//! blocks of 1 MiB (the last may be shorter); for each block that has any byte other than zero, in order, the number of the
//! block (64 bits, little-endian) and the SHA-256 of its bytes are fed to a SHA-256, whose digest is the sum. It does not matter
//! which zeros are written and which are holes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::thread;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::image::digest::{Digest, Hasher};

/// Bytes of a block: few enough sums for a large disk, little enough memory for each thread.
const BLOCK: u64 = 1 << 20;

/// Blocks that are shared out among the threads at a time; their sums are all that is remembered of them.
const BATCH: usize = 256;

/// Most threads that hash one file. More would only take the machine from its guests.
const THREADS_MAX: usize = 4;

/// The sum of a file, read by as many threads as the machine has cores, within reason. Holes are not read.
pub(super) fn of_file(file: &File) -> io::Result<Digest> {
    let length = file.metadata()?.len();
    let threads = thread::available_parallelism()
        .map_or(1, usize::from)
        .min(THREADS_MAX);
    let mut sum = Hasher::default();
    let mut blocks = Blocks {
        file,
        length,
        next: 0,
        data_ends: 0,
    };
    loop {
        let mut batch = Vec::with_capacity(BATCH);
        while batch.len() < BATCH
            && let Some(block) = blocks.next()?
        {
            batch.push(block);
        }
        for (block, digest) in hash(file, length, &batch, threads)? {
            sum.update(&block.to_le_bytes());
            sum.update(digest.as_bytes());
        }
        if batch.len() < BATCH {
            return Ok(sum.finish());
        }
    }
}

/// The digests of those of these blocks that are not all zeros, in order.
fn hash(file: &File, length: u64, blocks: &[u64], threads: usize) -> io::Result<Vec<(u64, Digest)>> {
    let waiting = Mutex::new(blocks.iter().copied());
    let work = || -> io::Result<Vec<(u64, Digest)>> {
        let mut buffer = vec![0; usize::try_from(BLOCK).unwrap_or(usize::MAX)];
        let mut done = Vec::new();
        loop {
            let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(block) = next else { return Ok(done) };
            let at = block * BLOCK;
            let bytes = usize::try_from((length - at).min(BLOCK)).unwrap_or(usize::MAX);
            let bytes = &mut buffer[..bytes];
            file.read_exact_at(bytes, at)?;
            if !is_zero(bytes) {
                done.push((block, Digest::of(bytes)));
            }
        }
    };
    let mut all = thread::scope(|scope| {
        let others: Vec<_> = (1..threads.min(blocks.len()))
            .map(|_| scope.spawn(work))
            .collect();
        let mut all = work()?;
        for other in others {
            match other.join() {
                Ok(done) => all.extend(done?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok::<_, io::Error>(all)
    })?;
    all.sort_unstable_by_key(|(block, _)| *block);
    Ok(all)
}

/// Each byte is the one before it, and the first is zero.
fn is_zero(bytes: &[u8]) -> bool {
    match bytes {
        [] => true,
        [first, rest @ ..] => *first == 0 && *rest == bytes[..rest.len()],
    }
}

/// The numbers of the blocks of a file that have any data.
struct Blocks<'a> {
    file: &'a File,
    length: u64,
    /// The first block that was not looked at.
    next: u64,
    /// Where the data ends that was found last.
    data_ends: u64,
}

impl Blocks<'_> {
    fn next(&mut self) -> io::Result<Option<u64>> {
        let at = self.next * BLOCK;
        if at >= self.length {
            return Ok(None);
        }
        if at >= self.data_ends {
            let data = match rustix::fs::seek(self.file, SeekFrom::Data(at)) {
                Ok(data) => data,
                // Nothing but a hole up to the end.
                Err(Errno::NXIO) => return Ok(None),
                // A file system that knows no holes.
                Err(Errno::INVAL) => at,
                Err(error) => return Err(error.into()),
            };
            self.data_ends = rustix::fs::seek(self.file, SeekFrom::Hole(data)).unwrap_or(self.length);
            self.next = data / BLOCK;
        }
        let block = self.next;
        self.next += 1;
        Ok(Some(block))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    /// As the page above defines it, with the whole file in memory.
    fn by_definition(bytes: &[u8]) -> Digest {
        let mut sum = Hasher::default();
        for (number, block) in bytes.chunks(1 << 20).enumerate() {
            if block.iter().any(|b| *b != 0) {
                sum.update(&(number as u64).to_le_bytes());
                sum.update(Digest::of(block).as_bytes());
            }
        }
        sum.finish()
    }

    fn of(bytes: &[u8], sparse: bool) -> Digest {
        let mut file = tempfile::tempfile().unwrap();
        if sparse {
            file.set_len(bytes.len() as u64).unwrap();
            for (number, page) in bytes.chunks(4096).enumerate() {
                if page.iter().any(|b| *b != 0) {
                    file.write_all_at(page, number as u64 * 4096).unwrap();
                }
            }
        } else {
            file.write_all(bytes).unwrap();
        }
        of_file(&file).unwrap()
    }

    #[test]
    fn the_sum_is_that_of_the_definition_whatever_is_a_hole() {
        let mut disk = vec![0; 5 * (1 << 20) + 777];
        let mut seen = vec![of(&disk, true), of(&[], false)];
        assert_eq!(seen[0], seen[1], "nothing but zeros is nothing");
        // One byte at a time: at both ends of a block, across two, in the last and short one.
        for at in [0, (1 << 20) - 1, 3 << 20, (5 << 20) + 776] {
            disk[at] = 1;
            let sum = of(&disk, true);
            assert_eq!(sum, by_definition(&disk), "{at}");
            assert_eq!(sum, of(&disk, false), "{at}");
            assert!(!seen.contains(&sum), "{at}");
            seen.push(sum);
        }
        // The same bytes in another block.
        disk.rotate_right(1 << 20);
        assert!(!seen.contains(&of(&disk, true)));
    }

    #[test]
    fn zeros_are_told_from_data() {
        for zeros in [0, 1, 2, 4096] {
            assert!(is_zero(&vec![0; zeros]));
        }
        for data in [&[1][..], &[0, 1], &[1, 0], &[0, 0, 7, 0], &[3, 3, 3]] {
            assert!(!is_zero(data), "{data:?}");
        }
    }

    #[test]
    fn more_blocks_than_a_batch_are_summed_in_order() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(700 << 20).unwrap();
        let mut expected = Hasher::default();
        for number in (0..700_u64).filter(|number| number % 2 == 0) {
            let at = number << 20;
            file.write_all_at(&number.to_le_bytes(), at + 8).unwrap();
            if number > 0 {
                let mut block = vec![0; 1 << 20];
                block[8..16].copy_from_slice(&number.to_le_bytes());
                expected.update(&number.to_le_bytes());
                expected.update(Digest::of(&block).as_bytes());
            }
        }
        assert_eq!(of_file(&file).unwrap(), expected.finish());
    }
}
