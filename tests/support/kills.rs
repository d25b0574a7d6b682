//! Calls that are killed, and what they leave behind.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use cannery::kill::Point;

use super::host::{Host, cannery};
use super::stages::{Call, Stages, ended};
use super::until;

/// How a process that was killed shows.
pub const KILLED: i32 = 128 + 9;
/// The variable that arms a call.
pub const KILL_AT: &str = "CANNERY_KILL_AT";
/// What a program that was started by a killed call may take to be gone.
pub const CHILDREN_END: Duration = Duration::from_secs(2);

/// A runner of its own for one call, which is gone when the call is. Like gitlab-runner it gives the call a process group.
pub const MORTAL_RUNNER: &str = "set -m; \"$@\" & wait $!; exit $?";

/// What there is of jobs on this host, in a word each: empty when all is as before the first job.
pub fn left(host: &Host) -> BTreeSet<String> {
    let mut left = BTreeSet::new();
    let state = host.state();
    let mut folders = vec![state.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten() {
            // Removed meanwhile, where another call is at work.
            let Ok(entry) = entry else { continue };
            let path = entry.path();
            let name = entry.file_name().into_string().unwrap();
            let below = path.strip_prefix(&state).unwrap().to_str().unwrap().to_owned();
            let parts: Vec<&str> = below.split('/').collect();
            let what = match parts.as_slice() {
                // When the history was last tidied.
                ["history", ".tidied"] => "",
                _ if name.ends_with(".new") || (name.starts_with('.') && parts[0] != "jobs") => "half a file",
                ["jobs", hidden] if hidden.starts_with('.') => "half a job's folder",
                ["jobs", _] => "folder",
                ["jobs", _, "record.json"] => "record",
                ["jobs", _, file] if file.contains("key") => "keys",
                ["jobs", _, "overlay.qcow2"] => "overlay",
                ["jobs", _, "seed.img"] => "seed",
                ["jobs", _, "serial.log"] => "serial log",
                ["jobs", _, file] if file.starts_with("credential.") => "credentials",
                ["jobs", _, "kernel" | "initrd"] => "kernel",
                ["jobs", ..] => "",
                ["slots", _, _] => "slot",
                ["store", "partial", file] if file.starts_with("small-") => "half a manifest",
                ["store", "partial", _] => "half an image",
                _ => "",
            };
            if !what.is_empty() {
                left.insert(what.to_owned());
            }
            if path.is_dir() {
                folders.push(path);
            }
        }
    }
    if !host.machines().is_empty() {
        left.insert("machine".to_owned());
    }
    left
}

/// Programs that work for this try: those that have its folder in their environment, and those that have the host's in their
/// arguments.
pub fn processes(host: &Host, stages: &Stages<'_>) -> BTreeSet<String> {
    let marks = [
        stages.file("").display().to_string(),
        host.folder().display().to_string(),
    ];
    let of = |pid: &str| {
        let read = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let text = [read("cmdline"), read("environ")].concat();
        let text = String::from_utf8_lossy(&text);
        let ours = marks.iter().any(|mark| text.contains(mark.trim_end_matches('/')));
        let name = String::from_utf8_lossy(&read("comm")).trim().to_owned();
        (ours && pid != std::process::id().to_string()).then_some(name)
    };
    let pids = fs::read_dir("/proc").unwrap().flatten();
    pids.filter_map(|entry| of(entry.file_name().to_str()?)).collect()
}

/// Files of the runner's folder that are not its own.
pub fn litter(stages: &Stages<'_>) -> BTreeSet<String> {
    let names = fs::read_dir(stages.file("")).unwrap().flatten();
    names
        .map(|entry| entry.file_name().into_string().unwrap())
        .filter(|name| !["response.json", "build_exit_code", "script"].contains(&name.as_str()))
        .collect()
}

/// All of it, once the programs that the killed call had started are gone. Of them QEMU alone may stay, as long as its machine does.
pub fn at_death(host: &Host, stages: &Stages<'_>) -> BTreeSet<String> {
    let stray = || {
        let running = processes(host, stages).into_iter();
        running
            .filter(|name| !name.starts_with("qemu-system"))
            .collect::<Vec<_>>()
    };
    until("no program of a killed call runs", CHILDREN_END, || {
        stray().is_empty()
    });
    left(host)
}

pub fn after_all(host: &Host, stages: &Stages<'_>) -> BTreeSet<String> {
    let mut all = left(host);
    all.extend(processes(host, stages));
    all.extend(litter(stages));
    all
}

/// A call that dies at a point; `runner` says who made it.
pub fn killed(command: &mut Command, point: Point, nth: u32) -> Call {
    let call = armed(command, point, nth);
    assert_eq!(
        call.code,
        KILLED,
        "{} was not reached the {nth}. time: {}\n{}",
        point.name(),
        call.text(),
        call.log
    );
    call
}

pub fn armed(command: &mut Command, point: Point, nth: u32) -> Call {
    let begin = Instant::now();
    let child = command
        .env(KILL_AT, format!("{}:{nth}", point.name()))
        .spawn()
        .unwrap();
    ended(child, begin)
}

/// A call by a runner that dies with it.
pub fn mortal(host: &Host, stages: &Stages<'_>, arguments: &[&str]) -> Command {
    let mut command = Command::new("bash");
    command
        .args(["-c", MORTAL_RUNNER, "runner"])
        .arg(cannery())
        .arg("--config")
        .arg(host.settings())
        .args(arguments);
    stages.surround(&mut command);
    command
}

/// A job gets as far as its guest's boot, and no further.
pub fn boots(stages: &Stages<'_>) {
    killed(&mut stages.command(&["prepare"]), Point::SavedBooting, 1);
}

/// What a killed script runs in the guest: it does not end by itself, nor do its children with it.
pub const LASTING: &str = "(setsid sleep 4321 &)\necho begun\nsleep 4321\n";
/// The same, and it does not end when it is asked to.
pub const STUBBORN: &str = "trap '' TERM\n(setsid sleep 4321 &)\necho begun\nsleep 4321\n";
/// Says which of them are there, and then that the guest can be used.
pub const LOOK: &str = "for f in /proc/[0-9]*/cmdline; do { tr '\\0' ' ' <$f; } 2>/dev/null | grep '^sleep 4321'; done\necho again\n";

/// Waits until the script has said so.
pub fn begun(child: &mut Child) {
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "begun\n");
}

pub fn signal(name: &str, child: &Child) {
    let told = Command::new("kill")
        .arg(format!("-{name}"))
        .arg(child.id().to_string())
        .status();
    assert!(told.unwrap().success());
}
