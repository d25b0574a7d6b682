//! How fast cannery is on this host, against what else there is: one file a bench.
//!
//! ```text
//! stages ─▶ executor (the four stages, called as a runner does: ours, and another one's)
//!   │   ├─▶ openssh  (the same script through the OpenSSH client)
//!   │   └─▶ boot     (the same machine without us)
//!   └─▶ figure       (medians, ratios, goals: what is printed)
//! images ─▶ a registry on loopback, a disk of real files, other tools, the bare machine
//!   └─▶ figure
//! console ─▶ a machine's screen and viewers of its own, around the proxy in a process of its own, and around socat
//!   └─▶ figure
//! ```
//!
//! What is compared is measured in turns within one run, since hosts are slower and faster by the minute.

mod boot;
pub mod console;
mod executor;
mod figure;
pub mod images;
mod openssh;
mod scratch;
pub mod stages;

pub use executor::Executor;
pub use figure::{Figure, Goal, Peer, Row, Unit};
