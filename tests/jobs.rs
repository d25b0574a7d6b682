//! Jobs from `image:` to exit code, on real guests, by the real gitlab-runner where `GITLAB_RUNNER_BIN` names one, else by
//! the runner double.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use support::coordinator::{Handle, Wish};
use support::host::{EMULATION, Host};
use support::job::Job;
use support::scene::{SOON, Scene, port};

/// Fails the test unless the log says all of this.
#[track_caller]
fn says(handle: &Handle, texts: &[&str]) {
    let log = handle.log();
    for text in texts {
        assert!(log.contains(text), "{text:?} is not in\n{log}");
    }
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn a_job_clones_its_project_fails_with_its_own_code_and_leaves_nothing() {
    let port = port();
    let host = Host::new(&[port], EMULATION).with_network();
    let image = host.images().add_tiny("tiny", "");
    let scene = Scene::new(host, port, 1);
    let repository = scene
        .coordinator
        .repository("grp/demo", &[("README", "hello from the repository\n")]);
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
    let (handle, outcome) = scene.run(&job);
    let log = handle.log();
    assert_eq!((outcome.success, outcome.exit_code), (false, Some(3)), "{log}");
    assert_eq!(outcome.failure_reason, "script_failure", "{log}");
    says(
        &handle,
        &[
            "Using Custom executor with driver cannery",
            "hello from the repository",
            &format!("on job-{}", handle.id()),
            "first\nsecond\nthird",
            "after: failed",
            "Ready: image",
        ],
    );
    scene.is_clean_soon();
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn two_jobs_at_once_have_a_machine_each_of_the_size_and_for_the_user_that_they_ask_for() {
    let port = port();
    let settings =
        format!("{EMULATION}[limits]\ncpus = 2\nmemory = \"1G\"\n[guest]\nallow_users = [\"ci\"]\n");
    let host = Host::new(&[port], &settings).with_network();
    let image = host.images().add_tiny("tiny", "");
    // What the operator chose for jobs that choose nothing; services are said to be missing and no more.
    let text = host.settings_text();
    let text = text.replace("[images]\n", &format!("[images]\ndefault = \"{image}\"\n"));
    host.write_settings(&format!("services = \"ignore\"\n{text}"));
    let scene = Scene::new(host, port, 2);
    let small = Job::new("small")
        .service("postgres:17")
        .variable("CANNERY_CPUS", "1")
        .script(["echo \"$(id -un) has $(nproc) CPU\"", "echo wait; sleep 20"]);
    let large = Job::new("large")
        .image(&image)
        .image_user("ci")
        .variable("CANNERY_CPUS", "2")
        .variable("CANNERY_MEMORY", "640M")
        .artifacts(["result"])
        .script([
            "echo \"$(id -un) has $(nproc) CPU\"",
            "awk '/MemTotal/ { print ($2 > 540 * 1024 && $2 < 640 * 1024) ? \"memory is right\" : $2 }' /proc/meminfo",
            "pwd; echo x >result; sleep 20",
        ]);
    let (small, large) = (
        scene.coordinator.enqueue(&small),
        scene.coordinator.enqueue(&large),
    );
    small.wait_log("wait", SOON);
    large.wait_log("memory is right", SOON);
    assert_eq!(scene.host.machines().len(), 2);
    let (first, second) = (small.wait(SOON), large.wait(SOON));
    assert!(first.success, "{}", small.log());
    says(&small, &["root has 1 CPU", "postgres:17", &image]);
    says(&large, &["ci has 2 CPU", "has no gitlab-runner binary"]);
    // The runner's own rule: artifacts that cannot be uploaded do not change what the script came to.
    assert!(
        second.success || second.failure_reason == "script_failure",
        "{second:?}\n{}",
        large.log()
    );
    assert_eq!(large.artifacts(), None);
    scene.is_clean_soon();
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn a_wrong_image_is_the_authors_failure_at_the_first_try() {
    let port = port();
    let host = Host::new(&[port], EMULATION).with_network();
    let image = host.images().add_tiny("tiny", "");
    let scene = Scene::new(host, port, 1);
    for (job, texts) in [
        (
            Job::new("unit").image(&image.replace(":tiny", ":tyni")),
            ["tyni", "Is the name right, and was the tag pushed?"],
        ),
        (
            Job::new("unit").image(&image).service("postgres:17"),
            ["postgres:17", "virtual machine has none"],
        ),
    ] {
        let (handle, outcome) = scene.run(&job.script(["echo never"]));
        assert_eq!(
            (outcome.success, outcome.failure_reason.as_str()),
            (false, "script_failure"),
            "{}",
            handle.log()
        );
        says(&handle, &texts);
        let log = handle.log();
        let ours = |line: &&str| line.starts_with("ERROR: ") && !line.contains("Job failed");
        assert_eq!(log.lines().filter(ours).count(), 1, "{log}");
        scene.is_clean_soon();
    }
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn a_job_that_is_given_up_is_only_cleaned_up_and_one_whose_script_takes_too_long_runs_after_script() {
    let port = port();
    let host = Host::new(&[port], EMULATION).with_network();
    let image = host.images().add_tiny("tiny", "");
    let scene = Scene::new(host, port, 2);
    let after = ["if ps | grep -q '[s]leep 1000'; then echo still running; else echo all gone; fi"];

    let script = ["trap 'echo told to end' TERM; echo begun; sleep 1000 & wait"];
    let job = Job::new("slow").image(&image).script(script).after_script(after);
    // Time for the script alone: how long the boot takes is not what is tested.
    let slow = scene
        .coordinator
        .enqueue(&job.variable("RUNNER_SCRIPT_TIMEOUT", "5s"));

    // Given up altogether: how it ended is of no interest to GitLab any more, and not told.
    let given_up = Job::new("given up")
        .image(&image)
        .script(["while sleep 0.5; do echo tick; done"])
        .after_script(after);
    let given_up = scene.coordinator.enqueue(&given_up);
    given_up.wait_log("tick", SOON);
    given_up.cancel(Wish::CancelAtOnce);

    let outcome = slow.wait(SOON);
    assert_eq!(
        (outcome.success, outcome.failure_reason.as_str()),
        (false, "job_execution_timeout"),
        "{}",
        slow.log()
    );
    says(&slow, &["told to end", "all gone"]);
    scene.is_clean_soon();
    assert!(!given_up.log().contains("all gone"), "{}", given_up.log());
}
