//! The libvirt thread, against libvirt's own test driver, which needs no daemon.

// A test fails by panicking, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::os::unix::fs::chown;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cannery::machine::libvirt::{Error, Libvirt};
use cannery::machine::watch::State;
use uuid::Uuid;

const OURS: &str = r#"<domain type="test"><name>cannery-t</name>
  <uuid>00000000-0000-4000-8000-000000000007</uuid>
  <metadata><c:machine xmlns:c="urn:cannery:machine:1" coordinator="0a1b" job="7" attempt="2" state="/state"/></metadata>
  <memory unit="MiB">64</memory><os><type>hvm</type></os></domain>"#;

const OURS_UUID: Uuid = Uuid::from_u128(0x00000000_0000_4000_8000_000000000007);

#[tokio::test]
async fn a_machine_is_made_found_and_ended() {
    let libvirt = Libvirt::open("test:///default").unwrap();
    assert_eq!(libvirt.state("cannery-t").await.unwrap(), State::Gone);
    libvirt
        .create("cannery-t", OURS_UUID, OURS.to_owned())
        .await
        .unwrap();
    assert_eq!(libvirt.state("cannery-t").await.unwrap(), State::Running);

    // The driver has a domain of its own, which is not in our list.
    let ours = libvirt.list_ours().await.unwrap();
    assert_eq!(ours.len(), 1);
    assert_eq!((ours[0].name.as_str(), ours[0].uuid), ("cannery-t", OURS_UUID));
    assert_eq!((ours[0].owner.job_id, ours[0].owner.attempt), (7, 2));
    assert_eq!(ours[0].owner.state_dir.to_str(), Some("/state"));

    let error = libvirt
        .create("cannery-t", OURS_UUID, OURS.to_owned())
        .await
        .unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("libvirt could not start machine cannery-t: "),
        "{error}"
    );
    assert!(libvirt.destroy("cannery-t").await.unwrap());
    assert!(!libvirt.destroy("cannery-t").await.unwrap());
    assert_eq!(libvirt.state("cannery-t").await.unwrap(), State::Gone);
    assert!(libvirt.list_ours().await.unwrap().is_empty());
}

#[tokio::test]
async fn versions_and_networks_are_told() {
    let libvirt = Libvirt::open("test:///default").unwrap();
    let versions = libvirt.version().await.unwrap();
    assert_eq!(versions.hypervisor, "TEST");
    assert_eq!(versions.libvirt.split('.').count(), 3);
    assert!(libvirt.network("default").await.unwrap().unwrap().active);
    assert_eq!(libvirt.network("none").await.unwrap(), None);
    libvirt.remove_network("none").await.unwrap();
}

#[tokio::test]
async fn many_callers_share_the_thread() {
    let libvirt = Libvirt::open("test:///default").unwrap();
    let calls = (0..50).map(|_| {
        let libvirt = libvirt.clone();
        tokio::spawn(async move { libvirt.state("test").await.unwrap() })
    });
    for call in calls.collect::<Vec<_>>() {
        assert_eq!(call.await.unwrap(), State::Running);
    }
}

#[tokio::test]
async fn an_absent_daemon_is_unreachable_and_says_where() {
    let uri = "qemu+unix:///system?socket=/nonexistent/libvirt-sock";
    let libvirt = Libvirt::open(uri).unwrap();
    let start = Instant::now();
    let error = libvirt.version().await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains(uri), "{error}");
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn a_nul_in_a_name_is_an_error_and_the_thread_lives_on() {
    let libvirt = Libvirt::open("test:///default").unwrap();
    // Whether the binding refuses or panics on it, the next call must be answered.
    assert!(libvirt.state("a\0b").await.is_err());
    assert_eq!(libvirt.state("test").await.unwrap(), State::Running);
}

/// The user that a daemon of our own runs as, so that it has nothing to do with the host's.
const NOBODY: u32 = 65534;

/// A libvirtd of our own, whose test driver stands behind a socket.
struct Daemon {
    child: Child,
}

impl Daemon {
    fn start(folder: &Path) -> Daemon {
        let socket = Daemon::socket(folder);
        let child = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "libvirtd"])
            .env("HOME", folder)
            .env("XDG_RUNTIME_DIR", folder)
            .env("XDG_CONFIG_HOME", folder)
            .env("XDG_CACHE_HOME", folder)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "libvirtd does not listen"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        Daemon { child }
    }

    fn socket(folder: &Path) -> std::path::PathBuf {
        folder.join("libvirt/libvirt-sock")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
#[ignore = "needs libvirtd, and root to run one of its own as nobody"]
async fn a_restarted_daemon_is_found_again() {
    let folder = tempfile::tempdir().unwrap();
    chown(folder.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    let uri = format!(
        "test+unix:///default?socket={}",
        Daemon::socket(folder.path()).display()
    );
    let libvirt = Libvirt::open(&uri).unwrap();

    let daemon = Daemon::start(folder.path());
    assert_eq!(libvirt.state("test").await.unwrap(), State::Running);
    drop(daemon);
    let error = libvirt.state("test").await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");

    let daemon = Daemon::start(folder.path());
    assert_eq!(libvirt.state("test").await.unwrap(), State::Running);
    // Killed and started between two calls, and while one is waiting for it.
    drop(daemon);
    let daemon = Daemon::start(folder.path());
    assert_eq!(libvirt.state("test").await.unwrap(), State::Running);
    drop(daemon);
    let waiting = {
        let libvirt = libvirt.clone();
        tokio::spawn(async move { libvirt.state("test").await })
    };
    tokio::time::sleep(Duration::from_millis(500)).await;
    let _daemon = Daemon::start(folder.path());
    assert_eq!(waiting.await.unwrap().unwrap(), State::Running);
}
