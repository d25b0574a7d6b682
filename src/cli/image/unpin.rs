use serde::Serialize;

use super::choose::choose;
use crate::cli::{Answer, Context, Results};
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
    let mut unpinned = Results::new(arguments.format);
    let result = unpin(context, arguments, &mut unpinned);
    unpinned.end(result)
}

fn unpin(context: &Context, arguments: &Arguments, unpinned: &mut Results<Row>) -> Result<(), Failure> {
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
        let row = Row {
            digest: digest.to_string(),
            pins: pins.iter().map(ToString::to_string).collect(),
        };
        unpinned.add(row, |row| row.digest.clone());
    }
    Ok(())
}
