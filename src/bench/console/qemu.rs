//! A real machine's screen, with its control connection, by which it is seen whether viewers hold the machine up.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufStream};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use super::lost;
use crate::bench::scratch::cannot;
use crate::outcome::Failure;

const PROGRAM: &str = "qemu-system-x86_64";
/// Its screen and its control connection, in the bench's folder.
pub(super) const SCREEN: &str = "screen";
const CONTROL: &str = "qmp";
/// The control connection of one whose screen is at a port.
const OTHER_CONTROL: &str = "qmp-port";
/// How long it may take to start, on a host without KVM that is busy, and how often it is looked.
const START: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Longest wait for an answer. A viewer that holds it up does so for half a minute.
const ANSWER: Duration = Duration::from_secs(40);
/// Between an answer and the next question.
const ASK_EVERY: Duration = Duration::from_millis(2);

/// A disk's first sector, which switches for ever between text and graphics (`modes.s`).
const MODES: &[u8] = include_bytes!("modes.bin");
const DISK: &str = "modes";
/// Bytes of that disk: firmware starts none that is smaller than a cylinder.
const DISK_SIZE: usize = 4 << 20;

/// A QEMU, which ends with this value.
#[derive(Debug)]
pub(super) struct Qemu {
    _child: Child,
    control: PathBuf,
}

impl Qemu {
    /// Starts one whose screen is a socket in the folder, and which never begins to run its guest. `None` where there is none,
    /// or none that has SPICE.
    pub(super) async fn start(folder: &Path) -> Result<Option<Self>, Failure> {
        Self::start_with(&at(folder), folder.join(CONTROL), &["-S"]).await
    }

    /// The same with a guest that runs, and changes its screen's mode again and again.
    pub(super) async fn switching(folder: &Path) -> Result<Option<Self>, Failure> {
        let disk = folder.join(DISK);
        let mut content = MODES.to_vec();
        content.resize(DISK_SIZE, 0);
        std::fs::write(&disk, content).map_err(|e| cannot("write", &disk, &e))?;
        for left in [SCREEN, CONTROL] {
            // What the one before it listened at.
            let _ = std::fs::remove_file(folder.join(left));
        }
        let drive = format!("file={},format=raw,if=none,id=disk", disk.display());
        let more = ["-drive", &drive, "-device", "ide-hd,drive=disk"];
        Self::start_with(&at(folder), folder.join(CONTROL), &more).await
    }

    /// The same with its screen at a port of loopback.
    pub(super) async fn start_at(folder: &Path, screen: SocketAddr) -> Result<Option<Self>, Failure> {
        let screen = format!("addr={},port={}", screen.ip(), screen.port());
        Self::start_with(&screen, folder.join(OTHER_CONTROL), &["-S"]).await
    }

    async fn start_with(screen: &str, control: PathBuf, more: &[&str]) -> Result<Option<Self>, Failure> {
        let started = Command::new(PROGRAM)
            .args(["-M", "q35", "-accel", "tcg", "-m", "64", "-nodefaults"])
            .args(more)
            .args(["-display", "none", "-vga", "virtio", "-spice"])
            .arg(format!("{screen},disable-ticketing=on"))
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", control.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn();
        let mut child = match started {
            Ok(child) => child,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Failure::system(format!("cannot start {PROGRAM}: {e}"))),
        };
        let ready = async {
            // It answers only once all else is there.
            while Control::open(&control).await.is_err() {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        tokio::select! {
            _ = child.wait() => Ok(None),
            ready = tokio::time::timeout(START, ready) => match ready {
                Ok(()) => Ok(Some(Self { _child: child, control })),
                Err(_) => Err(Failure::system(format!("{PROGRAM} did not start"))),
            },
        }
    }

    /// Asks it again and again until `meanwhile` is done, and at least once; its slowest answer, and what came of that.
    pub(super) async fn slowest<T>(
        &self,
        meanwhile: impl Future<Output = T>,
    ) -> Result<(Duration, T), Failure> {
        let mut control = Control::open(&self.control).await.map_err(lost)?;
        let mut slowest = control.answers_in().await.map_err(lost)?;
        tokio::pin!(meanwhile);
        loop {
            // An answer that has begun is waited for, or the slowest would be the one that is not seen.
            let asked = async {
                let took = control.answers_in().await;
                tokio::time::sleep(ASK_EVERY).await;
                took
            };
            tokio::pin!(asked);
            tokio::select! {
                took = &mut asked => slowest = slowest.max(took.map_err(lost)?),
                done = &mut meanwhile => {
                    return Ok((slowest.max(asked.await.map_err(lost)?), done));
                }
            }
        }
    }
}

/// The argument for a screen that is a socket in the folder.
fn at(folder: &Path) -> String {
    format!("unix=on,addr={}", folder.join(SCREEN).display())
}

struct Control(BufStream<UnixStream>);

impl Control {
    async fn open(path: &Path) -> io::Result<Self> {
        let mut control = Control(BufStream::new(UnixStream::connect(path).await?));
        // It greets first.
        control.0.read_line(&mut String::new()).await?;
        control.ask("qmp_capabilities").await?;
        Ok(control)
    }

    async fn ask(&mut self, what: &str) -> io::Result<()> {
        let question = format!("{{\"execute\": \"{what}\"}}\n");
        self.0.write_all(question.as_bytes()).await?;
        self.0.flush().await?;
        let mut line = String::new();
        // Events come between.
        while !line.contains("\"return\"") {
            line.clear();
            if self.0.read_line(&mut line).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }

    async fn answers_in(&mut self) -> io::Result<Duration> {
        let begin = Instant::now();
        tokio::time::timeout(ANSWER, self.ask("query-status"))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
        Ok(begin.elapsed())
    }
}
