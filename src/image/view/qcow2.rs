//! Reads a qcow2 whose header was checked.
//!
//! What the tables of the second level say is bounded where it is used. Source: QEMU's `docs/interop/qcow2.txt`.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use flate2::{Decompress, FlushDecompress};

use super::Guest;

/// Bits of an entry of a second-level table.
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Largest window of a packed cluster, as a power of two: 8 MiB, which is more than the largest cluster.
const WINDOW_LOG_MAX: u32 = 23;

/// Sectors in which the length of a compressed cluster is counted, in bytes.
const SECTOR: u64 = 512;

/// One file of the chain, with the next one under it.
pub(super) struct Qcow2 {
    file: File,
    size: u64,
    cluster_bits: u32,
    /// Entries of the second level have a bitmap of 32 parts of their cluster.
    extended: bool,
    zstd: bool,
    l1: Vec<u64>,
    below: Option<Box<dyn Guest + Send>>,
    /// The table and the unpacked cluster that were used last: readers go forwards.
    last: Mutex<Last>,
}

#[derive(Default)]
struct Last {
    table: Option<(u64, Arc<Vec<u8>>)>,
    unpacked: Option<(u64, Arc<Vec<u8>>)>,
}

/// What a stretch of the guest's disk is in this file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Whatever lies below says.
    Absent,
    Zero,
    /// At this place of the file.
    Data(u64),
    /// A compressed cluster: its entry.
    Packed(u64),
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the qcow2 is damaged: {what}"),
    )
}

impl Qcow2 {
    /// Opens a file whose header was checked.
    pub(super) fn open(path: &Path, below: Option<Box<dyn Guest + Send>>) -> io::Result<Self> {
        Self::of(File::open(path)?, below)
    }

    fn of(file: File, below: Option<Box<dyn Guest + Send>>) -> io::Result<Self> {
        let mut header = [0; 112];
        // A file of version 2 may be shorter than the newest header.
        let mut present = 0;
        while present < header.len() {
            match file.read_at(&mut header[present..], present as u64)? {
                0 => break,
                count => present += count,
            }
        }
        let be32 =
            |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let be64 = |at: usize| u64::from(be32(at)) << 32 | u64::from(be32(at + 4));
        let v3 = be32(4) == 3;
        let incompatible = if v3 { be64(72) } else { 0 };
        let mut table = vec![0; usize::try_from(be32(36)).unwrap_or_default() * 8];
        file.read_exact_at(&mut table, be64(40))?;
        Ok(Self {
            size: be64(24),
            cluster_bits: be32(20),
            extended: incompatible & (1 << 4) != 0,
            zstd: v3 && be32(100) > 104 && header[104] == 1,
            l1: table
                .chunks_exact(8)
                .map(|entry| u64::from_be_bytes(entry.try_into().unwrap_or_default()) & OFFSET)
                .collect(),
            file,
            below,
            last: Mutex::default(),
        })
    }

    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The least stretch that has a state of its own.
    fn unit(&self) -> u64 {
        if self.extended {
            self.cluster() / 32
        } else {
            self.cluster()
        }
    }

    /// What one table of the second level covers.
    fn span(&self) -> u64 {
        self.cluster() * (self.cluster() / if self.extended { 16 } else { 8 })
    }

    /// A table or cluster of the file; what lies behind its end is zeros, as QEMU reads it.
    fn piece(&self, offset: u64, length: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
        self.fill(&mut bytes, offset)?;
        Ok(bytes)
    }

    fn fill(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            match self.file.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => {
                    buffer[done..].fill(0);
                    return Ok(());
                }
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The state at a place, and where it ends at the latest (it may go on behind that).
    fn state(&self, at: u64) -> io::Result<(State, u64)> {
        let number = usize::try_from(at / self.span()).map_err(|_| damaged("its size"))?;
        let table_at = self.l1.get(number).copied().unwrap_or_default();
        if table_at == 0 {
            return Ok((State::Absent, (at / self.span() + 1) * self.span()));
        }
        if !table_at.is_multiple_of(self.cluster()) {
            return Err(damaged("a table begins inside a cluster"));
        }
        let table = {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            match &last.table {
                Some((offset, table)) if *offset == table_at => Arc::clone(table),
                _ => {
                    let table = Arc::new(self.piece(table_at, self.cluster())?);
                    last.table = Some((table_at, Arc::clone(&table)));
                    table
                }
            }
        };
        let width = if self.extended { 16 } else { 8 };
        let index = usize::try_from(at % self.span() / self.cluster()).unwrap_or_default() * width;
        let word = |at: usize| {
            table
                .get(at..at + 8)
                .and_then(|bytes| bytes.try_into().ok())
                .map_or(0, u64::from_be_bytes)
        };
        let entry = word(index);
        let cluster_end = (at / self.cluster() + 1) * self.cluster();
        if entry & COMPRESSED != 0 {
            return Ok((State::Packed(entry), cluster_end));
        }
        let inside = at % self.cluster();
        let place = entry & OFFSET;
        if !place.is_multiple_of(self.cluster()) {
            return Err(damaged("a cluster begins inside another"));
        }
        if self.extended {
            let part = inside / self.unit();
            let bits = word(index + 8);
            let state = match (bits >> part & 1, bits >> (part + 32) & 1) {
                (1, 0) if place != 0 => State::Data(place + inside),
                (0, 1) => State::Zero,
                (0, 0) => State::Absent,
                _ => return Err(damaged("a part of a cluster is two things at once")),
            };
            return Ok((state, (at / self.unit() + 1) * self.unit()));
        }
        let state = match (entry & ZERO, place) {
            (ZERO, _) => State::Zero,
            (_, 0) => State::Absent,
            (_, place) => State::Data(place + inside),
        };
        Ok((state, cluster_end))
    }

    /// The cluster behind a compressed entry.
    fn unpack(&self, entry: u64) -> io::Result<Arc<Vec<u8>>> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((key, cluster)) = &last.unpacked
            && *key == entry
        {
            return Ok(Arc::clone(cluster));
        }
        let bits = 62 - (self.cluster_bits - 8);
        let offset = entry & ((1 << bits) - 1);
        let sectors = ((entry & (COMPRESSED - 1)) >> bits) + 1;
        let length = sectors * SECTOR - offset % SECTOR;
        // Never longer than the cluster and a sector, or it would not have been packed.
        if length > self.cluster() + 2 * SECTOR {
            return Err(damaged("a compressed cluster is longer than a plain one"));
        }
        let packed = self.piece(offset, length)?;
        let size = usize::try_from(self.cluster()).unwrap_or_default();
        let cluster = if self.zstd {
            unpack_zstd(&packed, size)?
        } else {
            unpack_deflate(&packed, size)?
        };
        let cluster = Arc::new(cluster);
        last.unpacked = Some((entry, Arc::clone(&cluster)));
        Ok(cluster)
    }

    fn read_below(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        let size = self.below.as_ref().map_or(0, |below| below.size());
        let there = usize::try_from(size.saturating_sub(at))
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        // A disk may be larger than the one under it.
        buffer[there..].fill(0);
        match &self.below {
            Some(below) if there > 0 => below.read(&mut buffer[..there], at),
            _ => Ok(()),
        }
    }
}

fn unpack_deflate(packed: &[u8], size: usize) -> io::Result<Vec<u8>> {
    let mut cluster = Vec::with_capacity(size);
    // Without zlib's header; what follows the data is not its.
    Decompress::new(false)
        .decompress_vec(packed, &mut cluster, FlushDecompress::Finish)
        .map_err(|_| damaged("a compressed cluster cannot be unpacked"))?;
    if cluster.len() != size {
        return Err(damaged("a compressed cluster is too short"));
    }
    Ok(cluster)
}

fn unpack_zstd(packed: &[u8], size: usize) -> io::Result<Vec<u8>> {
    use std::io::Read as _;
    let mut cluster = Vec::with_capacity(size);
    let mut decoder = zstd::stream::Decoder::with_buffer(packed)?.single_frame();
    // A frame that holds one cluster needs no window that is larger.
    decoder.window_log_max(WINDOW_LOG_MAX)?;
    let unpacked = decoder.take(size as u64).read_to_end(&mut cluster);
    unpacked.map_err(|_| damaged("a compressed cluster cannot be unpacked"))?;
    if cluster.len() != size {
        return Err(damaged("a compressed cluster is too short"));
    }
    Ok(cluster)
}

impl Guest for Qcow2 {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut at = offset;
        let mut rest = buffer;
        while !rest.is_empty() {
            let (state, end) = self.state(at)?;
            let take = usize::try_from(end - at).unwrap_or(usize::MAX).min(rest.len());
            let (piece, after) = rest.split_at_mut(take);
            match state {
                State::Zero => piece.fill(0),
                State::Data(place) => self.fill(piece, place)?,
                State::Absent => self.read_below(piece, at)?,
                State::Packed(entry) => {
                    let cluster = self.unpack(entry)?;
                    let inside = usize::try_from(at % self.cluster()).unwrap_or_default();
                    piece.copy_from_slice(&cluster[inside..inside + take]);
                }
            }
            at += take as u64;
            rest = after;
        }
        Ok(())
    }

    fn next_data(&self, within: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let mut at = within.start;
        let mut found: Option<Range<u64>> = None;
        while at < within.end {
            let (state, end) = self.state(at)?;
            let end = end.min(within.end);
            let data = match state {
                State::Data(_) | State::Packed(_) => Some(at..end),
                State::Zero => None,
                State::Absent => match &self.below {
                    Some(below) if at < below.size() => below.next_data(at..end.min(below.size()))?,
                    _ => None,
                },
            };
            match (&mut found, data) {
                (None, Some(data)) => {
                    at = data.end;
                    found = Some(data);
                }
                (Some(found), Some(data)) if data.start == found.end => {
                    at = data.end;
                    found.end = data.end;
                }
                (Some(_), _) => break,
                (None, None) => at = end,
            }
        }
        Ok(found)
    }
}

/// Reads a hostile file as push, convert and flattening do: whatever its tables say, what is no data is zeros.
#[cfg(any(test, fuzzing))]
pub(in crate::image) fn fuzz(bytes: &[u8]) {
    use std::io::Write as _;

    use rustix::fs::MemfdFlags;

    use crate::image::inspect::{self, DiskFormat};

    /// Largest disk, which has many clusters of the smallest kind, and how much of it is read.
    const SIZE_MAX: u64 = 16 << 20;
    const READ_MAX: usize = 64 << 10;
    match inspect::bytes(bytes, SIZE_MAX) {
        Ok(inspected) if inspected.format == DiskFormat::Qcow2 => {}
        _ => return,
    }
    let Ok(memory) = rustix::fs::memfd_create("qcow2", MemfdFlags::CLOEXEC) else {
        return;
    };
    let mut file = File::from(memory);
    let Ok(guest) = file.write_all(bytes).and_then(|()| Qcow2::of(file, None)) else {
        return;
    };
    let read = |range: Range<u64>| {
        let length = usize::try_from(range.end - range.start).unwrap_or(READ_MAX);
        let mut buffer = vec![1; length.min(READ_MAX)];
        guest.read(&mut buffer, range.start).map(|()| buffer)
    };
    let mut at = 0;
    while let Ok(Some(data)) = guest.next_data(at..guest.size()) {
        assert!(at <= data.start && data.start < data.end && data.end <= guest.size());
        if let Ok(between) = read(at..data.start) {
            assert!(between.iter().all(|byte| *byte == 0), "data is taken for zeros");
        }
        let _ = read(data.clone());
        at = data.end;
    }
}
