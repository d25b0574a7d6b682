//! Tiny guests on a network of the test's own, and their removal however the test ends.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cannery::machine::description::{
    Accelerator, Arch, Boot, CpuMode, Description, DiskBus, Firmware, Graphics, NicModel,
};
use cannery::machine::libvirt::Libvirt;
use cannery::machine::network::{NetworkPlan, Slot};
use cannery::machine::placement::{Backing, Format, FwCfgEntry, NetworkAttachment, Owner, Placement};
use cannery::machine::{overlay, render, serial};
use uuid::Uuid;

pub const SYSTEM: &str = "qemu:///system";
/// An emulated tiny guest answers after four seconds; a loaded machine takes longer.
const BOOT_DEADLINE: Duration = Duration::from_secs(90);

/// Where the tiny guest's files are; builds them where they are not.
fn tiny() -> PathBuf {
    let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/guests/tiny/build");
    let output = Command::new(build).stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    PathBuf::from(text.lines().last().unwrap())
}

pub fn plan(name: &str, bridge: &str, third: u8) -> NetworkPlan {
    NetworkPlan {
        name: name.to_owned(),
        bridge: bridge.to_owned(),
        subnet: [10, 232, third, 0].into(),
        prefix: 24,
        slots: 3,
        host_ports: vec![],
    }
}

/// A state folder with a user key in it.
pub struct Site {
    pub folder: tempfile::TempDir,
    pub libvirt: Libvirt,
    tiny: PathBuf,
}

impl Site {
    pub fn new() -> Site {
        Site::within(tempfile::tempdir().unwrap())
    }

    pub fn within(folder: tempfile::TempDir) -> Site {
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o711)).unwrap();
        let key = folder.path().join("key");
        let made = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-f"])
            .arg(&key)
            .status()
            .unwrap();
        assert!(made.success());
        Site {
            folder,
            libvirt: Libvirt::open(SYSTEM).unwrap(),
            tiny: tiny(),
        }
    }

    /// Starts a tiny guest on a slot.
    pub async fn start(&self, name: &str, plan: &NetworkPlan, slot: &Slot, extra: &str) -> Guest {
        self.libvirt.destroy(name).await.unwrap();
        let job = self.folder.path().join(name);
        fs::create_dir_all(&job).unwrap();
        fs::copy(self.folder.path().join("key.pub"), job.join("authorized")).unwrap();
        let [kernel, initrd] = ["vmlinuz", "initrd"].map(|file| job.join(file));
        overlay::private_copy(&self.tiny.join("vmlinuz"), &kernel).unwrap();
        overlay::private_copy(&self.tiny.join("initrd"), &initrd).unwrap();
        // QEMU's user may not be let into the checkout, so the disk is brought to where it is.
        let root = self.folder.path().join("root.qcow2");
        if !root.exists() {
            fs::copy(self.tiny.join("root.qcow2"), &root).unwrap();
        }
        let backing = Backing {
            path: root,
            format: Format::Qcow2,
        };
        overlay::create(&job.join("overlay"), &backing, 1 << 30, 512 << 20)
            .await
            .unwrap();
        serial::create(&job.join("serial.log")).unwrap();
        let cmdline = fs::read_to_string(self.tiny.join("cmdline")).unwrap();
        let offer = self
            .libvirt
            .offer(Arch::X86_64, Accelerator::Emulation)
            .await
            .unwrap()
            .unwrap();
        let description = Description {
            arch: Arch::X86_64,
            machine_type: offer.machine_type,
            accelerator: Accelerator::Emulation,
            cpus: 1,
            memory_mib: 256,
            cpu: CpuMode::Maximum,
            firmware: Firmware::Bios,
            disk_bus: DiskBus::Virtio,
            nic_model: Some(NicModel::Virtio),
            boot: Boot::Kernel {
                cmdline: format!("{cmdline} {extra}").trim().to_owned(),
            },
            seed_disk: false,
            graphics: Graphics::Spice,
        };
        let credential = |name: &str, file: &str| FwCfgEntry {
            name: name.to_owned(),
            path: job.join(file),
        };
        let placement = Placement {
            name: name.to_owned(),
            uuid: Uuid::new_v4(),
            title: None,
            owner: Owner {
                coordinator: "test".to_owned(),
                job_id: 1,
                attempt: 1,
                state_dir: self.folder.path().to_owned(),
            },
            mac: slot.mac,
            network: NetworkAttachment::Slot {
                network: plan.name.clone(),
                tap: slot.tap.clone(),
            },
            overlay: job.join("overlay"),
            backing: vec![backing],
            kernel: Some(kernel),
            initrd: Some(initrd),
            nvram: job.join("nvram"),
            serial_log: job.join("serial.log"),
            seed: None,
            credentials: vec![credential("ssh.authorized_keys.root", "authorized")],
        };
        let xml = render(&description, &placement).unwrap();
        let start = Instant::now();
        self.libvirt.create(name, placement.uuid, xml).await.unwrap();
        println!("{name}: created after {:?}", start.elapsed());
        Guest {
            name: name.to_owned(),
            address: slot.address,
            key: self.folder.path().join("key"),
            serial_log: placement.serial_log,
            start,
        }
    }
}

pub struct Guest {
    pub name: String,
    pub address: Ipv4Addr,
    key: PathBuf,
    pub serial_log: PathBuf,
    start: Instant,
}

/// Runs a command for its effect; what it had to remove may be gone already.
pub fn quietly(program: &str, arguments: &[&str]) {
    let _ = Command::new(program)
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}

impl Drop for Guest {
    fn drop(&mut self) {
        quietly("virsh", &["destroy", &self.name]);
    }
}

/// A network that is removed however the test ends.
pub struct Net {
    pub plan: NetworkPlan,
}

impl Drop for Net {
    fn drop(&mut self) {
        let name = &self.plan.name;
        quietly("virsh", &["net-destroy", name]);
        quietly("virsh", &["net-undefine", name]);
        for family in ["bridge", "inet"] {
            quietly("nft", &["delete", "table", family, &format!("cannery_{name}")]);
        }
    }
}

impl Guest {
    /// Runs a command in the guest; whether it succeeded, and what it said.
    pub fn run(&self, command: &str) -> (bool, String) {
        let output = Command::new("ssh")
            .args([
                "-q",
                "-o",
                "StrictHostKeyChecking=no",
                "-o",
                "UserKnownHostsFile=/dev/null",
            ])
            .args(["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-i"])
            .arg(&self.key)
            .arg(format!("root@{}", self.address))
            .arg(command)
            .output()
            .unwrap();
        // 255 is ssh's own: then nothing was learned.
        assert_ne!(
            output.status.code(),
            Some(255),
            "{}: no answer to {command}",
            self.name
        );
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
        )
    }

    pub fn can(&self, command: &str) -> bool {
        let (done, said) = self.run(command);
        println!("{}: {command}: {done} {}", self.name, said.trim());
        done
    }

    pub fn wait(&self) {
        let address = (self.address, 22).into();
        while std::net::TcpStream::connect_timeout(&address, Duration::from_millis(300)).is_err() {
            let log = serial::tail(&self.serial_log, 30, 1 << 16).unwrap();
            assert!(
                self.start.elapsed() < BOOT_DEADLINE,
                "{} does not answer:\n{log}",
                self.name
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        println!("{}: answers after {:?}", self.name, self.start.elapsed());
    }
}
