//! run: one of the job's scripts, from its text to its exit code.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Instant;

use jiff::Timestamp;

use super::hold::{self, End};
use super::post_mortem::PostMortem;
use super::visit::{Ended, Visit};
use crate::guest::shell::RunId;
use crate::job::{Environment, claim};
use crate::kill::{self, Point};
use crate::outcome::{Failure, Fault};
use crate::quantity::Span;
use crate::record::{self, Caller, Claim, Holder, JobDir, Jobs, State};
use crate::report::JobLog;
use crate::settings::Settings;
use crate::start;

/// Runs a script in the job's guest until it ends, or `cancel` does. The script's own failure is [`Failure::script`], with its
/// true code in the file that gitlab-runner reads it from.
pub async fn run(
    settings: &Settings,
    environment: &Environment,
    log: &JobLog,
    script: &Path,
    stage: &str,
    cancel: impl Future<Output = ()>,
) -> Result<(), Failure> {
    // Before anything can fail: a code of an earlier stage must not pass for this one's.
    let code_file = environment
        .get("BUILD_EXIT_CODE_FILE")
        .filter(|p| !p.is_empty())
        .map(PathBuf::from);
    if let Some(file) = &code_file {
        remove_stale(file)?;
    }
    let claim = claim(environment)?;
    let text = std::fs::read(script)
        .map_err(|e| Failure::system(format!("cannot read the script {}: {e}", script.display())))?;
    let (job, record) = find(settings, &claim)?;
    let (Some(guest), Some(machine)) = (record.guest, record.machine) else {
        return Err(Failure::system(format!(
            "the machine of job {} is not ready: it is {}",
            job.key(),
            record.state
        ))
        .hint("prepare did not succeed before run was called"));
    };
    let id = RunId::new();
    let running = record::Run {
        id: id.as_str().to_owned(),
        stage: stage.to_owned(),
        process: Caller::this(),
    };
    let begin = Instant::now();
    // A job that was cancelled is not held, whatever failed before.
    let cancelled = environment.variable("CI_JOB_STATUS") == Some("canceled");
    drop(job.enter(State::Running, |r| {
        if cancelled {
            r.held = r.held.take().filter(|held| held.by == Holder::Operator);
        }
        r.runs.push(running);
        r.begin(stage, Timestamp::now());
    })?);
    let image = record.image.unwrap_or_default();
    let visit = Visit {
        job: &job,
        guest: &guest,
        machine: &machine,
        way: settings.guest(&image),
        builds_dir: &settings.builds_dir,
    };
    let ended = visit.run(&id, &text, cancel, log).await;
    // How a script has ended that nobody saw the end of is for the next call to make sure.
    let over = |run: &record::Run| ended.is_ok() && run.id == id.as_str();
    let (ending, took) = (noted(&ended), begin.elapsed());
    let end = End {
        stage,
        ending: &ending,
        took,
        limit: environment
            .variable("RUNNER_SCRIPT_TIMEOUT")
            .and_then(|limit| limit.parse().ok())
            .map(|Span(limit)| limit),
    };
    let (mut held, mut failed) = (None, false);
    match job.enter(State::Ready, |r| {
        let now = Timestamp::now();
        failed = end.failed(r, now);
        r.runs.retain(|run| !over(run));
        // An operator who holds the machine has said until when.
        if r.held.is_none() {
            held = end.held(r, now);
            r.held.clone_from(&held);
        }
        r.end(stage, took, ending.clone());
    }) {
        Ok(step) => drop(step),
        // Cleaned up while the script ran: that is said below, if it is a failure at all.
        Err(e) => tracing::info!("the job is gone: {e}"),
    }
    if failed {
        let project = environment.variable("CI_PROJECT_DIR");
        let folder = |dir: &String| project.map(|project| format!("{project}/{dir}"));
        let post_mortem = PostMortem {
            job: &job,
            guest: &guest,
            machine: &machine,
            way: &visit.way,
            folder: settings.report_dir.as_ref().and_then(folder),
        };
        post_mortem.take(log).await;
    }
    if let Some(held) = held {
        log.line(hold::said(settings, job.key(), held.until));
    }
    match ended {
        Ok(Ended { code: Some(0), .. }) => Ok(()),
        Ok(Ended {
            code: Some(code),
            hints,
        }) => {
            if let Some(file) = &code_file {
                std::fs::write(file, code.to_string()).map_err(|e| {
                    Failure::system(format!("cannot write the exit code to {}: {e}", file.display()))
                })?;
                kill::point(Point::CodeWritten);
            }
            Err(hints.into_iter().fold(Failure::script(code), Failure::hint))
        }
        Ok(Ended { code: None, .. }) => Err(Failure::system("the script was cancelled")),
        Err(failure) => {
            // The guest's last words may say what the sentence cannot.
            if failure.fault == Fault::System {
                start::show_serial(&job.file("serial.log"), log);
            }
            Err(failure)
        }
    }
}

/// How a run ended, for the record.
fn noted(ended: &Result<Ended, Failure>) -> record::Ending {
    match ended {
        Ok(Ended { code: Some(0), .. }) => record::Ending::Succeeded,
        Ok(Ended {
            code: Some(code),
            hints,
        }) => record::Ending::Script {
            code: *code,
            hints: hints.clone(),
        },
        Ok(Ended { code: None, .. }) => record::Ending::Cancelled,
        Err(failure) => failure.into(),
    }
}

/// The machine that prepare made for this job.
fn find(settings: &Settings, claim: &Claim) -> Result<(JobDir, record::Record), Failure> {
    // More than one cannot be: prepare removes what an earlier call left. The newest is the one then.
    Jobs::open(&settings.state_dir)?
        .claimed(claim)?
        .pop()
        .ok_or_else(|| {
            Failure::system("the job has no machine: it was never prepared, or was removed meanwhile")
                .hint("`cannery vm list` shows what there is; an operator may have removed it with `vm rm`")
        })
}

fn remove_stale(file: &Path) -> Result<(), Failure> {
    match std::fs::remove_file(file) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Failure::system(format!(
            "cannot remove the exit code of an earlier stage, {}: {e}",
            file.display()
        ))),
        _ => {
            kill::point(Point::CodeRemoved);
            Ok(())
        }
    }
}
