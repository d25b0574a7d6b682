//! SSH to the guest: libssh2 in non-blocking mode, one thread per connection.
//!
//! | part | what it does |
//! |---|---|
//! | `dial` | knocks until a server says who it is |
//! | `link` | key exchange and login over one socket |
//! | `serve` | the thread's loop: commands on channels, liveness |
//! | [`Input`] | what a command reads |
//! | [`Keyboard`], [`Window`] | a command on a terminal |
//! | [`Connection`] | the asynchronous handle of all that |

mod connection;
mod dial;
mod input;
mod link;
mod serve;
mod terminal;
mod wake;

pub(crate) use connection::unless;
pub use connection::{Connection, Login, Output, Running};
pub use input::Input;
pub use serve::Event;
pub use terminal::{Keyboard, Window};

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::keys::{KeyPair, PublicKey};
use crate::secret::Secret;

/// Where a guest is reached, as whom, and how each side proves who it is.
#[derive(Debug, Clone)]
pub struct Target {
    /// The guest's SSH server.
    pub address: SocketAddr,
    /// The account to log in to.
    pub user: String,
    /// Ways to log in, tried in this order.
    pub auth: Vec<Auth>,
    /// What is known of the guest's host key.
    pub host_key: HostKeyPolicy,
}

/// One way to log in.
#[derive(Debug, Clone)]
pub enum Auth {
    /// With a key that we made.
    Key(KeyPair),
    /// With a private key of the operator's, in a file without a passphrase.
    KeyFile(PathBuf),
    /// With a password, directly or where the server asks for it (keyboard-interactive).
    Password(Secret),
}

/// What to hold of the host key that a guest shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostKeyPolicy {
    /// Only this one; any other is an error at once. For keys that are in place before the server starts.
    Expect(PublicKey),
    /// Only this one, but the server may begin with another one: wait. For keys that something brings in while the guest boots.
    Await(PublicKey),
    /// Any; the key seen is in [`Login::host_key`] and should be expected from then on.
    Any,
}

/// How far a connection has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Progress {
    /// Nothing has answered yet.
    Started,
    /// The address answers, though nothing listens there.
    Address,
    /// The port accepts connections.
    Tcp,
    /// An SSH server has said its name.
    Banner,
    /// The server has shown its host key.
    KeyExchange,
    /// We are in.
    Login,
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Started => "it was powered on, but nothing answered at its address",
            Self::Address => "its address answered, but nothing listened on the SSH port",
            Self::Tcp => "the SSH port was open, but no SSH server said its name",
            Self::Banner => "an SSH server answered, but no key exchange succeeded",
            Self::KeyExchange => "an SSH server answered, but let nobody log in",
            Self::Login => "the login succeeded",
        })
    }
}

/// The methods of a connection, by the names that SSH gives them (RFC 4250, 4.11).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreed {
    /// How the session's keys were made.
    pub key_exchange: String,
    /// How the server signed with its host key.
    pub host_key: String,
    /// How what we send is encrypted.
    pub cipher: String,
    /// How what we send is authenticated; of no account where the cipher does that itself.
    pub mac: String,
}

/// When to give up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// How long to try until we are logged in.
    pub login: Duration,
    /// How long a guest may be silent, keepalives unanswered, before the connection counts as lost.
    pub silence: Duration,
}

/// What went wrong on a connection.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The time to log in has passed.
    #[error("the guest at {address} was not reached within {:.0} s: {reached} (last: {last})", waited.as_secs_f64())]
    TimedOut {
        /// Where we knocked.
        address: SocketAddr,
        /// For how long.
        waited: Duration,
        /// The furthest that any attempt came.
        reached: Progress,
        /// Why the last attempt failed.
        last: String,
    },
    /// The server refuses all that we have to log in with, again and again.
    #[error("the guest's SSH server refuses user {user} with {offered}")]
    Denied {
        /// The account.
        user: String,
        /// What was offered, in words.
        offered: String,
    },
    /// The server is not the one that we know.
    #[error("the guest's SSH server shows host key {seen}, but {expected} was expected")]
    HostKey {
        /// What it showed.
        seen: PublicKey,
        /// What it should have shown.
        expected: PublicKey,
    },
    /// A private key cannot be used.
    #[error("private key {name} cannot be used: {reason}")]
    KeyUnusable {
        /// The file, or "of the job".
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The guest has gone silent for so long.
    #[error("the connection to the guest is lost: nothing was heard from it for {} s", .0.as_secs())]
    Silent(Duration),
    /// The connection has ended.
    #[error("the connection to the guest is lost: {0}")]
    Lost(String),
    /// The server opens no further session.
    #[error("the guest's SSH server refused to run a command: {0}")]
    Refused(String),
    /// A command took longer than it may.
    #[error("a command in the guest took longer than {} s", .0.as_secs())]
    TooSlow(Duration),
    /// This host could not do its part.
    #[error("cannot {doing}: {reason}")]
    Host {
        /// What was tried.
        doing: &'static str,
        /// What the system said.
        reason: String,
    },
    /// We were told to stop.
    #[error("the connection was given up")]
    Stopped,
}
