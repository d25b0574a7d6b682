//! Our own network.

pub mod plan;

pub use plan::{Difference, HostPort, NetworkPlan, Protocol, Slot};
