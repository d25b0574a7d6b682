//! `cannery console JOB` and the viewer that it starts: a script, at a machine that libvirt's own test driver would know; and the
//! real one, at a real one.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use cannery::record::{Caller, JobDir, JobKey, Jobs, Machine, Record};
use cannery::ticket;
use jiff::Timestamp;
use rustix::process::{Pid, Signal, kill_process};
use support::console::{Place, read_until};
use support::desktop::Desktop;
use support::host::{EMULATION, Host};
use support::job::Job;
use support::picture::Picture;
use support::stages::Stages;
use support::until;

/// Longer than a process takes to start.
const PATIENCE: Duration = Duration::from_secs(60);

/// A viewer that keeps what it was given, and closes when it is told to.
const VIEWER: &str = r#"#!/bin/sh
echo "$@" > "${0%/*}/arguments"
cat > "${0%/*}/given.part"
mv "${0%/*}/given.part" "${0%/*}/given"
while [ ! -e "${0%/*}/close" ]; do sleep 0.05; done
"#;

struct Scene {
    folder: tempfile::TempDir,
    job: JobDir,
}

impl Scene {
    /// A job with a machine, and settings that name these viewers.
    fn new(programs: &[PathBuf], folder: tempfile::TempDir) -> Self {
        let state = folder.path().join("state");
        let settings = format!(
            "state_dir = \"{}\"\n[console]\nprograms = {programs:?}\n",
            state.display()
        );
        std::fs::write(folder.path().join("cannery.toml"), settings).unwrap();
        let now = Timestamp::now();
        let key = JobKey::new("https://gitlab.example.com", 1, 0);
        let record = Record {
            machine: Some(Machine {
                uri: "test:///default".into(),
                name: "test".into(),
                uuid: uuid::Uuid::nil(),
            }),
            ..Record::new(key, "/tmp/x".into(), Caller::this(), now, now)
        };
        let job = Jobs::open(&state).unwrap().create(record).unwrap();
        Self { folder, job }
    }

    fn console(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(support::host::cannery());
        command
            .arg("--config")
            .arg(self.folder.path().join("cannery.toml"))
            .args(["console", "1"])
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    fn said(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.path().join(name)).unwrap()
    }
}

/// A program of this name in a folder, which does this.
fn program(folder: &tempfile::TempDir, name: &str, text: &str) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn the_first_viewer_that_is_there_is_given_a_port_of_this_host_and_a_ticket_that_go_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let viewer = program(&folder, "viewer", VIEWER);
    let scene = Scene::new(&[folder.path().join("absent"), viewer], folder);
    let mut console = scene.console(&[]).spawn().unwrap();
    let given = scene.folder.path().join("given");
    until("the viewer has its file", PATIENCE, || given.exists());

    let file = scene.said("given");
    let value = |key: &str| {
        let line = file.lines().find_map(|line| line.strip_prefix(key));
        line.unwrap_or_else(|| panic!("{key} in {file}")).to_owned()
    };
    assert_eq!(
        (value("type=").as_str(), value("host=").as_str()),
        ("spice", "127.0.0.1")
    );
    let port: u16 = value("port=").parse().unwrap();
    drop(TcpStream::connect(("127.0.0.1", port)).unwrap());
    let password = value("password=");
    let redeemed = ticket::redeem_for(&scene.job, &password, Timestamp::now()).unwrap();
    assert_eq!(redeemed.unwrap().grant.viewers, 1);
    // Whoever lists processes sees no ticket.
    assert_eq!(scene.said("arguments").trim(), "-");

    std::fs::write(scene.folder.path().join("close"), "").unwrap();
    assert!(console.wait().unwrap().success());
    assert_eq!(ticket::list(&scene.job).unwrap(), []);
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
}

#[test]
fn virt_viewer_is_told_the_machine_and_is_not_used_for_who_may_only_see() {
    let folder = tempfile::tempdir().unwrap();
    let viewer = program(&folder, "virt-viewer", VIEWER);
    std::fs::write(folder.path().join("close"), "").unwrap();
    let scene = Scene::new(&[viewer], folder);
    let refused = scene.console(&["--view-only"]).output().unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        !refused.status.success() && said.contains("None of these viewers is installed"),
        "{said}"
    );
    assert!(!scene.folder.path().join("arguments").exists());

    assert!(scene.console(&[]).status().unwrap().success());
    assert_eq!(
        scene.said("arguments").trim(),
        "--connect test:///default --attach test"
    );
    assert_eq!(scene.said("given"), "");
}

#[test]
fn a_viewer_that_fails_is_named_and_the_job_that_is_removed_closes_one_that_runs() {
    let folder = tempfile::tempdir().unwrap();
    let viewer = program(&folder, "viewer", "#!/bin/sh\ncat > /dev/null\nexit 3\n");
    let scene = Scene::new(std::slice::from_ref(&viewer), folder);
    let failed = scene.console(&["--view-only"]).output().unwrap();
    let said = String::from_utf8(failed.stderr).unwrap();
    assert!(
        !failed.status.success() && said.contains(&format!("{} failed", viewer.display())),
        "{said}"
    );

    program(&scene.folder, "viewer", VIEWER);
    let console = scene
        .console(&["--view-only"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let given = scene.folder.path().join("given");
    until("the viewer has its file", PATIENCE, || given.exists());
    drop(scene.job.enter(cannery::record::State::Cleaning, |_| ()).unwrap());
    let ended = console.wait_with_output().unwrap();
    // What the viewer still waits for.
    std::fs::write(scene.folder.path().join("close"), "").unwrap();
    let said = String::from_utf8(ended.stderr).unwrap();
    assert!(
        !ended.status.success() && said.contains("was removed, or its ticket taken away"),
        "{said}"
    );
}

/// What is typed.
const TYPED: &str = "mmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmm";
/// Pixels of the only thing that changes by itself: a cursor that blinks.
const CURSOR: usize = 9 * 16;

#[tokio::test]
#[ignore = "needs libvirt, a guest, remote-viewer, xvfb and xdotool"]
async fn who_follows_the_job_log_gets_in_and_an_admin_types_at_the_screen_and_reads_along() {
    let place = Place::new();
    let settings = format!("{EMULATION}{}access = \"link\"\n", place.settings());
    let host = Host::new(&[], &settings);
    let image = host.images().add_tiny("tiny", "");
    let job = Stages::of(&host, &Job::new("unit").image(&image), 7);
    let log = job.prepare().ok().log;
    let served = place.serve_and_read(&host.settings(), 2);
    follow_the_log(&place, &log).await;
    drop(served);
    type_at_the_screen(&host);
    read_along_on_a_terminal(&host);

    // Who reads along when the machine goes is let go.
    let mut reading = host
        .command(&["console", "7", "--serial"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    hear(&mut reading, &mut said, "tiny: ready");
    job.cleans_up();
    assert!(reading.wait().unwrap().success());
}

/// The address that prepare prints opens the job's page by itself, where the operator wants that.
async fn follow_the_log(place: &Place, log: &str) {
    let link = format!("Console: {}/jobs/", place.origin());
    let (_, rest) = log.split_once(&link).unwrap_or_else(|| panic!("{link} in {log}"));
    let (rest, _) = rest.split_once(" (for whoever reads this).").unwrap();
    let (key, ticket) = rest.split_once("#ticket=").unwrap();
    assert!(
        log.contains("Warning: whoever can read this job log can enter this job's machine"),
        "{log}"
    );
    let mut browser = place.browser();
    assert_eq!(browser.enter(key, ticket).await, 204);
    let mut serial = browser.open(&format!("/jobs/{key}/serial")).await.unwrap();
    read_until(&mut serial, "tiny: ready").await;
}

/// Keys that are typed into remote-viewer reach the guest, which shows them.
fn type_at_the_screen(host: &Host) {
    let in_guest = |command: &str| host.expect(&["vm", "ssh", "7", "--", command]);
    let typed = || in_guest("cat /run/typed");
    in_guest("setsid sh -c 'exec cat </dev/tty1 >/run/typed' >/dev/null 2>&1 &");
    let desktop = Desktop::start();
    let mut console = host.command(&["console", "7"]);
    let mut console = desktop.shows(&mut console).spawn().unwrap();
    let window = desktop.window("remote-viewer");

    let before = Picture::of_screen(host, "7");
    assert!(Picture::of_screen(host, "7").differs_in(&before) <= CURSOR);
    // What comes before the viewer is connected is lost.
    until("what is typed is in the guest", PATIENCE, || {
        desktop.type_into(&window, TYPED);
        typed().contains(&format!("{TYPED}\n"))
    });
    let after = Picture::of_screen(host, "7");
    let changed = after.differs_in(&before);
    assert!(changed > TYPED.len() * 10, "{changed} pixels have changed");

    // Ctrl-C closes the viewer.
    kill_process(Pid::from_child(&console), Signal::INT).unwrap();
    assert!(console.wait().unwrap().success());
    until("the window is closed", PATIENCE, || {
        desktop.windows("remote-viewer").is_empty()
    });
    // Keys come without a viewer, too.
    for keys in ["shift-x", "enter"] {
        host.expect(&["console", "7", "--send-key", keys]);
    }
    until("the key is in the guest", PATIENCE, || typed().ends_with("X\n"));
}

/// The serial log on an admin's terminal, as it grows, until Ctrl-C.
fn read_along_on_a_terminal(host: &Host) {
    let program = support::host::cannery().display();
    let command = format!(
        "exec {program} --config {} console 7 --serial",
        host.settings().display()
    );
    let mut terminal = Command::new("script")
        .args(["--quiet", "--return", "--command", &command, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    hear(&mut terminal, &mut said, "tiny: ready");
    let clears = "printf 'before\\033[2Jafter\\n' >/dev/console";
    host.expect(&["vm", "ssh", "7", "--", clears]);
    // It is read and does not command the terminal.
    hear(&mut terminal, &mut said, "before[2Jafter");
    assert!(!said.contains('\u{1b}'), "{said:?}");
    let stdin = terminal.stdin.as_mut().unwrap();
    stdin.write_all(b"\x03").unwrap();
    assert!(terminal.wait().unwrap().success());
}

/// Reads what a program prints until this is in it.
fn hear(program: &mut Child, said: &mut String, awaited: &str) {
    let output = program.stdout.as_mut().unwrap();
    while !said.contains(awaited) {
        let mut piece = [0; 4096];
        let count = output.read(&mut piece).unwrap();
        assert!(count > 0, "{awaited:?} is not in {said}");
        said.push_str(&String::from_utf8_lossy(&piece[..count]));
    }
}
