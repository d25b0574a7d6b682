//! A job as `job list` and `job show` see it: one that is here, or one that is remembered.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use crate::cli::Context;
use crate::history::{self, Entry};
use crate::outcome::Failure;
use crate::reap;
use crate::record::{JobKey, Jobs, Outcome, PREPARE, Phase, Record, Stage, State};
use crate::report;
use crate::settings::Settings;

/// What a job is just doing.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Live {
    /// How far it is.
    pub(super) state: State,
    /// Since when.
    pub(super) since: Timestamp,
    /// The call that goes, or that was killed.
    pub(super) stage: Option<String>,
    /// Until when its machine stays, if it is to stay.
    pub(super) held_until: Option<Timestamp>,
    /// Is the gitlab-runner that began it gone?
    pub(super) abandoned: bool,
}

/// One job.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) key: JobKey,
    pub(super) coordinator: String,
    pub(super) project: String,
    pub(super) name: String,
    pub(super) image: Option<String>,
    pub(super) digest: Option<String>,
    pub(super) created: Timestamp,
    pub(super) removed: Option<Timestamp>,
    pub(super) seconds: Option<f64>,
    /// What it came to; of one that is here, what is known already.
    pub(super) outcome: Option<Outcome>,
    /// None for one that is gone.
    pub(super) live: Option<Live>,
    pub(super) phases: Vec<Phase>,
    pub(super) stages: Vec<Stage>,
    pub(super) serial_log: PathBuf,
    /// The picture of its screen, if one is kept.
    pub(super) screen: Option<PathBuf>,
}

/// What programs are told of a job in a list; the JSON's keys are these names.
#[derive(Debug, Serialize)]
pub(super) struct Summary {
    key: String,
    job: u64,
    attempt: u32,
    name: String,
    project: String,
    coordinator: String,
    image: Option<String>,
    digest: Option<String>,
    answer: String,
    failed: bool,
    outcome: Option<Outcome>,
    live: Option<Live>,
    created: Timestamp,
    removed: Option<Timestamp>,
    seconds: Option<f64>,
}

/// All jobs, the newest first.
pub(super) fn all(context: &Context, settings: &Settings) -> Result<Vec<Seen>, Failure> {
    // By key, since one that is just being removed is in both places: what is remembered is said last.
    let mut jobs = BTreeMap::new();
    for folder in Jobs::look(&settings.state_dir).list()? {
        match folder.read() {
            Ok(Some(record)) => {
                let mut seen = Seen::live(record, folder.file("serial.log"));
                seen.screen = Some(folder.file(reap::SCREEN)).filter(|file| file.is_file());
                jobs.insert(seen.key.clone(), seen);
            }
            // Removed since the folder was listed, or by a removal that was killed: `reap` knows.
            Ok(None) => {}
            Err(e) => context.log.line(format!("cannery: {e}")),
        }
    }
    let history = reap::history(settings);
    let remembered = history.list().unwrap_or_else(|e| {
        // Those that are here are worth showing all the same.
        context.log.line(format!("cannery: {e}"));
        Vec::new()
    });
    for entry in remembered {
        let serial_log = history.serial_log(&entry.key);
        let mut seen = Seen::remembered(entry, serial_log);
        seen.screen = history.screen(&seen.key);
        jobs.insert(seen.key.clone(), seen);
    }
    let mut jobs: Vec<Seen> = jobs.into_values().collect();
    jobs.sort_by(|a, b| (b.created, &b.key).cmp(&(a.created, &a.key)));
    Ok(jobs)
}

impl Seen {
    pub(super) fn live(record: Record, serial_log: PathBuf) -> Seen {
        // What it is removed with says most; before that, what its calls came to.
        let outcome = record
            .outcome
            .clone()
            .or_else(|| history::verdict(&record.stages));
        let live = Live {
            state: record.state,
            since: record.since,
            stage: record.open_stage().map(|s| s.name.clone()),
            held_until: record.held.as_ref().map(|held| held.until),
            abandoned: !record.caller.is_alive(),
        };
        Seen {
            key: record.key,
            coordinator: record.coordinator,
            project: record.project,
            name: record.job,
            image: record.image,
            digest: record.digest,
            created: record.created,
            removed: None,
            seconds: None,
            outcome,
            live: Some(live),
            phases: record.phases,
            stages: record.stages,
            serial_log,
            screen: None,
        }
    }

    pub(super) fn remembered(entry: Entry, serial_log: PathBuf) -> Seen {
        Seen {
            key: entry.key,
            coordinator: entry.coordinator,
            project: entry.project,
            name: entry.job,
            image: entry.image,
            digest: entry.digest,
            created: entry.created,
            removed: Some(entry.removed),
            seconds: entry.seconds,
            outcome: Some(entry.outcome),
            live: None,
            phases: entry.phases,
            stages: entry.stages,
            serial_log,
            screen: None,
        }
    }

    /// Why did it fail? Of one that is here and did not fail: what does it do?
    pub(super) fn answer(&self, now: Timestamp) -> String {
        match (&self.outcome, &self.live) {
            (Some(outcome), _) => outcome.answer(self.seconds),
            (None, Some(live)) => live.sentence(now),
            (None, None) => String::new(),
        }
    }

    pub(super) fn has_failed(&self) -> bool {
        self.outcome.as_ref().is_some_and(Outcome::is_failure)
    }

    /// What it came to, or what it does, in a word or two.
    pub(super) fn word(&self) -> String {
        let doing = self.live.as_ref().map(|live| match &live.stage {
            Some(stage) if live.state == State::Running => {
                format!("{} {}", live.state, report::line(stage, 30))
            }
            _ => live.state.to_string(),
        });
        match (&self.outcome, doing) {
            (Some(outcome), Some(doing)) => format!("{} ({doing})", outcome.word()),
            (Some(outcome), None) => outcome.word(),
            (None, doing) => doing.unwrap_or_default(),
        }
    }

    /// How long it took, or takes already, in seconds.
    pub(super) fn took(&self, now: Timestamp) -> Option<f64> {
        match self.live {
            Some(_) => Some(since(self.created, now).as_secs_f64()),
            None => self.seconds,
        }
    }

    pub(super) fn summary(&self, now: Timestamp) -> Summary {
        Summary {
            key: self.key.to_string(),
            job: self.key.id,
            attempt: self.key.attempt,
            name: self.name.clone(),
            project: self.project.clone(),
            coordinator: self.coordinator.clone(),
            image: self.image.clone(),
            digest: self.digest.clone(),
            answer: self.answer(now),
            failed: self.has_failed(),
            outcome: self.outcome.clone(),
            live: self.live.clone(),
            created: self.created,
            removed: self.removed,
            seconds: self.took(now),
        }
    }
}

impl Live {
    /// What the job does, in one sentence.
    pub(super) fn sentence(&self, now: Timestamp) -> String {
        let span = report::span(since(self.since, now));
        let doing = match (&self.stage, self.state) {
            (_, State::Held) => {
                let until = self.held_until.map(report::minute).unwrap_or_default();
                return format!("Its machine is held until {until}.");
            }
            (_, State::Cleaning) => format!("Being removed since {span}"),
            (Some(stage), State::Running) => format!("Running {} since {span}", report::line(stage, 60)),
            (Some(stage), state) if stage == PREPARE => format!("Preparing: {state} since {span}"),
            (_, state) => format!("{} since {span}, and no script runs", capital(&state.to_string())),
        };
        if self.abandoned && self.state != State::Cleaning {
            format!("{doing}; the gitlab-runner that began it is gone, and `cannery reap` removes it.")
        } else {
            format!("{doing}.")
        }
    }
}

/// A clock that was set back makes no negative time.
pub(super) fn since(begin: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(begin)).unwrap_or_default()
}

fn capital(word: &str) -> String {
    let mut chars = word.chars();
    chars
        .next()
        .map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}
