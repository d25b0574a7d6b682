use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use super::choose::{Unclear, choose};
use super::seen::{self, Seen, Summary};
use crate::cli::{Answer, Context, print, print_json};
use crate::history::SERIAL_BYTES;
use crate::machine::serial;
use crate::outcome::Failure;
use crate::record::{Ending, JobKey, Phase, Stage};
use crate::report;

/// Show one job: why it failed in the first line, then how long each part took and what its guest said last
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// A job as `job list` shows it, its number, or the beginning of its name; the last try is meant
    #[arg(value_name = "JOB")]
    job: String,
    /// Show so many lines of the serial log's end
    #[arg(long, value_name = "N", default_value_t = 20)]
    serial_lines: usize,
    /// Show all that is kept of the serial log
    #[arg(long, conflicts_with = "serial_lines")]
    serial: bool,
    /// How to print it
    #[arg(long, value_enum, default_value = "text")]
    format: Answer,
}

/// What programs are told of a job; the JSON's keys are these names.
#[derive(Debug, Serialize)]
struct Whole<'a> {
    #[serde(flatten)]
    summary: Summary,
    hints: Vec<String>,
    phases: &'a [Phase],
    stages: &'a [Stage],
    serial_log: String,
    screen: Option<&'a Path>,
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let settings = context.settings()?;
    let now = Timestamp::now();
    let all = seen::all(context, &settings)?;
    let keys: Vec<JobKey> = all.iter().map(|job| job.key.clone()).collect();
    let key = choose(&keys, &arguments.job).map_err(|e| {
        let failure = Failure::system(e.to_string());
        match e {
            Unclear::None(_) => failure.hint("`cannery job list --all` shows those that are; how long jobs are remembered is [history] in the settings"),
            Unclear::Several(..) => failure.hint("Give more of its name"),
        }
    })?;
    let Some(job) = all.into_iter().find(|job| job.key == key) else {
        return Err(Failure::system(format!("job {key} was just forgotten")));
    };
    let lines = if arguments.serial {
        usize::MAX
    } else {
        arguments.serial_lines
    };
    let serial_log = match serial::tail(&job.serial_log, lines, SERIAL_BYTES) {
        Ok(text) => text,
        Err(e) => {
            let path = job.serial_log.display();
            context
                .log
                .line(format!("cannery: the serial log {path} cannot be read: {e}."));
            String::new()
        }
    };
    match arguments.format {
        Answer::Json => print_json(&Whole {
            summary: job.summary(now),
            hints: job.outcome.as_ref().map(|o| o.hints()).unwrap_or_default(),
            phases: &job.phases,
            stages: &job.stages,
            serial_log,
            screen: job.screen.as_deref(),
        }),
        Answer::Text => {
            print(&page(&job, (lines > 0).then_some(serial_log.as_str()), now));
            Ok(())
        }
    }
}

/// The page that people read, with the serial log's end if that is wanted.
pub(super) fn page(job: &Seen, serial_log: Option<&str>, now: Timestamp) -> String {
    let mut page = job.answer(now);
    page.push('\n');
    let hints = job.outcome.as_ref().map(|o| o.hints()).unwrap_or_default();
    hints.iter().for_each(|hint| page.push_str(&format!("{hint}\n")));
    if let (Some(_), Some(live)) = (&job.outcome, &job.live) {
        page.push_str(&format!("{}\n", live.sentence(now)));
    }
    page.push('\n');
    page.push_str(&identity(job, now));
    if !job.phases.is_empty() {
        page.push('\n');
        page.push_str(&phases(&job.phases));
    }
    if !job.stages.is_empty() {
        page.push('\n');
        page.push_str(&stages(&job.stages, job.live.is_some()));
    }
    match serial_log {
        None => {}
        Some("") => page.push_str("\nThe guest's serial log has nothing.\n"),
        Some(log) => {
            page.push_str("\nThe end of the guest's serial log:\n");
            log.lines()
                .for_each(|line| page.push_str(&format!("  | {line}\n")));
        }
    }
    page
}

/// Which job it is.
fn identity(job: &Seen, now: Timestamp) -> String {
    let time = |at: Timestamp| at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string();
    let or_dash = |text: &Option<String>| report::line(text.as_deref().unwrap_or("-"), 200);
    let began = format!(
        "{}, {} ago",
        time(job.created),
        report::age(seen::since(job.created, now))
    );
    let mut lines = vec![
        ("Job", job.key.to_string()),
        ("Name", report::line(&job.name, 200)),
        ("Project", report::line(&job.project, 200)),
        ("GitLab", report::line(&job.coordinator, 200)),
        ("Image", or_dash(&job.image)),
        ("Digest", or_dash(&job.digest)),
        ("Started", began),
    ];
    lines.extend(job.removed.map(|at| ("Removed", time(at))));
    let screen = job.screen.as_ref().map(|file| file.display().to_string());
    lines.extend(screen.map(|file| ("Screen", file)));
    lines
        .into_iter()
        .map(|(name, value)| format!("{name:<8} {value}\n"))
        .collect()
}

/// The longest bar, in characters.
const BAR: f64 = 30.0;

/// What prepare did, and which part took how much of it.
fn phases(phases: &[Phase]) -> String {
    let total: f64 = phases.iter().map(|p| p.seconds).sum();
    let row = |phase: &Phase| {
        let share = if total > 0.0 { phase.seconds / total } else { 0.0 };
        let filled = (0..).take_while(|n| f64::from(*n) + 0.5 < share * BAR).count();
        vec![
            report::line(&phase.name, 30),
            seconds(phase.seconds),
            format!("{:>3.0} %", share * 100.0),
            "#".repeat(filled),
        ]
    };
    let rows: Vec<_> = phases.iter().map(row).collect();
    report::table(&["PHASE", "TOOK", "SHARE", ""], &rows)
}

/// The job's calls, and how each ended.
fn stages(stages: &[Stage], live: bool) -> String {
    let row = |stage: &Stage| {
        let ending = match &stage.ending {
            Some(Ending::Succeeded) => "succeeded".to_owned(),
            Some(Ending::Script { code, .. }) => format!("exit code {code}"),
            Some(Ending::Author(reason)) => format!("job's fault: {}", report::line(&reason.message, 100)),
            Some(Ending::System(reason)) => format!("system failure: {}", report::line(&reason.message, 100)),
            Some(Ending::Cancelled) => "cancelled".to_owned(),
            Some(Ending::Killed) => "killed".to_owned(),
            None if live => "goes on".to_owned(),
            None => "did not end".to_owned(),
        };
        let took = stage.seconds.map_or_else(|| "-".to_owned(), seconds);
        vec![report::line(&stage.name, 60), took, ending]
    };
    let rows: Vec<_> = stages.iter().map(row).collect();
    report::table(&["STAGE", "TOOK", "ENDED"], &rows)
}

fn seconds(seconds: f64) -> String {
    Duration::try_from_secs_f64(seconds).map_or_else(|_| "-".to_owned(), report::seconds)
}
