//! Those who mean harm, in a thread of their own.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::aside::Aside;
use super::viewer::{Way, connect, greet, hello, knock};
use crate::console::Kind;
use crate::outcome::Failure;
use crate::secret::Secret;

/// Most descriptors at a time: what a host gives a process without being asked, and some for others.
const OPEN_MAX: usize = 900;
/// The first bytes of a TLS handshake, which then does not go on: a record of 512 bytes.
const TLS_BEGINNING: [u8; 6] = [0x16, 0x03, 0x01, 0x02, 0x00, 0x01];
/// After the connections of each address: for the listener's queue to be emptied, which is as long as the system allows.
const BREATH: Duration = Duration::from_millis(1);

/// What they do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Abuse {
    /// So many connections that say nothing, from one address for each forty: what stops them is the limit for all.
    HalfOpen(usize),
    /// So many wrong tickets, from one address for each forty.
    BadTickets(usize),
    /// So many handshakes of TLS that do not go on, from one address for each forty.
    SlowTls(usize),
}

impl fmt::Display for Abuse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Abuse::HalfOpen(count) => write!(f, "{count} half-open connections"),
            Abuse::BadTickets(count) => write!(f, "{count} wrong tickets"),
            Abuse::SlowTls(count) => write!(f, "{count} slow handshakes"),
        }
    }
}

/// Connections from one address: below the proxy's limit for one.
const PER_ADDRESS: usize = 40;

/// Addresses of loopback that nobody else here uses.
fn address(number: usize) -> Ipv4Addr {
    let low = u8::try_from(number % 250).unwrap_or_default();
    let high = u8::try_from(number / 250 % 100).unwrap_or_default();
    Ipv4Addr::new(127, 0, 100 + high, 1 + low)
}

/// Begins. What is opened stays open until this is dropped.
pub(super) fn begin(what: Abuse, way: &Way) -> Result<Aside<io::Result<Held>>, Failure> {
    let way = way.clone();
    Aside::start("console bench abuse", move || act(what, way))
}

/// Connections that are still there.
#[derive(Debug)]
pub(super) struct Held(#[expect(dead_code, reason = "they are only held")] VecDeque<TcpStream>);

async fn act(what: Abuse, way: Way) -> io::Result<Held> {
    let at = way.to;
    let mut held = VecDeque::new();
    match what {
        Abuse::HalfOpen(count) => {
            for number in 0..count {
                hold(&mut held, connect(at, address(number / PER_ADDRESS)).await?);
            }
        }
        Abuse::SlowTls(count) => {
            for number in 0..count {
                let mut stream = connect(at, address(number / PER_ADDRESS)).await?;
                stream.write_all(&TLS_BEGINNING).await?;
                hold(&mut held, stream);
            }
        }
        Abuse::BadTickets(count) => {
            let wrong = Secret::new("nobody-made-this");
            for number in 0..count {
                // Refused in one way or the other; over TLS perhaps before it is spoken.
                let Ok(mut wire) = way.connect(address(number / PER_ADDRESS)).await else {
                    continue;
                };
                if let Ok(Ok(reply)) = greet(&mut wire, &hello(0, Kind::Main)).await {
                    drop(knock(&mut wire, &reply, &wrong).await);
                }
            }
        }
    }
    Ok(Held(held))
}

fn hold(held: &mut VecDeque<TcpStream>, stream: TcpStream) {
    if held.len() >= OPEN_MAX {
        held.pop_front();
    }
    held.push_back(stream);
}

/// Takes so many places at the door, and holds them.
pub(super) async fn fill(at: SocketAddr, places: usize) -> io::Result<Held> {
    let mut held = VecDeque::new();
    for number in 0..places {
        held.push_back(connect(at, address(number / PER_ADDRESS)).await?);
        if number % PER_ADDRESS == 0 {
            tokio::time::sleep(BREATH).await;
        }
    }
    Ok(Held(held))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_all_of_loopback_and_differ() {
        let all: std::collections::HashSet<_> = (0..1000).map(address).collect();
        assert_eq!(all.len(), 1000);
        assert!(all.iter().all(Ipv4Addr::is_loopback));
    }
}
