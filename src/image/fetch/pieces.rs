//! Carries out a plan: fetches pieces over several connections, unpacks and verifies them on all processors, and puts each
//! where it belongs.
//!
//! ```text
//! plan ─ what is done ─ what the host has ─▶ units ─┬─ range ─▶ batches ─▶ unpack, hash ─▶ file ─▶ done
//!                                                   ├─ range ─▶ one large piece, while it arrives
//!                                                   └─ whole blob, verified by its own digest
//! ```
//!
//! Only verified bytes are written, but for large pieces and whole blobs: their places are cleared before another try.

use std::any::Any;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use tokio::sync::{Mutex, Semaphore};

use super::batch::{self, Batch, Unit};
use super::part::{CancelledOnDrop, blocking, relay};
use super::progress::{Event, Meter, Progress};
use super::site::{Site, examine, unpackers};
use super::source::{PIECES_IN_FLIGHT, Source, told};
use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::format::Workplace;
use crate::image::manifest::Descriptor;
use crate::image::plan::Pieces;

/// Packed bytes in memory at once, in KiB. Each batch unpacks into at most as much again.
const IN_FLIGHT_KIB: usize = 48 << 10;

/// Unpacked bytes after which it is written down what is done, and the time after which it is, too: what a kill costs.
const NOTE_BYTES: u64 = 64 << 20;
const NOTE_EVERY: Duration = Duration::from_secs(1);

/// How often a piece is fetched that arrives damaged. A second time, for what a proxy or a cable did; not a third, for what
/// lies damaged at the registry. Whether the image was made so is found out then, from the whole blob.
const TRIES: u32 = 2;

/// Finds bytes that the host has already.
pub(in crate::image) trait Known: Send + Sync {
    /// A file and a place in it that should hold `length` bytes with this digest. They are verified before they are used.
    fn find(&self, digest: &Digest, length: u64) -> Option<(PathBuf, u64)>;
}

/// Fetches what a plan names into the files of a work place, and goes on where an earlier call for the same plan in the same
/// folder was cut off. When it returns well, all bytes are verified and written. Room for them was asked for by the caller.
///
/// `held` lives until no thread works here any more. `total` is the image's packed size in bytes, for progress.
pub(in crate::image) async fn fetch(
    source: &Source,
    plan: Arc<Pieces>,
    place: &Workplace,
    known: Option<Arc<dyn Known>>,
    held: Arc<dyn Any + Send + Sync>,
    total: u64,
    progress: &dyn Progress,
) -> Result<(), Error> {
    let cancelled = CancelledOnDrop::default();
    let (at, flag) = (place.clone(), Arc::clone(&cancelled.0));
    let site = Arc::new(blocking(move || Site::open(plan, &at, flag, held)).await?);
    let kept = site.packed_here();
    if kept > 0 {
        place.meter.add_here(kept);
        progress.event(Event::Resumed { kept });
    }
    if let Some(known) = known {
        site.reuse(known).await?;
        let reused = site.packed_here() - kept;
        if reused > 0 {
            place.meter.add_here(reused);
            progress.event(Event::Reused { bytes: reused });
        }
    }
    for (number, blob) in site.plan.blobs.iter().enumerate() {
        let pieces = blob.pieces.iter().enumerate();
        let here = pieces.filter(|(index, _)| site.done.has(number, *index));
        let here = here.map(|(_, piece)| piece.packed.end - piece.packed.start).sum();
        if here > 0 {
            place.meter.add_layer(&blob.descriptor, here);
        }
    }
    let crew = Crew {
        source,
        site: Arc::clone(&site),
        memory: Arc::new(Semaphore::new(IN_FLIGHT_KIB)),
        unpackers: Arc::new(Semaphore::new(unpackers())),
        judging: Mutex::default(),
    };
    let fetched = told(progress, &place.meter, total, crew.all_noted()).await;
    // What came before an error is kept as well.
    let noted = blocking(move || site.note()).await;
    fetched.and(noted)
}

/// Those who bring and unpack.
struct Crew<'a> {
    source: &'a Source,
    site: Arc<Site>,
    memory: Arc<Semaphore>,
    unpackers: Arc<Semaphore>,
    /// Held by who finds out why a piece is no good.
    judging: Mutex<()>,
}

impl Crew<'_> {
    /// Does everything that is missing, and writes down again and again what is done.
    async fn all_noted(&self) -> Result<(), Error> {
        let work = self.all();
        tokio::pin!(work);
        let mut tick = tokio::time::interval(NOTE_EVERY / 4);
        let mut quarters = 0;
        loop {
            tokio::select! {
                result = &mut work => return result,
                _ = tick.tick() => quarters += 1,
            }
            let unwritten = self.site.done.unwritten();
            if unwritten >= NOTE_BYTES || (quarters >= 4 && unwritten > 0) {
                quarters = 0;
                let site = Arc::clone(&self.site);
                let note = blocking(move || site.note());
                tokio::pin!(note);
                tokio::select! {
                    result = &mut work => return note.await.and(result),
                    result = &mut note => result?,
                }
            }
        }
    }

    async fn all(&self) -> Result<(), Error> {
        let site = &self.site;
        let units: Vec<Unit> = site
            .plan
            .blobs
            .iter()
            .enumerate()
            .flat_map(|(number, blob)| batch::units(number, blob, |piece| !site.done.has(number, piece)))
            .collect();
        stream::iter(units)
            .map(|unit| self.patiently(unit))
            .buffer_unordered(self.source.width())
            .try_collect()
            .await
    }

    /// Does one unit; once more what arrived damaged.
    async fn patiently(&self, mut unit: Unit) -> Result<(), Error> {
        for _ in 1..TRIES {
            match self.once(&unit).await {
                Err(error @ Error::Corrupt { .. }) => {
                    tracing::debug!(%error, "fetching it again");
                }
                result => return result,
            }
            if let Unit::Batches { blob, batches } = &mut unit {
                let done = |piece: &usize| self.site.done.has(*blob, *piece);
                batches.retain(|batch| !batch.pieces.iter().all(done));
            }
        }
        match self.once(&unit).await {
            Err(error @ Error::Corrupt { .. }) => Err(self.judged(&unit, error).await),
            result => result,
        }
    }

    /// Why pieces are no good again and again. Bytes of a blob that has its digest are what somebody pushed, and pieces that are no good
    /// in these are that person's fault. Where the blob has not, or its pieces are good, it is damage.
    async fn judged(&self, unit: &Unit, damage: Error) -> Error {
        let (blob, pieces): (usize, Vec<usize>) = match unit {
            Unit::Batches { blob, batches } => {
                let pieces = batches.iter().flat_map(|batch| batch.pieces.iter().copied());
                (*blob, pieces.collect())
            }
            Unit::Streamed { blob, piece } => (*blob, vec![*piece]),
            // It was verified as a whole already.
            Unit::Whole { .. } => return damage,
        };
        // Whatever is found out ends the pull, so that no second blob is fetched for it.
        let _alone = self.judging.lock().await;
        let site = Arc::clone(&self.site);
        let work = move |packed: &mut dyn Read| {
            let planned = &site.plan.blobs[blob];
            let missing = pieces.iter().filter(|&&piece| !site.done.has(blob, piece));
            let mut at = 0;
            for piece in missing.map(|&piece| &planned.pieces[piece]) {
                // The same packed bytes once more, which are the same piece in another place.
                if piece.packed.start < at {
                    continue;
                }
                let malformed = |failed| site.malformed(&planned.descriptor.digest, piece, failed);
                let gap = piece.packed.start - at;
                io::copy(&mut packed.take(gap), &mut io::sink()).map_err(|error| malformed(error.into()))?;
                let mut own = packed.take(piece.packed.end - piece.packed.start);
                examine(piece, &mut own).map_err(malformed)?;
                io::copy(&mut own, &mut io::sink()).map_err(|error| malformed(error.into()))?;
                at = piece.packed.end;
            }
            Ok(())
        };
        let descriptor = std::slice::from_ref(&self.site.plan.blobs[blob].descriptor);
        match self.source.verified(descriptor, &self.site.meter, work).await {
            Err(made_so @ Error::Malformed { .. }) => made_so,
            _ => damage,
        }
    }

    async fn once(&self, unit: &Unit) -> Result<(), Error> {
        match unit {
            Unit::Batches { blob, batches } => self.batches(*blob, batches).await,
            Unit::Streamed { blob, piece } => self.streamed(*blob, *piece).await,
            Unit::Whole { blob } => self.whole(*blob).await,
        }
    }

    async fn batches(&self, blob: usize, batches: &[Batch]) -> Result<(), Error> {
        let (Some(first), Some(last)) = (batches.first(), batches.last()) else {
            return Ok(());
        };
        let descriptor = &self.site.plan.blobs[blob].descriptor;
        let mut part = self.source.range(descriptor, first.range.start..last.range.end)?;
        let mut at = first.range.start;
        let mut rest = bytes::Bytes::new();
        let mut unpacking = Vec::new();
        for batch in batches {
            let length = usize::try_from(batch.range.end - batch.range.start).unwrap_or(usize::MAX);
            let kib = u32::try_from(length.div_ceil(1024).min(IN_FLIGHT_KIB)).unwrap_or(u32::MAX);
            let memory = Arc::clone(&self.memory).acquire_many_owned(kib).await;
            let mut packed = Vec::with_capacity(length);
            while packed.len() < length {
                if rest.is_empty() {
                    let Some(next) = part.next().await? else { break };
                    self.site.meter.add_fetched(descriptor, next.len());
                    rest = next;
                }
                let gap = usize::try_from(batch.range.start.saturating_sub(at)).unwrap_or(usize::MAX);
                let skipped = rest.split_to(gap.min(rest.len()));
                let taken = rest.split_to((length - packed.len()).min(rest.len()));
                packed.extend_from_slice(&taken);
                at += (skipped.len() + taken.len()) as u64;
            }
            let unpacker = Arc::clone(&self.unpackers).acquire_owned().await;
            let (site, pieces, begin) = (Arc::clone(&self.site), batch.pieces.clone(), batch.range.start);
            unpacking.push(tokio::spawn(blocking(move || {
                let _held_until_done = (memory, unpacker);
                site.unpack_batch(blob, &pieces, begin, &packed)
            })));
        }
        let mut result = Ok(());
        for batch in unpacking {
            let unpacked = match batch.await {
                Ok(unpacked) => unpacked,
                Err(failed) => match failed.try_into_panic() {
                    Ok(panic) => std::panic::resume_unwind(panic),
                    Err(_) => std::future::pending().await,
                },
            };
            // All are waited for; the worst counts: damage can be mended, a full disk cannot.
            if matches!(result, Ok(()) | Err(Error::Corrupt { .. })) && unpacked.is_err() {
                result = unpacked;
            }
        }
        result
    }

    async fn streamed(&self, blob: usize, index: usize) -> Result<(), Error> {
        let planned = &self.site.plan.blobs[blob];
        let piece = planned.pieces[index].clone();
        let (sender, reader) = relay(PIECES_IN_FLIGHT);
        let site = Arc::clone(&self.site);
        let range = piece.packed.clone();
        let unpacking = blocking(move || {
            let mut packed = Metered {
                inner: reader,
                layer: &site.plan.blobs[blob].descriptor,
                meter: &site.meter,
                cancelled: &site.cancelled,
            };
            let unpacked = site.unpack_piece(&piece, &mut packed);
            if unpacked.is_ok() {
                site.done.add(blob, &[index], piece.length);
            }
            unpacked.map_err(|failed| site.corrupt(&site.plan.blobs[blob].descriptor.digest, &piece, failed))
        });
        let feeding = self.source.feed(&planned.descriptor, range, sender);
        let (fed, unpacked) = tokio::join!(feeding, unpacking);
        fed.and(unpacked)
    }

    async fn whole(&self, blob: usize) -> Result<(), Error> {
        let site = Arc::clone(&self.site);
        let descriptor = &self.site.plan.blobs[blob].descriptor;
        let work = move |packed: &mut dyn Read| {
            let pieces = &site.plan.blobs[blob].pieces;
            let mut at = 0;
            for piece in pieces {
                let unreadable = |error: io::Error| Error::Malformed {
                    image: site.image.clone(),
                    reason: format!("a layer ends before its content does ({error})"),
                };
                let gap = piece.packed.start - at;
                io::copy(&mut packed.take(gap), &mut io::sink()).map_err(unreadable)?;
                let mut own = packed.take(piece.packed.end - piece.packed.start);
                site.unpack_piece(piece, &mut own).map_err(|failed| {
                    site.malformed(&site.plan.blobs[blob].descriptor.digest, piece, failed)
                })?;
                io::copy(&mut own, &mut io::sink()).map_err(unreadable)?;
                at = piece.packed.end;
            }
            Ok(site)
        };
        let site = self
            .source
            .verified(std::slice::from_ref(descriptor), &self.site.meter, work)
            .await?;
        let pieces: Vec<usize> = (0..site.plan.blobs[blob].pieces.len()).collect();
        let bytes = site.plan.blobs[blob]
            .pieces
            .iter()
            .map(|piece| piece.length)
            .sum();
        site.done.add(blob, &pieces, bytes);
        Ok(())
    }
}

/// Counts packed bytes.
struct Metered<'a, R> {
    inner: R,
    layer: &'a Descriptor,
    meter: &'a Meter,
    cancelled: &'a AtomicBool,
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        CancelledOnDrop::check(self.cancelled)?;
        let count = self.inner.read(buffer)?;
        self.meter.add_fetched(self.layer, count);
        Ok(count)
    }
}

#[cfg(test)]
mod tests;
