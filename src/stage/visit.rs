//! A call's visit in the guest of its job: from the login to how the script ended.

use std::future::Future;
use std::pin::pin;
use std::time::Instant;

use crate::guest::script::{self, Control, Ending};
use crate::guest::shell::{RunId, Shell};
use crate::guest::shortage::{self, Listening, Shortage};
use crate::guest::ssh::{Connection, Patience};
use crate::guest::{cancel, ready};
use crate::kill::{self, Point};
use crate::machine::Libvirt;
use crate::outcome::Failure;
use crate::record::{self, JobDir, Machine, State};
use crate::report::{JobLog, plain};
use crate::settings::GuestSettings;
use crate::start;

/// What the job log shows of a stage's name, in characters: gitlab-runner's own are short.
const STAGE_LENGTH: usize = 80;
/// What shells call the end of a process by SIGKILL, as which the kernel's out-of-memory killer ends it.
const KILLED: i32 = 128 + 9;

/// How a script ended.
pub(super) struct Ended {
    /// With which code; none when it was cancelled.
    pub(super) code: Option<i32>,
    /// What its author should know about a code that is not 0.
    pub(super) hints: Vec<String>,
}

impl Ended {
    const CANCELLED: Ended = Ended {
        code: None,
        hints: Vec::new(),
    };
}

/// A call's way into the guest of a job.
pub(super) struct Visit<'a> {
    pub(super) job: &'a JobDir,
    pub(super) guest: &'a record::Guest,
    pub(super) machine: &'a Machine,
    pub(super) way: GuestSettings,
    pub(super) builds_dir: &'a str,
}

impl Visit<'_> {
    /// Enters the guest, ends what killed calls have left there, and runs the script until it ends or `cancel` does.
    pub(super) async fn run(
        &self,
        id: &RunId,
        text: &[u8],
        cancel: impl Future<Output = ()>,
        log: &JobLog,
    ) -> Result<Ended, Failure> {
        let libvirt = Libvirt::open(&self.machine.uri)?;
        let serial = self.job.file("serial.log");
        let (libvirt, name, serial) = (&libvirt, &self.machine.name, &serial);
        let alive = || async move { start::alive(libvirt, name, serial).await };
        let mut cancel = pin!(cancel);
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
            () = &mut cancel => return Ok(Ended::CANCELLED),
        };
        let shell = if self.guest.shell == "sh" {
            Shell::Sh
        } else {
            Shell::Bash
        };
        let control = Control {
            cancel,
            grace: self.way.cancel_grace,
            alive,
        };
        let mut output = Listening::new(tokio::io::stdout());
        let begin = Instant::now();
        let ending = script::run_script(&connection, shell, id, text, &mut output, control).await;
        let took = begin.elapsed();
        let shortage = async || shortage::ask(&connection, took, self.builds_dir).await;
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
                    "cannery: {} was still running though its call was gone; it has been ended.",
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
