//! What is left behind, and what to do about it.
//!
//! One way of removing serves everyone: cleanup, `vm rm`, `reap`, and the sweep at the start of every prepare.
//! [`plan`] decides from facts alone; [`Reaper`] gathers them and carries the decisions out.
//!
//! Removing a job is safe to repeat and to be killed in: domain, then slot, then folder, the record last.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;

mod images;
mod plan;

pub use images::{Images, Keeper, Users, in_use, standing_policy};
use plan::judge;
pub use plan::{Action, Found, Why, World, plan};

use crate::history::{self, Bounds, Entry, History, Removal, Seen, outcome};
use crate::host::Slots;
use crate::image::Store;
use crate::kill::{self, Point};
use crate::machine::{Libvirt, serial, watch};
use crate::outcome::Failure;
use crate::record::{self, Claim, JobDir, JobKey, Jobs, Record, State};
use crate::settings::Settings;

/// Gathers what there is, and removes what is decided.
#[derive(Debug)]
pub struct Reaper {
    state_dir: PathBuf,
    uri: String,
    jobs: Jobs,
    slots: Slots,
    libvirt: Libvirt,
    history: History,
    /// How long cut-off pulls are kept.
    partial_ttl: Duration,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::RemoveJob(key, why) => write!(f, "job {key}: {why}"),
            Action::DestroyDomain(name, _, why) => write!(f, "machine {name}: {why}"),
            Action::RemoveFolder(path, why) => write!(f, "folder {}: {why}", path.display()),
            Action::FreeSlot(lease, why) => {
                write!(f, "slot {} of network {}: {why}", lease.index, lease.network)
            }
        }
    }
}

/// The history of the state folder that these settings name, within their bounds.
pub fn history(settings: &Settings) -> History {
    let bounds = Bounds {
        keep: settings.history_keep,
        bytes: settings.history_size,
    };
    History::at(&settings.state_dir, bounds)
}

impl Reaper {
    /// A reaper for the state folder of these settings.
    pub fn open(settings: &Settings) -> Result<Reaper, Failure> {
        Ok(Reaper {
            state_dir: settings.state_dir.clone(),
            uri: settings.libvirt_uri.clone(),
            jobs: Jobs::open(&settings.state_dir)?,
            slots: Slots::open(&settings.state_dir)?,
            libvirt: Libvirt::open(&settings.libvirt_uri)?,
            history: history(settings),
            partial_ttl: settings.images.partial_ttl,
        })
    }

    /// What there is to do now.
    pub async fn plan(&self) -> Result<Vec<Action>, Failure> {
        // Leases and domains are listed before jobs: what is made meanwhile then has its job in the list.
        let leases = self.slots.leases()?;
        let domains = self.domains().await?;
        let ended = |found: &Found| {
            let machine = found.record.as_ref().and_then(|record| record.machine.as_ref());
            machine.is_some_and(|m| m.uri == self.uri && !domains.iter().any(|(name, _)| *name == m.name))
        };
        let mut jobs: Vec<Found> = self.jobs.list()?.iter().map(found).collect();
        for job in &mut jobs {
            job.machine_gone = ended(job);
        }
        Ok(plan(
            &World {
                jobs,
                domains,
                leases,
                unborn: self.jobs.unborn()?,
            },
            Timestamp::now(),
        ))
    }

    /// Our domains, by name and job. Domains of another state folder are another cannery's.
    async fn domains(&self) -> Result<Vec<(String, JobKey)>, Failure> {
        let known = self.libvirt.list_ours().await?;
        let ours = known
            .into_iter()
            .filter(|d| same_folder(&d.owner.state_dir, &self.state_dir));
        Ok(ours
            .map(|d| {
                let key = JobKey {
                    coordinator: d.owner.coordinator,
                    id: d.owner.job_id,
                    attempt: d.owner.attempt,
                };
                (d.name, key)
            })
            .collect())
    }

    /// Does one thing, unless someone is just working on it, or has done it by now, or it is not as it was when it was
    /// decided: then the answer is false.
    pub async fn apply(&self, action: &Action) -> Result<bool, Failure> {
        tracing::info!(%action, "removing");
        match action {
            Action::RemoveJob(key, why) => match self.jobs.find(key) {
                Some(job) if job.is_busy()? => Ok(false),
                Some(job) => {
                    let still = |record: &Record| {
                        let found = Found {
                            // One that has ended does not come back.
                            machine_gone: *why == Why::MachineGone,
                            ..known(key.clone(), record.clone())
                        };
                        judge(&found, Timestamp::now()).is_some()
                    };
                    self.remove_if(&job, Removal::Abandoned(why.to_string()), still)
                        .await
                }
                None => Ok(false),
            },
            Action::DestroyDomain(name, key, _) => {
                if self.jobs.find(key).is_some() {
                    return Ok(false);
                }
                let destroyed = self.libvirt.destroy(name).await?;
                kill::point(Point::DomainDestroyed);
                Ok(destroyed)
            }
            Action::FreeSlot(lease, _) => Ok(self.slots.free(lease)?),
            Action::RemoveFolder(path, _) => remove_folder(path),
        }
    }

    /// Removes what no runner will come back for. What cannot be removed is for the operator's log, and for the next sweep.
    pub async fn sweep(&self) -> Result<(), Failure> {
        for action in self.plan().await? {
            if let Err(e) = self.apply(&action).await {
                tracing::warn!(%action, "not removed: {e}");
            }
        }
        self.sweep_remains();
        Ok(())
    }

    /// Removes what killed processes left of files that they were just making, and what the history has too much. No job waits
    /// for this: what fails is for the operator's log.
    pub fn sweep_remains(&self) {
        if let Err(e) = self.history.tidy_if_due() {
            tracing::warn!("the history is not tidied: {e}");
        }
        let unborn = self.jobs.unborn().map_err(Failure::from);
        let removed =
            unborn.and_then(|paths| paths.iter().try_for_each(|path| remove_folder(path).map(drop)));
        if let Err(e) = removed {
            tracing::warn!("the folder of jobs is not swept: {e}");
        }
        for folder in ["", "slots", "store", "networks"] {
            let folder = self.state_dir.join(folder);
            if let Err(e) = record::sweep(&folder) {
                tracing::warn!("{} is not swept: {e}", folder.display());
            }
        }
        if let Err(e) = self.slots.sweep() {
            tracing::warn!("the slots are not swept: {e}");
        }
        let store = self.state_dir.join("store");
        if store.is_dir()
            // Opening it is sweeping it.
            && let Err(e) = Store::open_for(&store, self.partial_ttl)
        {
            // Whoever fetches an image next is told.
            tracing::warn!("the store is not swept: {e}");
        }
    }

    /// Removes a job with all that it has, at whatever point it is, after whoever is just working on it.
    pub async fn remove(&self, job: &JobDir, removal: Removal) -> Result<(), Failure> {
        tracing::info!(job = %job.key(), "removing");
        self.remove_if(job, removal, |_| true).await.map(drop)
    }

    async fn remove_if(
        &self,
        job: &JobDir,
        removal: Removal,
        permit: impl FnOnce(&Record) -> bool,
    ) -> Result<bool, Failure> {
        let step = match job.enter_if(State::Cleaning, permit, |record| conclude(record, &removal)) {
            Ok(None) => return Ok(false),
            Ok(step) => step,
            // Removed meanwhile: the folder goes last.
            Err(record::Error::Gone(_)) if !job.is_there() => return Ok(false),
            // A folder whose record is gone already or unreadable: the key says enough.
            Err(record::Error::Gone(_) | record::Error::Damaged { .. }) => None,
            Err(e) => return Err(e.into()),
        };
        let memory = match &step {
            Some(step) => memory(job, &step.record).await,
            None => None,
        };
        let remembered = self.remember(memory.as_ref());
        let machine = step.as_ref().and_then(|s| s.record.machine.clone());
        let name = machine
            .as_ref()
            .map_or_else(|| job.key().machine_name(), |m| m.name.clone());
        match machine {
            // Another [[runners]] may have started it on another libvirt.
            Some(m) if m.uri != self.uri => Libvirt::open(&m.uri)?.destroy(&name).await?,
            // Without a machine in the record there is none: it is saved before libvirt is asked.
            None if step.is_some() => false,
            _ => self.libvirt.destroy(&name).await?,
        };
        kill::point(Point::DomainDestroyed);
        self.slots.release(job.key())?;
        job.remove(step)?;
        // A file system that was full has room now.
        if let Err(e) = remembered.or_else(|_| self.remember(memory.as_ref())) {
            tracing::warn!(job = %job.key(), "the job is not remembered: {e}");
        }
        Ok(true)
    }

    /// Adds a job to the history.
    fn remember(&self, memory: Option<&(Entry, Seen)>) -> Result<(), record::Error> {
        memory.map_or(Ok(()), |(entry, seen)| self.history.add(entry, seen))
    }

    /// Removes what is claimed, but for machines that are to stay: the answer is which, and until when. Nothing is fine too.
    pub async fn remove_claimed(&self, claim: &Claim) -> Result<Vec<(JobKey, Timestamp)>, Failure> {
        let mut stay = Vec::new();
        for (job, record) in self.jobs.claimed(claim)? {
            match self.hold(&job, &record).await? {
                Some(until) => stay.push((job.key().clone(), until)),
                None => self.remove(&job, Removal::Cleanup).await?,
            }
        }
        self.sweep_remains();
        Ok(stay)
    }

    /// Lets the machine of a job that is over stay, if it is to stay and is there; until when it does.
    async fn hold(&self, job: &JobDir, record: &Record) -> Result<Option<Timestamp>, Failure> {
        let now = Timestamp::now();
        let (Some(_), Some(machine)) = (record.held_until(now), &record.machine) else {
            return Ok(None);
        };
        let libvirt = Libvirt::open(&machine.uri)?;
        if matches!(
            libvirt.state(&machine.name).await?,
            watch::State::Gone | watch::State::Ending
        ) {
            return Ok(None);
        }
        let wanted = |record: &Record| record.held_until(now).is_some();
        match job.enter_if(State::Held, wanted, |record| conclude(record, &Removal::Cleanup)) {
            Ok(Some(step)) => Ok(step.record.held.as_ref().map(|held| held.until)),
            // Released, or being removed, in this very moment.
            Ok(None) | Err(record::Error::Gone(_)) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Removes what earlier tries of a job have left, but for machines that are held: a job runs once at a time.
    pub async fn remove_tries(&self, coordinator: &str, id: u64) -> Result<(), Failure> {
        let (_, left) = self.tries(coordinator, id)?;
        for job in left {
            self.remove(&job, Removal::Abandoned(BEGUN_AGAIN.to_owned()))
                .await?;
        }
        Ok(())
    }

    /// Removes the held machines of earlier tries of a job, for whose next try there is no room; how many.
    pub async fn remove_held_tries(&self, coordinator: &str, id: u64) -> Result<usize, Failure> {
        let (held, _) = self.tries(coordinator, id)?;
        for job in &held {
            self.remove(job, Removal::Abandoned(BEGUN_AGAIN.to_owned()))
                .await?;
        }
        Ok(held.len())
    }

    /// The tries of a job that are here: those whose machines are held, and the others.
    fn tries(&self, coordinator: &str, id: u64) -> Result<(Vec<JobDir>, Vec<JobDir>), Failure> {
        let wanted = JobKey::new(coordinator, id, 0);
        let now = Timestamp::now();
        let tries = self.jobs.list()?.into_iter();
        Ok(tries
            .filter(|job| job.key().same_job(&wanted))
            .partition(|job| matches!(job.read(), Ok(Some(record)) if record.is_held(now))))
    }
}

/// What the job came to, unless that was decided when it was over.
fn conclude(record: &mut Record, removal: &Removal) {
    let busy = record.runs.iter().any(|run| run.process.is_alive());
    if record.outcome.is_none() {
        record.outcome = Some(outcome(record, removal, busy));
    }
}

/// Why a try goes that the runner did not clean up.
const BEGUN_AGAIN: &str = "gitlab-runner began the job again without cleaning up";

/// The picture of its screen in the folder of a job that failed.
pub const SCREEN: &str = "screen.png";

/// What is to be remembered of a job that is about to be removed: its story, the end of its serial log, and its screen if it failed.
async fn memory(job: &JobDir, record: &Record) -> Option<(Entry, Seen)> {
    let entry = Entry::of(record.clone(), record.outcome.clone()?, Timestamp::now());
    let serial = serial::last_bytes(&job.file("serial.log"), history::SERIAL_BYTES).unwrap_or_else(|e| {
        tracing::warn!(job = %job.key(), "the serial log is not remembered: {e}");
        Vec::new()
    });
    let screen = match std::fs::read(job.file(SCREEN)) {
        Ok(picture) => Some(picture),
        Err(_) if entry.outcome.is_failure() => screen(record).await,
        Err(_) => None,
    };
    Some((entry, Seen { serial, screen }))
}

/// The screen of a machine that is still there.
async fn screen(record: &Record) -> Option<Vec<u8>> {
    let machine = record.machine.as_ref()?;
    let seen = async { Libvirt::open(&machine.uri)?.screenshot(&machine.name).await };
    // A machine that has ended has no screen to show, and that is no news.
    seen.await.ok()
}

/// What is known about a job's folder.
fn found(job: &JobDir) -> Found {
    let record = match job.read() {
        Ok(record) => record,
        Err(record::Error::Newer { .. } | record::Error::Io { .. }) => {
            return Found {
                foreign: true,
                ..Found::unknown(job.key().clone())
            };
        }
        Err(_) => None,
    };
    match record {
        Some(record) => known(job.key().clone(), record),
        None => Found::unknown(job.key().clone()),
    }
}

/// What is known about a job by its record.
fn known(key: JobKey, record: Record) -> Found {
    Found {
        key,
        caller_alive: record.caller.is_alive(),
        rebooted: record.caller.was_before_this_boot(),
        session_over: is_over(&record),
        machine_gone: false,
        foreign: false,
        record: Some(record),
    }
}

/// Has the runner removed the file that it keeps for as long as a job takes? Where it lives and sees other files than this process
/// does, as with a `/tmp` of its own, what it sees counts.
fn is_over(record: &Record) -> bool {
    if !is_gone(&record.session) {
        return false;
    }
    let of = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    let caller = record.caller.pid.to_string();
    let elsewhere = record.caller.is_alive() && of(&caller).is_some_and(|theirs| Some(theirs) != of("self"));
    let path = record.session.strip_prefix("/").unwrap_or(&record.session);
    !elsewhere || is_gone(&Path::new("/proc").join(caller).join("root").join(path))
}

/// Removes a folder that never became a job's; false where somebody else was quicker.
fn remove_folder(path: &Path) -> Result<bool, Failure> {
    match std::fs::remove_dir_all(path) {
        Ok(()) => {
            kill::point(Point::RemainSwept);
            Ok(true)
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(Failure::system(format!("cannot remove {}: {e}", path.display()))),
    }
}

/// Is the file certainly not there? One that cannot be looked at counts as there.
fn is_gone(path: &Path) -> bool {
    matches!(path.symlink_metadata(), Err(e) if e.kind() == std::io::ErrorKind::NotFound)
}

fn same_folder(a: &Path, b: &Path) -> bool {
    a == b || matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Caller;

    /// A reaper of an empty state folder, on libvirt's own test driver.
    fn reaper(state_dir: &Path) -> Reaper {
        let bounds = Bounds {
            keep: Duration::from_secs(60),
            bytes: 1 << 20,
        };
        Reaper {
            state_dir: state_dir.to_owned(),
            uri: "test:///default".to_owned(),
            jobs: Jobs::open(state_dir).unwrap(),
            slots: Slots::open(state_dir).unwrap(),
            libvirt: Libvirt::open("test:///default").unwrap(),
            history: History::at(state_dir, bounds),
            partial_ttl: Duration::from_secs(60),
        }
    }

    #[tokio::test]
    async fn what_somebody_else_removed_in_the_last_moment_is_not_called_removed() {
        let folder = tempfile::tempdir().unwrap();
        let reaper = reaper(folder.path());
        let now = Timestamp::now();
        let record = Record::new(
            JobKey::new("https://gitlab.example.com", 7, 1),
            "/session".into(),
            Caller::this(),
            now,
            now,
        );
        let job = reaper.jobs.create(record).unwrap();
        let key = job.key().clone();
        let remove = Action::RemoveJob(key.clone(), Why::HalfRemoved);
        // As `cleanup` does between the look at the job and the step.
        reaper.remove(&job, Removal::Cleanup).await.unwrap();
        let why = Removal::Abandoned(Why::HalfRemoved.to_string());
        assert!(!reaper.remove_if(&job, why, |_| true).await.unwrap());
        // As it does between the plan and the look.
        assert!(!reaper.apply(&remove).await.unwrap());
        // A folder without a record is a removal that was killed, and ours to finish.
        let bare = folder.path().join("jobs").join(key.to_string());
        std::fs::create_dir(&bare).unwrap();
        assert!(reaper.apply(&remove).await.unwrap());
        assert!(!bare.exists());

        let unborn = folder.path().join("jobs/.unborn");
        let remove = Action::RemoveFolder(unborn.clone(), Why::NoJob);
        assert!(!reaper.apply(&remove).await.unwrap());
        std::fs::create_dir(&unborn).unwrap();
        assert!(reaper.apply(&remove).await.unwrap());
    }
}
