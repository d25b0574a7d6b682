//! `<devices>`: every device of a machine, each with its address.

use std::path::Path;

use super::super::description::{Arch, Description, DiskBus, Graphics};
use super::super::placement::{Backing, Format, NetworkAttachment, Placement};
use super::domain::Error;
use super::{Node, node, pci};

/// Name of the channel that libvirt and qemu-guest-agent agree on.
const AGENT_CHANNEL: &str = "org.qemu.guest_agent.0";

/// All devices, in a fixed order.
pub(super) fn all(description: &Description, placement: &Placement) -> Result<Node, Error> {
    Ok(node("devices")
        .children(disks(description, placement)?)
        .children(pci::controllers())
        .children(controllers(description))
        .children(network_card(description, placement))
        .children(serial(description, path(&placement.serial_log)?))
        .child(agent())
        .children(screen(description))
        .child(
            node("memballoon")
                .with("model", "virtio")
                // The guest hands freed pages back, so that a big build does not keep the host's memory afterwards.
                .with("freePageReporting", "on")
                .child(pci::BALLOON.node()),
        )
        .child(
            node("rng")
                .with("model", "virtio")
                .child(node("backend").with("model", "random").text("/dev/urandom"))
                .child(pci::RNG.node()),
        )
        .children(panic_device(description)))
}

fn disks(description: &Description, placement: &Placement) -> Result<Vec<Node>, Error> {
    let bus = description.disk_bus;
    let root = disk(&placement.overlay, Format::Qcow2, "cannery-root", (bus, 0))?
        .child(node("boot").with("order", "1"))
        .children(backing_store(&placement.backing)?);
    let mut disks = vec![in_order(root)];
    match (&placement.seed, description.seed_disk) {
        (Some(seed), true) => {
            let seed = disk(seed, Format::Raw, "cannery-seed", (bus, 1))?;
            // QEMU's SATA disks cannot be read-only, and a CD's large sectors do not suit a FAT volume.
            let read_only = (bus != DiskBus::Sata).then(|| node("readonly"));
            let seed = seed.children(read_only);
            disks.push(in_order(seed));
        }
        (None, false) => {}
        (Some(_), false) | (None, true) => {
            return Err(Error::Unplaced("the seed disk"));
        }
    }
    Ok(disks)
}

/// A disk at the bus's `unit`th place; 0 is the root disk, 1 the seed.
fn disk(file: &Path, format: Format, serial: &str, (bus, unit): (DiskBus, u8)) -> Result<Node, Error> {
    let letter = if unit == 0 { 'a' } else { 'b' };
    let (bus_name, device) = match bus {
        DiskBus::Virtio => ("virtio", format!("vd{letter}")),
        DiskBus::Sata => ("sata", format!("sd{letter}")),
        DiskBus::Scsi => ("scsi", format!("sd{letter}")),
    };
    let address = match (bus, unit) {
        (DiskBus::Virtio, 0) => pci::DISK.node(),
        (DiskBus::Virtio, _) => pci::SEED.node(),
        (DiskBus::Sata | DiskBus::Scsi, _) => {
            // AHCI has one disk a port, so the unit is the port; SCSI counts units of one target.
            node("address")
                .with("type", "drive")
                .with("controller", "0")
                .with("bus", "0")
                .with("target", "0")
                .with("unit", unit.to_string())
        }
    };
    Ok(node("disk")
        .with("type", "file")
        .with("device", "disk")
        .child(
            node("driver")
                .with("name", "qemu")
                .with("type", format.name())
                // The layer dies with the job: what a host crash would lose is lost anyway, and flushes cost the most.
                .with("cache", "unsafe")
                // A host that cannot write stops the guest, which is then the host's fault and not a failed build.
                .with("error_policy", "stop")
                .with("rerror_policy", "stop")
                .with("discard", "unmap")
                .with("detect_zeroes", "unmap"),
        )
        .child(node("source").with("file", path(file)?))
        .child(node("target").with("dev", device).with("bus", bus_name))
        .child(node("serial").text(serial))
        .child(address))
}

/// Puts a disk's children in the order in which libvirt itself writes them.
fn in_order(mut disk: Node) -> Node {
    const ORDER: [&str; 8] = [
        "driver",
        "source",
        "backingStore",
        "target",
        "readonly",
        "serial",
        "boot",
        "address",
    ];
    disk.children
        .sort_by_key(|child| ORDER.iter().position(|name| *name == child.name));
    disk
}

/// The chain under a disk, down to its end. Without it libvirt would probe the files; and without the label it would
/// give every one of them to QEMU's user and, for the lower ones, leave it so.
fn backing_store(chain: &[Backing]) -> Result<Option<Node>, Error> {
    let mut below = node("backingStore");
    for layer in chain.iter().rev() {
        below = node("backingStore")
            .with("type", "file")
            .child(node("format").with("type", layer.format.name()))
            .child(
                node("source")
                    .with("file", path(&layer.path)?)
                    .child(node("seclabel").with("model", "dac").with("relabel", "no")),
            )
            .child(below);
    }
    Ok(Some(below))
}

fn controllers(description: &Description) -> Vec<Node> {
    // No USB: nothing in a job needs it, and libvirt would add a controller of its own choice.
    let usb = node("controller")
        .with("type", "usb")
        .with("index", "0")
        .with("model", "none");
    let serial = node("controller")
        .with("type", "virtio-serial")
        .with("index", "0")
        .child(pci::SERIAL.node());
    let mut all = vec![usb, serial];
    if description.arch == Arch::X86_64 {
        // Part of the q35 chip set, whether a disk hangs on it or not.
        all.push(
            node("controller")
                .with("type", "sata")
                .with("index", "0")
                .child(pci::SATA.node()),
        );
    }
    if description.disk_bus == DiskBus::Scsi {
        all.push(
            node("controller")
                .with("type", "scsi")
                .with("index", "0")
                .with("model", "virtio-scsi")
                .child(pci::DISK.node()),
        );
    }
    all
}

fn network_card(description: &Description, placement: &Placement) -> Option<Node> {
    let model = description.nic_model?;
    let mut card = node("interface")
        .with("type", "network")
        .child(node("mac").with("address", placement.mac.to_string()))
        .child(node("source").with("network", placement.network.network()));
    if let NetworkAttachment::Slot { tap, .. } = &placement.network {
        card = card.child(node("target").with("dev", tap));
    }
    Some(
        card.child(node("model").with("type", model.name()))
            // The firmware would otherwise load an option ROM and offer to boot from the network.
            .child(node("rom").with("enabled", "no"))
            .child(pci::NIC.node()),
    )
}

/// The first serial port, into a file that virtlogd bounds.
fn serial(description: &Description, log: &str) -> [Node; 2] {
    let source = || node("source").with("path", log).with("append", "on");
    let (kind, model) = match description.arch {
        Arch::X86_64 => ("isa-serial", "isa-serial"),
        Arch::Aarch64 => ("system-serial", "pl011"),
    };
    let port = node("serial").with("type", "file").child(source()).child(
        node("target")
            .with("type", kind)
            .with("port", "0")
            .child(node("model").with("name", model)),
    );
    let console = node("console")
        .with("type", "file")
        .child(source())
        .child(node("target").with("type", "serial").with("port", "0"));
    [port, console]
}

/// The channel of qemu-guest-agent. libvirt names its socket, which keeps it within the 107 bytes that a socket's path
/// may have and in a folder that only libvirt and QEMU enter.
fn agent() -> Node {
    node("channel")
        .with("type", "unix")
        .child(node("target").with("type", "virtio").with("name", AGENT_CHANNEL))
        .child(
            node("address")
                .with("type", "virtio-serial")
                .with("controller", "0")
                .with("bus", "0")
                .with("port", "1"),
        )
}

fn screen(description: &Description) -> Vec<Node> {
    let mut all = Vec::new();
    if description.arch == Arch::X86_64 {
        // The chip set's own keyboard and mouse; libvirt adds them where a screen is.
        all.extend(["mouse", "keyboard"].map(|kind| node("input").with("type", kind).with("bus", "ps2")));
    }
    match description.graphics {
        Graphics::Spice => {
            // libvirt gives a SPICE machine a sound backend unless told otherwise.
            let (model, memory) = match description.arch {
                Arch::X86_64 => ("vga", Some("16384")),
                Arch::Aarch64 => ("virtio", None),
            };
            let mut card = node("model").with("type", model);
            if let Some(kib) = memory {
                card = card.with("vram", kib);
            }
            all.extend([
                node("graphics")
                    .with("type", "spice")
                    .child(node("listen").with("type", "none")),
                node("audio").with("id", "1").with("type", "none"),
                node("video")
                    .child(card.with("heads", "1").with("primary", "yes"))
                    .child(pci::VIDEO.node()),
            ]);
        }
        Graphics::None => all.extend([
            node("audio").with("id", "1").with("type", "none"),
            // Said aloud, since libvirt may add a card to a machine that names none.
            node("video").child(node("model").with("type", "none")),
        ]),
    }
    all
}

/// Through it a kernel panic becomes a state that libvirt reports. On ARM the device is a PCI one that libvirt knows
/// only from 9.1 on.
fn panic_device(description: &Description) -> Option<Node> {
    (description.arch == Arch::X86_64).then(|| {
        node("panic")
            .with("model", "isa")
            .child(node("address").with("type", "isa").with("iobase", "0x505"))
    })
}

/// A path as text. libvirt takes paths as UTF-8 and absolute.
pub(super) fn path(path: &Path) -> Result<&str, Error> {
    match path.to_str() {
        Some(text) if path.is_absolute() => Ok(text),
        _ => Err(Error::Path(path.to_owned())),
    }
}
