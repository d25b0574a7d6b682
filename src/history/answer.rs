//! Why a job failed, in one sentence.

use std::time::Duration;

use crate::record::{Outcome, PREPARE, Reason, State};
use crate::report::{line, span};

/// The most characters that a reason has in a sentence: a registry or a guest may have a lot to say.
const REASON_LENGTH: usize = 1000;
/// The most characters of a stage's name.
const STAGE_LENGTH: usize = 60;

impl Outcome {
    /// The answer to "why did it fail": one sentence on one line, whatever the job's author and guest wrote.
    pub fn answer(&self, seconds: Option<f64>) -> String {
        match self {
            Outcome::Succeeded => match seconds.and_then(|s| Duration::try_from_secs_f64(s).ok()) {
                Some(took) => format!("Succeeded in {}.", span(took)),
                None => "Succeeded.".to_owned(),
            },
            Outcome::ScriptFailed { stage, code, hints } => {
                let mut answer = format!(
                    "Failed: the script ended with exit code {code} in {}.",
                    name(stage)
                );
                for hint in hints {
                    answer.push(' ');
                    answer.push_str(&sentence(hint));
                }
                answer
            }
            Outcome::AuthorFailed { reason, .. } => format!("Failed, the job's fault: {}", words(reason)),
            Outcome::SystemFailed { reason, .. } => format!("Failed, the system's fault: {}", words(reason)),
            Outcome::Cancelled { stage: Some(stage) } => format!(
                "Cancelled in {}: gitlab-runner ended it, by a user's wish or since its time was over.",
                name(stage)
            ),
            Outcome::Cancelled { stage: None } => {
                "Cancelled: gitlab-runner ended the job before its script ran.".to_owned()
            }
            Outcome::Killed { stage, state } if stage == PREPARE => format!(
                "Killed: prepare was ended from outside while the job was {state}, as for a cancelled job, or by its own error."
            ),
            Outcome::Killed { stage, .. } => format!(
                "Killed: the call that ran {} was ended from outside, or by its own error, so that the script's exit code is unknown.",
                name(stage)
            ),
            Outcome::Abandoned { why, stage, state } => {
                let during = during(stage.as_deref(), *state);
                let why = line(why, REASON_LENGTH);
                match stage {
                    Some(_) => format!("Abandoned {during}, in a call that was killed or hung: {why}."),
                    None => format!("Abandoned {during}: {why}."),
                }
            }
            Outcome::Removed { stage, state } => {
                format!("Removed by an operator {}.", during(stage.as_deref(), *state))
            }
            Outcome::Unknown { state } => format!(
                "Unknown: removed while it was {state}, and the cannery that ran it did not note how its scripts ended."
            ),
        }
    }

    /// What to do about it, a sentence each.
    pub fn hints(&self) -> Vec<String> {
        match self {
            Outcome::AuthorFailed { reason, .. } | Outcome::SystemFailed { reason, .. } => {
                reason.hints.iter().map(|hint| sentence(hint)).collect()
            }
            _ => Vec::new(),
        }
    }

    /// The answer as a word or two, for a list.
    pub fn word(&self) -> String {
        match self {
            Outcome::Succeeded => "succeeded".to_owned(),
            Outcome::ScriptFailed { code, .. } => format!("exit code {code}"),
            Outcome::AuthorFailed { .. } => "job's fault".to_owned(),
            Outcome::SystemFailed { .. } => "system failure".to_owned(),
            Outcome::Cancelled { .. } => "cancelled".to_owned(),
            Outcome::Killed { .. } => "killed".to_owned(),
            Outcome::Abandoned { .. } => "abandoned".to_owned(),
            Outcome::Removed { .. } => "removed".to_owned(),
            Outcome::Unknown { .. } => "unknown".to_owned(),
        }
    }

    /// Did the job fail, rather than succeed or end by somebody's wish?
    pub fn is_failure(&self) -> bool {
        match self {
            Outcome::ScriptFailed { .. }
            | Outcome::AuthorFailed { .. }
            | Outcome::SystemFailed { .. }
            | Outcome::Killed { .. }
            | Outcome::Abandoned { .. } => true,
            Outcome::Succeeded
            | Outcome::Cancelled { .. }
            | Outcome::Removed { .. }
            | Outcome::Unknown { .. } => false,
        }
    }
}

fn name(stage: &str) -> String {
    line(stage, STAGE_LENGTH)
}

fn words(reason: &Reason) -> String {
    sentence(&reason.message)
}

fn sentence(text: &str) -> String {
    let mut text = line(text.trim_end(), REASON_LENGTH);
    if !text.ends_with(['.', '!', '?']) {
        text.push('.');
    }
    text
}

fn during(stage: Option<&str>, state: State) -> String {
    match stage {
        Some(PREPARE) => format!("while it was {state}"),
        Some(stage) => format!("while {} ran", name(stage)),
        None => format!("while it was {state}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reason(message: &str) -> Reason {
        Reason {
            message: message.into(),
            hints: vec!["Look at it".into()],
        }
    }

    #[test]
    fn each_outcome_answers_why_in_one_sentence() {
        let stage = || Some("step_script".to_owned());
        let cases = [
            (Outcome::Succeeded, "Succeeded in 2 min 3 s.", "succeeded"),
            (
                Outcome::ScriptFailed {
                    stage: "step_script".into(),
                    code: 3,
                    hints: Vec::new(),
                },
                "Failed: the script ended with exit code 3 in step_script.",
                "exit code 3",
            ),
            (
                Outcome::ScriptFailed {
                    stage: "step_script".into(),
                    code: 137,
                    hints: vec!["The guest ran out of memory".into()],
                },
                "Failed: the script ended with exit code 137 in step_script. The guest ran out of memory.",
                "exit code 137",
            ),
            (
                Outcome::AuthorFailed {
                    stage: PREPARE.into(),
                    reason: reason("the image x is not allowed"),
                },
                "Failed, the job's fault: the image x is not allowed.",
                "job's fault",
            ),
            (
                Outcome::SystemFailed {
                    stage: "step_script".into(),
                    reason: reason("the guest\nrebooted."),
                },
                "Failed, the system's fault: the guest rebooted.",
                "system failure",
            ),
            (
                Outcome::Cancelled { stage: stage() },
                "Cancelled in step_script: gitlab-runner ended it, by a user's wish or since its time was over.",
                "cancelled",
            ),
            (
                Outcome::Cancelled { stage: None },
                "Cancelled: gitlab-runner ended the job before its script ran.",
                "cancelled",
            ),
            (
                Outcome::Killed {
                    stage: PREPARE.into(),
                    state: State::Booting,
                },
                "Killed: prepare was ended from outside while the job was booting, as for a cancelled job, or by its own error.",
                "killed",
            ),
            (
                Outcome::Killed {
                    stage: "step_script".into(),
                    state: State::Running,
                },
                "Killed: the call that ran step_script was ended from outside, or by its own error, so that the script's exit code is unknown.",
                "killed",
            ),
            (
                Outcome::Abandoned {
                    why: "the host was rebooted".into(),
                    stage: stage(),
                    state: State::Running,
                },
                "Abandoned while step_script ran, in a call that was killed or hung: the host was rebooted.",
                "abandoned",
            ),
            (
                Outcome::Abandoned {
                    why: "the host was rebooted".into(),
                    stage: Some(PREPARE.into()),
                    state: State::Booting,
                },
                "Abandoned while it was booting, in a call that was killed or hung: the host was rebooted.",
                "abandoned",
            ),
            (
                Outcome::Removed {
                    stage: None,
                    state: State::Ready,
                },
                "Removed by an operator while it was ready.",
                "removed",
            ),
            (
                Outcome::Unknown { state: State::Ready },
                "Unknown: removed while it was ready, and the cannery that ran it did not note how its scripts ended.",
                "unknown",
            ),
        ];
        for (outcome, answer, word) in cases {
            assert_eq!(outcome.answer(Some(123.4)), answer);
            assert_eq!(outcome.word(), word);
        }
        assert_eq!(Outcome::Succeeded.answer(None), "Succeeded.");
        let failed = Outcome::SystemFailed {
            stage: PREPARE.into(),
            reason: reason("x"),
        };
        assert_eq!(failed.hints(), ["Look at it."]);
        assert!(failed.is_failure() && !Outcome::Succeeded.is_failure());
    }

    proptest! {
        #[test]
        fn an_answer_is_one_line_that_moves_no_cursor(text in ".{0,60}", which in 0usize..4) {
            let outcome = match which {
                0 => Outcome::ScriptFailed { stage: text.clone(), code: 1, hints: vec![text.clone()] },
                1 => Outcome::SystemFailed { stage: PREPARE.into(), reason: reason(&text) },
                2 => Outcome::Abandoned { why: text.clone(), stage: Some(text.clone()), state: State::Running },
                _ => Outcome::Cancelled { stage: Some(text.clone()) },
            };
            let answer = outcome.answer(None);
            prop_assert!(!answer.chars().any(char::is_control), "{answer:?}");
            prop_assert!(answer.ends_with(['.', '!', '?']), "{answer:?}");
        }
    }
}
