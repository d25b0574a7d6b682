//! The PCI map: which device sits where, for good.
//!
//! ```text
//! 00:00.0 host bridge          (machine)
//! 00:01.0 video
//! 00:02.0…7 eight PCIe root ports, buses 1…8
//!     01:00.0 network card     05:00.0 random numbers
//!     02:00.0 virtio-serial    06:00.0 seed disk (virtio)
//!     03:00.0 root disk or     07, 08  empty, for what is plugged in later
//!             SCSI controller
//!     04:00.0 balloon
//! 00:1f.2 SATA controller      (machine, x86)
//! ```
//! A device that a description leaves out leaves its port empty: no other device moves.

use super::{Node, node};

/// A place on the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    bus: u8,
    slot: u8,
    function: u8,
}

/// Number of root ports; with them one slot's eight functions are full.
const ROOT_PORTS: u8 = 8;
/// Slot of bus 0 that holds the root ports.
const ROOT_PORT_SLOT: u8 = 2;

/// Video card.
pub const VIDEO: Address = on_root(1, 0);
/// AHCI controller of the ICH9, where the chip set has it.
pub const SATA: Address = on_root(0x1f, 2);
/// Network card.
pub const NIC: Address = behind(1);
/// Controller of the agent's channel.
pub const SERIAL: Address = behind(2);
/// Root disk, or the SCSI controller that bears it.
pub const DISK: Address = behind(3);
/// Memory balloon.
pub const BALLOON: Address = behind(4);
/// Random number generator.
pub const RNG: Address = behind(5);
/// Seed disk.
pub const SEED: Address = behind(6);

const fn on_root(slot: u8, function: u8) -> Address {
    Address {
        bus: 0,
        slot,
        function,
    }
}

const fn behind(port: u8) -> Address {
    Address {
        bus: port,
        slot: 0,
        function: 0,
    }
}

impl Address {
    /// The `<address>` element.
    pub fn node(self) -> Node {
        node("address")
            .with("type", "pci")
            .with("domain", "0x0000")
            .with("bus", format!("{:#04x}", self.bus))
            .with("slot", format!("{:#04x}", self.slot))
            .with("function", format!("{:#x}", self.function))
    }
}

/// The root complex and its ports.
pub fn controllers() -> Vec<Node> {
    let root = node("controller")
        .with("type", "pci")
        .with("index", "0")
        .with("model", "pcie-root");
    let ports = (0..ROOT_PORTS).map(|function| {
        let address = on_root(ROOT_PORT_SLOT, function).node();
        // Function 0 announces that the others exist.
        let address = if function == 0 {
            address.with("multifunction", "on")
        } else {
            address
        };
        node("controller")
            .with("type", "pci")
            .with("index", (function + 1).to_string())
            .with("model", "pcie-root-port")
            .child(node("model").with("name", "pcie-root-port"))
            .child(
                node("target")
                    .with("chassis", (function + 1).to_string())
                    .with("port", format!("{:#x}", (ROOT_PORT_SLOT << 3) | function)),
            )
            .child(address)
    });
    std::iter::once(root).chain(ports).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_devices_share_a_place_and_each_has_a_port() {
        let all = [VIDEO, SATA, NIC, SERIAL, DISK, BALLOON, RNG, SEED];
        for (n, one) in all.iter().enumerate() {
            assert!(!all[..n].contains(one), "{one:?}");
            assert!(one.bus <= ROOT_PORTS);
            assert!(one.bus != 0 || one.slot != ROOT_PORT_SLOT);
        }
        assert_eq!(controllers().len(), usize::from(ROOT_PORTS) + 1);
    }

    #[test]
    fn an_address_is_written_as_libvirt_writes_it() {
        let text = SATA.node().render().unwrap();
        assert_eq!(
            text,
            "<address type=\"pci\" domain=\"0x0000\" bus=\"0x00\" slot=\"0x1f\" function=\"0x2\"/>\n"
        );
    }
}
