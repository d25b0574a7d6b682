//! What is known about the chunks of an image that is being written: a file without a name, one line of fixed length a chunk.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::base::Place;
use crate::image::digest::Digest;

/// Bytes of a line.
const LINE: usize = 64;

/// Lines that are held together, in either direction.
const HELD: usize = 4096;

/// A chunk of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) file: usize,
    pub(super) at: u64,
    pub(super) length: u32,
    pub(super) digest: Digest,
    pub(super) place: Place,
}

/// All chunks so far.
#[derive(Debug)]
pub(super) struct Ledger {
    file: File,
    lines: u64,
    /// Lines that are not in the file yet.
    end: Vec<u8>,
    /// Lines that were read together, and the number of the first.
    held: Vec<u8>,
    held_from: u64,
}

impl Ledger {
    pub(super) fn create(dir: &Path) -> io::Result<Self> {
        Ok(Self {
            file: nameless(dir)?,
            lines: 0,
            end: Vec::new(),
            held: Vec::new(),
            held_from: 0,
        })
    }

    pub(super) fn len(&self) -> u64 {
        self.lines
    }

    pub(super) fn add(&mut self, entry: &Entry) -> io::Result<()> {
        self.end.extend_from_slice(&line(entry));
        self.lines += 1;
        if self.end.len() >= HELD * LINE {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let start = self.lines * LINE as u64 - self.end.len() as u64;
        self.file.write_all_at(&self.end, start)?;
        self.end.clear();
        Ok(())
    }

    pub(super) fn get(&mut self, number: u64) -> io::Result<Entry> {
        let held = self.held_from..self.held_from + (self.held.len() / LINE) as u64;
        if !held.contains(&number) {
            self.flush()?;
            let lines = usize::try_from(self.lines.saturating_sub(number))
                .unwrap_or(HELD)
                .min(HELD);
            self.held.resize(lines * LINE, 0);
            self.held_from = number;
            self.file.read_exact_at(&mut self.held, number * LINE as u64)?;
        }
        let start = usize::try_from(number - self.held_from).unwrap_or_default() * LINE;
        Ok(entry(&self.held[start..start + LINE]))
    }

    pub(super) fn set(&mut self, number: u64, entry: &Entry) -> io::Result<()> {
        self.flush()?;
        self.file.write_all_at(&line(entry), number * LINE as u64)?;
        let held = self.held_from..self.held_from + (self.held.len() / LINE) as u64;
        if held.contains(&number) {
            let start = usize::try_from(number - self.held_from).unwrap_or_default() * LINE;
            self.held[start..start + LINE].copy_from_slice(&line(entry));
        }
        Ok(())
    }
}

/// A file that goes with the process.
pub(super) fn nameless(dir: &Path) -> io::Result<File> {
    let path = dir.join(format!("chunks-{}", uuid::Uuid::new_v4()));
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)?;
    fs::remove_file(&path)?;
    Ok(file)
}

fn line(entry: &Entry) -> [u8; LINE] {
    let mut line = [0; LINE];
    line[..4].copy_from_slice(&(entry.file as u64).to_le_bytes()[..4]);
    line[4..8].copy_from_slice(&entry.length.to_le_bytes());
    line[8..16].copy_from_slice(&entry.at.to_le_bytes());
    line[16..24].copy_from_slice(&entry.place.at.to_le_bytes());
    line[24..28].copy_from_slice(&entry.place.pack.to_le_bytes());
    line[28..32].copy_from_slice(&entry.place.packed.to_le_bytes());
    line[32..].copy_from_slice(entry.digest.as_bytes());
    line
}

fn entry(line: &[u8]) -> Entry {
    let small = |at: usize| line[at..at + 4].try_into().map_or(0, u32::from_le_bytes);
    let large = |at: usize| line[at..at + 8].try_into().map_or(0, u64::from_le_bytes);
    Entry {
        file: small(0) as usize,
        length: small(4),
        at: large(8),
        place: Place {
            at: large(16),
            pack: small(24),
            packed: small(28),
        },
        digest: Digest::from_bytes(line[32..LINE].try_into().unwrap_or_default()),
    }
}
