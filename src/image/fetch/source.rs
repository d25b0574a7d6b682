//! Where an image's bytes come from, and how they reach the thread that unpacks them.
//!
//! ```text
//! registry ── task on the runtime ──▶ channel ─┐
//!                                              ├─▶ Verified ─▶ decompress ─▶ … (a blocking thread)
//! layout folder ── file ───────────────────────┘
//! ```
//!
//! The channel is short, so a slow disk slows the network, and memory stays bounded.

use std::io::Read;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use tokio::sync::mpsc;

use super::beginning::Beginning;
use super::part::{CancelledOnDrop, Part, Piece, blocking, relay};
use super::progress::{Event, Meter, Progress, telling};
use super::verified::{Check, Position, Verified};
use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::layout::Layout;
use crate::image::manifest::Descriptor;
use crate::image::registry::{Session, Unanswered, WebFile};
use crate::image::single::LocalFile;

/// Largest manifest, index or config, in bytes: what registries allow, too.
pub(in crate::image) const DOCUMENT_MAX: u64 = 4 << 20;

/// Pieces on their way between network and disk. Each is what one read of the connection gave, at most some
/// hundred KiB.
pub(super) const PIECES_IN_FLIGHT: usize = 16;

/// Fewest and most bytes of a stream that are asked for together, and how many such parts are held in memory at once.
const PART_MIN: u64 = 2 << 20;
const PART_MAX: u64 = 8 << 20;
const PARTS_IN_FLIGHT: usize = 4;

/// About how long a part takes. Whoever interrupts a pull loses the parts that are under way; each costs the way to the registry
/// and back.
const PART_TIME: Duration = Duration::from_secs(1);

/// Most connections to a registry at once; it may want fewer.
const CONNECTIONS: usize = 6;

/// Where one image comes from.
#[derive(Debug)]
pub(in crate::image) struct Source {
    pub(in crate::image) kind: Kind,
    /// How the stream began that was sent last.
    beginning: Arc<Beginning>,
}

/// The kinds of places.
#[derive(Debug)]
pub(in crate::image) enum Kind {
    Registry(Box<Session>),
    Layout(Layout),
    /// A file of this host.
    File(LocalFile),
    /// A file on a web server.
    Web(Box<WebFile>),
}

impl From<Kind> for Source {
    fn from(kind: Kind) -> Self {
        Self {
            kind,
            beginning: Arc::default(),
        }
    }
}

impl Source {
    /// The registry or web server that is waited for, where that takes long.
    pub(in crate::image) fn unanswered(&self) -> Option<Unanswered> {
        match &self.kind {
            Kind::Registry(session) => session.unanswered(),
            Kind::Web(file) => file.session.unanswered(),
            Kind::Layout(_) | Kind::File(_) => None,
        }
    }

    /// The manifest or index that the reference itself names, and its digest.
    pub(in crate::image) async fn root(&self) -> Result<(Digest, Vec<u8>), Error> {
        match &self.kind {
            Kind::Registry(session) => session.root().await,
            Kind::Layout(layout) => layout.root(),
            Kind::File(file) => {
                let file = file.clone();
                blocking(move || file.root()).await
            }
            Kind::Web(file) => file.root().await,
        }
    }

    /// A manifest by digest.
    pub(in crate::image) async fn manifest(&self, descriptor: &Descriptor) -> Result<Vec<u8>, Error> {
        self.check_document(descriptor, "manifest")?;
        let bytes = match &self.kind {
            Kind::Registry(session) => session.manifest(&descriptor.digest).await?,
            Kind::Layout(layout) => layout.document(&descriptor.digest)?,
            Kind::File(_) | Kind::Web(_) => return Err(self.no_document()),
        };
        self.verify(descriptor, &bytes)?;
        Ok(bytes)
    }

    /// A small blob, whole.
    pub(in crate::image) async fn config(&self, descriptor: &Descriptor) -> Result<Vec<u8>, Error> {
        let bytes = self.document(descriptor).await?;
        self.verify(descriptor, &bytes)?;
        Ok(bytes)
    }

    /// The same, with any length: sardinecake counts the characters of a document, which are fewer than its bytes where a file's
    /// name is not in ASCII. The digest alone says what it is.
    pub(super) async fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, Error> {
        self.check_document(descriptor, "config")?;
        let bytes = match &self.kind {
            Kind::Registry(session) => session.document(descriptor).await?,
            Kind::Layout(layout) => layout.document(&descriptor.digest)?,
            Kind::File(_) | Kind::Web(_) => return Err(self.no_document()),
        };
        let found = Descriptor {
            size: bytes.len() as u64,
            ..descriptor.clone()
        };
        self.verify(&found, &bytes)?;
        Ok(bytes)
    }

    /// A single file has one manifest, which is ours and names no other document.
    fn no_document(&self) -> Error {
        Error::Malformed {
            image: self.image().to_owned(),
            reason: "a single file has no documents beside it".to_owned(),
        }
    }

    fn check_document(&self, descriptor: &Descriptor, what: &'static str) -> Result<(), Error> {
        if descriptor.size > DOCUMENT_MAX {
            let image = self.image().to_owned();
            return Err(Error::TooLarge {
                image,
                what,
                size: descriptor.size,
                limit: DOCUMENT_MAX,
            });
        }
        Ok(())
    }

    fn verify(&self, descriptor: &Descriptor, bytes: &[u8]) -> Result<(), Error> {
        let found = Digest::of(bytes);
        if found != descriptor.digest || bytes.len() as u64 != descriptor.size {
            let reason = if bytes.len() as u64 == descriptor.size {
                format!("has the digest {found}")
            } else {
                format!("has {} bytes instead of {}", bytes.len(), descriptor.size)
            };
            return Err(Error::Corrupt {
                image: self.image().to_owned(),
                blob: Some(descriptor.digest),
                reason,
            });
        }
        Ok(())
    }

    /// What went wrong here, in the words that fit the kind of place.
    pub(super) fn told(&self, error: Error) -> Error {
        match (&self.kind, error) {
            (
                Kind::Layout(layout),
                Error::Corrupt {
                    blob: Some(blob),
                    reason,
                    ..
                },
            ) => layout.damaged(&blob, reason),
            (
                Kind::File(_),
                Error::Corrupt {
                    image,
                    blob: Some(_),
                    reason,
                },
            ) => Error::Changed { image, reason },
            (Kind::Web(file), error) => file.told(error),
            (_, error) => error,
        }
    }

    /// How many parts may be on their way at once.
    pub(super) fn width(&self) -> usize {
        match &self.kind {
            Kind::Registry(session) => session.width().clamp(1, CONNECTIONS),
            Kind::Web(file) => file.session.width().clamp(1, CONNECTIONS),
            Kind::Layout(_) | Kind::File(_) => 2,
        }
    }

    /// A part of a blob. What comes is not verified.
    pub(super) fn range(&self, descriptor: &Descriptor, range: Range<u64>) -> Result<Part<'_>, Error> {
        Ok(match &self.kind {
            Kind::Registry(session) => Part::Registry(Box::new(session.range(descriptor, range))),
            Kind::Layout(layout) => Part::File {
                file: Arc::new(layout.open(descriptor)?),
                left: range,
                blob: descriptor.digest,
                image: layout.image(),
            },
            Kind::File(file) => Part::File {
                file: Arc::new(file.open(descriptor)?),
                left: range,
                blob: descriptor.digest,
                image: file.image(),
            },
            Kind::Web(file) => Part::Registry(Box::new(file.session.range(descriptor, range))),
        })
    }

    /// Sends a part of a blob to a thread. Ends early and well when it does not listen any more: then it knows why.
    pub(super) async fn feed(
        &self,
        descriptor: &Descriptor,
        range: Range<u64>,
        sink: mpsc::Sender<Piece>,
    ) -> Result<(), Error> {
        let mut part = self.range(descriptor, range)?;
        while let Some(bytes) = part.next().await? {
            if sink.send(Piece::Bytes(bytes)).await.is_err() {
                return Ok(());
            }
        }
        // A listener that is gone has what it wanted.
        drop(sink.send(Piece::End).await);
        Ok(())
    }

    /// Sends the bytes of blobs that follow each other, from `offset` on, in their order. They are fetched in parts, several at
    /// a time, so that neither a long way nor one slow connection counts. From a server that sends the whole for each part, what is
    /// left is fetched as one.
    pub(super) async fn feed_all(
        &self,
        blobs: &[Descriptor],
        offset: u64,
        meter: &Meter,
        sink: mpsc::Sender<Piece>,
    ) -> Result<(), Error> {
        let width = self.width().min(PARTS_IN_FLIGHT);
        let share = Share::default();
        let parts = stream::iter(divided(blobs, offset, || share.next()))
            .map(|(blob, range)| self.collect(&blobs[blob], range, meter, &share));
        let mut parts = parts.buffered(width);
        let mut at = offset;
        self.beginning.begin(offset);
        while let Some(Some(part)) = parts.try_next().await? {
            for bytes in part {
                at += bytes.len() as u64;
                self.beginning.add(&bytes);
                if sink.send(Piece::Bytes(bytes)).await.is_err() {
                    return Ok(());
                }
            }
        }
        // With them their connections go.
        drop(parts);
        for (blob, range) in divided(blobs, at, || u64::MAX) {
            let mut part = self.range(&blobs[blob], range)?;
            while let Some(bytes) = part.next().await? {
                meter.add_fetched(&blobs[blob], bytes.len());
                self.beginning.add(&bytes);
                if sink.send(Piece::Bytes(bytes)).await.is_err() {
                    return Ok(());
                }
            }
        }
        drop(sink.send(Piece::End).await);
        Ok(())
    }

    /// How the stream began that was sent last. What it holds is verified when the stream is.
    pub(super) fn beginning(&self) -> Arc<Beginning> {
        Arc::clone(&self.beginning)
    }

    /// A part of a blob, whole; none where the server would send more than the part.
    async fn collect(
        &self,
        blob: &Descriptor,
        range: Range<u64>,
        meter: &Meter,
        share: &Share,
    ) -> Result<Option<Vec<Bytes>>, Error> {
        let (begin, length) = (Instant::now(), range.end - range.start);
        let mut part = self.range(blob, range)?;
        let mut pieces = Vec::new();
        while !self.ignores_ranges() {
            match part.next().await? {
                Some(bytes) => {
                    // Counted as it comes: on a slow link a part takes its time.
                    meter.add_fetched(blob, bytes.len());
                    pieces.push(bytes);
                }
                None => {
                    share.came(length, begin.elapsed());
                    return Ok(Some(pieces));
                }
            }
        }
        Ok(None)
    }

    /// Does it send the whole of a blob where a part is asked for?
    fn ignores_ranges(&self) -> bool {
        match &self.kind {
            Kind::Registry(session) => session.ignores_ranges(),
            Kind::Web(file) => file.session.ignores_ranges(),
            Kind::Layout(_) | Kind::File(_) => false,
        }
    }

    /// Runs `work` on a thread of its own over the bytes of blobs that follow each other. What it returns is handed on only after
    /// all bytes were seen to have the descriptors' sizes and digests.
    pub(super) async fn verified<T, F>(
        &self,
        blobs: &[Descriptor],
        meter: &Arc<Meter>,
        work: F,
    ) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&mut dyn Read) -> Result<T, Error> + Send + 'static,
    {
        let (sender, reader) = relay(PIECES_IN_FLIGHT);
        let worker = self.work(blobs, meter, reader, work);
        let feed = self.feed_all(blobs, 0, meter, sender);
        let (fed, worked) = tokio::join!(feed, worker);
        // Without its bytes the worker could only fail; why they did not come is the reason.
        fed.and(worked)
    }

    async fn work<T, F>(
        &self,
        blobs: &[Descriptor],
        meter: &Arc<Meter>,
        reader: impl Read + Send + 'static,
        work: F,
    ) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&mut dyn Read) -> Result<T, Error> + Send + 'static,
    {
        let image = self.image().to_owned();
        let blobs = blobs.to_vec();
        let meter = Arc::clone(meter);
        let cancelled = CancelledOnDrop::default();
        let flag = Arc::clone(&cancelled.0);
        blocking(move || {
            let check = Check::new(&blobs, Position::default(), &meter, &image);
            let mut verified = Verified::new(reader, check, &flag);
            let result = work(&mut verified);
            match result {
                // Bytes that make no sense may simply have been damaged on their way: that is for the digest
                // to say, and it is another person's fault.
                Err(error @ Error::Malformed { .. }) => {
                    verified.finish()?;
                    Err(error)
                }
                Err(error) => Err(error),
                Ok(value) => verified.finish().map(|()| value),
            }
        })
        .await
    }

    pub(super) fn image(&self) -> &str {
        match &self.kind {
            Kind::Registry(session) => session.image(),
            Kind::Layout(layout) => layout.image(),
            Kind::File(file) => file.image(),
            Kind::Web(file) => file.session.image(),
        }
    }
}

/// How large the next part of a stream is: what one connection brings in [`PART_TIME`].
struct Share(AtomicU64);

impl Default for Share {
    fn default() -> Self {
        Self(AtomicU64::new(PART_MIN))
    }
}

impl Share {
    fn next(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// A part has come.
    fn came(&self, bytes: u64, took: Duration) {
        let per_second = u128::from(bytes) * PART_TIME.as_micros() / took.as_micros().max(1);
        let next = u64::try_from(per_second).unwrap_or(u64::MAX);
        self.0.store(next.clamp(PART_MIN, PART_MAX), Ordering::Relaxed);
    }
}

/// Divides blobs that follow each other, from an offset on, into parts: which blob, and which bytes of it. `most` is asked for the
/// largest size of each as they go.
fn divided(
    blobs: &[Descriptor],
    offset: u64,
    most: impl Fn() -> u64 + Copy,
) -> impl Iterator<Item = (usize, Range<u64>)> {
    let mut skipped = offset;
    blobs.iter().enumerate().flat_map(move |(number, blob)| {
        let (begin, size) = (skipped.min(blob.size), blob.size);
        skipped -= begin;
        // One after the other: a stranger's size may make for more of them than there is memory.
        let from = move |begin: u64| (begin < size).then(|| begin..begin.saturating_add(most()).min(size));
        let ranges = std::iter::successors(from(begin), move |last| from(last.end));
        ranges.map(move |range| (number, range))
    })
}

/// Tells how far a transfer is for as long as it lasts.
pub(in crate::image) async fn told<T>(
    progress: &dyn Progress,
    meter: &Meter,
    total: u64,
    transfer: impl Future<Output = T>,
) -> T {
    let tell = || {
        // What is fetched once more was counted already.
        let done = meter.done().min(total);
        progress.event(Event::Fetching { done, total });
        meter.tell_layers(progress);
        let written = meter.unpacked();
        progress.event(Event::Unpacking { written });
    };
    let result = telling(&tell, transfer).await;
    tell();
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_asked_for_in_parts_from_where_it_was_cut() {
        let blob = |size| Descriptor {
            media_type: String::new(),
            digest: Digest::of(b""),
            size,
            annotations: std::collections::BTreeMap::new(),
        };
        let blobs = [blob(PART_MAX + 5), blob(0), blob(7)];
        let parts = |offset| divided(&blobs, offset, || PART_MAX).collect::<Vec<_>>();
        assert_eq!(
            parts(0),
            [(0, 0..PART_MAX), (0, PART_MAX..PART_MAX + 5), (2, 0..7)]
        );
        assert_eq!(parts(PART_MAX + 1), [(0, PART_MAX + 1..PART_MAX + 5), (2, 0..7)]);
        assert_eq!(parts(PART_MAX + 6), [(2, 1..7)]);
        assert_eq!(parts(PART_MAX + 12), []);
    }

    #[test]
    fn a_part_takes_about_a_second() {
        let share = Share::default();
        assert_eq!(share.next(), PART_MIN);
        for (bytes, milliseconds, next) in [
            (PART_MIN, 10, PART_MAX),
            (PART_MAX, 2000, PART_MAX / 2),
            (PART_MAX / 2, 1000, PART_MAX / 2),
            (PART_MIN, 60_000, PART_MIN),
            (PART_MIN, 0, PART_MAX),
        ] {
            share.came(bytes, Duration::from_millis(milliseconds));
            assert_eq!(share.next(), next, "{bytes} in {milliseconds} ms");
        }
    }
}
