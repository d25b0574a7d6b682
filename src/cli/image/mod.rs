use super::Context;
use crate::image::Reference;
use crate::outcome::Failure;
use crate::report::plain;

mod convert;
mod export;
mod import;
mod inspect;
mod list;
mod progress;
mod pull;
mod push;
mod source;

/// Fetch, see and keep the images of this host
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    Pull(pull::Arguments),
    #[command(visible_alias = "ls")]
    List(list::Arguments),
    Push(push::Arguments),
    Convert(convert::Arguments),
    Export(export::Arguments),
    Import(import::Arguments),
    Inspect(inspect::Arguments),
}

pub(super) async fn run(context: &Context, command: Command) -> Result<(), Failure> {
    match command {
        Command::Pull(arguments) => pull::run(context, &arguments).await,
        Command::List(arguments) => list::run(context, &arguments),
        Command::Push(arguments) => push::run(context, &arguments).await,
        Command::Convert(arguments) => convert::run(context, &arguments).await,
        Command::Export(arguments) => export::run(context, &arguments).await,
        Command::Import(arguments) => import::run(context, &arguments).await,
        Command::Inspect(arguments) => inspect::run(context, &arguments).await,
    }
}

/// Does something long, unless Ctrl-C comes in between; `what` is a noun for the sentence.
async fn interruptible(what: &str, work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    tokio::select! {
        result = work => result,
        interrupted = tokio::signal::ctrl_c() => Err(match interrupted {
            Ok(()) => Failure::system(format!("the {what} was interrupted")),
            Err(e) => Failure::system(format!("cannot listen for Ctrl-C: {e}")),
        }),
    }
}

/// A reference as it was written on the command line.
fn reference(text: &str) -> Result<Reference, Failure> {
    text.parse().map_err(|e| {
        Failure::system(format!("{e}")).hint("Write registry.example.com/group/image:tag or oci:/FOLDER:TAG")
    })
}

/// A reference as it may be shown on a terminal.
fn shown(reference: &impl ToString) -> String {
    plain(&reference.to_string(), SHOWN_LENGTH)
}

/// What is shown of a reference, in characters: a digest and a long name fit.
const SHOWN_LENGTH: usize = 250;
