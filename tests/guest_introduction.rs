//! What carries the introduction, read by the programs that guests read it with.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::Command;

use cannery::guest::introduction::Introduction;
use cannery::guest::keys::JobKeys;

const MACHINE_ID: &str = "0123456789abcdef0123456789abcdef";

fn introduction(user: &str, keys: &JobKeys) -> Introduction {
    let (user_key, host_key) = (keys.user.public().clone(), keys.host.clone());
    Introduction::new(user, user_key, host_key, "job-1", MACHINE_ID).unwrap()
}

/// Carries out the lines in `root` as a booting guest does, and returns what was said.
fn tmpfiles(introduction: &Introduction, root: &Path) -> String {
    let credentials = introduction.credentials();
    let lines = credentials.iter().find(|c| c.name == "tmpfiles.extra").unwrap();
    let file = root.join("extra.conf");
    fs::write(&file, lines.content.reveal()).unwrap();
    let output = Command::new("systemd-tmpfiles")
        .arg("--create")
        .arg(format!("--root={}", root.display()))
        .arg(&file)
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
#[ignore = "needs root and systemd-tmpfiles"]
fn systemd_appends_roots_key_and_replaces_the_host_key() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    for (name, text) in [
        ("root/.ssh/authorized_keys", "old\n"),
        ("etc/ssh/ssh_host_ed25519_key", "old"),
    ] {
        fs::create_dir_all(at(name).parent().unwrap()).unwrap();
        fs::write(at(name), text).unwrap();
    }
    let keys = JobKeys::generate().unwrap();
    let said = tmpfiles(&introduction("root", &keys), root.path());
    let read = |name: &str| fs::read_to_string(at(name)).unwrap();
    let expected = format!("old\n{}\n", keys.user.public());
    assert_eq!(read("root/.ssh/authorized_keys"), expected, "{said}");
    let host = "etc/ssh/ssh_host_ed25519_key";
    assert_eq!(read(host), keys.host.private().reveal(), "{said}");
    assert_eq!(
        read(&format!("{host}.pub")),
        format!("{}\n", keys.host.public()),
        "{said}"
    );
}

#[test]
#[ignore = "needs root and systemd-tmpfiles"]
fn systemd_gives_another_user_a_key_of_its_own() {
    let root = tempfile::tempdir().unwrap();
    let keys = JobKeys::generate().unwrap();
    fs::create_dir_all(root.path().join("etc")).unwrap();
    fs::write(
        root.path().join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nci:x:4321:4321::/home/ci:/bin/sh\n",
    )
    .unwrap();
    let said = tmpfiles(&introduction("ci", &keys), root.path());
    let file = root.path().join("home/ci/.ssh/authorized_keys");
    let text = fs::read_to_string(&file).expect(&said);
    assert_eq!(text, format!("{}\n", keys.user.public()));
    for path in [file.as_path(), file.parent().unwrap()] {
        use std::os::unix::fs::MetadataExt;
        assert_eq!(fs::metadata(path).unwrap().uid(), 4321, "{said}");
    }
}

#[test]
#[ignore = "needs blkid and mtools"]
fn the_seed_disk_is_found_by_its_label_and_read_by_others() {
    let folder = tempfile::tempdir().unwrap();
    let seed = folder.path().join("seed");
    let keys = JobKeys::generate().unwrap();
    introduction("ci", &keys).write_seed(&seed).unwrap();
    let run = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output().unwrap();
        assert!(output.status.success(), "{program}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let seed = seed.to_str().unwrap();
    assert_eq!(
        run("/sbin/blkid", &["-p", "-o", "value", "-s", "LABEL", seed]).trim(),
        "CIDATA"
    );
    let text = run("mtype", &["-i", seed, "::user-data"]);
    assert!(text.starts_with("#cloud-config\n") && text.contains(&keys.user.public().to_string()));
}
