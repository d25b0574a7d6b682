//! Where an image's bytes come from, and how they reach the thread that unpacks them.
//!
//! ```text
//! registry ── task on the runtime ──▶ channel ─┐
//!                                              ├─▶ Verified ─▶ decompress ─▶ … (a blocking thread)
//! layout folder ── file ───────────────────────┘
//! ```
//!
//! The channel is short, so a slow disk slows the network, and memory stays bounded.

use std::io::{self, Read};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tokio::sync::mpsc;

use super::part::{CancelledOnDrop, Part, Piece, blocking, relay};
use super::progress::{Event, Meter, Progress};
use crate::image::digest::{Digest, Hasher};
use crate::image::error::Error;
use crate::image::layout::Layout;
use crate::image::manifest::Descriptor;
use crate::image::registry::Session;

/// Largest manifest, index or config, in bytes: what registries allow, too.
pub(in crate::image) const DOCUMENT_MAX: u64 = 4 << 20;

/// Pieces on their way between network and disk. Each is what one read of the connection gave, at most some
/// hundred KiB.
pub(super) const PIECES_IN_FLIGHT: usize = 16;

/// Connections to a registry at once.
const CONNECTIONS: usize = 6;

/// How often progress is told while bytes flow.
const TELL_EVERY: Duration = Duration::from_millis(250);

/// Where one image comes from.
#[derive(Debug)]
pub(in crate::image) enum Source {
    Registry(Box<Session>),
    Layout(Layout),
}

impl Source {
    /// The manifest or index that the reference itself names, and its digest.
    pub(in crate::image) async fn root(&self) -> Result<(Digest, Vec<u8>), Error> {
        match self {
            Self::Registry(session) => session.root().await,
            Self::Layout(layout) => layout.root(),
        }
    }

    /// A manifest by digest.
    pub(in crate::image) async fn manifest(&self, descriptor: &Descriptor) -> Result<Vec<u8>, Error> {
        self.check_document(descriptor, "manifest")?;
        let bytes = match self {
            Self::Registry(session) => session.manifest(&descriptor.digest).await?,
            Self::Layout(layout) => layout.document(&descriptor.digest)?,
        };
        self.verify(descriptor, &bytes, "its manifest")?;
        Ok(bytes)
    }

    /// A small blob, whole.
    pub(in crate::image) async fn config(&self, descriptor: &Descriptor) -> Result<Vec<u8>, Error> {
        self.check_document(descriptor, "config")?;
        let bytes = match self {
            Self::Registry(session) => session.document(descriptor).await?,
            Self::Layout(layout) => layout.document(&descriptor.digest)?,
        };
        self.verify(descriptor, &bytes, "its config")?;
        Ok(bytes)
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

    fn verify(&self, descriptor: &Descriptor, bytes: &[u8], what: &str) -> Result<(), Error> {
        let found = Digest::of(bytes);
        if found != descriptor.digest || bytes.len() as u64 != descriptor.size {
            let reason = format!(
                "{what} has {} bytes with the digest {found}, not {} with {}",
                bytes.len(),
                descriptor.size,
                descriptor.digest
            );
            return Err(Error::Corrupt {
                image: self.image().to_owned(),
                reason,
            });
        }
        Ok(())
    }

    /// How many parts may be on their way at once.
    pub(super) fn width(&self) -> usize {
        match self {
            Self::Registry(_) => CONNECTIONS,
            Self::Layout(_) => 2,
        }
    }

    /// A part of a blob. What comes is not verified.
    pub(super) fn range(&self, descriptor: &Descriptor, range: Range<u64>) -> Result<Part<'_>, Error> {
        Ok(match self {
            Self::Registry(session) => Part::Registry(Box::new(session.range(descriptor, range))),
            Self::Layout(layout) => Part::File {
                file: Arc::new(layout.open(descriptor)?),
                left: range,
                image: layout.image(),
            },
        })
    }

    /// Sends a part of a blob to a thread. Ends early and well when it does not listen any more: then it knows why.
    pub(super) async fn feed(
        &self,
        descriptor: &Descriptor,
        range: Range<u64>,
        sink: mpsc::Sender<Piece>,
    ) -> Result<(), Error> {
        self.send(descriptor, range, &sink).await?;
        // A listener that is gone has what it wanted.
        drop(sink.send(Piece::End).await);
        Ok(())
    }

    /// Sends a part of a blob; false when nobody listens any more.
    async fn send(
        &self,
        descriptor: &Descriptor,
        range: Range<u64>,
        sink: &mpsc::Sender<Piece>,
    ) -> Result<bool, Error> {
        let mut part = self.range(descriptor, range)?;
        while let Some(bytes) = part.next().await? {
            if sink.send(Piece::Bytes(bytes)).await.is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Runs `work` on a thread of its own over the bytes of blobs that follow each other, and tells how far it is.
    pub(in crate::image) async fn stream<T, F>(
        &self,
        blobs: &[Descriptor],
        total: u64,
        meter: &Arc<Meter>,
        progress: &dyn Progress,
        work: F,
    ) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&mut dyn Read) -> Result<T, Error> + Send + 'static,
    {
        told(progress, meter, total, self.verified(blobs, meter, work)).await
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
        // The sender goes with this future: without an end, the thread sees that it was cut.
        let feed = async move {
            for descriptor in blobs {
                if !self.send(descriptor, 0..descriptor.size, &sender).await? {
                    break;
                }
            }
            drop(sender.send(Piece::End).await);
            Ok(())
        };
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
            let mut verified = Verified::new(reader, blobs, &meter, &flag, &image);
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
        match self {
            Self::Registry(session) => session.image(),
            Self::Layout(layout) => layout.image(),
        }
    }
}

/// Tells how far a transfer is for as long as it lasts.
pub(super) async fn told<T>(
    progress: &dyn Progress,
    meter: &Meter,
    total: u64,
    transfer: impl Future<Output = T>,
) -> T {
    let tell = || {
        let done = meter.done();
        progress.event(Event::Fetching { done, total });
        let written = meter.unpacked();
        progress.event(Event::Unpacking { written });
    };
    tokio::pin!(transfer);
    let mut tick = tokio::time::interval(TELL_EVERY);
    loop {
        tokio::select! {
            result = &mut transfer => {
                tell();
                return result;
            }
            _ = tick.tick() => tell(),
        }
    }
}

/// Counts and hashes packed bytes, blob by blob.
struct Verified<'a, R> {
    inner: R,
    blobs: std::vec::IntoIter<Descriptor>,
    /// The blob that is being read; none after the last.
    blob: Option<Descriptor>,
    hasher: Hasher,
    /// Bytes of it that were read.
    count: u64,
    meter: &'a Meter,
    cancelled: &'a AtomicBool,
    image: &'a str,
}

impl<R: Read> Read for Verified<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        CancelledOnDrop::check(self.cancelled)?;
        self.pass().map_err(io::Error::other)?;
        let left = match &self.blob {
            Some(blob) => blob.size - self.count,
            None if self.inner.read(&mut [0])? > 0 => {
                return Err(io::Error::other(
                    self.corrupt("there are more bytes than announced".to_owned()),
                ));
            }
            None => return Ok(0),
        };
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let count = self.inner.read(&mut buffer[..most])?;
        self.hasher.update(&buffer[..count]);
        self.count += count as u64;
        self.meter.add_fetched(count);
        if let Some(blob) = self.blob.as_ref().filter(|_| count == 0 && most > 0) {
            let reason = format!(
                "the layer {} has {} bytes instead of {}",
                blob.digest, self.count, blob.size
            );
            return Err(io::Error::other(self.corrupt(reason)));
        }
        Ok(count)
    }
}

impl<'a, R: Read> Verified<'a, R> {
    fn new(
        inner: R,
        blobs: Vec<Descriptor>,
        meter: &'a Meter,
        cancelled: &'a AtomicBool,
        image: &'a str,
    ) -> Self {
        let mut blobs = blobs.into_iter();
        Self {
            inner,
            blob: blobs.next(),
            blobs,
            hasher: Hasher::default(),
            count: 0,
            meter,
            cancelled,
            image,
        }
    }

    /// Goes on to the blob that is to be read next, and checks those that it passes.
    fn pass(&mut self) -> Result<(), Error> {
        while let Some(blob) = self.blob.as_ref().filter(|blob| blob.size == self.count) {
            let found = std::mem::take(&mut self.hasher).finish();
            if found != blob.digest {
                let reason = format!("the layer {} has the digest {found}", blob.digest);
                return Err(self.corrupt(reason));
            }
            (self.blob, self.count) = (self.blobs.next(), 0);
        }
        Ok(())
    }

    /// Reads what is left and compares.
    fn finish(mut self) -> Result<(), Error> {
        let Err(error) = io::copy(&mut self, &mut io::sink()) else {
            return Ok(());
        };
        Err(error.downcast::<Error>().unwrap_or_else(|error| {
            let which = self
                .blob
                .as_ref()
                .map_or_else(String::new, |blob| format!(" {}", blob.digest));
            self.corrupt(format!("the layer{which} cannot be read to its end ({error})"))
        }))
    }

    fn corrupt(&self, reason: String) -> Error {
        Error::Corrupt {
            image: self.image.to_owned(),
            reason,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob(size: u64, digest: Digest) -> Descriptor {
        Descriptor {
            media_type: String::new(),
            digest,
            size,
            annotations: std::collections::BTreeMap::new(),
        }
    }

    /// Reads bytes that are announced as these blobs.
    fn verify(bytes: &[u8], blobs: &[(u64, Digest)]) -> Result<String, Error> {
        let blobs = blobs.iter().map(|&(size, digest)| blob(size, digest)).collect();
        let (meter, cancelled) = (Meter::default(), AtomicBool::new(false));
        let mut verified = Verified::new(bytes, blobs, &meter, &cancelled, "vm");
        let mut out = String::new();
        drop(verified.read_to_string(&mut out));
        verified.finish().map(|()| out)
    }

    #[test]
    fn size_and_digest_are_both_checked() {
        let digest = Digest::of(b"bytes");
        assert_eq!(verify(b"bytes", &[(5, digest)]).unwrap(), "bytes");
        for (bytes, size) in [(&b"bytes"[..], 4), (b"bytes", 6), (b"bytez", 5), (b"", 5)] {
            assert!(
                matches!(verify(bytes, &[(size, digest)]), Err(Error::Corrupt { .. })),
                "{bytes:?} {size}"
            );
        }
    }

    #[test]
    fn each_blob_of_a_stream_is_checked_by_itself() {
        let (one, none, two) = (Digest::of(b"one"), Digest::of(b""), Digest::of(b"three"));
        assert_eq!(
            verify(b"onethree", &[(3, one), (0, none), (5, two)]).unwrap(),
            "onethree"
        );
        for (bytes, blobs) in [
            (&b"onethree"[..], [(4, one), (4, two)]),
            (b"onethre", [(3, one), (5, two)]),
            (b"onethreee", [(3, one), (5, two)]),
            (b"onethree", [(3, two), (5, one)]),
        ] {
            let error = verify(bytes, &blobs).unwrap_err();
            assert!(matches!(error, Error::Corrupt { .. }), "{error}");
        }
    }
}
