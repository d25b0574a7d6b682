//! One image in the making: its lock, and the folder that goes with it.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::progress::{Event, Progress};
use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::store::{inherited_mode, remove};
use crate::kill::{self, Point};

/// How often a lock is tried that another process holds. The kernel could wake us, but only by blocking a
/// thread that nothing can cancel.
const TRY_EVERY: Duration = Duration::from_millis(200);

/// Longest wait for another process. Its download is worth waiting for as long as it lasts; what exceeds this
/// is stuck, and gitlab-runner's own limits have usually ended the job before.
const WAIT_MAX: Duration = Duration::from_secs(3600);

/// The right to make one image, and an empty folder to make it in. Both end with this value.
///
/// The lock is a file's `flock`: the kernel drops it when its process dies, however it dies.
#[derive(Debug)]
pub(in crate::image) struct Work {
    /// Held open: it carries the lock.
    _lock: File,
    lock_path: PathBuf,
    dir: PathBuf,
}

impl Work {
    /// Takes the lock of a digest, waiting for others. `image` is for errors.
    pub(in crate::image) async fn lock(
        partial: &Path,
        digest: &Digest,
        image: &str,
        progress: &dyn Progress,
    ) -> Result<Self, Error> {
        let start = Instant::now();
        loop {
            if let Some(work) = Self::try_lock(partial, digest)? {
                return Ok(work);
            }
            let waited = start.elapsed();
            if waited > WAIT_MAX {
                return Err(Error::WaitedTooLong {
                    image: image.to_owned(),
                    seconds: WAIT_MAX.as_secs(),
                });
            }
            progress.event(Event::Waiting { digest, waited });
            tokio::time::sleep(TRY_EVERY).await;
        }
    }

    /// Takes the lock if nobody holds it, and removes what the last holder may have left.
    pub(in crate::image) fn try_lock(partial: &Path, digest: &Digest) -> Result<Option<Self>, Error> {
        let lock_path = partial.join(format!("{}.lock", digest.hex()));
        let dir = partial.join(digest.hex());
        loop {
            let lock = open_lock(&lock_path).map_err(Error::storage(&lock_path))?;
            match lock.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => {
                    return Err(Error::Storage {
                        path: lock_path,
                        source: error,
                    });
                }
            }
            // The holder before us removes the file at the end: what we have locked may be a name of nothing.
            let ours = lock.metadata().map_err(Error::storage(&lock_path))?;
            if fs::metadata(&lock_path)
                .is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino()))
            {
                remove(&dir)?;
                remove(&partial.join(format!("{}.damaged", digest.hex())))?;
                return Ok(Some(Self {
                    _lock: lock,
                    lock_path,
                    dir,
                }));
            }
        }
    }

    /// Makes the folder, which is empty and which nobody else looks at.
    pub(in crate::image) fn dir(&self) -> Result<&Path, Error> {
        fs::create_dir(&self.dir).map_err(Error::storage(&self.dir))?;
        // Whoever shares the store must be able to sweep it, should this process be killed.
        let parent = self.dir.parent().unwrap_or(&self.dir);
        fs::set_permissions(&self.dir, fs::Permissions::from_mode(inherited_mode(parent)))
            .map_err(Error::storage(&self.dir))?;
        kill::point(Point::WorkBegun);
        Ok(&self.dir)
    }
}

impl Drop for Work {
    /// Removes the folder first and the lock last, so that nobody finds a folder without a lock.
    fn drop(&mut self) {
        for path in [&self.dir, &self.dir.with_extension("damaged"), &self.lock_path] {
            if let Err(error) = remove(path) {
                // The next sweep tries again.
                tracing::warn!(%error, "a leftover stays in the store");
            }
        }
    }
}

fn open_lock(path: &Path) -> io::Result<File> {
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path);
    match opened {
        // Another user's lock file, in a store that is shared by a group: locking needs no writing.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => File::open(path),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::super::progress::Silent;
    use super::*;

    struct Waits(Mutex<u32>);

    impl Progress for Waits {
        fn event(&self, event: Event<'_>) {
            if matches!(event, Event::Waiting { .. }) {
                *self.0.lock().unwrap() += 1;
            }
        }
    }

    #[tokio::test]
    async fn one_works_and_the_other_waits() {
        let dir = tempfile::tempdir().unwrap();
        let digest = Digest::of(b"vm");
        let first = Work::lock(dir.path(), &digest, "vm", &Silent).await.unwrap();
        fs::write(first.dir().unwrap().join("file"), "x").unwrap();
        assert!(Work::try_lock(dir.path(), &digest).unwrap().is_none());
        assert!(
            Work::try_lock(dir.path(), &Digest::of(b"other"))
                .unwrap()
                .is_some()
        );
        let waits = Waits(Mutex::new(0));
        let second = Work::lock(dir.path(), &digest, "vm", &waits);
        let release = async {
            tokio::time::sleep(TRY_EVERY * 2).await;
            drop(first);
        };
        let (second, ()) = tokio::join!(second, release);
        assert!(*waits.0.lock().unwrap() >= 1);
        assert_eq!(
            fs::read_dir(second.unwrap().dir().unwrap()).unwrap().count(),
            0,
            "the folder is empty again"
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing stays");
    }

    #[test]
    fn many_threads_never_hold_one_lock_together() {
        let dir = tempfile::tempdir().unwrap();
        let digest = Digest::of(b"vm");
        let (inside, entered) = (
            std::sync::atomic::AtomicU32::new(0),
            std::sync::atomic::AtomicU32::new(0),
        );
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    use std::sync::atomic::Ordering::SeqCst;
                    for _ in 0..200 {
                        if let Some(work) = Work::try_lock(dir.path(), &digest).unwrap() {
                            assert_eq!(inside.fetch_add(1, SeqCst), 0);
                            work.dir().unwrap();
                            entered.fetch_add(1, SeqCst);
                            inside.fetch_sub(1, SeqCst);
                        }
                    }
                });
            }
        });
        // How often is up to the scheduler; the first to come gets in.
        assert!(entered.into_inner() >= 1);
    }
}
