//! Which pieces of a plan are on the disk: one bit each, in a file that outlives the process.
//!
//! ```text
//! 0   8 bytes   "CANPIEC1"
//! 8   32 bytes  the plan's identity
//! 40  bits      piece by piece, in the plan's order, lowest bit first
//! ```
//!
//! A bit is written only after the piece was verified and written, and bits never go back. So whatever a process leaves that is
//! killed is true. What a host leaves that crashes is never looked at: the store knows which images that concerns.

use std::fs::{File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::image::error::Error;
use crate::image::plan::Pieces;
use crate::kill::{self, Point};

/// How the names of these files begin.
pub(super) const PIECES: &str = "pieces.";

const MAGIC: &[u8; 8] = b"CANPIEC1";
const HEADER: u64 = 40;

/// The bits of one plan.
#[derive(Debug)]
pub(super) struct Done {
    path: PathBuf,
    file: File,
    /// Where a blob's bits begin.
    first: Vec<usize>,
    bits: Mutex<Bits>,
}

#[derive(Debug)]
struct Bits {
    now: Vec<u8>,
    /// Unpacked bytes that came since the bits were written.
    unwritten: u64,
}

impl Done {
    /// Finds what an earlier process has done of this plan in the same folder.
    pub(super) fn open(dir: &Path, plan: &Pieces) -> Result<Self, Error> {
        let identity = plan.identity().hex();
        let path = dir.join(format!("{PIECES}{}", &identity[..16]));
        let mut header = MAGIC.to_vec();
        header.extend(hex::decode(&identity).unwrap_or_default());
        let mut first = Vec::with_capacity(plan.blobs.len());
        let mut count = 0;
        for blob in &plan.blobs {
            first.push(count);
            count += blob.pieces.len();
        }
        let mut bits = vec![0; count.div_ceil(8)];
        let mut open = || {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)?;
            let mut found = Vec::new();
            let length = HEADER + bits.len() as u64;
            file.by_ref().take(length + 1).read_to_end(&mut found)?;
            if found.len() as u64 == length && found.starts_with(&header) {
                bits.copy_from_slice(&found[header.len()..]);
            } else {
                file.set_len(0)?;
                file.set_len(length)?;
                file.write_all_at(&header, 0)?;
                kill::point(Point::PiecesBegun);
            }
            Ok(file)
        };
        let file = open().map_err(Error::storage(&path))?;
        Ok(Self {
            path,
            file,
            first,
            bits: Mutex::new(Bits {
                now: bits,
                unwritten: 0,
            }),
        })
    }

    /// Is a piece on the disk?
    pub(super) fn has(&self, blob: usize, piece: usize) -> bool {
        let at = self.first[blob] + piece;
        self.lock().now[at / 8] & (1 << (at % 8)) != 0
    }

    /// These pieces are verified and written, `bytes` in all.
    pub(super) fn add(&self, blob: usize, pieces: &[usize], bytes: u64) {
        let mut bits = self.lock();
        for piece in pieces {
            let at = self.first[blob] + piece;
            bits.now[at / 8] |= 1 << (at % 8);
        }
        bits.unwritten += bytes;
    }

    /// Unpacked bytes that a kill would cost.
    pub(super) fn unwritten(&self) -> u64 {
        self.lock().unwritten
    }

    /// Writes down what is done.
    pub(super) fn write(&self) -> Result<(), Error> {
        let bits = {
            let mut bits = self.lock();
            bits.unwritten = 0;
            bits.now.clone()
        };
        self.file
            .write_all_at(&bits, HEADER)
            .map_err(Error::storage(&self.path))?;
        kill::point(Point::PiecesKept);
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Bits> {
        // A panic under the lock leaves bits that are still true.
        self.bits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
