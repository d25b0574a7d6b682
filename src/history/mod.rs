//! What is remembered about a job after it was removed: what it came to, how long each part took, what its guest said last.
//!
//! ```text
//! history/KEY/history.json   an Entry
//!             serial.log     the end of the guest's serial log, as the guest wrote it
//!             screen.png     the screen of a job that failed, where it had one
//! history/.KEY.PID           one that is just being written
//! history/.tidied            when it was last tidied
//! ```
//!
//! An entry appears whole, and is never changed: of two who write the same one, the first wins. It holds nothing secret: no
//! variable, token, password or key. What a guest writes on its serial port is the guest's.
//!
//! | step | pure core |
//! |---|---|
//! | what a job came to | [`outcome`] |
//! | that in words | [`Outcome::answer`] |
//! | which entries go | [`surplus`] |

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::kill::{self, Point};
use crate::record::{
    DIR_MODE, Error, HISTORY, JobKey, Jobs, Outcome, Phase, Record, Stage, is_orphan, make_shared, read_json,
};

mod answer;
mod outcome;
mod retention;

pub use outcome::{Removal, is_script, outcome, verdict};
pub use retention::{Bounds, Kept, surplus};

/// The version of [`Entry`] that this program writes. Newer ones are passed over.
pub const VERSION: u32 = 1;
/// How much of a serial log is kept, in bytes: a boot and the last words.
pub const SERIAL_BYTES: usize = 64 << 10;

/// The largest picture of a screen that is kept, in bytes: text takes some ten thousand, a desktop a million.
pub const SCREEN_BYTES: usize = 2 << 20;

const ENTRY: &str = "history.json";
const SERIAL: &str = "serial.log";
const SCREEN: &str = "screen.png";
const TIDIED: &str = ".tidied";
/// As the job's record.
const ENTRY_MODE: u32 = 0o664;
/// As the job's serial log: for whoever calls cannery, and its group.
const SEEN_MODE: u32 = 0o640;
/// How often entries are looked through after one was written: a host that ends many jobs need not do it for each.
const TIDY_EVERY: Duration = Duration::from_secs(60);
/// The most entries that one look removes, so that no job waits long for it; the next one goes on.
const MOST_REMOVED: usize = 500;
/// What an entry takes beside its files' bytes: blocks that they fill in part, and the folder.
const OVERHEAD: u64 = 8 << 10;

/// A job that was removed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// The version of this format: [`VERSION`].
    pub version: u32,
    /// The job's name on this host.
    pub key: JobKey,
    /// The GitLab instance's URL, without credentials.
    pub coordinator: String,
    /// The project's full path.
    pub project: String,
    /// The job's name in `.gitlab-ci.yml`.
    pub job: String,
    /// The image's full name, or what the job calls it where it was not decided.
    pub image: Option<String>,
    /// The image's digest, where it came so far.
    pub digest: Option<String>,
    /// When prepare began.
    pub created: Timestamp,
    /// When it was removed.
    pub removed: Timestamp,
    /// How long it took, in seconds, until its last call ended; none where nobody saw that.
    pub seconds: Option<f64>,
    /// What it came to.
    pub outcome: Outcome,
    /// What prepare did and how long each took, in seconds.
    pub phases: Vec<Phase>,
    /// The job's calls, the oldest first.
    pub stages: Vec<Stage>,
}

impl Entry {
    /// What is remembered of a record, with this outcome.
    pub fn of(record: Record, outcome: Outcome, now: Timestamp) -> Entry {
        Entry {
            version: VERSION,
            seconds: took(&record, &outcome, now),
            key: record.key,
            coordinator: record.coordinator,
            project: record.project,
            job: record.job,
            image: record.image,
            digest: record.digest,
            created: record.created,
            removed: now,
            outcome,
            phases: record.phases,
            stages: record.stages,
        }
    }
}

/// How long a job took: until its last call ended, or until it was ended in one.
fn took(record: &Record, outcome: &Outcome, now: Timestamp) -> Option<f64> {
    let last = record.stages.last()?;
    let since = |end: Timestamp| end.duration_since(record.created).as_secs_f64().max(0.0);
    match (last.seconds, outcome) {
        (Some(seconds), _) => Some(since(last.started) + seconds),
        (None, Outcome::Abandoned { .. } | Outcome::Killed { .. }) => None,
        (None, _) => Some(since(now)),
    }
}

/// What a guest showed last.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// The end of its serial log.
    pub serial: Vec<u8>,
    /// Its screen as PNG, if it is kept.
    pub screen: Option<Vec<u8>>,
}

/// The folder of the jobs that were removed.
#[derive(Debug, Clone)]
pub struct History {
    dir: PathBuf,
    bounds: Bounds,
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { action, path, source }
}

impl History {
    /// The folder in a state folder, which is made when something is to be remembered.
    pub fn at(state_dir: &Path, bounds: Bounds) -> Self {
        History {
            dir: state_dir.join(HISTORY),
            bounds,
        }
    }

    /// Remembers a job with what its guest showed last. One that is remembered already stays as it is.
    pub fn add(&self, entry: &Entry, seen: &Seen) -> Result<(), Error> {
        if self.bounds.keep_nothing() {
            return Ok(());
        }
        self.write(entry, seen).map(drop)
    }

    /// Remembers a job that ended before it had a folder; gives it its try's number.
    pub fn add_without_folder(&self, jobs: &Jobs, mut entry: Entry) -> Result<(), Error> {
        if self.bounds.keep_nothing() {
            return Ok(());
        }
        loop {
            entry.key.attempt = jobs.next_attempt(&entry.key)?;
            // Another process may take the same number meanwhile.
            if self.write(&entry, &Seen::default())? {
                return Ok(());
            }
        }
    }

    /// Writes an entry; the answer is false where there is one of this name.
    fn write(&self, entry: &Entry, seen: &Seen) -> Result<bool, Error> {
        make_shared(&self.dir).map_err(io_error("create the folder", &self.dir))?;
        let place = self.entry_dir(&entry.key);
        let hidden = self.dir.join(format!(".{}.{}", entry.key, std::process::id()));
        let filled = fill(&hidden, entry, seen).inspect(|()| kill::point(Point::HistoryBegun));
        let written = filled.and_then(|()| match fs::rename(&hidden, &place) {
            Ok(()) => {
                kill::point(Point::HistoryKept);
                Ok(true)
            }
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists
                ) =>
            {
                Ok(false)
            }
            Err(e) => Err(io_error("create the folder", &place)(e)),
        });
        if !matches!(written, Ok(true)) {
            // What cannot be removed either is tidied away later.
            let _ = fs::remove_dir_all(&hidden);
        }
        written
    }

    fn entry_dir(&self, key: &JobKey) -> PathBuf {
        self.dir.join(key.to_string())
    }

    /// Where the end of a remembered job's serial log is.
    pub fn serial_log(&self, key: &JobKey) -> PathBuf {
        self.entry_dir(key).join(SERIAL)
    }

    /// Where the picture of a remembered job's screen is, if there is one.
    pub fn screen(&self, key: &JobKey) -> Option<PathBuf> {
        let path = self.entry_dir(key).join(SCREEN);
        path.is_file().then_some(path)
    }

    /// All jobs that are remembered, in no order. What a host that lost its power has half written, and what a newer cannery
    /// wrote, is passed over.
    pub fn list(&self) -> Result<Vec<Entry>, Error> {
        let mut entries = Vec::new();
        for (_, path) in self.folders(|name| name.parse::<JobKey>().ok())? {
            match read_json::<Entry>(&path.join(ENTRY)) {
                Ok(Some(entry)) if entry.version <= VERSION => entries.push(entry),
                Ok(_) | Err(Error::Damaged { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(entries)
    }

    /// What of the folder has a name that `wanted` knows.
    fn folders<T>(&self, wanted: impl Fn(&str) -> Option<T>) -> Result<Vec<(T, PathBuf)>, Error> {
        let entries = match fs::read_dir(&self.dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(io_error("list", &self.dir))?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(io_error("list", &self.dir))?;
            if let Some(what) = entry.file_name().to_str().and_then(&wanted) {
                found.push((what, entry.path()));
            }
        }
        Ok(found)
    }

    /// Removes what killed processes left half written, and tidies unless that was done just now.
    pub fn tidy_if_due(&self) -> Result<(), Error> {
        let last = self
            .dir
            .join(TIDIED)
            .metadata()
            .and_then(|about| about.modified());
        // A stamp of the future was written by a clock that was wrong.
        let recent = |at: SystemTime| at.elapsed().is_ok_and(|age| age < TIDY_EVERY);
        if last.is_ok_and(recent) {
            self.sweep()
        } else {
            self.tidy()
        }
    }

    /// Removes what is too old, what is too much, and what killed processes left half written.
    pub fn tidy(&self) -> Result<(), Error> {
        if !self.dir.is_dir() {
            return Ok(());
        }
        self.stamp()?;
        self.sweep()?;
        let kept = self
            .folders(|name| name.parse::<JobKey>().ok())?
            .into_iter()
            .filter_map(|(key, path)| weigh(key, &path))
            .collect();
        for key in surplus(kept, &self.bounds, SystemTime::now())
            .into_iter()
            .take(MOST_REMOVED)
        {
            removed(&self.entry_dir(&key))?;
        }
        Ok(())
    }

    /// Removes what killed processes left half written.
    fn sweep(&self) -> Result<(), Error> {
        let dead = |name: &str| (name.starts_with('.') && is_orphan(name)).then_some(());
        for ((), path) in self.folders(dead)? {
            removed(&path)?;
        }
        Ok(())
    }

    /// Notes that it is being tidied. A file that another user made is made anew, since only its owner may set its time.
    fn stamp(&self) -> Result<(), Error> {
        let path = self.dir.join(TIDIED);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io_error("remove", &path)(e)),
            _ => {}
        }
        File::create(&path).map(drop).map_err(io_error("write", &path))
    }
}

/// Makes an entry's folder with all that belongs in it.
///
/// Nothing waits for the disk: a host that loses its power may lose what it last remembered, and no job pays for that.
fn fill(dir: &Path, entry: &Entry, seen: &Seen) -> Result<(), Error> {
    // One of this process's own, or of one that was killed and had the same number.
    removed(dir)?;
    DirBuilder::new()
        .mode(DIR_MODE)
        .create(dir)
        .map_err(io_error("create the folder", dir))?;
    // Whoever of the group comes later must be able to remove it, whatever the umask is.
    fs::set_permissions(dir, Permissions::from_mode(DIR_MODE)).map_err(io_error("set the mode of", dir))?;
    let path = dir.join(ENTRY);
    let mut text =
        serde_json::to_vec_pretty(entry).map_err(|e| io_error("write", &path)(io::Error::from(e)))?;
    text.push(b'\n');
    let mut files = vec![
        (path, text.as_slice(), ENTRY_MODE),
        (dir.join(SERIAL), seen.serial.as_slice(), SEEN_MODE),
    ];
    if let Some(screen) = seen.screen.as_ref().filter(|screen| screen.len() <= SCREEN_BYTES) {
        files.push((dir.join(SCREEN), screen, SEEN_MODE));
    }
    for (path, content, mode) in files {
        let written = (|| {
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(mode)
                .open(&path)?;
            file.set_permissions(Permissions::from_mode(mode))?;
            file.write_all(content)
        })();
        written.map_err(io_error("write", &path))?;
    }
    Ok(())
}

/// Removes a folder; that it is gone already is fine.
fn removed(dir: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(io_error("remove", dir)),
    }
}

/// How old and how large an entry is; none that is just being removed by somebody else.
fn weigh(key: JobKey, dir: &Path) -> Option<Kept> {
    let written = dir.metadata().and_then(|about| about.modified()).ok()?;
    let length = |name| dir.join(name).metadata().map_or(0, |about| about.len());
    Some(Kept {
        key,
        written,
        bytes: length(ENTRY) + length(SERIAL) + length(SCREEN) + OVERHEAD,
    })
}

#[cfg(test)]
mod tests;
