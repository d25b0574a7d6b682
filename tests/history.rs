//! What is remembered of jobs that are over: why each failed, and nothing secret.

#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(clippy::print_stdout, reason = "what is shown is the list and the answers")]

mod support;

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Instant;

use serde_json::{Value, json};
use support::host::{EMULATION, Host};
use support::job::Job;
use support::scene::{SOON, Scene, port};
use support::stages::{BUILD_FAILURE, SYSTEM_FAILURE, Stages, ended};
use support::until;

/// What is kept of a serial log.
const SERIAL_BYTES: usize = 64 << 10;

/// Texts of the jobs and of the settings that must not be remembered. The last three are tokens of the tests' coordinator.
const SECRETS: [&str; 6] = [
    "masked-s3cret",
    "plain-variable",
    "registry-s3cret",
    "operators-s3cret",
    "job-token",
    "gitlab-ci-token",
];

/// A job with secrets in all places where jobs have some.
fn unit(image: &str) -> Job {
    Job::new("unit")
        .image(image)
        .masked_variable("PASSWORD", SECRETS[0])
        .variable("PLAIN", SECRETS[1])
        .registry_credential("registry.example.com", "u", SECRETS[2])
}

/// How far the job of this number is.
fn state(host: &Host, id: u64) -> Option<String> {
    let jobs = fs::read_dir(host.state().join("jobs")).ok()?;
    let of_job = format!("-{id}-");
    jobs.flatten()
        .filter(|job| {
            job.file_name()
                .to_str()
                .is_some_and(|name| !name.starts_with('.') && name.contains(&of_job))
        })
        .find_map(|job| {
            let record: Value =
                serde_json::from_slice(&fs::read(job.path().join("record.json")).ok()?).ok()?;
            Some(record["state"].as_str()?.to_owned())
        })
}

/// Starts prepare, and returns it once the guest boots.
fn booting(host: &Host, stages: &Stages<'_>, id: u64) -> Child {
    let child = stages.command(&["prepare"]).spawn().unwrap();
    until("the guest boots", SOON, || {
        state(host, id).as_deref() == Some("booting")
    });
    child
}

fn killed(mut child: Child) {
    child.kill().unwrap();
    ended(child, Instant::now());
}

fn show(host: &Host, job: &str) -> String {
    host.expect(&["job", "show", job])
}

fn list(host: &Host, options: &[&str]) -> Vec<Value> {
    let arguments = [&["job", "list", "--format", "json"], options].concat();
    serde_json::from_str(&host.expect(&arguments)).unwrap()
}

/// All files below a folder.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(files(&path));
        } else {
            all.push(path);
        }
    }
    all
}

/// Nothing secret stands in any file of the history, nor a private key.
fn nothing_secret_is_remembered(host: &Host) {
    let files = files(&host.state().join("history"));
    assert!(files.len() > 4, "{files:?}");
    for path in files {
        let text = String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned();
        for secret in SECRETS.iter().chain(&["PRIVATE KEY"]) {
            assert!(
                !text.contains(secret),
                "{secret} is in {}:\n{text}",
                path.display()
            );
        }
    }
}

fn succeeds(host: &Host, image: &str) {
    let job = Stages::of(host, &unit(image), 1);
    job.prepare().ok();
    let page = show(host, "1");
    assert!(page.starts_with("Ready since "), "{page}");
    job.run("prepare_script", "true\n").ok();
    // More than is kept, with an end that is known.
    job.script("head -c 71680 /dev/zero | tr '\\0' x >/dev/console; printf '\\n\\033[2Jthe end\\n' >/dev/console; sleep 1\n")
        .ok();
    job.run("after_script", "exit 9\n").failed_script(9, &job);
    job.cleanup().ok();
}

fn fails(host: &Host, image: &str) {
    let job = Stages::of(host, &unit(image), 2);
    job.prepare().ok();
    job.run("get_sources", "exit 1\n").failed_script(1, &job);
    job.run("get_sources", "true\n").ok();
    let script = job.start("sleep 4; exit 3\n");
    until("the script runs", SOON, || {
        show(host, "2").starts_with("Running step_script since ")
    });
    ended(script, Instant::now()).failed_script(3, &job);
    let page = show(host, "2");
    assert!(
        page.starts_with("Failed: the script ended with exit code 3 in step_script.\nReady since "),
        "{page}"
    );
    job.run("after_script", "true\n").ok();
    job.cleanup().ok();
}

fn loses_its_machine(host: &Host, image: &str) {
    let job = Stages::of(host, &unit(image), 3);
    job.prepare().ok();
    let script = job.start("sleep 1000\n");
    until("the script runs", SOON, || {
        state(host, 3).as_deref() == Some("running")
    });
    let machines = host.machines();
    let machine = machines.iter().find(|name| name.ends_with("-3-1")).unwrap();
    let destroyed = Command::new("virsh")
        .args(["-q", "-c", "qemu:///system", "destroy", machine])
        .output()
        .unwrap();
    assert!(destroyed.status.success(), "{destroyed:?}");
    ended(script, Instant::now()).failed(SYSTEM_FAILURE, &["machine"]);
    job.cleanup().ok();
}

fn is_cancelled(host: &Host, image: &str) {
    let job = Stages::of(host, &unit(image), 7);
    job.prepare().ok();
    let mut script = job.start("echo begun; sleep 1000\n");
    let mut begun = [0; 6];
    script.stdout.as_mut().unwrap().read_exact(&mut begun).unwrap();
    let told = Command::new("kill")
        .args(["-TERM", &script.id().to_string()])
        .status()
        .unwrap();
    assert!(told.success());
    ended(script, Instant::now()).failed(SYSTEM_FAILURE, &["cancelled"]);
    job.run("after_script", "true\n").ok();
    job.cleanup().ok();
}

fn host() -> Host {
    Host::new(
        &[],
        &format!("{EMULATION}[guest]\npassword = \"{}\"\n", SECRETS[3]),
    )
}

/// An image that this runner does not allow.
const FORBIDDEN: &str = "forbidden.example.com/x:1";

/// The first line of each job's page.
#[track_caller]
fn answers(host: &Host, expected: &[(&str, &str)]) {
    println!("{}", host.expect(&["job", "list"]));
    for (job, answer) in expected {
        let page = show(host, job);
        let first = page.lines().next().unwrap();
        println!("{job:>3}  {first}");
        assert!(first.starts_with(answer), "{job}: {page}");
    }
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn each_job_that_is_over_says_why_in_its_first_line_and_keeps_no_secret() {
    let host = host().with_network();
    let image = host.images().add_tiny("tiny", "");
    std::thread::scope(|scope| {
        scope.spawn(|| succeeds(&host, &image));
        scope.spawn(|| fails(&host, &image));
        scope.spawn(|| loses_its_machine(&host, &image));
        scope.spawn(|| is_cancelled(&host, &image));
        scope.spawn(|| {
            // Killed, and its runner comes back or does not; and removed by hand.
            let stages = Stages::of(&host, &unit(&image), 4);
            killed(booting(&host, &stages, 4));
            stages.cleanup().ok();
            let stages = Stages::of(&host, &unit(&image), 5);
            killed(booting(&host, &stages, 5));
            assert!(show(&host, "5").starts_with("Preparing: booting since "));
            fs::remove_file(stages.file("response.json")).unwrap();
            host.expect(&["reap"]);
            let stages = Stages::of(&host, &unit(&image), 6);
            let prepare = booting(&host, &stages, 6);
            host.expect(&["vm", "rm", "6"]);
            ended(prepare, Instant::now()).failed(SYSTEM_FAILURE, &["ERROR: "]);
            stages.cleanup().ok();
        });
    });
    assert_eq!(host.leftovers(), Vec::<String>::new());
    let expected = [
        ("1", "Succeeded in "),
        ("2", "Failed: the script ended with exit code 3 in step_script."),
        ("3", "Failed, the system's fault: "),
        (
            "4",
            "Killed: prepare was ended from outside while the job was booting",
        ),
        (
            "5",
            "Abandoned while it was booting, in a call that was killed or hung: gitlab-runner ended it without cleaning up.",
        ),
        ("6", "Removed by an operator while it was booting."),
        ("7", "Cancelled in step_script: "),
    ];
    answers(&host, &expected);
    println!("\n{}", show(&host, "2"));
    println!("{}", show(&host, "3"));
    nothing_secret_is_remembered(&host);
    the_story_of_a_success_is_whole(&host, &image);
}

fn the_story_of_a_success_is_whole(host: &Host, image: &str) {
    let text = host.expect(&["job", "show", "1", "--format", "json", "--serial"]);
    let job: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(job["outcome"], json!({"kind": "succeeded"}));
    assert_eq!(
        (&job["image"], &job["failed"], &job["live"]),
        (&json!(image), &json!(false), &Value::Null)
    );
    assert!(job["digest"].as_str().unwrap().starts_with("sha256:"));
    let told: Vec<(&str, &Value)> = job["stages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|stage| (stage["name"].as_str().unwrap(), &stage["ending"]["how"]))
        .collect();
    let (ok, script) = (json!("succeeded"), json!("script"));
    assert_eq!(
        told,
        [
            ("prepare", &ok),
            ("prepare_script", &ok),
            ("step_script", &ok),
            ("after_script", &script)
        ]
    );
    let phases: Vec<&str> = job["phases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["name"].as_str().unwrap())
        .collect();
    assert_eq!(phases, ["image", "overlay", "start", "boot", "ssh", "ready"]);
    let key = job["key"].as_str().unwrap();
    let kept = fs::read(host.state().join("history").join(key).join("serial.log")).unwrap();
    assert_eq!(kept.len(), SERIAL_BYTES);
    // As the guest wrote it, and shown so that it moves no cursor.
    assert!(String::from_utf8_lossy(&kept).contains("\x1b[2Jthe end"));
    let shown = job["serial_log"].as_str().unwrap();
    assert!(shown.lines().any(|line| line == "the end"), "{shown}");
    assert!(!shown.contains('\x1b'), "{shown}");
    assert!(show(host, "1").contains("\n  | the end\n"));
    let none = host.expect(&["job", "show", "1", "--serial-lines", "0"]);
    assert!(!none.contains("serial log"), "{none}");
}

/// A registry on a port that nobody listens on.
const DOWN: &str = "127.0.0.1:9/vm/none:1";

#[test]
#[ignore = "needs libvirt and a guest"]
fn what_a_runner_had_done_is_told_in_its_own_words() {
    let port = port();
    let host = Host::new(&[port], EMULATION).with_network();
    let image = host.images().add_tiny("tiny", "");
    let text = host.settings_text().replacen(
        "[images]\n",
        "[images]\nallow = [\"127.0.0.1:9/**\"]\nplain_http = [\"127.0.0.1:9\"]\n",
        1,
    );
    host.write_settings(&text);
    let scene = Scene::new(host, port, 2);
    let fails = Job::new("fails")
        .image(&image)
        .script(["exit 3"])
        .after_script(["exit 4"]);
    let (fails, down) = (
        scene.coordinator.enqueue(&fails),
        scene
            .coordinator
            .enqueue(&Job::new("registry down").image(DOWN).script(["true"])),
    );
    assert_eq!(fails.wait(SOON).exit_code, Some(3));
    assert_eq!(down.wait(SOON).failure_reason, "runner_system_failure");
    scene.is_clean_soon();
    let page = show(&scene.host, &fails.id().to_string());
    println!("{}\n{page}", scene.host.expect(&["job", "list"]));
    // gitlab-runner has called it by both names.
    let first = page.lines().next().unwrap();
    let script = ["step_script", "build_script"]
        .map(|name| format!("Failed: the script ended with exit code 3 in {name}."));
    assert!(script.iter().any(|line| line == first), "{page}");
    assert!(page.contains("\nafter_script "), "{page}");
    // The runner tries three times, and each is remembered.
    let tries: Vec<(u64, bool)> = list(&scene.host, &["--failed"])
        .iter()
        .filter(|job| job["job"] == down.id())
        .map(|job| {
            let answer = job["answer"].as_str().unwrap();
            let attempt = job["attempt"].as_u64().unwrap();
            (attempt, answer.starts_with("Failed, the system's fault: "))
        })
        .collect();
    assert_eq!(tries, [(3, true), (2, true), (1, true)]);
}

#[test]
#[ignore = "needs libvirt"]
fn jobs_that_came_to_have_no_machine_are_found_and_keep_no_secret_either() {
    let host = host();
    let image = host.images().add_tiny("tiny", "");
    let missing = image.replace(":tiny", ":tyni");
    assert_eq!(host.expect(&["job", "list"]).lines().count(), 1);
    let fails = |job: &Job, id: u64, part: &str| {
        let stages = Stages::of(&host, job, id);
        stages.prepare().failed(BUILD_FAILURE, &[part]);
        stages.cleans_up();
    };
    // An image that is not allowed, one that is not there, and a wish that is a secret, which is tried twice.
    fails(&unit(FORBIDDEN), 10, "not allowed");
    fails(&unit(&missing), 12, "tyni");
    for _ in 0..2 {
        fails(
            &unit(&image).variable("CANNERY_MEMORY", SECRETS[0]),
            11,
            "CANNERY_MEMORY=",
        );
    }
    let expected = [
        (
            "10",
            "Failed, the job's fault: the image forbidden.example.com/x:1 is not allowed on this runner.",
        ),
        (
            "11",
            "Failed, the job's fault: CANNERY_MEMORY=[MASKED]: it must be a size such as \"4G\" or \"512M\".",
        ),
        ("12", "Failed, the job's fault: "),
    ];
    answers(&host, &expected);
    println!("\n{}", show(&host, "10"));
    nothing_secret_is_remembered(&host);
    lists_choose_and_names_find(&host);
    a_history_that_cannot_be_written_fails_no_job(&host, &missing);
}

fn lists_choose_and_names_find(host: &Host) {
    let all = list(host, &[]);
    let ids: Vec<u64> = all.iter().map(|job| job["job"].as_u64().unwrap()).collect();
    assert_eq!(ids, [11, 11, 12, 10], "the newest first");
    assert_eq!((&all[0]["attempt"], &all[1]["attempt"]), (&json!(2), &json!(1)));
    assert_eq!(list(host, &["-n", "2"]).len(), 2);
    assert_eq!(list(host, &["--failed"]).len(), 4);
    let table = host.expect(&["job", "ls", "-n", "1"]);
    let heading: Vec<&str> = table.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(
        heading,
        ["JOB", "PROJECT", "NAME", "IMAGE", "OUTCOME", "STARTED", "TOOK"]
    );

    let key = all[1]["key"].as_str().unwrap();
    assert!(key.ends_with("-11-1"), "{key}");
    assert!(show(host, key).contains(key));
    // Without the try's number the last one is meant.
    assert!(show(host, key.strip_suffix("-1").unwrap()).contains("-11-2"));
    let unknown = host.cannery(&["job", "show", "4711"]);
    assert_eq!((unknown.status.code(), unknown.stdout.len()), (Some(1), 0));
    let said = String::from_utf8(unknown.stderr).unwrap();
    assert!(
        said.contains("No job \"4711\" is here") && said.contains("job list"),
        "{said}"
    );

    // The operator wants nothing remembered.
    let text = host.settings_text();
    host.write_settings(&format!("{text}[history]\nkeep = 0\n"));
    host.expect(&["reap"]);
    assert_eq!(list(host, &[]).len(), 0);
    host.write_settings(&text);
}

/// Nor does one that cannot be read hide the jobs that are here.
fn a_history_that_cannot_be_written_fails_no_job(host: &Host, missing: &str) {
    let place = host.state().join("history");
    fs::remove_dir_all(&place).unwrap();
    fs::write(&place, "no folder").unwrap();
    let forbidden = Stages::of(host, &unit(FORBIDDEN), 20);
    forbidden.prepare().failed(BUILD_FAILURE, &["not allowed"]);
    forbidden.cleans_up();
    let job = Stages::of(host, &unit(missing), 21);
    job.prepare().failed(BUILD_FAILURE, &["tyni"]);
    assert!(show(host, "21").starts_with("Failed, the job's fault: "));
    job.cleans_up();
    let log = fs::read_to_string(host.folder().join("cannery.log")).unwrap();
    assert!(!SECRETS.iter().any(|secret| log.contains(secret)), "{log}");
    assert!(
        log.contains("the job is not remembered") && log.contains("the failure is not noted"),
        "{log}"
    );
    fs::remove_file(&place).unwrap();
    let job = Stages::of(host, &unit(missing), 21);
    job.prepare().failed(BUILD_FAILURE, &["tyni"]);
    assert!(show(host, "21").starts_with("Failed, the job's fault: "));
    job.cleans_up();
    assert!(show(host, "21").starts_with("Failed, the job's fault: "));
}
