use super::Context;
use crate::image::Reference;
use crate::outcome::Failure;
use crate::report::plain;

mod choose;
mod convert;
mod export;
mod filter;
mod import;
mod inspect;
mod list;
mod pin;
mod pipeline;
mod prewarm;
mod progress;
mod prune;
mod pull;
mod push;
mod rm;
mod source;
mod tag;
mod unpin;
mod verify;
mod why;

/// Fetch, see and keep the images of this host
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    Pull(pull::Arguments),
    #[command(visible_alias = "ls")]
    List(list::Arguments),
    Prewarm(prewarm::Arguments),
    Prune(prune::Arguments),
    Verify(verify::Arguments),
    Rm(rm::Arguments),
    Pin(pin::Arguments),
    Unpin(unpin::Arguments),
    Tag(tag::Arguments),
    Why(why::Arguments),
    Push(push::Arguments),
    Convert(convert::Arguments),
    Export(export::Arguments),
    Import(import::Arguments),
    Inspect(inspect::Arguments),
}

pub(super) async fn run(context: &Context, command: Command) -> Result<(), Failure> {
    match command {
        Command::Pull(arguments) => pull::run(context, &arguments).await,
        Command::List(arguments) => list::run(context, &arguments).await,
        Command::Prewarm(arguments) => prewarm::run(context, &arguments).await,
        Command::Prune(arguments) => prune::run(context, &arguments).await,
        Command::Verify(arguments) => verify::run(context, &arguments).await,
        Command::Rm(arguments) => rm::run(context, &arguments).await,
        Command::Pin(arguments) => pin::run(context, &arguments),
        Command::Unpin(arguments) => unpin::run(context, &arguments),
        Command::Tag(arguments) => tag::run(context, &arguments),
        Command::Why(arguments) => why::run(context, &arguments).await,
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
        let hint = if text.starts_with("docker://") {
            "Leave out docker://"
        } else {
            "Write registry.example.com/group/image:tag or oci:/FOLDER:TAG; a disk that is a file of this host can be read as file:///FOLDER/FILE"
        };
        Failure::system(format!("{e}")).hint(hint)
    })
}

/// A reference as it may be shown on a terminal.
fn shown(reference: &impl ToString) -> String {
    plain(&reference.to_string(), SHOWN_LENGTH)
}

/// What is shown of a reference, in characters: a digest and a long name fit.
const SHOWN_LENGTH: usize = 250;

/// The lowest priority there is (nice(2)): what may take its time must not take it from machines that run.
const LOWEST_PRIORITY: i32 = 19;

/// From now on all that this process does comes after everything else on the host; the kernel orders its reads and writes
/// likewise. Where that is not allowed it goes on as it is.
fn step_back() {
    if let Err(error) = rustix::process::nice(LOWEST_PRIORITY) {
        tracing::debug!(%error, "the priority stays as it is");
    }
}
