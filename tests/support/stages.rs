//! The four stages called by hand, as gitlab-runner calls them, for tests that look between them or do what a runner never
//! would: out of order, twice, at once, with odd names and broken files.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::host::{Host, cannery};
use super::job::Job;

/// What a call returns where only the author of the job can help.
pub const BUILD_FAILURE: i32 = 41;
/// What a call returns in all other failures. Both are other numbers than the runner's usual ones, so that nobody relies on
/// those.
pub const SYSTEM_FAILURE: i32 = 43;

/// Jobs of one test process differ where the test does not number them.
static NUMBER: AtomicU64 = AtomicU64::new(4000);

/// One try of a runner at one job: a folder, a job response, an environment.
#[derive(Debug)]
pub struct Stages<'a> {
    host: &'a Host,
    folder: tempfile::TempDir,
    settings: PathBuf,
    environment: Vec<(OsString, OsString)>,
    user: Option<String>,
    program: PathBuf,
}

/// How a call ended.
#[derive(Debug)]
pub struct Call {
    /// Its exit code; 128 + n when signal n ended it.
    pub code: i32,
    /// What it printed for the runner: the answer of config, the output of the script.
    pub stdout: Vec<u8>,
    /// What it wrote into the job log.
    pub log: String,
    /// How long it took.
    pub took: Duration,
}

impl Call {
    /// What it printed for the runner, as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// The call succeeded.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, 0, "{}\n{}", self.text(), self.log);
        self
    }

    /// The call failed, with this code and a job log that has these parts and ends with a sentence that says what went wrong.
    #[track_caller]
    pub fn failed(self, code: i32, parts: &[&str]) -> Self {
        assert_eq!(self.code, code, "{}\n{}", self.text(), self.log);
        for part in parts {
            assert!(self.log.contains(part), "{part:?} is not in\n{}", self.log);
        }
        self.last_line();
        self
    }

    /// The script ended with this code, and the runner can read which.
    #[track_caller]
    pub fn failed_script(self, code: i32, stages: &Stages<'_>) -> Self {
        assert_eq!(self.code, BUILD_FAILURE, "{}\n{}", self.text(), self.log);
        assert_eq!(stages.exit_code(), Some(code.to_string()));
        self
    }

    /// The sentence that says what went wrong: the last line of the job log.
    #[track_caller]
    pub fn last_line(&self) -> &str {
        let last = self.log.lines().last().unwrap_or_default();
        assert!(last.contains("ERROR: "), "{}", self.log);
        assert!(!self.log.contains("an error of its own"), "{}", self.log);
        last
    }
}

impl<'a> Stages<'a> {
    /// A try at a job with this image, whose number does not matter.
    pub fn new(host: &'a Host, image: &str) -> Self {
        let id = NUMBER.fetch_add(1, Ordering::Relaxed);
        Self::of(host, &Job::new("unit").image(image), id)
    }

    /// A try at this job, which has this number.
    pub fn of(host: &'a Host, job: &Job, id: u64) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("custom-executor")
            .tempdir()
            .unwrap();
        let mut stages = Self {
            host,
            folder,
            settings: host.settings(),
            environment: Vec::new(),
            user: None,
            program: cannery().to_owned(),
        };
        let payload = response_to(host, job, id);
        stages.response(payload.to_string().as_bytes());
        stages.environment = stages.environment_of(&payload);
        stages
    }

    fn environment_of(&self, payload: &Value) -> Vec<(OsString, OsString)> {
        let mut environment: Vec<(OsString, OsString)> = [
            ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin".into()),
            ("TMPDIR", self.folder.path().to_owned()),
            ("JOB_RESPONSE_FILE", self.file("response.json")),
            ("BUILD_EXIT_CODE_FILE", self.exit_code_file()),
            ("BUILD_FAILURE_EXIT_CODE", BUILD_FAILURE.to_string().into()),
            ("SYSTEM_FAILURE_EXIT_CODE", SYSTEM_FAILURE.to_string().into()),
        ]
        .map(|(name, value)| (name.into(), value.into_os_string()))
        .to_vec();
        let variables = payload["variables"].as_array().into_iter().flatten();
        let image = json!({"key": "CI_JOB_IMAGE", "value": payload["image"]["name"]});
        for variable in variables.chain([&image]) {
            if let (Some(key), Some(value)) = (variable["key"].as_str(), variable["value"].as_str()) {
                environment.push((format!("CUSTOM_ENV_{key}").into(), value.into()));
            }
        }
        environment
    }

    /// What GitLab sends for a job of this number with this image, for the test to change.
    pub fn payload(&self, id: u64, image: &str) -> Value {
        response_to(self.host, &Job::new("unit").image(image), id)
    }

    /// Replaces the response file.
    pub fn response(&self, text: &[u8]) {
        fs::write(self.file("response.json"), text).unwrap();
    }

    /// Sets a variable of the environment, in place of an earlier one.
    pub fn variable(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self = self.without(name);
        self.environment.push((name.into(), value.as_ref().to_owned()));
        self
    }

    /// Takes a variable out of the environment.
    pub fn without(mut self, name: &str) -> Self {
        self.environment.retain(|(there, _)| there != name);
        self
    }

    /// The calls are made with these settings instead of the host's.
    pub fn with_settings(mut self, settings: &Path) -> Self {
        self.settings = settings.to_owned();
        self
    }

    /// The calls are made of this copy of the program.
    pub fn with_program(mut self, program: &Path) -> Self {
        self.program = program.to_owned();
        self
    }

    /// The calls are made by this user, to whom the try's folder then belongs.
    pub fn by(mut self, user: &str) -> Self {
        let owned = Command::new("chown")
            .args(["-R", user])
            .arg(self.folder.path())
            .status()
            .unwrap();
        assert!(owned.success());
        self.user = Some(user.to_owned());
        self
    }

    /// The calls that follow are made by root.
    pub fn by_root(mut self) -> Self {
        self.user = None;
        self
    }

    /// A file of the try's folder, which is `TMPDIR` of all calls.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Where the exit code of a script is to be written.
    pub fn exit_code_file(&self) -> PathBuf {
        self.file("build_exit_code")
    }

    /// What that file says, if it is there.
    pub fn exit_code(&self) -> Option<String> {
        fs::read_to_string(self.exit_code_file()).ok()
    }

    /// A call, for the test to start.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = match &self.user {
            None => Command::new(&self.program),
            Some(user) => as_user(user, &self.host.program_for_all()),
        };
        command.arg("--config").arg(&self.settings).args(arguments);
        self.surround(&mut command);
        command
    }

    /// Gives a command the environment and the place that the runner gives its calls, and takes what it prints.
    pub fn surround(&self, command: &mut Command) {
        command
            .env_clear()
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // As the runner does; it is how a call knows who made it.
            .process_group(0);
    }

    /// Makes a call and waits for its end.
    pub fn call(&self, arguments: &[&str]) -> Call {
        finished(&mut self.command(arguments))
    }

    /// `config`.
    pub fn config(&self) -> Call {
        self.call(&["config"])
    }

    /// `prepare`.
    pub fn prepare(&self) -> Call {
        self.call(&["prepare"])
    }

    /// `run` of this script in this stage of the job.
    pub fn run(&self, stage: &str, script: impl AsRef<[u8]>) -> Call {
        finished(&mut self.run_command(stage, script))
    }

    /// `run` of this script, as the user's own.
    pub fn script(&self, script: impl AsRef<[u8]>) -> Call {
        self.run("step_script", script)
    }

    /// A call of `run`, for the test to start.
    pub fn run_command(&self, stage: &str, script: impl AsRef<[u8]>) -> Command {
        let file = self.file("script");
        fs::write(&file, script).unwrap();
        self.command(&["run", file.to_str().unwrap(), stage])
    }

    /// Starts a script, as the user's own, and returns at once.
    pub fn start(&self, script: impl AsRef<[u8]>) -> Child {
        self.run_command("step_script", script).spawn().unwrap()
    }

    /// `cleanup`.
    pub fn cleanup(&self) -> Call {
        self.call(&["cleanup"])
    }

    /// `cleanup`, which succeeds and after which nothing of any job is left.
    #[track_caller]
    pub fn cleans_up(&self) {
        self.cleanup().ok();
        self.nothing_is_left();
    }

    /// Nothing of any job is there, nor of a download.
    #[track_caller]
    pub fn nothing_is_left(&self) {
        assert_eq!(self.host.leftovers(), Vec::<String>::new());
        assert_eq!(self.host.downloads(), Vec::<PathBuf>::new());
    }
}

/// What GitLab sends for this job: from a server that this test process shares with no other, with a token in the URL.
fn response_to(host: &Host, job: &Job, id: u64) -> Value {
    const TOKEN: &str = "job-token";
    let server = format!("https://{}.gitlab.example.com", host.network());
    let mut payload = job.payload(id, TOKEN, &server);
    let url = &mut payload["git_info"]["repo_url"];
    let login = format!("://gitlab-ci-token:{TOKEN}@");
    *url = json!(url.as_str().unwrap().replacen("://", &login, 1));
    payload
}

/// Makes any call and waits for its end.
pub fn finished(command: &mut Command) -> Call {
    let begin = Instant::now();
    ended(command.spawn().unwrap(), begin)
}

/// Waits for the end of a call, which counts from this time.
pub fn ended(child: Child, begin: Instant) -> Call {
    let output = child.wait_with_output().unwrap();
    let status = output.status;
    Call {
        code: status.code().unwrap_or_else(|| 128 + status.signal().unwrap()),
        stdout: output.stdout,
        log: String::from_utf8_lossy(&output.stderr).into_owned(),
        took: begin.elapsed(),
    }
}

/// A program that this user runs, with all groups that the host gives it.
pub fn as_user(user: &str, program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid", user, "--regid", user, "--init-groups", "--"])
        .arg(program);
    command
}
