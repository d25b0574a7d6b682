use serde::Serialize;

use super::choose::choose;
use super::reference;
use crate::cli::{Answer, Context, print, print_json};
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
    /// How to print what was named; as text, the digest
    #[arg(long, value_enum, default_value = "text")]
    format: Answer,
}

/// An image and its new name; the JSON's keys are these names.
#[derive(Debug, Serialize)]
struct Row {
    reference: String,
    digest: String,
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
    let row = Row {
        reference: destination.to_string(),
        digest: chosen.held.digest.to_string(),
    };
    match arguments.format {
        Answer::Json => print_json(&row),
        Answer::Text => {
            print(&format!("{}\n", row.digest));
            Ok(())
        }
    }
}
