//! The machines that jobs may get: firmware, disks, cards, networks; and that none of it touches the store.

// What was measured is shown to whoever runs the tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use sha2::{Digest, Sha256};
use support::guests::{debian, tiny};
use support::host::{EMULATION, Host, virsh};
use support::job::Job;
use support::stages::{BUILD_FAILURE, SYSTEM_FAILURE, Stages};

/// Every file below a folder with its owner, mode and content.
fn contents(folder: &Path) -> Vec<String> {
    let mut all = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let about = path.symlink_metadata().unwrap();
            let sum = if about.is_file() {
                hex::encode(Sha256::digest(fs::read(&path).unwrap()))
            } else {
                String::new()
            };
            all.push(format!(
                "{} {}:{} {:o} {sum}",
                path.display(),
                about.uid(),
                about.gid(),
                about.mode()
            ));
            if about.is_dir() {
                folders.push(path);
            }
        }
    }
    all.sort();
    all
}

#[test]
#[ignore = "needs libvirt and guests"]
fn a_guest_boots_with_bios_and_uefi_from_its_own_disk_and_the_store_stays_as_it_was() {
    let host = Host::new(&[], "");
    let image = host.images().add("disk", &tiny().disk, &["--user", "root"]);
    let original = host.settings_text();
    let mut stores = Vec::new();
    for (machine, script) in [
        (
            "firmware = \"bios\"\ndisk_bus = \"scsi\"\nmemory = \"512M\"\n",
            "[ -e /dev/sda ] && [ ! -e /dev/vda ] && [ ! -d /sys/firmware/efi ]\n",
        ),
        (
            "firmware = \"uefi\"\ndisk_bus = \"virtio\"\nmemory = \"1G\"\n",
            "[ -e /dev/vda ] && [ ! -e /dev/sda ] && [ -d /sys/firmware/efi ]\n",
        ),
    ] {
        host.write_settings(&format!("{original}{EMULATION}{machine}"));
        let job = Stages::new(&host, &image);
        job.prepare().ok();
        stores.push(contents(&host.state().join("store")));
        job.script(script).ok();
        job.script("dd if=/dev/urandom of=/root/x bs=1M count=20 && sync\n")
            .ok();
        job.cleans_up();
        stores.push(contents(&host.state().join("store")));
    }
    assert!(
        stores[0].iter().any(|line| line.contains("/disks/")),
        "{:#?}",
        stores[0]
    );
    for store in &stores[1..] {
        assert_eq!(*store, stores[0]);
    }
}

/// Debian's cloud kernels, which the guests have, know neither AHCI nor e1000e. So much can be seen with them: the
/// firmware loads a boot loader, kernel and initramfs from such a disk, and what the guest then misses is told.
#[test]
#[ignore = "needs libvirt and a guest"]
fn firmware_boots_from_a_sata_disk_and_a_guest_without_its_driver_is_told_from_one_that_is_slow() {
    let host = Host::new(
        &[],
        &format!("{EMULATION}memory = \"512M\"\ndisk_bus = \"sata\"\nnic = \"e1000e\"\n"),
    );
    let image = host.images().add("disk", &tiny().disk, &["--user", "root"]);
    let job = Stages::new(&host, &image);
    job.prepare().failed(
        SYSTEM_FAILURE,
        &[
            "The end of the guest's serial log:",
            "tiny: no disk carries a file system labelled tiny-root",
            "its guest powered off",
        ],
    );
    job.cleans_up();
}

#[test]
#[ignore = "needs libvirt and guests"]
fn a_debian_cloud_image_is_used_as_it_is_and_fills_the_disk_that_the_job_asks_for() {
    let settings = "[machine]\naccelerator = \"emulation\"\nmemory = \"1G\"\n\
                    [limits]\ndisk = \"20G\"\n[guest]\nuser = \"ci\"\n";
    let host = Host::new(&[], settings);
    // Nothing is put around it, and nothing said about it.
    fs::create_dir_all(host.images().folder()).unwrap();
    let file = host.images().folder().join("debian.qcow2");
    fs::copy(debian(), &file).unwrap();
    let image = format!("file://{}", file.display());
    let greedy = Job::new("unit").image(&image).variable("CANNERY_DISK", "30G");
    Stages::of(&host, &greedy, 1)
        .prepare()
        .failed(BUILD_FAILURE, &["CANNERY_DISK=30G", "at most 20G"]);
    let job = Stages::of(
        &host,
        &Job::new("unit").image(&image).variable("CANNERY_DISK", "8G"),
        1,
    );
    job.prepare().ok();
    let size = job
        .script("df --output=size -BM / | tail -n 1 | tr -d ' M'\n")
        .ok();
    let mebibytes: u64 = size.text().trim().parse().unwrap();
    assert!((7_600..=8_192).contains(&mebibytes), "{mebibytes}");
    let text =
        job.script("id -un; hostname; stat -c %U /builds /cache; systemctl is-system-running --wait\n");
    let text = text.text();
    assert!(text.starts_with("ci\njob-1\nci\nci\n"), "{text}");
    job.cleans_up();
}

/// A network of the operator's own, gone with the test.
struct ForeignNetwork(&'static str);

impl ForeignNetwork {
    fn start(name: &'static str, folder: &Path) -> Self {
        let file = folder.join("network.xml");
        fs::write(
            &file,
            format!(
                "<network><name>{name}</name><forward mode='nat'/><bridge name='{name}' stp='off' delay='0'/>\
                 <ip address='10.232.77.1' netmask='255.255.255.0'>\
                 <dhcp><range start='10.232.77.10' end='10.232.77.99'/></dhcp></ip></network>"
            ),
        )
        .unwrap();
        virsh(&["net-create", file.to_str().unwrap()]);
        Self(name)
    }
}

impl Drop for ForeignNetwork {
    fn drop(&mut self) {
        virsh(&["net-destroy", self.0]);
    }
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn kvm_is_used_only_where_it_was_seen_to_boot_a_guest_and_tried_once() {
    let host = Host::new(&[], "");
    let image = host.images().add_tiny("tiny", "");
    let kind = || {
        let xml = virsh(&["dumpxml", &host.machines()[0]]);
        ["kvm", "qemu"].map(|kind| xml.contains(&format!("<domain type='{kind}'")))
    };
    let first = Stages::new(&host, &image);
    let log = first.prepare().ok().log;
    eprintln!("{log}");
    let booted = log.contains("trying it") && !log.contains("starting again with emulation");
    assert_eq!(kind(), [booted, !booted], "{log}");
    first.script("true\n").ok();
    first.cleanup().ok();
    let second = Stages::new(&host, &image);
    let log = second.prepare().ok().log;
    assert!(!log.contains("trying it"), "{log}");
    assert_eq!(kind(), [booted, !booted], "{log}");
    second.cleans_up();
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn a_machine_on_a_network_of_the_operators_own_is_found_and_floods_no_log() {
    let host = Host::new(&[], EMULATION);
    let image = host.images().add_tiny("tiny", "");
    // Nothing of the tests' usual network but its heading.
    let text: String = host
        .settings_text()
        .lines()
        .filter(|line| {
            !["name =", "subnet =", "slots =", "host_ports ="]
                .iter()
                .any(|key| line.starts_with(key))
        })
        .map(|line| format!("{line}\n"))
        .collect();
    host.write_settings(&text.replace("[network]\n", "[network]\nlibvirt_network = \"flows-foreign\"\n"));
    let job = Stages::new(&host, &image);
    job.prepare().failed(
        SYSTEM_FAILURE,
        &["no network flows-foreign", "virsh net-start flows-foreign"],
    );
    let _network = ForeignNetwork::start("flows-foreign", host.folder());
    job.prepare().ok();
    let address = job.script("ip -4 addr show eth0\n").ok().text();
    assert!(address.contains("inet 10.232.77."), "{address}");

    // The guest's serial port takes what it is given; the host keeps the end of it.
    job.script("timeout 40 yes \"a line of a guest that will not stop\" >/dev/console; echo\n")
        .ok();
    std::thread::sleep(Duration::from_secs(1));
    let folder = fs::read_dir(host.state().join("jobs"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let kept: u64 = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("serial.log"))
        .map(|entry| entry.metadata().unwrap().len())
        .sum();
    eprintln!("{kept} bytes of the serial log are kept");
    assert!(
        kept > 100 << 10,
        "{kept}: the guest wrote nothing worth the name of a flood"
    );
    assert!(kept <= MOST_SERIAL, "{kept}");
    job.cleans_up();
}

/// virtlogd's own bound: four files of 2 MiB.
const MOST_SERIAL: u64 = 4 * (2 << 20);
