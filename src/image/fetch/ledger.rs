//! What a stream has come to, so that another process can go on from there.
//!
//! A format reads a layer as one stream and keeps its thoughts to itself. So it is not its state that is written down but
//! what it has read: everything but the content of files word for word, and of that only the length, for it is on the disk.
//! Another process reads the same again, up to where it was; its files know how much of them is there, and let that much go by.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::image::error::Error;
use crate::image::store::sum::Sum;

/// Most bytes that are kept word for word. Headers of an archive have some KiB; a layer with a whole operating system in front
/// of its disk has more, and starts again when it is cut off.
const VERBATIM_MAX: usize = 1 << 20;

/// The beginning of a file is kept word for word, too: a format may look at it.
const BEGINNING: u64 = 4096;

/// A part of what was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Segment {
    /// These bytes, in hexadecimal digits.
    Verbatim(String),
    /// So many bytes, which are in a file.
    InFile(u64),
}

/// A file that can say how far it is.
pub(super) trait Making: Send {
    /// Hands all bytes that it has to the system; its length now.
    fn pause(&mut self) -> Result<u64, Error>;
}

/// What has been read of one layer, and the files that came of it.
#[derive(Default)]
pub(in crate::image) struct Ledger(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    segments: Vec<Segment>,
    /// Bytes kept word for word.
    verbatim: usize,
    /// Nothing can be written down any more.
    spoiled: bool,
    /// Bytes that went into a file since something was read.
    in_file: u64,
    making: Vec<(String, Arc<Mutex<dyn Making>>)>,
    /// What an earlier process has of each file.
    there: BTreeMap<String, u64>,
    /// Sums of the files that are finished, also those of earlier layers.
    sums: BTreeMap<String, Sum>,
}

/// A ledger at one moment.
pub(super) struct Page {
    pub(super) segments: Vec<Segment>,
    pub(super) files: BTreeMap<String, u64>,
}

impl Ledger {
    /// Begins a layer, with what an earlier process has of it.
    pub(super) fn begin(&self, segments: Vec<Segment>, there: BTreeMap<String, u64>) {
        let verbatim = segments.iter().map(|segment| match segment {
            Segment::Verbatim(digits) => digits.len() / 2,
            Segment::InFile(_) => 0,
        });
        let mut inner = self.lock();
        *inner = Inner {
            verbatim: verbatim.sum(),
            segments,
            there,
            sums: std::mem::take(&mut inner.sums),
            ..Inner::default()
        };
    }

    /// A file is begun; how much of it is on the disk already.
    pub(super) fn there(&self, path: &Path) -> Option<u64> {
        self.lock().there.remove(&name(path))
    }

    pub(super) fn made(&self, path: &Path, file: Arc<Mutex<dyn Making>>) {
        self.lock().making.push((name(path), file));
    }

    /// A file is finished, and this is its sum.
    pub(super) fn summed(&self, path: &Path, sum: Sum) {
        self.lock().sums.insert(name(path), sum);
    }

    /// The sum of a file, where all of it was written by this process.
    pub(super) fn sum_of(&self, path: &Path) -> Option<Sum> {
        self.lock().sums.get(&name(path)).copied()
    }

    /// Bytes that were just read go into a file, at this place.
    pub(super) fn in_file(&self, at: u64, count: usize) {
        if at >= BEGINNING {
            self.lock().in_file += count as u64;
        }
    }

    /// Notes what was read last, now that it has been used.
    pub(super) fn read(&self, bytes: &[u8]) {
        let mut inner = self.lock();
        let in_file = usize::try_from(std::mem::take(&mut inner.in_file)).unwrap_or(usize::MAX);
        if inner.spoiled || bytes.is_empty() {
            return;
        }
        // Files take what was read last.
        let (own, rest) = bytes.split_at(bytes.len() - in_file.min(bytes.len()));
        if !own.is_empty() {
            inner.verbatim += own.len();
            if inner.verbatim > VERBATIM_MAX {
                inner.spoiled = true;
                inner.segments = Vec::new();
                return;
            }
            let digits = hex::encode(own);
            match inner.segments.last_mut() {
                Some(Segment::Verbatim(before)) => before.push_str(&digits),
                _ => inner.segments.push(Segment::Verbatim(digits)),
            }
        }
        if !rest.is_empty() {
            match inner.segments.last_mut() {
                Some(Segment::InFile(before)) => *before += rest.len() as u64,
                _ => inner.segments.push(Segment::InFile(rest.len() as u64)),
            }
        }
    }

    /// The ledger now; none where it cannot be written down.
    pub(super) fn page(&self) -> Result<Option<Page>, Error> {
        let inner = self.lock();
        if inner.spoiled {
            return Ok(None);
        }
        let mut page = Page {
            segments: inner.segments.clone(),
            files: BTreeMap::new(),
        };
        for (name, making) in &inner.making {
            let length = making.lock().unwrap_or_else(PoisonError::into_inner).pause()?;
            page.files.insert(name.clone(), length);
        }
        Ok(Some(page))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Ledger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ledger").finish_non_exhaustive()
    }
}

fn name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_files_took_is_not_kept_word_for_word() {
        let ledger = Ledger::default();
        ledger.read(b"header");
        ledger.in_file(0, 4);
        ledger.read(b"head");
        ledger.in_file(BEGINNING, 7);
        ledger.read(b"content");
        ledger.in_file(BEGINNING + 7, 3);
        ledger.read(b"---end");
        ledger.read(b"trailer");
        let page = ledger.page().unwrap().unwrap();
        assert_eq!(
            page.segments,
            [
                Segment::Verbatim(hex::encode("headerhead")),
                Segment::InFile(7),
                Segment::Verbatim(hex::encode("---")),
                Segment::InFile(3),
                Segment::Verbatim(hex::encode("trailer")),
            ]
        );
    }

    #[test]
    fn a_layer_of_many_other_files_is_not_written_down() {
        let ledger = Ledger::default();
        ledger.read(&vec![1; VERBATIM_MAX]);
        assert!(ledger.page().unwrap().is_some());
        ledger.read(&[1]);
        assert!(ledger.page().unwrap().is_none());
    }
}
