use clap::ValueEnum;

use super::progress::Lines;
use super::{reference, shown};
use crate::cli::{Context, print};
use crate::image::{Asker, Progress, PullPolicy, Reference, Silent};
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
                        .hint("The next pull goes on from the last checkpoint, if there was one by then; a layer in zstd or xz starts again"),
                    Err(e) => Failure::system(format!("cannot listen for Ctrl-C: {e}")),
                });
            }
        };
        print(&format!("{}\n", disk.digest));
    }
    Ok(())
}
