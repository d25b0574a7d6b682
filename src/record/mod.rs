//! What is on disk about jobs: versioned plain types, atomic writes, locks.
//!
//! A record is saved *before* each effect, so that whoever comes later (cleanup, a reaper, a host that
//! was rebooted) knows what there may be to undo:
//!
//! ```text
//!            ┌──────────────────── prepare ─────────────────────┐      ┌─ run ─┐
//! Admitted ─▶ Fetching ─▶ Cloning ─▶ Starting ─▶ Booting ─▶ Ready ◀─▶ Running
//!     │           │           ▲──────────│───────────│ again, without KVM
//!     └───────────┴───────────┴──────────┴───────────┴─────────┴──────────┘
//!                                     │ cleanup, where its machine is to stay ──▶ Held
//!                                     │ cleanup, reap, vm rm                       │ reap, vm release
//!                                     ▼                                            ▼
//!                                 Cleaning ◀───────────────────────────────────────┘
//!                                     └─▶ (the folder is gone)
//! ```
//!
//! | state | what may exist beside the record |
//! |---|---|
//! | `Admitted` | a leased slot |
//! | `Fetching` | a share of a download in the store, which the store looks after itself |
//! | `Cloning` | overlay, keys, seed disk, serial log |
//! | `Starting` | the libvirt domain, and what libvirt made for it |
//! | `Booting`, `Ready` | the same |
//! | `Running` | a `cannery run` process, and the script's processes in the guest |
//! | `Held` | as when it was ready: the job is over, and somebody may look at its machine |
//! | `Cleaning` | any of it; nothing may be added any more |
//!
//! `Cleaning` is final: a prepare that is still going finds it at its next step and stops.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

mod caller;
mod files;
mod folder;
mod held;
mod jobs;
mod served;
mod stages;
mod unnamed;

use crate::kill::Point;

pub use caller::Caller;
pub use files::{UNFINISHED, hidden, is_orphan, make_finished, read_json, sweep, write_atomic, write_json};
pub use folder::{DIR_MODE, GROUP, make_shared, open_lock, open_state};
pub use held::{Held, Holder};
pub use jobs::{HISTORY, JobDir, Jobs, Step};
pub use served::{Served, is_served};
pub use stages::{Ending, Outcome, PREPARE, Reason, Stage};
pub use unnamed::{Unnamed, folder_of};

/// The version of [`Record`] that this program writes. A reader accepts no newer one.
pub const VERSION: u32 = 1;

/// The file of a job's folder that holds the job's variables, secrets too, where there is a console.
pub const VARIABLES: &str = "variables";

/// Why a record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The state folder, or something in it, cannot be read or written.
    #[error("cannot {action} {path}: {source}.")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file's content is no record.
    #[error("{path} is damaged: {message}.")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// The file was written by a newer cannery.
    #[error("{path} was written by a newer cannery (record version {version}, this one knows {VERSION}).")]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// The job is being cleaned up, or is gone.
    #[error("job {0} was cleaned up while it was in use.")]
    Gone(JobKey),
    /// Another process holds the record for longer than any step takes.
    #[error("the record of job {0} stayed locked by another cannery process for {1} s.")]
    Locked(JobKey, u64),
}

impl Error {
    /// Is there no room left where the records are?
    fn is_full(&self) -> bool {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        matches!(self, Error::Io { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded))
    }
}

/// A job's name on this host: which coordinator, which job, which try.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobKey {
    /// The first 8 hex digits of SHA-256 of the coordinator's URL.
    pub coordinator: String,
    /// The job's number.
    pub id: u64,
    /// Which try of the runner, from 1.
    pub attempt: u32,
}

impl JobKey {
    /// The key of a coordinator's job.
    pub fn new(coordinator_url: &str, id: u64, attempt: u32) -> Self {
        JobKey {
            coordinator: coordinator_hash(coordinator_url),
            id,
            attempt,
        }
    }

    /// Is this another try of the same job?
    pub fn same_job(&self, other: &JobKey) -> bool {
        self.coordinator == other.coordinator && self.id == other.id
    }

    /// The name of the job's libvirt domain.
    pub fn machine_name(&self) -> String {
        format!("cannery-{self}")
    }
}

/// The short name of a coordinator in keys.
pub fn coordinator_hash(url: &str) -> String {
    hex::encode(&Sha256::digest(url.as_bytes())[..4])
}

impl fmt::Display for JobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}", self.coordinator, self.id, self.attempt)
    }
}

impl FromStr for JobKey {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.split('-');
        let (Some(coordinator), Some(id), Some(attempt), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(());
        };
        let hash_like = coordinator.len() == 8 && coordinator.bytes().all(|b| b.is_ascii_hexdigit());
        let key = JobKey {
            coordinator: coordinator.to_owned(),
            id: id.parse().map_err(|_| ())?,
            attempt: attempt.parse().map_err(|_| ())?,
        };
        // Only the one spelling that is written: "007" names no folder.
        if hash_like && key.to_string() == text {
            Ok(key)
        } else {
            Err(())
        }
    }
}

impl Serialize for JobKey {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for JobKey {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?
            .parse()
            .map_err(|()| serde::de::Error::custom("this is no job key"))
    }
}

/// How far a job is; the module's page draws it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It may start, and has or gets a slot.
    Admitted,
    /// Its image is being fetched.
    Fetching,
    /// Its files are being made.
    Cloning,
    /// Its domain is being created.
    Starting,
    /// Its guest boots.
    Booting,
    /// Its guest answers and waits for scripts.
    Ready,
    /// A script runs.
    Running,
    /// It is over, and its machine stays for a while.
    Held,
    /// It is being removed.
    Cleaning,
}

impl State {
    /// May a job go from `self` to `next`?
    pub fn may_become(self, next: State) -> bool {
        match (self, next) {
            (State::Cleaning, next) => next == State::Cleaning,
            (_, State::Cleaning) | (State::Running, State::Ready | State::Running) => true,
            // Where KVM turned out to hang, the job starts again with emulation.
            (State::Starting | State::Booting, State::Cloning) => true,
            (State::Fetching, State::Fetching) | (State::Held, State::Held) => true,
            (now, next) => next > now,
        }
    }

    /// The point at which the record has just been saved in this state.
    fn saved(self) -> Point {
        match self {
            State::Admitted => Point::SavedAdmitted,
            State::Fetching => Point::SavedFetching,
            State::Cloning => Point::SavedCloning,
            State::Starting => Point::SavedStarting,
            State::Booting => Point::SavedBooting,
            State::Ready => Point::SavedReady,
            State::Running => Point::SavedRunning,
            State::Held => Point::SavedHeld,
            State::Cleaning => Point::SavedCleaning,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            State::Admitted => "admitted",
            State::Fetching => "fetching",
            State::Cloning => "cloning",
            State::Starting => "starting",
            State::Booting => "booting",
            State::Ready => "ready",
            State::Running => "running",
            State::Held => "held",
            State::Cleaning => "cleaning",
        })
    }
}

/// What cannery remembers about a job, from prepare to cleanup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
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
    /// The response file of the runner's try that this belongs to.
    pub session: PathBuf,
    /// [`Claim::Token`]'s hash, for calls that come without a response file; none where the job has no token.
    #[serde(default)]
    pub token: Option<String>,
    /// The gitlab-runner process that will call again.
    pub caller: Caller,
    /// When prepare began.
    pub created: Timestamp,
    /// When no runner can want it any more: the job's time-out and an hour.
    pub deadline: Timestamp,
    /// How far it is.
    pub state: State,
    /// Since when.
    pub since: Timestamp,
    /// The image's full name, once it is decided.
    pub image: Option<String>,
    /// The image's digest, once it is known. While this record is there, the image is in use.
    pub digest: Option<String>,
    /// The slot that it leases.
    pub slot: Option<Slot>,
    /// Its machine, from the moment before it is created.
    pub machine: Option<Machine>,
    /// How its guest is entered, once it answered.
    pub guest: Option<Guest>,
    /// The scripts that may run in its guest: one as a rule, and those whose calls were killed until the next call has ended
    /// them.
    #[serde(default)]
    pub runs: Vec<Run>,
    /// What prepare did and how long each took, in seconds.
    pub phases: Vec<Phase>,
    /// The job's calls so far, the oldest first.
    #[serde(default)]
    pub stages: Vec<Stage>,
    /// For how long its machine stays after its script failed, in seconds; 0 for not at all.
    #[serde(default)]
    pub hold: u64,
    /// Until when its machine stays when the job is over, once that is decided.
    #[serde(default)]
    pub held: Option<Held>,
    /// What the job came to; set when it is over, so that whoever removes it later says the same.
    #[serde(default)]
    pub outcome: Option<Outcome>,
}

/// By what a later call finds the job that prepare made a machine for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claim {
    /// The job response file of the runner's try: no variable of the job can name another one.
    Session(PathBuf),
    /// A call without a response file: what the environment says the job is, and what proves it.
    Token {
        /// The job's number, as its variables have it.
        id: u64,
        /// A hash over the runner's and the job's token, hexadecimal. Another job's author does not know that job's token.
        hash: String,
    },
}

impl Claim {
    /// Is the job of this record the one?
    fn fits(&self, record: &Record) -> bool {
        match self {
            Claim::Session(session) => record.session == *session,
            Claim::Token { id, hash } => record.key.id == *id && record.token.as_ref() == Some(hash),
        }
    }
}

impl Record {
    /// The record of a job that begins: nothing is known but who asked, and until when. The attempt's number in the key is
    /// given by [`Jobs::create`].
    pub fn new(
        key: JobKey,
        session: PathBuf,
        caller: Caller,
        created: Timestamp,
        deadline: Timestamp,
    ) -> Self {
        Record {
            version: VERSION,
            key,
            coordinator: String::new(),
            project: String::new(),
            job: String::new(),
            session,
            token: None,
            caller,
            created,
            deadline,
            state: State::Admitted,
            since: created,
            image: None,
            digest: None,
            slot: None,
            machine: None,
            guest: None,
            runs: Vec::new(),
            phases: Vec::new(),
            stages: Vec::new(),
            hold: 0,
            held: None,
            outcome: None,
        }
    }
}

/// A fixed pair of MAC and address on the network, leased by a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// The libvirt network.
    pub network: String,
    /// The slot's number there, from 0.
    pub index: u32,
    /// Its MAC; none on a network that is not cannery's own.
    pub mac: Option<String>,
    /// Its address; none on a network that is not cannery's own.
    pub address: Option<IpAddr>,
    /// The name of its interface on the host; none on a network that is not cannery's own.
    pub tap: Option<String>,
}

/// A job's libvirt domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// libvirt's connection URI.
    pub uri: String,
    /// The domain's name.
    pub name: String,
    /// The domain's uuid.
    pub uuid: uuid::Uuid,
}

/// How a guest is entered. Keys are files in the job's folder; a password stays in the settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// Its address.
    pub address: IpAddr,
    /// The port of its sshd.
    pub port: u16,
    /// Whom scripts run as.
    pub user: String,
    /// Which way in worked.
    pub entry: Entry,
    /// Its host key, as in a `known_hosts` line without the names.
    pub host_key: String,
    /// The shell that runs scripts.
    pub shell: String,
}

/// Which way into a guest worked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Entry {
    /// The key that was made for the job.
    JobKey,
    /// The private key that the settings name.
    KeyFile,
    /// The password that the settings name.
    Password,
}

/// A script that runs in a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// What all of its processes in the guest carry in their environment.
    pub id: String,
    /// The runner's name for it.
    pub stage: String,
    /// The `cannery run` process.
    pub process: Caller,
}

/// One part of prepare.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// What was done.
    pub name: String,
    /// For how long, in seconds.
    pub seconds: f64,
}

#[cfg(test)]
mod tests;
