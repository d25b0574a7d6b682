//! The same machine without us: libvirt's own client starts it from the XML that cannery used, and a probe of its own waits
//! for the guest's SSH server.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::executor::timed;
use crate::outcome::Failure;

/// How often the probe knocks.
const PROBE_EVERY: Duration = Duration::from_millis(10);
/// How long a knock waits for an answer: the kernel repeats it only after a second, while the guest may come up in between.
const KNOCK_PATIENCE: Duration = Duration::from_millis(250);
/// Most knocks at the same time: SSH servers refuse whoever has more connections without a login (five, with dropbear), and
/// the login that comes next must find room.
const MOST_KNOCKS: usize = 3;
/// How long an open port may take to say a word; a guest that is emulated needs a moment to start a process for it.
const PROBE_PATIENCE: Duration = Duration::from_secs(2);
/// What every SSH server says first (RFC 4253, 4.2).
const BANNER: &[u8] = b"SSH-";

/// libvirt's own client.
#[derive(Debug)]
pub(super) struct Virsh {
    /// libvirt's connection URI.
    pub(super) uri: String,
}

impl Virsh {
    /// Starts a machine from a file of XML, and waits for the banner at its address, `within` at most. The time counts from
    /// the client's start.
    pub(super) async fn boot(
        &self,
        xml: &Path,
        address: SocketAddr,
        within: Duration,
    ) -> Result<Duration, Failure> {
        let begin = Instant::now();
        let xml = xml.display().to_string();
        let words = ["create", xml.as_str()];
        // Knocked at from the start: the client may return after the guest has begun to answer.
        let (created, answered) =
            tokio::join!(self.call(&words), tokio::time::timeout(within, banner(address)),);
        created?;
        match answered {
            Ok(at) => Ok(at - begin),
            Err(_) => Err(Failure::system(format!(
                "the guest that virsh started did not answer at {address} within {} s",
                within.as_secs()
            ))),
        }
    }

    /// Ends a machine at once.
    pub(super) async fn destroy(&self, name: &str) -> Result<Duration, Failure> {
        self.call(&["destroy", name]).await
    }

    async fn call(&self, words: &[&str]) -> Result<Duration, Failure> {
        let mut command = Command::new("virsh");
        command
            .args(["--quiet", "--connect", &self.uri])
            .args(words)
            .process_group(0);
        let (took, _) = timed(&mut command, Stdio::null(), "virsh")
            .await
            .map_err(|e| e.hint("virsh comes with libvirt's clients"))?;
        Ok(took)
    }
}

/// The moment of the first banner. A new knock joins those that got no answer yet; once a port is open, its server is
/// left in peace to say its word.
async fn banner(address: SocketAddr) -> Instant {
    let mut knocks = JoinSet::new();
    let mut clock = tokio::time::interval(PROBE_EVERY);
    // Ticks that nobody waited for are not made up for.
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            Some(answer) = knocks.join_next() => {
                if let Ok(Ok(Ok(stream))) = answer
                    && let Ok(Some(at)) = tokio::time::timeout(PROBE_PATIENCE, word_of(stream)).await
                {
                    return at;
                }
            }
            _ = clock.tick(), if knocks.len() < MOST_KNOCKS => {
                knocks.spawn(tokio::time::timeout(KNOCK_PATIENCE, TcpStream::connect(address)));
            }
        }
    }
}

/// The moment in which a server has said that it speaks SSH; `None` where it did not.
async fn word_of(mut stream: TcpStream) -> Option<Instant> {
    let mut word = [0; BANNER.len()];
    stream.read_exact(&mut word).await.ok()?;
    (word == BANNER).then(Instant::now)
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn the_probe_waits_for_a_server_that_says_what_it_is() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let begin = Instant::now();
        let late = Duration::from_millis(120);
        let server = async {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let words: &[u8] = if begin.elapsed() < late {
                    b"HTTP"
                } else {
                    b"SSH-2.0-x\r\n"
                };
                // The probe may have gone.
                let _ = stream.write_all(words).await;
            }
        };
        let at = tokio::select! {
            at = banner(address) => at,
            () = server => unreachable!(),
        };
        assert!(at - begin >= late, "{:?}", at - begin);
        assert!(at - begin < Duration::from_secs(5));
    }
}
