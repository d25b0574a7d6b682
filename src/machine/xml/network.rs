//! Our network's XML.

use uuid::Uuid;

use super::super::network::NetworkPlan;
use super::{Error, Node, node};

/// Under it our networks' UUIDs are derived from their names, so that two callers who define the same network at the
/// same time define one and the same.
const NETWORK_NAMESPACE: Uuid = Uuid::from_u128(0x0f5b_7c1e_6a0d_4a55_9f0b_6d3c_5a2e_91c4);

/// Options for dnsmasq, each with its reason:
/// * `no-ping`: it would ping an address for seconds before it offers it, and all addresses are spoken for;
/// * `dhcp-ignore-clid`: a slot's next guest has another client id, and must still get the slot's address;
/// * `dhcp-authoritative` is libvirt's own.
const DNSMASQ_OPTIONS: [&str; 2] = ["no-ping", "dhcp-ignore-clid"];

/// Builds the network's tree.
pub fn network(plan: &NetworkPlan) -> Node {
    let uuid = Uuid::new_v5(&NETWORK_NAMESPACE, plan.name.as_bytes());
    let hosts = plan.slots().into_iter().map(|slot| {
        node("host")
            .with("mac", slot.mac.to_string())
            .with("name", format!("slot-{}", slot.index))
            .with("ip", slot.address.to_string())
    });
    node("network")
        .with("xmlns:dnsmasq", "http://libvirt.org/schemas/network/dnsmasq/1.0")
        .child(node("name").text(&plan.name))
        .child(node("uuid").text(uuid.to_string()))
        .child(node("forward").with("mode", "nat"))
        .child(
            node("bridge")
                .with("name", &plan.bridge)
                // A bridge with STP listens and learns for four seconds before it lets a guest's first packet through.
                .with("stp", "off")
                .with("delay", "0"),
        )
        .child(
            node("ip")
                .with("address", plan.gateway().to_string())
                .with("prefix", plan.prefix.to_string())
                .child(node("dhcp").children(hosts)),
        )
        .child(
            node("dnsmasq:options").children(
                DNSMASQ_OPTIONS
                    .iter()
                    .map(|option| node("dnsmasq:option").with("value", *option)),
            ),
        )
}

/// Writes the network for libvirt.
///
/// # Errors
/// [`Error::Control`] for names that [`NetworkPlan::check`] would have refused.
pub fn render(plan: &NetworkPlan) -> Result<String, Error> {
    network(plan).render()
}

#[cfg(test)]
mod tests {
    use super::super::super::network::plan::{Shape, tests::plan};
    use super::*;

    /// What libvirt gives back for `render(plan())`: attributes of its own, other order.
    const FROM_LIBVIRT: &str = "<network xmlns:dnsmasq='http://libvirt.org/schemas/network/dnsmasq/1.0' connections='1'>
        <name>cannery</name><uuid>9a8f5c5e-0000-4000-8000-000000000000</uuid>
        <forward mode='nat'><nat><port start='1024' end='65535'/></nat></forward>
        <bridge name='cannery0' stp='off' delay='0'/><mac address='52:54:00:11:22:33'/>
        <ip address='10.211.0.1' netmask='255.255.255.0'><dhcp>
          <host mac='52:54:0a:d3:00:03' name='slot-1' ip='10.211.0.3'/>
          <host mac='52:54:0a:d3:00:02' name='slot-0' ip='10.211.0.2'/>
          <host mac='52:54:0a:d3:00:04' name='slot-2' ip='10.211.0.4'/>
          <host mac='52:54:0a:d3:00:05' name='slot-3' ip='10.211.0.5'/>
        </dhcp></ip>
        <dnsmasq:options><dnsmasq:option value='no-ping'/><dnsmasq:option value='dhcp-ignore-clid'/></dnsmasq:options>
      </network>";

    #[test]
    fn what_libvirt_made_of_it_is_the_same() {
        let wanted = Shape::of(&network(&plan()));
        let found = Shape::of(&Node::parse(FROM_LIBVIRT).unwrap());
        assert_eq!(wanted.differences(&found), []);
    }

    #[test]
    fn a_change_is_named() {
        let wanted = Shape::of(&network(&plan()));
        let cases = [
            (
                "10.211.0.1' netmask",
                "10.99.0.1' netmask",
                "its address is 10.99.0.1/24 instead of 10.211.0.1/24",
            ),
            ("255.255.255.0", "255.255.0.0", "its address is 10.211.0.1/16"),
            (
                "<host mac='52:54:0a:d3:00:05' name='slot-3' ip='10.211.0.5'/>",
                "",
                "its number of slots is 3 (10.211.0.2 to 10.211.0.4)",
            ),
            ("52:54:0a:d3:00:05", "52:54:0a:d3:00:06", "table of slots"),
            ("stp='off'", "stp='on'", "its bridge set-up is stp on delay 0"),
            ("mode='nat'", "mode='route'", "its forwarding is route"),
            (
                "<dhcp>",
                "<dhcp><range start='10.211.0.100' end='10.211.0.200'/>",
                "its DHCP set-up is 1 dynamic",
            ),
            ("no-ping", "log-dhcp", "its DHCP set-up"),
            ("cannery0", "virbr9", "its bridge is virbr9"),
        ];
        for (from, to, sentence) in cases {
            assert!(FROM_LIBVIRT.contains(from));
            let found = Shape::of(&Node::parse(&FROM_LIBVIRT.replace(from, to)).unwrap());
            let said = wanted.differences(&found);
            assert!(
                !said.is_empty() && said[0].to_string().contains(sentence),
                "{said:?}, not {sentence}"
            );
        }
    }

    #[test]
    #[ignore = "needs virt-xml-validate (libvirt-clients)"]
    fn libvirts_schema_accepts_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("network.xml");
        std::fs::write(&file, render(&plan()).unwrap()).unwrap();
        super::super::domain::tests::assert_valid(&file, "network");
    }
}
