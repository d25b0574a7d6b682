//! A job whose time is over: its machine stays for a look, and what it showed is kept.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::Duration;

use support::coordinator::Handle;
use support::host::{EMULATION, Host};
use support::job::Job;
use support::scene::{SOON, Scene, port};
use support::until;

/// `timeout:` of the job whose time is over as a whole; a guest is there sooner, also on a busy host.
const TIMEOUT: Duration = Duration::from_secs(75);
/// A cleanup that holds a machine has nothing to wait for.
const CLEANUP: Duration = Duration::from_secs(30);

/// What a job's machine has kept, and what its author and its operator are told.
fn is_held(host: &Host, handle: &Handle) {
    let (id, log) = (handle.id().to_string(), handle.log());
    assert!(log.contains("the screen are in "), "{log}");
    assert!(log.contains("stays until "), "{log}");
    let way = format!("enters it with `cannery vm ssh {}`", key(host, &id));
    assert!(log.contains(&way), "{way} in {log}");
    until("the runner has cleaned up", CLEANUP, || {
        host.expect(&["vm", "list"])
            .lines()
            .any(|line| line.contains(&format!("-{id}-")) && line.contains("held until"))
    });
    let kept = "cd /builds/*/*/*/.cannery || cd /builds/*/*/.cannery; tail -c 100000 serial.log; head -c 8 screen.png | od -An -tx1";
    let kept = host.expect(&["vm", "ssh", &id, "--", kept]);
    assert!(kept.contains("tiny: ready"), "{kept}");
    assert!(kept.trim_end().ends_with("89 50 4e 47 0d 0a 1a 0a"), "{kept}");
    let shown = host.expect(&["job", "show", &id]);
    assert!(shown.starts_with("Cancelled in "), "{shown}");
    assert!(shown.contains("Its machine is held until"), "{shown}");
    assert!(shown.contains("/screen.png\n"), "{shown}");
}

/// The state folder's name of a job.
fn key(host: &Host, id: &str) -> String {
    let list = host.expect(&["vm", "list", "--format", "json"]);
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    let mut keys = list
        .as_array()
        .unwrap()
        .iter()
        .map(|job| job["key"].as_str().unwrap());
    let key = keys.rfind(|key| key.split('-').nth(1) == Some(id));
    key.unwrap().to_owned()
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn a_machine_whose_scripts_or_jobs_time_was_over_is_held_and_has_the_report() {
    let port = port();
    let settings = format!("{EMULATION}[hold]\nmax = \"1h\"\n");
    let host = Host::new(&[port], &settings).with_network();
    let text = host.settings_text();
    host.write_settings(&format!("report_dir = \".cannery\"\n{text}"));
    let image = host.images().add_tiny("tiny", "");
    let mut driver = host.driver();
    // The report is written before the call ends.
    driver.graceful_kill = Duration::from_secs(60);
    let scene = Scene::with(host.into(), &driver, port, 2);
    let job = |name: &str| {
        Job::new(name)
            .image(&image)
            .variable("CANNERY_HOLD", "30m")
            .script(["echo begun; sleep 1000"])
            .after_script(["ls -a .cannery; echo \"after: $CI_JOB_STATUS\""])
    };
    let of_script = scene
        .coordinator
        .enqueue(&job("script").variable("RUNNER_SCRIPT_TIMEOUT", "6s"));
    let of_job = scene.coordinator.enqueue(&job("job").timeout(TIMEOUT));

    let outcome = of_script.wait(SOON);
    assert_eq!(outcome.failure_reason, "job_execution_timeout", "{outcome:?}");
    // What comes after the script finds the report, and so does what uploads it.
    let log = of_script.log();
    let (_, after) = log.split_once("ls -a .cannery").unwrap();
    for part in ["serial.log", "screen.png", "after: timedout"] {
        assert!(after.contains(part), "{part} in {log}");
    }
    is_held(&scene.host, &of_script);

    let outcome = of_job.wait(SOON);
    assert_eq!(outcome.failure_reason, "job_execution_timeout", "{outcome:?}");
    let log = of_job.log();
    assert!(log.contains("begun") && !log.contains("after: "), "{log}");
    is_held(&scene.host, &of_job);

    for handle in [&of_script, &of_job] {
        let id = handle.id().to_string();
        scene.host.expect(&["vm", "release", &id]);
    }
    scene.is_clean_soon();
}
