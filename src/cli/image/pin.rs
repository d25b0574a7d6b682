use super::choose::choose;
use crate::cli::{Context, print};
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
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
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
        print(&format!("{}\n", chosen.held.digest));
    }
    Ok(())
}
