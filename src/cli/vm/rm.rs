use super::choose::choose;
use crate::cli::{Context, print};
use crate::history::Removal;
use crate::outcome::Failure;
use crate::reap::Reaper;
use crate::record::Jobs;

/// Remove machines at once, whatever runs in them; their jobs fail
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// Jobs as `vm list` shows them, or numbers that only one job has
    #[arg(required = true, value_name = "JOB")]
    jobs: Vec<String>,
}

pub(super) async fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let settings = context.settings()?;
    let all = Jobs::look(&settings.state_dir).list()?;
    // All names are checked before anything is removed.
    let chosen = arguments
        .jobs
        .iter()
        .map(|name| choose(&all, name))
        .collect::<Result<Vec<_>, _>>()?;
    let reaper = Reaper::open(&settings)?;
    for job in chosen {
        reaper.remove(job, Removal::Operator).await?;
        print(&format!("{}\n", job.key()));
    }
    Ok(())
}
