//! Room on the store's file system: asked for before it is taken, with a share left for others, and what pulls that began before
//! will still take.

use std::io;
use std::path::{Path, PathBuf};

use super::sight::{Sight, claimed_before};
use crate::image::error::Error;

/// Bounds that the operator sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Largest disk, in bytes: its virtual size as well as its file.
    pub max_disk: u64,
    /// What must stay free on the store's file system, in bytes. The overlays of running jobs often lie on
    /// the same one, and a machine whose disk cannot grow stands still.
    pub keep_free: u64,
}

impl Default for Limits {
    /// 2 TiB, and 512 MiB.
    fn default() -> Self {
        Self {
            max_disk: 2 << 40,
            keep_free: 512 << 20,
        }
    }
}

/// The folder of a store in which images are made.
pub(in crate::image) const PARTIAL: &str = "partial";

/// The free space around one folder.
#[derive(Debug, Clone)]
pub(in crate::image) struct Room {
    image: String,
    dir: PathBuf,
    keep_free: u64,
}

impl Room {
    pub(in crate::image) fn new(image: &str, dir: &Path, keep_free: u64) -> Self {
        Self {
            image: image.to_owned(),
            dir: dir.to_owned(),
            keep_free,
        }
    }

    /// Are `bytes` free beside what must stay free and what others were promised?
    pub(in crate::image) fn require(&self, bytes: u64) -> Result<(), Error> {
        let free = fs4::available_space(&self.dir).map_err(Error::storage(&self.dir))?;
        let claimed = claimed_before(&self.dir);
        let needed = bytes.saturating_add(self.keep_free).saturating_add(claimed);
        if free < needed {
            Err(self.full(needed, claimed, free))
        } else {
            Ok(())
        }
    }

    /// Are the next `bytes` free that are written, or as many as are still to come?
    pub(in crate::image) fn require_next(&self, bytes: u64) -> Result<(), Error> {
        let rest = Sight::of(&self.dir).and_then(|own| own.rest(&self.dir));
        self.require(rest.map_or(bytes, |rest| rest.min(bytes)))
    }

    /// Names a failed write: no room, or something else. `bytes` are known to be still missing.
    pub(in crate::image) fn write_failed(&self, path: &Path, error: io::Error, bytes: u64) -> Error {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                let free = fs4::available_space(&self.dir).unwrap_or_default();
                let claimed = claimed_before(&self.dir);
                let needed = bytes.saturating_add(self.keep_free).saturating_add(claimed);
                self.full(needed, claimed, free)
            }
            _ => Error::Storage {
                path: path.to_owned(),
                source: error,
            },
        }
    }

    fn full(&self, needed: u64, claimed: u64, free: u64) -> Error {
        // What its operator knows is the store, not where an image lies in it until it is whole.
        let within = self.dir.ancestors().find(|dir| dir.ends_with(PARTIAL));
        let store = within.and_then(Path::parent).unwrap_or(&self.dir);
        Error::DiskFull {
            image: self.image.clone(),
            dir: store.to_owned(),
            needed,
            claimed,
            free,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_must_stay_free_counts() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Room::new("vm", dir.path(), 0).require(1).is_ok());
        for (keep, bytes) in [(u64::MAX, 0), (0, u64::MAX), (u64::MAX / 2, u64::MAX / 2)] {
            let error = Room::new("vm", dir.path(), keep).require(bytes).unwrap_err();
            assert!(matches!(error, Error::DiskFull { .. }), "{error}");
        }
    }

    #[test]
    fn the_store_is_named_and_what_is_missing() {
        let full = |claimed| Room::new("vm", Path::new("/store/partial/abc"), 5).full(12, claimed, 9);
        let text = "no room for vm in /store: 12 bytes are needed and 9 are free, which is 3 too few";
        assert_eq!(full(0).to_string(), text);
        let text = "no room for vm in /store: 12 bytes are needed, 4 of them for pulls that began before, and 9 are free, which is 3 too few";
        assert_eq!(full(4).to_string(), text);
    }

    #[test]
    fn only_a_full_disk_is_called_full() {
        let room = Room::new("vm", Path::new("/"), 5);
        let full = room.write_failed(Path::new("/x"), io::ErrorKind::StorageFull.into(), 7);
        assert!(matches!(full, Error::DiskFull { needed: 12, .. }), "{full}");
        let other = room.write_failed(Path::new("/x"), io::ErrorKind::PermissionDenied.into(), 7);
        assert!(matches!(other, Error::Storage { .. }), "{other}");
    }
}
