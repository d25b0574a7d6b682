//! A kill at any point of a job leaves a host that the next call makes clean.
//!
//! Each point that the program names is met three times: a call is killed there, and then comes whoever may come: the reaper,
//! since the runner died as well; cleanup by a runner that is still there; or another prepare of the same job.

#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(clippy::print_stdout, reason = "what is shown is the table of kills")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cannery::kill::Point;
use support::host::{Host, cannery};
use support::stages::{Call, Stages, ended};
use support::until;

/// How a process that was killed shows.
const KILLED: i32 = 128 + 9;
/// The variable that arms a call.
const KILL_AT: &str = "CANNERY_KILL_AT";
/// What a program that was started by a killed call may take to be gone.
const CHILDREN_END: Duration = Duration::from_secs(2);

/// How often it is reaped beside a job: no stage is so short that it passes between two.
const REAP_EVERY: Duration = Duration::from_millis(200);

/// A runner of its own for one call, which is gone when the call is. Like gitlab-runner it gives the call a process group.
const MORTAL_RUNNER: &str = "set -m; \"$@\" & wait $!; exit $?";

/// Which call dies, and what there is before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scene {
    /// `config`.
    Config,
    /// `prepare` on a host that has never seen cannery.
    First,
    /// `prepare` or `network up` where the network is missing.
    Network,
    /// `prepare` of an image that is not here yet.
    Pull,
    /// `prepare` of one that is.
    Prepare,
    /// The same, up to a guest that has booted.
    Boot,
    /// `prepare` where nobody knows yet whether KVM works; with an image that answers, or one that does not.
    Trial,
    /// `run`.
    Run,
    /// `run` that is told to cancel.
    Cancel,
    /// Whatever removes a machine: `cleanup`, `reap`, another `prepare`.
    Removal,
    /// `reap`, after calls that were killed in the middle of writing.
    Sweep,
}

/// Where each point is met, and which time in each of three calls.
fn plan(point: Point) -> (Scene, [u32; 3]) {
    use Point as P;
    const FIRST: [u32; 3] = [1, 1, 1];
    match point {
        P::ConfigAnswered => (Scene::Config, FIRST),
        // The state folder, the one of jobs, the one of slots.
        P::FolderBegun => (Scene::First, [1, 2, 3]),
        P::FirewallLoaded | P::FirewallNoted | P::NetworkDefined | P::NetworkStarted => {
            (Scene::Network, FIRST)
        }
        // A manifest, a config, a name.
        P::BlobBegun => (Scene::Pull, [1, 2, 3]),
        P::BlobKept => (Scene::Pull, [1, 2, 1]),
        P::WorkBegun
        | P::LayerBegun
        | P::LayerUnpacked
        | P::DiskNamed
        | P::DiskFinished
        | P::DiskStored
        | P::ReferenceKept => (Scene::Pull, FIRST),
        // The record, the slot, the record again.
        P::FileBegun => (Scene::Prepare, [1, 2, 3]),
        P::SavedFetching => (Scene::Prepare, [1, 2, 1]),
        P::CredentialWritten => (Scene::Prepare, [1, 2, 3]),
        P::JobBegun
        | P::SavedAdmitted
        | P::SlotLeased
        | P::SavedCloning
        | P::UserKeyWritten
        | P::KeysWritten
        | P::OverlayBegun
        | P::OverlayMade
        | P::SerialMade
        | P::KernelCopied
        | P::SeedMade
        | P::SavedStarting
        | P::DomainCreated
        | P::SavedBooting => (Scene::Prepare, FIRST),
        P::GuestAnswered | P::GuestSettled | P::SavedReady => (Scene::Boot, FIRST),
        P::TrialEnded | P::TrialNoted => (Scene::Trial, FIRST),
        P::CodeRemoved
        | P::SavedRunning
        | P::GuestEntered
        | P::LeftEnded
        | P::ScriptStarted
        | P::ScriptEnded
        | P::CodeWritten => (Scene::Run, FIRST),
        P::CancelBegun | P::ScriptCancelled => (Scene::Cancel, FIRST),
        P::FileRemoved => (Scene::Removal, [1, 3, 6]),
        P::RecordRemoved => (Scene::Removal, [1, 2, 1]),
        P::SavedCleaning | P::DomainDestroyed | P::SlotReleased | P::FolderRemoved => (Scene::Removal, FIRST),
        P::RemainSwept | P::WorkSwept => (Scene::Sweep, FIRST),
    }
}

fn points(scene: Scene) -> impl Iterator<Item = (Point, [u32; 3])> {
    let all = Point::ALL.iter().map(|point| (*point, plan(*point)));
    all.filter(move |(_, (there, _))| *there == scene)
        .map(|(point, (_, nth))| (point, nth))
}

/// Who comes after the kill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    /// The reaper, since the runner was killed, too.
    Reap,
    /// The runner, which is still there.
    Cleanup,
    /// The runner, which tries again.
    Prepare,
}

const AFTER: [After; 3] = [After::Reap, After::Cleanup, After::Prepare];

/// What was killed, and what was left of it.
#[derive(Debug, Default)]
struct Row {
    kills: usize,
    at_death: BTreeSet<String>,
    after: BTreeSet<String>,
}

/// All kills of a test.
#[derive(Debug, Default)]
struct Table(BTreeMap<Point, Row>);

impl Table {
    fn add(&mut self, point: Point, at_death: BTreeSet<String>, after: BTreeSet<String>) {
        let row = self.0.entry(point).or_default();
        row.kills += 1;
        row.at_death.extend(at_death);
        row.after.extend(after);
    }

    /// Shows what there is, and checks that every point was met three times and that nothing stayed.
    fn shown(&self) {
        let list = |of: &BTreeSet<String>| match of.is_empty() {
            true => "nothing".to_owned(),
            false => of.iter().cloned().collect::<Vec<_>>().join(", "),
        };
        println!(
            "\n{:<58} kills  left at death → left after the next call",
            "killed when"
        );
        for (point, row) in &self.0 {
            let (at_death, after) = (list(&row.at_death), list(&row.after));
            println!("{point:<58} {:>5}  {at_death} → {after}", row.kills);
        }
        let there = |point: &&Point| plan(**point).0 != Scene::Trial || can_try_kvm();
        for point in Point::ALL.iter().filter(there) {
            let row = self
                .0
                .get(point)
                .unwrap_or_else(|| panic!("never killed at {}", point.name()));
            assert!(row.kills >= 3, "killed {} times at {}", row.kills, point.name());
            assert!(row.after.is_empty(), "{}: {:?}", point.name(), row.after);
        }
    }
}

/// Adds a kill to a table that several threads fill.
fn add(table: &Mutex<Table>, point: Point, at_death: BTreeSet<String>, after: BTreeSet<String>) {
    table.lock().unwrap().add(point, at_death, after);
}

/// What there is of jobs on this host, in a word each: empty when all is as before the first job.
fn left(host: &Host) -> BTreeSet<String> {
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
fn processes(host: &Host, stages: &Stages<'_>) -> BTreeSet<String> {
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
fn litter(stages: &Stages<'_>) -> BTreeSet<String> {
    let names = fs::read_dir(stages.file("")).unwrap().flatten();
    names
        .map(|entry| entry.file_name().into_string().unwrap())
        .filter(|name| !["response.json", "build_exit_code", "script"].contains(&name.as_str()))
        .collect()
}

/// All of it, once the programs that the killed call had started are gone. Of them QEMU alone may stay, as long as its machine does.
fn at_death(host: &Host, stages: &Stages<'_>) -> BTreeSet<String> {
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

fn after_all(host: &Host, stages: &Stages<'_>) -> BTreeSet<String> {
    let mut all = left(host);
    all.extend(processes(host, stages));
    all.extend(litter(stages));
    all
}

/// A call that dies at a point; `runner` says who made it.
fn killed(command: &mut Command, point: Point, nth: u32) -> Call {
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

fn armed(command: &mut Command, point: Point, nth: u32) -> Call {
    let begin = Instant::now();
    let child = command
        .env(KILL_AT, format!("{}:{nth}", point.name()))
        .spawn()
        .unwrap();
    ended(child, begin)
}

/// A call by a runner that dies with it.
fn mortal(host: &Host, stages: &Stages<'_>, arguments: &[&str]) -> Command {
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

/// A call by a runner that lives on, unless the reaper is to come.
fn call_before(host: &Host, stages: &Stages<'_>, arguments: &[&str], after: After) -> Command {
    match after {
        After::Reap => mortal(host, stages, arguments),
        After::Cleanup | After::Prepare => stages.command(arguments),
    }
}

/// A job gets as far as its guest's boot, which is all that an earlier kill can have harmed.
fn boots(stages: &Stages<'_>) {
    killed(&mut stages.command(&["prepare"]), Point::SavedBooting, 1);
}

/// What comes after the kill, after which nothing is left.
fn goes_on(host: &Host, stages: &Stages<'_>, after: After, to_the_end: bool) {
    match after {
        After::Reap => {
            host.expect(&["reap"]);
        }
        After::Cleanup => {
            stages.cleanup().ok();
        }
        After::Prepare => {
            if to_the_end {
                stages.prepare().ok();
                assert_eq!(stages.script("echo again").ok().text(), "again\n");
            } else {
                boots(stages);
            }
            stages.cleanup().ok();
        }
    }
}

/// The folders that everybody shares are shared, whoever was killed while making them.
fn shared_folders(host: &Host) {
    for folder in ["", "jobs", "slots"] {
        let mode = host.state().join(folder).metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o2771, "{folder}: {mode:o}");
    }
}

const EMULATION: &str = "[machine]\naccelerator = \"emulation\"\n";

/// Points behind which the next prepare is followed to its end, one of each part of it.
const TO_THE_END: [Point; 4] = [
    Point::SlotLeased,
    Point::DiskFinished,
    Point::OverlayBegun,
    Point::GuestSettled,
];

#[test]
#[ignore = "needs libvirt and a guest"]
fn a_kill_at_any_point_leaves_nothing_after_the_next_call() {
    let table = Mutex::new(Table::default());
    // Each on a host of its own, since every prepare and the reaper remove whatever was killed there.
    thread::scope(|scope| {
        scope.spawn(|| {
            let scenes = [
                Scene::First,
                Scene::Config,
                Scene::Network,
                Scene::Pull,
                Scene::Sweep,
            ];
            kills_before_a_guest_answers(0, &scenes, &table);
            kills_at_any_moment(0);
        });
        scope.spawn(|| kills_before_a_guest_answers(1, &[Scene::Prepare, Scene::Removal], &table));
        scope.spawn(|| kills_with_a_guest(2, &table));
        scope.spawn(|| kills_at_the_trial_of_kvm(3, &table));
    });
    table.into_inner().unwrap().shown();
}

fn kills_before_a_guest_answers(number: u8, scenes: &[Scene], table: &Mutex<Table>) {
    let host = Host::one_of_several(number, EMULATION);
    let image = host.images().add_tiny("tiny", "");
    for scene in scenes {
        for (point, nths) in points(*scene) {
            for (after, nth) in AFTER.into_iter().zip(nths) {
                let stages = Stages::new(&host, &image);
                before(*scene, point, &host, &stages, after);
                killed(&mut dying(*scene, &host, &stages, after), point, nth);
                let dead = at_death(&host, &stages);
                goes_on(&host, &stages, after, TO_THE_END.contains(&point));
                shared_folders(&host);
                add(table, point, dead, after_all(&host, &stages));
                // And once more, with nothing there.
                stages.cleanup().ok();
            }
        }
    }
}

/// How many calls are killed at moments that have no name, and how far these are apart: from its first instruction until the
/// guest boots.
const MOMENTS: u32 = 12;
const BETWEEN: Duration = Duration::from_millis(70);

/// In the middle of what others do for us, libvirt above all.
fn kills_at_any_moment(number: u8) {
    let host = Host::one_of_several(number, EMULATION);
    let image = host.images().add_tiny("tiny", "");
    for moment in 0..MOMENTS {
        let stages = Stages::new(&host, &image);
        let mut child = stages.command(&["prepare"]).spawn().unwrap();
        thread::sleep(moment * BETWEEN);
        child.kill().unwrap();
        assert_eq!(ended(child, Instant::now()).code, KILLED);
        let dead = at_death(&host, &stages);
        match moment % 2 {
            0 => drop(stages.cleanup().ok()),
            _ => {
                fs::remove_file(stages.file("response.json")).unwrap();
                host.expect(&["reap"]);
            }
        }
        println!(
            "killed after {:>3} ms, left at death: {dead:?}",
            (moment * BETWEEN).as_millis()
        );
        assert_eq!(after_all(&host, &stages), BTreeSet::new());
    }
}

/// What the killed scripts run in the guest: it does not end by itself, nor when it is asked to, nor as a child alone.
const STUBBORN: &str = "trap '' TERM\n(setsid sleep 4321 &)\necho begun\nsleep 4321\n";
/// Says which of them are there, and then that the guest can be used.
const LOOK: &str =
    "for f in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$f 2>/dev/null | grep '^sleep 4321'; done\necho again\n";

fn kills_with_a_guest(number: u8, table: &Mutex<Table>) {
    let host = Host::one_of_several(number, &format!("{EMULATION}[guest]\ncancel_grace = \"1s\"\n"));
    let image = host.images().add_tiny("tiny", "");
    for (point, nths) in points(Scene::Boot) {
        for (after, nth) in AFTER.into_iter().zip(nths) {
            let stages = Stages::new(&host, &image);
            killed(&mut call_before(&host, &stages, &["prepare"], after), point, nth);
            let dead = at_death(&host, &stages);
            goes_on(&host, &stages, after, TO_THE_END.contains(&point));
            add(table, point, dead, after_all(&host, &stages));
        }
    }
    let stages = Stages::new(&host, &image);
    stages.prepare().ok();
    let before = (left(&host), processes(&host, &stages));
    // The job goes on after each kill: its runner is there, so that nothing of it is left over.
    let goes_on = |point: Point| {
        let dead = at_death(&host, &stages);
        assert_eq!(host.expect(&["reap"]), "Nothing to remove.\n");
        let seen = stages.run("after_script", LOOK).ok().text();
        assert_eq!(seen, "again\n", "after a kill at {}", point.name());
        assert_eq!(
            (left(&host), processes(&host, &stages)),
            before,
            "{}",
            point.name()
        );
        add(table, point, dead, litter(&stages));
    };
    for (point, nths) in points(Scene::Run) {
        for nth in nths {
            if point == Point::LeftEnded {
                killed(
                    &mut stages.run_command("step_script", STUBBORN),
                    Point::ScriptStarted,
                    1,
                );
            }
            let script = match point {
                Point::ScriptEnded | Point::CodeWritten => "exit 3",
                _ => STUBBORN,
            };
            killed(&mut stages.run_command("step_script", script), point, nth);
            goes_on(point);
        }
    }
    // The record is saved once more when a script has ended.
    killed(
        &mut stages.run_command("step_script", "exit 3"),
        Point::SavedReady,
        1,
    );
    goes_on(Point::SavedReady);
    for (point, nths) in points(Scene::Cancel) {
        for nth in nths {
            let begin = Instant::now();
            let mut command = stages.run_command("step_script", STUBBORN);
            let mut child = command
                .env(KILL_AT, format!("{}:{nth}", point.name()))
                .spawn()
                .unwrap();
            begun(&mut child);
            signal("TERM", &child);
            assert_eq!(ended(child, begin).code, KILLED, "{}", point.name());
            goes_on(point);
        }
    }
    // The runner tries the job again though a script is left, and in the end it is gone.
    killed(
        &mut stages.run_command("step_script", STUBBORN),
        Point::ScriptStarted,
        1,
    );
    stages.prepare().ok();
    assert_eq!(stages.script(LOOK).ok().text(), "again\n");
    killed(
        &mut stages.run_command("step_script", STUBBORN),
        Point::ScriptStarted,
        1,
    );
    let dead = at_death(&host, &stages);
    fs::remove_file(stages.file("response.json")).unwrap();
    host.expect(&["reap"]);
    table
        .lock()
        .unwrap()
        .add(Point::ScriptStarted, dead, after_all(&host, &stages));
}

fn kills_at_the_trial_of_kvm(number: u8, table: &Mutex<Table>) {
    if !can_try_kvm() {
        return;
    }
    let host = Host::one_of_several(number, "[guest]\nboot_timeout = \"3s\"\n");
    let settings = host.settings_text();
    let dead_end = host.images().add_tiny("panics", "tiny.panic=0 tiny.sshd=off");
    for after in AFTER {
        let stages = Stages::new(&host, &dead_end);
        killed(
            &mut call_before(&host, &stages, &["prepare"], after),
            Point::TrialEnded,
            1,
        );
        let dead = at_death(&host, &stages);
        match after {
            After::Reap => drop(host.expect(&["reap"])),
            After::Cleanup => drop(stages.cleanup().ok()),
            // Which tries KVM again, and gets as far.
            After::Prepare => {
                killed(&mut stages.command(&["prepare"]), Point::TrialEnded, 1);
                stages.cleanup().ok();
            }
        }
        table
            .lock()
            .unwrap()
            .add(Point::TrialEnded, dead, after_all(&host, &stages));
    }
    // Where KVM hangs, the guest that boots without it comes after a wait: all three wait at once.
    host.write_settings(&settings.replace("3s", "40s"));
    let image = host.images().add_tiny("tiny", "");
    let tries = AFTER.map(|_| Stages::new(&host, &image));
    thread::scope(|scope| {
        for (after, stages) in AFTER.iter().zip(&tries) {
            let host = &host;
            scope.spawn(move || {
                killed(
                    &mut call_before(host, stages, &["prepare"], *after),
                    Point::TrialNoted,
                    1,
                );
            });
        }
    });
    let dead = at_death(&host, &tries[0]);
    for (after, stages) in AFTER.into_iter().zip(&tries) {
        goes_on(&host, stages, after, false);
    }
    for stages in &tries {
        table
            .lock()
            .unwrap()
            .add(Point::TrialNoted, dead.clone(), after_all(&host, stages));
    }
}

/// Without a KVM there is no trial.
fn can_try_kvm() -> bool {
    Path::new("/dev/kvm").exists()
}

/// Waits until the script has said so.
fn begun(child: &mut Child) {
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "begun\n");
}

fn signal(name: &str, child: &Child) {
    let told = Command::new("kill")
        .arg(format!("-{name}"))
        .arg(child.id().to_string())
        .status();
    assert!(told.unwrap().success());
}

/// What there is before the call that dies.
fn before(scene: Scene, point: Point, host: &Host, stages: &Stages<'_>, after: After) {
    match scene {
        Scene::First => drop(fs::remove_dir_all(host.state())),
        Scene::Network => drop(host.expect(&["network", "down"])),
        Scene::Pull => drop(fs::remove_dir_all(host.state().join("store"))),
        Scene::Removal => drop(killed(
            // The reaper takes it where it is the one that dies, or comes after.
            &mut call_before(
                host,
                stages,
                &["prepare"],
                if after == After::Prepare {
                    after
                } else {
                    After::Reap
                },
            ),
            Point::SavedBooting,
            1,
        )),
        Scene::Sweep => {
            let (unfinished, nth) = match (point, after) {
                (Point::WorkSwept, _) => (Point::LayerBegun, 1),
                (_, After::Reap) => (Point::FileBegun, 2),
                (_, After::Cleanup) => (Point::BlobBegun, 1),
                (_, After::Prepare) => (Point::JobBegun, 1),
            };
            drop(fs::remove_dir_all(host.state().join("store")));
            killed(&mut mortal(host, stages, &["prepare"]), unfinished, nth);
        }
        _ => {}
    }
}

/// The call that dies.
fn dying(scene: Scene, host: &Host, stages: &Stages<'_>, after: After) -> Command {
    match (scene, after) {
        (Scene::Config, _) => call_before(host, stages, &["config"], after),
        (Scene::Network, After::Cleanup) => {
            let mut command = host.command(&["network", "up"]);
            stages.surround(&mut command);
            command
        }
        (Scene::Removal, After::Cleanup) => stages.command(&["cleanup"]),
        (Scene::Removal, After::Reap) | (Scene::Sweep, _) => mortal(host, stages, &["reap"]),
        _ => call_before(host, stages, &["prepare"], after),
    }
}

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
    let stages = Stages::new(&host, &image).with_program(&program);
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
                .contains("step_script was still running though its call was killed"),
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
        assert!(begin.elapsed() < Duration::from_secs(10), "the helper was not asked");
    }
    prepare.kill().unwrap();
    let call = ended(prepare, begin);
    assert_eq!(call.code, KILLED, "{}", call.log);
    println!("left at death: {:?}", at_death(&host, &stages));
    stages.cleans_up();
}
