//! The operator's log: what happened, for machines to read. Nothing of it is for the job's author.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::fs::{Gid, fchown};
use tracing_subscriber::EnvFilter;

/// Where the operator's log goes.
#[derive(Debug, Clone)]
pub struct OperatorLog {
    /// The file, which lines are appended to.
    pub file: PathBuf,
    /// What is logged, in the syntax of `tracing`'s filters: `info`, `cannery=debug`.
    pub filter: String,
}

/// The members of the state folder's group write to the log too; nobody else needs to read it.
const MODE: u32 = 0o660;

/// Starts logging, as JSON lines. A log that root writes belongs to the group of the state folder, so that its members
/// can write to it as well.
pub fn start(log: &OperatorLog, state_dir: &Path) -> io::Result<()> {
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(MODE)
        .open(&log.file)?;
    if rustix::process::geteuid().is_root() {
        share(&file, std::fs::metadata(state_dir)?.gid())?;
    }
    let filter =
        EnvFilter::try_new(&log.filter).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
    tracing_subscriber::fmt()
        .json()
        .with_env_filter(filter)
        .with_writer(Mutex::new(file))
        .try_init()
        .map_err(io::Error::other)
}

/// Gives a log of root's own to a group. One that the operator gave to somebody else, or that is no file (`/dev/stderr`), stays as
/// it is.
fn share(file: &File, group: u32) -> io::Result<()> {
    let about = file.metadata()?;
    if !about.is_file() || about.uid() != 0 || about.gid() != 0 || group == 0 {
        return Ok(());
    }
    fchown(file, None, Some(Gid::from_raw(group)))?;
    file.set_permissions(Permissions::from_mode(MODE))
}
