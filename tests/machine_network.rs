//! Our network on a real libvirt, with two tiny guests on it: who reaches whom.

// A test fails by panicking, in its helpers too, and tells what it saw.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cannery::machine::description::{
    Accelerator, Arch, Boot, CpuMode, Description, DiskBus, Firmware, Graphics, NicModel,
};
use cannery::machine::libvirt::Libvirt;
use cannery::machine::network::{HostPort, NetworkPlan, Protocol, Slot, firewall, provide, remove};
use cannery::machine::placement::{Backing, Format, FwCfgEntry, NetworkAttachment, Owner, Placement};
use cannery::machine::watch::{Judgement, State, judge, last_words};
use cannery::machine::{overlay, render, serial};
use uuid::Uuid;

const SYSTEM: &str = "qemu:///system";
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

fn plan(name: &str, bridge: &str, third: u8) -> NetworkPlan {
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
struct Site {
    folder: tempfile::TempDir,
    libvirt: Libvirt,
    tiny: PathBuf,
}

impl Site {
    fn new() -> Site {
        let folder = tempfile::tempdir().unwrap();
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
    async fn start(&self, name: &str, plan: &NetworkPlan, slot: &Slot, extra: &str) -> Guest {
        self.libvirt.destroy(name).await.unwrap();
        let job = self.folder.path().join(name);
        fs::create_dir_all(&job).unwrap();
        fs::copy(self.folder.path().join("key.pub"), job.join("authorized")).unwrap();
        let [kernel, initrd] = ["vmlinuz", "initrd"].map(|file| job.join(file));
        overlay::private_copy(&self.tiny.join("vmlinuz"), &kernel).unwrap();
        overlay::private_copy(&self.tiny.join("initrd"), &initrd).unwrap();
        let backing = Backing {
            path: self.tiny.join("root.qcow2"),
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

struct Guest {
    name: String,
    address: Ipv4Addr,
    key: PathBuf,
    serial_log: PathBuf,
    start: Instant,
}

/// Runs a command for its effect; what it had to remove may be gone already.
fn quietly(program: &str, arguments: &[&str]) {
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
struct Net {
    plan: NetworkPlan,
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
    fn run(&self, command: &str) -> (bool, String) {
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

    fn can(&self, command: &str) -> bool {
        let (done, said) = self.run(command);
        println!("{}: {command}: {done} {}", self.name, said.trim());
        done
    }

    fn wait(&self) {
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

fn ping(to: Ipv4Addr) -> String {
    format!("ping -c 2 -W 2 {to} >/dev/null 2>&1")
}

fn connect(to: Ipv4Addr, port: u16) -> String {
    format!("nc -w 2 {to} {port} </dev/null >/dev/null 2>&1")
}

/// A listener on all of the host's addresses that accepts for as long as the test runs.
fn listen() -> u16 {
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || listener.incoming().for_each(drop));
    port
}

#[tokio::test]
#[ignore = "needs libvirt, QEMU, nft as root and the tiny guest"]
async fn guests_reach_the_world_and_not_each_other() {
    let site = Site::new();
    let (open, shut) = (listen(), listen());
    let plan = NetworkPlan {
        host_ports: vec![HostPort {
            protocol: Protocol::Tcp,
            port: open,
        }],
        ..plan("machine_iso", "miso", 1)
    };
    remove(&site.libvirt, &plan, site.folder.path()).await.unwrap();
    provide(&site.libvirt, &plan, site.folder.path()).await.unwrap();
    let slots = plan.slots();
    let a = site.start("machine-iso-a", &plan, &slots[0], "").await;
    let b = site.start("machine-iso-b", &plan, &slots[1], "").await;
    a.wait();
    b.wait();
    let gateway = plan.gateway();

    // What a guest needs is there.
    assert!(a.run("ip -4 addr show").1.contains(&format!("{}/24", a.address)));
    assert!(a.can(&ping(gateway)));
    assert!(a.can(&format!("nslookup slot-1 {gateway} >/dev/null 2>&1")));
    assert!(a.can(&connect(gateway, open)));

    // The host's other services are not, under whatever address of the host.
    assert!(!a.can(&connect(gateway, shut)));
    let other = host_address();
    assert!(!a.can(&connect(other, shut)));

    // No other guest: directly …
    assert!(!a.can(&ping(b.address)));
    assert!(!a.can(&connect(b.address, 22)));
    // … nor through the gateway, which both ask to carry it.
    for (guest, peer) in [(&a, &b), (&b, &a)] {
        assert!(guest.can(&format!("ip route replace {} via {gateway}", peer.address)));
    }
    assert!(!a.can(&ping(b.address)));
    assert!(!a.can(&connect(b.address, 22)));

    // No address but its own: a free slot's …
    let free = slots[2].address;
    assert!(a.can(&format!("ip addr add {free}/24 dev eth0")));
    assert!(!a.can(&format!("ping -c 2 -W 2 -I {free} {gateway} >/dev/null 2>&1")));
    // … nor another MAC, tried behind the back of this connection.
    assert!(a.can(&format!(
        "(sleep 1; old=$(cat /sys/class/net/eth0/address)
          ip link set eth0 down; ip link set eth0 address {mac}; ip link set eth0 up
          ping -c 2 -W 2 {gateway} >/tmp/spoof 2>&1; echo $? >>/tmp/spoof
          ip link set eth0 down; ip link set eth0 address $old; ip link set eth0 up
          echo done >>/tmp/spoof) >/dev/null 2>&1 </dev/null &",
        mac = slots[2].mac
    )));
    std::thread::sleep(Duration::from_secs(8));
    a.wait();
    let spoof = a.run("cat /tmp/spoof").1;
    assert!(spoof.ends_with("1\ndone\n"), "{spoof}");

    // Without the firewall all of it works, so it was the firewall that prevented it.
    firewall::remove(&plan, site.folder.path()).await.unwrap();
    let direct = format!("ip route del {}; {}", b.address, ping(b.address));
    let without = [
        a.can(&connect(gateway, shut)),
        b.can(&format!("ip route del {}", a.address)),
        a.can(&direct),
    ];

    for guest in [&a, &b] {
        site.libvirt.destroy(&guest.name).await.unwrap();
    }
    remove(&site.libvirt, &plan, site.folder.path()).await.unwrap();
    assert_eq!(without, [true; 3]);
}

/// An address of the host on another interface than loopback and the test's bridge.
fn host_address() -> Ipv4Addr {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    // Nothing is sent: this only asks which address would be used.
    socket.connect("192.0.2.254:9").unwrap();
    match socket.local_addr().unwrap().ip() {
        std::net::IpAddr::V4(address) => address,
        std::net::IpAddr::V6(address) => panic!("{address} is no IPv4 address"),
    }
}

#[tokio::test]
#[ignore = "needs libvirt and nft as root"]
async fn a_network_is_made_once_and_then_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let libvirt = Libvirt::open(SYSTEM).unwrap();
    let plan = plan("machine_once", "monce", 2);
    remove(&libvirt, &plan, folder.path()).await.unwrap();

    let _net = Net { plan: plan.clone() };
    let first = provide(&libvirt, &plan, folder.path()).await.unwrap();
    assert!(first.started && first.firewall_loaded);
    let again = provide(&libvirt, &plan, folder.path()).await.unwrap();
    assert!(!again.started && !again.firewall_loaded);

    // Somebody empties a chain: it is put back, and the network is not touched.
    let flushed = Command::new("nft")
        .args(["flush", "chain", "bridge", "cannery_machine_once", "pass"])
        .status()
        .unwrap();
    assert!(flushed.success());
    let mended = provide(&libvirt, &plan, folder.path()).await.unwrap();
    assert!(!mended.started && mended.firewall_loaded);

    // Two callers at once after the network was stopped: one starts it.
    libvirt.remove_network(&plan.name).await.unwrap();
    let other = Libvirt::open(SYSTEM).unwrap();
    let (one, two) = tokio::join!(
        provide(&libvirt, &plan, folder.path()),
        provide(&other, &plan, folder.path())
    );
    assert_eq!(
        [one.unwrap().started, two.unwrap().started]
            .iter()
            .filter(|s| **s)
            .count(),
        1
    );

    // Another number of slots is not arranged behind the jobs' backs.
    let wider = NetworkPlan {
        slots: 5,
        ..plan.clone()
    };
    let error = provide(&libvirt, &wider, folder.path())
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("its number of slots is 3") && error.contains("cannery network down"),
        "{error}"
    );

    // Nor the same subnet under another name.
    let rival = NetworkPlan {
        name: "machine_rival".to_owned(),
        bridge: "mriv".to_owned(),
        ..plan.clone()
    };
    let error = provide(&libvirt, &rival, folder.path())
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("10.232.2.0/24 on monce"), "{error}");
    remove(&libvirt, &rival, folder.path()).await.unwrap();

    remove(&libvirt, &plan, folder.path()).await.unwrap();
    assert_eq!(libvirt.network(&plan.name).await.unwrap(), None);
    let listed = Command::new("nft").args(["list", "tables"]).output().unwrap();
    assert!(!String::from_utf8_lossy(&listed.stdout).contains("cannery_machine_"));
}

#[tokio::test]
#[ignore = "needs libvirt, QEMU, nft as root and the tiny guest"]
async fn a_guests_end_is_noticed_with_its_reason() {
    let site = Site::new();
    let plan = plan("machine_end", "mend", 3);
    remove(&site.libvirt, &plan, site.folder.path()).await.unwrap();
    provide(&site.libvirt, &plan, site.folder.path()).await.unwrap();
    let slots = plan.slots();
    let mut seen = Vec::new();
    for (slot, (command, state)) in slots.iter().zip([
        (
            "(sleep 1; echo c >/proc/sysrq-trigger) >/dev/null 2>&1 &",
            State::Crashed,
        ),
        ("(sleep 1; reboot -f) >/dev/null 2>&1 &", State::Gone),
        ("(sleep 1; poweroff -f) >/dev/null 2>&1 &", State::Gone),
    ]) {
        let guest = site
            .start(&format!("machine-end-{}", slot.index), &plan, slot, "")
            .await;
        guest.wait();
        assert!(guest.can(command));
        let asked = Instant::now();
        let mut states = vec![State::Running];
        while judge(states[states.len() - 1]) == Judgement::Alive && asked.elapsed() < Duration::from_secs(15)
        {
            tokio::time::sleep(Duration::from_millis(200)).await;
            states.push(site.libvirt.state(&guest.name).await.unwrap());
            states.dedup();
        }
        // virtlogd may still be writing.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let log = serial::tail(&guest.serial_log, 30, 1 << 16).unwrap();
        println!(
            "{}: {states:?} after {:?}: {:?}",
            guest.name,
            asked.elapsed(),
            last_words(&log)
        );
        site.libvirt.destroy(&guest.name).await.unwrap();
        seen.push((states.pop().unwrap(), state, last_words(&log)));
    }
    remove(&site.libvirt, &plan, site.folder.path()).await.unwrap();
    let words = [
        "its kernel panicked",
        "its guest rebooted",
        "its guest powered off",
    ];
    for ((now, expected, said), words) in seen.into_iter().zip(words) {
        assert!(
            now == expected || (expected == State::Gone && now == State::Ending),
            "{now:?}"
        );
        assert_eq!(said, Some(words));
    }
}
