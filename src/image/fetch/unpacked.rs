//! Unpacked bytes as a format reads them, hashed, and the checkpoints of what it has used.

use std::any::Any;
use std::collections::VecDeque;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};

use super::checkpoint::{Checkpoint, Mark};
use super::decompress::{Compression, unreadable};
use super::ledger::Segment;
use super::part::cut;
use super::unpacker::Block;
use crate::image::digest::{Digest, Hasher};
use crate::image::error::Error;
use crate::image::format::Workplace;

/// Unpacked bytes as a format reads them. First come those again that an earlier process has read.
pub(super) struct Unpacked {
    layer: usize,
    blocks: Receiver<Block>,
    /// Where blocks go that were used.
    used: SyncSender<Vec<u8>>,
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
    /// `segments` is what an earlier process has read, and `hasher` has its hash, if there is a digest to compare with.
    pub(super) fn new(
        layer: usize,
        (blocks, used): (Receiver<Block>, SyncSender<Vec<u8>>),
        segments: Vec<Segment>,
        hasher: Option<Hasher>,
        place: Workplace,
        held: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Self {
            layer,
            blocks,
            used,
            block: Vec::new(),
            given: 0,
            noted: 0,
            replay: segments.into_iter().map(Again::from).collect(),
            hasher,
            place,
            _held: held,
            ended: false,
        }
    }

    /// Lets somebody read.
    pub(super) fn taken_by<T>(
        &mut self,
        take: impl FnOnce(&mut dyn Read, Compression) -> Result<T, Error>,
    ) -> Result<T, Error> {
        match self.blocks.recv() {
            Ok(Block::Begin(compression)) => take(self, compression),
            _ => Err(unreadable(&self.place.image, cut())),
        }
    }

    /// Compares, after everything was read.
    pub(super) fn finish(&mut self, diff_id: Option<Digest>) -> Result<(), Error> {
        let found = std::mem::take(&mut self.hasher).map(Hasher::finish);
        match (diff_id, found) {
            (Some(expected), Some(found)) if found != expected => Err(Error::Malformed {
                image: self.place.image.clone(),
                reason: format!(
                    "its layer {} unpacks to {found}, and its config says {expected}",
                    self.layer + 1
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
            unpacked: self.hasher.clone(),
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
                    let used = std::mem::replace(&mut self.block, block);
                    // Where nobody wants it, it goes.
                    drop(self.used.try_send(used));
                    (self.given, self.noted) = (0, 0);
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
