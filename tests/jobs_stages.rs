//! The four stages and the commands for people, called by hand: twice, late, at once, after failures, with nothing there.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::host::{EMULATION, Host, cannery, virsh};
use support::job::Job;
use support::stages::{BUILD_FAILURE, SYSTEM_FAILURE, Stages, ended};
use support::until;

const NOTHING: Vec<String> = Vec::new();
/// A guest that dies, or a machine that is taken away, is noticed so soon.
const NOTICED: Duration = Duration::from_secs(10);
/// The boot of an emulated guest on a busy machine.
const BOOT: Duration = Duration::from_secs(240);

fn jobs(host: &Host) -> Vec<Value> {
    serde_json::from_str(&host.expect(&["vm", "list", "--format", "json"])).unwrap()
}

#[test]
#[ignore = "needs libvirt"]
fn config_answers_the_runner_and_says_nothing_else() {
    let host = Host::new(&[], "");
    let job = Stages::of(&host, &Job::new("unit").image("oci:/anywhere:x"), 17);
    let done = job.config().ok();
    assert_eq!(done.log, "");
    let mut answer: Value = serde_json::from_slice(&done.stdout).unwrap();
    let version = answer["driver"]["version"].take();
    let version = version.as_str().unwrap();
    let ours = env!("CARGO_PKG_VERSION");
    assert!(version.starts_with(&format!("{ours} (libvirt ")), "{version}");
    assert!(version.contains("QEMU "), "{version}");
    assert_eq!(
        answer,
        json!({
            "driver": {"name": "cannery", "version": null},
            "hostname": "job-17",
            "builds_dir": "/builds",
            "cache_dir": "/cache",
            "builds_dir_is_shared": false,
            "shell": "bash",
            "job_env": {"CANNERY_CONFIG": host.settings()},
        })
    );
    assert!(!host.state().exists() || host.leftovers().is_empty());
}

#[test]
#[ignore = "needs libvirt"]
fn without_libvirt_config_still_answers_and_prepare_says_what_is_wrong() {
    let host = Host::new(
        &[],
        "[libvirt]\nuri = \"qemu+unix:///system?socket=/nowhere/libvirt-sock\"\n",
    );
    let image = host.images().add_tiny("tiny", "");
    let job = Stages::new(&host, &image);
    let answer: Value = serde_json::from_slice(&job.config().ok().stdout).unwrap();
    let version = answer["driver"]["version"].as_str().unwrap();
    assert!(version.ends_with("(libvirt unreachable)"), "{version}");
    let done = job
        .prepare()
        .failed(SYSTEM_FAILURE, &["ERROR: ", "libvirt", "Is libvirtd running"]);
    assert!(done.took < Duration::from_secs(20), "{:?}", done.took);
    job.cleans_up();
}

#[test]
#[ignore = "needs libvirt"]
fn what_only_the_author_can_mend_is_a_build_failure_and_leaves_nothing() {
    let host = Host::new(&[], EMULATION);
    let image = host.images().add_tiny("tiny", "");
    let unit = || Job::new("unit").image(&image);
    let cases: [(Job, &[&str]); 9] = [
        (Job::new("unit"), &["names no image", "Add image:"]),
        (
            unit().service("postgres:17"),
            &["postgres:17", "services = \"ignore\""],
        ),
        (
            unit().image("registry.example.com/x:1"),
            &["registry.example.com/x:1", "images.allow"],
        ),
        (unit().image("oci:/etc:x"), &["not allowed", "images.layouts"]),
        (unit().image("Not An Image"), &["`Not An Image` names no image"]),
        (
            unit().image_user("nobody"),
            &["may not run as the user nobody", "guest.allow_users"],
        ),
        (
            unit().variable("CANNERY_CPUS", "64"),
            &["CANNERY_CPUS=64", "at most 2"],
        ),
        (
            unit().variable("CANNERY_MEMORY", "lots"),
            &["CANNERY_MEMORY=lots", "such as"],
        ),
        (unit().pull_policy(["always"]), &["always is not allowed"]),
    ];
    for (number, (job, says)) in (1..).zip(cases) {
        let job = Stages::of(&host, &job, number);
        job.config().ok();
        let done = job.prepare().failed(BUILD_FAILURE, says);
        assert!(done.stdout.is_empty(), "{}", done.text());
        // No machine, or one that never came to be ready.
        job.run("after_script", "true\n")
            .failed(SYSTEM_FAILURE, &["machine"]);
        job.cleanup().ok();
        assert_eq!(host.leftovers(), NOTHING, "{says:?}");
    }
    // Nothing was fetched for what was never to start.
    let disks = fs::read_dir(host.state().join("store/disks"));
    assert_eq!(disks.into_iter().flatten().count(), 0);
}

#[test]
#[ignore = "needs libvirt"]
fn cleanup_is_right_with_nothing_there() {
    let host = Host::new(&[], "");
    let job = Stages::of(&host, &Job::new("unit"), 1);
    assert_eq!(job.cleanup().ok().log, "");
    assert_eq!(job.cleanup().ok().log, "");
    // Nor is the job response missed.
    fs::remove_file(job.file("response.json")).unwrap();
    job.config().failed(SYSTEM_FAILURE, &["response.json"]);
    assert_eq!(job.cleanup().ok().log, "");
    let lonely = Command::new(cannery())
        .arg("cleanup")
        .env_clear()
        .output()
        .unwrap();
    assert_eq!(lonely.status.code(), Some(2));
    let said = String::from_utf8(lonely.stderr).unwrap();
    assert!(
        said.contains("JOB_RESPONSE_FILE") && said.contains("gitlab-runner"),
        "{said}"
    );
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn a_job_is_seen_prepared_again_tried_again_and_removed_once() {
    let host = Host::new(&[], EMULATION);
    let image = host.images().add_tiny("tiny", "");
    let unit = Job::new("unit").image(&image).project("grp/demo", 7);

    // The runner calls prepare again after a failure; whatever there was makes room.
    let first = Stages::of(&host, &unit, 5);
    first.prepare().ok();
    let before = host.machines();
    first.script("touch /tmp/here\n").ok();
    let log = first.prepare().ok().log;
    assert!(log.contains("Ready: image"), "{log}");
    assert_eq!(host.machines().len(), 1);
    assert_ne!(first.script("test -e /tmp/here\n").code, 0);

    people_see_the_job(&host, &image);

    // Another try of the same job, whose runner has forgotten the first: only one machine is left, and it is the new one's.
    let second = Stages::of(&host, &unit, 5);
    second.prepare().ok();
    assert_eq!(host.machines().len(), 1);
    first.script("true\n").failed(SYSTEM_FAILURE, &["has no machine"]);
    first.cleanup().ok();
    assert_eq!(second.script("hostname\n").ok().text(), "job-5\n");

    a_cleanup_while_a_script_runs_ends_it(&second);
    second.cleans_up();
    assert!(!before.is_empty());
}

fn people_see_the_job(host: &Host, image: &str) {
    let listed = jobs(host);
    let [job] = listed.as_slice() else {
        panic!("{listed:?}");
    };
    assert_eq!((&job["job"], &job["project"]), (&json!(5), &json!("grp/demo")));
    assert_eq!((&job["image"], &job["state"]), (&json!(image), &json!("ready")));
    assert!(job["digest"].as_str().unwrap().starts_with("sha256:"));
    let address = job["address"].as_str().unwrap();
    let table = host.expect(&["vm", "list"]);
    let mut lines = table.lines();
    let heading: Vec<&str> = lines.next().unwrap().split_whitespace().collect();
    assert_eq!(heading, ["JOB", "PROJECT", "IMAGE", "STATE", "AGE", "ADDRESS"]);
    let line = lines.next().unwrap();
    for cell in [job["key"].as_str().unwrap(), "grp/demo", "ready", address] {
        assert!(line.contains(cell), "{cell:?} is not in\n{table}");
    }
}

fn a_cleanup_while_a_script_runs_ends_it(job: &Stages<'_>) {
    let mut child = job.start("echo begun; sleep 1000\n");
    await_word(&mut child, "begun\n");
    let begin = Instant::now();
    job.cleanup().ok();
    let done = ended(child, begin).failed(SYSTEM_FAILURE, &["ERROR: "]);
    assert!(done.took < NOTICED, "{:?}: {}", done.took, done.log);
    assert_eq!(job.exit_code(), None);
}

/// Waits until the script has printed this.
fn await_word(child: &mut std::process::Child, word: &str) {
    use std::io::Read;
    let mut seen = vec![0; word.len()];
    child.stdout.as_mut().unwrap().read_exact(&mut seen).unwrap();
    assert_eq!(String::from_utf8_lossy(&seen), word);
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn a_machine_that_is_destroyed_under_a_script_is_a_system_failure_at_once() {
    let host = Host::new(&[], EMULATION);
    let image = host.images().add_tiny("tiny", "");
    let job = Stages::new(&host, &image);
    job.prepare().ok();
    let mut child = job.start("echo begun; sleep 1000\n");
    await_word(&mut child, "begun\n");
    let begin = Instant::now();
    virsh(&["destroy", &host.machines()[0]]);
    let done = ended(child, begin).failed(SYSTEM_FAILURE, &["ERROR: ", "machine"]);
    assert!(done.took < NOTICED, "{:?}: {}", done.took, done.log);
    assert_eq!(done.log.matches("ERROR: ").count(), 1, "{}", done.log);
    let next = job
        .run("after_script", "true\n")
        .failed(SYSTEM_FAILURE, &["machine"]);
    assert!(next.took < NOTICED, "{:?}: {}", next.took, next.log);
    job.cleans_up();
}

/// Starts prepare from a shell that plays the runner: it gives the call a process group of its own, and goes on living.
fn runner_that_prepares(host: &Host, job: &Stages<'_>) -> std::process::Child {
    let script =
        "set -m; \"$0\" --config \"$1\" prepare & wait $!; echo $? >\"$TMPDIR/prepared\"; exec sleep 1000";
    let mut shell = Command::new("bash");
    shell.args(["-c", script]).arg(cannery()).arg(host.settings());
    job.surround(&mut shell);
    let child = shell
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .unwrap();
    let answer = job.file("prepared");
    until("prepare has ended", BOOT, || answer.exists());
    until("its code is there", NOTICED, || {
        fs::read_to_string(&answer).unwrap() == "0\n"
    });
    child
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn the_reaper_removes_what_a_dead_runner_left_and_nothing_else() {
    let host = Host::new(&[], EMULATION);
    let image = host.images().add_tiny("tiny", "");
    let unit = Job::new("unit").image(&image);

    // Two [[runners]] with settings of their own share the host.
    let other = host.folder().join("other.toml");
    let text = host
        .settings_text()
        .replace("accelerator", "cpus = 1\naccelerator");
    fs::write(
        &other,
        format!("builds_dir = \"/work\"\n{text}[guest]\nshell = \"sh\"\n"),
    )
    .unwrap();
    let live = Stages::of(&host, &unit, 1).with_settings(&other);
    let answer: Value = serde_json::from_slice(&live.config().ok().stdout).unwrap();
    assert_eq!(
        (&answer["builds_dir"], &answer["shell"]),
        (&json!("/work"), &json!("sh"))
    );
    live.prepare().ok();
    live.script("test -d /work && [ $(nproc) = 1 ] && [ -z \"$BASH_VERSION\" ]\n")
        .ok();

    let dead = Stages::of(&host, &unit, 2);
    let mut runner = runner_that_prepares(&host, &dead);
    assert_eq!(jobs(&host).len(), 2);
    assert_eq!(host.expect(&["reap"]), "Nothing to remove.\n");
    runner.kill().unwrap();
    runner.wait().unwrap();

    let said = host.expect(&["reap", "--dry-run"]);
    assert!(
        said.starts_with("would remove job ") && said.contains("-2-1"),
        "{said}"
    );
    assert!(said.contains("the gitlab-runner that began it is gone"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert_eq!(host.machines().len(), 2);
    let said = host.expect(&["reap"]);
    assert!(
        said.starts_with("removed job ") && said.contains("-2-1"),
        "{said}"
    );
    assert_eq!(host.machines().len(), 1);
    assert_eq!(host.expect(&["reap"]), "Nothing to remove.\n");

    live.script("true\n").ok();
    an_operator_removes_the_other(&host, &live);
}

fn an_operator_removes_the_other(host: &Host, job: &Stages<'_>) {
    let unknown = host.cannery(&["vm", "rm", "4711"]);
    assert_eq!(unknown.status.code(), Some(1));
    let said = String::from_utf8(unknown.stderr).unwrap();
    assert!(
        said.contains("no job \"4711\"") || said.contains("No job \"4711\""),
        "{said}"
    );
    let mut child = job.start("echo begun; sleep 1000\n");
    await_word(&mut child, "begun\n");
    let begin = Instant::now();
    let key = jobs(host)[0]["key"].as_str().unwrap().to_owned();
    assert_eq!(host.expect(&["vm", "rm", "1"]), format!("{key}\n"));
    let done = ended(child, begin).failed(SYSTEM_FAILURE, &["ERROR: "]);
    assert!(done.took < NOTICED, "{:?}: {}", done.took, done.log);
    assert_eq!(host.leftovers(), NOTHING);
    job.cleanup().ok();
}
