//! A part of a blob on its way: from a source, through a task, to a thread that reads.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::registry::Ranged;

/// Bytes that are read from a file at once.
const FILE_BLOCK: u64 = 1 << 20;

/// A part of a blob. What comes is not verified.
pub(super) enum Part<'a> {
    Registry(Box<Ranged<'a>>),
    File {
        file: Arc<File>,
        left: Range<u64>,
        blob: Digest,
        image: &'a str,
    },
}

impl Part<'_> {
    /// The next bytes; none after the last. Exactly the bytes of the part come, or an error.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        let (file, left, blob, image) = match self {
            Self::Registry(ranged) => return ranged.next().await,
            Self::File {
                file,
                left,
                blob,
                image,
            } => (file, left, blob, image),
        };
        if left.is_empty() {
            return Ok(None);
        }
        let (at, length) = (left.start, (left.end - left.start).min(FILE_BLOCK));
        let reader = Arc::clone(file);
        let read = blocking(move || {
            let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
            reader.read_exact_at(&mut bytes, at).map(|()| bytes)
        });
        let bytes = read.await.map_err(|error| Error::Corrupt {
            image: (*image).to_owned(),
            blob: Some(*blob),
            reason: format!("cannot be read to its end ({error})"),
        })?;
        left.start += length;
        Ok(Some(bytes.into()))
    }
}

/// Runs `work` on a thread that may block. A panic goes on here.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(failed) => match failed.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Only a runtime that is shut down cancels, and then nobody waits here.
            Err(_) => std::future::pending().await,
        },
    }
}

/// A channel from a task to a thread that reads.
pub(super) fn relay(pieces: usize) -> (mpsc::Sender<Piece>, ChannelReader) {
    let (sender, receiver) = mpsc::channel(pieces);
    let reader = ChannelReader {
        receiver,
        piece: Bytes::new(),
        ended: false,
    };
    (sender, reader)
}

/// Tells a thread that nobody waits for it any more: dropping a future does not end the thread it waited for.
#[derive(Default)]
pub(super) struct CancelledOnDrop(pub(super) Arc<AtomicBool>);

impl Drop for CancelledOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl CancelledOnDrop {
    /// The error of a thread that was told.
    pub(super) fn check(flag: &AtomicBool) -> io::Result<()> {
        if flag.load(Ordering::Relaxed) {
            let reason = "the transfer was cancelled";
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, reason));
        }
        Ok(())
    }
}

/// One message on the way from the network to the unpacking thread.
pub(super) enum Piece {
    Bytes(Bytes),
    /// All bytes have been sent. A channel that closes without it was cut, and must not look like an end.
    End,
}

/// Reads what a task sends.
pub(super) struct ChannelReader {
    receiver: mpsc::Receiver<Piece>,
    /// What is left of the piece in hand.
    piece: Bytes,
    ended: bool,
}

impl ChannelReader {
    /// What came next, as it came; none behind the last.
    pub(super) fn piece(&mut self) -> io::Result<Option<Bytes>> {
        if !self.piece.is_empty() {
            return Ok(Some(std::mem::take(&mut self.piece)));
        }
        if self.ended {
            return Ok(None);
        }
        match self.receiver.blocking_recv() {
            Some(Piece::Bytes(bytes)) => Ok(Some(bytes)),
            Some(Piece::End) => {
                self.ended = true;
                Ok(None)
            }
            None => Err(cut()),
        }
    }
}

impl Read for ChannelReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.piece()? {
                Some(piece) => self.piece = piece,
                None => return Ok(0),
            }
        }
        let count = self.piece.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.piece.split_to(count));
        Ok(count)
    }
}

/// The error of a thread whose bytes end too early.
pub(super) fn cut() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the transfer was cut")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(pieces: Vec<Piece>) -> ChannelReader {
        let (sender, reader) = relay(pieces.len().max(1));
        for piece in pieces {
            sender.try_send(piece).ok().unwrap();
        }
        reader
    }

    #[test]
    fn pieces_become_one_stream() {
        let mut out = Vec::new();
        let pieces = vec![
            Piece::Bytes(Bytes::from_static(b"one")),
            Piece::Bytes(Bytes::new()),
            Piece::Bytes(Bytes::from_static(b"two")),
            Piece::End,
        ];
        reader(pieces).read_to_end(&mut out).unwrap();
        assert_eq!(out, b"onetwo");
    }

    #[test]
    fn a_cut_is_not_an_end() {
        let mut out = Vec::new();
        let error = reader(vec![Piece::Bytes(Bytes::from_static(b"one"))])
            .read_to_end(&mut out)
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
    }
}
