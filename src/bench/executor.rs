//! A custom executor, ours or another's, called as gitlab-runner calls it.
//!
//! What a call gets from the runner is listed in gitlab-runner's `docs/executors/custom.md`: a job response file, the job's
//! variables with `CUSTOM_ENV_` before them, the two exit codes for failures, a process group of its own.

use std::ffi::OsString;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use tokio::process::Command;

use crate::outcome::Failure;
use crate::report::plain;

/// No stage that is measured takes longer; an image may have to be fetched first.
const STAGE_DEADLINE: Duration = Duration::from_secs(3600);
/// A cleanup waits for at most one other call's step, which may take some minutes; then it is for the reaper.
const CLEANUP_DEADLINE: Duration = Duration::from_secs(300);
/// The jobs of a bench come from a GitLab instance that cannot exist (RFC 2606).
const SERVER: &str = "https://bench.invalid";
/// The project that they belong to.
const PROJECT: &str = "cannery/bench";
/// Characters of a failed call's words that are passed on.
const MOST_WORDS: usize = 2000;

/// A program that is a custom executor: `PROGRAM ARGUMENT… config | prepare | run SCRIPT STAGE | cleanup`.
#[derive(Debug, Clone)]
pub struct Executor {
    /// What people call it.
    pub name: String,
    /// The program.
    pub program: PathBuf,
    /// What stands before the stage.
    pub arguments: Vec<OsString>,
    /// The job's `image:`; none for the executor's own default.
    pub image: Option<String>,
}

/// One try at one job by an executor: what the runner keeps for it.
#[derive(Debug)]
pub(super) struct Try {
    executor: Executor,
    folder: PathBuf,
    number: u64,
    /// What config wants the later stages to find in their environment.
    job_env: Vec<(String, String)>,
}

impl Try {
    /// A job of this number for an executor, with a folder of the executor's own under `scratch`.
    pub(super) fn new(executor: &Executor, scratch: &Path, number: u64) -> Result<Try, Failure> {
        let job = Try {
            executor: executor.clone(),
            folder: scratch.join(&executor.name),
            number,
            job_env: Vec::new(),
        };
        let response = job.response().to_string();
        let made = make_folder(&job.folder)
            .and_then(|()| std::fs::write(job.response_file(), response))
            .and_then(|()| std::fs::write(job.script(), "true\n"));
        made.map_err(|e| Failure::system(format!("cannot write to {}: {e}", job.folder.display())))?;
        Ok(job)
    }

    /// The file by which an executor recognises the try.
    pub(super) fn response_file(&self) -> PathBuf {
        self.folder.join("response.json")
    }

    /// A script that does nothing.
    pub(super) fn script(&self) -> PathBuf {
        self.folder.join("script")
    }

    /// What GitLab would send.
    fn response(&self) -> Value {
        json!({
            "id": self.number,
            "job_info": {"name": "bench", "stage": "test", "project_full_path": PROJECT},
            "git_info": {"repo_url": format!("{SERVER}/{PROJECT}.git")},
            "runner_info": {"timeout": STAGE_DEADLINE.as_secs()},
            "image": {"name": self.executor.image.as_deref().unwrap_or_default()},
        })
    }

    fn environment(&self) -> Vec<(String, OsString)> {
        let mut all: Vec<(String, OsString)> = vec![
            ("TMPDIR".to_owned(), self.folder.clone().into()),
            ("JOB_RESPONSE_FILE".to_owned(), self.response_file().into()),
            ("BUILD_EXIT_CODE_FILE".to_owned(), self.folder.join("code").into()),
            ("BUILD_FAILURE_EXIT_CODE".to_owned(), "1".into()),
            ("SYSTEM_FAILURE_EXIT_CODE".to_owned(), "2".into()),
        ];
        let mut variables = vec![
            ("CI_JOB_ID", self.number.to_string()),
            ("CI_JOB_NAME", "bench".to_owned()),
            ("CI_JOB_STAGE", "test".to_owned()),
            ("CI_PROJECT_PATH", PROJECT.to_owned()),
            ("CI_SERVER_URL", SERVER.to_owned()),
        ];
        variables.extend(self.executor.image.clone().map(|image| ("CI_JOB_IMAGE", image)));
        all.extend(
            variables
                .into_iter()
                .map(|(name, value)| (format!("CUSTOM_ENV_{name}"), value.into())),
        );
        all.extend(
            self.job_env
                .iter()
                .map(|(name, value)| (name.clone(), value.into())),
        );
        all
    }

    /// `config`; the stages that follow get what it says.
    pub(super) async fn config(&mut self) -> Result<Duration, Failure> {
        let (took, output) = self.call(&["config".into()]).await?;
        self.job_env = job_env(&output.stdout);
        Ok(took)
    }

    /// `prepare`.
    pub(super) async fn prepare(&self) -> Result<Duration, Failure> {
        Ok(self.call(&["prepare".into()]).await?.0)
    }

    /// `run` of a script that does nothing.
    pub(super) async fn run(&self) -> Result<Duration, Failure> {
        let arguments = ["run".into(), self.script().into(), "step_script".into()];
        Ok(self.call(&arguments).await?.0)
    }

    /// `cleanup`.
    pub(super) async fn cleanup(&self) -> Result<Duration, Failure> {
        let stage = ["cleanup".into()];
        let ended = tokio::time::timeout(CLEANUP_DEADLINE, self.call(&stage)).await;
        let (took, _) = ended.map_err(|_| {
            Failure::system(format!(
                "{}'s cleanup took longer than {} s",
                self.executor.name,
                CLEANUP_DEADLINE.as_secs()
            ))
        })??;
        Ok(took)
    }

    /// Removes the folder, once all is cleaned up: the runner is done with the job.
    pub(super) fn forget(&self) -> Result<(), Failure> {
        std::fs::remove_dir_all(&self.folder)
            .map_err(|e| Failure::system(format!("cannot remove {}: {e}", self.folder.display())))
    }

    async fn call(&self, stage: &[OsString]) -> Result<(Duration, Output), Failure> {
        let Executor {
            name,
            program,
            arguments,
            ..
        } = &self.executor;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .args(stage)
            .envs(self.environment())
            .current_dir(&self.folder)
            .process_group(0);
        let what = stage.first().map(|s| s.to_string_lossy()).unwrap_or_default();
        timed(&mut command, Stdio::null(), &format!("{name}'s {what}")).await
    }
}

/// Runs a command that must succeed, and tells how long that took, from its start to its end.
pub(super) async fn timed(
    command: &mut Command,
    input: Stdio,
    what: &str,
) -> Result<(Duration, Output), Failure> {
    command
        .stdin(input)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let begin = Instant::now();
    let child = command
        .spawn()
        .map_err(|e| Failure::system(format!("{what} cannot be started: {e}")))?;
    let output = tokio::time::timeout(STAGE_DEADLINE, child.wait_with_output())
        .await
        .map_err(|_| Failure::system(format!("{what} took longer than {} s", STAGE_DEADLINE.as_secs())))?
        .map_err(|e| Failure::system(format!("{what} was lost: {e}")))?;
    let took = begin.elapsed();
    if output.status.success() {
        return Ok((took, output));
    }
    let said = String::from_utf8_lossy(&output.stderr);
    // The end says why.
    let skip = said.chars().count().saturating_sub(MOST_WORDS);
    let lines: Vec<String> = said
        .chars()
        .skip(skip)
        .collect::<String>()
        .lines()
        .map(|line| plain(line, MOST_WORDS))
        .collect();
    Err(Failure::system(format!(
        "{what} failed ({}); it said: {}",
        output.status,
        lines.join(" / ")
    )))
}

/// A folder that only its owner may enter.
pub(super) fn make_folder(path: &Path) -> std::io::Result<()> {
    DirBuilder::new().mode(0o700).create(path)
}

/// The variables that an answer of config asks for; an answer that is none asks for nothing.
fn job_env(answer: &[u8]) -> Vec<(String, String)> {
    let answer: Value = serde_json::from_slice(answer).unwrap_or_default();
    let wanted = answer.get("job_env").and_then(Value::as_object);
    let text = |(name, value): (&String, &Value)| Some((name.clone(), value.as_str()?.to_owned()));
    wanted.unwrap_or(&Map::new()).iter().filter_map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{Environment, Job};

    fn executor(image: Option<&str>) -> Executor {
        Executor {
            name: "ours".into(),
            program: "/nowhere/cannery".into(),
            arguments: vec![],
            image: image.map(str::to_owned),
        }
    }

    #[test]
    fn a_call_reads_as_a_job_of_a_runner() {
        let scratch = std::env::temp_dir().join(format!("cannery-executor-{}", std::process::id()));
        make_folder(&scratch).unwrap();
        let job = Try::new(&executor(Some("registry.example.com/x:1")), &scratch, 7).unwrap();
        let environment: Environment = job
            .environment()
            .into_iter()
            .map(|(name, value)| (name.into(), value))
            .collect();
        let read = Job::read(&environment).unwrap();
        assert_eq!(read.identity.coordinator, SERVER);
        assert_eq!((read.identity.id, read.session), (7, job.response_file()));
        assert_eq!(read.image.as_deref(), Some("registry.example.com/x:1"));
        assert!(!read.needs_helper);
        std::fs::remove_dir_all(&scratch).unwrap();
    }

    #[test]
    fn config_hands_on_what_the_later_stages_need() {
        let answer = br#"{"driver": {"name": "x"}, "job_env": {"CANNERY_CONFIG": "/x", "odd": 3}}"#;
        assert_eq!(job_env(answer), [("CANNERY_CONFIG".into(), "/x".into())]);
        assert_eq!(job_env(b"{}"), []);
        assert_eq!(job_env(b"no JSON"), []);
    }

    #[tokio::test]
    async fn a_call_that_fails_is_quoted() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo what; echo 'went wrong' >&2; exit 3"]);
        let failure = timed(&mut command, Stdio::null(), "the call").await.unwrap_err();
        assert_eq!(
            failure.message,
            "the call failed (exit status: 3); it said: went wrong"
        );
    }
}
