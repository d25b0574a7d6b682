//! run: one of the job's scripts, from its text to its exit code.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Instant;

use jiff::Timestamp;

use crate::guest::ready;
use crate::guest::script::{self, Control, Ending};
use crate::guest::shell::{RunId, Shell};
use crate::guest::shortage::{self, Listening, Shortage};
use crate::guest::ssh::Patience;
use crate::job::{Environment, claim};
use crate::machine::Libvirt;
use crate::outcome::{Failure, Fault};
use crate::record::{self, Caller, Claim, JobDir, Jobs, Machine, State};
use crate::report::JobLog;
use crate::settings::Settings;
use crate::start;

/// What shells call the end of a process by SIGKILL, as which the kernel's out-of-memory killer ends it.
const KILLED: i32 = 128 + 9;

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
    let ended = in_guest(settings, &image, &job, &guest, &machine, &text, cancel).await;
    match job.enter(State::Ready, |r| {
        r.run = None;
        r.end(stage, begin.elapsed(), noted(&ended));
    }) {
        Ok(step) => drop(step),
        // Cleaned up while the script ran: that is said below, if it is a failure at all.
        Err(e) => tracing::info!("the job is gone: {e}"),
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

/// How a script ended.
struct Ended {
    /// With which code; none when it was cancelled.
    code: Option<i32>,
    /// What its author should know about a code that is not 0.
    hints: Vec<String>,
}

impl Ended {
    const CANCELLED: Ended = Ended {
        code: None,
        hints: Vec::new(),
    };
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

async fn in_guest(
    settings: &Settings,
    image: &str,
    job: &JobDir,
    guest: &record::Guest,
    machine: &Machine,
    text: &[u8],
    cancel: impl Future<Output = ()>,
) -> Result<Ended, Failure> {
    let way = settings.guest(image);
    let libvirt = Libvirt::open(&machine.uri)?;
    let serial = job.file("serial.log");
    let (libvirt, name, serial) = (&libvirt, &machine.name, &serial);
    let alive = || async move { start::alive(libvirt, name, serial).await };
    let mut cancel = pin!(cancel);
    let target = start::target(job, guest, &way)?;
    // The guest answered before: it is as patient as with one that went silent.
    let patience = Patience {
        login: way.lost_after,
        silence: way.lost_after,
    };
    let connect = ready::wait_ready(target, patience, alive, |_| ());
    let connection = tokio::select! {
        connection = connect => connection?,
        () = &mut cancel => return Ok(Ended::CANCELLED),
    };
    let shell = if guest.shell == "sh" {
        Shell::Sh
    } else {
        Shell::Bash
    };
    let control = Control {
        cancel,
        grace: way.cancel_grace,
        alive,
    };
    let mut output = Listening::new(tokio::io::stdout());
    let begin = Instant::now();
    let ending = script::run_script(&connection, shell, &RunId::new(), text, &mut output, control).await;
    let took = begin.elapsed();
    let shortage = async || shortage::ask(&connection, took, &settings.builds_dir).await;
    match ending {
        Ok(Ending::Cancelled) => Ok(Ended::CANCELLED),
        Ok(Ending::Exited(0)) => Ok(Ended {
            code: Some(0),
            hints: Vec::new(),
        }),
        Ok(Ending::Exited(code)) => Ok(Ended {
            code: Some(code),
            hints: hints(&shortage().await, output.heard_no_room()),
        }),
        // The out-of-memory killer took the script together with those that watch over it.
        Err(e @ script::Error::Cut) => match shortage().await {
            short if short.killed.is_empty() => Err(e.into()),
            short => Ok(Ended {
                code: Some(KILLED),
                hints: hints(&short, output.heard_no_room()),
            }),
        },
        Err(e) => Err(e.into()),
    }
}

/// What a guest ran out of, in sentences for the script's author.
fn hints(shortage: &Shortage, heard_no_room: bool) -> Vec<String> {
    let mut hints = Vec::new();
    if !shortage.killed.is_empty() {
        let mut names: Vec<&str> = shortage
            .killed
            .iter()
            .map(String::as_str)
            .filter(|n| !n.is_empty())
            .collect();
        names.dedup();
        let whom = match names.as_slice() {
            [] => "a process".to_owned(),
            names => names.join(", "),
        };
        hints.push(format!(
            "The guest ran out of memory, and its kernel killed {whom}: the variable CANNERY_MEMORY asks for more"
        ));
    }
    if !shortage.full.is_empty() {
        hints.push(format!(
            "The guest has no room left on {}: the variable CANNERY_DISK asks for a larger disk, CANNERY_MEMORY for more of what lies in memory",
            shortage.full.join(", ")
        ));
    } else if heard_no_room {
        hints.push("A program found no room left on the guest's disk: the variable CANNERY_DISK asks for a larger one".to_owned());
    }
    hints
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
