use std::time::Duration;

use jiff::Timestamp;

use super::seen::{self, Seen};
use crate::cli::{Context, Format, print, print_json};
use crate::outcome::Failure;
use crate::report;

/// How many jobs a list shows unless told otherwise: a screenful.
const USUAL: usize = 30;

/// List the jobs of this host, the newest first: those that are here, and those that are remembered
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// Show so many of the newest
    #[arg(short = 'n', long, value_name = "N", default_value_t = USUAL)]
    last: usize,
    /// Show all
    #[arg(short, long, conflicts_with = "last")]
    all: bool,
    /// Show only those that failed: not those that succeeded, were cancelled or were removed by hand
    #[arg(long)]
    failed: bool,
    /// How to print the list
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
}

const HEADER: [&str; 7] = ["JOB", "PROJECT", "NAME", "IMAGE", "OUTCOME", "STARTED", "TOOK"];

pub(super) fn cells(job: &Seen, now: Timestamp) -> Vec<String> {
    let seconds = job.took(now).and_then(|s| Duration::try_from_secs_f64(s).ok());
    vec![
        job.key.to_string(),
        report::line(&job.project, 40),
        report::line(&job.name, 40),
        report::line(job.image.as_deref().unwrap_or("-"), 60),
        job.word(),
        format!("{} ago", report::age(seen::since(job.created, now))),
        seconds.map_or_else(|| "-".to_owned(), report::span),
    ]
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let settings = context.settings()?;
    let now = Timestamp::now();
    let mut jobs = seen::all(context, &settings)?;
    if arguments.failed {
        jobs.retain(Seen::has_failed);
    }
    let found = jobs.len();
    if !arguments.all {
        jobs.truncate(arguments.last);
    }
    match arguments.format {
        Format::Json => {
            let summaries: Vec<_> = jobs.iter().map(|job| job.summary(now)).collect();
            print_json(&summaries)
        }
        Format::Table => {
            let rows: Vec<_> = jobs.iter().map(|job| cells(job, now)).collect();
            print(&report::table(&HEADER, &rows));
            if found > jobs.len() {
                context
                    .log
                    .line(format!("{} more: --all shows them.", found - jobs.len()));
            }
            Ok(())
        }
    }
}
