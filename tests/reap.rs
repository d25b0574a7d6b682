//! The reaper takes what no runner comes back for, and a job that has one goes on whatever is killed, reaped or replaced beside it.

#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(clippy::print_stdout, reason = "what was reaped is shown")]

mod support;

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cannery::kill::Point;
use support::host::{EMULATION, Host, cannery};
use support::kills::{KILLED, LOOK, STUBBORN, at_death, begun, boots, killed, mortal, processes, signal};
use support::stages::{Stages, ended};
use support::until;

/// How often it is reaped beside a job: no stage is so short that it passes between two.
const REAP_EVERY: Duration = Duration::from_millis(200);

/// Changes a job's record behind the program's back.
fn doctor(host: &Host, change: impl Fn(&mut serde_json::Value)) {
    let jobs = fs::read_dir(host.state().join("jobs")).unwrap();
    for job in jobs {
        let path = job.unwrap().path().join("record.json");
        let mut record = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut record);
        fs::write(&path, record.to_string()).unwrap();
    }
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn what_no_runner_comes_back_for_is_taken_and_what_one_may_is_left() {
    let host = Host::one_of_several(0, EMULATION);
    let image = host.images().add_tiny("tiny", "");
    type Change = fn(&mut serde_json::Value);
    let cases: [(&str, Change); 2] = [
        ("the host was rebooted", |record| {
            record["caller"]["boot_id"] = "another".into();
        }),
        ("its time-out has passed by an hour", |record| {
            record["deadline"] = "2020-01-01T00:00:00Z".into();
        }),
    ];
    for (why, change) in cases {
        let stages = Stages::new(&host, &image);
        boots(&stages);
        assert_eq!(host.expect(&["reap"]), "Nothing to remove.\n");
        doctor(&host, change);
        let said = host.expect(&["reap"]);
        println!("{}", said.trim_end());
        assert!(said.contains(why), "{said}");
        stages.nothing_is_left();
    }
    // One whose runner is gone goes with another job's prepare, and one whose runner is there stays.
    let living = Stages::new(&host, &image);
    boots(&living);
    let kept = host.leftovers();
    let orphan = Stages::new(&host, &image);
    killed(&mut mortal(&host, &orphan, &["prepare"]), Point::SavedBooting, 1);
    assert_eq!(host.leftovers().len(), 2 * kept.len());
    let next = Stages::new(&host, &image);
    killed(&mut next.command(&["prepare"]), Point::JobBegun, 1);
    next.cleanup().ok();
    assert_eq!(host.leftovers(), kept);
    // A reaper that does not see the runner's files, as in a unit with a /tmp of its own.
    let reap = host.command(&["reap"]);
    let mut elsewhere = Command::new("unshare");
    elsewhere.args([
        "--mount",
        "sh",
        "-ec",
        "mount -t tmpfs none \"$1\"; shift; exec \"$@\"",
        "-",
    ]);
    elsewhere.arg(living.file("response.json").parent().unwrap());
    elsewhere.arg(reap.get_program()).args(reap.get_args());
    let said = elsewhere.output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&said.stdout),
        "Nothing to remove.\n",
        "{said:?}"
    );
    assert_eq!(host.leftovers(), kept);
    fs::remove_file(living.file("response.json")).unwrap();
    let said = host.expect(&["reap", "--dry-run"]);
    assert!(
        said.contains("gitlab-runner ended it without cleaning up"),
        "{said}"
    );
    assert_eq!(host.leftovers(), kept);
    host.expect(&["reap"]);
    living.nothing_is_left();
}

/// Reaps until it is told to stop; returns what was removed.
fn reaping<T>(host: &Host, meanwhile: impl FnOnce() -> T) -> (String, T) {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let reaper = scope.spawn(|| {
            let mut removed = String::new();
            while !over.load(Ordering::Relaxed) {
                removed += &host.expect(&["reap"]).replace("Nothing to remove.\n", "");
                thread::sleep(REAP_EVERY);
            }
            removed
        });
        // Also where this panics the reaper ends.
        let done = catch_unwind(AssertUnwindSafe(meanwhile));
        over.store(true, Ordering::Relaxed);
        let removed = reaper.join().unwrap();
        (removed, done.unwrap_or_else(|panic| resume_unwind(panic)))
    })
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn a_job_goes_on_while_others_are_reaped_and_the_program_is_replaced_and_its_script_is_killed() {
    let host = Host::one_of_several(1, &format!("{EMULATION}[guest]\ncancel_grace = \"2s\"\n"));
    let image = host.images().add_tiny("tiny", "");
    let program = host.program_for_all();
    let mut versions = 0;
    // A package manager puts the new file in the old one's place.
    let mut replace = || {
        versions += 1;
        let new = program.with_extension(versions.to_string());
        fs::copy(cannery(), &new).unwrap();
        let mut file = fs::OpenOptions::new().append(true).open(&new).unwrap();
        file.write_all(format!("version {versions}").as_bytes()).unwrap();
        drop(file);
        fs::rename(&new, &program).unwrap();
    };
    let stages = Stages::new(&host, &image)
        .with_program(&program)
        // What the job's author says kills nobody.
        .variable("CUSTOM_ENV_CANNERY_KILL_AT", Point::SavedRunning.name());
    let (removed, ()) = reaping(&host, || {
        stages.config().ok();
        replace();
        let preparing = stages.command(&["prepare"]).spawn().unwrap();
        until("the machine is there", Duration::from_secs(30), || {
            !host.machines().is_empty()
        });
        replace();
        ended(preparing, Instant::now()).ok();
        replace();
        let mut running = stages.start("echo begun\nsleep 2\necho still here\nexit 7\n");
        begun(&mut running);
        replace();
        let call = ended(running, Instant::now()).failed_script(7, &stages);
        assert_eq!(call.text(), "still here\n");
        replace();

        // What gitlab-runner does with a cancelled job whose script takes too long to end.
        let mut stubborn = stages.start(STUBBORN);
        begun(&mut stubborn);
        signal("TERM", &stubborn);
        thread::sleep(Duration::from_millis(500));
        signal("KILL", &stubborn);
        assert_eq!(ended(stubborn, Instant::now()).code, KILLED);
        let after = stages.run("after_script", LOOK).ok();
        assert_eq!(after.text(), "again\n");
        println!("{}", after.log.trim_end());
        assert!(
            after
                .log
                .contains("step_script was still running though its call was gone"),
            "{}",
            after.log
        );
        // Which is told once.
        assert_eq!(stages.run("archive_cache", LOOK).ok().log, "");
    });
    assert_eq!(removed, "");
    stages.cleans_up();
}

#[test]
#[ignore = "needs libvirt"]
fn a_credential_helper_ends_with_the_call_that_asked_it() {
    let host = Host::one_of_several(0, EMULATION);
    let at = |name: &str| host.folder().join(name);
    let logins = r#"{"credHelpers": {"registry.example.com": "slow"}}"#;
    fs::write(at("auth.json"), logins).unwrap();
    fs::write(at("docker-credential-slow"), "#!/bin/sh\nexec sleep 1000\n").unwrap();
    fs::set_permissions(at("docker-credential-slow"), fs::Permissions::from_mode(0o755)).unwrap();
    let images = format!(
        "[images]\nauth_files = [\"{}\"]\nhost_credentials = [\"**\"]\nallow = [\"**\"]\n",
        at("auth.json").display()
    );
    host.write_settings(&host.settings_text().replace("[images]\n", &images));
    let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", host.folder().display());
    let stages = Stages::new(&host, "registry.example.com/vm/debian:12").variable("PATH", path);
    let mut prepare = stages.command(&["prepare"]).spawn().unwrap();
    let asked = || processes(&host, &stages).contains("sleep");
    let begin = Instant::now();
    while !asked() && prepare.try_wait().unwrap().is_none() {
        assert!(
            begin.elapsed() < Duration::from_secs(10),
            "the helper was not asked"
        );
    }
    prepare.kill().unwrap();
    let call = ended(prepare, begin);
    assert_eq!(call.code, KILLED, "{}", call.log);
    println!("left at death: {:?}", at_death(&host, &stages));
    stages.cleans_up();
}
