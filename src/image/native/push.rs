//! Hands what the writer makes to a registry or a layout folder, while it makes the next.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot};

use super::base::{Base, Known};
use super::writer::{self, Files, Options, Outlet, Written};
use crate::image::destination::Destination;
use crate::image::error::Error;
use crate::image::fetch::progress::Meter;
use crate::image::fetch::source::Source;
use crate::image::manifest::{Descriptor, Manifest};

/// Packs on their way at once. Each is in memory, beside the one that is being filled.
const UPLOADS: usize = 2;

/// What becomes an image, and how.
pub(in crate::image) struct Order {
    /// The disk, and where they are the kernel and the initial RAM disk.
    pub(in crate::image) files: Files,
    /// What an earlier image brings: [`read_base`].
    pub(in crate::image) base: Known,
    /// The base's repository, where it is another one of the same registry.
    pub(in crate::image) base_repository: Option<String>,
    /// zstd's level.
    pub(in crate::image) level: i32,
    /// A folder for a file of 64 bytes a chunk that is removed again.
    pub(in crate::image) scratch: PathBuf,
    /// Counts the unpacked bytes.
    pub(in crate::image) meter: Arc<Meter>,
}

/// Reads the index of an image whose packs may be referred to.
///
/// # Errors
/// What the source says, and [`Error::Malformed`].
pub(in crate::image) async fn read_base(
    source: &Source,
    manifest: &Manifest,
    image: &str,
) -> Result<Known, Error> {
    let malformed = |reason| Error::Malformed {
        image: image.to_owned(),
        reason,
    };
    let mut base = Base::new(manifest).map_err(malformed)?;
    for segment in base.segments().to_vec() {
        let bytes = source.config(&segment).await?;
        base.next(&bytes).map_err(malformed)?;
    }
    base.finish().map_err(malformed)
}

/// Writes packs and index. The manifest, which makes an image of them, is the caller's to write.
///
/// # Errors
/// What the destination says, and [`Error::Storage`] for files that cannot be read.
pub(in crate::image) async fn push(order: Order, destination: &Destination) -> Result<Written, Error> {
    let (sender, mut receiver) = mpsc::channel(1);
    let repository = order.base_repository.clone();
    let scratch = order.scratch.clone();
    let thread = tokio::task::spawn_blocking(move || {
        let mut order = order;
        let options = Options {
            level: order.level,
            scratch: &order.scratch,
            meter: order.meter,
        };
        writer::write(&mut order.files, &order.base, &mut Asked { sender }, &options)
    });
    let served = serve(&mut receiver, destination, repository.as_deref()).await;
    // The thread ends at its next question when nobody answers any more.
    drop(receiver);
    let written = match thread.await {
        Ok(written) => written,
        Err(ended) => match ended.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => Err(Error::storage(scratch)(std::io::Error::other(error))),
        },
    };
    served.and(written)
}

/// What the writing thread asks for.
enum Asking {
    Has(Descriptor, oneshot::Sender<bool>),
    Put(Descriptor, Bytes),
}

struct Asked {
    sender: mpsc::Sender<Asking>,
}

impl Asked {
    fn ask(&self, asking: Asking) -> Result<(), Error> {
        self.sender.blocking_send(asking).map_err(|_| nobody_answers())
    }
}

/// Never seen: whoever stopped answering has the true error.
fn nobody_answers() -> Error {
    Error::storage("the destination")(std::io::ErrorKind::BrokenPipe.into())
}

impl Outlet for Asked {
    fn has(&mut self, blob: &Descriptor) -> Result<bool, Error> {
        let (sender, answer) = oneshot::channel();
        self.ask(Asking::Has(blob.clone(), sender))?;
        answer.blocking_recv().map_err(|_| nobody_answers())
    }

    fn put(&mut self, blob: &Descriptor, bytes: Vec<u8>) -> Result<(), Error> {
        self.ask(Asking::Put(blob.clone(), bytes.into()))
    }
}

async fn serve(
    receiver: &mut mpsc::Receiver<Asking>,
    destination: &Destination,
    repository: Option<&str>,
) -> Result<(), Error> {
    let mut uploads = FuturesUnordered::new();
    loop {
        let asking = tokio::select! {
            Some(done) = uploads.next(), if !uploads.is_empty() => {
                let () = done?;
                continue;
            }
            asking = receiver.recv(), if uploads.len() < UPLOADS => asking,
        };
        match asking {
            Some(Asking::Has(blob, answer)) => {
                // The thread may have ended by a panic.
                let _ = answer.send(is_there(&blob, destination, repository).await?);
            }
            Some(Asking::Put(blob, bytes)) => {
                uploads.push(async move { destination.upload(&blob.digest, bytes).await });
            }
            None => break,
        }
    }
    while let Some(done) = uploads.next().await {
        done?;
    }
    Ok(())
}

async fn is_there(
    blob: &Descriptor,
    destination: &Destination,
    repository: Option<&str>,
) -> Result<bool, Error> {
    if destination.has_blob(&blob.digest).await? == Some(blob.size) {
        return Ok(true);
    }
    match repository {
        Some(repository) => destination.mount(&blob.digest, repository).await,
        None => Ok(false),
    }
}
