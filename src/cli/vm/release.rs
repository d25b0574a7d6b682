use serde::Serialize;

use super::choose::choose;
use crate::cli::{Answer, Context, print, print_json};
use crate::history::Removal;
use crate::outcome::Failure;
use crate::reap::Reaper;
use crate::record::{Jobs, State};

/// Let a machine go that is held: at once if its job is over, else with its job
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// A job as `vm list` shows it, or its number where only one job has it
    #[arg(value_name = "JOB")]
    job: String,
    /// How to print what was let go; as text, the job
    #[arg(long, value_enum, default_value = "text")]
    format: Answer,
}

/// A job whose machine is no longer held; the JSON's keys are these names.
#[derive(Debug, Serialize)]
struct Row {
    key: String,
    /// Else it goes with its job.
    removed: bool,
}

pub(super) async fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let settings = context.settings()?;
    let all = Jobs::look(&settings.state_dir).list()?;
    let job = choose(&all, &arguments.job)?;
    let key = job.key();
    let unheld = || {
        Failure::system(format!("the machine of job {key} is not held"))
            .hint(format!("`cannery vm rm {key}` removes it, and its job fails"))
    };
    let record = job.read()?.ok_or_else(unheld)?;
    let removed = record.state == State::Held;
    if removed {
        Reaper::open(&settings)?.remove(job, Removal::Operator).await?;
    } else if record.held.is_none() {
        return Err(unheld());
    } else {
        job.note(|record| record.held = None)?;
    }
    match arguments.format {
        Answer::Json => print_json(&Row {
            key: key.to_string(),
            removed,
        }),
        Answer::Text => {
            let later = if removed { "" } else { " goes when its job is over" };
            print(&format!("{key}{later}\n"));
            Ok(())
        }
    }
}
