//! How each of a job's calls ended, noted as it happens.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Record, State};

/// prepare's name among the stages; those of `run` have gitlab-runner's names.
pub const PREPARE: &str = "prepare";

/// One call: prepare, or a script that gitlab-runner had run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stage {
    /// [`PREPARE`], or the runner's name for the script.
    pub name: String,
    /// When it began.
    pub started: Timestamp,
    /// How long it took, in seconds; none while it goes, and where it was killed.
    pub seconds: Option<f64>,
    /// How it ended; none while it goes. One that is killed cannot say so itself: the next that comes does.
    pub ending: Option<Ending>,
}

/// How a call ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "how", rename_all = "kebab-case")]
pub enum Ending {
    /// As it should.
    Succeeded,
    /// The script ended with this code, which is not 0.
    Script {
        /// The code.
        code: i32,
        /// What its author should know about it.
        #[serde(default)]
        hints: Vec<String>,
    },
    /// In a way that only the job's author can mend.
    Author(Reason),
    /// In a way that the operator must mend, or that passes.
    System(Reason),
    /// gitlab-runner had it ended.
    Cancelled,
    /// Without a word.
    Killed,
}

/// What went wrong, without anything secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// What happened, to which thing.
    pub message: String,
    /// What to do next.
    pub hints: Vec<String>,
}

/// What a job came to, once it is removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Outcome {
    /// All scripts that count ended well.
    Succeeded,
    /// A script failed.
    ScriptFailed {
        /// Which.
        stage: String,
        /// Its exit code.
        code: i32,
        /// What its author should know about it.
        #[serde(default)]
        hints: Vec<String>,
    },
    /// Only the job's author can mend it.
    AuthorFailed {
        /// The call that failed.
        stage: String,
        /// Why.
        reason: Reason,
    },
    /// The operator must mend it, or it passes.
    SystemFailed {
        /// The call that failed.
        stage: String,
        /// Why.
        reason: Reason,
    },
    /// gitlab-runner ended it: by a user's wish, or since its time was over.
    Cancelled {
        /// The call that went; none between two.
        stage: Option<String>,
    },
    /// A call of cannery was killed, so that nobody knows what it would have come to.
    Killed {
        /// The call.
        stage: String,
        /// How far the job was.
        state: State,
    },
    /// Nobody came back for it.
    Abandoned {
        /// Why it was removed.
        why: String,
        /// The call that went; none between two.
        stage: Option<String>,
        /// How far the job was.
        state: State,
    },
    /// An operator removed it.
    Removed {
        /// The call that went; none between two.
        stage: Option<String>,
        /// How far the job was.
        state: State,
    },
    /// It was removed, and how its calls ended was not noted: the cannery that ran them did not do that yet.
    Unknown {
        /// How far the job was.
        state: State,
    },
}

impl Record {
    /// A call begins. One that never ended was killed: a job's calls come one after the other.
    pub fn begin(&mut self, name: &str, now: Timestamp) {
        for stage in &mut self.stages {
            stage.ending.get_or_insert(Ending::Killed);
        }
        self.stages.push(Stage {
            name: name.to_owned(),
            started: now,
            seconds: None,
            ending: None,
        });
    }

    /// The call of this name ended after so long.
    pub fn end(&mut self, name: &str, took: Duration, ending: Ending) {
        let begun = |stage: &&mut Stage| stage.name == name && stage.ending.is_none();
        // A call that was begun by a cannery that noted no calls is not there to be ended.
        if let Some(stage) = self.stages.iter_mut().rev().find(begun) {
            stage.seconds = Some(took.as_secs_f64());
            stage.ending = Some(ending);
        }
    }

    /// The call that goes, or that was killed.
    pub fn open_stage(&self) -> Option<&Stage> {
        self.stages.last().filter(|stage| stage.ending.is_none())
    }
}
