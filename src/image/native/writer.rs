//! From a disk to packs and an index.
//!
//! ```text
//! one thread:  read, cut ─▶ batches ─▶ all cores: hash, look up in the base, pack ─▶ in order again: ledger, packs ─▶ outlet
//!                                                                                       then the index, region by region
//! ```
//!
//! Memory does not grow with the disk: batches in flight are counted, what the index needs goes to a file of 64 bytes a
//! chunk, and the tables of known chunks are bounded.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};

use super::base::{Known, Place};
use super::cutter::{self, Batch};
use super::index::{self, Chunk, Segment};
use super::ledger::{Entry, Ledger};
use super::reader::ContentDigest;
use super::{FILES, INDEX_TYPE, LAYERS_MAX, PACK_TYPE};
use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::fetch::progress::Meter;
use crate::image::manifest::Descriptor;
use crate::image::view::Guest;

/// Least bytes of a file whose chunks have segments of their own: what did not change in a region costs no new segment.
const REGION: u64 = 1 << 30;

/// Most regions of a file; larger files have larger regions.
const REGIONS_MAX: u64 = 1024;

/// Bytes of a pack, of an image that is no larger than [`LARGE`]. Many connections have work, and one retry costs little.
const PACK: usize = 32 << 20;

/// Bytes of a pack of larger images, so that the manifest stays small.
const LARGE_PACK: usize = 64 << 20;
const LARGE: u64 = 128 << 30;

/// A base's pack of which no more than one part in so many is still used is not referred to: what is used is packed again.
const STALE: u64 = 4;

/// Most of a base's packs that are referred to: those of which most is used.
const BASE_PACKS_MAX: usize = 4096;

/// Chunks of the image itself that are remembered, so that a second copy costs nothing. 27 MiB of memory.
const OWN_MAX: usize = 7 << 16;

/// Threads that pack. More would need more memory than they are worth.
const THREADS_MAX: usize = 16;

/// What is written: the disk, and where they are the kernel and the initial RAM disk.
pub(in crate::image) type Files = [Option<Box<dyn Guest + Send>>; FILES.len()];

/// How it is written.
#[derive(Debug, Clone)]
pub(in crate::image) struct Options<'a> {
    /// zstd's level.
    pub(in crate::image) level: i32,
    /// A folder for a file that is removed again: 64 bytes a chunk.
    pub(in crate::image) scratch: &'a Path,
    /// Counts the unpacked bytes.
    pub(in crate::image) meter: Arc<Meter>,
}

/// zstd's level where nobody asks for another: its own default.
pub(in crate::image) const LEVEL: i32 = 3;

/// Where blobs go.
pub(in crate::image) trait Outlet {
    /// Is this blob there already, or could it be mounted from the base's repository?
    fn has(&mut self, blob: &Descriptor) -> Result<bool, Error>;

    /// Takes a blob. It may be on its way when this returns; an error may be told at a later call.
    fn put(&mut self, blob: &Descriptor, bytes: Vec<u8>) -> Result<(), Error>;
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::image) struct Written {
    /// All packs and the index, for the manifest.
    pub(in crate::image) layers: Vec<Descriptor>,
    /// For the manifest's annotation [`super::CONTENT`].
    pub(in crate::image) content: Digest,
    /// Unpacked bytes that are no holes.
    pub(in crate::image) data: u64,
    /// Packed bytes that are in new packs.
    pub(in crate::image) packed: u64,
    /// Packed bytes of the base that are referred to.
    pub(in crate::image) reused: u64,
}

/// Writes an image's packs and index. `base` is what an earlier image brings; nothing, for none.
///
/// # Errors
/// What the outlet says, and [`Error::Storage`] for files that cannot be read.
pub(in crate::image) fn write(
    files: &mut Files,
    base: &Known,
    outlet: &mut dyn Outlet,
    options: &Options<'_>,
) -> Result<Written, Error> {
    let size: u64 = files.iter().flatten().map(|file| file.size()).sum();
    let ledger = Ledger::create(options.scratch).map_err(Error::storage(options.scratch))?;
    let mut packer = Packer {
        base,
        outlet,
        ledger,
        scratch: options.scratch,
        packs: Vec::new(),
        open: Vec::new(),
        pack_size: if size > LARGE { LARGE_PACK } else { PACK },
        own: HashMap::new(),
        used: vec![0; base.packs.len()],
        data: 0,
        packed: 0,
    };
    for (number, file) in files.iter_mut().enumerate() {
        let Some(file) = file else { continue };
        let region = region(file.size());
        let mut start = 0;
        while start < file.size() {
            let end = file.size().min(start + region);
            packer.region(number, &mut **file, start..end, options)?;
            start = end;
        }
    }
    let kept = packer.keep_packs()?;
    packer.pack_again(files, &kept, options.level)?;
    packer.close_pack()?;
    packer.index(files, &kept)
}

/// How much of a file is cut, and has its segments, by itself, in bytes.
fn region(size: u64) -> u64 {
    size.div_ceil(REGIONS_MAX).next_power_of_two().max(REGION)
}

/// A batch, packed.
struct Packed {
    chunks: Vec<PackedChunk>,
    frames: Vec<u8>,
    /// Unpacked bytes.
    data: usize,
}

struct PackedChunk {
    at: u64,
    length: u32,
    digest: Digest,
    source: Source,
}

enum Source {
    Base(Place),
    /// Its bytes in [`Packed::frames`].
    Frame(std::ops::Range<usize>),
}

struct Packer<'a> {
    base: &'a Known,
    outlet: &'a mut dyn Outlet,
    ledger: Ledger,
    scratch: &'a Path,
    /// New packs that are full; they are numbered from the base's last on.
    packs: Vec<Descriptor>,
    /// The pack that is being filled.
    open: Vec<u8>,
    pack_size: usize,
    own: HashMap<(Digest, u32), Place>,
    /// Packed bytes that are referred to, of each pack of the base.
    used: Vec<u64>,
    data: u64,
    packed: u64,
}

impl Packer<'_> {
    /// Packs what lies between two places of a file.
    fn region(
        &mut self,
        file: usize,
        guest: &mut (dyn Guest + Send),
        range: std::ops::Range<u64>,
        options: &Options<'_>,
    ) -> Result<(), Error> {
        let threads =
            std::thread::available_parallelism().map_or(2, |count| count.get().clamp(1, THREADS_MAX));
        // A batch is somewhere between being read and being written down; so many at most.
        let (give_permit, permits) = mpsc::sync_channel::<()>(2 * threads + 2);
        let (give_batch, batches) = mpsc::sync_channel::<(usize, Batch)>(threads);
        let (give_packed, packed) = mpsc::channel::<(usize, io::Result<Packed>)>();
        let batches = Mutex::new(batches);
        let base = self.base;
        std::thread::scope(|scope| {
            let reader = scope.spawn(move || read(guest, range, &give_permit, &give_batch));
            for _ in 0..threads {
                let (batches, give_packed) = (&batches, give_packed.clone());
                scope.spawn(move || pack_all(batches, &give_packed, base, options.level));
            }
            drop(give_packed);
            let result = self.take_all(file, &packed, &permits, &options.meter);
            // Whoever still waits to hand something on must not wait for ever.
            drop((packed, permits));
            let read = reader
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let read = read.map_err(Error::storage(FILES[file]));
            result.and(read)
        })
    }

    /// Takes packed batches in the order of the file.
    fn take_all(
        &mut self,
        file: usize,
        packed: &Receiver<(usize, io::Result<Packed>)>,
        permits: &Receiver<()>,
        meter: &Meter,
    ) -> Result<(), Error> {
        let (mut next, mut early) = (0, BTreeMap::new());
        for (number, batch) in packed {
            early.insert(number, batch.map_err(Error::storage(self.scratch))?);
            while let Some(batch) = early.remove(&next) {
                let data = batch.data;
                self.take(file, batch)?;
                meter.add_unpacked(data);
                next += 1;
                // The reader has ended when there is none to take.
                let _ = permits.try_recv();
            }
        }
        Ok(())
    }

    fn take(&mut self, file: usize, batch: Packed) -> Result<(), Error> {
        for chunk in batch.chunks {
            let place = match chunk.source {
                Source::Base(place) => {
                    self.used[place.pack as usize] += u64::from(place.packed);
                    place
                }
                Source::Frame(range) => self.place((chunk.digest, chunk.length), &batch.frames[range])?,
            };
            self.data += u64::from(chunk.length);
            self.write_down(&Entry {
                file,
                at: chunk.at,
                length: chunk.length,
                digest: chunk.digest,
                place,
            })?;
        }
        Ok(())
    }

    fn write_down(&mut self, entry: &Entry) -> Result<(), Error> {
        self.ledger.add(entry).map_err(Error::storage(self.scratch))
    }

    /// Finds or makes the place of a frame in the new packs.
    fn place(&mut self, key: (Digest, u32), frame: &[u8]) -> Result<Place, Error> {
        if let Some(place) = self.own.get(&key) {
            return Ok(*place);
        }
        if !self.open.is_empty() && self.open.len() + frame.len() > self.pack_size {
            self.close_pack()?;
        }
        let place = Place {
            pack: number(self.base.packs.len() + self.packs.len()),
            at: self.open.len() as u64,
            packed: number(frame.len()),
        };
        self.open.extend_from_slice(frame);
        self.packed += frame.len() as u64;
        if self.own.len() < OWN_MAX {
            self.own.insert(key, place);
        }
        Ok(place)
    }

    fn close_pack(&mut self) -> Result<(), Error> {
        if self.open.is_empty() {
            return Ok(());
        }
        let bytes = std::mem::take(&mut self.open);
        let pack = put(self.outlet, PACK_TYPE, bytes)?;
        self.packs.push(pack);
        Ok(())
    }

    /// Which packs of the base stay: those that are there and of which enough is used.
    fn keep_packs(&mut self) -> Result<Vec<bool>, Error> {
        let mut order: Vec<usize> = (0..self.base.packs.len())
            .filter(|&pack| self.used[pack] > self.base.packs[pack].size / STALE)
            .collect();
        order.sort_by_key(|&pack| std::cmp::Reverse(self.used[pack]));
        order.truncate(BASE_PACKS_MAX);
        let mut kept = vec![false; self.base.packs.len()];
        for pack in order {
            kept[pack] = self.outlet.has(&self.base.packs[pack])?;
        }
        Ok(kept)
    }

    /// Packs again what lies in packs of the base that do not stay.
    fn pack_again(&mut self, files: &mut Files, kept: &[bool], level: i32) -> Result<(), Error> {
        let gone = |place: &Place| kept.get(place.pack as usize) == Some(&false);
        if !self.used.iter().zip(kept).any(|(&used, &kept)| used > 0 && !kept) {
            return Ok(());
        }
        let storage = |scratch: &Path| Error::storage(scratch.to_owned());
        let mut compressor = zstd::bulk::Compressor::new(level).map_err(storage(self.scratch))?;
        for number in 0..self.ledger.len() {
            let mut entry = self.ledger.get(number).map_err(storage(self.scratch))?;
            if !gone(&entry.place) {
                continue;
            }
            let key = (entry.digest, entry.length);
            entry.place = match self.own.get(&key) {
                Some(place) => *place,
                None => {
                    let mut bytes = vec![0; entry.length as usize];
                    let file = files[entry.file]
                        .as_ref()
                        .map(|file| file.read(&mut bytes, entry.at));
                    file.transpose().map_err(Error::storage(FILES[entry.file]))?;
                    if Digest::of(&bytes) != entry.digest {
                        return Err(Error::storage(FILES[entry.file])(io::Error::other(
                            "it changed while it was read",
                        )));
                    }
                    let frame = compressor.compress(&bytes).map_err(storage(self.scratch))?;
                    self.place(key, &frame)?
                }
            };
            self.ledger.set(number, &entry).map_err(storage(self.scratch))?;
        }
        Ok(())
    }

    /// Writes the index.
    fn index(mut self, files: &Files, kept: &[bool]) -> Result<Written, Error> {
        let kept_packs = self.base.packs.iter().zip(kept).filter(|(_, kept)| **kept);
        let mut layers: Vec<Descriptor> = kept_packs.map(|(pack, _)| pack.clone()).collect();
        layers.extend(self.packs.iter().cloned());
        let reused = self
            .used
            .iter()
            .zip(kept)
            .filter(|(_, kept)| **kept)
            .map(|(used, _)| used)
            .sum();
        let mut digest = ContentDigest::default();
        let mut next = 0;
        for (number, file) in files.iter().enumerate() {
            let Some(file) = file else { continue };
            digest.file(number, file.size());
            let region = region(file.size());
            let mut first = true;
            loop {
                let entries = self.entries(number, region, &mut next)?;
                // A file that is one hole has a segment all the same: it says how long the hole is.
                if entries.is_empty() && !first {
                    break;
                }
                first = false;
                for entry in &entries {
                    digest.chunk(entry.at, entry.length, &entry.digest);
                }
                let segment = self.segment(number, file.size(), &entries);
                let bytes = index::encode(&segment).map_err(Error::storage(self.scratch))?;
                layers.push(put(self.outlet, INDEX_TYPE, bytes)?);
            }
        }
        if layers.len() > LAYERS_MAX {
            return Err(Error::TooLarge {
                image: "the image to write".to_owned(),
                what: "list of layers",
                size: layers.len() as u64,
                limit: LAYERS_MAX as u64,
            });
        }
        Ok(Written {
            layers,
            content: digest.finish(),
            data: self.data,
            packed: self.packed,
            reused,
        })
    }

    /// The chunks of the next segment, all of one region.
    fn entries(&mut self, file: usize, region: u64, next: &mut u64) -> Result<Vec<Entry>, Error> {
        let mut entries: Vec<Entry> = Vec::new();
        while *next < self.ledger.len() {
            let entry = self.ledger.get(*next).map_err(Error::storage(self.scratch))?;
            let same = entries
                .first()
                .is_none_or(|first| first.at / region == entry.at / region);
            if entry.file != file || !same || entries.len() == index::CHUNKS_MAX {
                break;
            }
            entries.push(entry);
            *next += 1;
        }
        Ok(entries)
    }

    fn segment(&self, file: usize, file_length: u64, entries: &[Entry]) -> Segment {
        let (mut packs, mut numbers) = (Vec::new(), HashMap::new());
        let chunks = entries
            .iter()
            .map(|entry| {
                let pack = *numbers.entry(entry.place.pack).or_insert_with(|| {
                    let global = entry.place.pack as usize;
                    let own = global.checked_sub(self.base.packs.len());
                    packs.push(
                        own.map_or_else(|| &self.base.packs[global], |own| &self.packs[own])
                            .digest,
                    );
                    number(packs.len() - 1)
                });
                Chunk {
                    at: entry.at,
                    length: entry.length,
                    digest: entry.digest,
                    pack,
                    packed_at: entry.place.at,
                    packed_length: entry.place.packed,
                }
            })
            .collect();
        Segment {
            file,
            file_length,
            packs,
            chunks,
        }
    }
}

/// Numbers of this room are bounded by the sizes of batches and packs.
fn number(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn put(outlet: &mut dyn Outlet, media_type: &str, bytes: Vec<u8>) -> Result<Descriptor, Error> {
    let blob = Descriptor {
        media_type: media_type.to_owned(),
        digest: Digest::of(&bytes),
        size: bytes.len() as u64,
        annotations: BTreeMap::new(),
    };
    if !outlet.has(&blob)? {
        outlet.put(&blob, bytes)?;
    }
    Ok(blob)
}

/// The reading thread: batches with their numbers, as long as anybody takes them.
fn read(
    guest: &mut (dyn Guest + Send),
    range: std::ops::Range<u64>,
    permits: &SyncSender<()>,
    batches: &SyncSender<(usize, Batch)>,
) -> io::Result<()> {
    /// Why reading ended early.
    enum End {
        Io(io::Error),
        /// Those who take have an error of their own.
        NobodyTakes,
    }
    impl From<io::Error> for End {
        fn from(error: io::Error) -> Self {
            Self::Io(error)
        }
    }
    let mut number = 0;
    let ended = cutter::cut(guest, range.start, range.end, |batch| {
        permits.send(()).map_err(|_| End::NobodyTakes)?;
        batches.send((number, batch)).map_err(|_| End::NobodyTakes)?;
        number += 1;
        Ok(())
    });
    match ended {
        Err(End::Io(error)) => Err(error),
        Ok(()) | Err(End::NobodyTakes) => Ok(()),
    }
}

/// A packing thread.
fn pack_all(
    batches: &Mutex<Receiver<(usize, Batch)>>,
    packed: &mpsc::Sender<(usize, io::Result<Packed>)>,
    base: &Known,
    level: i32,
) {
    let mut compressor = match zstd::bulk::Compressor::new(level) {
        Ok(compressor) => compressor,
        Err(error) => {
            // Whoever takes gives up, for whichever number.
            let _ = packed.send((0, Err(error)));
            return;
        }
    };
    loop {
        // Waiting for the next batch is done under the lock: the others wait for the same thing.
        let next = batches.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((number, batch)) = next else { return };
        // When nobody takes any more, the rest is only emptied, so that the reader does not wait for ever.
        let _ = packed.send((number, pack(&batch, base, &mut compressor)));
    }
}

fn pack(batch: &Batch, base: &Known, compressor: &mut zstd::bulk::Compressor<'_>) -> io::Result<Packed> {
    let mut frames = Vec::with_capacity(batch.data.len() / 2);
    let mut chunks = Vec::with_capacity(batch.chunks.len());
    for &(at, length) in &batch.chunks {
        let bytes = &batch.data[at..at + length];
        let (digest, length) = (Digest::of(bytes), number(length));
        let source = match base.find(&digest, length) {
            Some(place) => Source::Base(place),
            None => {
                let start = frames.len();
                frames.extend_from_slice(&compressor.compress(bytes)?);
                Source::Frame(start..frames.len())
            }
        };
        chunks.push(PackedChunk {
            at: batch.at + at as u64,
            length,
            digest,
            source,
        });
    }
    Ok(Packed {
        chunks,
        frames,
        data: batch.data.len(),
    })
}

#[cfg(test)]
mod tests;
