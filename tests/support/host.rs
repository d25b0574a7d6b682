//! A host with cannery on it: settings, state folder and network of the test's own, all removed at the end.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use super::guests::Layout;
use super::runner::Driver;

/// Settings for guests that boot everywhere: whether KVM works is for other tests to see.
pub const EMULATION: &str = "[machine]\naccelerator = \"emulation\"\n";

/// What one test has of the host.
#[derive(Debug)]
pub struct Host {
    folder: tempfile::TempDir,
    network: String,
    third: u8,
}

impl Host {
    /// A host whose guests may reach these TCP ports of it; `settings` are further lines of `cannery.toml`.
    pub fn new(ports: &[u16], settings: &str) -> Self {
        // One network a test process: processes that run side by side do not meet.
        Self::on(
            100 + u8::try_from(std::process::id() % 100).unwrap(),
            ports,
            settings,
        )
    }

    /// One of a few hosts that a test has at once; `number` is from 0.
    pub fn one_of_several(number: u8, settings: &str) -> Self {
        const SEVERAL: u8 = 5;
        let first = u8::try_from(std::process::id() % 11).unwrap() * SEVERAL;
        Self::on(200 + first + number % SEVERAL, &[], settings)
    }

    fn on(third: u8, ports: &[u16], settings: &str) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("cannery-test-")
            .tempdir()
            .unwrap();
        // QEMU's user must reach the disks.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let host = Self {
            folder,
            network: format!("cntest{third}"),
            third,
        };
        let ports: Vec<String> = ports.iter().map(|port| format!("\"tcp/{port}\"")).collect();
        let text = format!(
            "state_dir = \"{state}\"\n\
             log_file = \"{folder}/cannery.log\"\n\
             log_filter = \"cannery=debug\"\n\
             [images]\nlayouts = [\"{folder}/images\"]\nfiles = [\"{folder}/images\"]\n\
             [network]\nname = \"{network}\"\nsubnet = \"10.231.{third}.0/28\"\nslots = 6\nhost_ports = [{ports}]\n\
             {settings}\n",
            state = host.state().display(),
            folder = host.folder.path().display(),
            network = host.network,
            ports = ports.join(", "),
        );
        host.write_settings(&text);
        host
    }

    /// Replaces the settings.
    pub fn write_settings(&self, text: &str) {
        fs::write(self.settings(), text).unwrap();
    }

    /// The text of the settings.
    pub fn settings_text(&self) -> String {
        fs::read_to_string(self.settings()).unwrap()
    }

    /// The settings file.
    pub fn settings(&self) -> PathBuf {
        self.folder.path().join("cannery.toml")
    }

    /// The state folder.
    pub fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// The test's own folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The host's address on the guests' network.
    pub fn address(&self) -> std::net::IpAddr {
        [10, 231, self.third, 1].into()
    }

    /// The name of the guests' network.
    pub fn network(&self) -> &str {
        &self.network
    }

    /// The folder of images that jobs may name.
    pub fn images(&self) -> Layout {
        Layout::at(&self.folder.path().join("images"))
    }

    /// A call of cannery with these settings, for the test to finish.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(cannery());
        command
            .arg("--config")
            .arg(self.settings())
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    /// Calls cannery.
    pub fn cannery(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Calls cannery, which must succeed, and returns what it prints.
    pub fn expect(&self, arguments: &[&str]) -> String {
        let output = self.cannery(arguments);
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Makes the network, so that something may listen on [`Host::address`].
    pub fn with_network(self) -> Self {
        self.expect(&["network", "up"]);
        self
    }

    /// cannery as a runner's driver.
    pub fn driver(&self) -> Driver {
        let settings = self.settings();
        Driver::new(cannery(), &["--config", settings.to_str().unwrap()])
    }

    /// What is left of jobs: folders, slots, machines. Empty when all was cleaned up.
    pub fn leftovers(&self) -> Vec<String> {
        let names = |folder: PathBuf| {
            let entries = fs::read_dir(folder).into_iter().flatten();
            entries
                .map(|e| e.unwrap().path().display().to_string())
                .collect::<Vec<_>>()
        };
        let mut left = names(self.state().join("jobs"));
        left.extend(names(self.state().join("slots").join(&self.network)));
        left.extend(self.machines());
        left
    }

    /// What is in the making in the store; empty when no image is being fetched.
    pub fn downloads(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.state().join("store/partial"))
            .into_iter()
            .flatten();
        entries.map(|e| e.unwrap().path()).collect()
    }

    /// A copy of the program where every user may start it.
    pub fn program_for_all(&self) -> PathBuf {
        let copy = self.folder.path().join("cannery");
        if !copy.exists() {
            fs::copy(cannery(), &copy).unwrap();
            fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
        }
        copy
    }

    /// The names of the machines on this host's network, as `virsh` knows them.
    pub fn machines(&self) -> Vec<String> {
        let names = virsh(&["list", "--all", "--name"]);
        let on_network = |name: &&str| {
            // It may be gone by now.
            let xml = Command::new("virsh")
                .args(["-c", "qemu:///system", "dumpxml", name])
                .output()
                .unwrap();
            String::from_utf8_lossy(&xml.stdout).contains(self.network.as_str())
        };
        names
            .lines()
            .filter(|name| !name.is_empty())
            .filter(on_network)
            .map(str::to_owned)
            .collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let jobs = self.cannery(&["vm", "list", "--format", "json"]).stdout;
        let jobs: Vec<serde_json::Value> = serde_json::from_slice(&jobs).unwrap_or_default();
        for key in jobs.iter().filter_map(|job| job["key"].as_str()) {
            self.cannery(&["vm", "rm", key]);
        }
        self.cannery(&["network", "down"]);
        if std::thread::panicking() {
            let log = fs::read_to_string(self.folder.path().join("cannery.log")).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            eprintln!("the end of the operator's log:");
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }
}

/// The program under test.
pub fn cannery() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_cannery"))
}

/// What the host's libvirt says to `virsh`; fails the test where it refuses, unless that has failed already.
#[track_caller]
pub fn virsh(arguments: &[&str]) -> String {
    let output = Command::new("virsh")
        .args(["-c", "qemu:///system"])
        .args(arguments)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() || std::thread::panicking(),
        "virsh {arguments:?}: {said}"
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
