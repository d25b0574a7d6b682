//! Whether a subnet is free on this host (pure; the caller reads `/proc/net/route`).

use std::net::Ipv4Addr;

use super::NetworkPlan;

/// A route of the host that covers addresses of a planned subnet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// The interface that has it.
    pub interface: String,
    /// Destination.
    pub destination: Ipv4Addr,
    /// Length of its prefix.
    pub prefix: u32,
}

/// Finds a route that overlaps with the plan's subnet. The default route and the routes of the plan's own bridge do
/// not count.
///
/// `table` is the kernel's text: a heading, then a line for each route with interface, destination, gateway, flags,
/// reference count, use, metric and mask; addresses are hexadecimal numbers in the machine's own byte order. Lines that do
/// not read so are passed over.
pub fn conflict(plan: &NetworkPlan, table: &str) -> Option<Conflict> {
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let number = |index: usize| {
            let raw = u32::from_str_radix(fields.get(index)?, 16).ok()?;
            Some(u32::from_be_bytes(raw.to_ne_bytes()))
        };
        let (interface, destination, mask) = (*fields.first()?, number(1)?, number(7)?);
        let common = mask & plan.mask();
        let overlaps = destination & common == u32::from(plan.subnet) & common;
        (mask != 0 && overlaps && interface != plan.bridge).then(|| Conflict {
            interface: interface.to_owned(),
            destination: destination.into(),
            prefix: mask.leading_ones(),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::super::plan::tests::plan;
    use super::*;

    fn table(routes: &[(&str, [u8; 4], [u8; 4])]) -> String {
        let mut text =
            "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n".to_owned();
        for (interface, destination, mask) in routes {
            let [destination, mask] = [destination, mask].map(|bytes| u32::from_ne_bytes(*bytes));
            text +=
                &format!("{interface}\t{destination:08X}\t00000000\t0001\t0\t0\t0\t{mask:08X}\t0\t0\t0\n");
        }
        text
    }

    #[test]
    fn a_route_inside_around_or_equal_is_a_conflict() {
        // The plan is 10.211.0.0/24.
        let cases: [([u8; 4], [u8; 4], Option<u32>); 6] = [
            ([0, 0, 0, 0], [0, 0, 0, 0], None),
            ([192, 168, 0, 0], [255, 255, 0, 0], None),
            ([10, 211, 1, 0], [255, 255, 255, 0], None),
            ([10, 211, 0, 0], [255, 255, 255, 0], Some(24)),
            ([10, 0, 0, 0], [255, 0, 0, 0], Some(8)),
            ([10, 211, 0, 64], [255, 255, 255, 192], Some(26)),
        ];
        for (destination, mask, expected) in cases {
            let found = conflict(&plan(), &table(&[("eth0", destination, mask)]));
            assert_eq!(found.map(|c| c.prefix), expected, "{destination:?}");
        }
    }

    #[test]
    fn the_networks_own_route_is_none() {
        let own = table(&[("cannery0", [10, 211, 0, 0], [255, 255, 255, 0])]);
        assert_eq!(conflict(&plan(), &own), None);
        assert_eq!(conflict(&plan(), "heading\nnonsense\n\n"), None);
    }
}
