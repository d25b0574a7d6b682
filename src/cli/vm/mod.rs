use super::Context;
use crate::outcome::Failure;

mod list;
mod rm;

/// See and remove the machines on this host
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    #[command(visible_alias = "ls")]
    List(list::Arguments),
    Rm(rm::Arguments),
}

pub(super) async fn run(context: &Context, command: &Command) -> Result<(), Failure> {
    match command {
        Command::List(arguments) => list::run(context, arguments),
        Command::Rm(arguments) => rm::run(context, arguments).await,
    }
}
