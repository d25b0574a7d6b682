use super::Context;
use crate::outcome::Failure;

mod choose;
mod list;
mod seen;
mod show;

pub(super) use choose::choose;

/// See which jobs run and ran on this host, and why they failed
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    #[command(visible_alias = "ls")]
    List(list::Arguments),
    Show(show::Arguments),
}

pub(super) fn run(context: &Context, command: &Command) -> Result<(), Failure> {
    match command {
        Command::List(arguments) => list::run(context, arguments),
        Command::Show(arguments) => show::run(context, arguments),
    }
}

#[cfg(test)]
mod tests;
