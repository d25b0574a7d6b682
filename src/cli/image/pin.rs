use serde::Serialize;

use super::choose::choose;
use crate::cli::{Answer, Context, Results};
use crate::image::PinName;
use crate::outcome::Failure;
use crate::stage::images;

/// Keep images whatever happens, until they are unpinned
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// Images by reference, digest, or the beginning of one
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
    /// What the pin is called; an image may have several
    #[arg(long, default_value = "operator")]
    name: PinName,
    /// How to print what was pinned; as text, the digests
    #[arg(long, value_enum, default_value = "text")]
    format: Answer,
}

/// An image that is pinned now; the JSON's keys are these names.
#[derive(Debug, Serialize)]
struct Row {
    digest: String,
    pin: String,
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let mut pinned = Results::new(arguments.format);
    let result = pin(context, arguments, &mut pinned);
    pinned.end(result)
}

fn pin(context: &Context, arguments: &Arguments, pinned: &mut Results<Row>) -> Result<(), Failure> {
    let store = images::store(&context.settings()?)?;
    let all = store.inventory()?;
    // All words are checked before anything is pinned.
    let chosen = arguments
        .images
        .iter()
        .map(|word| choose(&all, word))
        .collect::<Result<Vec<_>, _>>()?;
    for chosen in chosen {
        store.pin(&chosen.held.digest, &arguments.name)?;
        let row = Row {
            digest: chosen.held.digest.to_string(),
            pin: arguments.name.to_string(),
        };
        pinned.add(row, |row| row.digest.clone());
    }
    Ok(())
}
