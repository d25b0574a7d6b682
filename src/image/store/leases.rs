//! Who uses an image just now, and who used it last.
//!
//! A lease is a shared `flock` on the image's folder. A process holds it from the moment at which it is given the image until
//! something that lasts longer (the job's record) names the image, or it ends; the kernel drops it however it ends. Whoever
//! removes an image takes the same lock for itself alone, so that an image is either leased or removed, never both.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use rustix::fs::{Timespec, Timestamps, UTIME_NOW};

use super::Store;
use super::files::make_dirs;
use crate::image::digest::Digest;
use crate::image::error::Error;

/// The kernel's list of locks.
const LOCKS: &str = "/proc/locks";

/// Whoever shares the store may say that it used an image.
const USED_MODE: u32 = 0o664;

/// While it is held, the image is not removed.
#[derive(Debug, Clone)]
pub struct Lease {
    _folder: Arc<File>,
}

/// That a disk is held is no part of what it is.
impl PartialEq for Lease {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Lease {}

/// The right to remove an image, which nobody leases.
#[derive(Debug)]
pub(super) struct Alone {
    _folder: File,
}

impl Store {
    /// Leases an image; none when it is not here, or just being removed.
    pub(in crate::image) fn lease(&self, digest: &Digest) -> Result<Option<Lease>, Error> {
        let locked = lock(&self.disk_dir(digest), File::try_lock_shared)?;
        Ok(locked.map(|folder| Lease {
            _folder: Arc::new(folder),
        }))
    }

    /// Leases an image in the making by its folder, before anybody can see it: it is not removed between the moment at which it
    /// appears and the one at which it is given to whoever made it.
    pub(in crate::image) fn lease_unfinished(&self, work: &Path) -> Result<Option<Lease>, Error> {
        let locked = lock(work, File::try_lock_shared)?;
        Ok(locked.map(|folder| Lease {
            _folder: Arc::new(folder),
        }))
    }

    /// Locks an image against leases; none when it is not here, or leased.
    pub(super) fn alone(&self, digest: &Digest) -> Result<Option<Alone>, Error> {
        let locked = lock(&self.disk_dir(digest), File::try_lock)?;
        Ok(locked.map(|folder| Alone { _folder: folder }))
    }

    /// The processes that lease an image, as far as the kernel tells.
    pub fn leased_by(&self, digest: &Digest) -> Vec<u32> {
        let Ok(folder) = fs::metadata(self.disk_dir(digest)) else {
            return Vec::new();
        };
        let locks = fs::read_to_string(LOCKS).unwrap_or_default();
        holders(&locks, folder.dev(), folder.ino())
    }

    /// Notes that an image is used now. Only the order in which images go depends on it, so that a failure is none.
    pub(in crate::image) fn touch(&self, digest: &Digest) {
        let path = self.used_path(digest);
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_NOW,
        };
        let touched = || -> io::Result<()> {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(USED_MODE)
                .open(&path)?;
            if file.metadata()?.uid() == rustix::process::geteuid().as_raw() {
                // The umask has no say in who may note it.
                file.set_permissions(fs::Permissions::from_mode(USED_MODE))?;
            }
            rustix::fs::futimens(
                &file,
                &Timestamps {
                    last_access: now,
                    last_modification: now,
                },
            )?;
            Ok(())
        };
        let folder = || {
            path.parent()
                .map_or(Ok(()), |dir| make_dirs(dir, &crate::record::hidden))
        };
        if let Err(error) = touched().or_else(|_| folder().map_err(io::Error::other).and_then(|()| touched()))
        {
            tracing::debug!(%digest, %error, "the use of an image is not noted");
        }
    }

    /// When an image was last used, if it ever was.
    pub(super) fn used(&self, digest: &Digest) -> Option<Timestamp> {
        let modified = fs::metadata(self.used_path(digest)).and_then(|data| data.modified());
        modified.ok().and_then(|time| Timestamp::try_from(time).ok())
    }

    pub(super) fn used_path(&self, digest: &Digest) -> PathBuf {
        self.dir.join("used").join(digest.hex())
    }
}

/// Locks a folder as `how` says, if it is there, and still the one of that name afterwards.
fn lock(dir: &Path, how: impl Fn(&File) -> Result<(), TryLockError>) -> Result<Option<File>, Error> {
    let folder = match File::open(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(Error::storage(dir))?,
    };
    match how(&folder) {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => return Err(Error::storage(dir)(error)),
    }
    let ours = folder.metadata().map_err(Error::storage(dir))?;
    let same = fs::metadata(dir).is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino()));
    Ok(same.then_some(folder))
}

/// The processes that hold a `flock` on a file, in the text of `/proc/locks` (proc_locks(5)).
fn holders(locks: &str, device: u64, inode: u64) -> Vec<u32> {
    let file = format!(
        "{:02x}:{:02x}:{inode}",
        rustix::fs::major(device),
        rustix::fs::minor(device)
    );
    let mut holders: Vec<u32> = locks
        .lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            match fields.as_slice() {
                // One that waits has an arrow in the second place.
                [_, "FLOCK", _, _, pid, of, ..] if *of == file => pid.parse().ok(),
                _ => None,
            }
        })
        .collect();
    holders.sort_unstable();
    holders.dedup();
    holders
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store_with(image: &[u8]) -> (tempfile::TempDir, Store, Digest) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let digest = Digest::of(image);
        fs::create_dir(store.disk_dir(&digest)).unwrap();
        (dir, store, digest)
    }

    #[test]
    fn an_image_is_leased_by_many_or_removed_by_one() {
        let (_dir, store, digest) = store_with(b"vm");
        let (first, second) = (store.lease(&digest).unwrap(), store.lease(&digest).unwrap());
        assert!(first.is_some() && second.is_some());
        assert!(store.alone(&digest).unwrap().is_none());
        assert_eq!(store.leased_by(&digest), [std::process::id()]);
        drop((first, second));
        assert!(store.leased_by(&digest).is_empty());
        let alone = store.alone(&digest).unwrap();
        assert!(alone.is_some() && store.lease(&digest).unwrap().is_none());
        assert!(store.lease(&Digest::of(b"none")).unwrap().is_none());
    }

    #[test]
    fn the_last_use_is_noted() {
        let (_dir, store, digest) = store_with(b"vm");
        assert_eq!(store.used(&digest), None);
        let before = Timestamp::now();
        store.touch(&digest);
        let used = store.used(&digest).unwrap();
        assert!(used.as_second() >= before.as_second() - 1 && used <= Timestamp::now());
    }

    #[test]
    fn the_kernels_list_of_locks_is_read() {
        let locks = "1: FLOCK  ADVISORY  READ 41 fe:00:77 0 EOF\n\
                     1: -> FLOCK  ADVISORY  WRITE 42 fe:00:77 0 EOF\n\
                     2: POSIX  ADVISORY  WRITE 43 fe:00:77 0 EOF\n\
                     3: FLOCK  ADVISORY  READ 44 fe:00:777 0 EOF\n\
                     4: FLOCK  ADVISORY  READ 40 fe:00:77 0 EOF\n\
                     nonsense\n";
        assert_eq!(holders(locks, rustix::fs::makedev(0xfe, 0), 77), [40, 41]);
    }
}
