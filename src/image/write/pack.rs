//! One compressed stream, made on all cores: blocks are packed apart from each other and written in their order.
//!
//! The result depends on the bytes alone, not on the number of cores, so that the same disk gives the same digest
//! everywhere. gzip (RFC 1952) becomes *one* member, whose deflate blocks (RFC 1951) end on byte borders: every reader
//! takes it, also one that stops behind the first member. zstd (RFC 8878) becomes frames behind each other, which
//! `zstd -d` and every container tool read as one stream.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use flate2::{Compress, Compression, Crc, FlushCompress};

/// What is packed apart, in bytes: large enough that the compressor loses nothing, small enough to have many in hand.
const BLOCK: usize = 1 << 20;

/// Blocks in hand for each core: one that is being packed, and one so that nobody waits.
const BLOCKS_PER_CORE: usize = 2;

/// gzip's fastest level: disks go through it once and are unpacked many times, at a speed that does not depend on it.
const GZIP_LEVEL: Compression = Compression::fast();

/// zstd's own default.
const ZSTD_LEVEL: i32 = 3;

/// An empty last deflate block: fixed codes, and at once the end.
const DEFLATE_END: [u8; 2] = [0x03, 0x00];

/// How a stream is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// gzip, which every tool reads.
    Gzip,
    /// zstd: quicker to unpack and smaller, and not known to older tools.
    Zstd,
}

/// A block on its way to a core, and where the answer goes.
type Work = (Arc<[u8]>, SyncSender<io::Result<Bytes>>);

/// A writer that packs what is written to it.
pub(super) struct Packer<W: Write> {
    inner: W,
    packing: Packing,
    block: Vec<u8>,
    work: SyncSender<Work>,
    in_hand: VecDeque<Receiver<io::Result<Bytes>>>,
    most: usize,
    /// What a block of zeros becomes, once there was one.
    zeros: Option<Bytes>,
    /// Over everything, and over a block of zeros.
    crc: Crc,
    zeros_crc: Crc,
}

impl<W: Write> Packer<W> {
    /// `name` is what gzip's header says that the file is called (Latin-1, no NUL); zstd has no such field.
    pub(super) fn new(mut inner: W, packing: Packing, name: Option<&str>) -> io::Result<Self> {
        if packing == Packing::Gzip {
            inner.write_all(&gzip_header(name))?;
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let (work, todo) = sync_channel::<Work>(cores);
        let todo = Arc::new(Mutex::new(todo));
        for _ in 0..cores {
            let todo = Arc::clone(&todo);
            std::thread::Builder::new()
                .name("pack".to_owned())
                .spawn(move || labour(&todo, packing))?;
        }
        let mut zeros_crc = Crc::new();
        zeros_crc.update(&ZEROS);
        Ok(Self {
            inner,
            packing,
            block: Vec::with_capacity(BLOCK),
            work,
            in_hand: VecDeque::new(),
            most: cores * BLOCKS_PER_CORE,
            zeros: None,
            crc: Crc::new(),
            zeros_crc,
        })
    }

    fn hand_over(&mut self) -> io::Result<()> {
        let block = std::mem::replace(&mut self.block, Vec::with_capacity(BLOCK));
        let (reply, answer) = sync_channel(1);
        let all_zeros = block.len() == BLOCK && block == ZEROS;
        if all_zeros {
            self.crc.combine(&self.zeros_crc);
        } else {
            self.crc.update(&block);
        }
        match (&self.zeros, all_zeros) {
            (Some(packed), true) => {
                // The receiver is in our hand.
                let _ = reply.send(Ok(packed.clone()));
            }
            (None, true) => {
                // Packed once and written many times.
                let packed = Compressor::new(self.packing, Compression::best())?.pack(&block)?;
                self.zeros = Some(packed.clone());
                let _ = reply.send(Ok(packed));
            }
            (_, false) => self
                .work
                .send((block.into(), reply))
                .map_err(|_| io::Error::other("the packing threads are gone"))?,
        }
        self.in_hand.push_back(answer);
        while self.in_hand.len() > self.most {
            self.put_next()?;
        }
        Ok(())
    }

    /// Waits for the oldest block and writes it.
    fn put_next(&mut self) -> io::Result<()> {
        if let Some(answer) = self.in_hand.pop_front() {
            let packed = answer
                .recv()
                .map_err(|_| io::Error::other("a packing thread is gone"))??;
            self.inner.write_all(&packed)?;
        }
        Ok(())
    }

    /// Writes the end of the stream and gives the writer back.
    pub(super) fn finish(mut self) -> io::Result<W> {
        // Of nothing, zstd makes a frame as well: no bytes at all would be no stream.
        if !self.block.is_empty() || self.crc.amount() == 0 && self.packing == Packing::Zstd {
            self.hand_over()?;
        }
        while !self.in_hand.is_empty() {
            self.put_next()?;
        }
        if self.packing == Packing::Gzip {
            self.inner.write_all(&DEFLATE_END)?;
            self.inner.write_all(&self.crc.sum().to_le_bytes())?;
            // The length modulo 2³², as the format has it.
            self.inner.write_all(&self.crc.amount().to_le_bytes())?;
        }
        self.inner.flush()?;
        Ok(self.inner)
    }
}

static ZEROS: [u8; BLOCK] = [0; BLOCK];

impl<W: Write> Write for Packer<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let take = bytes.len().min(BLOCK - self.block.len());
        self.block.extend_from_slice(&bytes[..take]);
        if self.block.len() == BLOCK {
            self.hand_over()?;
        }
        Ok(take)
    }

    /// Nothing: only whole blocks and the end are written.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// No time, and no operating system: both would give the same disk another digest.
fn gzip_header(name: Option<&str>) -> Vec<u8> {
    const FNAME: u8 = 8;
    const UNKNOWN_SYSTEM: u8 = 255;
    let flags = if name.is_some() { FNAME } else { 0 };
    let mut header = vec![0x1f, 0x8b, 8, flags, 0, 0, 0, 0, 0, UNKNOWN_SYSTEM];
    if let Some(name) = name {
        header.extend_from_slice(name.as_bytes());
        header.push(0);
    }
    header
}

fn labour(todo: &Mutex<Receiver<Work>>, packing: Packing) {
    let mut compressor = Compressor::new(packing, GZIP_LEVEL);
    loop {
        let next = todo.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((block, reply)) = next else { return };
        let packed = match &mut compressor {
            Ok(compressor) => compressor.pack(&block),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        };
        // Whoever asked may have given up.
        let _ = reply.send(packed);
    }
}

enum Compressor {
    Gzip(Compress),
    Zstd(Box<zstd::bulk::Compressor<'static>>),
}

impl Compressor {
    fn new(packing: Packing, gzip: Compression) -> io::Result<Self> {
        Ok(match packing {
            Packing::Gzip => Self::Gzip(Compress::new(gzip, false)),
            Packing::Zstd => Self::Zstd(Box::new(zstd::bulk::Compressor::new(ZSTD_LEVEL)?)),
        })
    }

    fn pack(&mut self, block: &[u8]) -> io::Result<Bytes> {
        match self {
            Self::Zstd(compressor) => compressor.compress(block).map(Bytes::from),
            Self::Gzip(compress) => {
                compress.reset();
                // More than a block can become: a flush that ran out of room could not be told from one that is over.
                let mut packed = Vec::with_capacity(block.len() + block.len() / 8 + 4096);
                compress
                    .compress_vec(block, &mut packed, FlushCompress::Sync)
                    .map_err(io::Error::other)?;
                if compress.total_in() != block.len() as u64 || packed.len() == packed.capacity() {
                    return Err(io::Error::other("a block did not fit when it was packed"));
                }
                packed.shrink_to_fit();
                Ok(packed.into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use proptest::prelude::*;

    use super::*;

    fn pack(bytes: &[u8], packing: Packing, name: Option<&str>) -> Vec<u8> {
        let mut packer = Packer::new(Vec::new(), packing, name).unwrap();
        packer.write_all(bytes).unwrap();
        packer.finish().unwrap()
    }

    /// Bytes with runs, noise and long stretches of zeros, by a seed.
    fn disk(seed: u64, pieces: &[(usize, u8)]) -> Vec<u8> {
        let mut state = seed | 1;
        let mut bytes = Vec::new();
        for (length, kind) in pieces {
            for _ in 0..*length {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                bytes.push(match kind {
                    0 => 0,
                    1 => state.to_le_bytes()[0],
                    _ => state.to_le_bytes()[0] & 3,
                });
            }
        }
        bytes
    }

    #[test]
    fn gzip_is_one_member_with_its_files_name() {
        let bytes = disk(3, &[(BLOCK + 17, 2), (3 * BLOCK, 0), (99, 1)]);
        let packed = pack(&bytes, Packing::Gzip, Some("root.qcow2"));
        let mut decoder = flate2::read::GzDecoder::new(packed.as_slice());
        let mut unpacked = Vec::new();
        decoder.read_to_end(&mut unpacked).unwrap();
        assert!(unpacked == bytes);
        assert_eq!(
            decoder.header().unwrap().filename(),
            Some(b"root.qcow2".as_slice())
        );
        assert_eq!(decoder.header().unwrap().mtime(), 0);
        // The decoder stops behind the first member: nothing may be left.
        assert!(decoder.into_inner().is_empty());
    }

    #[test]
    fn zeros_become_next_to_nothing() {
        let packed = pack(&vec![0; 64 << 20], Packing::Gzip, None);
        assert!(packed.len() < 512 << 10, "{}", packed.len());
        assert!(pack(&vec![0; 64 << 20], Packing::Zstd, None).len() < 64 << 10);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        #[test]
        fn what_is_unpacked_is_what_was_packed(
            seed in any::<u64>(),
            pieces in prop::collection::vec((0_usize..(2 * BLOCK), 0_u8..3), 0..4),
        ) {
            let bytes = disk(seed, &pieces);
            let mut unpacked = Vec::new();
            let packed = pack(&bytes, Packing::Gzip, None);
            prop_assert!(packed == pack(&bytes, Packing::Gzip, None), "the same bytes, the same stream");
            flate2::read::GzDecoder::new(packed.as_slice()).read_to_end(&mut unpacked).unwrap();
            prop_assert!(unpacked == bytes);
            let packed = pack(&bytes, Packing::Zstd, None);
            prop_assert!(zstd::stream::decode_all(packed.as_slice()).unwrap() == bytes);
        }
    }
}
