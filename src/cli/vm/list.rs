use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use crate::cli::{Context, Format, print, print_json};
use crate::outcome::Failure;
use crate::record::{Jobs, Record, State};
use crate::report;

/// List the jobs that have a machine, or are getting one
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// How to print the list
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
}

/// One line of the list; the JSON's keys are these names.
#[derive(Debug, Serialize)]
struct Row {
    key: String,
    job: u64,
    name: String,
    project: String,
    coordinator: String,
    image: Option<String>,
    digest: Option<String>,
    state: String,
    stage: Option<String>,
    created: Timestamp,
    age_seconds: u64,
    address: Option<String>,
    machine: Option<String>,
    held_until: Option<Timestamp>,
}

impl Row {
    fn of(record: Record, now: Timestamp) -> Row {
        let held_until = record.held.as_ref().map(|held| held.until);
        let address = match (&record.guest, &record.slot) {
            (Some(guest), _) => Some(guest.address),
            (None, Some(slot)) => slot.address,
            (None, None) => None,
        };
        Row {
            key: record.key.to_string(),
            job: record.key.id,
            name: record.job,
            project: record.project,
            coordinator: record.coordinator,
            image: record.image,
            digest: record.digest,
            state: record.state.to_string(),
            stage: record.runs.into_iter().next_back().map(|r| r.stage),
            created: record.created,
            // A clock that was set back makes no negative age.
            age_seconds: u64::try_from(now.duration_since(record.created).as_secs()).unwrap_or(0),
            address: address.map(|a| a.to_string()),
            machine: record.machine.map(|m| m.name),
            held_until,
        }
    }

    fn cells(&self) -> Vec<String> {
        let text = |t: &Option<String>| report::plain(t.as_deref().unwrap_or("-"), 60);
        let mut state = match &self.stage {
            Some(stage) => format!("{} {}", self.state, report::plain(stage, 30)),
            None => self.state.clone(),
        };
        if let Some(until) = self.held_until {
            // Of a job that goes on, this is what comes after it.
            let then = if self.state == State::Held.to_string() {
                ""
            } else {
                ", held"
            };
            state.push_str(&format!("{then} until {}", report::minute(until)));
        }
        vec![
            self.key.clone(),
            report::plain(&self.project, 40),
            text(&self.image),
            state,
            report::age(Duration::from_secs(self.age_seconds)),
            text(&self.address),
        ]
    }
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let settings = context.settings()?;
    let now = Timestamp::now();
    let mut rows = Vec::new();
    for job in Jobs::look(&settings.state_dir).list()? {
        match job.read() {
            Ok(Some(record)) => rows.push(Row::of(record, now)),
            // Removed since the folder was listed, or by a removal that was killed: `reap` knows.
            Ok(None) => {}
            Err(e) => context.log.line(format!("cannery: {e}")),
        }
    }
    match arguments.format {
        Format::Json => print_json(&rows),
        Format::Table => {
            let cells: Vec<_> = rows.iter().map(Row::cells).collect();
            print(&report::table(
                &["JOB", "PROJECT", "IMAGE", "STATE", "AGE", "ADDRESS"],
                &cells,
            ));
            Ok(())
        }
    }
}
