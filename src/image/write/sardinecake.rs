//! sardinecake's format: a domain description, and a disk as one gzip stream that is cut into blobs by bytes.
//!
//! Source: sardinecake's `docs/oci.md`. A blob that begins like a gzip file counts as the begin of the next disk there,
//! whatever its media type says; so no cut of ours is followed by those two bytes.

use std::io::{self, Write};

use crate::image::hints::{DiskBus, Firmware, Hints, Nic};

/// The description's media type.
pub(super) const DOMAIN_TYPE: &str = "application/vnd.libvirt.domain.config+xml";
/// The first blob of a disk; the others have a number behind it.
const DISK_TYPE: &str = "application/x-qemu-disk+gzip";

/// The disk's name in the gzip header and in the description.
pub(super) const DISK_NAME: &str = "disk.qcow2";

/// Where the stream is cut, in bytes: what its own documentation uses.
pub(super) const PART: u64 = 256 << 20;

/// What the begin of a gzip file looks like.
const MAGIC: [u8; 2] = [0x1f, 0x8b];

/// Memory of a machine whose image does not say, in MiB: cannery's own default.
const DEFAULT_MEMORY_MIB: u64 = 2048;

/// Processors of such a machine.
const DEFAULT_CPUS: u32 = 2;

/// The media type of a disk's part, from 0.
pub(super) fn part_type(number: usize) -> String {
    match number {
        0 => DISK_TYPE.to_owned(),
        number => format!("{DISK_TYPE};chunk={number}"),
    }
}

/// A stream on its way to be cut into parts of at most `part` bytes.
pub(super) struct Cutter<F> {
    part: u64,
    /// Bytes of the current part so far.
    done: u64,
    /// The last bytes of what came, until it is known what follows them: at most two.
    held: Vec<u8>,
    /// Takes the bytes of the current part, and (as none) the news that the next one begins.
    hand_on: F,
}

impl<F: FnMut(Option<&[u8]>) -> io::Result<()>> Cutter<F> {
    /// `part` is at least 2.
    pub(super) fn new(part: u64, hand_on: F) -> Self {
        Self {
            part,
            done: 0,
            held: Vec::new(),
            hand_on,
        }
    }

    fn push(&mut self, bytes: &[u8], last: bool) -> io::Result<()> {
        let mut window = std::mem::take(&mut self.held);
        window.extend_from_slice(bytes);
        let mut rest = window.as_slice();
        loop {
            let (take, cut) = split(self.part - self.done, rest, last);
            if take > 0 {
                (self.hand_on)(Some(&rest[..take]))?;
            }
            self.done += take as u64;
            rest = &rest[take..];
            if !cut {
                self.held = rest.to_vec();
                return Ok(());
            }
            (self.hand_on)(None)?;
            self.done = 0;
        }
    }

    /// Hands on what was held back.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.push(&[], true)
    }
}

impl<F: FnMut(Option<&[u8]>) -> io::Result<()>> Write for Cutter<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes, false)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How many bytes of `window` belong to a part that has room for `room` more, and whether it ends behind them. `last` says
/// that nothing follows the window; else two bytes are left over, so that it is known what the next part begins with.
fn split(room: u64, window: &[u8], last: bool) -> (usize, bool) {
    let room = usize::try_from(room).unwrap_or(usize::MAX);
    if last && window.len() <= room {
        return (window.len(), false);
    }
    let known = if last {
        window.len()
    } else {
        window.len().saturating_sub(MAGIC.len())
    };
    if known < room || window.len() <= room {
        return (known.min(room), false);
    }
    // One byte earlier is never a magic: its second byte would have to be the first of this one.
    let earlier = usize::from(window[room..].starts_with(&MAGIC));
    (room - earlier, true)
}

/// The description of a machine as its hints wish it: every value in it is ours.
pub(super) fn domain(hints: &Hints, machine: &str) -> String {
    let memory = hints
        .memory
        .map_or(DEFAULT_MEMORY_MIB, |bytes| bytes.div_ceil(1 << 20));
    let cpus = hints.cpus.unwrap_or(DEFAULT_CPUS);
    let (family, uefi) = match machine {
        "aarch64" => ("virt", true),
        _ => ("q35", hints.firmware == Some(Firmware::Uefi)),
    };
    let firmware = if uefi { " firmware='efi'" } else { "" };
    let (target, bus) = match hints.disk_bus.unwrap_or(DiskBus::Virtio) {
        DiskBus::Virtio => ("vda", "virtio"),
        DiskBus::Scsi => ("sda", "scsi"),
        DiskBus::Sata => ("sda", "sata"),
    };
    let controller = match bus {
        "scsi" => "\n    <controller type='scsi' model='virtio-scsi'/>",
        _ => "",
    };
    let card = match hints.nic.unwrap_or(Nic::Virtio) {
        Nic::Virtio => "virtio",
        Nic::E1000e => "e1000e",
    };
    format!(
        "<domain type='kvm'>
  <name>cannery</name>
  <memory unit='MiB'>{memory}</memory>
  <vcpu>{cpus}</vcpu>
  <os{firmware}>
    <type arch='{machine}' machine='{family}'>hvm</type>
    <boot dev='hd'/>
  </os>
  <features><acpi/></features>
  <cpu mode='host-model'/>
  <clock offset='utc'/>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='{DISK_NAME}'/>
      <target dev='{target}' bus='{bus}'/>
    </disk>{controller}
    <interface type='network'>
      <source network='default'/>
      <model type='{card}'/>
    </interface>
    <serial type='pty'/>
    <console type='pty'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
</domain>
"
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_later_part_begins_like_a_gzip_file(
            stream in prop::collection::vec(prop::sample::select(vec![0x1f_u8, 0x8b, 0]), 3..200),
            piece in 1_usize..50,
            part in 2_u64..40,
        ) {
            let mut parts = vec![Vec::new()];
            let mut cutter = Cutter::new(part, |bytes: Option<&[u8]>| {
                match bytes {
                    Some(bytes) => parts.last_mut().unwrap().extend_from_slice(bytes),
                    None => parts.push(Vec::new()),
                }
                Ok(())
            });
            for bytes in stream.chunks(piece) {
                cutter.write_all(bytes).unwrap();
            }
            cutter.finish().unwrap();
            prop_assert_eq!(parts.concat(), stream);
            for (number, one) in parts.iter().enumerate() {
                prop_assert!(!one.is_empty() && one.len() as u64 <= part, "{parts:?}");
                prop_assert!(number == 0 || !one.starts_with(&MAGIC), "{parts:?}");
            }
            // Nothing is cut that would have fitted, but for the byte that keeps two apart.
            for pair in parts.windows(2) {
                prop_assert!(pair[0].len() as u64 + 1 >= part, "{parts:?}");
            }
        }
    }

    #[test]
    fn parts_are_numbered_from_the_second_on() {
        assert_eq!(part_type(0), "application/x-qemu-disk+gzip");
        assert_eq!(part_type(1), "application/x-qemu-disk+gzip;chunk=1");
    }

    #[test]
    fn a_description_says_what_the_hints_wish() {
        let hints = Hints {
            memory: Some(512 << 20),
            firmware: Some(Firmware::Uefi),
            cpus: Some(8),
            disk_bus: Some(DiskBus::Scsi),
            nic: Some(Nic::E1000e),
            user: None,
        };
        let xml = domain(&hints, "x86_64");
        for part in [
            "<vcpu>8</vcpu>",
            "<target dev='sda' bus='scsi'/>",
            "model='virtio-scsi'",
            "<model type='e1000e'/>",
        ] {
            assert!(xml.contains(part), "{part}: {xml}");
        }
        assert!(xml.contains("<memory unit='MiB'>512</memory>"), "{xml}");
        assert!(xml.contains("<os firmware='efi'>"), "{xml}");
        assert!(!domain(&Hints::default(), "x86_64").contains("firmware="));
        assert!(domain(&Hints::default(), "aarch64").contains("machine='virt'"));
    }
}
