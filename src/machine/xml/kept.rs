//! Descriptions of machines that somebody keeps: read to publish their disk, written for one made of an image.

use std::path::{Path, PathBuf};

use super::super::description::{Arch, Boot, Description, DiskBus, Firmware, NicModel};
use super::super::placement::Format;
use super::devices::path;
use super::domain::{self, Error};
use super::{Node, node};

/// What an image takes over from a kept machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Portrait {
    /// The kernel's name of its architecture.
    pub arch: String,
    /// Its memory, in bytes, where it is written in a unit that we know.
    pub memory: Option<u64>,
    /// Whether its firmware is UEFI.
    pub uefi: bool,
    /// Its disks that are files, in their order.
    pub disks: Vec<KeptDisk>,
    /// Its disks that are none: block devices, volumes, network disks; by their targets.
    pub others: Vec<String>,
    /// The kernel that it starts from, where that is no boot loader's work.
    pub kernel: Option<Kernel>,
}

/// A disk of a kept machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptDisk {
    /// `vda`.
    pub target: String,
    /// Its topmost file.
    pub file: PathBuf,
    /// The format that the description gives; none if it is another than qcow2 and raw.
    pub format: Option<Format>,
}

/// Files that a machine starts from directly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The command line.
    pub cmdline: Option<String>,
}

/// Reads libvirt's description of a machine that is shut off. What is not said stays empty; CDs and floppies are no disks.
pub fn read(domain: &Node) -> Portrait {
    let text = |path: &[&str]| {
        domain
            .at(path)
            .map(|found| found.text.clone())
            .filter(|text| !text.is_empty())
    };
    let kind = domain.at(&["os", "type"]);
    let mut disks = Vec::new();
    let mut others = Vec::new();
    let devices = domain.first("devices");
    for disk in devices.into_iter().flat_map(|devices| devices.all("disk")) {
        if !matches!(disk.attribute("device"), None | Some("disk")) {
            continue;
        }
        let target = disk.first("target").and_then(|target| target.attribute("dev"));
        let target = target.unwrap_or_default().to_owned();
        match disk.first("source").and_then(|source| source.attribute("file")) {
            Some(file) if disk.attribute("type") == Some("file") => disks.push(KeptDisk {
                target,
                file: file.into(),
                format: match disk.first("driver").and_then(|driver| driver.attribute("type")) {
                    Some("qcow2") => Some(Format::Qcow2),
                    // What libvirt takes when nothing is said.
                    Some("raw") | None => Some(Format::Raw),
                    Some(_) => None,
                },
            }),
            _ => others.push(target),
        }
    }
    let loader = domain.at(&["os", "loader"]);
    Portrait {
        arch: kind
            .and_then(|kind| kind.attribute("arch"))
            .unwrap_or_default()
            .to_owned(),
        memory: domain.first("memory").and_then(memory),
        uefi: domain.first("os").and_then(|os| os.attribute("firmware")) == Some("efi")
            || loader.and_then(|loader| loader.attribute("type")) == Some("pflash"),
        disks,
        others,
        kernel: text(&["os", "kernel"]).map(|kernel| Kernel {
            kernel: kernel.into(),
            initrd: text(&["os", "initrd"]).map(PathBuf::from),
            cmdline: text(&["os", "cmdline"]),
        }),
    }
}

/// libvirt writes KiB, and takes more.
fn memory(element: &Node) -> Option<u64> {
    let unit: u64 = match element.attribute("unit") {
        None | Some("KiB" | "k") => 1 << 10,
        Some("b" | "bytes") => 1,
        Some("MiB" | "M") => 1 << 20,
        Some("GiB" | "G") => 1 << 30,
        Some(_) => return None,
    };
    element.text.parse::<u64>().ok()?.checked_mul(unit)
}

/// Where a kept machine stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its disk: absolute.
    pub disk: &'a Path,
    /// The disk's format.
    pub format: Format,
    /// The files of a direct kernel boot, where the description says so.
    pub kernel: Option<(&'a Path, Option<&'a Path>)>,
    /// The libvirt network of its card.
    pub network: &'a str,
}

/// Writes a machine that stays, as libvirt domain XML. Unlike a job's machine it survives its reboots and its disk is safe against
/// a crash of the host; addresses of devices are libvirt's to choose, and a SPICE screen listens on loopback.
///
/// # Errors
/// An unfit description, a path or text that cannot stand in the document.
pub fn render(description: &Description, place: &Place<'_>) -> Result<String, Error> {
    description.check()?;
    let memory = || description.memory_mib.to_string();
    let root = domain::node_of(description)
        .child(node("name").text(place.name))
        .child(node("memory").with("unit", "MiB").text(memory()))
        .child(node("vcpu").text(description.cpus.to_string()))
        .child(operating_system(description, place)?)
        .child(domain::features(description))
        .child(domain::cpu(description))
        .child(domain::clock(description))
        .child(node("on_poweroff").text("destroy"))
        .child(node("on_reboot").text("restart"))
        .child(node("on_crash").text("destroy"))
        .child(devices(description, place)?);
    Ok(root.render()?)
}

fn operating_system(description: &Description, place: &Place<'_>) -> Result<Node, Error> {
    let mut os = node("os");
    if let Firmware::Uefi { .. } = description.firmware {
        os = os.with("firmware", "efi");
    }
    os = os.child(
        node("type")
            .with("arch", description.arch.name())
            .with("machine", &description.machine_type)
            .text("hvm"),
    );
    match (&description.boot, place.kernel) {
        (Boot::Disk, None) => {}
        (Boot::Kernel { cmdline }, Some((kernel, initrd))) => {
            os = os.child(node("kernel").text(path(kernel)?));
            if let Some(initrd) = initrd {
                os = os.child(node("initrd").text(path(initrd)?));
            }
            os = os.child(node("cmdline").text(cmdline));
        }
        _ => return Err(Error::Unplaced("the kernel")),
    }
    Ok(os)
}

fn devices(description: &Description, place: &Place<'_>) -> Result<Node, Error> {
    let (bus, device) = match description.disk_bus {
        DiskBus::Virtio => ("virtio", "vda"),
        DiskBus::Sata => ("sata", "sda"),
        DiskBus::Scsi => ("scsi", "sda"),
    };
    let disk = node("disk")
        .with("type", "file")
        .with("device", "disk")
        .child(
            node("driver")
                .with("name", "qemu")
                .with("type", place.format.name())
                .with("discard", "unmap"),
        )
        .child(node("source").with("file", path(place.disk)?))
        .child(node("target").with("dev", device).with("bus", bus))
        .child(node("boot").with("order", "1"));
    let card = description.nic_model.map(|model: NicModel| {
        node("interface")
            .with("type", "network")
            .child(node("source").with("network", place.network))
            .child(node("model").with("type", model.name()))
    });
    let scsi = (description.disk_bus == DiskBus::Scsi).then(|| {
        node("controller")
            .with("type", "scsi")
            .with("model", "virtio-scsi")
    });
    let video = match description.arch {
        Arch::X86_64 => "vga",
        Arch::Aarch64 => "virtio",
    };
    Ok(node("devices")
        .child(disk)
        .children(scsi)
        .children(card)
        .child(node("serial").with("type", "pty"))
        .child(node("console").with("type", "pty"))
        .child(
            node("channel").with("type", "unix").child(
                node("target")
                    .with("type", "virtio")
                    .with("name", "org.qemu.guest_agent.0"),
            ),
        )
        .child(
            node("graphics")
                .with("type", "spice")
                .with("autoport", "yes")
                .child(
                    node("listen")
                        .with("type", "address")
                        .with("address", "127.0.0.1"),
                ),
        )
        .child(node("video").child(node("model").with("type", video)))
        .child(
            node("rng")
                .with("model", "virtio")
                .child(node("backend").with("model", "random").text("/dev/urandom")),
        ))
}

#[cfg(test)]
mod tests {
    use super::super::super::description::tests::ordinary;
    use super::*;

    const OFF: &str = "<domain type='kvm'><name>web</name><memory unit='KiB'>1048576</memory>
        <os firmware='efi'><type arch='x86_64' machine='pc-q35-7.2'>hvm</type><kernel>/boot/k</kernel><cmdline>root=/dev/vda</cmdline></os>
        <devices>
          <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/vms/web.qcow2'/><target dev='vda' bus='virtio'/></disk>
          <disk type='file' device='disk'><driver name='qemu' type='vmdk'/><source file='/vms/old'/><target dev='vdb'/></disk>
          <disk type='file' device='cdrom'><source file='/iso'/><target dev='sda'/></disk>
          <disk type='block' device='disk'><source dev='/dev/sdx'/><target dev='vdc'/></disk>
        </devices></domain>";

    #[test]
    fn a_kept_machines_disks_and_wishes_are_read() {
        let portrait = read(&Node::parse(OFF).unwrap());
        assert_eq!(portrait.memory, Some(1 << 30));
        assert!(portrait.uefi);
        assert_eq!(portrait.arch, "x86_64");
        assert_eq!(portrait.others, ["vdc"]);
        let seen: Vec<_> = portrait
            .disks
            .iter()
            .map(|disk| (disk.target.as_str(), disk.file.to_str().unwrap(), disk.format))
            .collect();
        assert_eq!(
            seen,
            [
                ("vda", "/vms/web.qcow2", Some(Format::Qcow2)),
                ("vdb", "/vms/old", None)
            ]
        );
        let kernel = portrait.kernel.unwrap();
        assert_eq!((kernel.kernel, kernel.initrd), ("/boot/k".into(), None));
        assert_eq!(kernel.cmdline.as_deref(), Some("root=/dev/vda"));
    }

    #[test]
    fn units_of_memory_are_known_or_nothing_is_claimed() {
        let of = |unit: &str, number: &str| memory(&node("memory").with("unit", unit).text(number));
        assert_eq!(of("GiB", "2"), Some(2 << 30));
        assert_eq!(of("b", "2048"), Some(2048));
        assert_eq!(of("parsec", "2"), None);
        assert_eq!(of("GiB", "x"), None);
    }

    #[test]
    fn what_is_written_reads_back_as_what_it_should_be() {
        let place = Place {
            name: "web",
            disk: Path::new("/vms/a & b.raw"),
            format: Format::Raw,
            kernel: None,
            network: "default",
        };
        let xml = render(&ordinary(), &place).unwrap();
        let tree = Node::parse(&xml).unwrap();
        let portrait = read(&tree);
        assert_eq!(portrait.memory, Some(512 << 20));
        assert_eq!(portrait.disks[0].file, Path::new("/vms/a & b.raw"));
        assert_eq!(portrait.disks[0].format, Some(Format::Raw));
        assert!(!portrait.uefi);
        // Not a job's machine: nothing may mark it as cannery's to remove.
        assert_eq!(tree.first("metadata"), None);
        assert_eq!(tree.first("on_reboot").unwrap().text, "restart");
    }
}
