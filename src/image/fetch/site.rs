//! Where pieces become files: what all threads of one pull share, and what each of them does with the bytes that it is given.

use std::any::Any;
use std::cell::RefCell;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};

use super::batch;
use super::codec::{self, Unpacker};
use super::done::Done;
use super::part::{CancelledOnDrop, blocking};
use super::pieces::Known;
use super::placed::PlacedFile;
use super::progress::Meter;
use super::room::Room;
use crate::image::digest::{Digest, Hasher};
use crate::image::error::Error;
use crate::image::format::Workplace;
use crate::image::plan::{Piece, Pieces};

/// Bytes that are written to a file at once: no more than a processor has near by, for they have just been unpacked.
const RUN: usize = 1 << 20;

/// Pieces that one thread looks for on this host at once.
const LOOKUPS: usize = 256;

/// How many threads have something to do on all processors.
pub(super) fn processors() -> usize {
    std::thread::available_parallelism().map_or(2, |count| count.get().clamp(2, 8))
}

/// How many threads unpack at once. A file takes what one of them writes at a time, and some wait for that.
pub(super) fn unpackers() -> usize {
    processors() + 2
}

/// What all threads share.
pub(super) struct Site {
    pub(super) plan: Arc<Pieces>,
    files: Vec<PlacedFile>,
    pub(super) done: Done,
    pub(super) image: String,
    pub(super) meter: Arc<Meter>,
    /// Nobody waits for the pull any more.
    pub(super) cancelled: Arc<AtomicBool>,
    _held: Arc<dyn Any + Send + Sync>,
}

/// Why a piece did not become what it should.
pub(super) enum Failed {
    /// Its bytes; why they are no good.
    Bytes(String),
    Ours(Error),
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Ours(error)
    }
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self::Bytes(match error.kind() {
            io::ErrorKind::UnexpectedEof => "ends too early".to_owned(),
            _ => format!("cannot be unpacked ({error})"),
        })
    }
}

/// What one thread needs again and again.
struct Bench {
    unpacker: Unpacker,
    /// Unpacked bytes that belong behind each other in one file.
    run: Vec<u8>,
}

thread_local! {
    static BENCH: RefCell<Option<Bench>> = const { RefCell::new(None) };
}

impl Site {
    pub(super) fn open(
        plan: Arc<Pieces>,
        place: &Workplace,
        cancelled: Arc<AtomicBool>,
        held: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self, Error> {
        let image = place.image.clone();
        if let Err(reason) = plan.check() {
            return Err(Error::Malformed { image, reason });
        }
        let mut files = Vec::with_capacity(plan.files.len());
        for file in &plan.files {
            if file.length > place.limits.max_disk {
                return Err(Error::TooLarge {
                    image,
                    what: "disk",
                    size: file.length,
                    limit: place.limits.max_disk,
                });
            }
            let room = Room::new(&place.image, &place.dir, place.limits.keep_free);
            let path = place.dir.join(file.name);
            files.push(PlacedFile::open(
                &path,
                file.length,
                room,
                Arc::clone(&place.meter),
            )?);
        }
        Ok(Self {
            done: Done::open(&place.dir, &plan)?,
            files,
            image,
            meter: Arc::clone(&place.meter),
            plan,
            cancelled,
            _held: held,
        })
    }

    /// Packed bytes of the pieces that are here.
    pub(super) fn packed_here(&self) -> u64 {
        let blobs = self.plan.blobs.iter().enumerate();
        let pieces = blobs.flat_map(|(number, blob)| {
            let pieces = blob.pieces.iter().enumerate();
            pieces.map(move |(index, piece)| (number, index, piece))
        });
        pieces
            .filter(|&(blob, index, _)| self.done.has(blob, index))
            .map(|(_, _, piece)| piece.packed.end - piece.packed.start)
            .sum()
    }

    /// Writes down what is done.
    pub(super) fn note(&self) -> Result<(), Error> {
        self.done.write()
    }

    /// Takes from this host's other images what they have.
    pub(super) async fn reuse(self: &Arc<Self>, known: Arc<dyn Known>) -> Result<(), Error> {
        let mut missing = Vec::new();
        for (number, blob) in self.plan.blobs.iter().enumerate() {
            // A blob that is verified as a whole is fetched as a whole.
            if blob.pieces.iter().all(|piece| piece.digest.is_some()) {
                let pieces = 0..blob.pieces.len();
                missing.extend(
                    pieces
                        .filter(|&piece| !self.done.has(number, piece))
                        .map(|piece| (number, piece)),
                );
            }
        }
        let lookups: Vec<Vec<(usize, usize)>> = missing.chunks(LOOKUPS).map(<[_]>::to_vec).collect();
        stream::iter(lookups)
            .map(|pieces| {
                let (site, known) = (Arc::clone(self), Arc::clone(&known));
                blocking(move || site.copy(&pieces, &*known))
            })
            .buffer_unordered(processors())
            .try_collect()
            .await
    }

    /// Copies pieces that are known; one that is not what it should be is fetched like any other.
    fn copy(&self, pieces: &[(usize, usize)], known: &dyn Known) -> Result<(), Error> {
        let mut open: Option<(PathBuf, File)> = None;
        let mut bytes = Vec::new();
        for &(blob, index) in pieces {
            self.check()?;
            let piece = &self.plan.blobs[blob].pieces[index];
            let Some(digest) = piece.digest.filter(|_| !batch::is_large(piece)) else {
                continue;
            };
            let Some((path, at)) = known.find(&digest, piece.length) else {
                continue;
            };
            if open.as_ref().is_none_or(|(other, _)| *other != path) {
                open = File::open(&path).ok().map(|file| (path, file));
            }
            let Some((_, file)) = &open else { continue };
            bytes.resize(usize::try_from(piece.length).unwrap_or_default(), 0);
            if file.read_exact_at(&mut bytes, at).is_ok() && Digest::of(&bytes) == digest {
                self.files[piece.file].write(&bytes, piece.at)?;
                self.done.add(blob, &[index], piece.length);
            }
        }
        Ok(())
    }

    /// Unpacks, verifies and writes pieces whose packed bytes begin at `begin` of their blob.
    pub(super) fn unpack_batch(
        &self,
        blob: usize,
        pieces: &[usize],
        begin: u64,
        packed: &[u8],
    ) -> Result<(), Error> {
        BENCH.with_borrow_mut(|bench| {
            let bench = match bench {
                Some(bench) => bench,
                none => none.insert(Bench {
                    unpacker: unpacker()?,
                    run: Vec::new(),
                }),
            };
            self.unpack_runs(bench, blob, pieces, begin, packed)
        })
    }

    fn unpack_runs(
        &self,
        bench: &mut Bench,
        blob: usize,
        pieces: &[usize],
        begin: u64,
        packed: &[u8],
    ) -> Result<(), Error> {
        let planned = &self.plan.blobs[blob];
        let mut run: &[usize] = &[];
        let mut filled = 0;
        let mut damage = None;
        for (number, &index) in pieces.iter().enumerate() {
            // As many pieces as somebody likes may be of one frame, and so of one batch.
            self.check()?;
            let piece = &planned.pieces[index];
            let length = usize::try_from(piece.length).unwrap_or(usize::MAX);
            let follows = run.last().is_some_and(|&last| {
                let last = &planned.pieces[last];
                (last.file, last.at + last.length) == (piece.file, piece.at)
            });
            if !follows || filled + length > RUN {
                self.flush(blob, run, &bench.run[..filled])?;
                (run, filled) = (&[], 0);
            }
            if bench.run.len() < filled + length {
                bench.run.resize(filled + length, 0);
            }
            let to = &mut bench.run[filled..filled + length];
            let from = |at: u64| usize::try_from(at - begin).unwrap_or(usize::MAX);
            let own = packed.get(from(piece.packed.start)..from(piece.packed.end));
            let unpacked = own
                .ok_or_else(|| Failed::Bytes("is missing".to_owned()))
                .and_then(|own| Ok(bench.unpacker.unpack(piece.codec, own, to)?))
                .and_then(|()| match piece.digest {
                    Some(digest) if digest == Digest::of(to) => Ok(()),
                    _ => Err(other_digest()),
                });
            match unpacked {
                Ok(()) => {
                    let first = number - run.len();
                    run = &pieces[first..=number];
                    filled += length;
                }
                // The others are good all the same.
                Err(failed) => {
                    self.flush(blob, run, &bench.run[..filled])?;
                    (run, filled) = (&[], 0);
                    damage = Some(self.corrupt(&planned.descriptor.digest, piece, failed));
                }
            }
        }
        self.flush(blob, run, &bench.run[..filled])?;
        damage.map_or(Ok(()), Err)
    }

    /// Writes verified pieces that follow each other.
    fn flush(&self, blob: usize, pieces: &[usize], bytes: &[u8]) -> Result<(), Error> {
        let Some(&first) = pieces.first() else {
            return Ok(());
        };
        let first = &self.plan.blobs[blob].pieces[first];
        self.files[first.file].write(bytes, first.at)?;
        self.done.add(blob, pieces, bytes.len() as u64);
        Ok(())
    }

    /// Unpacks one piece while it arrives.
    pub(super) fn unpack_piece(&self, piece: &Piece, packed: &mut dyn Read) -> Result<(), Failed> {
        let file = &self.files[piece.file];
        // An earlier try may have left bytes here that were never verified.
        file.clear(piece.at, piece.length)?;
        unpack_while_it_arrives(piece, packed, |bytes, at| {
            self.check()?;
            Ok(file.write(bytes, piece.at + at)?)
        })
    }

    /// The error of a thread for which nobody waits any more. Asked for every few MiB.
    fn check(&self) -> Result<(), Error> {
        CancelledOnDrop::check(&self.cancelled).map_err(Error::storage("the transfer"))
    }

    pub(super) fn corrupt(&self, layer: &Digest, piece: &Piece, failed: Failed) -> Error {
        match failed {
            Failed::Ours(error) => error,
            Failed::Bytes(reason) => Error::Corrupt {
                image: self.image.clone(),
                blob: Some(*layer),
                reason: format!("is no good: the piece at {} {reason}", piece.packed.start),
            },
        }
    }

    /// The piece is as it was made: its layer has the digest that it should have.
    pub(super) fn malformed(&self, layer: &Digest, piece: &Piece, failed: Failed) -> Error {
        match failed {
            Failed::Ours(error) => error,
            Failed::Bytes(reason) => Error::Malformed {
                image: self.image.clone(),
                reason: format!(
                    "the piece at {} of the layer {layer} {reason}, and the layer is as it was pushed",
                    piece.packed.start
                ),
            },
        }
    }
}

impl fmt::Debug for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Site")
            .field("image", &self.image)
            .finish_non_exhaustive()
    }
}

fn unpacker() -> Result<Unpacker, Error> {
    Unpacker::new().map_err(Error::storage("the zstd decoder"))
}

/// Unpacks a piece and verifies it, without writing anything: in memory or while it arrives, as it is fetched.
pub(super) fn examine(piece: &Piece, packed: &mut dyn Read) -> Result<(), Failed> {
    if batch::is_large(piece) {
        return unpack_while_it_arrives(piece, packed, |_, _| Ok(()));
    }
    let mut own = Vec::new();
    packed.read_to_end(&mut own)?;
    let mut unpacked = vec![0; usize::try_from(piece.length).unwrap_or_default()];
    unpacker()?.unpack(piece.codec, &own, &mut unpacked)?;
    match piece.digest {
        Some(digest) if digest != Digest::of(&unpacked) => Err(other_digest()),
        _ => Ok(()),
    }
}

/// Unpacks a piece and hands its bytes on, with where in the piece they begin. They are verified when this returns well.
fn unpack_while_it_arrives(
    piece: &Piece,
    packed: &mut dyn Read,
    mut take: impl FnMut(&[u8], u64) -> Result<(), Failed>,
) -> Result<(), Failed> {
    let mut unpacked = codec::reader(piece.codec, packed)?;
    let mut hasher = piece.digest.map(|_| Hasher::default());
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    loop {
        let filled = fill(&mut unpacked, &mut buffer)?;
        if filled == 0 {
            break;
        }
        if at + filled as u64 > piece.length {
            return Err(Failed::Bytes("is longer than it should be".to_owned()));
        }
        if let Some(hasher) = &mut hasher {
            hasher.update(&buffer[..filled]);
        }
        take(&buffer[..filled], at)?;
        at += filled as u64;
    }
    if at != piece.length {
        return Err(Failed::Bytes("is shorter than it should be".to_owned()));
    }
    if hasher.map(Hasher::finish) != piece.digest {
        return Err(other_digest());
    }
    Ok(())
}

fn other_digest() -> Failed {
    Failed::Bytes("has another digest than it should have".to_owned())
}

/// Reads until the buffer is full or nothing comes any more.
fn fill(reader: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
