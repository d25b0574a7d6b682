//! A machine with a screen and nothing else, the proxy before it, and viewers that do what no real one does.

// Each test binary uses a part of this.
#![allow(dead_code)]

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cannery::console::link::{Caps, Hello, Reply};
use cannery::console::{
    Admission, Backend, Denied, Door, Event, Kind, Kinds, Limits, Mode, Observer, Proxy, Security, keys,
};
use cannery::secret::Secret;
use futures_util::future::BoxFuture;
use tokio::sync::oneshot;

#[path = "spice_screen.rs"]
mod screen;

pub use screen::*;

/// Tickets and what they admit to.
pub struct Tickets {
    pub model: Option<Arc<dyn Backend>>,
    pub known: Mutex<HashMap<String, Admission>>,
}

/// Shares tickets with the proxy that asks them.
struct AtDoor(Arc<Tickets>);

impl Door for AtDoor {
    fn model(&self) -> Option<Arc<dyn Backend>> {
        self.0.model.clone()
    }

    fn redeem<'a>(
        &'a self,
        ticket: &'a Secret,
        _from: SocketAddr,
    ) -> BoxFuture<'a, Result<Admission, Denied>> {
        Box::pin(async move {
            let known = self.0.known.lock().unwrap();
            known.get(ticket.reveal()).cloned().ok_or(Denied::Unknown)
        })
    }
}

/// Notes what the proxy did, one line each.
#[derive(Clone, Default)]
pub struct Notes(Arc<Mutex<Vec<String>>>);

impl Notes {
    pub fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }

    pub fn has(&self, text: &str) -> bool {
        self.all().iter().any(|line| line.contains(text))
    }

    /// Waits for a line with this in it.
    #[track_caller]
    pub fn await_line(&self, text: &str) {
        let end = Instant::now() + PATIENCE;
        while !self.has(text) {
            assert!(Instant::now() < end, "no \"{text}\" in {:#?}", self.all());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Observer for Notes {
    fn saw(&self, event: &Event<'_>) {
        self.0.lock().unwrap().push(event.to_string());
    }
}

/// A proxy on a port of its own, in a thread of its own.
pub struct Running {
    pub proxy: Arc<Proxy>,
    pub address: SocketAddr,
    pub notes: Notes,
    pub tickets: Arc<Tickets>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    pub fn start(model: Option<Arc<dyn Backend>>, limits: Limits, security: Security) -> Self {
        let notes = Notes::default();
        let tickets = Arc::new(Tickets {
            model,
            known: Mutex::default(),
        });
        let proxy = Proxy::new(AtDoor(Arc::clone(&tickets)), notes.clone(), limits).unwrap();
        let (stop, stopped) = oneshot::channel();
        let (tell, told) = std::sync::mpsc::channel();
        let served = Arc::clone(&proxy);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
                    .await
                    .unwrap();
                tell.send(listener.local_addr().unwrap()).unwrap();
                tokio::select! {
                    never = served.listen(listener, security) => match never {},
                    _ = stopped => {}
                }
            });
        });
        Running {
            proxy,
            address: told.recv().unwrap(),
            notes,
            tickets,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// One before this machine.
    pub fn before(screen: &Screen) -> Self {
        Self::start(Some(screen.backend()), limits(), Security::Plain)
    }

    /// Makes a ticket for a machine.
    pub fn admit(&self, ticket: &str, machine: &str, mode: Mode, backend: Arc<dyn Backend>) {
        self.admit_to(ticket, machine, mode, backend, Kinds::default());
    }

    /// The same with more or fewer channels.
    pub fn admit_to(&self, ticket: &str, machine: &str, mode: Mode, backend: Arc<dyn Backend>, kinds: Kinds) {
        let admission = Admission {
            ticket: format!("#{ticket}"),
            viewer: "someone".to_owned(),
            machine: machine.to_owned(),
            mode,
            kinds,
            backend,
        };
        self.tickets
            .known
            .lock()
            .unwrap()
            .insert(ticket.to_owned(), admission);
    }

    /// A viewer that has connected and said nothing.
    pub fn viewer(&self) -> Viewer<TcpStream> {
        Viewer::over(TcpStream::connect(self.address).unwrap())
    }

    /// A viewer's session, begun by its main channel.
    pub fn session(&self, ticket: &str) -> (Viewer<TcpStream>, u32) {
        let mut main = self.viewer();
        main.open(&hello(0, Kind::Main), ticket).unwrap();
        let init = main.until(103);
        let id = u32::from_le_bytes(*init.first_chunk().unwrap());
        (main, id)
    }

    /// One of its later channels.
    pub fn channel(&self, ticket: &str, session: u32, kind: Kind) -> Viewer<TcpStream> {
        let mut viewer = self.viewer();
        viewer.open(&hello(session, kind), ticket).unwrap();
        viewer
    }

    /// Runs spice-gtk's own tool against it, for some seconds, and returns all that it printed.
    pub fn run(&self, program: &str, ticket: &str, more: &[&str]) -> (bool, String) {
        let output = Command::new("timeout")
            .args([
                "--signal=INT",
                "8",
                program,
                "--uri",
                &format!("spice://{}", self.address),
                "-w",
                ticket,
            ])
            .args(more)
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8_lossy(&text).into_owned(),
        )
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.stop.take());
        drop(self.thread.take().unwrap().join());
    }
}

/// The usual limits, with the few keys that a test needs: making them takes its time.
pub fn limits() -> Limits {
    Limits {
        keys: 8,
        ..Limits::default()
    }
}

/// What a usual viewer sends to open a channel: short headers, and it chooses how it authenticates.
pub fn hello(session: u32, kind: Kind) -> Hello {
    Hello {
        session,
        kind: kind.number(),
        id: 0,
        caps: Caps {
            common: vec![0b1001],
            channel: vec![],
        },
    }
}

/// A viewer, channel by channel and byte by byte.
pub struct Viewer<S> {
    pub stream: S,
    /// Headers of 18 bytes instead of 6.
    pub long: bool,
}

impl Viewer<UnixStream> {
    fn at(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Viewer { stream, long: false }
    }
}

impl Viewer<TcpStream> {
    fn over(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Viewer { stream, long: false }
    }
}

impl Viewer<TcpStream> {
    /// Closes it as viewers do: what was sent arrives, and what was still to come is read.
    pub fn part(mut self) {
        self.stream.shutdown(Shutdown::Write).unwrap();
        self.until_the_end();
    }
}

impl<S: Read + Write> Viewer<S> {
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub fn read(&mut self, bytes: usize) -> io::Result<Vec<u8>> {
        let mut read = vec![0; bytes];
        self.stream.read_exact(&mut read)?;
        Ok(read)
    }

    pub fn word(&mut self) -> io::Result<u32> {
        Ok(u32::from_le_bytes(self.read(4)?.try_into().unwrap()))
    }

    /// Sends the link message and reads the reply.
    pub fn link(&mut self, hello: &Hello) -> io::Result<Reply> {
        self.send(&hello.encode());
        let header = self.read(16)?;
        let size = u32::from_le_bytes(*header[12..].first_chunk().unwrap());
        let body = self.read(usize::try_from(size).unwrap())?;
        Reply::decode(&body).map_err(io::Error::other)
    }

    /// The whole handshake; the code at its end.
    pub fn handshake(&mut self, hello: &Hello, ticket: &str) -> io::Result<u32> {
        let reply = self.link(hello)?;
        if hello.caps.common.first().is_some_and(|word| word & 1 != 0) {
            self.send(&1u32.to_le_bytes());
        }
        self.send(&keys::seal(&Secret::new(ticket), &reply.key).unwrap());
        self.word()
    }

    /// The same, where it must succeed.
    pub fn open(&mut self, hello: &Hello, ticket: &str) -> io::Result<()> {
        self.long = hello.caps.common.first().is_none_or(|word| word & 8 == 0);
        match self.handshake(hello, ticket)? {
            0 => Ok(()),
            code => Err(io::Error::other(format!("refused with {code}"))),
        }
    }

    /// Sends one message.
    pub fn say(&mut self, message: u16, body: &[u8]) {
        let mut bytes = Vec::new();
        if self.long {
            bytes.extend(1u64.to_le_bytes());
        }
        bytes.extend(message.to_le_bytes());
        bytes.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
        if self.long {
            bytes.extend(0u32.to_le_bytes());
        }
        bytes.extend(body);
        self.send(&bytes);
    }

    /// The next message.
    pub fn hear(&mut self) -> io::Result<(u16, Vec<u8>)> {
        let header = self.read(if self.long { 18 } else { 6 })?;
        let rest = if self.long { &header[8..] } else { &header[..] };
        let message = u16::from_le_bytes(*rest.first_chunk().unwrap());
        let size = u32::from_le_bytes(*rest[2..].first_chunk().unwrap());
        Ok((message, self.read(usize::try_from(size).unwrap())?))
    }

    /// Reads on to the first message of this type.
    #[track_caller]
    pub fn until(&mut self, wanted: u16) -> Vec<u8> {
        loop {
            let (message, body) = self.hear().unwrap();
            if message == wanted {
                return body;
            }
        }
    }

    /// Reads on to the end of the connection, and says what messages came.
    pub fn until_the_end(&mut self) -> Vec<(u16, Vec<u8>)> {
        std::iter::from_fn(|| self.hear().ok()).collect()
    }
}
