//! The four stages called by hand, for what no runner would do: out of order, twice, at once, with odd names.

use std::fs;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::host::{Host, cannery};
use super::job::Job;

/// What the runner asks for when the job's author is to blame. Not the usual values, so that nobody relies on these.
pub const BUILD_FAILURE: i32 = 41;
/// What the runner asks for when anything else is to blame.
pub const SYSTEM_FAILURE: i32 = 43;

/// One try of a runner at a job: a folder, a job response, an environment.
#[derive(Debug)]
pub struct Try {
    folder: tempfile::TempDir,
    settings: PathBuf,
    variables: Vec<(String, String)>,
}

/// How a call ended.
#[derive(Debug)]
pub struct Done {
    /// The exit code; 128 + n when signal n killed it.
    pub code: i32,
    /// What it printed for the runner: the answer of config, the output of the script.
    pub stdout: Vec<u8>,
    /// What it printed for the job log.
    pub log: String,
    /// How long it took.
    pub took: Duration,
}

impl Done {
    /// The output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Fails the test unless the call succeeded.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, 0, "{}\n{}", self.text(), self.log);
        self
    }

    /// Fails the test unless the call failed with this code, and with a log that says all of this.
    #[track_caller]
    pub fn fails(self, code: i32, says: &[&str]) -> Self {
        assert_eq!(self.code, code, "{}\n{}", self.text(), self.log);
        for text in says {
            assert!(self.log.contains(text), "{text:?} is not in\n{}", self.log);
        }
        self
    }
}

impl Try {
    /// A try at this job, which has this number.
    pub fn new(host: &Host, job: &Job, id: u64) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("custom-executor")
            .tempdir()
            .unwrap();
        let payload = job.payload(id, "token", "http://gitlab.example.com");
        fs::write(folder.path().join("response.json"), payload.to_string()).unwrap();
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        let mut variables: Vec<(String, String)> = payload["variables"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|v| (text(&v["key"]), text(&v["value"])))
            .collect();
        if let Some(image) = payload["image"]["name"].as_str() {
            variables.push(("CI_JOB_IMAGE".to_owned(), image.to_owned()));
        }
        Self {
            folder,
            settings: host.settings(),
            variables,
        }
    }

    /// The same with other settings.
    pub fn with_settings(mut self, settings: &Path) -> Self {
        self.settings = settings.to_owned();
        self
    }

    /// The runner's folder: `TMPDIR` of all calls.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Where the exit code of a script is to be written.
    pub fn exit_code_file(&self) -> PathBuf {
        self.folder().join("build_exit_code")
    }

    /// What that file says, if it is there.
    pub fn exit_code(&self) -> Option<String> {
        fs::read_to_string(self.exit_code_file()).ok()
    }

    /// A call with these arguments, for the test to start. It has a process group of its own, as from the runner.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(cannery());
        command.arg("--config").arg(&self.settings).args(arguments);
        self.surround(&mut command);
        command
    }

    /// Gives a command the environment and the place that the runner gives its calls.
    pub fn surround(&self, command: &mut Command) {
        command
            .env("TMPDIR", self.folder())
            .env("JOB_RESPONSE_FILE", self.folder().join("response.json"))
            .env("BUILD_EXIT_CODE_FILE", self.exit_code_file())
            .env("BUILD_FAILURE_EXIT_CODE", BUILD_FAILURE.to_string())
            .env("SYSTEM_FAILURE_EXIT_CODE", SYSTEM_FAILURE.to_string())
            .envs(
                self.variables
                    .iter()
                    .map(|(key, value)| (format!("CUSTOM_ENV_{key}"), value)),
            )
            .current_dir(self.folder())
            .stdin(Stdio::null())
            .process_group(0);
    }

    /// Calls config.
    pub fn config(&self) -> Done {
        finish(&mut self.command(&["config"]))
    }

    /// Calls prepare.
    pub fn prepare(&self) -> Done {
        finish(&mut self.command(&["prepare"]))
    }

    /// Calls run with this script.
    pub fn run(&self, stage: &str, script: impl AsRef<[u8]>) -> Done {
        finish(&mut self.run_command(stage, script))
    }

    /// Calls run with this script, as the user's own.
    pub fn script(&self, script: impl AsRef<[u8]>) -> Done {
        self.run("build_script", script)
    }

    /// A call of run, for the test to start.
    pub fn run_command(&self, stage: &str, script: impl AsRef<[u8]>) -> Command {
        let path = self.folder().join("script");
        fs::write(&path, script).unwrap();
        self.command(&["run", path.to_str().unwrap(), stage])
    }

    /// Starts a script and returns at once.
    pub fn start(&self, script: impl AsRef<[u8]>) -> Child {
        self.run_command("build_script", script)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Calls cleanup.
    pub fn cleanup(&self) -> Done {
        finish(&mut self.command(&["cleanup"]))
    }
}

/// Waits for a call.
pub fn finish(command: &mut Command) -> Done {
    let begin = Instant::now();
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait(child, begin)
}

/// Waits for a call that was started at this time.
pub fn wait(child: Child, begin: Instant) -> Done {
    let output = child.wait_with_output().unwrap();
    Done {
        code: output
            .status
            .code()
            .unwrap_or_else(|| 128 + output.status.signal().unwrap()),
        stdout: output.stdout,
        log: String::from_utf8_lossy(&output.stderr).into_owned(),
        took: begin.elapsed(),
    }
}

/// The most memory that a process has had so far, in bytes; 0 once it is gone.
pub fn peak_memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .map_or(0, |kib| kib << 10)
}

/// Waits until this is so; fails the test with what was awaited if it takes longer.
#[track_caller]
pub fn until(what: &str, within: Duration, mut so: impl FnMut() -> bool) {
    let end = Instant::now() + within;
    while !so() {
        assert!(Instant::now() < end, "waited {within:?} until {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
