use serde::Serialize;

use super::choose::choose;
use crate::cli::{Answer, Context, Results};
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
    /// How to print what was removed; as text, the jobs
    #[arg(long, value_enum, default_value = "text")]
    format: Answer,
}

/// A job whose machine was removed; the JSON's keys are these names.
#[derive(Debug, Serialize)]
struct Row {
    key: String,
}

pub(super) async fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let mut removed = Results::new(arguments.format);
    let result = remove(context, arguments, &mut removed).await;
    removed.end(result)
}

async fn remove(context: &Context, arguments: &Arguments, removed: &mut Results<Row>) -> Result<(), Failure> {
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
        let key = job.key().to_string();
        removed.add(Row { key }, |row| row.key.clone());
    }
    Ok(())
}
