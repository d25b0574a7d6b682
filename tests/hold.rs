//! A look at a machine: while its job runs, and after the job failed.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::os::unix::fs::MetadataExt;
use std::process::Command;

use std::time::Duration;

use cannery::kill::Point;
use support::host::{EMULATION, Host, virsh};
use support::job::Job;
use support::kills::killed;
use support::stages::{BUILD_FAILURE, SYSTEM_FAILURE, Stages};
use support::until;

/// The state folder's name of the only job.
fn only_job(host: &Host) -> String {
    let list: serde_json::Value =
        serde_json::from_str(&host.expect(&["vm", "list", "--format", "json"])).unwrap();
    let jobs = list.as_array().unwrap();
    assert_eq!(jobs.len(), 1, "{list}");
    jobs[0]["key"].as_str().unwrap().to_owned()
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn an_operator_enters_a_machine_and_sees_its_screen() {
    let host = Host::new(&[], EMULATION);
    let image = host.images().add_tiny("tiny", "");
    let job = Stages::of(&host, &Job::new("unit").image(&image), 7);
    job.prepare().ok();
    let key = only_job(&host);

    let ssh = |command: &[&str]| {
        let mut arguments = vec!["vm", "ssh", "7", "--"];
        arguments.extend(command);
        host.cannery(&arguments)
    };
    let entered = ssh(&["hostname; id -un"]);
    assert_eq!(
        String::from_utf8_lossy(&entered.stdout),
        "job-7\nroot\n",
        "{entered:?}"
    );
    assert_eq!(entered.status.code(), Some(0));
    // Nothing was learned on the way: the guest was known before.
    assert_eq!(String::from_utf8_lossy(&entered.stderr), "");
    assert_eq!(ssh(&["exit 7"]).status.code(), Some(7));

    // A guest that is another's is not entered.
    let record = host.state().join("jobs").join(&key).join("record.json");
    let truth = std::fs::read_to_string(&record).unwrap();
    let mut forged: serde_json::Value = serde_json::from_str(&truth).unwrap();
    forged["guest"]["host_key"] =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA".into();
    std::fs::write(&record, forged.to_string()).unwrap();
    let refused = ssh(&["true"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(255), "{said}");
    assert!(said.contains("Host key verification failed"), "{said}");
    std::fs::write(&record, truth).unwrap();

    let picture = host.folder().join("screen.png");
    host.expect(&["vm", "screenshot", "7", "-o", picture.to_str().unwrap()]);
    assert!(std::fs::read(&picture).unwrap().starts_with(b"\x89PNG\r\n\x1a\n"));
    // One of the group sees the job, and is told who may enter it.
    let unlogged = host.folder().join("unlogged.toml");
    let text = host.settings_text();
    let lines = text.lines().filter(|line| !line.starts_with("log_"));
    std::fs::write(&unlogged, lines.collect::<Vec<_>>().join("\n")).unwrap();
    let group = std::fs::metadata(host.state()).unwrap().gid();
    let nobody = Command::new("setpriv")
        .args(["--reuid=65534", "--clear-groups", &format!("--regid={group}")])
        .arg(host.program_for_all())
        .args(["--config", unlogged.to_str().unwrap(), "vm", "ssh", "7"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&nobody.stderr).into_owned();
    assert!(said.contains("sudo cannery vm ssh"), "{said}");
    job.cleans_up();
}

/// What a command says in the guest of a job.
fn in_guest(host: &Host, job: &str, command: &str) -> String {
    host.expect(&["vm", "ssh", job, "--", command])
}

/// One machine at a time, for which nobody waits.
const ONE: &str = "[host]\nmax_machines = 1\nwait = \"0s\"\n[hold]\nmax = \"1h\"\n";

#[test]
#[ignore = "needs libvirt and a guest"]
fn a_failed_jobs_machine_stays_for_a_look_and_makes_room_for_its_next_try() {
    let host = Host::new(&[], &format!("{EMULATION}{ONE}"));
    let text = host.settings_text();
    host.write_settings(&format!("report_dir = \".cannery\"\n{text}"));
    let image = host.images().add_tiny("tiny", "");
    let unit = Job::new("unit").image(&image).variable("CANNERY_HOLD", "30m");

    // More than the operator allows is refused before anything is done.
    let greedy = Job::new("unit").image(&image).variable("CANNERY_HOLD", "2h");
    let greedy = Stages::of(&host, &greedy, 30);
    greedy
        .prepare()
        .failed(BUILD_FAILURE, &["CANNERY_HOLD=2h", "at most 1h"]);
    greedy.cleans_up();

    let first = Stages::of(&host, &unit, 31).variable("CUSTOM_ENV_CI_PROJECT_DIR", "/tmp/project");
    first.prepare().ok();
    let key = only_job(&host);
    let failed = first.script("touch /tmp/evidence; exit 3\n");
    assert!(failed.log.contains("stays until"), "{}", failed.log);
    let way_in = format!("cannery vm ssh {key}");
    assert!(failed.log.contains(&way_in), "{}", failed.log);
    let report = "the screen are in /tmp/project/.cannery";
    assert!(failed.log.contains(report), "{}", failed.log);
    failed.failed_script(3, &first);
    first.run("after_script", "test -e /tmp/evidence\n").ok();

    // A cleanup that is killed when it has just decided, and one that comes again.
    killed(&mut first.command(&["cleanup"]), Point::SavedHeld, 1);
    let cleaned = first.cleanup().ok();
    assert!(cleaned.log.contains(&way_in), "{}", cleaned.log);
    assert_eq!(host.machines().len(), 1);
    assert!(host.expect(&["vm", "list"]).contains("held until"));
    let shown = host.expect(&["job", "show", "31"]);
    let answer = "Failed: the script ended with exit code 3 in step_script.\nIts machine is held until ";
    assert!(shown.starts_with(answer), "{shown}");
    host.expect(&["vm", "ssh", "31", "--", "test -e /tmp/evidence"]);
    // What the guest was given to keep, and what its job keeps of it.
    let kept = in_guest(&host, "31", "cat /tmp/project/.cannery/serial.log");
    assert!(kept.contains("tiny: ready"), "{kept}");
    let head = in_guest(
        &host,
        "31",
        "head -c 8 /tmp/project/.cannery/screen.png | od -An -tx1",
    );
    assert_eq!(head.trim(), "89 50 4e 47 0d 0a 1a 0a");
    assert!(shown.contains("/screen.png\n"), "{shown}");
    // Nothing may be run for the job any more, and nobody else takes its machine.
    first.script("true\n").failed(SYSTEM_FAILURE, &["cleaned up"]);
    assert_eq!(host.expect(&["reap"]), "Nothing to remove.\n");
    assert_eq!(host.machines().len(), 1);

    // Another job is told what takes the place.
    let other = Stages::of(&host, &Job::new("unit").image(&image), 32);
    let release = format!("`cannery vm release {key}` frees its place");
    other
        .prepare()
        .failed(SYSTEM_FAILURE, &["All 1 machines", "is held until", &release]);
    other.cleanup().ok();

    // The next try of the same job has the place.
    let second = Stages::of(&host, &unit, 31);
    let log = second.prepare().ok().log;
    assert!(log.contains("makes room"), "{log}");
    assert_eq!(host.machines().len(), 1);
    second.script("true\n").ok();
    // One that succeeds is not held unless an operator wants it.
    host.expect(&["vm", "hold", "31", "--for", "1h"]);
    assert!(host.expect(&["vm", "list"]).contains(", held until"));
    second.cleanup().ok();
    let shown = host.expect(&["job", "show", "31"]);
    assert!(shown.starts_with("Succeeded"), "{shown}");
    assert!(shown.contains("Its machine is held until"), "{shown}");
    // The lease ends.
    host.expect(&["vm", "hold", "31", "--for", "1s"]);
    until("the machine may go", Duration::from_secs(20), || {
        host.expect(&["reap"]);
        host.machines().is_empty()
    });
    second.cleans_up();
    let list = host.expect(&["job", "list"]);
    assert!(
        list.contains("exit code 3") && list.contains("succeeded"),
        "{list}"
    );
    assert!(!list.contains("abandoned"), "{list}");
    // The picture went into the history with the first try.
    let picture = host.state().join("history").join(&key).join("screen.png");
    assert!(std::fs::read(&picture).unwrap().starts_with(b"\x89PNG\r\n\x1a\n"));
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn a_held_machine_goes_when_it_is_released_or_ends_and_one_that_was_cancelled_is_not_held() {
    let host = Host::new(&[], &format!("{EMULATION}[hold]\non_failure = \"20m\"\n"));
    let image = host.images().add_tiny("tiny", "");
    let unit = Job::new("unit").image(&image);
    let unheld = Job::new("unit").image(&image).variable("CANNERY_HOLD", "0");
    let [released, ended, cancelled] = [41, 42, 43].map(|id| Stages::of(&host, &unit, id));
    let declined = Stages::of(&host, &unheld, 44);
    std::thread::scope(|scope| {
        for job in [&released, &ended, &cancelled, &declined] {
            scope.spawn(|| job.prepare().ok());
        }
    });
    // A call that is killed when it has just kept the picture: the machine stays all the same.
    killed(
        &mut ended.run_command("step_script", "exit 5\n"),
        Point::ScreenKept,
        1,
    );
    for job in [&released, &cancelled] {
        assert!(job.script("exit 5\n").log.contains("stays until"));
    }
    let log = declined.script("exit 5\n").log;
    assert!(!log.contains("stays until"), "{log}");
    // The runner cancels the job after its script had failed.
    let cancelled = cancelled.variable("CUSTOM_ENV_CI_JOB_STATUS", "canceled");
    cancelled.run("after_script", "true\n").ok();
    for job in [&released, &ended, &cancelled, &declined] {
        job.cleanup().ok();
    }
    let held = host.machines();
    assert_eq!(held.len(), 2, "{held:?}");
    let not_held = host.cannery(&["vm", "release", "43"]);
    assert!(!not_held.status.success());

    host.expect(&["vm", "release", "41"]);
    assert_eq!(host.machines().len(), 1);
    let last = &host.machines()[0];
    virsh(&["destroy", last]);
    let reaped = host.expect(&["reap"]);
    assert!(reaped.contains("its machine was held and has ended"), "{reaped}");
    ended.cleans_up();
    let list = host.expect(&["job", "list"]);
    assert_eq!(list.matches("exit code 5").count(), 4, "{list}");
}
