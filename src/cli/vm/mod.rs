use super::Context;
use crate::outcome::Failure;

mod choose;
mod hold;
mod list;
mod release;
mod rm;
mod screenshot;
mod ssh;

/// See, enter, hold and remove the machines on this host
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    #[command(visible_alias = "ls")]
    List(list::Arguments),
    Ssh(ssh::Arguments),
    Screenshot(screenshot::Arguments),
    Hold(hold::Arguments),
    Release(release::Arguments),
    Rm(rm::Arguments),
}

pub(super) async fn run(context: &Context, command: &Command) -> Result<(), Failure> {
    match command {
        Command::List(arguments) => list::run(context, arguments),
        Command::Ssh(arguments) => ssh::run(context, arguments),
        Command::Screenshot(arguments) => screenshot::run(context, arguments).await,
        Command::Hold(arguments) => hold::run(context, arguments),
        Command::Release(arguments) => release::run(context, arguments).await,
        Command::Rm(arguments) => rm::run(context, arguments).await,
    }
}
