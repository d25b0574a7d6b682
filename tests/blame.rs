//! Whose fault it is: every row of the tables in docs/troubleshoot.md, seen on real guests.
//!
//! A row is named here by the words of its first column; a row that is not walked fails the test, and so does a walk
//! without a row.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "support/image_fixture.rs"]
#[allow(dead_code, reason = "each suite uses its part of the fixture")]
mod image_fixture;
#[path = "support/registry_fixture.rs"]
#[allow(dead_code, reason = "each suite uses its part of the fixture")]
mod registry_fixture;
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use image_fixture::{Image, Layout, OCI_TAR_GZIP, Tar, raw_disk, sha256};
use registry_fixture::Registry;
use support::host::{Host, virsh};
use support::https::{Answer, Server, Speech};
use support::job::Job;
use support::stages::{BUILD_FAILURE, Call, SYSTEM_FAILURE, Stages, ended};
use support::{table, until};

/// What "within 10 s" in the table means.
const NOTICED: Duration = Duration::from_secs(10);
/// What "at once" in the table means, in an emulated guest on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(15);
/// `guest.lost_after` where a silent guest is waited for.
const LOST_AFTER: Duration = Duration::from_secs(15);
/// For what takes as long as the script itself.
const NOT_TIMED: Duration = Duration::ZERO;
/// How much of the job log's last line the table shows, in characters.
const SENTENCE: usize = 110;
/// Guests boot side by side here.
const SOON: Duration = Duration::from_secs(120);

/// The rows of the page: what happens, and what gitlab-runner sees.
fn documented() -> BTreeMap<String, (String, String)> {
    let page =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/troubleshoot.md")).unwrap();
    let (_, section) = page.split_once("## Whose fault it is").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    let rows = section.lines().filter_map(|line| {
        let cells: Vec<&str> = line.strip_prefix("| ")?.split(" |").map(str::trim).collect();
        let [what, sees, more, ..] = cells.as_slice() else {
            return None;
        };
        let is_row = !["what happens"].contains(what) && !what.starts_with("---");
        is_row.then(|| (what.to_string(), (sees.to_string(), more.to_string())))
    });
    rows.collect()
}

/// What was seen, row by row.
struct Walk {
    open: Mutex<BTreeMap<String, (String, String)>>,
    seen: Mutex<Vec<Vec<String>>>,
}

impl Walk {
    /// A row was seen: this call, which took so long from the event on, with these words in its log.
    #[track_caller]
    fn saw(&self, what: &str, call: &Call, took: Duration, words: &[&str]) {
        let row = self.open.lock().unwrap().remove(what);
        let (sees, more) =
            row.unwrap_or_else(|| panic!("the page has no row {what:?}, or it was seen twice"));
        let expected = match sees.split([' ', ':']).next().unwrap() {
            "build" => BUILD_FAILURE,
            "system" => SYSTEM_FAILURE,
            "nothing" => 0,
            other => panic!("{what}: {other}"),
        };
        assert_eq!(call.code, expected, "{what}\n{}\n{}", call.text(), call.log);
        for word in words {
            assert!(
                call.log.contains(word),
                "{what}: {word:?} is not in\n{}",
                call.log
            );
        }
        let bound = match more.as_str() {
            "at once" => Some(AT_ONCE),
            "within 10 s" => Some(NOTICED),
            _ => None,
        };
        assert!(bound.is_none_or(|b| took < b), "{what}: {took:?}\n{}", call.log);
        let sentence: String = call
            .log
            .lines()
            .last()
            .unwrap_or("-")
            .chars()
            .take(SENTENCE)
            .collect();
        let blamed = match call.code {
            BUILD_FAILURE => "build failure",
            SYSTEM_FAILURE => "system failure",
            _ => "nothing",
        };
        self.seen.lock().unwrap().push(vec![
            what.to_owned(),
            blamed.to_owned(),
            match took {
                NOT_TIMED => "-".to_owned(),
                took => format!("{:.1} s", took.as_secs_f64()),
            },
            sentence,
        ]);
    }

    /// A failed prepare, whose time does not matter.
    #[track_caller]
    fn refused(&self, what: &str, stages: &Stages<'_>, words: &[&str]) {
        let call = stages.prepare();
        call.last_line();
        self.saw(what, &call, call.took, words);
        // Where the settings are wrong there is nothing to clean up either.
        stages.cleanup();
    }
}

/// A file system in memory, to be filled.
struct Small(PathBuf);

impl Small {
    fn mount(folder: PathBuf) -> Self {
        fs::create_dir(&folder).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1500M,mode=0755", "tmpfs"])
            .arg(&folder)
            .status()
            .unwrap();
        assert!(mounted.success());
        Self(folder)
    }

    fn fill(&self) {
        let filler = Command::new("dd")
            .args(["if=/dev/zero", "bs=1M", "status=none"])
            .arg(format!("of={}", self.0.join("filler").display()))
            .stderr(std::process::Stdio::null())
            .status()
            .unwrap();
        assert!(!filler.success());
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        Command::new("umount")
            .arg("--lazy")
            .arg(&self.0)
            .status()
            .unwrap();
    }
}

/// What all cases share.
struct World<'a> {
    host: &'a Host,
    image: String,
    walk: Walk,
}

impl World<'_> {
    /// A job on a guest that answers, and the name of its machine.
    fn guest(&self, job: Job) -> (Stages<'_>, String) {
        static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(100);
        let id = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let stages = Stages::of(self.host, &job.image(&self.image), id);
        stages.prepare().ok();
        let machines = self.host.machines();
        let mine = machines
            .into_iter()
            .find(|m| m.contains(&format!("-{id}-")))
            .unwrap();
        (stages, mine)
    }

    /// Other settings than the host's, for one job.
    fn settings(&self, name: &str, change: impl FnOnce(String) -> String) -> PathBuf {
        let path = self.host.folder().join(name);
        fs::write(&path, change(self.host.settings_text())).unwrap();
        path
    }

    /// Runs a script, waits until it has begun, does something, and waits for the end of the call; the time counts from when it was done.
    #[track_caller]
    fn during(&self, stages: &Stages<'_>, script: &str, event: impl FnOnce(&Child)) -> Call {
        // The word must leave the guest before the script harms it.
        let mut child = stages.start(format!("echo begun; sleep 1; {script}\n"));
        let mut word = [0; 6];
        child.stdout.as_mut().unwrap().read_exact(&mut word).unwrap();
        event(&child);
        ended(child, Instant::now())
    }
}

/// Takes a machine's network card off its cable, or puts it back.
fn cable(machine: &str, state: &str) {
    let list = virsh(&["domiflist", machine]);
    let name = list
        .lines()
        .nth(2)
        .and_then(|l| l.split_whitespace().next())
        .unwrap();
    virsh(&["domif-setlink", machine, name, state]);
}

fn restart_libvirtd() {
    let done = if Path::new("/run/systemd/system").exists() {
        Command::new("systemctl")
            .args(["restart", "libvirtd"])
            .status()
            .unwrap()
    } else {
        let pid = fs::read_to_string("/run/libvirtd.pid").unwrap();
        Command::new("kill").arg(pid.trim()).status().unwrap();
        until("libvirtd has ended", SOON, || {
            let status = fs::read_to_string(format!("/proc/{}/status", pid.trim())).unwrap_or_default();
            status.is_empty() || status.contains("State:\tZ")
        });
        // A daemon outlives the test: it must not keep what whoever runs the tests has open, such as a lock.
        Command::new("sh")
            .args(["-c", "exec libvirtd -d 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-"])
            .status()
            .unwrap()
    };
    assert!(done.success());
    until("libvirtd answers", SOON, || {
        Command::new("virsh")
            .args(["-c", "qemu:///system", "version"])
            .output()
            .unwrap()
            .status
            .success()
    });
}

/// What the script itself does, down to the end of its guest.
fn the_scripts_own(world: &World<'_>) {
    let walk = &world.walk;
    let (job, _) = world.guest(Job::new("own").variable("CANNERY_MEMORY", "320M"));
    let call = job.script("exit 7").failed_script(7, &job);
    walk.saw("the script ends with a code that is not 0", &call, call.took, &[]);
    let call = job.script("kill -TERM $$").failed_script(143, &job);
    walk.saw("a signal ends the script", &call, call.took, &[]);
    let call = world
        .during(
            &job,
            "dd if=/dev/zero of=/root/fill bs=1M 2>/dev/null; exit 5",
            |_| (),
        )
        .failed_script(5, &job);
    walk.saw(
        "the guest's disk is full",
        &call,
        NOT_TIMED,
        &["The guest has no room left on /:", "CANNERY_DISK"],
    );
    let call = job
        .script("rm /root/fill; echo 'cp: No space left on device'; exit 1")
        .failed_script(1, &job);
    assert!(call.log.contains("A program found no room left"), "{}", call.log);
    let call = job.script("tail /dev/zero").failed_script(137, &job);
    walk.saw(
        "the guest's kernel kills the script for lack of memory",
        &call,
        NOT_TIMED,
        &["out of memory", "killed tail", "CANNERY_MEMORY"],
    );
    // What was short once is not held against the next script.
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(job.script("exit 1").failed_script(1, &job).log, "");

    let nowhere = job.file("missing/build_exit_code");
    let job = job.variable("BUILD_EXIT_CODE_FILE", nowhere);
    let call = job.script("exit 1");
    walk.saw(
        "the script's exit code cannot be handed over",
        &call,
        call.took,
        &["missing/build_exit_code"],
    );
    let call = world.during(&job, "sleep 1000", |child| {
        let status = Command::new("kill").arg(child.id().to_string()).status().unwrap();
        assert!(status.success());
    });
    assert!(call.took < Duration::from_secs(12), "{:?}", call.took);
    walk.saw(
        "gitlab-runner cancels the script with SIGTERM",
        &call,
        call.took,
        &["cancelled"],
    );
    assert_eq!(job.script("ps | grep -c '[s]leep 1000'; true").ok().text(), "0\n");
    let call = world.during(&job, "poweroff -f; sleep 1000", |_| ());
    walk.saw(
        "the guest powers off",
        &call,
        call.took,
        &["guest powered off", "The end of the guest's serial log"],
    );
    job.cleanup().ok();
}

/// A guest that is too busy to say anything.
fn a_busy_guest(world: &World<'_>) {
    let (job, _) = world.guest(Job::new("busy").variable("CANNERY_CPUS", "1"));
    let load = "for n in 1 2 3; do timeout 62 sh -c 'while :; do :; done' & done; wait; echo done";
    let call = world.during(&job, load, |_| ());
    assert_eq!(call.text(), "done\n");
    assert!(call.took > Duration::from_secs(60), "{:?}", call.took);
    world.walk.saw(
        "all of the guest's CPUs are busy for a minute, and the script prints nothing",
        &call,
        call.took,
        &[],
    );
    let call = world.during(&job, "reboot -f; sleep 1000", |_| ());
    world
        .walk
        .saw("the guest reboots", &call, call.took, &["guest rebooted"]);
    job.cleanup().ok();
}

/// A script that goes on for as long as the event lasts, and a while longer.
const TICKS: &str = "for n in 1 2 3 4 5 6 7 8; do sleep 1; done; echo done";

fn a_suspended_machine(world: &World<'_>) {
    let (job, machine) = world.guest(Job::new("suspended"));
    let call = world.during(&job, TICKS, |_| {
        virsh(&["suspend", &machine]);
        std::thread::sleep(Duration::from_secs(30));
        virsh(&["resume", &machine]);
    });
    assert_eq!(call.text(), "done\n");
    world
        .walk
        .saw("the machine is suspended for 30 s", &call, call.took, &[]);
    let call = world.during(&job, "echo c >/proc/sysrq-trigger; sleep 1000", |_| ());
    world.walk.saw(
        "the guest's kernel panics",
        &call,
        call.took,
        &["kernel panicked"],
    );
    job.cleanup().ok();
}

fn a_cut_network(world: &World<'_>) {
    let (job, machine) = world.guest(Job::new("cut"));
    let call = world.during(&job, TICKS, |_| {
        cable(&machine, "down");
        std::thread::sleep(Duration::from_secs(20));
        cable(&machine, "up");
    });
    assert_eq!(call.text(), "done\n");
    world
        .walk
        .saw("the guest's network is down for 20 s", &call, call.took, &[]);
    let call = world.during(&job, "killall -9 dropbear; sleep 1000", |_| ());
    world.walk.saw(
        "the guest's SSH server is killed",
        &call,
        call.took,
        &["connection to the guest is lost"],
    );
    job.cleanup().ok();
}

fn a_silent_guest(world: &World<'_>) {
    let (job, machine) = world.guest(Job::new("silent"));
    let impatient = world.settings("impatient.toml", |text| {
        format!("{text}\n[guest]\nlost_after = \"15 s\"\n")
    });
    let job = job.with_settings(&impatient);
    let call = world.during(&job, "sleep 1000", |_| cable(&machine, "down"));
    assert!(
        call.took > LOST_AFTER - NOTICED && call.took < LOST_AFTER + NOTICED,
        "{:?}",
        call.took
    );
    world.walk.saw(
        "the guest is silent",
        &call,
        call.took,
        &["connection to the guest is lost"],
    );
    cable(&machine, "up");
    let job = job.with_settings(&world.host.settings());
    let call = world.during(&job, "sleep 1000", |_| drop(virsh(&["destroy", &machine])));
    world.walk.saw(
        "the machine is destroyed",
        &call,
        call.took,
        &["machine is gone: it was destroyed"],
    );
    job.cleanup().ok();
}

/// What goes wrong before there is a guest, or while it boots.
fn without_a_script(world: &World<'_>) {
    let (host, walk, image) = (world.host, &world.walk, world.image.as_str());
    let job = |name: &str| Stages::new(host, name);
    walk.refused(
        "the image is not allowed on this runner",
        &job("registry.example.com/x:1"),
        &["not allowed"],
    );
    walk.refused(
        "the image or its tag does not exist",
        &job(&image.replace(":tiny", ":tyni")),
        &["tyni", "Is the name right"],
    );
    let of = |job: Job| Stages::of(host, &job.image(image), 50);
    let too_much = of(Job::new("unit").variable("CANNERY_CPUS", "64"));
    walk.refused(
        "`CANNERY_*` makes no sense or asks for too much",
        &too_much,
        &["CANNERY_CPUS=64", "at most"],
    );
    let services = of(Job::new("unit").service("postgres:17"));
    walk.refused(
        "`services:`, unless the operator lets them be ignored",
        &services,
        &["postgres:17"],
    );
    let platform = of(Job::new("unit").image_platform("windows/amd64"));
    walk.refused(
        "a platform, a user or a pull policy that is not to be had",
        &platform,
        &["platform windows/amd64", "choose another runner"],
    );
    let missing = job(image).without("JOB_RESPONSE_FILE");
    walk.refused(
        "the environment that gitlab-runner gives is missing",
        &missing,
        &["JOB_RESPONSE_FILE"],
    );

    // After the slot was leased, with a machine's worth of things to tidy up.
    let bug = job(image).variable("CANNERY_PANIC_AT", "slot-leased");
    let call = bug.prepare();
    walk.saw(
        "cannery fails by an error of its own",
        &call,
        call.took,
        &["an error of its own", "Please report it"],
    );
    bug.without("CANNERY_PANIC_AT").cleanup().ok();

    // Images that are none, or not what they seem.
    let layout = Layout::new(&host.folder().join("bad"));
    layout.add("text", &Image::plain(b"not a disk".to_vec(), "text/plain"));
    let disk = Tar::new().dir("disk/").file("disk/disk.img", &raw_disk()).bytes();
    let damaged = Image::container_disk(&disk, OCI_TAR_GZIP);
    layout.add("damaged", &damaged);
    let blob = layout.path(&sha256(&damaged.layers[0].0));
    let mut bytes = fs::read(&blob).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&blob, &bytes).unwrap();
    let wide = world.settings("wide.toml", |text| {
        text.replacen(
            "layouts = [",
            &format!("layouts = [\"{}\", ", layout.dir.display()),
            1,
        )
    });
    let of_layout = |tag: &str| job(&layout.reference(tag)).with_settings(&wide);
    walk.refused(
        "the image is none that cannery reads, is built to deceive, or is too large",
        &of_layout("text"),
        &["is refused"],
    );
    walk.refused(
        "the image's data arrives damaged",
        &of_layout("damaged"),
        &["damaged"],
    );

    let mut registry = Registry::with_password();
    let name = format!("{}/team/vm:1", registry.host);
    let open = world.settings("registry.toml", |text| {
        let host = &registry.host;
        text.replacen(
            "[images]\n",
            &format!("[images]\nallow = [\"{host}/**\"]\nplain_http = [\"{host}\"]\n"),
            1,
        )
    });
    walk.refused(
        "the registry denies the image to the job's logins",
        &job(&name).with_settings(&open),
        &["denies access"],
    );
    // The host's own logins, for the images of a registry.
    let lent = |registry: &str, logins: &str| {
        let file = host.folder().join("auth.json");
        fs::write(&file, logins).unwrap();
        let list = format!(
            "host_credentials = [\"{registry}/**\"]\nauth_files = [\"{}\"]",
            file.display()
        );
        world.settings("logins.toml", |text| {
            text.replacen(
                "[images]\n",
                &format!("[images]\nallow = [\"{registry}/**\"]\nplain_http = [\"{registry}\"]\n{list}\n"),
                1,
            )
        })
    };
    let helper = format!("{{\"credHelpers\": {{\"{}\": \"is-not-there\"}}}}", registry.host);
    walk.refused(
        "a login of the host's own cannot be used",
        &job(&name).with_settings(&lent(&registry.host, &helper)),
        &["docker-credential-is-not-there", "images.auth_files"],
    );
    let login = |registry: &str| {
        format!("{{\"auths\": {{\"{registry}\": {{\"username\": \"ci\", \"password\": \"old\"}}}}}}")
    };
    walk.refused(
        "the registry refuses a login of the host's own",
        &job(&name).with_settings(&lent(&registry.host, &login(&registry.host))),
        &["refuses the login of `ci` given by the host", "`cannery login"],
    );
    let narrow = Server::start(Speech::Plain, |seen| {
        match (seen.authorization(), seen.path.as_str()) {
            (None, _) => Answer::status(401).with("www-authenticate", "Basic"),
            (Some(_), "/v2/") => Answer::ok("{}"),
            (Some(_), _) => Answer::status(403),
        }
    });
    walk.refused(
        "the registry denies the image to a login of the host's own that it knows",
        &job(&format!("{}/team/vm:1", narrow.host()))
            .with_settings(&lent(&narrow.host(), &login(&narrow.host()))),
        &["denies access", "to the host's user `ci`", "Is the name right?"],
    );
    registry.stop();
    walk.refused(
        "the registry cannot be reached",
        &job(&name).with_settings(&open),
        &["cannot be reached"],
    );

    let default = world.settings("default.toml", |text| {
        let name = image.replace(":tiny", ":gone");
        text.replacen("[images]\n", &format!("[images]\ndefault = \"{name}\"\n"), 1)
    });
    let none = Stages::of(host, &Job::new("unit"), 51).with_settings(&default);
    walk.refused(
        "the operator's default image does not exist",
        &none,
        &["images.default", ":gone"],
    );
    let wrong = world.settings("wrong.toml", |text| format!("slotz = 7\n{text}"));
    walk.refused(
        "a setting is wrong",
        &job(image).with_settings(&wrong),
        &["slotz"],
    );
    let nowhere = world.settings("nowhere.toml", |text| {
        format!("{text}\n[libvirt]\nuri = \"qemu+unix:///system?socket=/run/none\"\n")
    });
    walk.refused(
        "libvirt is down",
        &job(image).with_settings(&nowhere),
        &["libvirt at", "Is libvirtd running"],
    );

    let bare = host.images().add_tiny("bare", "tiny.bash=off");
    walk.refused("the image lacks the shell", &job(&bare), &["image has no bash"]);
    let mute = host.images().add_tiny("mute", "tiny.sshd=off");
    let hasty = world.settings("hasty.toml", |text| {
        format!("{text}\n[guest]\nboot_timeout = \"15 s\"\n")
    });
    let stages = job(&mute);
    let begin = Instant::now();
    let child = stages.command(&["prepare"]).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(3));
    Command::new("kill").arg(child.id().to_string()).status().unwrap();
    let call = ended(child, begin);
    walk.saw(
        "gitlab-runner ends the stage with SIGTERM",
        &call,
        call.took,
        &["gave this up"],
    );
    stages.cleanup().ok();
    walk.refused(
        "the guest does not answer in time",
        &job(&mute).with_settings(&hasty),
        &["was not reached within 15 s"],
    );
    let panics = host.images().add_tiny("panics", "tiny.panic=0 tiny.sshd=off");
    walk.refused(
        "the guest's kernel panics while it boots",
        &job(&panics),
        &["kernel panicked"],
    );
}

/// libvirtd goes away under a script, and the host's disk fills up.
fn a_host_in_trouble(world: &World<'_>, small: &Small) {
    let (job, machine) = world.guest(Job::new("writer"));
    let call = world.during(&job, TICKS, |_| restart_libvirtd());
    assert_eq!(call.text(), "done\n");
    world.walk.saw("libvirtd is restarted", &call, call.took, &[]);
    let call = world.during(
        &job,
        "sleep 2; dd if=/dev/urandom of=/root/big bs=1M count=300; sync; sleep 1000",
        |_| {
            small.fill();
            until("the machine is stopped", SOON, || {
                virsh(&["domstate", &machine]).contains("paused")
            });
        },
    );
    world.walk.saw(
        "the host's disk is full, and the machine stops",
        &call,
        call.took,
        &["could not write its disk"],
    );
    world.walk.refused(
        "the host has no room",
        &Stages::new(world.host, &world.image),
        &["room"],
    );
    job.cleanup().ok();
}

#[test]
#[ignore = "needs root, libvirt, docker-registry and a guest"]
fn every_failure_is_blamed_on_whom_the_page_says_and_what_can_pass_does() {
    let host = Host::new(&[], "[machine]\naccelerator = \"emulation\"\n");
    let small = Small::mount(host.folder().join("small"));
    let text = host.settings_text();
    host.write_settings(&text.replacen(
        host.state().to_str().unwrap(),
        small.0.join("state").to_str().unwrap(),
        1,
    ));
    host.expect(&["network", "up"]);
    let image = host.images().add_tiny("tiny", "");
    let world = World {
        host: &host,
        image,
        walk: Walk {
            open: Mutex::new(documented()),
            seen: Mutex::default(),
        },
    };
    std::thread::scope(|scope| {
        for part in [
            the_scripts_own,
            a_busy_guest,
            a_suspended_machine,
            a_cut_network,
            a_silent_guest,
        ] {
            let world = &world;
            scope.spawn(move || part(world));
        }
        without_a_script(&world);
    });
    a_host_in_trouble(&world, &small);
    table::show(
        "whose fault it is",
        &[
            "what happens",
            "gitlab-runner sees",
            "after",
            "the job log ends with",
        ],
        &world.walk.seen.lock().unwrap(),
    );
    assert_eq!(*world.walk.open.lock().unwrap(), BTreeMap::new());
    assert_eq!(host.machines(), Vec::<String>::new());
    assert_eq!(fs::read_dir(small.0.join("state/jobs")).unwrap().count(), 0);
    fs::remove_file(small.0.join("filler")).unwrap();
    host.expect(&["network", "down"]);
}
