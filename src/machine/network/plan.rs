//! What our network should be.

use std::fmt;
use std::net::Ipv4Addr;

use super::super::placement::Mac;
use super::super::xml::Node;

/// Longest name of a network device, in bytes (the kernel's IFNAMSIZ, less its NUL).
const DEVICE_NAME_MAX: usize = 15;

/// Offset of the gateway in the subnet.
const GATEWAY_OFFSET: u32 = 1;
/// Offset of slot 0 in the subnet.
const FIRST_SLOT_OFFSET: u32 = 2;

/// A network of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkPlan {
    /// libvirt's name of it; also in the names of the firewall's tables.
    pub name: String,
    /// Bridge device. The taps are called after it, `<bridge>-<slot>`, so it is shorter than a device's name may be.
    pub bridge: String,
    /// First address of the subnet.
    pub subnet: Ipv4Addr,
    /// Length of the subnet's prefix, 16 to 28.
    pub prefix: u8,
    /// How many machines can be on it at once.
    pub slots: u32,
    /// Ports of the host that guests may reach, beside DHCP and DNS.
    pub host_ports: Vec<HostPort>,
}

/// A port of the host, opened to guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostPort {
    /// Transport.
    pub protocol: Protocol,
    /// Port.
    pub port: u16,
}

/// Transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// nftables' name of it.
    pub fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
    }
}

/// One place on the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Counted from 0.
    pub index: u32,
    /// The card's address.
    pub mac: Mac,
    /// The guest's address.
    pub address: Ipv4Addr,
    /// The host's end of the card.
    pub tap: String,
}

/// Why a plan cannot be a network. All are the operator's, in the settings.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadPlan {
    /// A name has other characters than devices and tables may have.
    #[error(
        "{0:?} cannot name a network or bridge: it must start with a letter and hold only letters, digits and '_'"
    )]
    Name(String),
    /// The taps' names would be too long.
    #[error("the bridge name {bridge:?} is too long: with {slots} slots the tap devices' names would pass {most} characters", most = DEVICE_NAME_MAX)]
    Long {
        /// Bridge.
        bridge: String,
        /// Slots.
        slots: u32,
    },
    /// libvirt keeps such names for itself.
    #[error("the bridge name {0:?} is reserved: libvirt removes devices so called")]
    Reserved(String),
    /// The subnet is no private or not a whole one.
    #[error(
        "{subnet}/{prefix} is not a subnet for guests: it must be a private one (10/8, 172.16/12, 192.168/16), written by its first address, with a prefix from 16 to 28"
    )]
    Subnet {
        /// Address.
        subnet: Ipv4Addr,
        /// Prefix.
        prefix: u8,
    },
    /// More slots than addresses, or none.
    #[error(
        "{slots} slots do not fit into a subnet with {room} addresses for guests; choose from 1 to {room}, or a larger subnet"
    )]
    Slots {
        /// Slots.
        slots: u32,
        /// Addresses.
        room: u32,
    },
}

impl NetworkPlan {
    /// Checks the plan.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), BadPlan> {
        for name in [&self.name, &self.bridge] {
            let first = name.starts_with(|c: char| c.is_ascii_alphabetic());
            if !first || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
                return Err(BadPlan::Name(name.clone()));
            }
        }
        if ["vnet", "macvtap", "macvlan"]
            .iter()
            .any(|own| self.bridge.starts_with(own))
        {
            return Err(BadPlan::Reserved(self.bridge.clone()));
        }
        let whole = u32::from(self.subnet) & !self.mask() == 0;
        if !(16..=28).contains(&self.prefix) || !self.subnet.is_private() || !whole {
            return Err(BadPlan::Subnet {
                subnet: self.subnet,
                prefix: self.prefix,
            });
        }
        // Neither the network's own address, the gateway nor the broadcast address can be a guest's.
        let room = !self.mask() - FIRST_SLOT_OFFSET;
        if !(1..=room).contains(&self.slots) {
            return Err(BadPlan::Slots {
                slots: self.slots,
                room,
            });
        }
        let last = format!("{}-{}", self.bridge, self.slots - 1);
        if last.len() > DEVICE_NAME_MAX {
            return Err(BadPlan::Long {
                bridge: self.bridge.clone(),
                slots: self.slots,
            });
        }
        Ok(())
    }

    /// The host's address on the network.
    pub fn gateway(&self) -> Ipv4Addr {
        self.address(GATEWAY_OFFSET)
    }

    /// The subnet's mask as a number.
    pub fn mask(&self) -> u32 {
        u32::MAX
            .checked_shl(32 - u32::from(self.prefix.min(32)))
            .unwrap_or(0)
    }

    /// All slots, by index.
    pub fn slots(&self) -> Vec<Slot> {
        (0..self.slots)
            .map(|index| {
                let address = self.address(FIRST_SLOT_OFFSET.saturating_add(index));
                Slot {
                    index,
                    mac: Mac::of_address(address),
                    address,
                    tap: format!("{}-{index}", self.bridge),
                }
            })
            .collect()
    }

    fn address(&self, offset: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.subnet).saturating_add(offset))
    }
}

/// What a libvirt network is, as far as our plan says anything about it; read from its XML.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    forward: Option<String>,
    bridge: Option<String>,
    stp: Option<String>,
    delay: Option<String>,
    address: Option<String>,
    prefix: Option<u8>,
    hosts: Vec<(String, String)>,
    ranges: usize,
    options: Vec<String>,
}

/// Where a network that is there differs from the plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// What differs.
    pub what: &'static str,
    /// What the plan says.
    pub wanted: String,
    /// What libvirt has.
    pub found: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "its {} is {} instead of {}",
            self.what, self.found, self.wanted
        )
    }
}

impl Shape {
    /// Reads a network's XML.
    pub fn of(network: &Node) -> Shape {
        let attribute = |path: &[&str], name: &str| {
            network
                .at(path)
                .and_then(|node| node.attribute(name))
                .map(str::to_owned)
        };
        let dhcp = network.at(&["ip", "dhcp"]);
        let mut hosts: Vec<(String, String)> = dhcp
            .into_iter()
            .flat_map(|dhcp| dhcp.all("host"))
            .filter_map(|host| {
                Some((
                    host.attribute("mac")?.to_owned(),
                    host.attribute("ip")?.to_owned(),
                ))
            })
            .collect();
        hosts.sort();
        let mut options: Vec<String> = network
            .first("dnsmasq:options")
            .into_iter()
            .flat_map(|options| options.all("dnsmasq:option"))
            .filter_map(|option| option.attribute("value").map(str::to_owned))
            .collect();
        options.sort();
        let prefix = attribute(&["ip"], "prefix")
            .and_then(|text| text.parse().ok())
            .or_else(|| {
                let mask: Ipv4Addr = attribute(&["ip"], "netmask")?.parse().ok()?;
                u8::try_from(u32::from(mask).leading_ones()).ok()
            });
        Shape {
            forward: attribute(&["forward"], "mode"),
            bridge: attribute(&["bridge"], "name"),
            stp: attribute(&["bridge"], "stp"),
            delay: attribute(&["bridge"], "delay"),
            address: attribute(&["ip"], "address"),
            prefix,
            hosts,
            ranges: dhcp.map_or(0, |dhcp| dhcp.all("range").count()),
            options,
        }
    }

    /// What of `found` is not as here, the most telling first.
    pub fn differences(&self, found: &Shape) -> Vec<Difference> {
        let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "none".to_owned());
        let subnet = |shape: &Shape| {
            let prefix = shape
                .prefix
                .map_or_else(String::new, |prefix| format!("/{prefix}"));
            format!("{}{prefix}", text(&shape.address))
        };
        let slots = |shape: &Shape| match (shape.hosts.first(), shape.hosts.last()) {
            (Some((_, first)), Some((_, last))) => format!("{} ({first} to {last})", shape.hosts.len()),
            _ => "0".to_owned(),
        };
        let bridge = |shape: &Shape| format!("stp {} delay {}", text(&shape.stp), text(&shape.delay));
        let list = |shape: &Shape| format!("{} dynamic, {}", shape.ranges, shape.options.join(" "));
        let pairs = [
            ("address", subnet(self), subnet(found)),
            ("number of slots", slots(self), slots(found)),
            ("bridge", text(&self.bridge), text(&found.bridge)),
            ("forwarding", text(&self.forward), text(&found.forward)),
            ("bridge set-up", bridge(self), bridge(found)),
            ("DHCP set-up", list(self), list(found)),
        ];
        let mut all: Vec<Difference> = pairs
            .into_iter()
            .filter(|(_, wanted, found)| wanted != found)
            .map(|(what, wanted, found)| Difference { what, wanted, found })
            .collect();
        if all.is_empty() && self != found {
            all.push(Difference {
                what: "table of slots",
                wanted: "ours".to_owned(),
                found: "other MAC addresses".to_owned(),
            });
        }
        all
    }
}

#[cfg(test)]
pub(in crate::machine) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    /// A small network.
    pub(in crate::machine) fn plan() -> NetworkPlan {
        NetworkPlan {
            name: "cannery".to_owned(),
            bridge: "cannery0".to_owned(),
            subnet: Ipv4Addr::new(10, 211, 0, 0),
            prefix: 24,
            slots: 4,
            host_ports: vec![],
        }
    }

    #[test]
    fn bad_plans_are_refused() {
        let with = |change: fn(&mut NetworkPlan)| {
            let mut plan = plan();
            change(&mut plan);
            plan.check().unwrap_err().to_string()
        };
        let cases = [
            (with(|p| p.name = "a b".to_owned()), "cannot name"),
            (with(|p| p.bridge = "0a".to_owned()), "cannot name"),
            (with(|p| p.bridge = "vnet0".to_owned()), "reserved"),
            (with(|p| p.bridge = "cannerybridges".to_owned()), "too long"),
            (with(|p| p.subnet = Ipv4Addr::new(10, 211, 0, 1)), "first address"),
            (with(|p| p.subnet = Ipv4Addr::new(8, 8, 8, 0)), "private"),
            (with(|p| p.prefix = 8), "16 to 28"),
            (with(|p| p.slots = 0), "1 to 253"),
            (with(|p| p.slots = 254), "1 to 253"),
        ];
        for (error, part) in cases {
            assert!(error.contains(part), "{error} does not say {part}");
        }
    }

    #[test]
    fn a_slot_is_where_its_index_says() {
        let slots = plan().slots();
        assert_eq!(slots.len(), 4);
        assert_eq!(slots[3].address, Ipv4Addr::new(10, 211, 0, 5));
        assert_eq!(slots[3].mac.to_string(), "52:54:0a:d3:00:05");
        assert_eq!(slots[3].tap, "cannery0-3");
    }

    proptest! {
        /// Whatever passes the check has as many slots as it says, all apart, inside the subnet, none at its ends.
        #[test]
        fn slots_are_distinct_and_inside(prefix in 16u8..=28, slots in 1u32..2000, third in 0u8..=255) {
            let mask = u32::MAX << (32 - u32::from(prefix));
            let subnet = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 9, third, 0)) & mask);
            let plan = NetworkPlan { subnet, prefix, slots, bridge: "cnr0".to_owned(), ..plan() };
            prop_assume!(plan.check().is_ok());
            let slots = plan.slots();
            let distinct: HashSet<_> = slots.iter().map(|s| (s.mac, s.address, s.tap.clone())).collect();
            prop_assert_eq!(distinct.len(), plan.slots as usize);
            for slot in slots {
                let number = u32::from(slot.address);
                prop_assert_eq!(number & mask, u32::from(subnet));
                prop_assert!(number & !mask != 0 && number & !mask != !mask);
                prop_assert!(slot.address != plan.gateway());
                prop_assert!(slot.tap.len() <= DEVICE_NAME_MAX);
            }
        }
    }
}
