//! The whole of gitlab-runner's repertoire by the real one: more than ten jobs in a row, two at a time, each of another kind.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::panic::resume_unwind;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use support::coordinator::{Handle, Outcome, Wish};
use support::host::{EMULATION, Host};
use support::job::Job;
use support::notes::Notes;
use support::picture::{Picture, unzipped};
use support::runner::{REAL_RUNNER, Runner};
use support::s3::S3;
use support::scene::{Scene, port};
use support::{table, until};

/// A job that waits until the others are through.
const LATER: Duration = Duration::from_secs(600);
/// A dead machine is noticed sooner.
const NOTICED: Duration = Duration::from_secs(10);
/// Long enough to boot an emulated guest beside another one.
const JOB_TIMEOUT: Duration = Duration::from_secs(45);
/// How many jobs the runner takes at a time.
const CONCURRENT: usize = 2;
/// A registry on a port that nobody listens on.
const DOWN: &str = "127.0.0.1:9/vm/none:1";

struct Stage {
    scene: Scene,
    notes: Notes,
    s3: S3,
    image: String,
}

impl Stage {
    fn job(&self, name: &str) -> Job {
        Job::new(name).image(&self.image)
    }

    fn enqueue(&self, job: &Job) -> Handle {
        self.scene.coordinator.enqueue(job)
    }

    fn run(&self, job: &Job) -> (Handle, Outcome) {
        let handle = self.enqueue(job);
        let outcome = handle.wait(LATER);
        (handle, outcome)
    }

    /// How often prepare and cleanup were called for a job, once the last cleanup is through.
    fn tries(&self, job: &Handle) -> (usize, usize) {
        let calls = |stage| self.notes.calls(job.id(), stage);
        until("every prepare has its cleanup", LATER, || {
            let ended = self.notes.of(job.id(), "cleanup");
            ended.iter().filter(|note| note.what == "ended:0").count() == calls("prepare")
        });
        (calls("prepare"), calls("cleanup"))
    }
}

#[track_caller]
fn failed(handle: &Handle, outcome: &Outcome, reason: &str, code: Option<i64>) {
    let seen = (
        outcome.success,
        outcome.failure_reason.as_str(),
        outcome.exit_code,
    );
    assert_eq!(seen, (false, reason, code), "{}", handle.log());
}

#[track_caller]
fn says(handle: &Handle, texts: &[&str]) {
    let log = handle.log();
    for text in texts {
        assert!(log.contains(text), "{text:?} is not in\n{log}");
    }
}

fn an_exit_code_that_may_be_allowed_is_told_and_the_failures_report_is_kept(stage: &Stage) {
    let job = stage.job("exit 77").artifacts([".cannery/"]).script(["exit 77"]);
    let (handle, outcome) = stage.run(&job);
    failed(&handle, &outcome, "script_failure", Some(77));
    assert_eq!(stage.tries(&handle), (1, 1));
    // What the machine said and showed, as GitLab has it.
    let archive = stage.scene.host.folder().join("report.zip");
    std::fs::write(&archive, handle.artifacts().expect("artifacts")).unwrap();
    let serial = unzipped(&archive, ".cannery/serial.log");
    assert!(String::from_utf8_lossy(&serial).contains("tiny: ready"));
    let screen = Picture::read(&unzipped(&archive, ".cannery/screen.png"));
    assert!(screen.width >= 640 && screen.height >= 400, "{screen:?}");
}

fn a_cache_and_artifacts_reach_a_job_on_another_machine(stage: &Stage) {
    let job = stage
        .job("writes cache and artifacts")
        .cache("key", ["warm/"])
        .artifacts(["result"])
        .script([
            "test ! -e warm",
            "mkdir warm && echo \"cached by $(hostname)\" >warm/word",
            "echo \"built by $(hostname)\" >result",
        ]);
    let (first, outcome) = stage.run(&job);
    assert!(outcome.success, "{}", first.log());
    says(&first, &["copying it into the guest", "Copied gitlab-runner"]);
    assert_eq!(
        stage.s3.objects().len(),
        1,
        "{:?}\n{}",
        stage.s3.objects(),
        first.log()
    );
    let archive = first.artifacts().expect("artifacts");
    assert!(archive.starts_with(b"PK"), "no zip file");

    let job = stage
        .job("reads cache and artifacts")
        .cache("key", ["warm/"])
        .needs(&first)
        .script(["cat warm/word result"]);
    let (second, outcome) = stage.run(&job);
    assert!(outcome.success, "{}", second.log());
    let by = format!("by job-{}", first.id());
    says(&second, &[&format!("cached {by}"), &format!("built {by}")]);
}

fn a_cancelled_job_still_runs_after_script(stage: &Stage) {
    let job = stage
        .job("cancelled")
        .script(["echo begun; while sleep 0.5; do echo tick; done"])
        .after_script(["echo \"after: $CI_JOB_STATUS\""]);
    let handle = stage.enqueue(&job);
    handle.wait_log("tick", LATER);
    handle.cancel(Wish::CancelGracefully);
    let outcome = handle.wait(LATER);
    assert!(!outcome.success, "{outcome:?}");
    says(&handle, &["after: canceled"]);
    assert_eq!(stage.tries(&handle), (1, 1));
}

fn a_job_beyond_its_time_is_only_cleaned_up(stage: &Stage) {
    let job = stage
        .job("too long")
        .timeout(JOB_TIMEOUT)
        .script(["while sleep 0.5; do echo tick; done"])
        .after_script(["echo after"]);
    let (handle, outcome) = stage.run(&job);
    failed(&handle, &outcome, "job_execution_timeout", None);
    assert_eq!(stage.tries(&handle), (1, 1));
    assert_eq!(stage.notes.calls(handle.id(), "after_script"), 0);
}

fn a_guest_that_is_killed_is_the_systems_failure(stage: &Stage) {
    let job = stage
        .job("guest killed")
        .script(["while sleep 0.5; do echo tick; done"]);
    let handle = stage.enqueue(&job);
    handle.wait_log("tick", LATER);
    let of_job = format!("-{}-1", handle.id());
    let machines = stage.scene.host.machines();
    let machine = machines.iter().find(|name| name.ends_with(&of_job)).unwrap();
    let begin = Instant::now();
    let destroyed = Command::new("virsh")
        .args(["-c", "qemu:///system", "destroy", machine])
        .output()
        .unwrap();
    assert!(destroyed.status.success());
    let outcome = handle.wait(LATER);
    let took = begin.elapsed();
    failed(&handle, &outcome, "runner_system_failure", None);
    assert!(took < NOTICED, "{took:?}: {}", handle.log());
    assert_eq!(stage.tries(&handle), (1, 1));
}

fn a_preparation_that_the_weather_fails_is_tried_three_times(stage: &Stage) {
    let (handle, outcome) = stage.run(&Job::new("registry down").image(DOWN).script(["true"]));
    failed(&handle, &outcome, "runner_system_failure", None);
    assert_eq!(stage.tries(&handle), (3, 3));
}

fn a_wrong_image_is_tried_once(stage: &Stage) {
    let wrong = stage.image.replace(":tiny", ":tyni");
    let (handle, outcome) = stage.run(&Job::new("wrong image").image(&wrong).script(["true"]));
    assert_eq!(
        (outcome.success, outcome.failure_reason.as_str()),
        (false, "script_failure"),
        "{}",
        handle.log()
    );
    assert_eq!(stage.tries(&handle), (1, 1));
}

fn other_jobs_run_beside_all_that(stage: &Stage) {
    let names = ["plain 1", "plain 2", "plain 3"];
    let jobs = names.map(|name| stage.enqueue(&stage.job(name).script(["echo \"on $(hostname)\""])));
    for job in jobs {
        assert!(job.wait(LATER).success, "{}", job.log());
        says(&job, &[&format!("on job-{}", job.id())]);
    }
}

/// A name, and what is to be seen.
type Scenario = (&'static str, fn(&Stage));

const SCENARIOS: [Scenario; 8] = [
    ("too long", a_job_beyond_its_time_is_only_cleaned_up),
    (
        "cache and artifacts",
        a_cache_and_artifacts_reach_a_job_on_another_machine,
    ),
    (
        "exit 77",
        an_exit_code_that_may_be_allowed_is_told_and_the_failures_report_is_kept,
    ),
    ("cancelled", a_cancelled_job_still_runs_after_script),
    ("guest killed", a_guest_that_is_killed_is_the_systems_failure),
    (
        "registry down",
        a_preparation_that_the_weather_fails_is_tried_three_times,
    ),
    ("wrong image", a_wrong_image_is_tried_once),
    ("others", other_jobs_run_beside_all_that),
];

#[test]
#[ignore = "needs libvirt, a guest and GITLAB_RUNNER_BIN, the path of a gitlab-runner binary"]
fn jobs_of_every_kind_end_as_they_should_and_leave_nothing() {
    assert_ne!(Runner::real(), Runner::Double);
    let helper = support::environment(REAL_RUNNER).unwrap();
    let (of_coordinator, of_s3) = (port(), port());
    let settings = format!("{EMULATION}[guest]\nhelper = \"{helper}\"\n");
    let host = Host::new(&[of_coordinator, of_s3], &settings).with_network();
    let image = host.images().add_tiny("tiny", "");
    let text = host.settings_text();
    let allowed = format!("[images]\nallow = [\"{}\"]\n", DOWN.replace(":1", ":*"));
    let text = text.replace("[images]\n", &allowed);
    host.write_settings(&format!("report_dir = \".cannery\"\n{text}"));
    let s3 = S3::start(host.address(), of_s3);
    let (mut driver, notes) = Notes::driver(&host);
    driver.cache = Some(s3.cache());
    let scene = Scene::with(host.into(), &driver, of_coordinator, CONCURRENT);
    let stage = Stage {
        scene,
        notes,
        s3,
        image,
    };

    thread::scope(|scope| {
        let threads: Vec<_> = SCENARIOS
            .iter()
            .map(|(name, scenario)| {
                let begin = thread::Builder::new().name((*name).to_owned());
                begin.spawn_scoped(scope, || scenario(&stage)).unwrap()
            })
            .collect();
        // All end, so that one that fails does not hide the others.
        let ends: Vec<_> = threads.into_iter().map(|t| t.join()).collect();
        if let Some(panic) = ends.into_iter().find_map(Result::err) {
            resume_unwind(panic);
        }
    });
    assert!(stage.scene.coordinator.jobs().len() >= 10);
    show_what_the_helper_took(&stage);
    assert_eq!(most_at_once(&stage.notes), CONCURRENT);
    stage.scene.is_clean_soon();
    assert_eq!(stage.scene.host.downloads(), Vec::<std::path::PathBuf>::new());
}

/// What the job logs say about the binary that was copied into guests.
fn show_what_the_helper_took(stage: &Stage) {
    let jobs = stage.scene.coordinator.jobs();
    let rows: Vec<Vec<String>> = jobs
        .iter()
        .filter_map(|job| {
            let log = job.log();
            let line = |part: &str| log.lines().find(|line| line.contains(part)).map(str::to_owned);
            Some(vec![
                job.name().to_owned(),
                line("Copied gitlab-runner")?,
                line("Ready: ")?,
            ])
        })
        .collect();
    assert_eq!(rows.len(), 3, "only jobs that need the helper get it");
    table::show(
        "gitlab-runner for guests that lack it",
        &["job", "copy", "prepare"],
        &rows,
    );
}

/// How many calls of the driver went on at a time, at most: a job has one at a time.
fn most_at_once(notes: &Notes) -> usize {
    let (mut now, mut most) = (0usize, 0);
    for note in notes.all() {
        match note.what.as_str() {
            "began" => now += 1,
            "told" => {}
            _ => now -= 1,
        }
        most = most.max(now);
    }
    most
}
