//! What a stranger's libvirt domain may wish for: memory, processors, firmware, and the models of disk and network card.
//!
//! Nothing in it reaches libvirt. Its devices and arguments are not even looked at, and of its paths only the names of the files
//! that it has as disks, to tell which of an image's own files these are; a machine is always built from our own description, and
//! these wishes stand below the operator's settings. Source: libvirt's `formatdomain`.

use super::stack::Drive;
use crate::image::error::quoted;
use quick_xml::Reader;
use quick_xml::XmlVersion;
use quick_xml::events::{BytesStart, Event};

use crate::image::hints::{DiskBus, Firmware, Hints, Nic};

/// Largest document, in bytes. Real ones have 2 to 10 KiB.
const DOCUMENT_MAX: usize = 256 << 10;

/// Deepest nesting. libvirt's own goes to about ten.
const DEPTH_MAX: usize = 32;

/// What was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) hints: Hints,
    /// As `<os><type arch=…>` says; empty when it does not.
    pub(super) architecture: String,
    /// The files that it has as disks, CDs and floppies.
    pub(super) drives: Vec<Drive>,
}

/// Reads a domain. The error is a reason.
pub(super) fn read(document: &[u8]) -> Result<Found, String> {
    if document.len() > DOCUMENT_MAX {
        return Err(format!("its libvirt domain is larger than {DOCUMENT_MAX} bytes"));
    }
    let text = std::str::from_utf8(document).map_err(|_| "its libvirt domain is not UTF-8".to_owned())?;
    let mut reader = Reader::from_str(text);
    let mut walk = Walk::default();
    loop {
        let event = reader
            .read_event()
            .map_err(|error| format!("its libvirt domain is no XML: {}", quoted(&error.to_string())))?;
        match event {
            Event::Start(element) => walk.enter(&element)?,
            Event::Empty(element) => {
                walk.enter(&element)?;
                walk.leave();
            }
            Event::End(_) => walk.leave(),
            Event::Text(text) => walk.text(&text.xml10_content()),
            // No entity is ever followed, so none may be defined.
            Event::DocType(_) => return Err("its libvirt domain defines a document type".to_owned()),
            Event::Eof if walk.path.is_empty() && walk.seen => return Ok(walk.found),
            Event::Eof => return Err("its libvirt domain ends too early".to_owned()),
            _ => {}
        }
    }
}

#[derive(Default)]
struct Walk {
    path: Vec<String>,
    seen: bool,
    found: Found,
    /// Of the `<memory>` that is being read.
    shift: Option<u32>,
    /// Is the `<disk>` that is being read a disk, and not a CD or a floppy?
    disk: bool,
}

impl Walk {
    fn enter(&mut self, element: &BytesStart<'_>) -> Result<(), String> {
        if self.path.len() == DEPTH_MAX {
            return Err(format!("its libvirt domain is nested deeper than {DEPTH_MAX}"));
        }
        let name = element.name().as_ref().to_owned();
        if self.path.is_empty() {
            if self.seen || name != "domain" {
                return Err("its libvirt domain is something else".to_owned());
            }
            self.seen = true;
        }
        self.path.push(name);
        let path: Vec<&str> = self.path.iter().map(String::as_str).collect();
        let hints = &mut self.found.hints;
        match path.as_slice() {
            ["domain", "memory"] => {
                self.shift = match attribute(element, "unit")?.as_deref() {
                    None | Some("KiB" | "k") => Some(10),
                    Some("b" | "bytes") => Some(0),
                    Some("MiB" | "M") => Some(20),
                    Some("GiB" | "G") => Some(30),
                    Some("TiB" | "T") => Some(40),
                    // Decimal units, which nobody's dumpxml writes.
                    Some(_) => None,
                };
            }
            ["domain", "os"] if attribute(element, "firmware")?.as_deref() == Some("efi") => {
                hints.firmware = Some(Firmware::Uefi);
            }
            ["domain", "os", "loader"] if attribute(element, "type")?.as_deref() == Some("pflash") => {
                hints.firmware = Some(Firmware::Uefi);
            }
            ["domain", "os", "type"] => {
                self.found.architecture = attribute(element, "arch")?.unwrap_or_default();
            }
            ["domain", "devices", "disk"] => {
                self.disk = matches!(attribute(element, "device")?.as_deref(), None | Some("disk"));
            }
            ["domain", "devices", "disk", "source"] => {
                if let Some(file) = attribute(element, "file")? {
                    let name = file.rsplit('/').next().unwrap_or_default().to_owned();
                    self.found.drives.push(Drive {
                        disk: self.disk,
                        name,
                    });
                }
            }
            ["domain", "devices", "disk", "target"] if self.disk && hints.disk_bus.is_none() => {
                hints.disk_bus = match attribute(element, "bus")?.as_deref() {
                    Some("virtio") => Some(DiskBus::Virtio),
                    Some("scsi") => Some(DiskBus::Scsi),
                    // Our machines have no IDE; AHCI is what a guest without other drivers is likeliest to know.
                    Some("sata" | "ide") => Some(DiskBus::Sata),
                    _ => None,
                };
            }
            ["domain", "devices", "interface", "model"] if hints.nic.is_none() => {
                hints.nic = match attribute(element, "type")?.as_deref() {
                    Some("virtio" | "virtio-net-pci" | "virtio-non-transitional") => Some(Nic::Virtio),
                    // A guest without virtio drivers knows one of Intel's rather than none.
                    Some("e1000e" | "e1000" | "rtl8139") => Some(Nic::E1000e),
                    _ => None,
                };
            }
            _ => {}
        }
        Ok(())
    }

    fn leave(&mut self) {
        self.path.pop();
    }

    fn text(&mut self, text: &str) {
        let path: Vec<&str> = self.path.iter().map(String::as_str).collect();
        let number = || text.trim().parse::<u64>().ok();
        match path.as_slice() {
            ["domain", "memory"] => {
                let bytes = number()
                    .zip(self.shift)
                    .and_then(|(n, shift)| n.checked_mul(1 << shift));
                self.found.hints.memory = bytes.or(self.found.hints.memory);
            }
            ["domain", "vcpu"] => {
                self.found.hints.cpus = number().and_then(|n| n.try_into().ok()).or(self.found.hints.cpus);
            }
            _ => {}
        }
    }
}

fn attribute(element: &BytesStart<'_>, name: &str) -> Result<Option<String>, String> {
    let wrong = |error: &dyn std::fmt::Display| {
        format!(
            "its libvirt domain has a broken attribute: {}",
            quoted(&error.to_string())
        )
    };
    let attribute = element.try_get_attribute(name).map_err(|error| wrong(&error))?;
    attribute
        .map(|attribute| {
            let value = attribute.normalized_value(XmlVersion::Implicit1_0);
            value
                .map(|value| value.into_owned())
                .map_err(|error| wrong(&error))
        })
        .transpose()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DOMAIN: &str = r#"<?xml version="1.0"?>
<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>vm &amp; co</name>
  <memory unit='KiB'>2097152</memory>
  <currentMemory unit='KiB'>1048576</currentMemory>
  <vcpu placement='static'>2</vcpu>
  <os firmware='efi'><type arch='x86_64' machine='pc-q35-7.2'>hvm</type><boot dev='hd'/></os>
  <devices>
    <emulator>/tmp/evil</emulator>
    <disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>
    <disk type='file' device='disk'><source file='/etc/shadow'/><target dev='vda' bus='virtio'/></disk>
    <interface type='bridge'><source bridge='br0'/><model type='e1000'/></interface>
    <hostdev mode='subsystem' type='usb'/>
  </devices>
  <qemu:commandline><qemu:arg value='-chardev'/></qemu:commandline>
</domain>
"#;

    #[test]
    fn of_a_domain_only_harmless_wishes_are_heard() {
        let found = read(DOMAIN.as_bytes()).unwrap();
        assert_eq!(found.architecture, "x86_64");
        assert_eq!(
            found.hints,
            Hints {
                memory: Some(2 << 30),
                cpus: Some(2),
                firmware: Some(Firmware::Uefi),
                disk_bus: Some(DiskBus::Virtio),
                nic: Some(Nic::E1000e),
                user: None,
            }
        );
        let bare = read(b"<domain><memory>512</memory></domain>").unwrap();
        assert_eq!(bare.hints.memory, Some(512 << 10));
        assert_eq!(
            read(b"<domain><memory unit='MB'>512</memory><vcpu>many</vcpu></domain>")
                .unwrap()
                .hints,
            Hints::default()
        );
    }

    #[test]
    fn what_is_no_plain_domain_is_refused() {
        let deep = "<domain>".to_owned() + &"<a>".repeat(100);
        let long = format!("<domain>{}</domain>", " ".repeat(DOCUMENT_MAX));
        let laughs =
            r#"<!DOCTYPE d [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]><domain><name>&b;</name></domain>"#;
        for (text, part) in [
            ("", "too early"),
            ("<domain>", "too early"),
            ("<network/>", "something else"),
            ("<domain/><domain/>", "something else"),
            ("<domain></network>", "no XML"),
            ("<domain><os firmware=efi/></domain>", "attribute"),
            (laughs, "document type"),
            (&deep, "deeper"),
            (&long, "larger"),
        ] {
            let reason = read(text.as_bytes()).unwrap_err();
            assert!(reason.contains(part), "{reason}");
        }
        assert!(read(b"<domain>\xff</domain>").unwrap_err().contains("UTF-8"));
    }

    proptest! {
        #[test]
        fn no_damage_makes_it_panic(changes in prop::collection::vec((0_usize..1400, any::<u8>()), 0..8), cut in 0_usize..1400) {
            let mut bytes = DOMAIN.as_bytes().to_vec();
            for (at, value) in changes {
                let length = bytes.len();
                bytes[at % length] = value;
            }
            bytes.truncate(bytes.len().saturating_sub(cut));
            drop(read(&bytes));
        }
    }
}
