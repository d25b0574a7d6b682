//! Carries a layer from its source to its format as one stream, on several threads, and remembers how far it came.
//!
//! ```text
//! parts (tasks) ─▶ count, hash (a thread) ─▶ unpack (a thread) ─▶ hash, format, files (a thread)
//!                       │ how far that is         │ now and then: a mark      │
//!                       └─────────────────────────┴───────────────────────────┴─▶ checkpoint (one small file)
//! ```
//!
//! A mark travels with the bytes: whoever meets it knows that all bytes in front of it are used and none behind. Plain
//! layers have marks anywhere, gzip between its blocks, zstd between its frames. xz has no place at which it could be stopped: such a
//! layer starts again.

use std::any::Any;
use std::collections::BTreeMap;
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};

use super::checkpoint::{CHECKPOINT, Checkpoint};
use super::decompress::Compression;
use super::part::{CancelledOnDrop, ChannelReader, blocking, relay};
use super::progress::{Event, Progress};
use super::source::{PIECES_IN_FLIGHT, Source};
use super::unpacked::Unpacked;
use super::unpacker::{Packed, Seen, Unpacker};
use super::verified::{Check, Position};
use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::format::Workplace;
use crate::image::manifest::Descriptor;

/// Packed bytes between two checkpoints: what a kill costs at most.
pub(in crate::image) const CHECKPOINT_EVERY: u64 = 64 << 20;

/// Pieces on their way from the thread that hashes them, and unpacked blocks to the one that takes them.
const PIECES: usize = 8;
const BLOCKS: usize = 8;

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
        let (mark, segments, files, hasher) = match checkpoint {
            Some(found) => (Some(found.mark), found.segments, found.files, found.unpacked),
            None => (None, Vec::new(), BTreeMap::new(), None),
        };
        self.place.ledger.begin(segments.clone(), files);
        let (position, rest, from) = match mark {
            Some(mark) => (mark.position, mark.rest, Some(mark.stand)),
            None => (Position::default(), Vec::new(), None),
        };
        let (sender, reader) = relay(PIECES_IN_FLIGHT);
        let (seen_sender, seen) = sync_channel(PIECES);
        let (blocks, unpacked_blocks) = sync_channel(BLOCKS);
        let (used, used_blocks) = sync_channel(BLOCKS);
        let (taker, takers_word) = channel();
        let (unpackers, unpackers_word) = channel();
        let cancelled = CancelledOnDrop::default();
        let checker = Checker {
            blobs: self.blobs.to_vec(),
            place: self.place.clone(),
            cancelled: Arc::clone(&cancelled.0),
            _held: Arc::clone(&self.held),
        };
        let packed = Packed::new(seen, rest, position.clone());
        let checking = blocking(move || checker.run(reader, position, seen_sender, &unpackers_word));
        let unpacker = Unpacker {
            every: self.every,
            place: self.place.clone(),
            blocks,
            used: used_blocks,
            _held: Arc::clone(&self.held),
        };
        let unpacking = blocking(move || unpacker.run(packed, from, &takers_word, &unpackers));
        let (number, diff_id) = (self.number, self.diff_id);
        let hasher = diff_id.map(|_| hasher.unwrap_or_default());
        let (place, held) = (self.place.clone(), Arc::clone(&self.held));
        let mut unpacked = Unpacked::new(number, (unpacked_blocks, used), segments, hasher, place, held);
        let taking = blocking(move || {
            let result = unpacked.taken_by(take);
            let result = result.and_then(|value| unpacked.finish(diff_id).map(|()| value));
            // Bytes that make no sense may simply have been damaged on their way: that is for their digest to say, and it is
            // another person's fault.
            // The other thread may be done with everything.
            let _: Result<(), _> = taker.send(matches!(result, Err(Error::Malformed { .. })));
            result
        });
        let feeding = self
            .source
            .feed_all(self.blobs, offset, &self.place.meter, sender);
        let (fed, checked, unpacked, taken) = tokio::join!(feeding, checking, unpacking, taking);
        // Without bytes the threads could only fail; why they did not come is the reason. Of wrong bytes the same is true.
        let result = fed.and(checked).and(unpacked).and(taken);
        if matches!(result, Err(Error::Corrupt { .. } | Error::Malformed { .. })) {
            // Whatever is written down may be a part of the damage.
            let path = self.place.dir.join(CHECKPOINT);
            crate::image::store::remove(&path)?;
        }
        result
    }
}

/// The thread that counts and hashes what comes.
struct Checker {
    blobs: Vec<Descriptor>,
    place: Workplace,
    cancelled: Arc<AtomicBool>,
    _held: Arc<dyn Any + Send + Sync>,
}

impl Checker {
    /// Hands on what comes, and says at the end whether it was what was announced. If nobody unpacks it any more, `unpacker` is
    /// asked whether that is still of interest.
    fn run(
        &self,
        mut reader: ChannelReader,
        position: Position,
        seen: SyncSender<Seen>,
        unpacker: &Receiver<bool>,
    ) -> Result<(), Error> {
        let mut check = Check::new(&self.blobs, position, &self.place.meter, &self.place.image);
        let mut wanted = Some(seen);
        let mut hand_on = |seen: Seen| {
            let sent = wanted.as_ref().is_none_or(|wanted| wanted.send(seen).is_ok());
            if !sent {
                wanted = None;
            }
            sent || unpacker.recv() == Ok(true)
        };
        loop {
            let piece = CancelledOnDrop::check(&self.cancelled).and_then(|()| reader.piece());
            let Some(piece) = piece.map_err(|error| check.failed(&error))? else {
                break;
            };
            check.take(&piece)?;
            if !hand_on(Seen::Bytes(piece, check.position().clone())) {
                return Ok(());
            }
        }
        check.end()?;
        hand_on(Seen::End);
        Ok(())
    }
}
