//! The four calls one by one, as gitlab-runner makes them, for tests that look between them or give them what a runner never
//! would.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};

use super::host::{Host, cannery};

/// What a call returns where only the author of the job can help.
pub const BUILD_FAILURE: i32 = 41;
/// What a call returns in all other failures. Both are other numbers than the runner's usual ones.
pub const SYSTEM_FAILURE: i32 = 42;

/// Jobs of one test process differ.
static NUMBER: AtomicU64 = AtomicU64::new(4000);

/// One try of one job: its folder, its response file and its variables.
#[derive(Debug)]
pub struct Stages<'a> {
    host: &'a Host,
    folder: tempfile::TempDir,
    environment: Vec<(OsString, OsString)>,
    user: Option<String>,
}

/// How a call ended.
#[derive(Debug)]
pub struct Call {
    /// Its exit code; -1 where a signal ended it.
    pub code: i32,
    /// What it printed for the runner.
    pub out: String,
    /// What it wrote into the job log.
    pub log: String,
}

impl Call {
    /// The call failed, with this code and a sentence that has these parts.
    #[track_caller]
    pub fn failed(&self, code: i32, parts: &[&str]) -> &Self {
        assert_eq!(self.code, code, "{}{}", self.out, self.log);
        for part in parts {
            assert!(self.log.contains(part), "{part:?} is not in\n{}", self.log);
        }
        self.last_line();
        self
    }

    /// The script ended with this code, and the runner can read which.
    #[track_caller]
    pub fn failed_script(&self, code: i32, stages: &Stages<'_>) {
        assert_eq!(self.code, BUILD_FAILURE, "{}{}", self.out, self.log);
        let written = fs::read_to_string(stages.file("build_exit_code")).unwrap();
        assert_eq!(written, code.to_string());
    }

    /// The call succeeded.
    #[track_caller]
    pub fn succeeded(&self) -> &Self {
        assert_eq!(self.code, 0, "{}{}", self.out, self.log);
        self
    }

    /// The sentence that says what went wrong: the last line, the only one that begins so.
    #[track_caller]
    pub fn last_line(&self) -> &str {
        let last = self.log.lines().last().unwrap_or_default();
        assert!(last.contains("ERROR: "), "{}", self.log);
        assert!(!self.log.contains("an error of its own"), "{}", self.log);
        last
    }
}

impl<'a> Stages<'a> {
    /// A job with this image.
    pub fn new(host: &'a Host, image: &str) -> Self {
        let id = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = tempfile::Builder::new().prefix("cannery-try-").tempdir().unwrap();
        let at = folder.path();
        let environment = [
            ("TMPDIR", at.to_owned()),
            ("BUILD_FAILURE_EXIT_CODE", BUILD_FAILURE.to_string().into()),
            ("SYSTEM_FAILURE_EXIT_CODE", SYSTEM_FAILURE.to_string().into()),
            ("BUILD_EXIT_CODE_FILE", at.join("build_exit_code")),
            ("JOB_RESPONSE_FILE", at.join("response.json")),
            ("CUSTOM_ENV_CI_JOB_ID", id.to_string().into()),
        ];
        let environment = environment
            .into_iter()
            .map(|(name, value)| (name.into(), value.into_os_string()))
            .collect();
        let stages = Self {
            host,
            folder,
            environment,
            user: None,
        };
        let payload = stages.payload(id, image);
        stages.response(payload.to_string().as_bytes());
        stages
    }

    /// What GitLab sends for a job.
    pub fn payload(&self, id: u64, image: &str) -> Value {
        json!({
            "id": id, "token": "job-token",
            "job_info": {"name": "unit", "stage": "test", "project_id": 7, "project_full_path": "grp/demo"},
            "git_info": {"repo_url": format!("https://t:s@gitlab.example.com{}/grp/demo.git", self.host.network())},
            "runner_info": {"timeout": 3600}, "image": {"name": image}, "variables": [], "steps": [],
        })
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

    /// A file of the try's folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A call, for the test to start.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = match &self.user {
            None => Command::new(cannery()),
            Some(user) => as_user(user, &self.host.program_for_all()),
        };
        command
            .arg("--config")
            .arg(self.host.settings())
            .args(arguments)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .envs(self.environment.iter().map(|(n, v)| (n, v)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // As the runner does; it is how a call knows who made it.
            .process_group(0);
        command
    }

    /// Makes a call and waits for its end.
    pub fn call(&self, arguments: &[&str]) -> Call {
        Self::ended(self.command(arguments).spawn().unwrap())
    }

    /// Waits for a call's end.
    pub fn ended(child: Child) -> Call {
        let output = child.wait_with_output().unwrap();
        Call {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            log: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// `prepare`.
    pub fn prepare(&self) -> Call {
        self.call(&["prepare"])
    }

    /// `run` of a script that is given as text.
    pub fn run(&self, script: &str) -> Call {
        let file = self.file("script");
        fs::write(&file, script).unwrap();
        self.call(&["run", file.to_str().unwrap(), "step_script"])
    }

    /// `cleanup`, after which nothing of any job may be left.
    #[track_caller]
    pub fn cleanup(&self) {
        self.call(&["cleanup"]).succeeded();
        self.nothing_is_left();
    }

    /// Nothing of any job is there, nor of a download.
    #[track_caller]
    pub fn nothing_is_left(&self) {
        assert_eq!(self.host.leftovers(), Vec::<String>::new());
        assert_eq!(self.host.downloads(), Vec::<PathBuf>::new());
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
