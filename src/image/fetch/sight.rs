//! What pulls of one host know of each other: who makes an image, how far that is, and what room it will still take.
//!
//! It stands in a small file of the image's folder, which counts for as long as somebody holds the image's lock. It says nothing
//! about what is in the folder.

use std::fs::{self, File, TryLockError};
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
    /// When it began, in microseconds of the epoch. Who began first goes first.
    #[serde(default)]
    since: i64,
    /// How many bytes it will certainly write from here on.
    #[serde(default)]
    pub(super) needed: u64,
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
        }
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
        (first && sight.needed > 0 && is_held(&other.with_extension("lock"))).then_some(sight.needed)
    });
    claims.fold(0, u64::saturating_add)
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
