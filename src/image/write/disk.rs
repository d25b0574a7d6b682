//! The disk that is about to be written: a guest's bytes, or the file as it is.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::draft::Draft;
use super::feed::Read;
use super::qcow2;
use crate::image::error::Error;
use crate::image::inspect::DiskFormat;
use crate::image::view::{Guest, Raw};
use crate::record::Unnamed;

/// A piece that is read at a time, in bytes.
const PIECE: usize = 1 << 20;

/// Who may read a disk that was written: its owner.
const MODE: u32 = 0o600;

static ZEROS: [u8; PIECE] = [0; PIECE];

/// Writes all bytes of a file; holes are not read.
pub(super) fn copy(file: &Raw, read: &Read, out: &mut dyn Write) -> io::Result<()> {
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    while at < file.size() {
        let data = file.next_data(at..file.size())?;
        let data = data.unwrap_or(file.size()..file.size());
        while at < data.end {
            let hole = data.start.saturating_sub(at);
            let left = if hole > 0 { hole } else { data.end - at };
            let take = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
            let piece = if hole > 0 {
                &ZEROS[..take]
            } else {
                file.read(&mut buffer[..take], at)?;
                &buffer[..take]
            };
            out.write_all(piece)?;
            read.add(take);
            at += take as u64;
        }
    }
    Ok(())
}

/// The bytes of a disk's file, as an image carries them.
pub(super) enum Body {
    /// The file as it is.
    Is(Raw),
    /// A qcow2 that is made while it is read.
    Made(Box<dyn Guest + Send>, qcow2::Plan),
}

impl Body {
    /// The file as it is, where it stands alone; else a qcow2 of what a guest sees.
    pub(super) fn of(draft: &Draft) -> Result<Self, Error> {
        if draft.flattened {
            return Self::made(draft);
        }
        Raw::open(&draft.disk)
            .map(Self::Is)
            .map_err(Error::storage(&draft.disk))
    }

    /// A qcow2 in any case.
    pub(super) fn qcow2(draft: &Draft) -> Result<Self, Error> {
        match draft.format {
            DiskFormat::Qcow2 => Self::of(draft),
            DiskFormat::Raw => Self::made(draft),
        }
    }

    /// Looks through the disk once.
    fn made(draft: &Draft) -> Result<Self, Error> {
        let guest = draft.guest()?;
        let plan = qcow2::Plan::of(&*guest).map_err(Error::storage(&draft.disk))?;
        Ok(Self::Made(guest, plan))
    }

    /// What is written, in bytes.
    pub(super) fn length(&self) -> u64 {
        match self {
            Self::Is(file) => file.size(),
            Self::Made(_, plan) => plan.length(),
        }
    }

    pub(super) fn copy(&self, read: &Read, out: &mut dyn Write) -> io::Result<()> {
        match self {
            Self::Is(file) => copy(file, read, out),
            Self::Made(guest, plan) => {
                let mut told = Told {
                    inner: out,
                    each: &mut added(read),
                };
                plan.write(&**guest, &mut told)
            }
        }
    }
}

/// Told how many bytes were used since it was last told; its error ends the writing.
type Each<'a> = dyn FnMut(usize) -> io::Result<()> + 'a;

fn added(read: &Read) -> impl FnMut(usize) -> io::Result<()> + '_ {
    |count| {
        read.add(count);
        Ok(())
    }
}

/// Tells what passes through.
struct Told<'a> {
    inner: &'a mut dyn Write,
    each: &'a mut Each<'a>,
}

impl Write for Told<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        (self.each)(written)?;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Writes the disk into a file that has no name yet; it is to get one in `dir`.
pub(super) fn make(draft: &Draft, format: DiskFormat, dir: &Path, read: &Read) -> Result<Unnamed, Error> {
    let written = |fill: &dyn Fn(&File) -> io::Result<()>| {
        let unnamed = Unnamed::begin(dir, MODE)?;
        fill(unnamed.file())?;
        // Before anybody waits for the name.
        unnamed.file().sync_all()?;
        Ok(unnamed)
    };
    let made = match format {
        DiskFormat::Qcow2 => {
            let body = Body::qcow2(draft)?;
            written(&|file| {
                let mut out = io::BufWriter::with_capacity(PIECE, file);
                body.copy(read, &mut out)?;
                out.flush()
            })
        }
        DiskFormat::Raw => {
            let guest = draft.guest()?;
            written(&|file| fill_raw(&*guest, file, &mut added(read)))
        }
    };
    // A qcow2 that makes no sense is the source's fault, everything else the folder's.
    made.map_err(|error: io::Error| match error.kind() {
        io::ErrorKind::InvalidData => Error::storage(&draft.disk)(error),
        _ => Error::storage(dir)(error),
    })
}

/// Writes what a guest sees of a disk into an empty file; zeros take no room in it.
pub(in crate::image) fn fill(
    guest: &dyn Guest,
    format: DiskFormat,
    file: &File,
    each: &mut Each<'_>,
) -> io::Result<()> {
    match format {
        DiskFormat::Raw => fill_raw(guest, file, each),
        DiskFormat::Qcow2 => {
            let plan = qcow2::Plan::of(guest)?;
            let mut inner = file;
            let told = Told {
                inner: &mut inner,
                each,
            };
            let mut out = io::BufWriter::with_capacity(PIECE, told);
            plan.write(guest, &mut out)?;
            out.flush()
        }
    }
}

/// Writes a guest's bytes sector by sector; zeros become holes.
fn fill_raw(guest: &dyn Guest, file: &File, each: &mut Each<'_>) -> io::Result<()> {
    let mut buffer = vec![0; PIECE];
    let mut next = 0;
    while let Some(data) = guest.next_data(next..guest.size())? {
        let mut at = data.start;
        while at < data.end {
            let take = usize::try_from(data.end - at).unwrap_or(PIECE).min(PIECE);
            let piece = &mut buffer[..take];
            guest.read(piece, at)?;
            for (number, block) in piece.chunks(HOLE).enumerate() {
                if block != &ZEROS[..block.len()] {
                    file.write_all_at(block, at + (number * HOLE) as u64)?;
                }
            }
            each(take)?;
            at += take as u64;
        }
        next = data.end;
    }
    file.set_len(guest.size())
}

/// Zeros of this length become a hole, in bytes.
const HOLE: usize = 64 << 10;
