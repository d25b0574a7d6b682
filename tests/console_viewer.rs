//! `cannery console JOB` and the viewer that it starts: a script, at a machine that libvirt's own test driver would know.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use cannery::record::{Caller, JobDir, JobKey, Jobs, Machine, Record};
use cannery::ticket;
use jiff::Timestamp;
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
