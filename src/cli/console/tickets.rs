use jiff::Timestamp;
use serde::Serialize;

use super::{choose, whoami};
use crate::cli::{Answer, Context, Format, Results, print, print_json};
use crate::outcome::Failure;
use crate::quantity::Span;
use crate::record::{JobKey, Jobs};
use crate::report;
use crate::serve;
use crate::settings::Settings;
use crate::ticket::{self, Grant, Mode, TicketId};

/// Mint a ticket for a job's machine and print the address that opens its console
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct TicketArguments {
    /// The job, as `vm list` shows it, or its number where only one job has it
    #[arg(value_name = "JOB")]
    job: String,
    /// Let its bearer see, but not type
    #[arg(long)]
    view_only: bool,
    /// How long it may be redeemed, such as 10m [default: console.ticket_ttl]
    #[arg(long, value_name = "TIME")]
    ttl: Option<Span>,
    /// How many sessions it may have open at once [default: console.viewers]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..))]
    viewers: Option<u32>,
    /// Print only the ticket
    #[arg(long)]
    quiet: bool,
}

/// List the tickets of all jobs
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct ListArguments {
    /// How to print the list
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
}

/// Take tickets away, which ends the sessions that they opened
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct EndArguments {
    /// The job, as `vm list` shows it, or its number where only one job has it
    #[arg(value_name = "JOB")]
    job: String,
    /// One ticket, as `console list` shows it, instead of all of the job's
    #[arg(value_name = "TICKET")]
    ticket: Option<String>,
    /// How to print what was taken away; as text, the tickets
    #[arg(long, value_enum, default_value = "text")]
    format: Answer,
}

pub(super) fn mint(
    context: &Context,
    settings: &Settings,
    arguments: &TicketArguments,
) -> Result<(), Failure> {
    let Some(console) = &settings.console else {
        return Err(
            Failure::system("the settings have no console").hint("docs/consoles.md shows what it needs")
        );
    };
    let job = choose(settings, &arguments.job)?;
    let now = Timestamp::now();
    let ttl = arguments.ttl.map_or(console.ticket_ttl, |span| span.0);
    let expires = now.saturating_add(ttl).unwrap_or(Timestamp::MAX);
    let mode = if arguments.view_only {
        Mode::ViewOnly
    } else {
        Mode::Full
    };
    let viewers = arguments.viewers.unwrap_or(console.viewers);
    let grant = Grant::new(mode, now, expires, viewers, whoami(context));
    let (text, id) = ticket::mint(&job, &grant)?;
    serve::note_ticket(console, job.key(), &id, &grant);
    if arguments.quiet {
        print(&format!("{}\n", text.reveal()));
        return Ok(());
    }
    print(&format!("{}\n", ticket::address(&console.page(job.key()), &text)));
    context.log.line(format!(
        "cannery: {} ticket {id}, for {} viewers, to be used within {}.",
        grant.mode,
        grant.viewers,
        report::span(ttl)
    ));
    Ok(())
}

/// One line of the list; the JSON's keys are these names.
#[derive(Debug, Serialize)]
struct Row {
    job: JobKey,
    ticket: String,
    mode: Mode,
    by: String,
    minted: Timestamp,
    expires: Timestamp,
    viewers: u32,
}

pub(super) fn list(settings: &Settings, arguments: &ListArguments) -> Result<(), Failure> {
    let mut rows = Vec::new();
    for job in Jobs::look(&settings.state_dir).list()? {
        rows.extend(ticket::list(&job)?.into_iter().map(|(id, grant)| Row {
            job: job.key().clone(),
            ticket: id.short().to_owned(),
            mode: grant.mode,
            by: grant.by,
            minted: grant.minted,
            expires: grant.expires,
            viewers: grant.viewers,
        }));
    }
    if arguments.format == Format::Json {
        return print_json(&rows);
    }
    let now = Timestamp::now();
    let cells = |row: Row| {
        vec![
            row.job.to_string(),
            row.ticket,
            row.mode.to_string(),
            row.viewers.to_string(),
            report::line(&row.by, 60),
            if row.expires <= now {
                "expired".to_owned()
            } else if row.expires == ticket::WITH_THE_JOB {
                "with the job".to_owned()
            } else {
                row.expires.to_string()
            },
        ]
    };
    let rows: Vec<Vec<String>> = rows.into_iter().map(cells).collect();
    print(&report::table(
        &["JOB", "TICKET", "MODE", "VIEWERS", "BY", "EXPIRES"],
        &rows,
    ));
    Ok(())
}

/// A ticket that was taken away; the JSON's keys are those of the list.
#[derive(Debug, Serialize)]
struct Ended {
    job: JobKey,
    ticket: String,
}

pub(super) fn end(settings: &Settings, arguments: &EndArguments) -> Result<(), Failure> {
    let mut ended = Results::new(arguments.format);
    let result = revoke(settings, arguments, &mut ended);
    ended.end(result)
}

fn revoke(settings: &Settings, arguments: &EndArguments, ended: &mut Results<Ended>) -> Result<(), Failure> {
    let job = choose(settings, &arguments.job)?;
    let all = ticket::list(&job)?.into_iter().map(|(id, _)| id);
    let meant: Vec<TicketId> = match &arguments.ticket {
        None => all.collect(),
        Some(name) => all.filter(|id| id.short() == name).collect(),
    };
    if let (Some(name), true) = (&arguments.ticket, meant.is_empty()) {
        return Err(Failure::system(format!(
            "job {} has no ticket {}",
            job.key(),
            report::line(name, 60)
        ))
        .hint("`cannery console list` shows those that there are"));
    }
    for id in meant {
        if ticket::revoke(&job, &id)? {
            let row = Ended {
                job: job.key().clone(),
                ticket: id.short().to_owned(),
            };
            ended.add(row, |row| row.ticket.clone());
        }
    }
    Ok(())
}
