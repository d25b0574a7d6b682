//! A user who is not root, beside root: one state folder, one store, one network, and everyone cleans up after everyone.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use support::host::Host;
use support::libvirtd::Libvirtd;
use support::stages::{BUILD_FAILURE, SYSTEM_FAILURE, Stages, as_user};

/// An account of this host for as long as a test runs, in the groups that it needs.
struct Account {
    name: &'static str,
    made_group: bool,
}

fn done(program: &str, arguments: &[&str]) -> bool {
    Command::new(program).args(arguments).status().unwrap().success()
}

impl Account {
    fn new(name: &'static str, groups: &str) -> Self {
        let made_group = !done("getent", &["group", "cannery"]);
        if made_group {
            assert!(done("groupadd", &["--system", "cannery"]));
        }
        // One that a killed test left behind.
        if done("getent", &["passwd", name]) {
            assert!(done("userdel", &[name]));
        }
        let options = [
            "--system",
            "--user-group",
            "--no-create-home",
            "--shell",
            "/bin/sh",
        ];
        assert!(done(
            "useradd",
            &[&options[..], &["--groups", groups, name]].concat()
        ));
        Self { name, made_group }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        done("userdel", &[self.name]);
        if self.made_group {
            done("groupdel", &["cannery"]);
        }
    }
}

fn group_of(path: &Path) -> String {
    let output = Command::new("stat")
        .args(["-c", "%G"])
        .arg(path)
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Every file of the store with its owner, mode and length.
fn files(dir: &Path) -> Vec<(PathBuf, u32, u32, u64)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let about = path.metadata().unwrap();
        if about.is_dir() {
            all.extend(files(&path));
        } else {
            all.push((path, about.uid(), about.mode() & 0o7777, about.len()));
        }
    }
    all.sort();
    all
}

#[test]
#[ignore = "needs root, a libvirtd of its own and a guest"]
fn root_and_a_user_share_the_host_and_clean_up_after_each_other() {
    let account = Account::new("cannery-test", "cannery,libvirt");
    let daemon = Libvirtd::start();
    let host = Host::new(&[], &format!("[libvirt]\nuri = \"{}\"", daemon.uri()));
    let image = host.images().add_tiny("tiny", "");
    let state = host.state();

    // Before root was there once, the user is told what root must do.
    let early = Stages::new(&host, &image).by(account.name).prepare();
    early.failed(
        SYSTEM_FAILURE,
        &["state", "Permission denied", "first call as root"],
    );

    host.expect(&["network", "up"]);
    assert_eq!(group_of(&state), "cannery");
    assert_eq!(group_of(&host.folder().join("cannery.log")), "cannery");

    // The user pulls the image, and runs a job from beginning to end.
    let mine = Stages::new(&host, &image).by(account.name);
    mine.config().ok();
    mine.prepare().ok();
    let run = mine.script("echo \"as $(id -un) on $(hostname)\"").ok().text();
    assert!(run.contains("as root on job-"), "{run}");
    mine.script("exit 7").failed_script(7, &mine);
    let stored = files(&state.join("store/disks"));
    assert!(!stored.is_empty());
    for (path, owner, mode, _) in &stored {
        assert_ne!(*owner, 0, "{}", path.display());
        assert_eq!(*mode, 0o444, "{}", path.display());
    }

    // Root uses the user's image beside the user's machine, and removes that machine.
    let roots = Stages::new(&host, &image);
    let log = roots.prepare().ok().log;
    assert!(log.contains("in the cache"), "{log}");
    assert_eq!(daemon.machines().len(), 2);
    let list = as_user(account.name, &host.program_for_all())
        .arg("--config")
        .arg(host.settings())
        .args(["vm", "list"])
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&list.stdout).lines().count(),
        3,
        "{list:?}"
    );
    let mine = mine.by_root();
    mine.cleanup().ok();
    assert_eq!(daemon.machines().len(), 1);

    // And the user removes root's.
    let roots = roots.by(account.name);
    roots.cleans_up();
    assert_eq!(daemon.machines(), Vec::<String>::new());
    assert_eq!(files(&state.join("store/disks")), stored);
}

#[test]
#[ignore = "needs root, a libvirtd of its own and a guest"]
fn a_user_is_told_what_only_root_can_do_and_sweeps_what_root_left_half_done() {
    let account = Account::new("cannery-test", "cannery,libvirt");
    let daemon = Libvirtd::start();
    let host = Host::new(&[], &format!("[libvirt]\nuri = \"{}\"", daemon.uri()));
    // The serial log of a guest that never answers is shown to the user too.
    let image = host.images().add_tiny("deaf", "tiny.sshd=off");
    let text = host.settings_text() + "[guest]\nboot_timeout = \"40 s\"\n";
    host.write_settings(&text);

    // Root made the state folder, but not the network.
    host.expect(&["vm", "list"]);
    let job = Stages::new(&host, &image).by(account.name);
    job.prepare().failed(
        SYSTEM_FAILURE,
        &["firewall", "only root can load it", "network up"],
    );
    job.cleans_up();

    host.expect(&["network", "up"]);
    // Root makes the store, with an image that is not there; and a pull by root is killed half-way.
    let missing = format!("oci:{}:none", host.images().folder().display());
    let roots = Stages::new(&host, &missing);
    roots.prepare().failed(BUILD_FAILURE, &["none"]);
    roots.cleans_up();
    let (partial, hex) = (host.state().join("store/partial"), "ab".repeat(32));
    let half = partial.join(&hex);
    fs::create_dir(&half).unwrap();
    fs::set_permissions(&half, fs::Permissions::from_mode(0o2775)).unwrap();
    fs::write(half.join("disk.raw"), "half").unwrap();
    fs::write(partial.join(format!("{hex}.lock")), "").unwrap();

    job.prepare().failed(
        SYSTEM_FAILURE,
        &["no SSH server, as asked", "The end of the guest's serial log"],
    );
    job.cleans_up();
}

#[test]
#[ignore = "needs root and a libvirtd of its own"]
fn a_user_whom_libvirt_does_not_know_is_told_about_its_group() {
    let account = Account::new("cannery-test", "cannery");
    let daemon = Libvirtd::start();
    let host = Host::new(&[], &format!("[libvirt]\nuri = \"{}\"", daemon.uri())).with_network();
    let image = host.images().add_tiny("tiny", "");
    let job = Stages::new(&host, &image).by(account.name);
    job.prepare()
        .failed(SYSTEM_FAILURE, &["libvirt at", "the group libvirt"]);
    job.by_root().cleans_up();
}
