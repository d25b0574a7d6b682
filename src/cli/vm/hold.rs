use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::choose::choose;
use crate::cli::{Answer, Context, print, print_json};
use crate::outcome::Failure;
use crate::quantity::Span;
use crate::record::{self, Held, Holder, Jobs};
use crate::report;

/// Let a machine stay when its job is over, however it ends, or stay for longer
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// A job as `vm list` shows it, or its number where only one job has it
    #[arg(value_name = "JOB")]
    job: String,
    /// For how long from now
    #[arg(long = "for", value_name = "TIME", default_value = "1h")]
    time: Span,
    /// How to print what is held; as text, the job and until when
    #[arg(long, value_enum, default_value = "text")]
    format: Answer,
}

/// A job whose machine stays; the JSON's keys are these names.
#[derive(Debug, Serialize)]
struct Row {
    key: String,
    held_until: Timestamp,
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let settings = context.settings()?;
    let all = Jobs::look(&settings.state_dir).list()?;
    let job = choose(&all, &arguments.job)?;
    let lease = SignedDuration::try_from(arguments.time.0).unwrap_or(SignedDuration::MAX);
    let until = Timestamp::now().saturating_add(lease).unwrap_or(Timestamp::MAX);
    let hold = |record: &mut record::Record| {
        record.held = Some(Held {
            until,
            by: Holder::Operator,
        });
    };
    match job.note(hold) {
        Ok(()) => {}
        Err(record::Error::Gone(key)) => {
            return Err(Failure::system(format!(
                "job {key} is being removed: its machine can no longer stay"
            )));
        }
        Err(e) => return Err(e.into()),
    }
    let row = Row {
        key: job.key().to_string(),
        held_until: until,
    };
    match arguments.format {
        Answer::Json => print_json(&row),
        Answer::Text => {
            print(&format!("{} until {}\n", row.key, report::minute(until)));
            Ok(())
        }
    }
}
