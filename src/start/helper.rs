//! A job that moves caches or artifacts gets the `gitlab-runner` binary for it, or is told that there is none.

use std::time::Instant;

use super::Phases;
use super::cold::Plan;
use crate::guest::helper::{self, Error, Found, Helper};
use crate::guest::ssh::Connection;
use crate::outcome::Failure;
use crate::report::{JobLog, bytes, plain, seconds};

/// The most that is shown of what a guest says about its helper, in characters.
const ANSWER_LENGTH: usize = 200;

/// Brings the operator's helper into a guest whose image has none. Returns what the job's author should know.
///
/// What is wrong with the operator's file is a failure, since it is wrong for every job; what the guest lacks for it is a remark, as
/// gitlab-runner itself goes on without.
pub(super) async fn provide(
    plan: &Plan<'_>,
    found: Found,
    connection: &Connection,
    phases: &mut Phases,
    log: &JobLog,
) -> Result<Option<String>, Failure> {
    let (Found::Missing, Some(path)) = (&found, &plan.guest.helper) else {
        return Ok(remark(&found, "The image's", plan.runner_version));
    };
    let helper = Helper::open(path)?;
    let size = bytes(helper.size);
    log.line(format!(
        "This job's caches and artifacts need gitlab-runner, which the image lacks: copying it into the guest ({size})."
    ));
    phases.end("ready");
    let begin = Instant::now();
    let brought = match helper::bring(connection, helper).await {
        Ok(found) => found,
        Err(Error::NoPlace(why)) => {
            let why = plain(&why, ANSWER_LENGTH);
            return Ok(Some(format!(
                "gitlab-runner cannot be copied into the guest ({why}): this job's caches and artifacts will not be moved."
            )));
        }
        Err(e) => return Err(e.into()),
    };
    phases.end("helper");
    if let Found::Version(version) = &brought {
        let version = plain(version, ANSWER_LENGTH);
        log.line(format!(
            "Copied gitlab-runner {version} into the guest in {}.",
            seconds(begin.elapsed())
        ));
    }
    Ok(remark(&brought, "This host's", plan.runner_version))
}

/// What the author should know of the helper that is in the guest now; nothing where all is well.
fn remark(found: &Found, whose: &str, runner: Option<&str>) -> Option<String> {
    match found {
        Found::Missing => Some(
            "The image has no gitlab-runner binary: this job's caches and artifacts will not be moved. \
             The image may bring one, or the runner's operator may set guest.helper."
                .to_owned(),
        ),
        Found::Broken(why) => Some(format!(
            "{whose} gitlab-runner does not run in the guest ({}): this job's caches and artifacts will not be moved.",
            plain(why, ANSWER_LENGTH)
        )),
        Found::Version(version) => {
            let runner = runner.filter(|runner| helper::is_older(version, runner) == Some(true))?;
            Some(format!(
                "{whose} gitlab-runner {} is older than the runner, which is {}: caches and artifacts may fail.",
                plain(version, ANSWER_LENGTH),
                plain(runner, ANSWER_LENGTH)
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_helper_is_said_and_nothing_else() {
        let version = |v: &str| Found::Version(v.to_owned());
        for (found, runner, says) in [
            (Found::Missing, Some("19.3.0"), Some("guest.helper")),
            (
                Found::Broken("Exec format error\u{1b}[2J".to_owned()),
                None,
                Some("(Exec format error[2J)"),
            ),
            (
                version("17.9.3"),
                Some("19.3.0"),
                Some("17.9.3 is older than the runner, which is 19.3.0"),
            ),
            (version("19.3.0"), Some("19.3.0"), None),
            (version("19.3.0"), None, None),
        ] {
            let remark = remark(&found, "The image's", runner);
            match says {
                Some(says) => assert!(remark.as_ref().unwrap().contains(says), "{remark:?}"),
                None => assert_eq!(remark, None),
            }
        }
    }
}
