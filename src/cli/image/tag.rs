use super::choose::choose;
use super::reference;
use crate::cli::{Context, print};
use crate::image::Reference;
use crate::outcome::Failure;
use crate::stage::images;

/// Give an image another name on this host; a registry that is asked for the name later has the last word
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// An image by reference, digest, or the beginning of one
    source: String,
    /// The new name, as `image:` would have it
    destination: String,
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let store = images::store(&context.settings()?)?;
    let destination: Reference = reference(&arguments.destination)?;
    if destination.digest().is_some() {
        return Err(
            Failure::system("a name with a digest already says which image it means")
                .hint("Leave the digest out"),
        );
    }
    let all = store.inventory()?;
    let chosen = choose(&all, &arguments.source)?;
    // The name is for the machines that the image is for.
    let named = chosen.held.names.first();
    let architecture = match named {
        Some(name) => name.architecture.clone(),
        None => images::architecture()?.to_owned(),
    };
    store.remember(&destination, &architecture, &chosen.held.digest)?;
    print(&format!("{}\n", chosen.held.digest));
    Ok(())
}
