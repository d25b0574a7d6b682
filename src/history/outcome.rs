//! What a job came to, from what is known when it is removed. No effects.

use crate::record::{Ending, Outcome, Record, Stage, State};

/// Who removes a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Removal {
    /// gitlab-runner, by cleanup.
    Cleanup,
    /// An operator, by name.
    Operator,
    /// Whoever found that nobody comes back for it; the reason is half a sentence.
    Abandoned(String),
}

/// How much a stage's failure says about its job, as gitlab-runner weighs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Weight {
    /// It fails the job.
    Decides,
    /// It fails a job that did not fail before.
    DecidesLast,
    /// Nothing: the runner only warns.
    Nothing,
}

/// Stages of gitlab-runner (`common/build.go`) that are no script of the job's author. One that it does not have yet counts as a
/// script.
const BEFORE_THE_SCRIPT: [&str; 5] = [
    crate::record::PREPARE,
    "prepare_script",
    "get_sources",
    "restore_cache",
    "download_artifacts",
];

fn weight(stage: &str) -> Weight {
    match stage {
        // after_script decides where AFTER_SCRIPT_IGNORE_ERRORS is false, which only the runner knows.
        "after_script" | "cleanup_file_variables" | "clear_worktree" => Weight::Nothing,
        _ if stage.starts_with("archive_cache") || stage.starts_with("upload_artifacts") => {
            Weight::DecidesLast
        }
        _ => Weight::Decides,
    }
}

/// Is the stage of this name a script of the job's author that decides whether the job succeeds?
pub fn is_script(stage: &str) -> bool {
    weight(stage) == Weight::Decides && !BEFORE_THE_SCRIPT.contains(&stage)
}

/// What the calls that have ended say: why the job failed, or nothing yet. Of a stage that the runner tried again, the last try
/// counts.
pub fn verdict(stages: &[Stage]) -> Option<Outcome> {
    let last_try = |at: usize| !stages[at + 1..].iter().any(|later| later.name == stages[at].name);
    let failed = |weighs: Weight| {
        (0..stages.len())
            .filter(|at| weight(&stages[*at].name) == weighs && last_try(*at))
            .find_map(|at| failure(&stages[at]))
    };
    failed(Weight::Decides).or_else(|| failed(Weight::DecidesLast))
}

fn failure(stage: &Stage) -> Option<Outcome> {
    let name = stage.name.clone();
    Some(match stage.ending.clone()? {
        Ending::Succeeded => return None,
        Ending::Script { code, hints } => Outcome::ScriptFailed {
            stage: name,
            code,
            hints,
        },
        Ending::Author(reason) => Outcome::AuthorFailed { stage: name, reason },
        Ending::System(reason) => Outcome::SystemFailed { stage: name, reason },
        Ending::Cancelled => Outcome::Cancelled { stage: Some(name) },
        // Another call came after it, so that this one was a script.
        Ending::Killed => Outcome::Killed {
            stage: name,
            state: State::Running,
        },
    })
}

/// What a job came to. `record` is as it was before the removal; `busy` says whether the call that goes according to it is
/// still there.
pub fn outcome(record: &Record, removal: &Removal, busy: bool) -> Outcome {
    if let Some(failed) = verdict(&record.stages) {
        return failed;
    }
    let open = record.open_stage();
    let (stage, state) = (open.map(|s| s.name.clone()), record.state);
    match removal {
        Removal::Operator => Outcome::Removed { stage, state },
        Removal::Abandoned(why) => Outcome::Abandoned {
            why: why.clone(),
            stage,
            state,
        },
        Removal::Cleanup => match open {
            // Taken away under a script: that is how the runner gives a job up at once.
            Some(open) if busy && weight(&open.name) == Weight::Decides => Outcome::Cancelled { stage },
            Some(open) if weight(&open.name) == Weight::Decides => Outcome::Killed {
                stage: open.name.clone(),
                state,
            },
            _ if record.stages.iter().any(|s| is_script(&s.name)) => Outcome::Succeeded,
            _ if record.stages.is_empty() => Outcome::Unknown { state },
            _ => Outcome::Cancelled { stage: None },
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Caller, JobKey, PREPARE, Reason};
    use jiff::Timestamp;
    use proptest::prelude::*;

    /// A call by its name, and how it ended.
    type Call = (&'static str, Option<Ending>);

    fn record(state: State, stages: &[Call]) -> Record {
        let now = Timestamp::now();
        let stage = |(name, ending): &Call| Stage {
            name: (*name).to_owned(),
            started: now,
            seconds: ending.as_ref().map(|_| 1.0),
            ending: ending.clone(),
        };
        let key = JobKey::new("https://gitlab.example.com", 1, 1);
        Record {
            state,
            stages: stages.iter().map(stage).collect(),
            ..Record::new(key, "/x".into(), Caller::this(), now, now)
        }
    }

    fn reason() -> Reason {
        Reason {
            message: "the guest is gone".into(),
            hints: Vec::new(),
        }
    }

    const OK: Option<Ending> = Some(Ending::Succeeded);
    const THREE: Option<Ending> = Some(Ending::Script {
        code: 3,
        hints: Vec::new(),
    });

    fn script_failed(stage: &str) -> Outcome {
        Outcome::ScriptFailed {
            stage: stage.into(),
            code: 3,
            hints: Vec::new(),
        }
    }

    fn cancelled(stage: Option<&str>) -> Outcome {
        Outcome::Cancelled {
            stage: stage.map(str::to_owned),
        }
    }

    fn killed(stage: &str, state: State) -> Outcome {
        Outcome::Killed {
            stage: stage.into(),
            state,
        }
    }

    #[test]
    fn the_first_stage_that_decides_and_failed_is_why() {
        let author = Some(Ending::Author(reason()));
        let system = Some(Ending::System(reason()));
        let system_failed = |stage: &str| Outcome::SystemFailed {
            stage: stage.into(),
            reason: reason(),
        };
        let cases: &[(&[Call], Outcome)] = &[
            (&[(PREPARE, OK), ("build_script", OK)], Outcome::Succeeded),
            (
                &[(PREPARE, author)],
                Outcome::AuthorFailed {
                    stage: PREPARE.into(),
                    reason: reason(),
                },
            ),
            (&[(PREPARE, system.clone())], system_failed(PREPARE)),
            (
                &[(PREPARE, OK), ("step_script", THREE), ("after_script", OK)],
                script_failed("step_script"),
            ),
            // Neither of these fails a job.
            (
                &[
                    (PREPARE, OK),
                    ("step_script", OK),
                    ("after_script", THREE),
                    ("cleanup_file_variables", THREE),
                ],
                Outcome::Succeeded,
            ),
            // The runner tries again, and the last try counts.
            (
                &[
                    (PREPARE, OK),
                    ("get_sources", THREE),
                    ("clear_worktree", THREE),
                    ("get_sources", OK),
                    ("step_script", OK),
                ],
                Outcome::Succeeded,
            ),
            (
                &[(PREPARE, OK), ("get_sources", OK), ("get_sources", THREE)],
                script_failed("get_sources"),
            ),
            // An upload fails only what did not fail before.
            (
                &[
                    (PREPARE, OK),
                    ("step_script", OK),
                    ("upload_artifacts_on_success", THREE),
                ],
                script_failed("upload_artifacts_on_success"),
            ),
            (
                &[
                    (PREPARE, OK),
                    ("archive_cache", THREE),
                    ("step_script", system.clone()),
                ],
                system_failed("step_script"),
            ),
            // A second user script, as for `release:`.
            (
                &[(PREPARE, OK), ("step_script", OK), ("step_release", THREE)],
                script_failed("step_release"),
            ),
            (
                &[
                    (PREPARE, OK),
                    ("step_script", Some(Ending::Cancelled)),
                    ("after_script", OK),
                ],
                cancelled(Some("step_script")),
            ),
            // Killed, and the runner went on with the next.
            (
                &[
                    (PREPARE, OK),
                    ("step_script", Some(Ending::Killed)),
                    ("after_script", OK),
                ],
                killed("step_script", State::Running),
            ),
            (&[(PREPARE, OK)], cancelled(None)),
            (&[(PREPARE, OK), ("get_sources", OK)], cancelled(None)),
            (&[], Outcome::Unknown { state: State::Ready }),
            // prepare was an older cannery's, which noted nothing.
            (&[("step_script", OK)], Outcome::Succeeded),
        ];
        for (stages, expected) in cases {
            let record = record(State::Ready, stages);
            assert_eq!(
                outcome(&record, &Removal::Cleanup, false),
                *expected,
                "{stages:?}"
            );
        }
    }

    #[test]
    fn a_job_that_is_removed_in_the_middle_of_a_call_says_in_which() {
        let abandoned = Removal::Abandoned("the host was rebooted".into());
        let booting = record(State::Booting, &[(PREPARE, None)]);
        let running = record(State::Running, &[(PREPARE, OK), ("step_script", None)]);
        let after = record(
            State::Running,
            &[(PREPARE, OK), ("step_script", OK), ("after_script", None)],
        );
        let failed = record(
            State::Running,
            &[(PREPARE, OK), ("step_script", THREE), ("after_script", None)],
        );
        let step = || Some("step_script".to_owned());
        let cases = [
            (
                &booting,
                &Removal::Cleanup,
                false,
                killed(PREPARE, State::Booting),
            ),
            (
                &running,
                &Removal::Cleanup,
                false,
                killed("step_script", State::Running),
            ),
            (&running, &Removal::Cleanup, true, cancelled(Some("step_script"))),
            (&after, &Removal::Cleanup, true, Outcome::Succeeded),
            (
                &running,
                &Removal::Operator,
                true,
                Outcome::Removed {
                    stage: step(),
                    state: State::Running,
                },
            ),
            (
                &running,
                &abandoned,
                false,
                Outcome::Abandoned {
                    why: "the host was rebooted".into(),
                    stage: step(),
                    state: State::Running,
                },
            ),
        ];
        for (record, removal, busy, expected) in cases {
            assert_eq!(
                outcome(record, removal, busy),
                expected,
                "{removal:?} {:?}",
                record.stages
            );
        }
        // Why it failed does not change with who removes it.
        for removal in [&Removal::Cleanup, &Removal::Operator, &abandoned] {
            for busy in [false, true] {
                assert_eq!(
                    outcome(&failed, removal, busy),
                    script_failed("step_script"),
                    "{removal:?}"
                );
            }
        }
    }

    proptest! {
        #[test]
        fn only_a_job_whose_last_tries_went_well_succeeds(calls in proptest::collection::vec((0usize..6, 0i32..3), 0..12)) {
            let names = [PREPARE, "get_sources", "step_script", "after_script", "upload_artifacts_on_success", "step_new"];
            let stages: Vec<Call> = calls
                .iter()
                .map(|(name, code)| (names[*name], if *code == 0 { OK } else { Some(Ending::Script { code: *code, hints: Vec::new() }) }))
                .collect();
            let came_to = outcome(&record(State::Ready, &stages), &Removal::Cleanup, false);
            let last = |name: &str| stages.iter().rev().find(|(n, _)| *n == name).map(|(_, e)| e.clone());
            let well = names.iter().filter(|n| **n != "after_script").all(|n| last(n).is_none_or(|e| e == OK));
            let ran = last("step_script").is_some() || last("step_new").is_some();
            prop_assert_eq!(came_to == Outcome::Succeeded, well && ran);
            if let Outcome::ScriptFailed { stage, code, hints } = came_to {
                prop_assert_eq!(last(&stage), Some(Some(Ending::Script { code, hints })));
            }
        }
    }
}
