//! A machine's screen without a machine, which answers at once: whatever takes time is the proxy's doing.
//!
//! It speaks as spice-server does, as far as a proxy or a viewer of this bench can see: it takes any ticket, numbers its
//! sessions, draws when a key is pressed, and sends as many pictures as it is asked for.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::mpsc;

use super::aside::Aside;
use crate::console::Kind;
use crate::console::keys::Key;
use crate::console::link::{self, Caps, Hello, Reply};
use crate::console::wire::{self, Wire};
use crate::outcome::Failure;

/// What the main channel says first; its first number is the session's.
pub(super) const MAIN_INIT: u16 = 103;
const MAIN_INIT_SIZE: usize = 32;
/// What inputs and cursor channels say first.
const CHANNEL_INIT: u16 = 101;
/// What is drawn.
pub(super) const DRAW: u16 = 304;
/// The body of a picture, in bytes; its first number counts the pictures of one request.
pub(super) const PICTURE: usize = 64 << 10;
/// A viewer's message on the display channel that has no answer elsewhere (a stream's report): here its first number is how
/// many pictures are wanted.
pub(super) const WANTED: u16 = 102;
/// Bytes of a short header.
pub(super) const HEAD: usize = 6;
/// Most bytes of a viewer's message.
const MOST: usize = 4096;

/// It serves until this is dropped.
#[derive(Debug)]
pub(super) struct Stub {
    _serving: Aside<()>,
    /// Where it is reached directly.
    pub(super) address: SocketAddr,
}

impl Stub {
    /// Starts one at a unix socket, and at a port of loopback.
    pub(super) async fn start(socket: &Path) -> Result<Self, Failure> {
        let cannot = |e: io::Error| Failure::system(format!("cannot play a machine: {e}"));
        // One key for all: nobody guards anything here, and making one would be time of the machine's.
        let key = Key::generate().map_err(|e| cannot(io::Error::other(e)))?;
        let machine = Arc::new(Machine {
            key: *key.public(),
            sessions: AtomicU32::new(1),
            screens: Mutex::default(),
        });
        let unix = std::os::unix::net::UnixListener::bind(socket).map_err(cannot)?;
        let tcp = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(cannot)?;
        unix.set_nonblocking(true).map_err(cannot)?;
        tcp.set_nonblocking(true).map_err(cannot)?;
        let address = tcp.local_addr().map_err(cannot)?;
        let serving = Aside::start("console bench stub", move || async move {
            let listeners =
                UnixListener::from_std(unix).and_then(|unix| Ok((unix, TcpListener::from_std(tcp)?)));
            if let Ok((unix, tcp)) = listeners {
                machine.listen(&unix, &tcp).await;
            }
        })?;
        Ok(Self {
            _serving: serving,
            address,
        })
    }
}

struct Machine {
    key: [u8; link::KEY],
    sessions: AtomicU32,
    /// Who draws, by session.
    screens: Mutex<HashMap<u32, mpsc::UnboundedSender<()>>>,
}

impl Machine {
    async fn listen(self: Arc<Self>, unix: &UnixListener, tcp: &TcpListener) {
        loop {
            let accepted: io::Result<Wire> = tokio::select! {
                accepted = unix.accept() => accepted.map(|(stream, _)| Box::new(stream) as Wire),
                accepted = tcp.accept() => accepted.and_then(|(stream, _)| {
                    wire::tune(&stream)?;
                    Ok(Box::new(stream) as Wire)
                }),
            };
            if let Ok(wire) = accepted {
                let machine = Arc::clone(&self);
                // How a channel ends is its viewer's concern.
                tokio::spawn(async move { drop(machine.serve(wire).await) });
            }
        }
    }

    async fn serve(&self, mut wire: Wire) -> io::Result<()> {
        let hello = asked(&mut wire).await?;
        let caps = Caps {
            common: vec![0b1011],
            channel: Vec::new(),
        };
        let reply = Reply { key: self.key, caps };
        wire.write_all(&reply.encode()).await?;
        wire.read_exact(&mut [0; 4 + link::SEALED]).await?;
        wire.write_u32_le(link::Code::Ok.number()).await?;
        match Kind::from_number(hello.kind) {
            Some(Kind::Main) => {
                let session = self.sessions.fetch_add(1, Ordering::Relaxed);
                let mut body = session.to_le_bytes().to_vec();
                body.resize(MAIN_INIT_SIZE, 0);
                wire.write_all(&message(MAIN_INIT, &body)).await?;
                listen_to(&mut wire).await
            }
            Some(Kind::Display) => {
                let (draw, asked) = mpsc::unbounded_channel();
                self.screens().insert(hello.session, draw);
                let ended = display(wire, asked).await;
                self.screens().remove(&hello.session);
                ended
            }
            Some(Kind::Inputs) => {
                wire.write_all(&message(CHANNEL_INIT, &[0; 2])).await?;
                let mut body = vec![0; MOST];
                loop {
                    hear(&mut wire, &mut body).await?;
                    if let Some(screen) = self.screens().get(&hello.session) {
                        // One that is gone draws nothing.
                        let _ = screen.send(());
                    }
                }
            }
            _ => {
                wire.write_all(&message(CHANNEL_INIT, &[0; 9])).await?;
                listen_to(&mut wire).await
            }
        }
    }

    fn screens(&self) -> std::sync::MutexGuard<'_, HashMap<u32, mpsc::UnboundedSender<()>>> {
        self.screens.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Draws once when the viewer has begun, then whenever a key is pressed, and as much as the viewer wants.
async fn display(wire: Wire, mut pressed: mpsc::UnboundedReceiver<()>) -> io::Result<()> {
    let (mut from, mut to) = tokio::io::split(wire);
    let mut body = vec![0; MOST];
    hear(&mut from, &mut body).await?;
    let small = message(DRAW, &[0; 64]);
    to.write_all(&small).await?;
    let (want, mut wanted) = mpsc::unbounded_channel();
    let hearing = async {
        loop {
            let (kind, size) = hear(&mut from, &mut body).await?;
            let count = body.get(..size).and_then(|body| body.first_chunk());
            if let (WANTED, Some(count)) = (kind, count) {
                let _ = want.send(u32::from_le_bytes(*count));
            }
        }
    };
    let drawing = async {
        let mut picture = message(DRAW, &vec![0x5a; PICTURE]);
        loop {
            tokio::select! {
                Some(()) = pressed.recv() => to.write_all(&small).await?,
                Some(count) = wanted.recv() => for number in 0..count {
                    if let Some(place) = picture.get_mut(HEAD..HEAD + 4) {
                        place.copy_from_slice(&number.to_le_bytes());
                    }
                    to.write_all(&picture).await?;
                },
                else => return Ok(()),
            }
        }
    };
    tokio::select! {
        ended = hearing => ended,
        ended = drawing => ended,
    }
}

/// Reads what is asked for, however long that takes to come: machines have no deadlines.
async fn asked(wire: &mut Wire) -> io::Result<Hello> {
    let mut head = [0; link::HEADER];
    wire.read_exact(&mut head).await?;
    let rest = head.last_chunk().copied().unwrap_or_default();
    let mut body = vec![0; link::hello_size(rest).map_err(io::Error::other)?];
    wire.read_exact(&mut body).await?;
    Hello::decode(&body).map_err(io::Error::other)
}

/// Reads until the viewer is gone.
async fn listen_to(wire: &mut Wire) -> io::Result<()> {
    let mut body = vec![0; HEAD];
    while wire.read(&mut body).await? > 0 {}
    Ok(())
}

/// A message with a short header.
pub(super) fn message(kind: u16, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap_or(u32::MAX);
    [&kind.to_le_bytes()[..], &size.to_le_bytes(), body].concat()
}

/// Reads one message: its type, and the size of its body, which stands at the beginning of `body`.
pub(super) async fn hear(
    from: &mut (impl AsyncReadExt + Unpin),
    body: &mut [u8],
) -> io::Result<(u16, usize)> {
    let kind = from.read_u16_le().await?;
    let size = usize::try_from(from.read_u32_le().await?).unwrap_or(usize::MAX);
    let place = body
        .get_mut(..size)
        .ok_or_else(|| io::Error::other(format!("a message of {size} bytes")))?;
    from.read_exact(place).await?;
    Ok((kind, size))
}
