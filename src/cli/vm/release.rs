use super::choose::choose;
use crate::cli::{Context, print};
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
    if record.state == State::Held {
        Reaper::open(&settings)?.remove(job, Removal::Operator).await?;
        print(&format!("{key}\n"));
        return Ok(());
    }
    if record.held.is_none() {
        return Err(unheld());
    }
    job.note(|record| record.held = None)?;
    print(&format!("{key} goes when its job is over\n"));
    Ok(())
}
