//! Viewers of the bench's own, which only read what comes.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::time::{Duration, Instant};

use openssl::ssl::{SslConnector, SslMethod, SslVerifyMode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio_openssl::SslStream;

use super::stub::{DRAW, HEAD, MAIN_INIT, PICTURE, WANTED, hear, message};
use crate::console::Kind;
use crate::console::keys;
use crate::console::link::{self, Caps, Code, Hello, Reply};
use crate::console::wire::Wire;
use crate::outcome::Failure;
use crate::secret::Secret;

/// Longest wait of a viewer: an emulated host that is busy with hundreds of others.
const PATIENCE: Duration = Duration::from_secs(60);
/// The one cipher of all that is compared.
const CIPHER: &str = "TLS_AES_256_GCM_SHA384";
/// What begins a display channel, and a key that goes down: message types of a viewer.
const DISPLAY_INIT: u16 = 101;
const KEY_DOWN: u16 = 101;
/// Enter, in scancode set 1.
const ENTER: [u8; 4] = [0x1c, 0, 0, 0];

/// A way to a screen.
#[derive(Clone)]
pub(super) struct Way {
    pub(super) to: SocketAddr,
    pub(super) tls: Option<SslConnector>,
}

impl Way {
    /// Without TLS.
    pub(super) fn plain(to: SocketAddr) -> Self {
        Way { to, tls: None }
    }

    /// With TLS. Nobody is verified: the certificate was made for this bench.
    pub(super) fn tls(to: SocketAddr) -> Result<Self, Failure> {
        let connector = || {
            let mut builder = SslConnector::builder(SslMethod::tls_client())?;
            builder.set_verify(SslVerifyMode::NONE);
            builder.set_ciphersuites(CIPHER)?;
            Ok(builder.build())
        };
        let tls = connector().map_err(|e: openssl::error::ErrorStack| {
            Failure::system(format!("OpenSSL cannot do TLS: {e}"))
        })?;
        Ok(Way { to, tls: Some(tls) })
    }

    /// A connection from an address of loopback. There are as many viewers' addresses as 127.0.0.0/8 has.
    pub(super) async fn connect(&self, from: Ipv4Addr) -> io::Result<Wire> {
        let stream = connect(self.to, from).await?;
        let Some(tls) = &self.tls else {
            return Ok(Box::new(stream));
        };
        let mut configured = tls.configure()?;
        configured.set_verify_hostname(false);
        let mut stream = SslStream::new(configured.into_ssl("localhost")?, stream)?;
        Pin::new(&mut stream).connect().await.map_err(io::Error::other)?;
        Ok(Box::new(stream))
    }
}

/// A TCP connection from this address.
pub(super) async fn connect(to: SocketAddr, from: Ipv4Addr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(SocketAddr::new(IpAddr::V4(from), 0))?;
    let stream = socket.connect(to).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// What a viewer sends first.
pub(super) fn hello(session: u32, kind: Kind) -> Hello {
    Hello {
        session,
        kind: kind.number(),
        id: 0,
        caps: Caps {
            common: vec![0b1001],
            channel: Vec::new(),
        },
    }
}

/// Sends the link message and reads the answer.
pub(super) async fn greet(wire: &mut Wire, hello: &Hello) -> io::Result<Result<Reply, Code>> {
    wire.write_all(&hello.encode()).await?;
    let mut head = [0; link::HEADER];
    wire.read_exact(&mut head).await?;
    let rest = head.last_chunk().copied().unwrap_or_default();
    let size = link::reply_size(rest).map_err(io::Error::other)?;
    let mut body = vec![0; size];
    wire.read_exact(&mut body).await?;
    Ok(Reply::decode(&body))
}

/// Sends the ticket, and reads what becomes of it.
pub(super) async fn knock(wire: &mut Wire, reply: &Reply, ticket: &Secret) -> io::Result<Code> {
    let sealed = keys::seal(ticket, &reply.key)?;
    let bytes = [&link::MECHANISM_TICKET.to_le_bytes()[..], &sealed].concat();
    wire.write_all(&bytes).await?;
    Ok(Code::from_number(wire.read_u32_le().await?))
}

/// One channel, and the key that it was shown.
struct Channel {
    wire: Wire,
    key: [u8; link::KEY],
}

async fn channel(way: &Way, from: Ipv4Addr, hello: &Hello, ticket: &Secret) -> io::Result<Channel> {
    let mut wire = way.connect(from).await?;
    let reply = greet(&mut wire, hello).await?.map_err(io::Error::other)?;
    match knock(&mut wire, &reply, ticket).await? {
        Code::Ok => Ok(Channel { wire, key: reply.key }),
        code => Err(io::Error::other(code)),
    }
}

/// A viewer that opens its screen's channel and never begins it.
pub(super) struct Mute {
    _main: Wire,
    pub(super) display: Wire,
}

impl Mute {
    pub(super) async fn open(way: &Way, from: Ipv4Addr, ticket: &Secret) -> io::Result<Self> {
        let (main, id) = main(way, from, ticket).await?;
        let display = channel(way, from, &hello(id, Kind::Display), ticket).await?;
        Ok(Mute {
            _main: main.wire,
            display: display.wire,
        })
    }
}

/// A session's first channel, and the session's number.
async fn main(way: &Way, from: Ipv4Addr, ticket: &Secret) -> io::Result<(Channel, u32)> {
    let mut body = [0; 64];
    let mut main = channel(way, from, &hello(0, Kind::Main), ticket).await?;
    match hear(&mut main.wire, &mut body).await?.0 {
        MAIN_INIT => {}
        other => {
            return Err(io::Error::other(format!(
                "the main channel began with message {other}"
            )));
        }
    }
    let id = body.first_chunk().copied().map(u32::from_le_bytes);
    Ok((main, id.unwrap_or_default()))
}

/// A viewer with its four channels.
pub(super) struct Session {
    _main: Wire,
    display: Wire,
    inputs: Wire,
    _cursor: Wire,
    /// The keys that it was shown.
    pub(super) keys: Vec<[u8; link::KEY]>,
}

impl Session {
    /// Opens all channels as viewers do, the main one first, and waits until the machine has said something on each.
    pub(super) async fn open(way: &Way, from: Ipv4Addr, ticket: &Secret) -> io::Result<Self> {
        tokio::time::timeout(PATIENCE, Self::opened(way, from, ticket))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    async fn opened(way: &Way, from: Ipv4Addr, ticket: &Secret) -> io::Result<Self> {
        let (main, id) = main(way, from, ticket).await?;
        let one = |kind: Kind| async move {
            let mut channel = channel(way, from, &hello(id, kind), ticket).await?;
            if kind == Kind::Display {
                channel.wire.write_all(&message(DISPLAY_INIT, &[0; 14])).await?;
            }
            hear(&mut channel.wire, &mut [0; 64]).await?;
            io::Result::Ok(channel)
        };
        let (display, inputs, cursor) =
            tokio::try_join!(one(Kind::Display), one(Kind::Inputs), one(Kind::Cursor))?;
        Ok(Session {
            keys: vec![main.key, display.key, inputs.key, cursor.key],
            _main: main.wire,
            display: display.wire,
            inputs: inputs.wire,
            _cursor: cursor.wire,
        })
    }

    /// Presses a key and waits for what the machine draws then.
    pub(super) async fn press(&mut self) -> io::Result<Duration> {
        let begin = Instant::now();
        self.inputs.write_all(&message(KEY_DOWN, &ENTER)).await?;
        let (kind, _) = hear(&mut self.display, &mut [0; 64]).await?;
        match kind {
            DRAW => Ok(begin.elapsed()),
            other => Err(io::Error::other(format!(
                "message {other} came instead of a picture"
            ))),
        }
    }

    /// Has so many pictures sent, and reads them all; the time that took. None may be missing.
    pub(super) async fn fetch(&mut self, pictures: u32) -> io::Result<Duration> {
        let mut one = vec![0; HEAD + PICTURE];
        let begin = Instant::now();
        self.display
            .write_all(&message(WANTED, &pictures.to_le_bytes()))
            .await?;
        for number in 0..pictures {
            self.display.read_exact(&mut one).await?;
            if one.get(HEAD..HEAD + 4) != Some(&number.to_le_bytes()[..]) {
                return Err(io::Error::other(format!(
                    "picture {number} is not where it should be"
                )));
            }
        }
        Ok(begin.elapsed())
    }
}
