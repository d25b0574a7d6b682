//! The segments of an index, packed as they came, in a file without a name: all of an index is read before anything is fetched,
//! and an index may be larger than memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::ledger::nameless;

/// All segments so far.
#[derive(Debug)]
pub(super) struct Segments {
    file: File,
    /// Where each ends.
    ends: Vec<u64>,
}

impl Segments {
    /// Begins with none.
    pub(super) fn create(dir: &Path) -> io::Result<Self> {
        let file = nameless(dir)?;
        let ends = Vec::new();
        Ok(Self { file, ends })
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Adds the segment that follows.
    pub(super) fn add(&mut self, bytes: &[u8]) -> io::Result<()> {
        let start = self.start_of(self.len());
        self.file.write_all_at(bytes, start)?;
        self.ends.push(start + bytes.len() as u64);
        Ok(())
    }

    /// One of them.
    pub(super) fn get(&self, number: usize) -> io::Result<Vec<u8>> {
        let start = self.start_of(number);
        let mut bytes = vec![0; usize::try_from(self.ends[number] - start).unwrap_or_default()];
        self.file.read_exact_at(&mut bytes, start)?;
        Ok(bytes)
    }

    fn start_of(&self, number: usize) -> u64 {
        number.checked_sub(1).map_or(0, |before| self.ends[before])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_read_as_they_were_added() {
        let dir = tempfile::tempdir().unwrap();
        let mut segments = Segments::create(dir.path()).unwrap();
        let all: [&[u8]; 4] = [b"one", b"", b"three", b"4"];
        for bytes in all {
            segments.add(bytes).unwrap();
        }
        assert_eq!(segments.len(), 4);
        for (number, bytes) in all.iter().enumerate().rev() {
            assert_eq!(segments.get(number).unwrap(), *bytes);
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
