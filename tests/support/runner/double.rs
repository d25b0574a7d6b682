//! A double of gitlab-runner with the custom executor.
//!
//! It keeps the runner's side of the contract: a folder for each executor object, the job response file, the
//! environment in its order, config → prepare (three tries, three seconds apart, with a clean-up after each failure) →
//! run for every stage → cleanup, process groups, SIGTERM and SIGKILL, exit codes, job log. It does not have caches,
//! secrets or retries of a stage; what needs those goes through the real runner only.

mod environment;
mod executor;
mod process;
mod script;
mod trace;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::Value;

use self::executor::{Executor, Problem};
use self::process::Halt;
use self::trace::Trace;
use super::super::coordinator::{Coordinator, Desk, Outcome, Wish};
use super::Driver;

/// Tries to prepare an executor.
const PREPARE_TRIES: u32 = 3;

/// Between two of them.
const PREPARE_PAUSE: Duration = Duration::from_secs(3);

/// How long `after_script` may take unless the job says otherwise.
const AFTER_SCRIPT_TIMEOUT: Duration = Duration::from_secs(300);

/// How often the queue is looked at.
const POLL: Duration = Duration::from_millis(50);

#[derive(Debug)]
pub(super) struct Double {
    no_more: Arc<AtomicBool>,
    abort: Arc<AtomicBool>,
    workers: Vec<JoinHandle<()>>,
}

impl Double {
    pub(super) fn start(coordinator: &Coordinator, driver: &Driver, concurrent: usize) -> Self {
        let no_more = Arc::new(AtomicBool::new(false));
        let abort = Arc::new(AtomicBool::new(false));
        let workers = (0..concurrent)
            .map(|number| {
                let (desk, driver) = (coordinator.desk(), driver.clone());
                let (no_more, abort) = (Arc::clone(&no_more), Arc::clone(&abort));
                thread::spawn(move || {
                    while !no_more.load(Ordering::Relaxed) {
                        match desk.take() {
                            Some(job) => run_job(&desk, &driver, &job, number, &abort),
                            None => thread::sleep(POLL),
                        }
                    }
                })
            })
            .collect();
        Self {
            no_more,
            abort,
            workers,
        }
    }

    pub(super) fn finish(mut self) {
        self.join();
    }

    fn join(&mut self) {
        self.no_more.store(true, Ordering::Relaxed);
        for worker in self.workers.drain(..) {
            let ended = worker.join();
            // A second panic while a test fails would hide the first.
            assert!(
                ended.is_ok() || thread::panicking(),
                "a worker of the runner double panicked"
            );
        }
    }
}

impl Drop for Double {
    fn drop(&mut self) {
        self.abort.store(true, Ordering::Relaxed);
        self.join();
    }
}

/// What a job runs under: when it must stop, and why.
#[derive(Debug)]
pub(super) struct Limits<'a> {
    desk: &'a Desk,
    id: u64,
    abort: &'a AtomicBool,
    end: Instant,
}

impl Limits<'_> {
    /// Why everything must stop.
    fn everything(&self) -> Option<Halt> {
        if self.abort.load(Ordering::Relaxed) {
            Some(Halt::Aborted)
        } else if self.desk.wish(self.id) == Wish::CancelAtOnce {
            Some(Halt::Canceled)
        } else if Instant::now() > self.end {
            Some(Halt::TimedOut)
        } else {
            None
        }
    }

    /// Why the user's script must stop, which may leave the stages after it alone.
    fn script(&self) -> Option<Halt> {
        self.everything()
            .or_else(|| (self.desk.wish(self.id) == Wish::CancelGracefully).then_some(Halt::Canceled))
    }
}

fn run_job(desk: &Desk, driver: &Driver, job: &Value, number: usize, abort: &AtomicBool) {
    let id = job["id"].as_u64().expect("a job has a number");
    let seconds = job["runner_info"]["timeout"]
        .as_u64()
        .expect("a job has a timeout");
    let trace = Trace::new(desk, id, driver.output_limit * 1024, masked(job));
    let limits = Limits {
        desk,
        id,
        abort,
        end: Instant::now() + Duration::from_secs(seconds),
    };
    trace.line("\x1b[0KRunning with the gitlab-runner double of cannery's tests\x1b[0;m");
    let result = stages(driver, job, number, &trace, &limits);
    let outcome = match result {
        Ok(()) => {
            trace.line("\x1b[32;1mJob succeeded\x1b[0;m");
            Outcome {
                success: true,
                failure_reason: String::new(),
                exit_code: None,
            }
        }
        Err(problem) => {
            let kind = if matches!(problem, Problem::System(_)) {
                " (system failure)"
            } else {
                ""
            };
            trace.line(&format!("\x1b[31;1mERROR: Job failed{kind}: {problem}\x1b[0;m"));
            Outcome {
                success: false,
                failure_reason: problem.failure_reason().to_owned(),
                exit_code: problem.exit_code(),
            }
        }
    };
    desk.finish(id, outcome);
}

fn masked(job: &Value) -> Vec<String> {
    let variables = job["variables"].as_array().into_iter().flatten();
    let masked = variables.filter(|variable| variable["masked"] == true);
    masked
        .filter_map(|variable| variable["value"].as_str())
        .map(str::to_owned)
        .collect()
}

/// The whole life of a job, in the order of the contract.
fn stages(
    driver: &Driver,
    job: &Value,
    number: usize,
    trace: &Trace<'_>,
    limits: &Limits<'_>,
) -> Result<(), Problem> {
    let executor = trace.section("prepare_executor", "Preparing the \"custom\" executor", || {
        prepare(driver, job, number, trace, limits)
    })?;
    let result = run_stages(&executor, job, trace, limits);
    executor.cleanup(trace);
    result
}

fn prepare(
    driver: &Driver,
    job: &Value,
    number: usize,
    trace: &Trace<'_>,
    limits: &Limits<'_>,
) -> Result<Executor, Problem> {
    let mut tries = 0;
    loop {
        tries += 1;
        let mut executor = Executor::new(driver, job, number);
        let problem = match executor.prepare(trace, limits) {
            Ok(()) => return Ok(executor),
            Err(problem) => problem,
        };
        executor.cleanup(trace);
        if tries == PREPARE_TRIES || !matches!(problem, Problem::System(_)) {
            return Err(problem);
        }
        trace.line(&format!("\x1b[31;1mERROR: Preparation failed: {problem}\x1b[0;m"));
        trace.line(&format!(
            "\x1b[0;33mWill be retried in {}s ...\x1b[0;m",
            PREPARE_PAUSE.as_secs()
        ));
        let pause = Instant::now() + PREPARE_PAUSE;
        while Instant::now() < pause {
            if let Some(halt) = limits.everything() {
                return Err(Problem::Halted(halt));
            }
            thread::sleep(POLL);
        }
    }
}

fn run_stages(
    executor: &Executor,
    job: &Value,
    trace: &Trace<'_>,
    limits: &Limits<'_>,
) -> Result<(), Problem> {
    let everything = || limits.everything();
    executor.run("prepare_script", "running", trace, &everything)?;
    let script = prologue(executor, trace, limits).and_then(|()| {
        let end = executor
            .timeout("RUNNER_SCRIPT_TIMEOUT")
            .map(|timeout| Instant::now() + timeout);
        let halt = || limits.script().or_else(|| past(end, Halt::ScriptTimedOut));
        executor.run("step_script", "running", trace, &halt)
    });
    if let Err(Problem::Halted(halt)) = &script
        && limits.everything().is_some()
    {
        return Err(Problem::Halted(*halt));
    }
    let status = match &script {
        Ok(()) => "success",
        Err(Problem::Halted(Halt::Canceled)) => "canceled",
        Err(Problem::Halted(Halt::ScriptTimedOut)) => "timedout",
        Err(_) => "failed",
    };
    if has_step(job, "after_script") {
        let timeout = executor
            .timeout("RUNNER_AFTER_SCRIPT_TIMEOUT")
            .unwrap_or(AFTER_SCRIPT_TIMEOUT);
        let end = Some(Instant::now() + timeout);
        let halt = || limits.everything().or_else(|| past(end, Halt::ScriptTimedOut));
        if let Err(problem) = executor.run("after_script", status, trace, &halt) {
            trace.line(&format!(
                "\x1b[0;33mWARNING: after_script failed, but job will continue unaffected: {problem}\x1b[0;m"
            ));
        }
    }
    let upload = if script.is_ok() {
        "upload_artifacts_on_success"
    } else {
        "upload_artifacts_on_failure"
    };
    let uploaded = executor.run(upload, status, trace, &everything);
    let cleaned = executor.run("cleanup_file_variables", status, trace, &everything);
    script.and(uploaded).and(cleaned)
}

/// The stages between `prepare_script` and the user's script.
fn prologue(executor: &Executor, trace: &Trace<'_>, limits: &Limits<'_>) -> Result<(), Problem> {
    executor.run("get_sources", "running", trace, &|| limits.script())?;
    executor.run("download_artifacts", "running", trace, &|| limits.script())
}

fn past(end: Option<Instant>, halt: Halt) -> Option<Halt> {
    end.is_some_and(|end| Instant::now() > end).then_some(halt)
}

fn has_step(job: &Value, name: &str) -> bool {
    job["steps"]
        .as_array()
        .into_iter()
        .flatten()
        .any(|step| step["name"] == name)
}
