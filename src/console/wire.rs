//! A connection, whatever carries it.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

/// Bytes both ways: TCP, TLS, a unix socket, a WebSocket that its owner made into one.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// Any of them.
pub type Wire = Box<dyn Stream>;

/// Seconds without a byte after which a TCP connection is probed: short, since a viewer that is gone holds the machine.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
/// Between two probes.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(15);
/// Probes without an answer after which the other side is gone. A silent channel is none: only a dead peer ends so.
const KEEPALIVE_PROBES: u32 = 3;
/// For bytes of ours that are not taken: the system's own patience is a quarter of an hour. As long as the probes take together.
const UNTAKEN: Duration = Duration::from_secs(75);
/// How long a refused peer may take to read why. Closed at once, its unread bytes would reset the connection, and the
/// reason would be lost with it.
const LINGER: Duration = Duration::from_secs(1);

/// Keys and pictures go out as they come, and a peer that vanished is noticed.
///
/// # Errors
/// The system's.
pub fn tune(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_EVERY)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)?;
    let untaken = u32::try_from(UNTAKEN.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(stream, untaken)?;
    Ok(())
}

/// Says a last thing and waits until the other side has gone, for a second at most.
pub(super) async fn last_words<S: Stream + ?Sized>(wire: &mut S, bytes: &[u8]) {
    let farewell = async {
        wire.write_all(bytes).await?;
        wire.flush().await?;
        wire.shutdown().await?;
        let mut unread = [0; 512];
        while wire.read(&mut unread).await? > 0 {}
        io::Result::Ok(())
    };
    // Whether it was heard makes no difference to us.
    drop(tokio::time::timeout(LINGER, farewell).await);
}
