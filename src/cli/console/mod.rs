use super::{Context, job};
use crate::outcome::Failure;
use crate::record::{JobDir, JobKey, Jobs};
use crate::report;
use crate::settings::Settings;

mod open;
mod tickets;

/// See and enter a job's machine: open its screen in a viewer, and mint the tickets that open its page
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(super) struct Arguments {
    #[command(flatten)]
    open: open::Arguments,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Ticket(tickets::TicketArguments),
    #[command(visible_alias = "ls")]
    List(tickets::ListArguments),
    End(tickets::EndArguments),
}

pub(super) async fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let settings = context.settings()?;
    match &arguments.command {
        None => open::run(context, &settings, &arguments.open).await,
        Some(Command::Ticket(arguments)) => tickets::mint(context, &settings, arguments),
        Some(Command::List(arguments)) => tickets::list(&settings, arguments),
        Some(Command::End(arguments)) => tickets::end(&settings, arguments),
    }
}

/// The job that a name on the command line means, of those that have a machine.
fn choose(settings: &Settings, name: &str) -> Result<JobDir, Failure> {
    let jobs = Jobs::look(&settings.state_dir);
    let keys: Vec<JobKey> = jobs.list()?.iter().map(|job| job.key().clone()).collect();
    let key = job::choose(&keys, name).map_err(|unclear| {
        Failure::system(unclear.to_string()).hint("`cannery vm list` shows those that have a machine")
    })?;
    jobs.find(&key)
        .ok_or_else(|| Failure::system(format!("job {key} was removed just now")))
}

/// Who calls, for lists and logs.
fn whoami(context: &Context) -> String {
    let name = |variable| context.environment.text(variable);
    report::line(name("SUDO_USER").or(name("USER")).unwrap_or("an admin"), 60)
}
