use super::{Context, print};
use crate::outcome::Failure;
use crate::reap;
use crate::stage::imports;

/// Remove what no runner will come back for: machines, overlays, slots, half-fetched images
///
/// Images and history that the settings no longer keep go as well, and what a killed import of a machine left.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Only say what would be removed of jobs; images, history and imports are not looked at
    #[arg(long)]
    dry_run: bool,
}

pub(super) async fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let settings = context.settings()?;
    let reaper = reap::Reaper::open(&settings)?;
    let actions = reaper.plan().await?;
    let mut nothing = actions.is_empty();
    let mut failures = Vec::new();
    for action in actions {
        if arguments.dry_run {
            print(&format!("would remove {action}\n"));
        } else {
            match reaper.apply(&action).await {
                Ok(true) => print(&format!("removed {action}\n")),
                Ok(false) => print(&format!("left {action}: someone else is at it, or was\n")),
                Err(failure) => failures.push(failure),
            }
        }
    }
    if !arguments.dry_run {
        reaper.sweep_remains();
        for name in imports::settle(&settings).await {
            nothing = false;
            print(&format!("removed what a killed import of machine {name} left\n"));
        }
        // Images, as the settings have them kept.
        if let Some(policy) = reap::standing_policy(&settings) {
            match reap::Images::open(&settings)?.prune(&policy).await {
                Ok(gone) => {
                    nothing &= gone.is_empty();
                    gone.iter().for_each(|going| {
                        print(&format!("removed image {}: {}\n", going.digest, going.reason))
                    });
                }
                Err(failure) => failures.push(failure),
            }
        }
        // Whoever asks by name wants it now.
        if let Err(e) = reap::history(&settings).tidy() {
            failures.push(e.into());
        }
    }
    if nothing && failures.is_empty() {
        print("Nothing to remove.\n");
    }
    // All were tried; the first failure stands for the rest.
    let more = failures.len().saturating_sub(1);
    match failures.into_iter().next() {
        None => Ok(()),
        Some(first) if more == 0 => Err(first),
        Some(first) => Err(first.hint(format!("{more} more could not be removed either"))),
    }
}
