//! The viewer's side of the handshake, towards the machine; and the ways to reach a machine.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::keys;
use super::link::{self, Caps, Code, Common, Hello, Reply};
use super::tls::MachineTls;
use super::wire::{self, Wire};
use crate::secret::Secret;

/// For a connection to the machine and its whole handshake. QEMU makes a key of its own for each, in the thread that also
/// runs the machine's devices; a machine that is busy takes seconds, one that takes longer hangs.
pub const DIAL_TIME: Duration = Duration::from_secs(10);

/// A SPICE server: where a machine's screen is.
pub trait Backend: Send + Sync + fmt::Debug {
    /// A name shared by servers that can do the same, for example those of one version of QEMU on one host: what one of
    /// them can do is remembered under it.
    fn likeness(&self) -> &str;

    /// A new connection to it. It is called for every channel.
    fn connect(&self) -> BoxFuture<'_, io::Result<Wire>>;

    /// A new connection over TLS, where [`connect`](Backend::connect) makes plain ones and the server wants TLS for this
    /// channel. `None` when there is no such way.
    fn connect_secured(&self) -> Option<BoxFuture<'_, io::Result<Wire>>> {
        None
    }

    /// A new connection without TLS, where [`connect`](Backend::connect) makes ones with it and the server wants none for this
    /// channel. `None` when there is no such way, or when it is not to be used.
    fn connect_unsecured(&self) -> Option<BoxFuture<'_, io::Result<Wire>>> {
        None
    }

    /// What the server asks for, if anything. A descriptor from libvirt needs none.
    fn ticket(&self) -> Option<&Secret> {
        None
    }
}

/// A unix socket.
#[derive(Clone, Debug)]
pub struct Unix {
    /// The socket's path.
    pub path: PathBuf,
    /// The server's password.
    pub ticket: Option<Secret>,
    /// See [`Backend::likeness`].
    pub likeness: String,
}

impl Backend for Unix {
    fn likeness(&self) -> &str {
        &self.likeness
    }

    fn connect(&self) -> BoxFuture<'_, io::Result<Wire>> {
        Box::pin(async {
            let stream = UnixStream::connect(&self.path).await?;
            Ok(Box::new(stream) as Wire)
        })
    }

    fn ticket(&self) -> Option<&Secret> {
        self.ticket.as_ref()
    }
}

/// A port, with or without TLS. Where both are named TLS comes first, and a plain connection only where the server, which is
/// known by then, wants that for a channel.
#[derive(Clone, Debug)]
pub struct Tcp {
    /// Name or address of the host.
    pub host: String,
    /// Where plain connections are taken.
    pub port: Option<u16>,
    /// Where TLS is spoken, and how the server is known.
    pub tls: Option<(u16, MachineTls)>,
    /// The server's password.
    pub ticket: Option<Secret>,
    /// See [`Backend::likeness`].
    pub likeness: String,
}

impl Tcp {
    async fn dial(&self, port: u16) -> io::Result<TcpStream> {
        let stream = TcpStream::connect((self.host.as_str(), port)).await?;
        wire::tune(&stream)?;
        Ok(stream)
    }

    async fn plain(&self, port: u16) -> io::Result<Wire> {
        Ok(Box::new(self.dial(port).await?))
    }

    async fn secured(&self, port: u16, tls: &MachineTls) -> io::Result<Wire> {
        tls.connect(&self.host, self.dial(port).await?).await
    }
}

impl Backend for Tcp {
    fn likeness(&self) -> &str {
        &self.likeness
    }

    fn connect(&self) -> BoxFuture<'_, io::Result<Wire>> {
        Box::pin(async {
            match (&self.tls, self.port) {
                (Some((port, tls)), _) => self.secured(*port, tls).await,
                (None, Some(port)) => self.plain(port).await,
                (None, None) => Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "neither a plain port nor one for TLS is named",
                )),
            }
        })
    }

    fn connect_unsecured(&self) -> Option<BoxFuture<'_, io::Result<Wire>>> {
        self.tls.as_ref()?;
        Some(Box::pin(self.plain(self.port?)))
    }

    fn ticket(&self) -> Option<&Secret> {
        self.ticket.as_ref()
    }
}

/// Connections that the caller makes: descriptors that libvirt opened, sockets that were passed.
pub struct Opened<F> {
    likeness: String,
    open: F,
}

impl<F> Opened<F>
where
    F: Fn() -> BoxFuture<'static, io::Result<Wire>> + Send + Sync,
{
    /// `open` makes one connection for each channel; the server must ask for no ticket.
    pub fn new(likeness: impl Into<String>, open: F) -> Self {
        Opened {
            likeness: likeness.into(),
            open,
        }
    }
}

impl<F> fmt::Debug for Opened<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Opened({})", self.likeness)
    }
}

impl<F> Backend for Opened<F>
where
    F: Fn() -> BoxFuture<'static, io::Result<Wire>> + Send + Sync,
{
    fn likeness(&self) -> &str {
        &self.likeness
    }

    fn connect(&self) -> BoxFuture<'_, io::Result<Wire>> {
        (self.open)()
    }
}

/// A wire from a descriptor of a connected stream socket, such as libvirt hands out.
///
/// # Errors
/// The system's. Needs a runtime, as all sockets do.
pub fn from_descriptor(descriptor: std::os::fd::OwnedFd) -> io::Result<Wire> {
    let stream = std::os::unix::net::UnixStream::from(descriptor);
    stream.set_nonblocking(true)?;
    Ok(Box::new(UnixStream::from_std(stream)?))
}

/// Why the machine was not reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// There was no connection, or it broke.
    #[error("the machine's screen cannot be reached: {0}")]
    Lost(#[from] io::Error),
    /// It closed without an answer: that is how a server says that it has no such channel.
    #[error("the machine has no such channel")]
    NoSuchChannel,
    /// It refused.
    #[error("the machine refused the channel: {0}")]
    Refused(Code),
    /// It did not answer.
    #[error("the machine's screen did not answer within {} s", DIAL_TIME.as_secs())]
    Slow,
    /// Its key is none.
    #[error("the machine's key cannot be used")]
    Key,
}

impl DialError {
    /// What a viewer is told: the machine's own answer where there is one.
    pub fn code(&self) -> Code {
        match self {
            DialError::Refused(code) => *code,
            DialError::NoSuchChannel => Code::ChannelNotAvailable,
            DialError::Lost(_) | DialError::Slow | DialError::Key => Code::Error,
        }
    }
}

/// A channel that the machine accepted.
pub(super) struct Dialled {
    pub(super) wire: Wire,
    pub(super) caps: Caps,
}

/// Opens a channel at the machine. `first` goes out in one piece with the ticket, so that there is no moment at which the
/// machine has the channel and not those bytes.
///
/// Whoever has the same `turn` does not ask the machine at the same time: QEMU makes a key for whoever asks, in the thread
/// of its control connection, and where several ask at once it makes them all before it looks at that connection again.
pub(super) async fn dial(
    backend: &dyn Backend,
    hello: &Hello,
    first: &[u8],
    turn: &Mutex<()>,
) -> Result<Dialled, DialError> {
    timeout(DIAL_TIME, async {
        let (mut wire, reply) = {
            let _turn = turn.lock().await;
            ask(backend, hello).await?
        };
        let nothing = Secret::default();
        let sealed =
            keys::seal(backend.ticket().unwrap_or(&nothing), &reply.key).map_err(|_| DialError::Key)?;
        let mut bytes = Vec::with_capacity(4 + sealed.len() + first.len());
        // A server that cannot be asked for a mechanism expects none, whatever we offered.
        if reply.caps.has(Common::AuthSelection) {
            bytes.extend_from_slice(&link::MECHANISM_TICKET.to_le_bytes());
        }
        bytes.extend_from_slice(&sealed);
        bytes.extend_from_slice(first);
        wire.write_all(&bytes).await?;
        wire.flush().await?;
        match Code::from_number(wire.read_u32_le().await?) {
            Code::Ok => Ok(Dialled {
                wire,
                caps: reply.caps,
            }),
            code => Err(DialError::Refused(code)),
        }
    })
    .await
    .unwrap_or(Err(DialError::Slow))
}

/// What the machine can do on this channel. It says so before it asks for a ticket, and nothing of the channel exists yet.
pub(super) async fn probe(backend: &dyn Backend, hello: &Hello) -> Result<Caps, DialError> {
    timeout(DIAL_TIME, async { Ok(ask(backend, hello).await?.1.caps) })
        .await
        .unwrap_or(Err(DialError::Slow))
}

/// Sends the link message and reads the reply; in the other way, with TLS or without, where the server wants that.
async fn ask(backend: &dyn Backend, hello: &Hello) -> Result<(Wire, Reply), DialError> {
    let mut hello = hello.clone();
    hello.caps.set(Common::AuthSelection, true);
    hello.caps.set(Common::AuthTicket, true);
    // With both sides able to do SASL, a server sends no key.
    hello.caps.set(Common::AuthSasl, false);
    let answer = exchange(backend.connect().await?, &hello).await;
    let other = match &answer {
        Err(DialError::Refused(Code::NeedSecured)) => backend.connect_secured(),
        Err(DialError::Refused(Code::NeedUnsecured)) => backend.connect_unsecured(),
        _ => None,
    };
    match other {
        Some(other) => exchange(other.await?, &hello).await,
        None => answer,
    }
}

async fn exchange(mut wire: Wire, hello: &Hello) -> Result<(Wire, Reply), DialError> {
    wire.write_all(&hello.encode()).await?;
    wire.flush().await?;
    let mut header = [0; link::HEADER];
    match wire.read_exact(&mut header).await {
        Ok(_) => {}
        Err(error) if closed(&error) => return Err(DialError::NoSuchChannel),
        Err(error) => return Err(error.into()),
    }
    let (magic, rest) = header.split_at(4);
    let malformed = DialError::Refused(Code::InvalidData);
    let (Some(magic), Some(rest)) = (magic.first_chunk(), rest.first_chunk()) else {
        return Err(malformed);
    };
    link::check_magic(*magic).map_err(DialError::Refused)?;
    let size = link::reply_size(*rest).map_err(DialError::Refused)?;
    let mut body = vec![0; size];
    wire.read_exact(&mut body).await?;
    let reply = Reply::decode(&body).map_err(DialError::Refused)?;
    Ok((wire, reply))
}

fn closed(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
    )
}
