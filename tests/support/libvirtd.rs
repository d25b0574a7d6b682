//! A second libvirtd beside the host's own, for tests that need one to themselves.
//!
//! It runs in a mount namespace in which everything that a libvirtd keeps (state, configuration, sockets, networks) is empty and
//! its own; only its socket lies in a folder that others see. Processes and network devices are the host's.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Time to its first answer. It asks QEMU what it can do unless the host's libvirtd has already.
const START_DEADLINE: Duration = Duration::from_secs(120);

/// Runs as the namespace's first process; `$1` is the folder. What the host's libvirtd knows about QEMU is copied, since asking
/// takes long.
const START: &str = r#"
set -e
mkdir "$1/etc" "$1/cache"
cp /etc/libvirt/*.conf "$1/etc"
cp -a /var/cache/libvirt/. "$1/cache"
for folder in /run/libvirt /var/lib/libvirt /etc/libvirt /var/cache/libvirt; do
    mount -t tmpfs -o mode=0755 tmpfs "$folder"
done
cp "$1"/etc/* /etc/libvirt
cp -a "$1/cache/." /var/cache/libvirt
cat >"$1/libvirtd.conf" <<END
unix_sock_dir = "$1"
unix_sock_group = "libvirt"
unix_sock_rw_perms = "0770"
auth_unix_rw = "none"
END
virtlogd --pid-file "$1/virtlogd.pid" &
exec libvirtd --config "$1/libvirtd.conf" --pid-file "$1/libvirtd.pid"
"#;

/// A running libvirtd; it ends with this value, which must outlive its machines.
#[derive(Debug)]
pub struct Libvirtd {
    child: Child,
    folder: tempfile::TempDir,
}

impl Libvirtd {
    /// Starts one; its socket is for root and the group `libvirt`.
    pub fn start() -> Self {
        let folder = tempfile::Builder::new()
            .prefix("cannery-libvirtd-")
            .tempdir()
            .unwrap();
        super::everybody_may_pass(folder.path());
        let log = File::create(folder.path().join("log")).unwrap();
        let child = Command::new("unshare")
            .args([
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                START,
                "libvirtd",
            ])
            .arg(folder.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let daemon = Self { child, folder };
        let begin = Instant::now();
        while !daemon.virsh(&["version"]).1 {
            assert!(
                begin.elapsed() < START_DEADLINE,
                "libvirtd does not answer: {}",
                fs::read_to_string(daemon.folder.path().join("log")).unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
        daemon
    }

    /// Its address.
    pub fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.socket().display())
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("libvirt-sock")
    }

    /// What it says to a command of virsh, and whether it did it.
    pub fn virsh(&self, arguments: &[&str]) -> (String, bool) {
        let output = Command::new("virsh")
            .args(["-c", &self.uri()])
            .args(arguments)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        (text, output.status.success())
    }

    /// The names of its machines.
    pub fn machines(&self) -> Vec<String> {
        let (names, done) = self.virsh(&["list", "--all", "--name"]);
        assert!(done, "virsh cannot list machines");
        names.lines().map(str::to_owned).collect()
    }

    /// Ends it, and leaves its socket there without an answer. Its machines go on.
    pub fn stop(&mut self) {
        end(&self.folder.path().join("libvirtd.pid"));
        self.child.wait().unwrap();
    }
}

impl Drop for Libvirtd {
    fn drop(&mut self) {
        self.stop();
        end(&self.folder.path().join("virtlogd.pid"));
    }
}

/// Asks the process that wrote this file to end; one that has already took the file with it.
fn end(pid_file: &Path) {
    if let Ok(pid) = fs::read_to_string(pid_file) {
        Command::new("kill").arg(pid.trim()).status().unwrap();
    }
}
