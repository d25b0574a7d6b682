//! Jobs from `image:` to exit code, on real guests, by the real gitlab-runner where `GITLAB_RUNNER_BIN` names one, else by
//! the runner double.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::Duration;

use support::coordinator::Coordinator;
use support::host::Host;
use support::job::Job;
use support::runner::Runner;

/// A job on an emulated guest, on a busy machine.
const SOON: Duration = Duration::from_secs(240);

/// A port for each coordinator: guests may reach only ports that the settings name beforehand.
fn port() -> u16 {
    std::net::TcpListener::bind(("0.0.0.0", 0))
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn a_job_clones_its_project_fails_with_its_own_code_and_leaves_nothing() {
    let port = port();
    let host = Host::new(&[port], "").with_network();
    let image = host.images().add_tiny("tiny", "");
    let coordinator = Coordinator::listen(host.address(), port, &host.address().to_string());
    let repository = coordinator.repository("grp/demo", &[("README", "hello from the repository\n")]);
    let _running = Runner::from_environment().start(&coordinator, &host.driver(), 1);
    let job = Job::new("unit")
        .image(&image)
        .clones(&repository)
        .script([
            "cat README",
            "echo \"on $(hostname)\"",
            "echo first; echo second >&2; echo third",
            "exit 3",
        ])
        .after_script(["echo \"after: $CI_JOB_STATUS\""]);
    let handle = coordinator.enqueue(&job);
    let outcome = handle.wait(SOON);
    let log = handle.log();
    assert_eq!((outcome.success, outcome.exit_code), (false, Some(3)), "{log}");
    assert_eq!(outcome.failure_reason, "script_failure", "{log}");
    for expected in [
        "Using Custom executor with driver cannery",
        "hello from the repository",
        &format!("on job-{}", handle.id()),
        "first\nsecond\nthird",
        "after: failed",
        "Ready: image",
    ] {
        assert!(log.contains(expected), "{expected:?} is not in\n{log}");
    }
    let end = std::time::Instant::now() + Duration::from_secs(20);
    while !host.leftovers().is_empty() && std::time::Instant::now() < end {
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(host.leftovers(), Vec::<String>::new());
}
