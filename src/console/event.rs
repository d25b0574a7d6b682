//! What happens at the proxy, for whoever keeps an audit log or counts.

use std::fmt;
use std::net::SocketAddr;

use super::channel::Kind;
use super::refusal::Refusal;
use super::relay::{Carried, ChannelEnd};
use super::session::{End, Session};

/// What happens, for audit logs and metrics.
#[derive(Debug)]
pub enum Event<'a> {
    /// A ticket was redeemed and the machine has its viewer.
    SessionOpened(&'a Session),
    /// All of its channels are closed.
    SessionClosed(&'a Session, &'a End),
    /// A ticket was redeemed, and its viewer got no session after all; why not is told as [`Event::Refused`].
    Unused {
        /// See [`Admission::ticket`](super::Admission::ticket).
        ticket: &'a str,
    },
    /// A channel is open on both sides.
    ChannelOpened {
        /// Whose.
        session: &'a Session,
        /// A number that no other channel of this session has. Kind and id are the viewer's word, and may come twice.
        channel: u64,
        /// Its kind.
        kind: Kind,
        /// Which of several.
        id: u8,
    },
    /// A channel that was open is closed.
    ChannelClosed {
        /// Whose.
        session: &'a Session,
        /// Which it was.
        channel: u64,
        /// Its kind.
        kind: Kind,
        /// Which of several.
        id: u8,
        /// What it carried.
        carried: Carried,
        /// Why.
        end: &'a ChannelEnd,
    },
    /// A connection was refused.
    Refused {
        /// Where it came from.
        from: SocketAddr,
        /// Why.
        why: &'a Refusal,
    },
}

/// One line for a log.
impl fmt::Display for Event<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Event::SessionOpened(session) => write!(
                f,
                "session {}: {} from {} at {}",
                session.number, session.viewer, session.from, session.machine
            ),
            Event::SessionClosed(session, end) => write!(
                f,
                "session {}: {end}; {} bytes to the viewer, {} to the machine",
                session.number,
                session.to_viewer(),
                session.to_machine()
            ),
            Event::Unused { ticket } => write!(f, "{ticket} was redeemed and opened nothing"),
            Event::ChannelOpened {
                session, kind, id, ..
            } => {
                write!(f, "session {}: {kind} {id} opened", session.number)
            }
            Event::ChannelClosed {
                session,
                kind,
                id,
                carried,
                end,
                ..
            } => write!(
                f,
                "session {}: {kind} {id} closed: {end}; {} bytes to the viewer, {} to the machine",
                session.number, carried.to_viewer, carried.to_machine
            ),
            Event::Refused { from, why } => write!(f, "{from} refused: {why}"),
        }
    }
}

/// Who is told what happens.
pub trait Observer: Send + Sync + 'static {
    /// Called from within the proxy's work: it must not block.
    fn saw(&self, event: &Event<'_>);
}
