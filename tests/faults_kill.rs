//! A kill at any point of a job leaves a host that the next call makes clean.

#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(clippy::print_stdout, reason = "what is shown is the table of faults")]

mod support;

use std::fs;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use support::host::Host;
use support::stages::{Call, Stages, ended};

/// Longer than any state of a tiny guest lasts.
const DEADLINE: Duration = Duration::from_secs(60);

/// Who comes after the kill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    /// The runner, which is still there.
    Cleanup,
    /// The reaper, since the runner is not: its folder is gone.
    Reap,
    /// The runner, which tries again.
    Prepare,
}

/// The state of the only job.
fn state(host: &Host) -> Option<String> {
    let jobs = fs::read_dir(host.state().join("jobs")).ok()?;
    jobs.flatten()
        .filter(|job| !job.file_name().as_encoded_bytes().starts_with(b"."))
        .find_map(|job| {
            let text = fs::read(job.path().join("record.json")).ok()?;
            let record: serde_json::Value = serde_json::from_slice(&text).ok()?;
            Some(record["state"].as_str()?.to_owned())
        })
}

fn signal(name: &str, child: &Child) {
    let status = Command::new("kill")
        .arg(format!("-{name}"))
        .arg(child.id().to_string())
        .status()
        .unwrap();
    assert!(status.success());
}

/// Kills a call as soon as its job is in this state; returns the state in which it died.
fn kill_in(host: &Host, mut child: Child, wanted: &str) -> String {
    let begin = Instant::now();
    while state(host).as_deref() != Some(wanted) {
        let status = child.try_wait().unwrap();
        if status.is_some() || begin.elapsed() > DEADLINE {
            drop(child.kill());
            let Call { code, log, .. } = ended(child, begin);
            panic!("the job was never seen {wanted}: exit code {code}\n{log}");
        }
    }
    // Stopped first, so that what is read is what it died in.
    signal("STOP", &child);
    let died_in = state(host).unwrap_or_else(|| "gone".to_owned());
    signal("KILL", &child);
    ended(child, begin);
    died_in
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn a_kill_at_any_point_leaves_nothing_after_the_next_call() {
    let host = Host::new(&[], "[machine]\naccelerator = \"emulation\"").with_network();
    let cached = host.images().add_tiny("cached", "");
    let mut table = vec!["kill wanted in → died in      then      left before → after".to_owned()];
    let mut row = |wanted: &str, died_in: &str, after: After, stages: Stages<'_>| {
        let mut before = host.leftovers();
        before.extend(host.downloads().iter().map(|path| path.display().to_string()));
        match after {
            After::Cleanup => {
                stages.cleanup().ok();
            }
            After::Reap => {
                fs::remove_file(stages.file("response.json")).unwrap();
                host.expect(&["reap"]);
            }
            After::Prepare => {
                stages.prepare().ok();
                assert_eq!(stages.script("echo again").ok().text(), "again\n");
                stages.cleanup().ok();
            }
        }
        let left = host.leftovers().len() + host.downloads().len();
        let line = format!(
            "{wanted:>14} → {died_in:<12} {:<9} {:>4} → {left}",
            format!("{after:?}"),
            before.len()
        );
        println!("{line}");
        table.push(line);
        stages.nothing_is_left();
        // And once more, with nothing there.
        stages.cleanup().ok();
    };
    // Each try of a download needs an image that is not here yet.
    for after in [After::Cleanup, After::Reap, After::Prepare] {
        let image = host
            .images()
            .add_tiny(&format!("fresh-{after:?}"), &format!("fresh={after:?}"));
        let stages = Stages::new(&host, &image);
        let child = stages.command(&["prepare"]).spawn().unwrap();
        let died_in = kill_in(&host, child, "fetching");
        row("fetching", &died_in, after, stages);
    }
    for wanted in ["admitted", "cloning", "starting", "booting"] {
        for after in [After::Cleanup, After::Reap] {
            let stages = Stages::new(&host, &cached);
            let child = stages.command(&["prepare"]).spawn().unwrap();
            let died_in = kill_in(&host, child, wanted);
            row(wanted, &died_in, after, stages);
        }
    }
    let stages = Stages::new(&host, &cached);
    let died_in = kill_in(&host, stages.command(&["prepare"]).spawn().unwrap(), "booting");
    row("booting", &died_in, After::Prepare, stages);

    for after in [After::Cleanup, After::Reap] {
        let stages = Stages::new(&host, &cached);
        stages.prepare().ok();
        let died_in = kill_in(&host, stages.start("sleep 1000"), "running");
        row("running", &died_in, after, stages);
    }
    for after in [After::Cleanup, After::Reap] {
        let stages = Stages::new(&host, &cached);
        stages.prepare().ok();
        let cleanup = stages.command(&["cleanup"]).spawn().unwrap();
        let died_in = kill_in(&host, cleanup, "cleaning");
        row("cleaning", &died_in, after, stages);
    }
    println!("{}", table.join("\n"));
}
