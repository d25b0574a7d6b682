use std::path::PathBuf;

use clap::ValueEnum;
use serde::Serialize;

use super::progress::Lines;
use super::{reference, shown};
use crate::cli::{Answer, Context, Results};
use crate::image::{Asker, Disk, DiskFormat, Progress, PullPolicy, Reference, Silent};
use crate::outcome::Failure;
use crate::stage::images;

/// Fetch images into this host's store, and print their digests
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// Images as `image:` names them
    #[arg(required = true, value_name = "REF")]
    references: Vec<String>,
    /// When the registry is asked
    #[arg(long, value_enum, default_value = "always")]
    policy: Policy,
    /// Print nothing but the digests
    #[arg(long, short)]
    quiet: bool,
    /// How to print what was fetched; as text, the digests
    #[arg(long, value_enum, default_value = "text")]
    format: Answer,
}

/// An image that is here now; the JSON's keys are these names.
#[derive(Debug, Serialize)]
struct Row {
    reference: String,
    digest: String,
    path: PathBuf,
    format: DiskFormat,
    virtual_size: u64,
    fetched_bytes: u64,
    from_cache: bool,
}

impl Row {
    fn of(disk: &Disk) -> Self {
        Self {
            reference: disk.reference.clone(),
            digest: disk.digest.to_string(),
            path: disk.path.clone(),
            format: disk.format,
            virtual_size: disk.virtual_size,
            fetched_bytes: disk.fetched_bytes,
            from_cache: disk.from_cache,
        }
    }
}

/// When the registry is asked, as GitLab spells it.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Policy {
    /// What is here already is not fetched again.
    Always,
    /// Only for what is not here.
    IfNotPresent,
    /// Only say whether it is here.
    Never,
}

impl From<Policy> for PullPolicy {
    fn from(policy: Policy) -> Self {
        match policy {
            Policy::Always => PullPolicy::Always,
            Policy::IfNotPresent => PullPolicy::IfNotPresent,
            Policy::Never => PullPolicy::Never,
        }
    }
}

pub(super) async fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let mut fetched = Results::new(arguments.format);
    let result = fetch(context, arguments, &mut fetched).await;
    fetched.end(result)
}

async fn fetch(context: &Context, arguments: &Arguments, fetched: &mut Results<Row>) -> Result<(), Failure> {
    let settings = context.settings()?;
    // All names are checked before anything is fetched.
    let references: Vec<Reference> = arguments
        .references
        .iter()
        .map(|text| reference(text))
        .collect::<Result<_, _>>()?;
    let store = images::store(&settings)?;
    let credentials = images::credentials(&settings)?;
    for reference in references {
        let name = shown(&reference);
        let request = images::request(
            &settings,
            reference,
            vec![arguments.policy.into()],
            credentials.clone(),
            Asker::Operator,
        )?;
        let lines = Lines::new(&name, &context.log);
        let progress: &dyn Progress = if arguments.quiet { &Silent } else { &lines };
        let disk = tokio::select! {
            disk = store.provide(&request, progress) => disk?,
            interrupted = tokio::signal::ctrl_c() => {
                return Err(match interrupted {
                    Ok(()) => Failure::system(format!("the pull of {name} was interrupted"))
                        .hint("The next pull goes on from the last checkpoint, if there was one by then; a layer in xz, or in zstd of one frame, starts again"),
                    Err(e) => Failure::system(format!("cannot listen for Ctrl-C: {e}")),
                });
            }
        };
        fetched.add(Row::of(&disk), |row| row.digest.clone());
    }
    Ok(())
}
