//! cleanup: a job's machine goes, with all that belongs to it, unless it is to stay for a while.

use super::hold;
use crate::job::{Environment, claim};
use crate::outcome::Failure;
use crate::reap::Reaper;
use crate::report::JobLog;
use crate::settings::Settings;

/// Removes what the runner's try of the job has, at whatever point it is; nothing is fine too. A machine that is held stays, and
/// nobody waits for the end of that.
///
/// A late cleanup of one try leaves the next one alone: they differ in the response file's path. What the
/// file says is of no interest, nor whether it is still there.
pub async fn cleanup(settings: &Settings, environment: &Environment, log: &JobLog) -> Result<(), Failure> {
    let claim = claim(environment)?;
    for (key, until) in Reaper::open(settings)?.remove_claimed(&claim).await? {
        log.line(hold::said(settings, &key, until));
    }
    Ok(())
}
