//! The proxy under test, in a process of its own: its memory and its processor time are nobody else's.
//!
//! The two halves talk over a unix socket in the bench's folder: the proxy says one line with its ports, and answers each
//! line with how it is. When the socket closes, it ends.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufStream};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::process::{Child, Command};

use super::qemu::SCREEN;
use super::{CERTIFICATE, KEY, MACHINE, lost};
use crate::console::backend::Unix;
use crate::console::{
    Admission, Backend, Certificate, Denied, Door, Event, Kinds, Limits, Mode, Observer, Proxy, Security,
};
use crate::outcome::Failure;
use crate::secret::Secret;

/// What tickets begin with that are good: each of the first kind opens a machine of its own, those of the second a real one.
const GOOD: &str = "good-";
const REAL: &str = "real-";
const CONTROL: &str = "control";
/// For the process to start: its first key takes some ten milliseconds.
const START: Duration = Duration::from_secs(20);
/// For the keys to be made: hundreds, by a thread that gives way to whatever else the host has to do.
const KEYS: Duration = Duration::from_secs(300);
/// How often it is asked how it is.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// The ticket of the machine with this number.
pub(super) fn ticket(number: usize) -> Secret {
    Secret::new(format!("{GOOD}{number}"))
}

/// One of the tickets of the real machine.
pub(super) fn real_ticket(name: &str) -> Secret {
    Secret::new(format!("{REAL}{name}"))
}

/// The proxy's ports.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Ports {
    pub(super) plain: SocketAddr,
    pub(super) tls: SocketAddr,
}

/// How the proxy is.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct State {
    /// Keys that are ready.
    keys: usize,
    /// Connections without a ticket.
    pub(super) waiting: usize,
    /// Sessions that live.
    pub(super) sessions: usize,
}

struct Tickets {
    stub: Arc<Unix>,
    real: Arc<Unix>,
}

impl Door for Tickets {
    fn model(&self) -> Option<Arc<dyn Backend>> {
        Some(self.stub.clone())
    }

    fn redeem<'a>(
        &'a self,
        ticket: &'a Secret,
        from: SocketAddr,
    ) -> BoxFuture<'a, Result<Admission, Denied>> {
        Box::pin(async move {
            let name = ticket.reveal();
            let (machine, backend) = if name.starts_with(GOOD) {
                (name, &self.stub)
            } else if name.starts_with(REAL) {
                (REAL, &self.real)
            } else {
                return Err(Denied::Unknown);
            };
            Ok(Admission {
                ticket: name.to_owned(),
                viewer: from.to_string(),
                machine: machine.to_owned(),
                mode: Mode::Full,
                kinds: Kinds::default(),
                backend: backend.clone(),
            })
        })
    }
}

struct Silence;

impl Observer for Silence {
    fn saw(&self, _: &Event<'_>) {}
}

/// The process's whole work: serves until whoever started it is gone.
///
/// # Errors
/// What the system refuses: a port, a thread, the certificate in `folder`.
pub async fn serve(folder: &Path, keys: usize) -> Result<(), Failure> {
    let machine = |name: &str| {
        Arc::new(Unix {
            path: folder.join(name),
            ticket: None,
            likeness: name.to_owned(),
        })
    };
    let tickets = Tickets {
        stub: machine(MACHINE),
        real: machine(SCREEN),
    };
    let limits = Limits {
        keys,
        ..Limits::default()
    };
    let certificate = Certificate::load(&folder.join(CERTIFICATE), &folder.join(KEY))
        .map_err(|e| Failure::system(format!("cannot read the certificate: {e}")))?;
    let proxy = Proxy::new(tickets, Silence, limits).map_err(lost)?;
    let plain = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(lost)?;
    let tls = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(lost)?;
    let ports = Ports {
        plain: plain.local_addr().map_err(lost)?,
        tls: tls.local_addr().map_err(lost)?,
    };
    let control = UnixStream::connect(folder.join(CONTROL)).await.map_err(lost)?;
    let mut control = BufStream::new(control);
    let answering = async {
        say(&mut control, &ports).await?;
        let mut line = String::new();
        while control.read_line(&mut line).await? > 0 {
            let state = State {
                keys: proxy.keys_ready(),
                waiting: proxy.waiting(),
                sessions: proxy.sessions().len(),
            };
            say(&mut control, &state).await?;
            line.clear();
        }
        io::Result::Ok(())
    };
    tokio::select! {
        done = answering => done.map_err(lost),
        never = Arc::clone(&proxy).listen(plain, Security::Plain) => match never {},
        never = Arc::clone(&proxy).listen(tls, Security::Tls(Arc::new(certificate))) => match never {},
    }
}

async fn say(control: &mut BufStream<UnixStream>, what: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    control.write_all(&line).await?;
    control.flush().await
}

/// The process, as the bench sees it. It ends with this value.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    control: BufStream<UnixStream>,
    keys: usize,
    pub(super) ports: Ports,
}

impl Process {
    /// Starts `cannery`, as the part that [`serve`] is.
    pub(super) async fn start(cannery: &Path, folder: &Path, keys: usize) -> Result<Self, Failure> {
        let listener = UnixListener::bind(folder.join(CONTROL)).map_err(lost)?;
        let mut child = Command::new(cannery)
            .args(["bench", "console-proxy", "--keys"])
            .arg(keys.to_string())
            .arg(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| Failure::system(format!("cannot start the proxy: {e}")))?;
        let accepted = tokio::select! {
            accepted = tokio::time::timeout(START, listener.accept()) => accepted,
            _ = child.wait() => return Err(Failure::system("the proxy ended as soon as it was started")),
        };
        let Ok(accepted) = accepted else {
            return Err(Failure::system("the proxy did not start"));
        };
        let mut control = BufStream::new(accepted.map_err(lost)?.0);
        let ports = read(&mut control).await.map_err(lost)?;
        Ok(Self {
            child,
            control,
            keys,
            ports,
        })
    }

    /// How it is now.
    pub(super) async fn state(&mut self) -> Result<State, Failure> {
        let asked = async {
            self.control.write_all(b"\n").await?;
            self.control.flush().await?;
            read(&mut self.control).await
        };
        asked.await.map_err(lost)
    }

    /// Waits until nobody is there and all keys are made: then it is as quiet as it can be.
    pub(super) async fn quiet(&mut self) -> Result<(), Failure> {
        self.until(|state| state.sessions == 0 && state.waiting == 0)
            .await?;
        self.full().await
    }

    /// Waits until all keys are made.
    pub(super) async fn full(&mut self) -> Result<(), Failure> {
        let keys = self.keys;
        self.until(|state| state.keys >= keys).await
    }

    async fn until(&mut self, so: impl Fn(&State) -> bool) -> Result<(), Failure> {
        let waiting = async {
            while !so(&self.state().await?) {
                tokio::time::sleep(ASK_EVERY).await;
            }
            Ok(())
        };
        tokio::time::timeout(KEYS, waiting)
            .await
            .unwrap_or_else(|_| Err(Failure::system("the proxy does not come to rest")))
    }

    /// Bytes of its memory that are in use.
    pub(super) fn memory(&self) -> Option<u64> {
        memory(&self.child)
    }
}

/// Bytes of a process's memory that are in use (`VmRSS`, proc(5)).
pub(super) fn memory(process: &Child) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{}/status", process.id()?)).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

async fn read<T: serde::de::DeserializeOwned>(control: &mut BufStream<UnixStream>) -> io::Result<T> {
    let mut line = String::new();
    control.read_line(&mut line).await?;
    Ok(serde_json::from_str(&line)?)
}
