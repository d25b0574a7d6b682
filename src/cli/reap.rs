use std::path::PathBuf;

use serde::Serialize;

use super::{Answer, Context, Results, print};
use crate::image::Going;
use crate::outcome::Failure;
use crate::reap::{self, Action};
use crate::stage::imports;

/// Remove what no runner will come back for: machines, overlays, slots, half-fetched images
///
/// Images and history that the settings no longer keep go as well, and what a killed import of a machine left.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Only say what would be removed of jobs; images, history and imports are not looked at
    #[arg(long)]
    dry_run: bool,
    /// How to print what was removed
    #[arg(long, value_enum, default_value = "text")]
    format: Answer,
}

/// What was removed, would be, or was left to someone else; the JSON's keys are these names.
#[derive(Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    thing: Thing,
    reason: String,
    removed: bool,
}

/// What there is to remove, with the names that lists have for it.
#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Thing {
    Job { key: String },
    Machine { machine: String, key: String },
    Folder { path: PathBuf },
    Slot { network: String, index: u32 },
    Import { machine: String },
    Image { digest: String, bytes: u64 },
}

impl Row {
    fn of(action: &Action, removed: bool) -> Self {
        let (thing, why) = match action {
            Action::RemoveJob(key, why) => (Thing::Job { key: key.to_string() }, why),
            Action::DestroyDomain(machine, key, why) => (
                Thing::Machine {
                    machine: machine.clone(),
                    key: key.to_string(),
                },
                why,
            ),
            Action::RemoveFolder(path, why) => (Thing::Folder { path: path.clone() }, why),
            Action::FreeSlot(lease, why) => (
                Thing::Slot {
                    network: lease.network.clone(),
                    index: lease.index,
                },
                why,
            ),
        };
        Self {
            thing,
            reason: why.to_string(),
            removed,
        }
    }

    fn of_import(machine: String) -> Self {
        Self {
            thing: Thing::Import { machine },
            reason: "its import was killed".to_owned(),
            removed: true,
        }
    }

    fn of_image(going: &Going) -> Self {
        Self {
            thing: Thing::Image {
                digest: going.digest.to_string(),
                bytes: going.bytes,
            },
            reason: going.reason.to_string(),
            removed: true,
        }
    }
}

pub(super) async fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let mut removed = Results::new(arguments.format);
    let result = remove(context, arguments, &mut removed).await;
    removed.end(result)
}

async fn remove(context: &Context, arguments: &Arguments, removed: &mut Results<Row>) -> Result<(), Failure> {
    let settings = context.settings()?;
    let reaper = reap::Reaper::open(&settings)?;
    let actions = reaper.plan().await?;
    let mut nothing = actions.is_empty();
    let mut failures = Vec::new();
    for action in actions {
        if arguments.dry_run {
            removed.add(Row::of(&action, false), |_| format!("would remove {action}"));
            continue;
        }
        match reaper.apply(&action).await {
            Ok(true) => removed.add(Row::of(&action, true), |_| format!("removed {action}")),
            Ok(false) => removed.add(Row::of(&action, false), |_| {
                format!("left {action}: someone else is at it, or was")
            }),
            Err(failure) => failures.push(failure),
        }
    }
    if !arguments.dry_run {
        reaper.sweep_remains();
        for name in imports::settle(&settings).await {
            nothing = false;
            let line = format!("removed what a killed import of machine {name} left");
            removed.add(Row::of_import(name), |_| line);
        }
        // Images, as the settings have them kept.
        if let Some(policy) = reap::standing_policy(&settings) {
            match reap::Images::open(&settings)?.prune(&policy).await {
                Ok(gone) => {
                    nothing &= gone.is_empty();
                    for going in &gone {
                        removed.add(Row::of_image(going), |row| {
                            format!("removed image {}: {}", going.digest, row.reason)
                        });
                    }
                }
                Err(failure) => failures.push(failure),
            }
        }
        // Whoever asks by name wants it now.
        if let Err(e) = reap::history(&settings).tidy() {
            failures.push(e.into());
        }
    }
    if nothing && failures.is_empty() && arguments.format == Answer::Text {
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
