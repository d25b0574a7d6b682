//! run: one of the job's scripts, from its text to its exit code.

use std::path::{Path, PathBuf};

use tokio::signal::unix::{SignalKind, signal};

use crate::guest::script::{self, Control, Ending};
use crate::guest::shell::{RunId, Shell};
use crate::guest::ssh::{Connection, Patience};
use crate::guest::{cancel, ready};
use crate::job::Environment;
use crate::kill::{self, Point};
use crate::machine::Libvirt;
use crate::outcome::Failure;
use crate::record::{self, Caller, JobDir, Jobs, Machine, State};
use crate::report::{JobLog, plain};
use crate::settings::{GuestSettings, Settings};
use crate::start;

/// What the job log shows of a stage's name, in characters: gitlab-runner's own are short.
const STAGE_LENGTH: usize = 80;

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
    let session = environment.path("JOB_RESPONSE_FILE")?;
    let text = std::fs::read(script)
        .map_err(|e| Failure::system(format!("cannot read the script {}: {e}", script.display())))?;
    let (job, record) = find(settings, &session)?;
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
    drop(job.enter(State::Running, |r| r.runs.push(running))?);
    let image = record.image.unwrap_or_default();
    let visit = Visit {
        job: &job,
        guest: &guest,
        machine: &machine,
        way: settings.guest(&image),
    };
    let ending = visit.run(&id, &text, log).await;
    // How a script has ended that nobody saw the end of is for the next call to make sure.
    let over = |run: &record::Run| ending.is_ok() && run.id == id.as_str();
    match job.enter(State::Ready, |r| r.runs.retain(|run| !over(run))) {
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
                kill::point(Point::CodeWritten);
            }
            Err(Failure::script(code))
        }
        Ending::Cancelled => {
            log.line("cannery: the script was cancelled.");
            Err(Failure::system("the script was cancelled"))
        }
    }
}

/// The machine that prepare made for this try of the runner.
fn find(settings: &Settings, session: &Path) -> Result<(JobDir, record::Record), Failure> {
    // More than one cannot be: prepare removes what an earlier call left. The newest is the one then.
    Jobs::open(&settings.state_dir)?
        .of_session(session)?
        .pop()
        .ok_or_else(|| {
            Failure::system("the job has no machine: it was never prepared, or was removed meanwhile")
                .hint("`cannery vm list` shows what there is; an operator may have removed it with `vm rm`")
        })
}

/// A call's way into the guest of a job.
struct Visit<'a> {
    job: &'a JobDir,
    guest: &'a record::Guest,
    machine: &'a Machine,
    way: GuestSettings,
}

impl Visit<'_> {
    /// Enters the guest, ends what killed calls have left there, and runs the script.
    async fn run(&self, id: &RunId, text: &[u8], log: &JobLog) -> Result<Ending, Failure> {
        let libvirt = Libvirt::open(&self.machine.uri)?;
        let serial = self.job.file("serial.log");
        let (libvirt, name, serial) = (&libvirt, &self.machine.name, &serial);
        let alive = || async move { start::alive(libvirt, name, serial).await };
        let mut terminate = signal(SignalKind::terminate())
            .map_err(|e| Failure::system(format!("cannot listen for SIGTERM: {e}")))?;
        let target = start::target(self.job, self.guest, &self.way)?;
        // The guest answered before: it is as patient as with one that went silent.
        let patience = Patience {
            login: self.way.lost_after,
            silence: self.way.lost_after,
        };
        let enter = async {
            let connection = ready::wait_ready(target, patience, alive, |_| ()).await?;
            kill::point(Point::GuestEntered);
            self.end_left(&connection, log).await?;
            Ok::<_, Failure>(connection)
        };
        let connection = tokio::select! {
            connection = enter => connection?,
            _ = terminate.recv() => return Ok(Ending::Cancelled),
        };
        let shell = if self.guest.shell == "sh" {
            Shell::Sh
        } else {
            Shell::Bash
        };
        let control = Control {
            cancel: async {
                terminate.recv().await;
            },
            grace: self.way.cancel_grace,
            alive,
        };
        let mut output = tokio::io::stdout();
        Ok(script::run_script(&connection, shell, id, text, &mut output, control).await?)
    }

    /// Ends the scripts of calls that are gone and did not see their end: gitlab-runner kills a cancelled call that takes
    /// longer than its `graceful_kill_timeout`, and calls again for after_script, which must have the guest to itself.
    async fn end_left(&self, connection: &Connection, log: &JobLog) -> Result<(), Failure> {
        let left = |run: &record::Run| !run.process.is_alive();
        let runs = self.job.read()?.map(|record| record.runs).unwrap_or_default();
        let runs: Vec<_> = runs.into_iter().filter(left).collect();
        if runs.is_empty() {
            return Ok(());
        }
        for run in &runs {
            let Some(id) = RunId::parse(&run.id) else { continue };
            let found = cancel::cancel(connection, &id, self.way.cancel_grace)
                .await
                .map_err(script::Error::from)?;
            if found {
                log.line(format!(
                    "cannery: {} was still running though its call was killed; it has been ended.",
                    plain(&run.stage, STAGE_LENGTH)
                ));
            }
        }
        kill::point(Point::LeftEnded);
        drop(
            self.job
                .enter(State::Running, |r| r.runs.retain(|run| !runs.contains(run)))?,
        );
        Ok(())
    }
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
