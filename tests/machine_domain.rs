//! Machines on a real libvirt and QEMU. No guest system is needed: the firmware finds nothing to start and waits.

#![allow(clippy::unwrap_used, clippy::panic)] // a test fails by panicking, in its helpers too

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use cannery::machine::description::{
    Accelerator, Arch, Boot, CpuMode, Description, DiskBus, Firmware, Graphics, NicModel,
};
use cannery::machine::libvirt::Libvirt;
use cannery::machine::placement::{Backing, Format, FwCfgEntry, Mac, NetworkAttachment, Owner, Placement};
use cannery::machine::watch::State;
use cannery::machine::xml::Node;
use cannery::machine::{NetworkPlan, overlay, render, serial, xml};
use sha2::{Digest, Sha256};
use uuid::Uuid;

const SYSTEM: &str = "qemu:///system";

/// A job's and a store's folder, a network, and the machine's removal at the end.
struct Stage {
    folder: tempfile::TempDir,
    libvirt: Libvirt,
    network: NetworkPlan,
    description: Description,
    placement: Placement,
}

impl Stage {
    async fn set(tag: &str, third: u8, change: impl FnOnce(&mut Description)) -> Stage {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o711)).unwrap();
        for name in ["store", "job"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let libvirt = Libvirt::open(SYSTEM).unwrap();
        let network = NetworkPlan {
            name: format!("machine_{tag}"),
            bridge: format!("mt{tag}"),
            subnet: [10, 231, third, 0].into(),
            prefix: 24,
            slots: 2,
            host_ports: vec![],
        };
        network.check().unwrap();
        // What an earlier run left behind when it failed.
        libvirt.destroy(&format!("machine-{tag}")).await.unwrap();
        libvirt.remove_network(&network.name).await.unwrap();
        libvirt
            .define_network(&network.name, xml::network::render(&network).unwrap())
            .await
            .unwrap();
        libvirt.start_network(&network.name).await.unwrap();

        let offer = libvirt
            .offer(Arch::X86_64, Accelerator::Emulation)
            .await
            .unwrap()
            .unwrap();
        let mut description = Description {
            arch: Arch::X86_64,
            machine_type: offer.machine_type,
            accelerator: Accelerator::Emulation,
            cpus: 1,
            memory_mib: 128,
            cpu: CpuMode::Maximum,
            firmware: Firmware::Bios,
            disk_bus: DiskBus::Virtio,
            nic_model: Some(NicModel::Virtio),
            boot: Boot::Disk,
            seed_disk: true,
            graphics: Graphics::Spice,
        };
        change(&mut description);
        let placement = place(tag, folder.path(), &network);
        Stage {
            folder,
            libvirt,
            network,
            description,
            placement,
        }
    }

    fn store(&self, name: &str) -> PathBuf {
        self.folder.path().join("store").join(name)
    }

    /// Makes the store's and the job's files and starts the machine.
    async fn raise(&self) {
        let job = self.folder.path().join("job");
        for (name, size) in [("disk.raw", 8 << 20), ("vmlinuz", 1 << 20)] {
            let path = self.store(name);
            let file = fs::File::create(&path).unwrap();
            file.set_len(size).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
        }
        fs::write(job.join("seed.img"), [0; 4096]).unwrap();
        fs::write(job.join("secret"), "secret").unwrap();
        fs::set_permissions(job.join("secret"), fs::Permissions::from_mode(0o600)).unwrap();
        serial::create(&self.placement.serial_log).unwrap();
        overlay::create(
            &self.placement.overlay,
            &self.placement.backing[0],
            16 << 20,
            8 << 20,
        )
        .await
        .unwrap();
        if let Some(kernel) = &self.placement.kernel {
            overlay::private_copy(&self.store("vmlinuz"), kernel).unwrap();
        }
        let xml = render(&self.description, &self.placement).unwrap();
        self.libvirt
            .create(&self.placement.name, self.placement.uuid, xml)
            .await
            .unwrap();
    }

    async fn strike(&self) {
        self.libvirt.destroy(&self.placement.name).await.unwrap();
        self.libvirt.remove_network(&self.network.name).await.unwrap();
    }
}

fn place(tag: &str, folder: &Path, network: &NetworkPlan) -> Placement {
    let job = folder.join("job");
    let slot = network.slots().remove(1);
    Placement {
        name: format!("machine-{tag}"),
        uuid: Uuid::new_v4(),
        title: Some("a <b> & 'c'".to_owned()),
        owner: Owner {
            coordinator: "test".to_owned(),
            job_id: 1,
            attempt: 1,
            state_dir: folder.to_owned(),
        },
        mac: slot.mac,
        network: NetworkAttachment::Slot {
            network: network.name.clone(),
            tap: slot.tap,
        },
        overlay: job.join("overlay.qcow2"),
        backing: vec![Backing {
            path: folder.join("store/disk.raw"),
            format: Format::Raw,
        }],
        kernel: None,
        initrd: None,
        nvram: job.join("nvram.fd"),
        serial_log: job.join("serial.log"),
        seed: Some(job.join("seed.img")),
        credentials: vec![FwCfgEntry {
            name: "test.secret".to_owned(),
            path: job.join("secret"),
        }],
    }
}

/// Every `<address>` of a tree with the path of its owner, sorted.
fn addresses(tree: &Node) -> Vec<String> {
    let mut all = Vec::new();
    for device in &tree.first("devices").unwrap().children {
        for address in device.all("address") {
            let mut attributes: Vec<String> = address
                .attributes
                .iter()
                .map(|(key, value)| format!("{key}={value}"))
                .collect();
            attributes.sort();
            all.push(format!("{} {}", device.name, attributes.join(" ")));
        }
    }
    all.sort();
    all
}

/// What a test changes of the ordinary machine.
type Change = fn(&mut Description);

/// The tag of each device.
fn kinds(tree: &Node) -> Vec<String> {
    let devices = &tree.first("devices").unwrap().children;
    devices.iter().map(|device| device.name.clone()).collect()
}

/// Owner, mode and content of each of the store's files.
fn portrait(store: &Path) -> Vec<(PathBuf, u32, u32, u32, Vec<u8>)> {
    let mut all: Vec<_> = fs::read_dir(store)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let about = path.metadata().unwrap();
            let hash = Sha256::digest(fs::read(&path).unwrap()).to_vec();
            (path, about.uid(), about.gid(), about.mode(), hash)
        })
        .collect();
    all.sort();
    all
}

#[tokio::test]
#[ignore = "needs libvirt and QEMU"]
async fn libvirt_adds_no_address_of_its_own() {
    let variants: [(&str, Change); 4] = [
        ("a0", |_| {}),
        ("a1", |d| d.disk_bus = DiskBus::Sata),
        ("a2", |d| {
            d.disk_bus = DiskBus::Scsi;
            d.nic_model = Some(NicModel::E1000e);
        }),
        ("a3", |d| {
            d.graphics = Graphics::None;
            d.cpu = CpuMode::Named("qemu64".to_owned());
        }),
    ];
    for (n, (tag, change)) in (1u8..).zip(variants) {
        let stage = Stage::set(tag, n, change).await;
        stage.raise().await;
        let ours = Node::parse(&render(&stage.description, &stage.placement).unwrap()).unwrap();
        let text = stage.libvirt.migratable_xml(&stage.placement.name).await.unwrap();
        let theirs = Node::parse(&text).unwrap();
        stage.strike().await;
        assert_eq!(addresses(&ours), addresses(&theirs), "{text}");
        // Nor a device more; what it leaves out (a keyboard, silence) it has for older libvirts' sake.
        let mut unmatched = kinds(&ours);
        for kind in kinds(&theirs).into_iter().filter(|kind| kind != "emulator") {
            let place = unmatched.iter().position(|other| *other == kind);
            unmatched.remove(place.unwrap_or_else(|| panic!("a {kind} more: {text}")));
        }
    }
}

#[tokio::test]
#[ignore = "needs libvirt and QEMU"]
async fn the_stores_files_stay_as_they_are_and_the_jobs_files_the_callers() {
    let kernel = |d: &mut Description| {
        d.boot = Boot::Kernel {
            cmdline: "quiet".to_owned(),
        }
    };
    let mut stage = Stage::set("s", 20, kernel).await;
    stage.placement.kernel = Some(stage.folder.path().join("job/vmlinuz"));
    stage.raise().await;
    let store = stage.folder.path().join("store");
    let before = portrait(&store);
    assert_eq!(before.len(), 2);
    let me = store.metadata().unwrap().uid();
    assert!(before.iter().all(|(_, uid, ..)| *uid == me));

    // QEMU dies as if the kernel had killed it.
    let pid = fs::read_to_string(format!("/run/libvirt/qemu/{}.pid", stage.placement.name)).unwrap();
    let killed = std::process::Command::new("kill")
        .args(["-9", pid.trim()])
        .status()
        .unwrap();
    assert!(killed.success());
    let mut state = State::Running;
    for _ in 0..100 {
        state = stage.libvirt.state(&stage.placement.name).await.unwrap();
        if state == State::Gone {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(state, State::Gone);
    assert_eq!(portrait(&store), before);

    // Once more, ended in the ordinary way; the job's files are there to be read and removed.
    stage.raise().await;
    assert!(stage.libvirt.destroy(&stage.placement.name).await.unwrap());
    assert_eq!(portrait(&store), before);
    for name in ["serial.log", "overlay.qcow2", "secret", "vmlinuz"] {
        let about = stage.folder.path().join("job").join(name).metadata().unwrap();
        assert_eq!(about.uid(), me, "{name}");
    }
    let log = fs::metadata(&stage.placement.serial_log).unwrap();
    assert_eq!(log.permissions().mode() & 0o777, 0o640);
    stage.strike().await;
}

#[tokio::test]
#[ignore = "needs libvirt and QEMU"]
async fn a_secret_is_nowhere_in_qemus_command_line() {
    let stage = Stage::set("f", 30, |_| {}).await;
    stage.raise().await;
    let pid = fs::read_to_string(format!("/run/libvirt/qemu/{}.pid", stage.placement.name)).unwrap();
    let command = fs::read(format!("/proc/{}/cmdline", pid.trim())).unwrap();
    let command = String::from_utf8_lossy(&command).replace('\0', " ");
    stage.strike().await;
    assert!(
        command.contains("opt/io.systemd.credentials/test.secret"),
        "{command}"
    );
    assert!(!command.contains("string=secret"), "{command}");
}

#[tokio::test]
#[ignore = "needs libvirt, QEMU and OVMF"]
async fn uefi_machines_start_and_keep_their_variables_in_the_job() {
    for (n, (tag, secure_boot)) in (40u8..).zip([("u0", false), ("u1", true)]) {
        let stage = Stage::set(tag, n, |d| d.firmware = Firmware::Uefi { secure_boot }).await;
        stage.raise().await;
        let text = stage.libvirt.migratable_xml(&stage.placement.name).await.unwrap();
        let state = stage.libvirt.state(&stage.placement.name).await.unwrap();
        let ours = Node::parse(&render(&stage.description, &stage.placement).unwrap()).unwrap();
        stage.strike().await;
        assert_eq!(state, State::Running);
        assert!(stage.placement.nvram.exists());
        let secure = if secure_boot {
            "secure='yes'"
        } else {
            "secure='no'"
        };
        assert!(text.contains(secure) || !secure_boot, "{text}");
        assert_eq!(
            addresses(&ours),
            addresses(&Node::parse(&text).unwrap()),
            "{text}"
        );
    }
}

#[tokio::test]
#[ignore = "needs libvirt and QEMU"]
async fn the_reaper_finds_its_machines() {
    let stage = Stage::set("r", 50, |_| {}).await;
    stage.raise().await;
    let ours = stage.libvirt.list_ours().await.unwrap();
    let found = ours
        .iter()
        .find(|known| known.uuid == stage.placement.uuid)
        .cloned();
    let mac: Mac = stage.placement.mac;
    let addresses = stage.libvirt.addresses(&stage.placement.name, mac).await.unwrap();
    stage.strike().await;
    let found = found.unwrap();
    assert_eq!(
        (found.name, found.owner),
        (stage.placement.name.clone(), stage.placement.owner.clone())
    );
    assert_eq!(addresses, Vec::<std::net::IpAddr>::new());
}

#[tokio::test]
#[ignore = "needs libvirt and QEMU"]
async fn a_screen_is_seen_keys_reach_it_and_its_console_opens_though_it_listens_nowhere() {
    let stage = Stage::set("sc", 7, |_| {}).await;
    stage.raise().await;
    let (libvirt, name) = (&stage.libvirt, &stage.placement.name);
    // The firmware takes a second or two to write its words, and ends with a line that says that it found nothing to start.
    let quiet = settled(libvirt, name).await;
    assert!(quiet.starts_with(b"\x89PNG\r\n\x1a\n"));

    let descriptor = libvirt.open_graphics(name).await.unwrap();
    let reply = tokio::task::spawn_blocking(move || link(descriptor))
        .await
        .unwrap();
    assert_eq!(&reply[..4], b"REDQ");
    let listening = std::process::Command::new("virsh")
        .args(["-c", SYSTEM, "domdisplay", name])
        .output()
        .unwrap();
    assert!(!String::from_utf8_lossy(&listening.stdout).contains("spice://"));

    // The firmware starts anew on this chord, and a machine of ours that would start anew ends.
    libvirt
        .send_key(name, &"ctrl-alt-del".parse().unwrap())
        .await
        .unwrap();
    let ended = async {
        while libvirt.state(name).await.unwrap() != State::Gone {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), ended)
        .await
        .unwrap();
    let error = libvirt.screenshot(name).await.unwrap_err();
    assert_eq!(error.to_string(), format!("libvirt knows no machine {name}"));
    stage.strike().await;

    let blind = Stage::set("sd", 8, |d| d.graphics = Graphics::None).await;
    blind.raise().await;
    let (libvirt, name) = (&blind.libvirt, &blind.placement.name);
    for error in [
        libvirt.screenshot(name).await.map(drop).unwrap_err(),
        libvirt.open_graphics(name).await.map(drop).unwrap_err(),
        libvirt.send_key(name, &"a".parse().unwrap()).await.unwrap_err(),
    ] {
        assert_eq!(error.to_string(), format!("machine {name} has no screen"));
    }
    blind.strike().await;
}

/// The screen once two pictures a second apart are as good as the same, and not empty.
async fn settled(libvirt: &Libvirt, name: &str) -> Vec<u8> {
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    let mut last = 0usize;
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = libvirt.screenshot(name).await.unwrap();
        if last > 3000 && last.abs_diff(now.len()) < 100 {
            return now;
        }
        last = now.len();
        assert!(
            std::time::Instant::now() < deadline,
            "the screen does not come to rest"
        );
    }
}

/// Begins SPICE's link on a connection, and what the server answers first.
fn link(descriptor: std::os::fd::OwnedFd) -> Vec<u8> {
    use std::io::{Read, Write};
    let mut stream = std::os::unix::net::UnixStream::from(descriptor);
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    // Magic, version 2.2, the length of the rest; then session 0, channel main, no capabilities, which would stand at byte 18.
    let mut message = b"REDQ".to_vec();
    for number in [2u32, 2, 18, 0] {
        message.extend(number.to_le_bytes());
    }
    message.extend([1, 0]);
    for number in [0u32, 0, 18] {
        message.extend(number.to_le_bytes());
    }
    stream.write_all(&message).unwrap();
    let mut reply = vec![0; 16];
    stream.read_exact(&mut reply).unwrap();
    reply
}
