//! The digests of a disk's chunks, in a file beside it: what a disk that came in verified chunks is compared with later, so that
//! it need not be read once more when it comes.
//!
//! ```text
//! disk.sums   "CANSUMS1", then lines of 48 bytes in the order of their places: the place (8), the length (4), zeros (4), the SHA-256
//! ```
//!
//! Numbers are little-endian. What no line covers is zeros, written or not. The file has a sum of its own in the image's record.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::sum::{is_zero, on_threads};
use crate::image::digest::Digest;

/// The file's name in the image's folder.
pub(in crate::image) const NAME: &str = "disk.sums";

const MAGIC: &[u8; 8] = b"CANSUMS1";

/// Bytes of a line.
pub(in crate::image) const LINE: usize = 48;

/// Lines that are shared out among the threads at a time.
const BATCH: usize = 4096;

/// Bytes that are read at once where there should be zeros.
const PIECE: u64 = 1 << 20;

/// The file in the making.
#[derive(Debug)]
pub(in crate::image) struct Sums(BufWriter<File>);

impl Sums {
    /// Begins it in the folder that becomes the image's.
    pub(in crate::image) fn create(dir: &Path) -> io::Result<Self> {
        let mut file = BufWriter::new(File::create(dir.join(NAME))?);
        file.write_all(MAGIC)?;
        Ok(Self(file))
    }

    /// Adds a chunk of the disk. They come in the order of their places.
    pub(in crate::image) fn add(&mut self, at: u64, length: u32, digest: &Digest) -> io::Result<()> {
        let mut line = [0; LINE];
        line[..8].copy_from_slice(&at.to_le_bytes());
        line[8..12].copy_from_slice(&length.to_le_bytes());
        line[16..].copy_from_slice(digest.as_bytes());
        self.0.write_all(&line)
    }

    /// Writes what is still to be written.
    pub(in crate::image) fn finish(mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// A part of the disk and what it must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stretch {
    Chunk { at: u64, length: u32, digest: Digest },
    Zeros { at: u64, end: u64 },
}

/// Has the disk the bytes that the file says?
pub(super) fn holds(disk: &File, sums: &File) -> io::Result<bool> {
    let length = disk.metadata()?.len();
    let mut lines = BufReader::new(sums);
    let mut magic = [0; MAGIC.len()];
    if lines.read_exact(&mut magic).is_err() || magic != *MAGIC {
        return Ok(false);
    }
    let mut end = 0;
    loop {
        let mut batch = Vec::new();
        let last = loop {
            if batch.len() >= BATCH {
                break false;
            }
            let Some(line) = next(&mut lines)? else { break true };
            let Some(stretches) = after(end, length, &line) else {
                return Ok(false);
            };
            batch.extend(stretches);
            if let Stretch::Chunk { at, length, .. } = stretches[1] {
                end = at + u64::from(length);
            }
        };
        if last {
            batch.push(Stretch::Zeros { at: end, end: length });
        }
        if !are_held(disk, &batch)? {
            return Ok(false);
        }
        if last {
            return Ok(true);
        }
    }
}

fn next(lines: &mut impl Read) -> io::Result<Option<[u8; LINE]>> {
    let mut line = [0; LINE];
    match lines.read_exact(&mut line) {
        Ok(()) => Ok(Some(line)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

/// The zeros up to a line's chunk, and the chunk; none if it does not lie behind `end` and within the disk.
fn after(end: u64, disk: u64, line: &[u8; LINE]) -> Option<[Stretch; 2]> {
    let at = u64::from_le_bytes(line[..8].try_into().ok()?);
    let length = u32::from_le_bytes(line[8..12].try_into().ok()?);
    let digest = Digest::from_bytes(line[16..].try_into().ok()?);
    let fits = at >= end && at.checked_add(length.into()).is_some_and(|end| end <= disk);
    let chunk = Stretch::Chunk { at, length, digest };
    fits.then_some([Stretch::Zeros { at: end, end: at }, chunk])
}

fn are_held(disk: &File, stretches: &[Stretch]) -> io::Result<bool> {
    let whole = AtomicBool::new(true);
    on_threads(stretches, |stretch, buffer| {
        let good = match *stretch {
            // One that is not is enough to know.
            _ if !whole.load(Ordering::Relaxed) => return Ok(None::<()>),
            Stretch::Chunk { at, length, digest } => {
                buffer.resize(usize::try_from(length).unwrap_or(usize::MAX), 0);
                disk.read_exact_at(buffer, at)?;
                Digest::of(buffer) == digest
            }
            Stretch::Zeros { at, end } => are_zeros(disk, at, end, buffer)?,
        };
        if !good {
            whole.store(false, Ordering::Relaxed);
        }
        Ok(None)
    })?;
    Ok(whole.into_inner())
}

/// Is there nothing else than zeros? Holes are not read.
fn are_zeros(disk: &File, mut at: u64, end: u64, buffer: &mut Vec<u8>) -> io::Result<bool> {
    while at < end {
        let data = match rustix::fs::seek(disk, SeekFrom::Data(at)) {
            Ok(data) => data,
            // Nothing but a hole up to the end.
            Err(Errno::NXIO) => return Ok(true),
            // A file system that knows no holes.
            Err(Errno::INVAL) => at,
            Err(error) => return Err(error.into()),
        };
        let hole = rustix::fs::seek(disk, SeekFrom::Hole(data))
            .unwrap_or(end)
            .min(end);
        at = data;
        while at < hole {
            buffer.resize(usize::try_from((hole - at).min(PIECE)).unwrap_or(usize::MAX), 0);
            disk.read_exact_at(buffer, at)?;
            if !is_zero(buffer) {
                return Ok(false);
            }
            at += buffer.len() as u64;
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk of 3 MiB with two chunks, one of them at its end; between them written zeros and a hole.
    fn disk(dir: &Path) -> File {
        let disk = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(dir.join("disk"))
            .unwrap();
        disk.set_len(3 << 20).unwrap();
        let chunks = [(4096_u64, vec![1_u8; 5000]), ((3 << 20) - 100, vec![2; 100])];
        let mut sums = Sums::create(dir).unwrap();
        for (at, bytes) in &chunks {
            disk.write_all_at(bytes, *at).unwrap();
            let length = u32::try_from(bytes.len()).unwrap();
            sums.add(*at, length, &Digest::of(bytes)).unwrap();
        }
        disk.write_all_at(&[0; 10_000], 1 << 20).unwrap();
        sums.finish().unwrap();
        disk
    }

    fn sums(dir: &Path) -> File {
        File::open(dir.join(NAME)).unwrap()
    }

    #[test]
    fn any_other_byte_is_noticed_wherever_it_lies() {
        let dir = tempfile::tempdir().unwrap();
        let disk = disk(dir.path());
        assert!(holds(&disk, &sums(dir.path())).unwrap());
        let places = [
            0,
            4095,
            4096,
            9095,
            9096,
            (1 << 20) + 7,
            (2 << 20) + 7,
            (3 << 20) - 101,
            (3 << 20) - 1,
        ];
        for at in places {
            let mut byte = [0];
            disk.read_exact_at(&mut byte, at).unwrap();
            disk.write_all_at(&[byte[0] ^ 4], at).unwrap();
            assert!(!holds(&disk, &sums(dir.path())).unwrap(), "{at}");
            disk.write_all_at(&byte, at).unwrap();
        }
        assert!(holds(&disk, &sums(dir.path())).unwrap());
    }

    #[test]
    fn a_list_that_is_none_holds_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let disk = disk(dir.path());
        let whole = std::fs::read(dir.path().join(NAME)).unwrap();
        let lines = |order: &[usize]| {
            let lines = order.iter().map(|&line| &whole[8 + line * LINE..][..LINE]);
            [MAGIC.as_slice(), &lines.collect::<Vec<_>>().concat()].concat()
        };
        assert_eq!(lines(&[0, 1]), whole);
        for bad in [
            Vec::new(),
            whole[1..].to_vec(),
            lines(&[]),
            lines(&[0]),
            lines(&[1, 0]),
            lines(&[0, 0, 1]),
        ] {
            std::fs::write(dir.path().join(NAME), bad).unwrap();
            assert!(!holds(&disk, &sums(dir.path())).unwrap());
        }
        // Of a longer disk.
        std::fs::write(dir.path().join(NAME), &whole).unwrap();
        disk.set_len(2 << 20).unwrap();
        assert!(!holds(&disk, &sums(dir.path())).unwrap());
    }

    #[test]
    fn a_disk_of_more_chunks_than_a_batch_is_compared_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let disk = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(dir.path().join("disk"))
            .unwrap();
        let mut list = Sums::create(dir.path()).unwrap();
        for number in 0..BATCH as u64 * 2 + 1 {
            let bytes = (number + 1).to_le_bytes();
            disk.write_all_at(&bytes, number * 16).unwrap();
            list.add(number * 16, 8, &Digest::of(&bytes)).unwrap();
        }
        list.finish().unwrap();
        assert!(holds(&disk, &sums(dir.path())).unwrap());
        disk.write_all_at(&[9], BATCH as u64 * 32 + 3).unwrap();
        assert!(!holds(&disk, &sums(dir.path())).unwrap());
    }
}
