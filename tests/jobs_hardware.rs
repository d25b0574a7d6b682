//! The machines that jobs may get: firmware, disks, cards, networks; and that none of it touches the store.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use sha2::{Digest, Sha256};
use support::call::{BUILD_FAILURE, Try};
use support::guests::{debian, tiny};
use support::host::Host;
use support::job::Job;

const NOTHING: Vec<String> = Vec::new();
const EMULATION: &str = "[machine]\naccelerator = \"emulation\"\n";

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
fn a_guest_boots_with_uefi_from_every_kind_of_disk_and_card_and_the_store_stays_as_it_was() {
    let machine = "[machine]\naccelerator = \"emulation\"\nmemory = \"512M\"\n";
    let host = Host::new(&[], machine);
    let image = host.images().add("disk", &tiny().disk, &["--user", "root"]);
    let original = host.settings_text();
    let mut store = Vec::new();
    for (number, settings, script) in [
        (
            1,
            "firmware = \"bios\"\ndisk_bus = \"sata\"\nnic = \"e1000e\"\n",
            "[ -e /dev/sda ] && [ ! -e /dev/vda ] && [ ! -d /sys/firmware/efi ] && \
             readlink /sys/class/net/eth0/device/driver | grep -q e1000e\n",
        ),
        (
            2,
            "firmware = \"uefi\"\ndisk_bus = \"scsi\"\nmemory = \"1G\"\n",
            "[ -e /dev/sda ] && [ ! -e /dev/vda ] && [ -d /sys/firmware/efi ]\n",
        ),
    ] {
        let keys = if number == 2 {
            original.replace("memory = \"512M\"\n", "")
        } else {
            original.clone()
        };
        host.write_settings(&keys.replace("[machine]\n", &format!("[machine]\n{settings}")));
        let job = Try::new(&host, &Job::new("unit").image(&image), number);
        job.prepare().ok();
        let during = contents(&host.state().join("store"));
        job.script(script).ok();
        job.script("dd if=/dev/urandom of=/root/x bs=1M count=20 && sync\n")
            .ok();
        job.cleanup().ok();
        let after = contents(&host.state().join("store"));
        assert_eq!(during, after);
        if !store.is_empty() {
            assert_eq!(store, after);
        }
        store = after;
        assert_eq!(host.leftovers(), NOTHING);
    }
    assert!(store.iter().any(|line| line.contains("/disks/")), "{store:#?}");
}

#[test]
#[ignore = "needs libvirt and guests"]
fn a_debian_guest_fills_the_disk_that_the_job_asks_for() {
    let settings = "[machine]\naccelerator = \"emulation\"\nmemory = \"1G\"\n\
                    [limits]\ndisk = \"20G\"\n[guest]\nuser = \"ci\"\n";
    let host = Host::new(&[], settings);
    let image = host.images().add("debian", &debian(), &[]);
    let greedy = Job::new("unit").image(&image).variable("CANNERY_DISK", "30G");
    Try::new(&host, &greedy, 1)
        .prepare()
        .fails(BUILD_FAILURE, &["CANNERY_DISK=30G", "at most 20G"]);
    let job = Try::new(
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
    job.cleanup().ok();
    assert_eq!(host.leftovers(), NOTHING);
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

fn virsh(arguments: &[&str]) {
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
    let job = Try::new(&host, &Job::new("unit").image(&image), 1);
    job.prepare().fails(
        support::call::SYSTEM_FAILURE,
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
    job.cleanup().ok();
    assert_eq!(host.leftovers(), NOTHING);
}

/// virtlogd's own bound: four files of 2 MiB.
const MOST_SERIAL: u64 = 4 * (2 << 20);
