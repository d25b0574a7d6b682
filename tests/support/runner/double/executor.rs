//! One executor object: its folder, its calls of the driver, and what their ends mean.

use std::fmt;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use super::super::Driver;
use super::Limits;
use super::environment::{self, Place, Variable};
use super::process::{self, End, Halt};
use super::script;
use super::trace::Trace;

/// How long config, prepare and cleanup may take each.
const STAGE_TIMEOUT: Duration = Duration::from_secs(3600);

/// Why a job does not go on.
#[derive(Debug)]
pub(super) enum Problem {
    /// The driver blames the job: exit code 1, with the script's own where the driver wrote it down.
    Build(i64),
    /// The driver blames the system, or does not keep the contract.
    System(String),
    /// The call was stopped.
    Halted(Halt),
}

impl Problem {
    pub(super) fn failure_reason(&self) -> &'static str {
        match self {
            Self::Build(_) => "script_failure",
            Self::System(_) => "runner_system_failure",
            Self::Halted(Halt::TimedOut | Halt::ScriptTimedOut) => "job_execution_timeout",
            Self::Halted(Halt::Canceled) => "job_canceled",
            Self::Halted(Halt::Aborted) => "runner_system_failure",
        }
    }

    pub(super) fn exit_code(&self) -> Option<i64> {
        match self {
            Self::Build(code) => Some(*code),
            _ => None,
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Build(code) => write!(formatter, "exit status {code}"),
            Self::System(message) => formatter.write_str(message),
            Self::Halted(halt) => halt.fmt(formatter),
        }
    }
}

#[derive(Debug)]
pub(super) struct Executor {
    driver: Driver,
    job: Value,
    number: usize,
    folder: TempDir,
    /// What the driver's config stage said.
    config: Value,
    scripts: Mutex<u32>,
}

impl Executor {
    /// An executor object with a folder of its own, in which the job response file lies.
    pub(super) fn new(driver: &Driver, job: &Value, number: usize) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("custom-executor")
            .tempdir()
            .expect("a folder for the executor");
        let response = folder.path().join("response.json");
        fs::write(&response, job.to_string()).expect("the job response file");
        fs::set_permissions(&response, fs::Permissions::from_mode(0o600))
            .expect("a mode for the job response file");
        Self {
            driver: driver.clone(),
            job: job.clone(),
            number,
            folder,
            config: Value::Null,
            scripts: Mutex::new(0),
        }
    }

    /// config_exec, then prepare_exec.
    pub(super) fn prepare(&mut self, trace: &Trace<'_>, limits: &Limits<'_>) -> Result<(), Problem> {
        let collected = Mutex::new(Vec::new());
        let collect = |piece: &[u8]| {
            collected
                .lock()
                .expect("the collector's lock")
                .extend_from_slice(piece)
        };
        self.call(
            &["config"],
            "pending",
            &|| limits.everything(),
            &collect,
            &|piece| trace.bytes(piece),
        )?;
        let output = collected.into_inner().expect("the collector's lock");
        if !output.is_empty() {
            self.config = serde_json::from_slice(&output)
                .map_err(|error| Problem::System(format!("parsing JSON output: {error}")))?;
        }
        let place = self.place("pending");
        if place.builds_dir.is_empty()
            || self
                .setting("cache_dir", self.driver.cache_dir.as_deref())
                .is_empty()
        {
            return Err(Problem::System(
                "the builds_dir and cache_dir are not configured".to_owned(),
            ));
        }
        if let Some(name) = self.config["driver"]["name"].as_str() {
            let version = self.config["driver"]["version"].as_str().unwrap_or_default();
            trace.line(&format!(
                "\x1b[0KUsing Custom executor with driver {name} {version}...\x1b[0;m"
            ));
        }
        let log = |piece: &[u8]| trace.bytes(piece);
        self.call(&["prepare"], "pending", &|| limits.everything(), &log, &log)
    }

    /// run_exec for a stage, if the stage has anything to do.
    pub(super) fn run(
        &self,
        stage: &str,
        status: &'static str,
        trace: &Trace<'_>,
        halt: &dyn Fn() -> Option<Halt>,
    ) -> Result<(), Problem> {
        let place = self.place(status);
        let variables = environment::variables(&self.job, &place);
        let context = script::Context {
            job: &self.job,
            place: &place,
            variables: &variables,
            shell: self.setting("shell", Some(&self.driver.shell)),
        };
        let Some(script) = script::of_stage(stage, &context) else {
            return Ok(());
        };
        let path = self.write_script(&script);
        // The custom executor still knows the user's script by its old name.
        let argument = if stage == "step_script" {
            "build_script"
        } else {
            stage
        };
        let log = |piece: &[u8]| trace.bytes(piece);
        trace.section(stage, title(stage), || {
            self.call(&["run", &path, argument], status, halt, &log, &log)
        })
    }

    /// cleanup_exec, which cannot change the job's result, and what it says is not for the job's author.
    pub(super) fn cleanup(&self, _trace: &Trace<'_>) {
        let nowhere = |_: &[u8]| {};
        let operator = |piece: &[u8]| show(piece);
        let _ = self.call(&["cleanup"], "running", &|| None, &nowhere, &operator);
    }

    /// A duration that the job's author may set, e.g. `90s` or `5m`.
    pub(super) fn timeout(&self, variable: &str) -> Option<Duration> {
        let variables = environment::variables(&self.job, &self.place("running"));
        let value = variables
            .into_iter()
            .rev()
            .find(|candidate| candidate.key == variable)?
            .value;
        let (number, unit) = value.split_at(value.len().checked_sub(1)?);
        let seconds = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            _ => return None,
        };
        Some(Duration::from_secs(number.parse::<u64>().ok()? * seconds))
    }

    fn setting<'a>(&'a self, key: &str, configured: Option<&'a str>) -> &'a str {
        self.config[key].as_str().or(configured).unwrap_or_default()
    }

    fn place(&self, status: &'static str) -> Place {
        let builds_dir = self
            .setting("builds_dir", self.driver.builds_dir.as_deref())
            .to_owned();
        let project = self.job["job_info"]["project_full_path"]
            .as_str()
            .unwrap_or_default();
        let project_dir = if self.config["builds_dir_is_shared"] == true {
            format!("{builds_dir}/test-toke/{}/{project}", self.number)
        } else {
            format!("{builds_dir}/{project}")
        };
        Place {
            builds_dir,
            project_dir,
            number: self.number,
            status,
        }
    }

    fn job_env(&self) -> Vec<(String, String)> {
        let map = self.config["job_env"].as_object();
        let pairs = map.into_iter().flatten();
        pairs
            .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
            .collect()
    }

    fn write_script(&self, script: &str) -> String {
        let mut count = self.scripts.lock().expect("the counter's lock");
        *count += 1;
        let folder = self.folder.path().join(format!("script{}", *count));
        fs::create_dir(&folder).expect("a folder for the script");
        let path = folder.join("script");
        fs::write(&path, script).expect("the script");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).expect("a mode for the script");
        path.to_str().expect("the script's path is text").to_owned()
    }

    fn call(
        &self,
        arguments: &[&str],
        status: &'static str,
        halt: &dyn Fn() -> Option<Halt>,
        stdout: process::Sink<'_>,
        stderr: process::Sink<'_>,
    ) -> Result<(), Problem> {
        let folder = self.folder.path().to_str().expect("the folder's path is text");
        let variables: Vec<Variable> = environment::variables(&self.job, &self.place(status));
        let pairs = environment::of_call(&self.driver, folder, &self.job_env(), &variables, &self.job);
        let mut command = Command::new(&self.driver.program);
        command
            .args(&self.driver.arguments)
            .args(arguments)
            .envs(pairs)
            .current_dir(self.folder.path());
        let begun = Instant::now();
        let end = begun + STAGE_TIMEOUT;
        let halt = || halt().or_else(|| super::past(Some(end), Halt::TimedOut));
        let grace = (self.driver.graceful_kill, self.driver.force_kill);
        let end = process::call(&mut command, grace, &halt, stdout, stderr)
            .map_err(|error| Problem::System(format!("{}: {error}", self.driver.program.display())))?;
        // "run SCRIPT STAGE" is known by its stage.
        let name = [arguments[0], arguments.get(2).copied().unwrap_or_default()].join(" ");
        let mut calls = self.driver.calls.lock().expect("the calls' lock");
        calls.push((name.trim_end().to_owned(), begun.elapsed()));
        drop(calls);
        match end {
            End::Halted(halt) => Err(Problem::Halted(halt)),
            End::Exit(status) => self.judge(process::code(status)),
        }
    }

    fn judge(&self, code: i32) -> Result<(), Problem> {
        match code {
            0 => Ok(()),
            1 => match fs::read_to_string(self.folder.path().join("build_exit_code")) {
                Err(_) => Err(Problem::Build(1)),
                Ok(text) => match text.lines().next().unwrap_or_default().parse() {
                    Ok(code) => Err(Problem::Build(code)),
                    Err(_) => Err(Problem::System(format!("the driver wrote {text:?} as exit code"))),
                },
            },
            2 => Err(Problem::System("exit status 2".to_owned())),
            other => Err(Problem::System(format!(
                "unknown Custom executor executable exit code {other}"
            ))),
        }
    }
}

/// What cleanup prints goes to the runner's own log; here, to whoever runs the tests.
fn show(piece: &[u8]) {
    eprint!("cleanup: {}", String::from_utf8_lossy(piece));
}

/// The heading of a stage's section.
fn title(stage: &str) -> &'static str {
    match stage {
        "prepare_script" => "Preparing environment",
        "get_sources" => "Getting source from Git repository",
        "download_artifacts" => "Downloading artifacts",
        "step_script" => "Executing \"step_script\" stage of the job script",
        "after_script" => "Running after_script",
        "upload_artifacts_on_success" => "Uploading artifacts for successful job",
        "upload_artifacts_on_failure" => "Uploading artifacts for failed job",
        _ => "Cleaning up project directory and file based variables",
    }
}
