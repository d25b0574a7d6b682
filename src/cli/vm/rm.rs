use crate::cli::{Context, print};
use crate::history::Removal;
use crate::outcome::Failure;
use crate::reap::Reaper;
use crate::record::{JobDir, Jobs};

/// Remove machines at once, whatever runs in them; their jobs fail
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// Jobs as `vm list` shows them, or job numbers where they are unmistakable
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

/// The job that a name on the command line means.
fn choose<'a>(all: &'a [JobDir], name: &str) -> Result<&'a JobDir, Failure> {
    if let Some(job) = all
        .iter()
        .find(|j| j.key().to_string() == name || j.key().machine_name() == name)
    {
        return Ok(job);
    }
    let by_number: Vec<&JobDir> = all.iter().filter(|j| j.key().id.to_string() == name).collect();
    match by_number.as_slice() {
        [one] => Ok(one),
        [] => Err(Failure::system(format!(
            "no job \"{}\" has a machine here",
            crate::report::plain(name, 60)
        ))
        .hint("`cannery vm list` shows those that have")),
        several => {
            let keys: Vec<String> = several.iter().map(|j| j.key().to_string()).collect();
            Err(Failure::system(format!(
                "job {name} is not unmistakable: it may be {}",
                keys.join(", ")
            )))
        }
    }
}
