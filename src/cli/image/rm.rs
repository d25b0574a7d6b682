use serde::Serialize;

use super::choose::choose;
use super::shown;
use crate::cli::{Answer, Context, Results};
use crate::outcome::Failure;
use crate::reap::Images;

/// Remove names, and images that have no other name and that nothing keeps
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// Images by reference, digest, or the beginning of one; a digest stands for the image with all its names
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
    /// How to print what went
    #[arg(long, value_enum, default_value = "text")]
    format: Answer,
}

/// What went: a name, or an image with all that it had. So it is written in the JSON.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum Gone {
    Untagged(String),
    Deleted(String),
}

impl Gone {
    fn line(&self) -> String {
        match self {
            Self::Untagged(name) => format!("Untagged: {}", shown(name)),
            Self::Deleted(digest) => format!("Deleted: {digest}"),
        }
    }
}

pub(super) async fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let mut gone = Results::new(arguments.format);
    let result = remove(context, arguments, &mut gone).await;
    gone.end(result)
}

async fn remove(context: &Context, arguments: &Arguments, gone: &mut Results<Gone>) -> Result<(), Failure> {
    let settings = context.settings()?;
    let images = Images::open(&settings)?;
    let all = images.store().inventory()?;
    // All words are checked before anything is removed.
    for word in &arguments.images {
        choose(&all, word)?;
    }
    let users = images.users().await?;
    for word in &arguments.images {
        // An earlier word may have taken a name away.
        let all = images.store().inventory()?;
        let chosen = choose(&all, word)?;
        let digest = chosen.held.digest;
        let others = |reference: &String| chosen.held.names.iter().any(|name| name.reference != *reference);
        if let Some(reference) = &chosen.name
            && others(&reference.to_string())
        {
            for name in chosen
                .held
                .names
                .iter()
                .filter(|name| name.reference == reference.to_string())
            {
                images.store().forget(reference, &name.architecture)?;
            }
            gone.add(Gone::Untagged(reference.to_string()), Gone::line);
            continue;
        }
        let keepers: Vec<String> = users
            .keepers(chosen.held)
            .iter()
            .map(ToString::to_string)
            .collect();
        if !keepers.is_empty() || !images.remove(&digest)? {
            let why = if keepers.is_empty() {
                "somebody who has just come".to_owned()
            } else {
                keepers.join(", ")
            };
            return Err(
                Failure::system(format!("the image {digest} stays: it is kept by {why}"))
                    .hint("`cannery image unpin` takes pins away; the others let go when they end"),
            );
        }
        for name in &chosen.held.names {
            gone.add(Gone::Untagged(name.reference.clone()), Gone::line);
        }
        gone.add(Gone::Deleted(digest.to_string()), Gone::line);
    }
    Ok(())
}
