//! run: one of the job's scripts, from its text to its exit code.

use std::path::{Path, PathBuf};
use std::time::Instant;

use jiff::Timestamp;
use tokio::signal::unix::{SignalKind, signal};

use crate::guest::ready;
use crate::guest::script::{self, Control, Ending};
use crate::guest::shell::{RunId, Shell};
use crate::guest::ssh::Patience;
use crate::job::{Environment, claim};
use crate::machine::Libvirt;
use crate::outcome::Failure;
use crate::record::{self, Caller, Claim, JobDir, Jobs, Machine, State};
use crate::report::JobLog;
use crate::settings::Settings;
use crate::start;

/// Runs a script in the job's guest. The script's own failure is [`Failure::script`], with its true code in
/// the file that gitlab-runner reads it from.
pub async fn run(
    settings: &Settings,
    environment: &Environment,
    log: &JobLog,
    script: &Path,
    stage: &str,
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
    let running = record::Run {
        stage: stage.to_owned(),
        process: Caller::this(),
    };
    let begin = Instant::now();
    drop(job.enter(State::Running, |r| {
        r.run = Some(running);
        r.begin(stage, Timestamp::now());
    })?);
    let image = record.image.unwrap_or_default();
    let ending = in_guest(settings, &image, &job, &guest, &machine, &text).await;
    match job.enter(State::Ready, |r| {
        r.run = None;
        r.end(stage, begin.elapsed(), noted(&ending));
    }) {
        Ok(step) => drop(step),
        // Cleaned up while the script ran: that is said below, if it is a failure at all.
        Err(e) => tracing::info!("the job is gone: {e}"),
    }
    match ending? {
        Ending::Exited(0) => Ok(()),
        Ending::Exited(code) => {
            if let Some(file) = &code_file {
                std::fs::write(file, code.to_string()).map_err(|e| {
                    Failure::system(format!("cannot write the exit code to {}: {e}", file.display()))
                })?;
            }
            Err(Failure::script(code))
        }
        Ending::Cancelled => {
            log.line("cannery: the script was cancelled.");
            Err(Failure::system("the script was cancelled"))
        }
    }
}

/// How a run ended, for the record.
fn noted(ending: &Result<Ending, Failure>) -> record::Ending {
    match ending {
        Ok(Ending::Exited(0)) => record::Ending::Succeeded,
        Ok(Ending::Exited(code)) => record::Ending::Script { code: *code },
        Ok(Ending::Cancelled) => record::Ending::Cancelled,
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

async fn in_guest(
    settings: &Settings,
    image: &str,
    job: &JobDir,
    guest: &record::Guest,
    machine: &Machine,
    text: &[u8],
) -> Result<Ending, Failure> {
    let way = settings.guest(image);
    let libvirt = Libvirt::open(&machine.uri)?;
    let serial = job.file("serial.log");
    let (libvirt, name, serial) = (&libvirt, &machine.name, &serial);
    let alive = || async move { start::alive(libvirt, name, serial).await };
    let mut terminate = signal(SignalKind::terminate())
        .map_err(|e| Failure::system(format!("cannot listen for SIGTERM: {e}")))?;
    let target = start::target(job, guest, &way)?;
    // The guest answered before: it is as patient as with one that went silent.
    let patience = Patience {
        login: way.lost_after,
        silence: way.lost_after,
    };
    let connect = ready::wait_ready(target, patience, alive, |_| ());
    let connection = tokio::select! {
        connection = connect => connection?,
        _ = terminate.recv() => return Ok(Ending::Cancelled),
    };
    let shell = if guest.shell == "sh" {
        Shell::Sh
    } else {
        Shell::Bash
    };
    let control = Control {
        cancel: async {
            terminate.recv().await;
        },
        grace: way.cancel_grace,
        alive,
    };
    let mut output = tokio::io::stdout();
    Ok(script::run_script(&connection, shell, &RunId::new(), text, &mut output, control).await?)
}

fn remove_stale(file: &Path) -> Result<(), Failure> {
    match std::fs::remove_file(file) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Failure::system(format!(
            "cannot remove the exit code of an earlier stage, {}: {e}",
            file.display()
        ))),
        _ => Ok(()),
    }
}
