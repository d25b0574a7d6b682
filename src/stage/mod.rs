//! The four calls of gitlab-runner's custom executor.
//!
//! Each is one function from settings and environment to an outcome; they compose the other modules and
//! hold no mechanism of their own.

use crate::job::Identity;
use crate::machine::network::{HostPort, NetworkPlan, Protocol};
use crate::settings::OwnNetwork;

mod cleanup;
mod config;
mod hold;
pub mod images;
pub mod imports;
mod invite;
pub mod kept;
mod order;
mod post_mortem;
mod prepare;
mod pull_log;
mod run;
mod visit;

pub use cleanup::cleanup;
pub use config::config;
pub use order::Order;
pub use prepare::prepare;
pub use run::run;

/// What a job's guest is called.
fn hostname(identity: &Identity) -> String {
    format!("job-{}", identity.id)
}

/// The network that the settings describe.
pub fn network_plan(own: &OwnNetwork) -> NetworkPlan {
    let port = |p: &crate::settings::file::HostPort| HostPort {
        protocol: if p.udp { Protocol::Udp } else { Protocol::Tcp },
        port: p.port,
    };
    NetworkPlan {
        name: own.name.clone(),
        bridge: own.name.clone(),
        subnet: own.subnet.network,
        prefix: own.subnet.prefix,
        slots: own.slots,
        host_ports: own.host_ports.iter().map(port).collect(),
    }
}
