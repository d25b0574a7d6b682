//! The runner double keeps the real runner's contract: the same scenarios go through both, with a driver that runs
//! scripts on this host.

// A scenario may panic: that is how a test fails.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use support::coordinator::{Coordinator, Handle, Outcome, Wish};
use support::guests::checkout;
use support::job::Job;
use support::runner::{Driver, Runner, Running};

/// No scenario takes longer on a busy machine.
const SOON: Duration = Duration::from_secs(60);

/// A coordinator, a runner and the folder of the shell driver.
struct Scene {
    // First, since fields are dropped in order: the runner calls the driver to the last.
    _running: Running,
    coordinator: Coordinator,
    folder: tempfile::TempDir,
}

impl Scene {
    fn new(runner: &Runner, concurrent: usize) -> Self {
        let coordinator = Coordinator::start();
        let folder = tempfile::tempdir().unwrap();
        let mut driver = Driver::new(
            &checkout().join("tests/support/shell-driver"),
            &[folder.path().to_str().unwrap()],
        );
        driver.graceful_kill = Duration::from_secs(2);
        driver.force_kill = Duration::from_secs(2);
        let running = runner.start(&coordinator, &driver, concurrent);
        Self {
            coordinator,
            folder,
            _running: running,
        }
    }

    fn run(&self, job: &Job) -> (Handle, Outcome) {
        let handle = self.coordinator.enqueue(job);
        let outcome = handle.wait(SOON);
        (handle, outcome)
    }

    /// The calls of the driver, each as its stage and the name of its run.
    fn calls(&self) -> Vec<String> {
        let lines = self.call_lines();
        lines
            .iter()
            .map(|line| line.split(" cwd=").next().unwrap().to_owned())
            .collect()
    }

    fn call_lines(&self) -> Vec<String> {
        let path: PathBuf = self.folder.path().join("calls.log");
        let text = fs::read_to_string(path).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// The job's end is reported after its last call, but for the clean-up of the real runner.
    fn calls_with(&self, count: usize) -> Vec<String> {
        let end = Instant::now() + SOON;
        while self.calls().len() < count && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        self.calls()
    }
}

fn failed(reason: &str, exit_code: Option<i64>) -> Outcome {
    Outcome {
        success: false,
        failure_reason: reason.to_owned(),
        exit_code,
    }
}

fn a_job_runs_through_all_stages(runner: &Runner) {
    let scene = Scene::new(runner, 1);
    let repository = scene
        .coordinator
        .repository("grp/demo", &[("README", "hello from the repository\n")]);
    let job = Job::new("unit")
        .image("registry.test/vm/debian:12")
        .clones(&repository)
        .variable("GREETING", "good $TIME")
        .variable("TIME", "morning")
        .raw_variable("RAW", "as $TIME it is; 'quoted'\nand two lines")
        .masked_variable("SECRET", "s3cr3t-value-1")
        .file_variable("A_FILE", "content of a file\n")
        .script([
            "cat README",
            "echo \"$GREETING, $RAW\"",
            "cat \"$A_FILE\"",
            "echo \"secret: $SECRET\"",
            "exit 3",
        ])
        .after_script(["echo \"after, status $CI_JOB_STATUS, image $CI_JOB_IMAGE\""]);
    let (handle, outcome) = scene.run(&job);
    let log = handle.log();
    assert_eq!(outcome, failed("script_failure", Some(3)), "{log}");
    for expected in [
        "config speaks on stderr",
        "Using Custom executor with driver shell 1...",
        "prepare speaks",
        "hello from the repository",
        "good morning, as $TIME it is; 'quoted'\nand two lines",
        "content of a file",
        "secret: [MASKED]",
        "after, status failed, image registry.test/vm/debian:12",
        "ERROR: Job failed: exit status 3",
    ] {
        assert!(log.contains(expected), "{expected:?} is missing in:\n{log}");
    }
    assert_eq!(
        scene.calls_with(8),
        [
            "config",
            "prepare",
            "run prepare_script",
            "run get_sources",
            "run build_script",
            "run after_script",
            "run cleanup_file_variables",
            "cleanup"
        ]
    );
    for line in scene.call_lines() {
        assert!(line.contains("cwd=TMPDIR response=600"), "{line}");
        assert_eq!(line.contains("env=yes"), !line.starts_with("config "), "{line}");
        assert_eq!(line.contains("script=700"), line.starts_with("run "), "{line}");
    }
}

fn a_failed_preparation_is_tried_three_times(runner: &Runner) {
    let scene = Scene::new(runner, 1);
    let job = Job::new("unit")
        .variable("DRIVER_FAIL", "prepare:2")
        .script(["true"]);
    let (handle, outcome) = scene.run(&job);
    assert_eq!(outcome, failed("runner_system_failure", None), "{}", handle.log());
    let attempt = ["config", "prepare", "cleanup"];
    assert_eq!(scene.calls_with(9), attempt.repeat(3));
}

fn a_preparation_that_fails_once_is_repeated(runner: &Runner) {
    let scene = Scene::new(runner, 1);
    let job = Job::new("unit")
        .variable("DRIVER_FAIL_ONCE", "config:101")
        .script(["echo fine"]);
    let (handle, outcome) = scene.run(&job);
    assert!(outcome.success, "{}", handle.log());
    assert_eq!(
        scene.calls_with(5)[..4],
        ["config", "cleanup", "config", "prepare"]
    );
}

fn a_build_failure_in_preparation_is_not_repeated(runner: &Runner) {
    let scene = Scene::new(runner, 1);
    let job = Job::new("unit")
        .variable("DRIVER_FAIL", "prepare:1")
        .script(["true"]);
    let (handle, outcome) = scene.run(&job);
    assert_eq!(outcome.failure_reason, "script_failure", "{}", handle.log());
    assert_eq!(scene.calls_with(3), ["config", "prepare", "cleanup"]);
}

fn a_system_failure_in_the_script_is_told_apart(runner: &Runner) {
    for code in ["2", "101"] {
        let scene = Scene::new(runner, 1);
        let job = Job::new("unit")
            .variable("DRIVER_FAIL", &format!("build_script:{code}"))
            .script(["true"]);
        let (handle, outcome) = scene.run(&job);
        assert_eq!(
            outcome.failure_reason,
            "runner_system_failure",
            "{code}: {}",
            handle.log()
        );
    }
}

fn a_graceful_cancel_runs_after_script(runner: &Runner) {
    let scene = Scene::new(runner, 1);
    let job = Job::new("unit")
        .script(["echo started; for i in $(seq 600); do echo tick; sleep 0.2; done"])
        .after_script(["echo \"after, status $CI_JOB_STATUS\""]);
    let handle = scene.coordinator.enqueue(&job);
    handle.wait_log("tick", SOON);
    handle.cancel(Wish::CancelGracefully);
    let outcome = handle.wait(SOON);
    assert_eq!(outcome.failure_reason, "job_canceled", "{outcome:?}");
    assert!(
        handle.log().contains("after, status canceled"),
        "{}",
        handle.log()
    );
    let calls = scene.calls_with(8);
    assert_eq!(
        calls[5..],
        ["run after_script", "run cleanup_file_variables", "cleanup"],
        "{calls:?}"
    );
}

fn a_hard_cancel_only_cleans_up(runner: &Runner) {
    let scene = Scene::new(runner, 1);
    let job = Job::new("unit")
        .script(["echo started; for i in $(seq 600); do echo tick; sleep 0.2; done"])
        .after_script(["echo after"]);
    let handle = scene.coordinator.enqueue(&job);
    handle.wait_log("tick", SOON);
    handle.cancel(Wish::CancelAtOnce);
    let calls = scene.calls_with(6);
    assert_eq!(
        calls,
        [
            "config",
            "prepare",
            "run prepare_script",
            "run get_sources",
            "run build_script",
            "cleanup"
        ]
    );
}

fn a_job_that_takes_too_long_is_stopped(runner: &Runner) {
    let scene = Scene::new(runner, 1);
    let job = Job::new("unit")
        .timeout(Duration::from_secs(4))
        .script(["while true; do echo tick; sleep 0.5; done"])
        .after_script(["echo after"]);
    let (handle, outcome) = scene.run(&job);
    assert_eq!(
        outcome.failure_reason,
        "job_execution_timeout",
        "{}",
        handle.log()
    );
    assert_eq!(scene.calls_with(6).last().unwrap(), "cleanup");
}

fn two_jobs_run_at_once(runner: &Runner) {
    let scene = Scene::new(runner, 2);
    let meet = |own: &str, other: &str| {
        let folder = scene.folder.path().display();
        let line =
            format!("touch {folder}/{own}; until test -e {folder}/{other}; do echo wait; sleep 0.1; done");
        scene.coordinator.enqueue(&Job::new(own).script([line.as_str()]))
    };
    let (one, two) = (meet("one", "two"), meet("two", "one"));
    assert!(one.wait(SOON).success, "{}", one.log());
    assert!(two.wait(SOON).success, "{}", two.log());
}

/// Every scenario for the double, and for the real runner.
macro_rules! scenarios {
    ($($scenario:ident),+ $(,)?) => {
        mod double {
            use super::Runner;
            $(#[test] fn $scenario() { super::$scenario(&Runner::Double); })+
        }
        mod real {
            use super::Runner;
            $(#[test]
            #[ignore = "needs GITLAB_RUNNER_BIN, the path of a gitlab-runner binary"]
            fn $scenario() { super::$scenario(&Runner::real()); })+
        }
    };
}

scenarios!(
    a_job_runs_through_all_stages,
    a_failed_preparation_is_tried_three_times,
    a_preparation_that_fails_once_is_repeated,
    a_build_failure_in_preparation_is_not_repeated,
    a_system_failure_in_the_script_is_told_apart,
    a_graceful_cancel_runs_after_script,
    a_hard_cancel_only_cleans_up,
    a_job_that_takes_too_long_is_stopped,
    two_jobs_run_at_once,
);
