//! The folder of jobs, and a job's own folder.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::caller::exists;
use super::files::maker;
use super::folder::DIR_MODE;
use super::{
    Claim, Error, JobKey, Record, State, VERSION, make_shared, open_lock, open_state, read_json, write_json,
};
use crate::kill::{self, Point};

/// Longer than any single step of a job takes: the longest is a start that libvirt is given three minutes for.
const LOCK_DEADLINE: Duration = Duration::from_secs(200);
/// How often a lock is tried meanwhile.
const LOCK_POLL: Duration = Duration::from_millis(20);
/// Records hold no secret.
const RECORD_MODE: u32 = 0o664;

/// The folder of the state folder where removed jobs are remembered, by their keys.
pub const HISTORY: &str = "history";

/// The folder `jobs` of the state folder.
#[derive(Debug, Clone)]
pub struct Jobs {
    dir: PathBuf,
    history: PathBuf,
}

/// One job's own folder: its record, overlay, keys and logs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobDir {
    dir: PathBuf,
    key: JobKey,
}

/// A step of a job: while this is held nobody else changes the job, and its record says what is being done.
#[derive(Debug)]
#[must_use = "the job is locked for as long as this is held"]
pub struct Step {
    _lock: File,
    /// The record as saved.
    pub record: Record,
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { action, path, source }
}

/// What is in a folder; one that is missing has nothing.
fn entries(dir: &Path) -> Result<Vec<fs::DirEntry>, Error> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(io_error("list", dir))?,
    };
    entries.collect::<Result<_, _>>().map_err(io_error("list", dir))
}

/// The job whose name an entry has, if it is one.
fn key_of(entry: &fs::DirEntry) -> Option<JobKey> {
    entry.file_name().to_str()?.parse().ok()
}

/// Is the open file still the one of this name?
fn is_at(file: &File, path: &Path) -> bool {
    let same = |a: &fs::Metadata, b: &fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    matches!((file.metadata(), fs::metadata(path)), (Ok(a), Ok(b)) if same(&a, &b))
}

impl Jobs {
    /// Opens the folder in a state folder, and makes it where it is missing.
    pub fn open(state_dir: &Path) -> Result<Self, Error> {
        open_state(state_dir)?;
        let dir = state_dir.join("jobs");
        make_shared(&dir).map_err(io_error("create the folder", &dir))?;
        Ok(Jobs {
            dir,
            history: state_dir.join(HISTORY),
        })
    }

    /// The folder in a state folder as it is; one that is missing has no jobs.
    pub fn look(state_dir: &Path) -> Self {
        Jobs {
            dir: state_dir.join("jobs"),
            history: state_dir.join(HISTORY),
        }
    }

    /// Folders that a process began to make for a job, or had all but removed, when it was killed: nothing else of the job is
    /// there.
    pub fn unborn(&self) -> Result<Vec<PathBuf>, Error> {
        let unborn = |entry: &fs::DirEntry| {
            let name = entry.file_name();
            let name = name.to_str()?.strip_prefix('.')?;
            let maker = maker(name)?;
            name.rsplit_once('.')?.0.parse::<JobKey>().ok()?;
            Some(!exists(maker))
        };
        Ok(entries(&self.dir)?
            .into_iter()
            .filter(|entry| unborn(entry) == Some(true))
            .map(|e| e.path())
            .collect())
    }

    /// All jobs' folders, in order; what is no job's folder is passed over.
    pub fn list(&self) -> Result<Vec<JobDir>, Error> {
        let mut jobs = Vec::new();
        for entry in entries(&self.dir)? {
            if let Some(key) = key_of(&entry) {
                jobs.push(JobDir {
                    dir: entry.path(),
                    key,
                });
            }
        }
        jobs.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(jobs)
    }

    /// The jobs of a claim, with their records: one as a rule, none before prepare and after cleanup.
    ///
    /// A record that cannot be read is in nobody's way here; the reaper sees to it.
    pub fn claimed(&self, claim: &Claim) -> Result<Vec<(JobDir, Record)>, Error> {
        let with_record = |job: JobDir| job.read().ok().flatten().map(|record| (job, record));
        Ok(self
            .list()?
            .into_iter()
            .filter_map(with_record)
            .filter(|(_, record)| claim.fits(record))
            .collect())
    }

    /// The job of this key, if it has a folder.
    pub fn find(&self, key: &JobKey) -> Option<JobDir> {
        let dir = self.dir.join(key.to_string());
        dir.is_dir().then(|| JobDir {
            dir,
            key: key.clone(),
        })
    }

    /// The number of a job's next try, which none has that is here or that is remembered.
    pub fn next_attempt(&self, job: &JobKey) -> Result<u32, Error> {
        // A history that cannot be read keeps no job from running.
        let remembered = entries(&self.history).unwrap_or_default();
        let here = entries(&self.dir)?;
        let tries = remembered.iter().chain(&here).filter_map(key_of);
        let last = tries.filter(|key| key.same_job(job)).map(|key| key.attempt).max();
        Ok(last.map_or(1, |n| n.saturating_add(1)))
    }

    /// Makes the folder and the record of a job's next try; `record.key.attempt` is set here.
    ///
    /// The folder appears with the record in it, so that nobody sees one without the other.
    pub fn create(&self, mut record: Record) -> Result<JobDir, Error> {
        loop {
            record.key.attempt = self.next_attempt(&record.key)?;
            let dir = self.dir.join(record.key.to_string());
            let hidden = self.dir.join(format!(".{}.{}", record.key, std::process::id()));
            let mut builder = DirBuilder::new();
            match builder.mode(DIR_MODE).create(&hidden) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                made => made.map_err(io_error("create the folder", &hidden))?,
            }
            let job = JobDir {
                dir: hidden.clone(),
                key: record.key.clone(),
            };
            // The umask must not keep QEMU out, nor the group.
            let mode = std::os::unix::fs::PermissionsExt::from_mode(DIR_MODE);
            fs::set_permissions(&hidden, mode).map_err(io_error("set the mode of", &hidden))?;
            kill::point(Point::JobBegun);
            if let Err(e) = write_json(&job.record_path(), &record, RECORD_MODE) {
                // What cannot be removed either is for the reaper.
                let _ = fs::remove_dir_all(&hidden);
                return Err(e);
            }
            match fs::rename(&hidden, &dir) {
                Ok(()) => {
                    kill::point(State::Admitted.saved());
                    return Ok(JobDir { dir, key: record.key });
                }
                // Another process made the same try's folder meanwhile: take the next number.
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists
                    ) =>
                {
                    fs::remove_dir_all(&hidden).map_err(io_error("remove", &hidden))?;
                }
                Err(e) => return Err(io_error("create the folder", &dir)(e)),
            }
        }
    }
}

impl JobDir {
    /// The job's name on this host.
    pub fn key(&self) -> &JobKey {
        &self.key
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// A file in the folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn record_path(&self) -> PathBuf {
        self.file("record.json")
    }

    /// The record as it is now; `None` where the folder has none (a kill in the middle of a removal).
    pub fn read(&self) -> Result<Option<Record>, Error> {
        let path = self.record_path();
        #[derive(serde::Deserialize)]
        struct Version {
            version: u32,
        }
        match read_json::<Version>(&path)? {
            Some(Version { version }) if version > VERSION => Err(Error::Newer { path, version }),
            Some(_) => read_json(&path),
            None => Ok(None),
        }
    }

    /// Takes the next step: saves the new state and what `change` adds, and keeps the job locked until
    /// the step is dropped. Fails with [`Error::Gone`] once the job is being cleaned up.
    pub fn enter(&self, state: State, change: impl FnOnce(&mut Record)) -> Result<Step, Error> {
        let step = self.enter_if(state, |_| true, change)?;
        step.ok_or_else(|| Error::Gone(self.key.clone()))
    }

    /// Takes the next step as [`JobDir::enter`] does, if the record is still one that `permit` lets: what was
    /// decided from an earlier look may be out of date by the time that the job is locked.
    pub fn enter_if(
        &self,
        state: State,
        permit: impl FnOnce(&Record) -> bool,
        change: impl FnOnce(&mut Record),
    ) -> Result<Option<Step>, Error> {
        let lock = self.lock()?;
        let Some(mut record) = self.read()? else {
            return Err(Error::Gone(self.key.clone()));
        };
        if !record.state.may_become(state) {
            return Err(Error::Gone(self.key.clone()));
        }
        if !permit(&record) {
            return Ok(None);
        }
        // It still sees the state that ends.
        change(&mut record);
        record.state = state;
        record.since = Timestamp::now();
        match write_json(&self.record_path(), &record, RECORD_MODE) {
            // Cleaning up is what makes room. Nobody else takes a step of the job meanwhile, since it is locked; and a kill leaves
            // the record as it was, to begin again.
            Err(e) if state == State::Cleaning && e.is_full() => {}
            written => written?,
        }
        kill::point(state.saved());
        Ok(Some(Step { _lock: lock, record }))
    }

    /// Adds to the record what is no step. Fails with [`Error::Gone`] once the job is being cleaned up.
    pub fn note(&self, change: impl FnOnce(&mut Record)) -> Result<(), Error> {
        let _lock = self.lock()?;
        match self.read()? {
            Some(mut record) if record.state != State::Cleaning => {
                change(&mut record);
                write_json(&self.record_path(), &record, RECORD_MODE)
            }
            _ => Err(Error::Gone(self.key.clone())),
        }
    }

    /// Is the folder still there?
    pub fn is_there(&self) -> bool {
        self.dir.is_dir()
    }

    /// Is someone just taking a step of this job?
    pub fn is_busy(&self) -> Result<bool, Error> {
        let path = self.file("lock");
        let file = match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            opened => opened.map_err(io_error("open", &path))?,
        };
        match file.try_lock() {
            Ok(()) => Ok(false),
            Err(fs::TryLockError::WouldBlock) => Ok(true),
            Err(fs::TryLockError::Error(e)) => Err(io_error("lock", &path)(e)),
        }
    }

    /// Waits for whoever takes a step of this job.
    fn lock(&self) -> Result<File, Error> {
        let path = self.file("lock");
        let begin = Instant::now();
        loop {
            let file = match open_lock(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(Error::Gone(self.key.clone())),
                opened => opened.map_err(io_error("open", &path))?,
            };
            match file.try_lock() {
                Ok(()) if is_at(&file, &path) => return Ok(file),
                // Removed since it was opened, perhaps made anew: that one counts.
                Ok(()) => {}
                Err(fs::TryLockError::WouldBlock) if begin.elapsed() < LOCK_DEADLINE => {
                    std::thread::sleep(LOCK_POLL)
                }
                Err(fs::TryLockError::WouldBlock) => {
                    return Err(Error::Locked(self.key.clone(), LOCK_DEADLINE.as_secs()));
                }
                Err(fs::TryLockError::Error(e)) => return Err(io_error("lock", &path)(e)),
            }
        }
    }

    /// Removes the folder. The record goes last: a kill before leaves what the next removal recognises. The step is the proof
    /// that nobody else works on the job.
    pub fn remove(&self, step: Option<Step>) -> Result<(), Error> {
        let absent_is_fine = |result: io::Result<()>, path: &Path| match result {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(io_error("remove", path)),
        };
        let entries = match fs::read_dir(&self.dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(io_error("list", &self.dir))?,
        };
        for entry in entries {
            let entry = entry.map_err(io_error("list", &self.dir))?;
            let path = entry.path();
            if ["record.json", "lock"]
                .iter()
                .any(|keep| entry.file_name() == *keep)
            {
                continue;
            }
            let directory = entry.file_type().map_err(io_error("look at", &path))?.is_dir();
            let removed = if directory {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
            absent_is_fine(removed, &path)?;
            kill::point(Point::FileRemoved);
        }
        // From here on nobody finds the job: a kill leaves a folder without a name, as one in a job's making does.
        let hidden = self
            .dir
            .with_file_name(format!(".{}.{}", self.key, std::process::id()));
        absent_is_fine(fs::rename(&self.dir, &hidden), &self.dir)?;
        kill::point(Point::FolderHidden);
        absent_is_fine(fs::remove_dir_all(&hidden), &hidden)?;
        kill::point(Point::FolderRemoved);
        drop(step);
        Ok(())
    }
}
