//! Whether a job's machine is to stay for a look at what failed, and what its author is told.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::prepare::AFTER_TIMEOUT;
use crate::history;
use crate::record::{Ending, Held, Holder, JobKey, Record, is_served};
use crate::report;
use crate::settings::{Access, ConsoleSettings, Settings};

/// How much earlier than the job's time is over gitlab-runner may have a script ended for it: its clock starts when it takes the
/// job, before prepare.
const EARLY: Duration = Duration::from_secs(15);

/// How much earlier by this call's clock a script may be ended at its own limit: gitlab-runner's clock starts before the call.
const CALLED: Duration = Duration::from_secs(2);

/// How a script ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct End<'a> {
    /// gitlab-runner's name for the script.
    pub(super) stage: &'a str,
    /// How it ended.
    pub(super) ending: &'a Ending,
    /// How long it took.
    pub(super) took: Duration,
    /// `RUNNER_SCRIPT_TIMEOUT`, where the job sets one.
    pub(super) limit: Option<Duration>,
}

impl End<'_> {
    /// Did a script of the job's author fail, or was it ended since its time was over? One that somebody cancelled did not. Pure.
    pub(super) fn failed(&self, record: &Record, now: Timestamp) -> bool {
        let failed = match self.ending {
            Ending::Script { .. } => true,
            Ending::Cancelled => self.time_was_over(record, now),
            _ => false,
        };
        failed && history::is_script(self.stage)
    }

    /// Until when the machine stays for it, if it does. Pure.
    pub(super) fn held(&self, record: &Record, now: Timestamp) -> Option<Held> {
        if record.hold == 0 || !self.failed(record, now) {
            return None;
        }
        let lease = SignedDuration::from_secs(i64::try_from(record.hold).unwrap_or(i64::MAX));
        Some(Held {
            until: now.saturating_add(lease).unwrap_or(Timestamp::MAX),
            by: Holder::Failure,
        })
    }

    /// gitlab-runner ends a script in the same way whether somebody cancelled the job or its time was over; the clock tells.
    fn time_was_over(&self, record: &Record, now: Timestamp) -> bool {
        let script = self.limit.is_some_and(|limit| self.took + CALLED >= limit);
        let over = record.deadline.saturating_sub(AFTER_TIMEOUT);
        let job = over.is_ok_and(|over| now.saturating_add(EARLY).is_ok_and(|now| now >= over));
        script || job
    }
}

/// What the job's author is told: until when, and who gets in how. The page is named only while it is served.
pub(super) fn said(settings: &Settings, key: &JobKey, until: Timestamp) -> String {
    let console = settings.console.as_ref();
    sentence(console.filter(|_| is_served(&settings.state_dir)), key, until)
}

/// The operator gets in in any case; others by the page, where there is one. Pure.
fn sentence(console: Option<&ConsoleSettings>, key: &JobKey, until: Timestamp) -> String {
    let page = console.map_or(String::new(), |console| {
        // The ticket was told once, and is nowhere else.
        let link = match console.access {
            Access::Ticket => "",
            Access::Link => " (with the ticket from the line \"Console\" above, if there is one)",
        };
        format!(" Its console: {}{link}", console.page(key))
    });
    format!(
        "cannery: the machine of this job stays until {} for a look at it. The runner's operator enters it with `cannery vm ssh {key}`.{page}",
        report::minute(until)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Caller, Reason};

    const HOUR: SignedDuration = SignedDuration::from_hours(1);

    /// A job that began now, may take an hour, and is held for ten minutes.
    fn record(now: Timestamp) -> Record {
        let key = JobKey::new("https://gitlab.example.com", 1, 1);
        Record {
            hold: 600,
            ..Record::new(key, "/x".into(), Caller::this(), now, now + HOUR + AFTER_TIMEOUT)
        }
    }

    fn is_held(record: &Record, stage: &str, ending: &Ending, now: Timestamp) -> bool {
        let end = End {
            stage,
            ending,
            took: Duration::from_secs(60),
            limit: None,
        };
        end.held(record, now).is_some()
    }

    #[test]
    fn a_machine_is_held_for_its_authors_failed_script_alone() {
        let now = Timestamp::now();
        let record = record(now);
        let failed = Ending::Script {
            code: 3,
            hints: Vec::new(),
        };
        let system = Ending::System(Reason {
            message: "the guest is gone".into(),
            hints: Vec::new(),
        });
        for stage in ["step_script", "build_script", "step_release"] {
            assert!(is_held(&record, stage, &failed, now), "{stage}");
            assert!(!is_held(&record, stage, &Ending::Succeeded, now), "{stage}");
            assert!(!is_held(&record, stage, &system, now), "{stage}");
        }
        for stage in [
            "get_sources",
            "after_script",
            "upload_artifacts_on_failure",
            "prepare_script",
        ] {
            assert!(!is_held(&record, stage, &failed, now), "{stage}");
        }
        let unheld = Record { hold: 0, ..record };
        assert!(!is_held(&unheld, "step_script", &failed, now));
    }

    #[test]
    fn a_cancelled_script_is_held_only_when_its_time_was_over() {
        let now = Timestamp::now();
        let record = record(now);
        let cancelled = |at| is_held(&record, "step_script", &Ending::Cancelled, at);
        assert!(!cancelled(now));
        assert!(!cancelled(now + HOUR - SignedDuration::from_secs(16)));
        assert!(cancelled(now + HOUR - SignedDuration::from_secs(14)));
        assert!(cancelled(now + HOUR));
        for (limit, expected) in [(59, true), (62, true), (63, false)] {
            let end = End {
                stage: "step_script",
                ending: &Ending::Cancelled,
                took: Duration::from_secs(60),
                limit: Some(Duration::from_secs(limit)),
            };
            assert_eq!(end.held(&record, now).is_some(), expected, "{limit}");
        }
    }

    #[test]
    fn who_may_look_is_told_the_operators_way_and_the_page_with_the_ticket_only_where_there_may_be_one() {
        let key = JobKey::new("https://gitlab.example.com", 1, 1);
        let page = format!("https://ci.example.com/jobs/{key}");
        let console = crate::stage::invite::tests::console;
        for (settings, way) in [
            (None, String::new()),
            (Some(console("")), format!(" Its console: {page}")),
            (
                Some(console("access = \"link\"")),
                format!(
                    " Its console: {page} (with the ticket from the line \"Console\" above, if there is one)"
                ),
            ),
        ] {
            let said = sentence(settings.as_ref(), &key, Timestamp::UNIX_EPOCH);
            let end =
                format!("look at it. The runner's operator enters it with `cannery vm ssh {key}`.{way}");
            assert!(said.ends_with(&end), "{said}");
        }
    }

    #[test]
    fn the_lease_begins_when_the_script_fails() {
        let now = Timestamp::now();
        let end = End {
            stage: "step_script",
            ending: &Ending::Script {
                code: 1,
                hints: Vec::new(),
            },
            took: Duration::ZERO,
            limit: None,
        };
        let held = end.held(&record(now), now).unwrap();
        assert_eq!(held.until, now + SignedDuration::from_mins(10));
        assert_eq!(held.by, Holder::Failure);
    }
}
