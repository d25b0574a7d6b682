//! A SPICE proxy: viewers on one side, the screens of machines on the other.
//!
//! A viewer's password is a ticket, which says what machine it sees. The proxy takes it, asks its owner (a [`Door`]) what it
//! is good for, and opens the viewer's channels at that machine, over a descriptor from libvirt, a socket or TLS. Viewers
//! are the usual ones, unchanged; so are machines.
//!
//! ```text
//! viewer ─▶ listener ─▶ handshake ─▶ Door: ticket ▶ Admission ─▶ session ─▶ backend ─▶ machine
//!           limits      keys, caps                               relay: filter, gate, hall, acks, queue
//! ```
//!
//! What it does besides carrying bytes:
//!
//! - Every step of a handshake has a deadline, and connections that have shown no ticket are counted, in all and by
//!   address ([`Limits`]).
//! - A viewer is shown what the machine itself can do, and gets the machine's own answer.
//! - A later channel belongs to the session whose number and ticket it names, however old the ticket is.
//! - A machine learns of a display channel together with its first message. Without that, a viewer that opens one and says
//!   nothing would hold QEMU's control connection up for half a minute ([`gate`]).
//! - A machine that draws waits for no viewer: what it sends is taken and acknowledged here ([`acks`]), and a viewer for whom
//!   too much waits, or for too long, loses its session. Otherwise one that acknowledges nothing, or does not read, would do
//!   the same.
//! - Only messages go through that viewers send, in sizes that they have; with [`Mode::ViewOnly`], nothing that types,
//!   points, speaks or carries data ([`filter`]).
//! - A session ends at once, with all of its channels, when [`Proxy::end`] says so, and its viewer is told why.
//!
//! `examples/spice_proxy.rs` is a whole proxy. The owner's part is a [`Door`] and an [`Observer`]; connections come from
//! [`Proxy::listen`], plain or over TLS, or from the caller: [`Proxy::serve_websocket`] takes WebSockets, of whatever library, and
//! [`Proxy::serve`] any other stream.
//! Everything runs on the caller's tokio runtime, besides two threads that make keys.

pub mod acks;
pub mod backend;
mod caps;
pub mod channel;
mod down;
mod event;
pub mod filter;
pub mod frame;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod gate;
pub mod hall;
pub mod handshake;
pub mod keys;
pub mod limits;
pub mod link;
mod listener;
mod proxy;
mod queue;
mod refusal;
mod relay;
mod session;
pub mod tls;
mod websocket;
pub mod wire;

pub use backend::{Backend, DialError};
pub use channel::{Kind, Kinds, Mode};
pub use event::{Event, Observer};
pub use limits::Limits;
pub use listener::Security;
pub use proxy::{Door, Proxy};
pub use refusal::{Denied, Refusal};
pub use relay::{Carried, ChannelEnd};
pub use session::{Admission, End, Session, Whose};
pub use tls::Certificate;
