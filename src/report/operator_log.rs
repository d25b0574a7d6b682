//! The operator's log: what happened, for machines to read. Nothing of it is for the job's author.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Mutex;

use tracing_subscriber::EnvFilter;

/// Where the operator's log goes.
#[derive(Debug, Clone)]
pub struct OperatorLog {
    /// The file, which lines are appended to.
    pub file: PathBuf,
    /// What is logged, in the syntax of `tracing`'s filters: `info`, `cannery=debug`.
    pub filter: String,
}

/// Starts logging, as JSON lines.
pub fn start(log: &OperatorLog) -> io::Result<()> {
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o660)
        .open(&log.file)?;
    let filter =
        EnvFilter::try_new(&log.filter).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
    tracing_subscriber::fmt()
        .json()
        .with_env_filter(filter)
        .with_writer(Mutex::new(file))
        .try_init()
        .map_err(io::Error::other)
}
