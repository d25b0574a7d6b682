//! The machine of a job: from our own typed description to a running libvirt domain.
//!
//! ```text
//! Description (what a guest can see) ─┐
//! Placement (names, paths, network) ──┴▶ xml::domain::render ▶ Libvirt::create ▶ State ▶ watch::judge
//!     ▲               ▲
//!     │               └ overlay, serial log, private kernel: files in the job's folder
//!     └ accelerator: emulation or KVM, from what was seen on this host
//! NetworkPlan ▶ network::provide ▶ libvirt network + our nftables tables
//! ```
//!
//! Nothing of a machine comes from its image: an image can name no path, no device and no option. Everything is pure
//! but [`libvirt`], [`overlay`], [`serial`]'s file access, the memories of [`accelerator`] and [`versions`], and
//! [`network::provide()`].

pub mod accelerator;
pub mod description;
pub mod keys;
pub mod libvirt;
pub mod network;
pub mod overlay;
pub mod placement;
pub mod screen;
pub mod serial;
pub mod versions;
pub mod watch;
pub mod xml;

pub use description::Description;
pub use keys::Keys;
pub use libvirt::Libvirt;
pub use network::{NetworkPlan, Slot};
pub use placement::Placement;
pub use xml::domain::render;
