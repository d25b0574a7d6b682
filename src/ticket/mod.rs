//! Tickets: short-lived secrets, each of which opens the console of one machine.
//!
//! A ticket is shown once, to whoever it is for. What stays is its SHA-256 and what it allows, as a file in the folder of its job:
//!
//! ```text
//! jobs/KEY/tickets/SHA256.json    {mode, minted, expires, viewers, by}
//! ```
//!
//! So a ticket is looked up by its hash, which tells whoever measures the time nothing about other tickets; whoever reads the files
//! learns no ticket; and a job that is removed takes its tickets along. A job that is being cleaned up has none any more, whatever
//! its folder still holds. A session that was opened with a ticket lives as long as the ticket's file: taking that away ends it.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use openssl::rand::rand_bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::kill::{self, Point};
use crate::record::{self, JobDir, JobKey, Jobs, State};
use crate::secret::Secret;

/// Random bytes in a ticket: 160 bits.
const BYTES: usize = 20;
/// A text that is longer is no ticket. SPICE clients take no longer passwords than this.
pub const LONGEST: usize = 60;
/// The folder of a job's tickets in its own.
const FOLDER: &str = "tickets";
/// The group that shares the state may take tickets away; others may not even see their names.
const FOLDER_MODE: u32 = 0o2770;
const FILE_MODE: u32 = 0o660;
/// Digits of a hash that people see.
const SHOWN: usize = 12;
/// The end of a ticket that is good for as long as its job has a machine.
pub const WITH_THE_JOB: Timestamp = Timestamp::MAX;
/// No session lasts longer, whatever goes on in it: no job that somebody watches takes longer. So long after its end a ticket's file is
/// of use to nobody.
pub const LONGEST_SESSION: Duration = Duration::from_secs(24 * 3600);
/// The version of [`Grant`] that this program writes. A ticket of a newer one opens nothing.
const VERSION: u32 = 1;

/// Why a ticket cannot be minted, found or taken away.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system gave no random numbers.
    #[error("the system has no random numbers: {0}.")]
    Random(String),
    /// The job has no machine to show, or loses it just now.
    #[error("job {0} has no machine any more.")]
    Gone(JobKey),
    /// The files say something else than cannery writes, or cannot be read or written.
    #[error(transparent)]
    Record(#[from] record::Error),
}

/// What a ticket lets its bearer do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// See and type.
    Full,
    /// Only see.
    ViewOnly,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Mode::Full => "full",
            Mode::ViewOnly => "view-only",
        })
    }
}

/// The name of a ticket: the SHA-256 of its text, hexadecimal. It opens nothing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TicketId(String);

impl TicketId {
    fn of(text: &str) -> Self {
        Self(hex::encode(Sha256::digest(text.as_bytes())))
    }

    /// As much of it as people need to tell tickets apart.
    pub fn short(&self) -> &str {
        self.0.get(..SHOWN).unwrap_or(&self.0)
    }

    fn of_file(name: &str) -> Option<Self> {
        let hash = name.strip_suffix(".json")?;
        let digits = hash.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        (hash.len() == 64 && digits).then(|| Self(hash.to_owned()))
    }
}

impl fmt::Display for TicketId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.short())
    }
}

/// What a ticket allows, to whom, until when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    version: u32,
    /// What its bearer may do.
    pub mode: Mode,
    /// When it was minted.
    pub minted: Timestamp,
    /// Until when it may be redeemed. Sessions that it has opened go on.
    pub expires: Timestamp,
    /// How many sessions it may have open at once.
    pub viewers: u32,
    /// Who minted it, for the audit log and lists.
    pub by: String,
}

impl Grant {
    /// A ticket of this kind, from now on.
    pub fn new(mode: Mode, minted: Timestamp, expires: Timestamp, viewers: u32, by: String) -> Self {
        Self {
            version: VERSION,
            mode,
            minted,
            expires,
            viewers,
            by,
        }
    }
}

/// Why a text opens nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No ticket has this text: a wrong one, another machine's, or one that was taken away.
    #[error("this ticket opens nothing here: it is wrong, for another machine, or was taken away")]
    Unknown,
    /// It could be redeemed until a while ago.
    #[error("this ticket has expired")]
    Expired,
}

/// A ticket that was redeemed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redeemed {
    /// Whose machine it opens.
    pub job: JobDir,
    /// Which ticket it was.
    pub id: TicketId,
    /// What it allows.
    pub grant: Grant,
}

/// Makes a ticket for a job's machine and returns its text, which is nowhere else. Takes away those by which nobody can be there any more.
///
/// # Errors
/// The job is being cleaned up, or its folder cannot be written.
pub fn mint(job: &JobDir, grant: &Grant) -> Result<(Secret, TicketId), Error> {
    if !is_live(job)? {
        return Err(Error::Gone(job.key().clone()));
    }
    let text = random_text()?;
    let id = TicketId::of(text.reveal());
    let folder = job.file(FOLDER);
    // Only this folder: the one above is not to come back after a cleanup.
    record::make_finished(&folder, &record::hidden(&folder), |dir| {
        fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(FOLDER_MODE))
    })
    .map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => Error::Gone(job.key().clone()),
        _ => failed("create the folder", &folder)(source),
    })?;
    if let Err(e) = sweep(job, grant.minted) {
        // They open nothing.
        tracing::warn!("expired tickets stay: {e}");
    }
    record::write_json(&path(job, &id), grant, FILE_MODE)?;
    kill::point(Point::TicketKept);
    Ok((text, id))
}

/// A text that nobody guesses, of 40 characters that no shell, URL or keyboard minds.
///
/// # Errors
/// The system has no random numbers.
pub fn random_text() -> Result<Secret, Error> {
    let mut bytes = [0; BYTES];
    rand_bytes(&mut bytes).map_err(|e| Error::Random(e.to_string()))?;
    Ok(Secret::new(hex::encode(bytes)))
}

/// The address that opens a job's page with a ticket: in the part that browsers send to nobody.
pub fn address(page: &str, text: &Secret) -> String {
    format!("{page}#ticket={}", text.reveal())
}

/// What a text opens, whichever machine that is.
///
/// # Errors
/// The folder of jobs, or a ticket's file, cannot be read.
pub fn redeem(jobs: &Jobs, text: &str, now: Timestamp) -> Result<Result<Redeemed, Refusal>, Error> {
    for job in jobs.list()? {
        match redeem_for(&job, text, now)? {
            Err(Refusal::Unknown) => {}
            answer => return Ok(answer),
        }
    }
    Ok(Err(Refusal::Unknown))
}

/// What a text opens of this machine.
///
/// # Errors
/// The ticket's file cannot be read.
pub fn redeem_for(job: &JobDir, text: &str, now: Timestamp) -> Result<Result<Redeemed, Refusal>, Error> {
    if text.is_empty() || text.len() > LONGEST {
        return Ok(Err(Refusal::Unknown));
    }
    let id = TicketId::of(text);
    Ok(match read(job, &id)? {
        Some(grant) if grant.version > VERSION => Err(Refusal::Unknown),
        Some(_) if !is_live(job)? => Err(Refusal::Unknown),
        Some(grant) if grant.expires <= now => Err(Refusal::Expired),
        Some(grant) => Ok(Redeemed {
            job: job.clone(),
            id,
            grant,
        }),
        None => Err(Refusal::Unknown),
    })
}

/// Is the ticket still there, and the machine that it opens? What was opened with it ends when it is not.
///
/// # Errors
/// The job's record cannot be read.
pub fn holds(job: &JobDir, id: &TicketId) -> Result<bool, Error> {
    Ok(path(job, id).exists() && is_live(job)?)
}

/// A job's tickets, the oldest first.
///
/// # Errors
/// Their folder, or one of them, cannot be read.
pub fn list(job: &JobDir) -> Result<Vec<(TicketId, Grant)>, Error> {
    let folder = job.file(FOLDER);
    let entries = match fs::read_dir(&folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed("list", &folder))?,
    };
    let mut tickets = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed("list", &folder))?;
        let Some(id) = entry.file_name().to_str().and_then(TicketId::of_file) else {
            continue;
        };
        // One that was taken away meanwhile is none.
        tickets.extend(read(job, &id)?.map(|grant| (id, grant)));
    }
    tickets.sort_by(|(a, x), (b, y)| (x.minted, a).cmp(&(y.minted, b)));
    Ok(tickets)
}

/// Takes a ticket away; false where it is gone already.
///
/// # Errors
/// Its file cannot be removed.
pub fn revoke(job: &JobDir, id: &TicketId) -> Result<bool, Error> {
    let path = path(job, id);
    match fs::remove_file(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(failed("remove", &path)(e)),
        Ok(()) => {
            kill::point(Point::TicketRevoked);
            Ok(true)
        }
    }
}

/// Takes away the tickets of a job that have expired so long ago that no session of theirs is left.
fn sweep(job: &JobDir, now: Timestamp) -> Result<(), Error> {
    for (id, grant) in list(job)? {
        let over = grant.expires.checked_add(LONGEST_SESSION);
        if over.is_ok_and(|over| over <= now) {
            revoke(job, &id)?;
        }
    }
    Ok(())
}

/// Is the job here, and not being cleaned up?
///
/// # Errors
/// The job's record cannot be read.
pub fn is_live(job: &JobDir) -> Result<bool, Error> {
    Ok(job.read()?.is_some_and(|record| record.state != State::Cleaning))
}

fn path(job: &JobDir, id: &TicketId) -> PathBuf {
    job.file(FOLDER).join(format!("{}.json", id.0))
}

fn read(job: &JobDir, id: &TicketId) -> Result<Option<Grant>, Error> {
    Ok(record::read_json(&path(job, id))?)
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| record::Error::Io { action, path, source }.into()
}

#[cfg(test)]
mod tests;
