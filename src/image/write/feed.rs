//! From a thread that makes bytes to a destination that takes them.
//!
//! ```text
//! blocking thread: read, hash, pack ── short channel ──▶ this task: hash, send
//! ```
//!
//! The channel is short, so a slow network slows the reading, and memory stays bounded.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinError;

use crate::image::destination::{Destination, Stream};
use crate::image::digest::{Digest, Hasher};
use crate::image::error::Error;
use crate::image::progress::{Event, Progress};

/// Pieces on their way between packing and network, each of [`PIECE`] bytes at most.
const PIECES_IN_FLIGHT: usize = 16;
const PIECE: usize = 512 << 10;

/// How often progress is told while bytes flow.
const TELL_EVERY: Duration = Duration::from_millis(250);

/// A blob that the destination has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Blob {
    pub(super) digest: Digest,
    /// Bytes.
    pub(super) size: u64,
}

/// What goes through the channel.
enum Piece {
    Bytes(Bytes),
    /// The next blob begins.
    Cut,
}

/// The sending end, for the thread.
pub(super) struct Outlet {
    sender: mpsc::Sender<Piece>,
    held: Vec<u8>,
}

impl Outlet {
    fn send(&mut self, piece: Piece) -> io::Result<()> {
        // Whoever received has failed or was given up; its reason is the one that counts.
        self.sender
            .blocking_send(piece)
            .map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    /// Ends the current blob; what follows is the next one.
    pub(super) fn cut(&mut self) -> io::Result<()> {
        self.flush()?;
        self.send(Piece::Cut)
    }
}

impl Write for Outlet {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let take = bytes.len().min(PIECE - self.held.len());
        self.held.extend_from_slice(&bytes[..take]);
        if self.held.len() == PIECE {
            self.flush()?;
        }
        Ok(take)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.held.is_empty() {
            return Ok(());
        }
        let full = std::mem::replace(&mut self.held, Vec::with_capacity(PIECE));
        self.send(Piece::Bytes(full.into()))
    }
}

/// How far the thread has read.
#[derive(Debug, Default)]
pub(super) struct Read(AtomicU64);

impl Read {
    pub(super) fn add(&self, bytes: usize) {
        self.0.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn so_far(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Runs `make` on a thread and sends what it writes as one blob, or more where it cuts. No blob is finished before the
/// thread has come to its good end. `total` is how much it is going to read, for the progress.
pub(super) async fn send<T, F>(
    destination: &Destination,
    read: &Arc<Read>,
    total: u64,
    progress: &dyn Progress,
    make: F,
) -> Result<(Vec<Blob>, T), Error>
where
    T: Send + 'static,
    F: FnOnce(&mut Outlet) -> Result<T, Error> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(PIECES_IN_FLIGHT);
    let thread = tokio::task::spawn_blocking(move || {
        let mut outlet = Outlet {
            sender,
            held: Vec::with_capacity(PIECE),
        };
        let made = make(&mut outlet)?;
        // The receiver is gone only when it has a better reason to fail.
        let _ = outlet.flush();
        Ok(made)
    });
    let work = async {
        let taken = take(destination, receiver).await;
        let made = thread.await.unwrap_or_else(|ended| unwound(ended, Path::new("")));
        let (mut blobs, open) = taken?;
        match made {
            Ok(made) => {
                blobs.push(open.finish().await?);
                Ok((blobs, made))
            }
            Err(error) => {
                open.stream.cancel().await;
                Err(error)
            }
        }
    };
    told(&|| read.so_far(), total, progress, work).await
}

/// Lets a panic of a thread go on; else the thread was never run.
pub(super) fn unwound<T>(ended: JoinError, path: &Path) -> Result<T, Error> {
    match ended.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(error) => Err(Error::storage(path)(io::Error::other(error))),
    }
}

/// Tells about `work` for as long as it takes; `read` are the bytes that it has read so far.
pub(super) async fn told<T>(
    read: &dyn Fn() -> u64,
    total: u64,
    progress: &dyn Progress,
    work: impl Future<Output = T>,
) -> T {
    let tell = || {
        progress.event(Event::Writing {
            done: read().min(total),
            total,
        });
    };
    tokio::pin!(work);
    let mut tick = tokio::time::interval(TELL_EVERY);
    loop {
        tokio::select! {
            result = &mut work => {
                tell();
                return result;
            }
            _ = tick.tick() => tell(),
        }
    }
}

/// A blob that is on its way.
struct Open {
    stream: Stream,
    hasher: Hasher,
    size: u64,
}

impl Open {
    async fn begin(destination: &Destination) -> Result<Self, Error> {
        Ok(Self {
            stream: destination.stream().await?,
            hasher: Hasher::default(),
            size: 0,
        })
    }

    async fn finish(self) -> Result<Blob, Error> {
        let digest = self.hasher.finish();
        self.stream.finish(&digest).await?;
        Ok(Blob {
            digest,
            size: self.size,
        })
    }
}

/// Sends everything; the last blob stays open.
async fn take(
    destination: &Destination,
    mut receiver: mpsc::Receiver<Piece>,
) -> Result<(Vec<Blob>, Open), Error> {
    let mut blobs = Vec::new();
    let mut open = Open::begin(destination).await?;
    while let Some(piece) = receiver.recv().await {
        match piece {
            Piece::Bytes(bytes) => {
                open.hasher.update(&bytes);
                open.size += bytes.len() as u64;
                open.stream.write(bytes).await?;
            }
            Piece::Cut => {
                blobs.push(open.finish().await?);
                open = Open::begin(destination).await?;
            }
        }
    }
    Ok((blobs, open))
}
