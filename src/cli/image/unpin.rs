use serde::Serialize;

use super::choose::choose;
use crate::cli::{Answer, Context, print, print_json};
use crate::image::PinName;
use crate::outcome::Failure;
use crate::stage::images;

/// Let images go again that were pinned
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// Images by reference, digest, or the beginning of one
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
    /// Only the pin of this name [default: all]
    #[arg(long)]
    name: Option<PinName>,
    /// How to print what was let go; as text, the digests
    #[arg(long, value_enum, default_value = "text")]
    format: Answer,
}

/// An image that these pins no longer keep; the JSON's keys are these names.
#[derive(Debug, Serialize)]
struct Row {
    digest: String,
    pins: Vec<String>,
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let mut rows = Vec::new();
    let unpinned = unpin(context, arguments, |row| match arguments.format {
        Answer::Text => print(&format!("{}\n", row.digest)),
        Answer::Json => rows.push(row),
    });
    // Also those that were let go before one that was not.
    if arguments.format == Answer::Json {
        print_json(&rows)?;
    }
    unpinned
}

fn unpin(context: &Context, arguments: &Arguments, mut done: impl FnMut(Row)) -> Result<(), Failure> {
    let store = images::store(&context.settings()?)?;
    let all = store.inventory()?;
    let chosen = arguments
        .images
        .iter()
        .map(|word| choose(&all, word))
        .collect::<Result<Vec<_>, _>>()?;
    for chosen in chosen {
        let digest = chosen.held.digest;
        let pins = store.unpin(&digest, arguments.name.as_ref())?;
        if pins.is_empty() {
            let name = arguments
                .name
                .as_ref()
                .map_or_else(String::new, |name| format!(" by the name {name}"));
            return Err(Failure::system(format!("the image {digest} is not pinned{name}"))
                .hint("`cannery image why` shows what keeps it"));
        }
        done(Row {
            digest: digest.to_string(),
            pins: pins.iter().map(ToString::to_string).collect(),
        });
    }
    Ok(())
}
