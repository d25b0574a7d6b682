//! Carries a layer from its source to its format as one stream, on several threads, and remembers how far it came.
//!
//! ```text
//! parts (tasks) ─▶ count, hash, unpack (a thread) ─▶ hash, format, files (a thread)
//!                             │ now and then: a mark       │
//!                             └────────────────────────────┴─▶ checkpoint (one small file)
//! ```
//!
//! A mark travels with the bytes: whoever meets it knows that all bytes in front of it are used and none behind. Gzip and
//! plain layers have marks. Other packings have no place at which they could be stopped: such a layer starts again.

use std::any::Any;
use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};

use serde::{Deserialize, Serialize};

use super::decompress::{Compression, MAGIC, decompress, sniff, unreadable};
use super::gunzip::{Gunzip, Stopped};
use super::ledger::Segment;
use super::part::{CancelledOnDrop, ChannelReader, blocking, relay};
use super::progress::{Event, Progress};
use super::source::{PIECES_IN_FLIGHT, Source};
use super::verified::{Position, Verified};
use crate::image::digest::{Digest, Hasher};
use crate::image::error::Error;
use crate::image::format::Workplace;
use crate::image::manifest::Descriptor;
use crate::kill::{self, Point};

/// Packed bytes between two checkpoints: what a kill costs at most.
pub(in crate::image) const CHECKPOINT_EVERY: u64 = 64 << 20;

/// Name of the checkpoint in an image's folder, with the version of its content.
pub(in crate::image) const CHECKPOINT: &str = "checkpoint-1.json";

/// Largest checkpoint that is read, in bytes: its parts are bounded when it is written.
const CHECKPOINT_MAX: u64 = 8 << 20;

/// Unpacked bytes that travel together, and how many such blocks are on their way.
const BLOCK: usize = 256 << 10;
const BLOCKS: usize = 8;

/// Packed bytes that are read at once. What is not used of them at a mark is written down.
const READ: usize = 64 << 10;

/// What another process needs to go on with a layer.
#[derive(Debug, Serialize, Deserialize)]
struct Checkpoint {
    layer: usize,
    mark: Mark,
    /// State of the hash over the unpacked bytes, where there is one to compare with.
    unpacked: Option<String>,
    segments: Vec<Segment>,
    /// Bytes of each file that are written.
    files: BTreeMap<String, u64>,
}

/// Where the unpacking was.
#[derive(Debug, Serialize, Deserialize)]
struct Mark {
    position: Position,
    /// Packed bytes in front of the position that are still to be unpacked, in hexadecimal digits.
    rest: String,
    /// None for a layer that is not packed.
    gunzip: Option<Stopped>,
}

/// What travels between the threads.
enum Block {
    Begin(Compression),
    Bytes(Vec<u8>),
    Mark(Box<Mark>),
    End,
}

/// One layer to carry.
pub(in crate::image) struct Stream<'a> {
    pub(in crate::image) source: &'a Source,
    pub(in crate::image) number: usize,
    pub(in crate::image) blobs: &'a [Descriptor],
    /// What its unpacked bytes must hash to, where that is known.
    pub(in crate::image) diff_id: Option<Digest>,
    pub(in crate::image) place: &'a Workplace,
    /// Lives until no thread works here any more.
    pub(in crate::image) held: Arc<dyn Any + Send + Sync>,
    /// Packed bytes between two checkpoints.
    pub(in crate::image) every: u64,
}

impl Stream<'_> {
    /// Runs `take` on a thread of its own over the unpacked bytes, which it has to read to their end. What it returns is handed
    /// on only after all bytes, packed and unpacked, were seen to have their digests. Starts where an earlier call for this
    /// layer in the same folder was cut off.
    pub(in crate::image) async fn carry<T, F>(self, progress: &dyn Progress, take: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&mut dyn Read, Compression) -> Result<T, Error> + Send + 'static,
    {
        let found = Checkpoint::find(&self.place.dir, self.number);
        let found = found.and_then(|found| Some((found.mark.position.offset(self.blobs)?, found)));
        let (offset, checkpoint) = match found {
            Some((offset, checkpoint)) => (offset, Some(checkpoint)),
            None => (0, None),
        };
        if offset > 0 {
            self.place.meter.add_here(offset);
            progress.event(Event::Resumed { kept: offset });
        }
        let (mark, segments, files, unpacked) = match checkpoint {
            Some(found) => (Some(found.mark), found.segments, found.files, found.unpacked),
            None => (None, Vec::new(), BTreeMap::new(), None),
        };
        self.place.ledger.begin(segments.clone(), files);
        let (sender, reader) = relay(PIECES_IN_FLIGHT);
        let (blocks, unpacked_blocks) = sync_channel(BLOCKS);
        let (verdict, sentence) = channel();
        let cancelled = CancelledOnDrop::default();
        let unpacker = Unpacker {
            blobs: self.blobs.to_vec(),
            every: self.every,
            place: self.place.clone(),
            cancelled: Arc::clone(&cancelled.0),
            _held: Arc::clone(&self.held),
        };
        let unpacking = blocking(move || unpacker.run(reader, mark, &blocks, &sentence));
        let hasher = match (self.diff_id, unpacked) {
            (None, _) => None,
            (Some(_), None) => Some(Hasher::default()),
            // Without its state, the hash cannot be right: that is told as damage, and the next pull starts again.
            (Some(_), Some(state)) => Some(Hasher::resume(&state).unwrap_or_default()),
        };
        let mut unpacked = Unpacked {
            layer: self.number,
            blocks: unpacked_blocks,
            block: Vec::new(),
            given: 0,
            noted: 0,
            replay: segments.into_iter().map(Again::from).collect(),
            hasher,
            place: self.place.clone(),
            _held: Arc::clone(&self.held),
            ended: false,
        };
        let (number, diff_id) = (self.number, self.diff_id);
        let taking = blocking(move || {
            let result = unpacked.taken_by(take);
            let result = result.and_then(|value| unpacked.finish(number, diff_id).map(|()| value));
            // Bytes that make no sense may simply have been damaged on their way: that is for their digest to say, and it is
            // another person's fault.
            // The other thread may be done with everything.
            let _: Result<(), _> = verdict.send(matches!(result, Err(Error::Malformed { .. })));
            result
        });
        let feeding = self.source.feed_all(self.blobs, offset, sender);
        let (fed, unpacked, taken) = tokio::join!(feeding, unpacking, taking);
        // Without bytes the threads could only fail; why they did not come is the reason.
        let result = fed.and(unpacked).and(taken);
        if matches!(result, Err(Error::Corrupt { .. } | Error::Malformed { .. })) {
            // Whatever is written down may be a part of the damage.
            let path = self.place.dir.join(CHECKPOINT);
            crate::image::store::remove(&path)?;
        }
        result
    }
}

impl Checkpoint {
    /// What an earlier process has written down about this layer, if it can be used.
    fn find(dir: &Path, layer: usize) -> Option<Self> {
        let mut bytes = Vec::new();
        let file = File::open(dir.join(CHECKPOINT)).ok()?;
        file.take(CHECKPOINT_MAX).read_to_end(&mut bytes).ok()?;
        let found: Self = serde_json::from_slice(&bytes).ok()?;
        (found.layer == layer).then_some(found)
    }

    fn write(&self, dir: &Path) -> Result<(), Error> {
        let path = dir.join(CHECKPOINT);
        let begun: PathBuf = dir.join(format!("{CHECKPOINT}.begun"));
        let write = || -> io::Result<()> {
            fs::write(&begun, serde_json::to_vec(self)?)?;
            kill::point(Point::CheckpointBegun);
            fs::rename(&begun, &path)
        };
        write().map_err(Error::storage(&path))?;
        kill::point(Point::CheckpointKept);
        Ok(())
    }
}

/// Why the unpacking ended early.
enum Halt {
    /// Nobody takes the bytes any more.
    Unwanted,
    Failed(Error),
}

impl From<Error> for Halt {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// The thread that unpacks.
struct Unpacker {
    blobs: Vec<Descriptor>,
    every: u64,
    place: Workplace,
    cancelled: Arc<std::sync::atomic::AtomicBool>,
    _held: Arc<dyn Any + Send + Sync>,
}

impl Unpacker {
    fn run(
        &self,
        reader: ChannelReader,
        mark: Option<Mark>,
        blocks: &SyncSender<Block>,
        sentence: &Receiver<bool>,
    ) -> Result<(), Error> {
        let image = &self.place.image;
        let mut packed = Verified::new(reader, &self.blobs, &self.place.meter, &self.cancelled, image);
        match self.unpack(&mut packed, mark, blocks) {
            Ok(()) => packed.finish(),
            Err(Halt::Unwanted) if sentence.recv() == Ok(true) => packed.finish(),
            Err(Halt::Unwanted) => Ok(()),
            Err(Halt::Failed(error @ Error::Malformed { .. })) => packed.finish().and(Err(error)),
            Err(Halt::Failed(error)) => Err(error),
        }
    }

    fn unpack(
        &self,
        packed: &mut Verified<'_, ChannelReader>,
        mark: Option<Mark>,
        blocks: &SyncSender<Block>,
    ) -> Result<(), Halt> {
        if let Some(mark) = mark {
            let rest = hex::decode(&mark.rest).unwrap_or_default();
            if !packed.go_to(&mark.position) {
                return Err(self.broken_checkpoint());
            }
            return match mark.gunzip {
                None => {
                    send(blocks, Block::Begin(Compression::None))?;
                    self.pass_on(packed, rest, blocks)
                }
                Some(stopped) => {
                    send(blocks, Block::Begin(Compression::Gzip))?;
                    let gunzip = Gunzip::resume(&stopped).ok_or_else(|| self.broken_checkpoint())?;
                    self.gunzip(packed, gunzip, rest, blocks)
                }
            };
        }
        let mut head = Vec::with_capacity(MAGIC);
        let first = packed.take(MAGIC as u64).read_to_end(&mut head);
        first.map_err(|error| self.unreadable(error))?;
        match sniff(&head) {
            Compression::None => {
                send(blocks, Block::Begin(Compression::None))?;
                self.pass_on(packed, head, blocks)
            }
            Compression::Gzip => {
                send(blocks, Block::Begin(Compression::Gzip))?;
                let gunzip = Gunzip::new().map_err(|error| self.unreadable(error))?;
                self.gunzip(packed, gunzip, head, blocks)
            }
            _ => {
                let (compression, mut unpacked) =
                    decompress(io::Cursor::new(head).chain(packed), &self.place.image)?;
                send(blocks, Block::Begin(compression))?;
                while let Some(block) = self.read(&mut unpacked, BLOCK)? {
                    send(blocks, Block::Bytes(block))?;
                }
                send(blocks, Block::End)
            }
        }
    }

    /// A layer that is not packed.
    fn pass_on(
        &self,
        packed: &mut Verified<'_, ChannelReader>,
        rest: Vec<u8>,
        blocks: &SyncSender<Block>,
    ) -> Result<(), Halt> {
        send(blocks, Block::Bytes(rest))?;
        let mut since = 0;
        while let Some(block) = self.read(packed, BLOCK)? {
            since += block.len() as u64;
            send(blocks, Block::Bytes(block))?;
            if since >= self.every {
                since = 0;
                let mark = Mark {
                    position: packed.position(),
                    rest: String::new(),
                    gunzip: None,
                };
                send(blocks, Block::Mark(Box::new(mark)))?;
            }
        }
        send(blocks, Block::End)
    }

    fn gunzip(
        &self,
        packed: &mut Verified<'_, ChannelReader>,
        mut gunzip: Gunzip,
        mut input: Vec<u8>,
        blocks: &SyncSender<Block>,
    ) -> Result<(), Halt> {
        let (mut at, mut since, mut ended) = (0, 0, false);
        let (mut block, mut filled) = (vec![0; BLOCK], 0);
        loop {
            if at == input.len() && !ended {
                match self.read(packed, READ)? {
                    Some(more) => {
                        since += more.len() as u64;
                        (input, at) = (more, 0);
                    }
                    None => ended = true,
                }
            }
            let step = gunzip
                .step(&input[at..], &mut block[filled..], since >= self.every)
                .map_err(|error| self.unreadable(error))?;
            at += step.taken;
            filled += step.given;
            let stopped = gunzip.stop();
            if filled == BLOCK || stopped.is_some() {
                block.truncate(filled);
                send(
                    blocks,
                    Block::Bytes(std::mem::replace(&mut block, vec![0; BLOCK])),
                )?;
                filled = 0;
            }
            if let Some(stopped) = stopped {
                since = 0;
                let mark = Mark {
                    position: packed.position(),
                    rest: hex::encode(&input[at..]),
                    gunzip: Some(stopped),
                };
                send(blocks, Block::Mark(Box::new(mark)))?;
            }
            if ended && step.is_idle() {
                break;
            }
        }
        if !gunzip.is_complete() {
            return Err(self.unreadable(io::ErrorKind::UnexpectedEof.into()));
        }
        block.truncate(filled);
        send(blocks, Block::Bytes(block))?;
        send(blocks, Block::End)
    }

    /// Reads up to `length` bytes; none at the end.
    fn read(&self, from: &mut dyn Read, length: usize) -> Result<Option<Vec<u8>>, Halt> {
        let mut block = vec![0; length];
        let mut filled = 0;
        while filled < length {
            match from.read(&mut block[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.unreadable(error)),
            }
        }
        block.truncate(filled);
        Ok((filled > 0).then_some(block))
    }

    fn unreadable(&self, error: io::Error) -> Halt {
        Halt::Failed(unreadable(&self.place.image, error))
    }

    fn broken_checkpoint(&self) -> Halt {
        Halt::Failed(Error::Corrupt {
            image: self.place.image.clone(),
            reason: "what an earlier pull has written down about it cannot be used".to_owned(),
        })
    }
}

fn send(blocks: &SyncSender<Block>, block: Block) -> Result<(), Halt> {
    blocks.send(block).map_err(|_| Halt::Unwanted)
}

/// Unpacked bytes as a format reads them. First come those again that an earlier process has read.
struct Unpacked {
    layer: usize,
    blocks: Receiver<Block>,
    block: Vec<u8>,
    /// Bytes of the block that were given, and those of them that the ledger knows.
    given: usize,
    noted: usize,
    replay: VecDeque<Again>,
    hasher: Option<Hasher>,
    place: Workplace,
    _held: Arc<dyn Any + Send + Sync>,
    ended: bool,
}

/// What an earlier process has read: bytes, of which so many were given; or so many bytes that are in a file.
enum Again {
    Bytes(Vec<u8>, usize),
    Zeros(u64),
}

impl From<Segment> for Again {
    fn from(segment: Segment) -> Self {
        match segment {
            Segment::Verbatim(digits) => Self::Bytes(hex::decode(digits).unwrap_or_default(), 0),
            Segment::InFile(count) => Self::Zeros(count),
        }
    }
}

impl Unpacked {
    fn taken_by<T>(
        &mut self,
        take: impl FnOnce(&mut dyn Read, Compression) -> Result<T, Error>,
    ) -> Result<T, Error> {
        match self.blocks.recv() {
            Ok(Block::Begin(compression)) => take(self, compression),
            _ => Err(unreadable(&self.place.image, cut())),
        }
    }

    /// Compares, after everything was read.
    fn finish(&mut self, number: usize, diff_id: Option<Digest>) -> Result<(), Error> {
        let found = std::mem::take(&mut self.hasher).map(Hasher::finish);
        match (diff_id, found) {
            (Some(expected), Some(found)) if found != expected => Err(Error::Malformed {
                image: self.place.image.clone(),
                reason: format!(
                    "its layer {} unpacks to {found}, and its config says {expected}",
                    number + 1
                ),
            }),
            _ => Ok(()),
        }
    }

    /// Gives what an earlier process has read; nobody looks at what is in a file already.
    fn again(&mut self, buffer: &mut [u8]) -> Option<usize> {
        loop {
            let count = match self.replay.front_mut()? {
                Again::Bytes(bytes, given) => {
                    let count = buffer.len().min(bytes.len() - *given);
                    buffer[..count].copy_from_slice(&bytes[*given..*given + count]);
                    *given += count;
                    count
                }
                Again::Zeros(left) => {
                    let count = usize::try_from(*left).unwrap_or(usize::MAX).min(buffer.len());
                    buffer[..count].fill(0);
                    *left -= count as u64;
                    count
                }
            };
            if count > 0 || buffer.is_empty() {
                return Some(count);
            }
            self.replay.pop_front();
        }
    }

    /// Writes down what is reached.
    fn save(&mut self, mark: Mark) -> Result<(), Error> {
        let Some(page) = self.place.ledger.page()? else {
            return Ok(());
        };
        let checkpoint = Checkpoint {
            layer: self.layer,
            mark,
            unpacked: self.hasher.as_ref().map(Hasher::stop),
            segments: page.segments,
            files: page.files,
        };
        checkpoint.write(&self.place.dir)
    }
}

impl Read for Unpacked {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // The ledger knows what is read again; what files took of it is to be forgotten.
        self.place.ledger.read(&self.block[self.noted..self.given]);
        self.noted = self.given;
        if let Some(count) = self.again(buffer) {
            return Ok(count);
        }
        while self.given == self.block.len() {
            if self.ended {
                return Ok(0);
            }
            match self.blocks.recv() {
                Ok(Block::Bytes(block)) => {
                    if let Some(hasher) = &mut self.hasher {
                        hasher.update(&block);
                    }
                    (self.block, self.given, self.noted) = (block, 0, 0);
                }
                Ok(Block::Mark(mark)) => self.save(*mark).map_err(io::Error::other)?,
                Ok(Block::End) => self.ended = true,
                Ok(Block::Begin(_)) => {}
                Err(_) => return Err(cut()),
            }
        }
        let count = buffer.len().min(self.block.len() - self.given);
        buffer[..count].copy_from_slice(&self.block[self.given..self.given + count]);
        self.given += count;
        Ok(count)
    }
}

fn cut() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the transfer was cut")
}
