//! Images whose bytes may not all be on the disk yet.
//!
//! Nobody waits for the disk when an image comes: the system brings there what it holds in memory within half a minute, and a
//! process that is killed takes none of it along. Only a host that crashes, or loses its power, does. So before the first byte of
//! an image is written, a note says in which run of the host that is:
//!
//! | the note | its image |
//! |---|---|
//! | none | is on the disk |
//! | of this run | is on the disk or in memory: good for use |
//! | of an earlier run | is doubtful: read whole and compared before anybody gets it. What was only begun is thrown away |
//!
//! Some minutes later, whoever opens the store syncs what is there, which by then is quickly done, and removes the note.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::Store;
use super::files::{digest_of, entries, remove};
use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::fetch::partial::Work;
use crate::kill::{self, Point};

/// What the kernel calls this run of the host: random(4).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// After so long there is nothing left to be written: of its own accord the system lets nothing lie in memory for more than 30 s
/// (`vm.dirty_expire_centisecs`), and then needs the disk's own time.
const SETTLED_AFTER: Duration = Duration::from_secs(180);

impl Store {
    /// Notes, before the first of an image's bytes is written, that they are not synced. The caller holds the digest's lock, and
    /// has thrown away what is doubtful.
    pub(in crate::image) fn note_unsynced(&self, digest: &Digest) -> Result<(), Error> {
        let path = self.unsynced(digest);
        let run = this_run()?;
        if fs::read_to_string(&path).is_ok_and(|noted| noted == run) {
            return Ok(());
        }
        self.write_durably(&path, run.as_bytes())?;
        kill::point(Point::UnsyncedNoted);
        Ok(())
    }

    /// Was an image fetched, or begun, before the host started again, and never seen to be on the disk?
    pub(in crate::image) fn is_doubtful(&self, digest: &Digest) -> Result<bool, Error> {
        let path = self.unsynced(digest);
        match fs::read_to_string(&path) {
            Ok(noted) => Ok(noted != this_run()?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            // A note that is none is not of this run.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(true),
            Err(error) => Err(Error::storage(path)(error)),
        }
    }

    /// Nothing of the image is kept. The caller holds the digest's lock.
    pub(in crate::image) fn forget_unsynced(&self, digest: &Digest) -> Result<(), Error> {
        remove(&self.unsynced(digest))
    }

    /// Brings an image to the disk, and removes the note. What cannot be brought there is damaged.
    pub(super) fn settle(&self, digest: &Digest) -> Result<(), Error> {
        let dir = self.disk_dir(digest);
        let synced = || -> io::Result<()> {
            for entry in fs::read_dir(&dir)? {
                File::open(entry?.path())?.sync_all()?;
            }
            File::open(&dir)?.sync_all()?;
            File::open(self.dir.join("disks"))?.sync_all()
        };
        if let Err(error) = synced() {
            tracing::warn!(%digest, %error, "an image cannot be brought to the disk, and will be fetched again");
            self.is_no_more_whole(digest, &format!("it could not be brought to the disk ({error})"))?;
        }
        kill::point(Point::ImageSettled);
        remove(&self.unsynced(digest))
    }

    /// Settles what has lain here for a while and nobody is just removing, and forgets what came to nothing.
    pub(super) fn settle_old(&self) -> Result<(), Error> {
        for entry in entries(&self.dir.join("unsynced"))? {
            let Some(digest) = digest_of(&entry) else { continue };
            let dir = self.disk_dir(&digest);
            // Looked at first: a lock would be in others' way.
            if let Ok(came) = fs::metadata(&dir).and_then(|data| data.modified())
                && (came.elapsed().is_ok_and(|age| age < SETTLED_AFTER) || self.is_doubtful(&digest)?)
            {
                continue;
            }
            // Under the lock nobody makes it anew, and under the lease nobody removes it.
            let Some(_work) = Work::try_lock(&self.partial(), &digest)? else {
                continue;
            };
            if let Some(_lease) = self.lease(&digest)? {
                self.settle(&digest)?;
            } else if !dir.exists() && !self.partial().join(digest.hex()).exists() {
                remove(&entry.path())?;
            }
        }
        Ok(())
    }

    fn unsynced(&self, digest: &Digest) -> PathBuf {
        self.dir.join("unsynced").join(digest.hex())
    }
}

/// What the kernel calls this run of the host.
fn this_run() -> Result<String, Error> {
    fs::read_to_string(BOOT_ID).map_err(Error::storage(BOOT_ID))
}
