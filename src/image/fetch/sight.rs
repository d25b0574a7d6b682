//! What pulls of one host know of each other: who makes an image, how far that is, and what room it will still take.
//!
//! It stands in a small file of the image's folder, which counts for as long as somebody holds the image's lock. It says nothing
//! about what is in the folder.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::partial::read;

const NAME: &str = "sight.json";

/// How far somebody is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sight {
    /// Packed bytes that are here.
    pub(super) done: u64,
    /// Packed bytes of the image.
    pub(super) total: u64,
    /// Which process it is; 0 where that is not known.
    #[serde(default)]
    pub(super) process: u32,
    /// When it began, or knew how much room it takes, in microseconds of the epoch. Whose time is first goes first.
    #[serde(default)]
    since: i64,
    /// How many bytes it will certainly write from here on, as long as it is not known how many the folder will hold.
    #[serde(default)]
    needed: u64,
    /// How many bytes the folder will hold in the end; 0 while that is not known.
    #[serde(default)]
    whole: u64,
}

impl Sight {
    /// That of a process that begins now.
    pub(super) fn begun(total: u64, needed: u64) -> Self {
        Self {
            done: 0,
            total,
            process: std::process::id(),
            since: Timestamp::now().as_microsecond(),
            needed,
            whole: 0,
        }
    }

    /// The same, now that it is known how many bytes the folder will hold. Who knows that first goes first.
    pub(super) fn knowing(self, whole: u64) -> Self {
        Self {
            since: Timestamp::now().as_microsecond(),
            needed: 0,
            whole,
            ..self
        }
    }

    /// How many bytes will certainly still be written into the folder.
    pub(super) fn coming(self, dir: &Path) -> u64 {
        self.needed.saturating_add(self.rest(dir).unwrap_or_default())
    }

    /// How many bytes are missing of those that the folder will hold, if that is known. Looked up at once: whoever asks has just seen
    /// how much is free.
    pub(super) fn rest(self, dir: &Path) -> Option<u64> {
        // A folder that is gone stands in the store.
        let taken = || taken(dir).unwrap_or(u64::MAX);
        (self.whole > 0).then(|| self.whole.saturating_sub(taken()))
    }

    /// How much of the same image there was in the folder when somebody last said so.
    pub(super) fn left_in(self, dir: &Path) -> u64 {
        let before = Self::of(dir).filter(|before| before.total == self.total);
        before.map_or(0, |before| before.done)
    }

    /// The same with so many packed bytes here. Unpacked they are no fewer, so at least as many are written.
    pub(super) fn at(self, done: u64) -> Self {
        Self {
            done,
            needed: self.needed.saturating_sub(done),
            ..self
        }
    }

    /// That of the process that makes the image in this folder.
    pub(super) fn of(dir: &Path) -> Option<Self> {
        read(&dir.join(NAME))
    }

    /// Writes it down. Not to be relied on, so no error is worth a word.
    pub(super) fn show(self, dir: &Path) {
        let written = serde_json::to_vec(&self).map(|bytes| {
            let begun = dir.join("sight.begun");
            fs::write(&begun, bytes).and_then(|()| fs::rename(&begun, dir.join(NAME)))
        });
        drop(written);
    }
}

/// How many bytes those will certainly still write who began in front of the one that makes an image in `dir`.
pub(super) fn claimed_before(dir: &Path) -> u64 {
    let Some(entries) = dir.parent().and_then(|partial| fs::read_dir(partial).ok()) else {
        return 0;
    };
    let own = Sight::of(dir).map_or(i64::MAX, |own| own.since);
    let others = entries.flatten().map(|entry| entry.path());
    let claims = others.filter(|other| other != dir).filter_map(|other| {
        let sight = Sight::of(&other)?;
        let first = (sight.since, other.as_path()) < (own, dir);
        let coming = if first { sight.coming(&other) } else { 0 };
        (coming > 0 && is_held(&other.with_extension("lock"))).then_some(coming)
    });
    claims.fold(0, u64::saturating_add)
}

/// Bytes that the files of a folder take.
fn taken(dir: &Path) -> io::Result<u64> {
    let files = fs::read_dir(dir)?
        .flatten()
        .filter_map(|entry| entry.metadata().ok());
    Ok(files.map(|file| file.blocks() * 512).sum())
}

/// Does somebody hold this lock? The claim of a process that was killed counts no more.
pub(super) fn is_held(lock: &Path) -> bool {
    File::open(lock).is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

#[cfg(test)]
mod tests {
    use super::super::partial::Work;
    use super::*;
    use crate::image::digest::Digest;

    #[test]
    fn who_begins_later_counts_what_the_first_still_needs() {
        let partial = tempfile::tempdir().unwrap();
        let begin = |name: &[u8], total: u64, needed: u64| {
            let work = Work::try_lock(partial.path(), &Digest::of(name))
                .unwrap()
                .unwrap();
            let dir = work.dir("r/vm").unwrap().to_owned();
            work.begin(total, needed).unwrap();
            (work, dir)
        };
        let (first, first_dir) = begin(b"first", 100, 80);
        let (second, second_dir) = begin(b"second", 10, 10);
        assert_eq!((claimed_before(&first_dir), claimed_before(&second_dir)), (0, 80));
        assert_eq!(claimed_before(&partial.path().join("not-begun")), 90);
        first.show(50);
        assert_eq!(claimed_before(&second_dir), 30);
        first.show(100);
        assert_eq!(claimed_before(&second_dir), 0);
        first.show(0);
        // Its folder is kept for the next pull; it claims nothing while nobody works in it.
        first.keep_layers(&1).unwrap();
        drop(first);
        assert!(first_dir.exists());
        assert_eq!(claimed_before(&second_dir), 0);
        drop(second);
    }

    #[test]
    fn what_the_folder_will_hold_goes_down_as_it_comes() {
        const MIB: u64 = 1 << 20;
        let partial = tempfile::tempdir().unwrap();
        let begin = |name: &[u8]| {
            let work = Work::try_lock(partial.path(), &Digest::of(name))
                .unwrap()
                .unwrap();
            let dir = work.dir("r/vm").unwrap().to_owned();
            work.begin(100, 50).unwrap();
            (work, dir)
        };
        let (first, first_dir) = begin(b"first");
        let (second, second_dir) = begin(b"second");
        assert_eq!((claimed_before(&first_dir), claimed_before(&second_dir)), (0, 50));
        // Notes of the folders take room as well.
        let near = |bytes: u64, expected: u64| bytes.abs_diff(expected) < MIB / 4;
        assert!(near(second.will_hold(8 * MIB).unwrap(), 8 * MIB));
        assert!(near(first.will_hold(4 * MIB).unwrap(), 4 * MIB));
        assert!(
            near(claimed_before(&first_dir), 8 * MIB),
            "the second knew it first"
        );
        assert_eq!(claimed_before(&second_dir), 0);
        fs::write(second_dir.join("disk.raw"), vec![1; 3 << 20]).unwrap();
        assert!(near(claimed_before(&first_dir), 5 * MIB));
        // However much of it is packed.
        second.show(40);
        assert!(near(claimed_before(&first_dir), 5 * MIB));
        // It goes on where it was cut off.
        second.keep_layers(&1).unwrap();
        drop(second);
        let (second, _) = begin(b"second");
        assert!(near(second.will_hold(8 * MIB).unwrap(), 5 * MIB));
        fs::write(second_dir.join("kernel"), vec![1; 6 << 20]).unwrap();
        assert_eq!(Sight::of(&second_dir).unwrap().coming(&second_dir), 0);
    }

    #[test]
    fn who_goes_on_needs_only_the_rest() {
        let partial = tempfile::tempdir().unwrap();
        let digest = Digest::of(b"vm");
        let begin = |total: u64| {
            let work = Work::try_lock(partial.path(), &digest).unwrap().unwrap();
            let dir = work.dir("r/vm").unwrap().to_owned();
            work.begin(total, total).unwrap();
            work.keep_layers(&1).unwrap();
            let sight = Sight::of(&dir).unwrap();
            (work, (sight.done, sight.needed, sight.process))
        };
        let own = std::process::id();
        let (work, sight) = begin(100);
        assert_eq!(sight, (0, 100, own));
        work.show(60);
        drop(work);
        let (work, sight) = begin(100);
        assert_eq!(sight, (60, 40, own));
        work.show(70);
        let dir = work.dir("r/vm").unwrap();
        assert_eq!(Sight::of(dir).unwrap().needed, 30);
        drop(work);
        assert_eq!(begin(99).1, (0, 99, own), "another image");
    }

    #[test]
    fn what_an_older_version_wrote_claims_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(NAME), r#"{"done":1,"total":2}"#).unwrap();
        let sight = Sight::of(dir.path()).unwrap();
        assert_eq!(
            (sight.done, sight.total, sight.needed, sight.process),
            (1, 2, 0, 0)
        );
    }
}
