//! Our own network: what it is (pure), and making it so.
//!
//! The network is made once and then left alone: an update would take libvirt's firewall rules down for a moment, for
//! every running job. So it has a fixed number of *slots*, pairs of MAC and address that dnsmasq knows from the
//! start; a job leases one, and knows its guest's address before the guest runs.
//!
//! Isolation is not libvirt's (whose rules let guests of one network reach each other, and every service that the host
//! runs on all addresses) but two nftables tables of our own; see [`firewall`].

pub mod firewall;
pub mod plan;
pub mod provide;
pub mod routes;

pub use plan::{Difference, HostPort, NetworkPlan, Protocol, Slot};
pub use provide::{Error, Provided, provide, remove};
