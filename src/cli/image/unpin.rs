use super::choose::choose;
use crate::cli::{Context, print};
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
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let store = images::store(&context.settings()?)?;
    let all = store.inventory()?;
    let chosen = arguments
        .images
        .iter()
        .map(|word| choose(&all, word))
        .collect::<Result<Vec<_>, _>>()?;
    for chosen in chosen {
        let digest = chosen.held.digest;
        if store.unpin(&digest, arguments.name.as_ref())? == 0 {
            let name = arguments
                .name
                .as_ref()
                .map_or_else(String::new, |name| format!(" by the name {name}"));
            return Err(Failure::system(format!("the image {digest} is not pinned{name}"))
                .hint("`cannery image why` shows what keeps it"));
        }
        print(&format!("{digest}\n"));
    }
    Ok(())
}
