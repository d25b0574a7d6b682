//! cleanup: a job's machine goes, with all that belongs to it.

use crate::job::{Environment, claim};
use crate::outcome::Failure;
use crate::reap::Reaper;
use crate::settings::Settings;

/// Removes what the runner's try of the job has, at whatever point it is; nothing is fine too.
///
/// A late cleanup of one try leaves the next one alone: they differ in the response file's path. What the
/// file says is of no interest, nor whether it is still there.
pub async fn cleanup(settings: &Settings, environment: &Environment) -> Result<(), Failure> {
    let claim = claim(environment)?;
    Reaper::open(settings)?.remove_claimed(&claim).await
}
