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

    /// Runs `work` on a thread of its own over a layer's bytes, and tells how far it is.
    pub(in crate::image) async fn layer<T, F>(
        &self,
        descriptor: &Descriptor,
        total: u64,
        meter: &Arc<Meter>,
        progress: &dyn Progress,
        work: F,
    ) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&mut dyn Read) -> Result<T, Error> + Send + 'static,
    {
        told(progress, meter, total, self.verified(descriptor, meter, work)).await
    }

    /// Runs `work` on a thread of its own over a layer's bytes. What it returns is handed on only after all
    /// bytes were seen to have the descriptor's size and digest.
    pub(super) async fn verified<T, F>(
        &self,
        descriptor: &Descriptor,
        meter: &Arc<Meter>,
        work: F,
    ) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&mut dyn Read) -> Result<T, Error> + Send + 'static,
    {
        let (sender, reader) = relay(PIECES_IN_FLIGHT);
        let worker = self.work(descriptor, meter, reader, work);
        let fed = self.feed(descriptor, 0..descriptor.size, sender);
        let (fed, worked) = tokio::join!(fed, worker);
        // Without its bytes the worker could only fail; why they did not come is the reason.
        fed.and(worked)
    }

    async fn work<T, F>(
        &self,
        descriptor: &Descriptor,
        meter: &Arc<Meter>,
        reader: impl Read + Send + 'static,
        work: F,
    ) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&mut dyn Read) -> Result<T, Error> + Send + 'static,
    {
        let image = self.image().to_owned();
        let descriptor = descriptor.clone();
        let meter = Arc::clone(meter);
        let cancelled = CancelledOnDrop::default();
        let flag = Arc::clone(&cancelled.0);
        blocking(move || {
            let mut verified = Verified {
                inner: reader,
                meter: &meter,
                cancelled: &flag,
                hasher: Hasher::default(),
                count: 0,
                size: descriptor.size,
            };
            let result = work(&mut verified);
            match result {
                // Bytes that make no sense may simply have been damaged on their way: that is for the digest
                // to say, and it is another person's fault.
                Err(error @ Error::Malformed { .. }) => {
                    verified.finish(&descriptor, &image)?;
                    Err(error)
                }
                Err(error) => Err(error),
                Ok(value) => verified.finish(&descriptor, &image).map(|()| value),
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

/// Counts and hashes packed bytes.
struct Verified<'a, R> {
    inner: R,
    meter: &'a Meter,
    cancelled: &'a AtomicBool,
    hasher: Hasher,
    count: u64,
    size: u64,
}

impl<R: Read> Read for Verified<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        CancelledOnDrop::check(self.cancelled)?;
        let count = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        self.count += count as u64;
        self.meter.add_fetched(count);
        if self.count > self.size {
            return Err(io::Error::other("there are more bytes than announced"));
        }
        Ok(count)
    }
}

impl<R: Read> Verified<'_, R> {
    /// Reads what is left and compares.
    fn finish(mut self, descriptor: &Descriptor, image: &str) -> Result<(), Error> {
        let corrupt = |reason| Error::Corrupt {
            image: image.to_owned(),
            reason,
        };
        // Never more than a byte beyond what was announced.
        if let Err(error) = io::copy(&mut self, &mut io::sink()) {
            return Err(corrupt(format!(
                "the layer {} cannot be read to its end ({error})",
                descriptor.digest
            )));
        }
        if self.count != self.size {
            let reason = format!(
                "the layer {} has {} bytes instead of {}",
                descriptor.digest, self.count, self.size
            );
            return Err(corrupt(reason));
        }
        let found = self.hasher.finish();
        if found != descriptor.digest {
            return Err(corrupt(format!(
                "the layer {} has the digest {found}",
                descriptor.digest
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_and_digest_are_both_checked() {
        let (meter, cancelled) = (Meter::default(), AtomicBool::new(false));
        let finish = |bytes: &'static [u8], size: u64, digest: Digest| {
            let descriptor = Descriptor {
                media_type: String::new(),
                digest,
                size,
                annotations: std::collections::BTreeMap::new(),
            };
            let hasher = Hasher::default();
            Verified {
                inner: bytes,
                meter: &meter,
                cancelled: &cancelled,
                hasher,
                count: 0,
                size,
            }
            .finish(&descriptor, "vm")
        };
        let digest = Digest::of(b"bytes");
        assert!(finish(b"bytes", 5, digest).is_ok());
        for (bytes, size) in [(&b"bytes"[..], 4), (b"bytes", 6), (b"bytez", 5), (b"", 5)] {
            assert!(
                matches!(finish(bytes, size, digest), Err(Error::Corrupt { .. })),
                "{bytes:?} {size}"
            );
        }
    }
}
