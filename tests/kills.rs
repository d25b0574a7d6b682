//! A kill at any point of a job leaves a host that the next call makes clean.
//!
//! Each point that the program names is met three times: a call is killed there, and then comes whoever may come: the reaper,
//! since the runner died as well; cleanup by a runner that is still there; or another prepare of the same job.

#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(clippy::print_stdout, reason = "what is shown is the table of kills")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use cannery::kill::Point;
use support::host::{EMULATION, Host};
use support::kills::{
    KILL_AT, KILLED, LASTING, LOOK, after_all, at_death, begun, boots, killed, left, litter, mortal,
    processes, signal,
};
use support::stages::{Stages, ended};
use support::table;

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
    /// What another suite looks after, and kills there.
    Elsewhere(&'static str),
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
        | P::LayerKept
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
        P::SavedCleaning
        | P::HistoryBegun
        | P::HistoryKept
        | P::DomainDestroyed
        | P::SlotReleased
        | P::FolderHidden
        | P::FolderRemoved => (Scene::Removal, FIRST),
        P::ReferenceForgotten
        | P::ImageHidden
        | P::ImageRemoved
        | P::ImageSettled
        | P::PinKept
        | P::PinRemoved => (Scene::Elsewhere("tests/image_cache.rs"), FIRST),
        P::CheckpointBegun
        | P::CheckpointKept
        | P::PiecesBegun
        | P::PiecesKept
        | P::FileNamed
        | P::UnsyncedNoted => (Scene::Elsewhere("tests/image_kills.rs"), FIRST),
        P::ScreenKept | P::SavedHeld => (Scene::Elsewhere("tests/hold.rs"), FIRST),
        P::OriginKept | P::GrantKept => (Scene::Elsewhere("tests/image_grants.rs"), FIRST),
        P::TicketKept | P::TicketRevoked => (Scene::Elsewhere("tests/serve.rs"), FIRST),
        P::ImportNoted | P::ImportNamed | P::ImportDefined | P::ImportUndone => {
            (Scene::Elsewhere("tests/image_domains.rs"), FIRST)
        }
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

/// What is in the store of an image that is not whole.
const HALF_AN_IMAGE: &str = "half an image";
/// The same where it stays for the next pull, which takes it up or, after some days, a sweep that removes it.
const TO_GO_ON_WITH: &str = "layers for the next pull";

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
        let there = |point: &&Point| match plan(**point).0 {
            Scene::Trial => can_try_kvm(),
            Scene::Elsewhere(_) => false,
            _ => true,
        };
        let mut rows: Vec<Vec<String>> = self
            .0
            .iter()
            .map(|(point, row)| {
                vec![
                    point.to_string(),
                    row.kills.to_string(),
                    list(&row.at_death),
                    list(&row.after),
                ]
            })
            .collect();
        for point in Point::ALL.iter().filter(|point| !there(point)) {
            let (times, why) = match plan(*point).0 {
                Scene::Elsewhere(suite) => ("elsewhere", format!("{suite} kills there")),
                _ => ("never", "this host has no /dev/kvm to try".to_owned()),
            };
            rows.push(vec![point.to_string(), times.to_owned(), why, "-".to_owned()]);
        }
        table::show(
            "killed at any point",
            &[
                "killed when",
                "times",
                "left at death",
                "left after the next call",
            ],
            &rows,
        );
        for point in Point::ALL.iter().filter(there) {
            let row = self
                .0
                .get(point)
                .unwrap_or_else(|| panic!("never killed at {}", point.name()));
            assert!(row.kills >= 3, "killed {} times at {}", row.kills, point.name());
            let after: Vec<&String> = row.after.iter().filter(|left| *left != TO_GO_ON_WITH).collect();
            assert!(after.is_empty(), "{}: {after:?}", point.name());
        }
    }
}

/// Adds a kill to a table that several threads fill.
fn add(table: &Mutex<Table>, point: Point, at_death: BTreeSet<String>, after: BTreeSet<String>) {
    table.lock().unwrap().add(point, at_death, after);
}

/// A call by a runner that lives on, unless the reaper is to come.
fn call_before(host: &Host, stages: &Stages<'_>, arguments: &[&str], after: After) -> Command {
    match after {
        After::Reap => mortal(host, stages, arguments),
        After::Cleanup | After::Prepare => stages.command(arguments),
    }
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
                // With all that its machine is made of, which is what an earlier kill can have harmed.
                killed(&mut stages.command(&["prepare"]), Point::SavedStarting, 1);
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

/// Points behind which the next prepare is followed to its end, one of each part of it.
const TO_THE_END: [Point; 3] = [Point::SlotLeased, Point::DiskFinished, Point::OverlayBegun];

#[test]
#[ignore = "needs libvirt and a guest"]
fn a_kill_at_any_point_leaves_nothing_after_the_next_call() {
    let table = Mutex::new(Table::default());
    // Each on a host of its own, since every prepare and the reaper remove whatever was killed there.
    let timed = |what: &str, work: &dyn Fn()| {
        let begin = Instant::now();
        work();
        println!("{what}: {} s", begin.elapsed().as_secs());
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            timed("kills before the image is there", &|| {
                use Scene::{Config, First, Network, Pull, Sweep};
                kills_before_a_guest_answers(0, &[First, Config, Network, Pull, Sweep], &table);
            });
        });
        scope.spawn(|| {
            timed("kills around the machine", &|| {
                kills_before_a_guest_answers(1, &[Scene::Prepare, Scene::Removal], &table);
            });
        });
        scope.spawn(|| {
            timed("kills once a guest answers", &|| {
                kills_once_a_guest_answers(2, &table)
            })
        });
        scope.spawn(|| {
            timed(
                "kills at the trial of KVM, at any moment, and of scripts",
                &|| {
                    kills_at_the_trial_of_kvm(3, &table);
                    kills_at_any_moment(3);
                    kills_of_scripts(4, &table);
                },
            );
        });
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
                let mut left = after_all(&host, &stages);
                // Layers that are whole are kept on purpose: the next pull has no use for less.
                if point == Point::LayerKept && after != After::Prepare && left.remove(HALF_AN_IMAGE) {
                    left.insert(TO_GO_ON_WITH.to_owned());
                }
                add(table, point, dead, left);
                // And once more, with nothing there.
                stages.cleanup().ok();
            }
        }
    }
}

/// How many calls are killed at moments that have no name.
const MOMENTS: u32 = 12;

/// In the middle of what others do for us, libvirt above all.
fn kills_at_any_moment(number: u8) {
    let host = Host::one_of_several(number, EMULATION);
    let image = host.images().add_tiny("tiny", "");
    let whole = {
        let stages = Stages::new(&host, &image);
        boots(&stages);
        stages.cleanup().ok();
        // Once more, with the image in the store.
        let begin = Instant::now();
        boots(&stages);
        let whole = begin.elapsed();
        stages.cleanup().ok();
        whole
    };
    for moment in 0..MOMENTS {
        let after = whole * moment / MOMENTS;
        let stages = Stages::new(&host, &image);
        let mut child = stages.command(&["prepare"]).spawn().unwrap();
        thread::sleep(after);
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
            after.as_millis()
        );
        assert_eq!(after_all(&host, &stages), BTreeSet::new());
    }
}

fn kills_once_a_guest_answers(number: u8, table: &Mutex<Table>) {
    let host = Host::one_of_several(number, EMULATION);
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
}

fn kills_of_scripts(number: u8, table: &Mutex<Table>) {
    let host = Host::one_of_several(number, EMULATION);
    let image = host.images().add_tiny("tiny", "");
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
                    &mut stages.run_command("step_script", LASTING),
                    Point::ScriptStarted,
                    1,
                );
            }
            let script = match point {
                Point::ScriptEnded | Point::CodeWritten => "exit 3",
                _ => LASTING,
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
            let mut command = stages.run_command("step_script", LASTING);
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
    // In the end the runner is gone, too.
    killed(
        &mut stages.run_command("step_script", LASTING),
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
    host.write_settings(&settings.replace("3s", "90s"));
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
