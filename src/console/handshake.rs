//! The server's side of the handshake: what a viewer says before it is let in.
//!
//! Each step has a deadline; spice-server has none, so a peer that says nothing would stay for ever.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::keys::{Asks, Key, Keys};
use super::link::{self, Caps, Code, Common, Hello, Reply};
use super::wire::{self, Stream};
use crate::secret::Secret;

/// For the link message: a viewer sends it without being asked, so this is only the network's time.
pub const LINK_TIME: Duration = Duration::from_secs(5);
/// For a key: longer than a burst of hundreds of viewers takes to be served.
pub const KEY_TIME: Duration = Duration::from_secs(10);
/// For the ticket: viewers ask people for it before or after, but not during a connection.
pub const TICKET_TIME: Duration = Duration::from_secs(10);

/// Why a connection ended before it was let in.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// What it sent is not the protocol, or not what this listener takes; it has been told so.
    #[error("the link message was refused: {0}")]
    Refused(Code),
    /// It wants to authenticate in another way than by a ticket.
    #[error("the mechanism {0} was asked for, where there are only tickets")]
    Mechanism(u32),
    /// It was too slow.
    #[error("nothing came for {} s while {what} was awaited", within.as_secs())]
    Slow {
        /// The step.
        what: &'static str,
        /// The deadline.
        within: Duration,
    },
    /// No more keys are made.
    #[error("there are no keys for tickets")]
    NoKey,
    /// It went away.
    #[error("the connection ended: {0}")]
    Lost(#[from] io::Error),
}

/// One step with its deadline.
async fn within<T>(
    what: &'static str,
    within: Duration,
    step: impl Future<Output = Result<T, HandshakeError>>,
) -> Result<T, HandshakeError> {
    timeout(within, step)
        .await
        .unwrap_or(Err(HandshakeError::Slow { what, within }))
}

/// Reads what the viewer asks for. One that sends something else is told so before this returns.
///
/// # Errors
/// As [`HandshakeError`] lists them.
pub async fn hello<S: Stream + ?Sized>(wire: &mut S) -> Result<Hello, HandshakeError> {
    let heard = within("the link message", LINK_TIME, async {
        let mut magic = [0; 4];
        wire.read_exact(&mut magic).await?;
        link::check_magic(magic).map_err(HandshakeError::Refused)?;
        let mut rest = [0; 12];
        wire.read_exact(&mut rest).await?;
        let mut body = vec![0; link::hello_size(rest).map_err(HandshakeError::Refused)?];
        wire.read_exact(&mut body).await?;
        Hello::decode(&body).map_err(HandshakeError::Refused)
    })
    .await;
    if let Err(HandshakeError::Refused(code)) = heard {
        refuse(wire, code).await;
    }
    heard
}

/// Refuses a link message.
pub async fn refuse<S: Stream + ?Sized>(wire: &mut S, code: Code) {
    wire::last_words(wire, &Reply::refusal(code)).await;
}

/// A key for a viewer, as soon as there is one.
///
/// # Errors
/// [`HandshakeError::Slow`], [`HandshakeError::NoKey`].
pub async fn key(keys: &Keys, who: Asks) -> Result<Key, HandshakeError> {
    within("a key", KEY_TIME, async {
        keys.take(who).await.ok_or(HandshakeError::NoKey)
    })
    .await
}

/// Shows what the machine can do, and the key; returns the ticket that the viewer sent under it, or `None` where it sent
/// something that is none.
///
/// # Errors
/// As [`HandshakeError`] lists them.
pub async fn ticket<S: Stream + ?Sized>(
    wire: &mut S,
    hello: &Hello,
    shown: &Caps,
    key: Key,
) -> Result<Option<Secret>, HandshakeError> {
    within("the ticket", TICKET_TIME, async {
        let reply = Reply {
            key: *key.public(),
            caps: shown.clone(),
        };
        wire.write_all(&reply.encode()).await?;
        wire.flush().await?;
        // Whoever cannot choose a mechanism names none.
        if hello.caps.has(Common::AuthSelection) {
            let mechanism = wire.read_u32_le().await?;
            if mechanism != link::MECHANISM_TICKET {
                return Err(HandshakeError::Mechanism(mechanism));
            }
        }
        let mut sealed = [0; link::SEALED];
        wire.read_exact(&mut sealed).await?;
        Ok(open(key, &sealed))
    })
    .await
}

/// A ticket that viewers could have sent.
fn open(key: Key, sealed: &[u8; link::SEALED]) -> Option<Secret> {
    key.open(sealed)
        .filter(|ticket| !ticket.reveal().is_empty() && ticket.reveal().len() <= link::TICKET_MAX)
}

/// Ends the handshake: with [`Code::Ok`] messages begin; with any other the viewer is gone when this returns.
///
/// # Errors
/// [`HandshakeError::Lost`], when the acceptance did not reach it.
pub async fn verdict<S: Stream + ?Sized>(wire: &mut S, code: Code) -> Result<(), HandshakeError> {
    let bytes = code.number().to_le_bytes();
    if code == Code::Ok {
        wire.write_all(&bytes).await?;
        wire.flush().await?;
    } else {
        wire::last_words(wire, &bytes).await;
    }
    Ok(())
}
