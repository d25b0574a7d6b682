//! One image in the making: its lock, and the folder that goes with it.
//!
//! The folder of a process that was killed, or whose registry went away, is kept for the next one if it holds something to go
//! on from: files that say how far somebody came, each with the version of its content in its name.

use std::fs::{self, File, Metadata, OpenOptions, TryLockError};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::Uid;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::checkpoint::CHECKPOINT;
use super::done::PIECES;
use super::progress::{Event, Progress};
use super::sight::{Sight, is_held};
use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::store::{SMALL, inherited_mode, remove};
use crate::kill::{self, Point};

/// How often a lock is tried that another process holds. The kernel could wake us, but only by blocking a
/// thread that nothing can cancel.
const TRY_EVERY: Duration = Duration::from_millis(200);

/// Longest wait for another process. Its download is worth waiting for as long as it lasts; what exceeds this
/// is stuck, and gitlab-runner's own limits have usually ended the job before.
const WAIT_MAX: Duration = Duration::from_secs(3600);

/// Layers that are done, and what they held.
const LAYERS: &str = "layers-1.json";

/// The names of files that have their place among others by them.
const NAMES: &str = "names-1.json";

/// Where the bytes in the folder come from: what one repository gave is nothing that another's readers may have.
const PLACE: &str = "place-1";

/// Largest of these files, in bytes.
const FILE_MAX: u64 = 8 << 20;

/// The right to make one image, and a folder to make it in. The lock ends with this value, and the folder, too, unless it
/// holds something to go on from.
///
/// The lock is a file's `flock`: the kernel drops it when its process dies, however it dies.
#[derive(Debug)]
pub(in crate::image) struct Work {
    /// Held open: it carries the lock.
    _lock: File,
    lock_path: PathBuf,
    dir: PathBuf,
    /// Nothing in the folder can be trusted.
    discarded: AtomicBool,
    begun: Mutex<Sight>,
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
        let mut waiter = None;
        loop {
            if let Some(work) = Self::try_lock(partial, digest)? {
                return Ok(work);
            }
            waiter = waiter.or_else(|| Waiter::new(partial, digest));
            let waited = start.elapsed();
            if waited > WAIT_MAX {
                return Err(Error::WaitedTooLong {
                    image: image.to_owned(),
                    seconds: WAIT_MAX.as_secs(),
                });
            }
            let sight = Sight::of(&partial.join(digest.hex())).unwrap_or_default();
            progress.event(Event::Waiting {
                digest,
                waited,
                done: sight.done,
                total: sight.total,
                process: sight.process,
            });
            tokio::time::sleep(TRY_EVERY).await;
        }
    }

    /// Takes the lock if nobody holds it.
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
                remove(&partial.join(format!("{}.damaged", digest.hex())))?;
                return Ok(Some(Self {
                    _lock: lock,
                    lock_path,
                    dir,
                    discarded: AtomicBool::new(false),
                    begun: Mutex::default(),
                }));
            }
        }
    }

    /// The folder, at which nobody else looks. It is empty, or holds what an earlier process has come to with the bytes of the
    /// same place: a repository, a folder, an address. To go on from another's would give an image to somebody who knows no more
    /// of it than its digest. What another user of the group has begun is begun anew: its files are that user's alone.
    pub(in crate::image) fn dir(&self, place: &str) -> Result<&Path, Error> {
        let begun_from = fs::read_to_string(self.dir.join(PLACE));
        if is_worth_keeping(&self.dir)
            && begun_from.is_ok_and(|begun_from| begun_from == place)
            && may_go_on(&self.dir, rustix::process::geteuid())
        {
            return Ok(&self.dir);
        }
        remove(&self.dir)?;
        fs::create_dir(&self.dir).map_err(Error::storage(&self.dir))?;
        // Whoever shares the store must be able to sweep it, should this process be killed.
        let parent = self.dir.parent().unwrap_or(&self.dir);
        fs::set_permissions(&self.dir, fs::Permissions::from_mode(inherited_mode(parent)))
            .map_err(Error::storage(&self.dir))?;
        let note = self.dir.join(PLACE);
        fs::write(&note, place).map_err(Error::storage(note))?;
        kill::point(Point::WorkBegun);
        Ok(&self.dir)
    }

    /// Throws away what an earlier process has left here.
    pub(in crate::image) fn begin_anew(&self) -> Result<(), Error> {
        remove(&self.dir)
    }

    /// Removes the folder at the end, whatever it holds.
    pub(in crate::image) fn discard(&self) {
        self.discarded.store(true, Ordering::Relaxed);
    }

    /// Removes the folder at the end if nobody has gone on with it for so long.
    pub(in crate::image) fn discard_if_old(&self, kept: Duration) {
        let changed = fs::metadata(&self.dir).and_then(|data| data.modified());
        if changed.is_ok_and(|time| time.elapsed().is_ok_and(|age| age > kept)) {
            self.discard();
        }
    }

    /// What was written down about layers that are done.
    pub(in crate::image) fn layers<T: DeserializeOwned>(&self) -> Option<T> {
        read(&self.dir.join(LAYERS))
    }

    /// Writes down what is to be known about layers that are done. Their files are written already.
    pub(in crate::image) fn keep_layers(&self, layers: &impl Serialize) -> Result<(), Error> {
        let path = self.dir.join(LAYERS);
        write(&path, layers).map_err(Error::storage(&path))?;
        kill::point(Point::LayerKept);
        Ok(())
    }

    /// What was written down about the names of files.
    pub(in crate::image) fn names<T: DeserializeOwned>(&self) -> Option<T> {
        read(&self.dir.join(NAMES))
    }

    /// Writes down what is to be known about the names of files, of which a layer in hand has told one.
    pub(in crate::image) fn keep_names(&self, names: &impl Serialize) -> Result<(), Error> {
        let path = self.dir.join(NAMES);
        write(&path, names).map_err(Error::storage(&path))
    }

    /// Nobody is to go on from the layers any more: their files are about to get other names. What was written down in the
    /// middle of a layer goes first. Without the note that the layer is done, it would be gone on with, and in a new file what
    /// it says is there would be zeros.
    pub(in crate::image) fn forget_layers(&self) -> Result<(), Error> {
        remove(&self.dir.join(CHECKPOINT))?;
        remove(&self.dir.join(LAYERS))
    }

    /// Tells the others of this host that this image is begun, how much it is, and how many bytes of it will certainly be written,
    /// in front of anybody who begins later. How many of these are not in the folder yet.
    pub(in crate::image) fn begin(&self, total: u64, needed: u64) -> Result<u64, Error> {
        self.claim(|_| Sight::begun(total, needed))
    }

    /// Tells them how many bytes the folder will hold in the end, once that is known, in front of anybody who knows that later. How many
    /// of these are not in the folder yet.
    pub(in crate::image) fn will_hold(&self, whole: u64) -> Result<u64, Error> {
        self.claim(|begun| begun.knowing(whole))
    }

    fn claim(&self, claim: impl FnOnce(Sight) -> Sight) -> Result<u64, Error> {
        let partial = self.dir.parent().unwrap_or(&self.dir);
        // Whoever comes second must find what the first has said.
        let alone = File::open(partial).and_then(|dir| dir.lock().map(|()| dir));
        let _alone = alone.map_err(Error::storage(partial))?;
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        *begun = claim(*begun);
        let now = begun.at(begun.left_in(&self.dir));
        now.show(&self.dir);
        Ok(now.coming(&self.dir))
    }

    /// How many other processes wait for this image.
    pub(in crate::image) fn awaited_by(&self) -> usize {
        Waiter::count(&self.dir)
    }

    /// Tells them how far it is.
    pub(in crate::image) fn show(&self, done: u64) {
        let begun = *self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        begun.at(done).show(&self.dir);
    }
}

/// Who waits for another process. A locked file of that name says so; what a killed one leaves is swept with the store's other
/// small files.
struct Waiter {
    path: PathBuf,
    /// Held open: it carries the lock.
    _lock: File,
}

impl Waiter {
    fn new(partial: &Path, digest: &Digest) -> Option<Self> {
        let path = partial.join(format!("{}{}", Self::prefix(&digest.hex()), uuid::Uuid::new_v4()));
        let lock = File::create_new(&path).ok()?;
        lock.try_lock().ok()?;
        Some(Self { path, _lock: lock })
    }

    fn prefix(hex: &str) -> String {
        format!("{SMALL}waits-{hex}-")
    }

    /// How many wait for the image that is made in `dir`. Not to be relied on, so no error is worth a word.
    fn count(dir: &Path) -> usize {
        let (Some(partial), Some(hex)) = (dir.parent(), dir.file_name().and_then(|name| name.to_str()))
        else {
            return 0;
        };
        let prefix = Self::prefix(hex);
        let waits = |entry: &fs::DirEntry| {
            let named = entry
                .file_name()
                .to_str()
                .is_some_and(|name| name.starts_with(&prefix));
            named && is_held(&entry.path())
        };
        fs::read_dir(partial).map_or(0, |entries| entries.flatten().filter(waits).count())
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            // The next sweep tries again.
            tracing::warn!(%error, "a leftover stays in the store");
        }
    }
}

impl Drop for Work {
    /// Removes the folder first and the lock last, so that nobody finds a folder without a lock, unless it is kept.
    fn drop(&mut self) {
        let kept = !self.discarded.load(Ordering::Relaxed) && is_worth_keeping(&self.dir);
        let damaged = self.dir.with_extension("damaged");
        let folder = (!kept).then_some(&self.dir);
        for path in folder.into_iter().chain([&damaged, &self.lock_path]) {
            if let Err(error) = remove(path) {
                // The next sweep tries again.
                tracing::warn!(%error, "a leftover stays in the store");
            }
        }
    }
}

/// Is there something from which another process can go on?
fn is_worth_keeping(dir: &Path) -> bool {
    let Ok(entries) = fs::read_dir(dir) else {
        return false;
    };
    let mut names = entries.filter_map(|entry| Some(entry.ok()?.file_name().to_str()?.to_owned()));
    names.any(|name| name == LAYERS || name == CHECKPOINT || name.starts_with(PIECES))
}

/// May this user write to all that is in the folder?
fn may_go_on(dir: &Path, user: Uid) -> bool {
    let own = |data: io::Result<Metadata>| data.is_ok_and(|data| data.uid() == user.as_raw());
    let all_own = || -> io::Result<bool> {
        let mut entries = fs::read_dir(dir)?;
        Ok(own(fs::metadata(dir)) && entries.all(|entry| own(entry.and_then(|entry| entry.metadata()))))
    };
    user.is_root() || all_own().unwrap_or_default()
}

/// A small file of the folder; none if it is not there or makes no sense.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let mut bytes = Vec::new();
    let file = File::open(path).ok()?;
    file.take(FILE_MAX).read_to_end(&mut bytes).ok()?;
    serde_json::from_slice(&bytes).ok()
}

fn write(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let begun = path.with_extension("begun");
    fs::write(&begun, serde_json::to_vec(value)?)?;
    fs::rename(&begun, path)
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
        fs::write(first.dir("r/vm").unwrap().join("file"), "x").unwrap();
        assert!(Work::try_lock(dir.path(), &digest).unwrap().is_none());
        assert!(
            Work::try_lock(dir.path(), &Digest::of(b"other"))
                .unwrap()
                .is_some()
        );
        let waits = Waits(Mutex::new(0));
        assert_eq!(first.awaited_by(), 0);
        let second = Work::lock(dir.path(), &digest, "vm", &waits);
        let release = async {
            tokio::time::sleep(TRY_EVERY * 2).await;
            assert_eq!(first.awaited_by(), 1);
            drop(first);
        };
        let (second, ()) = tokio::join!(second, release);
        assert!(*waits.0.lock().unwrap() >= 1);
        assert_eq!(
            fs::read_dir(second.unwrap().dir("r/vm").unwrap())
                .unwrap()
                .count(),
            1,
            "the folder has nothing but the note of its place again"
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing stays");
    }

    #[test]
    fn a_folder_is_kept_only_if_there_is_something_to_go_on_from() {
        let dir = tempfile::tempdir().unwrap();
        let digest = Digest::of(b"vm");
        let lock = || Work::try_lock(dir.path(), &digest).unwrap().unwrap();
        let work = lock();
        fs::write(work.dir("r/vm").unwrap().join("file.1"), "x").unwrap();
        work.begin(2, 2).unwrap();
        work.show(1);
        drop(work);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let work = lock();
        fs::write(work.dir("r/vm").unwrap().join("file.1"), "x").unwrap();
        assert_eq!(work.layers::<u32>(), None);
        work.keep_layers(&7).unwrap();
        drop(work);
        let work = lock();
        assert!(work.dir("r/vm").unwrap().join("file.1").exists());
        assert_eq!(work.layers::<u32>(), Some(7));
        drop(work);
        // What came from one place is nothing to go on from for another.
        let work = lock();
        assert!(!work.dir("evil/vm").unwrap().join("file.1").exists());
        assert_eq!(work.layers::<u32>(), None);
        work.keep_layers(&7).unwrap();
        work.discard_if_old(Duration::from_secs(3600));
        drop(work);
        let work = lock();
        assert_eq!(work.layers::<u32>(), Some(7), "it is not old");
        work.discard_if_old(Duration::ZERO);
        drop(work);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_another_user_has_begun_only_root_goes_on_with() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file.1"), "x").unwrap();
        let own = rustix::process::geteuid();
        let other = Uid::from_raw(own.as_raw() + 4321);
        assert!(may_go_on(dir.path(), own) && may_go_on(dir.path(), Uid::ROOT));
        assert!(!may_go_on(dir.path(), other));
        if own.is_root() {
            // Root has gone on with it, and was cut off again.
            std::os::unix::fs::chown(dir.path(), Some(other.as_raw()), None).unwrap();
            assert!(!may_go_on(dir.path(), other));
            std::os::unix::fs::chown(dir.path().join("file.1"), Some(other.as_raw()), None).unwrap();
            assert!(may_go_on(dir.path(), other));
        }
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
                            work.dir("r/vm").unwrap();
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
