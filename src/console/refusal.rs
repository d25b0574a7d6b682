//! Why viewers are turned away, and what they are told.

use std::io;

use super::backend::DialError;
use super::channel::Kind;
use super::handshake::HandshakeError;
use super::link::Code;
use super::session::End;

/// Why a ticket admits to nothing.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Denied {
    /// Nobody made it, or it is forgotten.
    #[error("the ticket is not known")]
    Unknown,
    /// Its time is over.
    #[error("the ticket has expired")]
    Expired,
    /// It was used as often as it may be, or by as many as it may be at a time.
    #[error("the ticket was used as often as it may be")]
    Used,
    /// Its owner has no room for one more.
    #[error("there are as many console sessions as this host allows")]
    Full,
    /// It is for looking, and somebody who may do more has its machine at another proxy.
    #[error("the machine is used by someone who may do more than look")]
    Taken,
    /// Its machine is not there any more.
    #[error("the ticket's machine is gone")]
    MachineGone,
    /// It cannot be said.
    #[error("the ticket could not be checked: {0}")]
    Unchecked(String),
}

/// Why a connection was refused.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Too many wait, in all or from there; or too many wrong tickets came from there, or none where one was asked for; or
    /// too many channels were begun from there.
    #[error(
        "too many connections are waiting, or too many came from that address with wrong tickets or at all"
    )]
    Crowded,
    /// The handshake did not come to its end.
    #[error("{0}")]
    Handshake(#[from] HandshakeError),
    /// TLS did not.
    #[error("TLS failed: {0}")]
    Tls(io::Error),
    /// What it sent is no ticket, or a later channel named one without a session.
    #[error("it has no ticket that is good for anything")]
    NoTicket,
    /// The owner's word.
    #[error("{0}")]
    Denied(Denied),
    /// A main channel that names a session, as after a machine's move; or a later channel that names one that is not its.
    #[error("it named a session that is not there")]
    NoSession,
    /// It may not open this kind of channel.
    #[error("it may not open a {0} channel")]
    NotAllowed(Kind),
    /// There are too many sessions, or channels in this one.
    #[error("there are too many sessions, or channels in this one")]
    Full,
    /// The machine is used by someone who may type, and this one may only look.
    #[error("the machine is used by someone who may do more than look")]
    Taken,
    /// The machine's viewers have taken it from each other too often.
    #[error("the machine was taken over too often in the last minute")]
    TooManyTakeovers,
    /// The session ended while its channel was being opened.
    #[error("its session ended meanwhile: {0}")]
    Ended(End),
    /// The machine's side.
    #[error("{0}")]
    Machine(#[from] DialError),
    /// The machine can do less than was shown, which the next viewer will see.
    #[error("the machine can do less than the viewer was told")]
    Less,
}

impl Refusal {
    /// A word for metrics: one of a few.
    pub fn name(&self) -> &'static str {
        match self {
            Refusal::Crowded => "crowded",
            Refusal::Handshake(_) => "handshake",
            Refusal::Tls(_) => "tls",
            Refusal::Denied(Denied::Full) | Refusal::Full => "full",
            Refusal::Denied(Denied::Taken) => "taken",
            Refusal::NoTicket | Refusal::Denied(_) => "ticket",
            Refusal::NoSession => "session",
            Refusal::NotAllowed(_) => "channel",
            Refusal::Taken | Refusal::TooManyTakeovers => "taken",
            Refusal::Ended(_) => "ended",
            Refusal::Machine(_) | Refusal::Less => "machine",
        }
    }

    /// What the viewer is told. `None` when it is gone, or was told already.
    pub(super) fn code(&self) -> Option<Code> {
        Some(match self {
            Refusal::Handshake(HandshakeError::Mechanism(_)) => Code::InvalidData,
            Refusal::Handshake(_) | Refusal::Tls(_) | Refusal::Crowded => return None,
            Refusal::Denied(Denied::Full) | Refusal::Full | Refusal::Ended(_) | Refusal::Less => Code::Error,
            Refusal::NoTicket | Refusal::Denied(_) | Refusal::Taken | Refusal::TooManyTakeovers => {
                Code::PermissionDenied
            }
            Refusal::NoSession => Code::BadConnectionId,
            Refusal::NotAllowed(_) => Code::ChannelNotAvailable,
            Refusal::Machine(error) => error.code(),
        })
    }
}
