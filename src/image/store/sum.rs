//! What a file of an image must still hash to, however long it lies here.
//!
//! A disk may have a thousand times more holes than data, so the sum is defined over the data alone: the file is looked at in
//! blocks of 1 MiB (the last may be shorter); for each block that has any byte other than zero, in order, the number of the
//! block (64 bits, little-endian) and the hash of its bytes are fed to another hash, whose value is the sum. It does not matter
//! which zeros are written and which are holes.
//!
//! The hash is BLAKE3. No registry ever sees a sum, and every byte of a stream is hashed by SHA-256 for its digest anyway, which
//! takes several times as long. Images of earlier versions have sums of SHA-256, by which they are compared.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::thread;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::image::digest::{Digest, Hasher};

/// Bytes of a block: few enough sums for a large disk, little enough memory for each thread.
const BLOCK: u64 = 1 << 20;

/// Blocks that are shared out among the threads at a time; their sums are all that is remembered of them.
const BATCH: usize = 256;

/// Most threads that hash one file. More would only take the machine from its guests.
const THREADS_MAX: usize = 4;

/// The sum of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::image) enum Sum {
    /// `blake3:` and 64 hexadecimal digits.
    Blake3(blake3::Hash),
    /// `sha256:` and as many.
    Sha256(Digest),
}

impl fmt::Display for Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blake3(hash) => write!(f, "blake3:{hash}"),
            Self::Sha256(digest) => digest.fmt(f),
        }
    }
}

impl Serialize for Sum {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Sum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let text = String::deserialize(deserializer)?;
        match text.strip_prefix("blake3:") {
            Some(digits) => blake3::Hash::from_hex(digits)
                .map(Self::Blake3)
                .map_err(D::Error::custom),
            None => text.parse().map(Self::Sha256).map_err(D::Error::custom),
        }
    }
}

/// A hash of which sums are made.
trait Hash: Default {
    fn feed(&mut self, bytes: &[u8]);
    fn value(self) -> [u8; 32];
}

impl Hash for blake3::Hasher {
    fn feed(&mut self, bytes: &[u8]) {
        self.update(bytes);
    }

    fn value(self) -> [u8; 32] {
        self.finalize().into()
    }
}

impl Hash for Hasher {
    fn feed(&mut self, bytes: &[u8]) {
        self.update(bytes);
    }

    fn value(self) -> [u8; 32] {
        *self.finish().as_bytes()
    }
}

/// The sum of a file that is written from its beginning to its end, so that nobody need read it again for that.
#[derive(Debug, Default)]
pub(in crate::image) struct Running {
    sum: blake3::Hasher,
    /// The block in hand: what of it is hashed, and how many zeros behind that are not.
    block: blake3::Hasher,
    zeros: u64,
    /// Has the block any other byte?
    has_data: bool,
    /// Bytes so far.
    length: u64,
}

impl Running {
    /// The next bytes of the file.
    pub(in crate::image) fn add(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let left = usize::try_from(self.left()).unwrap_or(usize::MAX);
            let (part, rest) = bytes.split_at(left.min(bytes.len()));
            if is_zero(part) {
                self.add_zeros(part.len() as u64);
            } else {
                self.catch_up();
                self.block.update(part);
                self.has_data = true;
                self.pass(part.len() as u64);
            }
            bytes = rest;
        }
    }

    /// The next bytes of the file, of which it is known that they are zeros.
    pub(in crate::image) fn add_zeros(&mut self, mut count: u64) {
        while count > 0 {
            let part = self.left().min(count);
            self.zeros += part;
            self.pass(part);
            count -= part;
        }
    }

    /// The sum, now that nothing follows.
    pub(in crate::image) fn finish(mut self) -> Sum {
        if !self.length.is_multiple_of(BLOCK) {
            self.end_block(self.length / BLOCK);
        }
        Sum::Blake3(self.sum.finalize())
    }

    /// Bytes up to the end of the block.
    fn left(&self) -> u64 {
        BLOCK - self.length % BLOCK
    }

    fn pass(&mut self, count: u64) {
        self.length += count;
        if self.length.is_multiple_of(BLOCK) {
            self.end_block(self.length / BLOCK - 1);
        }
    }

    /// Hashes the zeros that were put off: they count in a block that has data.
    fn catch_up(&mut self) {
        static ZEROS: [u8; 4096] = [0; 4096];
        while self.zeros > 0 {
            let part = usize::try_from(self.zeros)
                .unwrap_or(ZEROS.len())
                .min(ZEROS.len());
            self.block.update(&ZEROS[..part]);
            self.zeros -= part as u64;
        }
    }

    fn end_block(&mut self, number: u64) {
        if std::mem::take(&mut self.has_data) {
            self.catch_up();
            self.sum.update(&number.to_le_bytes());
            self.sum.update(self.block.finalize().as_bytes());
            self.block.reset();
        }
        self.zeros = 0;
    }
}

/// The sum of a file, read by as many threads as the machine has cores, within reason. Holes are not read.
pub(super) fn of_file(file: &File) -> io::Result<Sum> {
    let value = hashed::<blake3::Hasher>(file)?;
    Ok(Sum::Blake3(value.into()))
}

/// Is it still the sum of a file? Reads it as [`of_file`] does.
pub(super) fn is_of_file(sum: &Sum, file: &File) -> io::Result<bool> {
    match sum {
        Sum::Blake3(_) => of_file(file).map(|found| found == *sum),
        Sum::Sha256(digest) => hashed::<Hasher>(file).map(|found| found == *digest.as_bytes()),
    }
}

fn hashed<H: Hash>(file: &File) -> io::Result<[u8; 32]> {
    let length = file.metadata()?.len();
    let mut sum = H::default();
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
        for (block, value) in hash::<H>(file, length, &batch)? {
            sum.feed(&block.to_le_bytes());
            sum.feed(&value);
        }
        if batch.len() < BATCH {
            return Ok(sum.value());
        }
    }
}

/// The hashes of those of these blocks that are not all zeros, in order.
fn hash<H: Hash>(file: &File, length: u64, blocks: &[u64]) -> io::Result<Vec<(u64, [u8; 32])>> {
    let mut all = on_threads(blocks, |&block, buffer| {
        let at = block * BLOCK;
        buffer.resize(usize::try_from((length - at).min(BLOCK)).unwrap_or(usize::MAX), 0);
        file.read_exact_at(buffer, at)?;
        Ok((!is_zero(buffer)).then(|| {
            let mut hash = H::default();
            hash.feed(buffer);
            (block, hash.value())
        }))
    })?;
    all.sort_unstable_by_key(|(block, _)| *block);
    Ok(all)
}

/// Does something with each of many on a few threads, each of which has a buffer of its own. What comes of it is in no order.
pub(super) fn on_threads<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&T, &mut Vec<u8>) -> io::Result<Option<R>> + Sync,
) -> io::Result<Vec<R>> {
    let threads = thread::available_parallelism()
        .map_or(1, usize::from)
        .min(THREADS_MAX);
    let waiting = Mutex::new(items.iter());
    let work = || -> io::Result<Vec<R>> {
        let (mut buffer, mut done) = (Vec::new(), Vec::new());
        loop {
            let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(next) = next else { return Ok(done) };
            done.extend(work(next, &mut buffer)?);
        }
    };
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads.min(items.len())).map(|_| scope.spawn(work)).collect();
        let mut all = work()?;
        for other in others {
            match other.join() {
                Ok(done) => all.extend(done?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(all)
    })
}

/// Each byte is the one before it, and the first is zero.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
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

    use proptest::prelude::*;

    use super::*;

    /// As the page above defines it, with the whole file in memory.
    fn by_definition(bytes: &[u8]) -> Sum {
        let mut fed = Vec::new();
        for (number, block) in data(bytes) {
            fed.extend(number.to_le_bytes());
            fed.extend(blake3::hash(block).as_bytes());
        }
        Sum::Blake3(blake3::hash(&fed))
    }

    /// As earlier versions defined it.
    fn by_sha256(bytes: &[u8]) -> Sum {
        let mut fed = Vec::new();
        for (number, block) in data(bytes) {
            fed.extend(number.to_le_bytes());
            fed.extend(Digest::of(block).as_bytes());
        }
        Sum::Sha256(Digest::of(&fed))
    }

    /// The blocks that have any data, with their numbers.
    fn data(bytes: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
        (0..)
            .zip(bytes.chunks(1 << 20))
            .filter(|(_, block)| block.iter().any(|b| *b != 0))
    }

    fn of(bytes: &[u8], sparse: bool) -> Sum {
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
        let sum = of_file(&file).unwrap();
        for (of_it, expected) in [
            (sum, true),
            (by_sha256(bytes), true),
            (by_sha256(b"other"), false),
        ] {
            assert_eq!(is_of_file(&of_it, &file).unwrap(), expected, "{of_it}");
        }
        sum
    }

    #[test]
    fn a_sum_says_by_which_hash_it_is() {
        for (sum, begins) in [(by_definition(b"a"), "\"blake3:"), (by_sha256(b"a"), "\"sha256:")] {
            let written = serde_json::to_string(&sum).unwrap();
            assert!(
                written.starts_with(begins) && written.len() == begins.len() + 65,
                "{written}"
            );
            assert_eq!(serde_json::from_str::<Sum>(&written).unwrap(), sum);
        }
        for text in ["blake3:00", "blake3:", "md5:00", ""] {
            assert!(serde_json::from_value::<Sum>(text.into()).is_err(), "{text}");
        }
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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn the_sum_of_a_file_that_is_written_is_that_of_the_file(
            shape in prop::collection::vec((0_usize..900_000, 0_u8..3, any::<bool>()), 0..12),
        ) {
            let (mut running, mut whole) = (Running::default(), Vec::new());
            for (length, byte, told) in shape {
                let bytes = vec![byte; length];
                if byte == 0 && told {
                    running.add_zeros(length as u64);
                } else {
                    running.add(&bytes);
                }
                whole.extend(bytes);
            }
            prop_assert_eq!(running.finish(), by_definition(&whole));
        }
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
        let mut expected = blake3::Hasher::new();
        for number in (0..700_u64).filter(|number| number % 2 == 0) {
            let at = number << 20;
            file.write_all_at(&number.to_le_bytes(), at + 8).unwrap();
            if number > 0 {
                let mut block = vec![0; 1 << 20];
                block[8..16].copy_from_slice(&number.to_le_bytes());
                expected.update(&number.to_le_bytes());
                expected.update(blake3::hash(&block).as_bytes());
            }
        }
        assert_eq!(of_file(&file).unwrap(), Sum::Blake3(expected.finalize()));
    }
}
