//! What carries bytes between the same sockets and knows nothing of SPICE: `socat`, plain and with OpenSSL.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};

use super::{CERTIFICATE, KEY, MACHINE, lost};
use crate::outcome::Failure;

/// Debian's package of the same name.
const PROGRAM: &str = "socat";
/// Bytes of its buffer: as large as the proxy's, and eight times its usual one.
const BUFFER: &str = "65536";
/// How long it may take to listen, and how often it is tried.
const START: Duration = Duration::from_secs(10);
const TRY_EVERY: Duration = Duration::from_millis(20);

/// Both of them, which end with this value.
#[derive(Debug)]
pub(super) struct Tunnels {
    _children: [Child; 2],
    pub(super) plain: SocketAddr,
    pub(super) tls: SocketAddr,
}

impl Tunnels {
    /// Starts them before the machine in `folder`. `None` where there is no `socat`.
    pub(super) async fn start(folder: &Path) -> Result<Option<Self>, Failure> {
        let (plain, tls) = (free().await?, free().await?);
        let secured = format!(
            ",cert={},key={},verify=0",
            folder.join(CERTIFICATE).display(),
            folder.join(KEY).display()
        );
        let Some(first) = run(folder, "TCP-LISTEN", plain, "")? else {
            return Ok(None);
        };
        let Some(second) = run(folder, "OPENSSL-LISTEN", tls, &secured)? else {
            return Ok(None);
        };
        for address in [plain, tls] {
            let trying = async {
                while TcpStream::connect(address).await.is_err() {
                    tokio::time::sleep(TRY_EVERY).await;
                }
            };
            if tokio::time::timeout(START, trying).await.is_err() {
                return Err(Failure::system(format!("{PROGRAM} does not listen at {address}")));
            }
        }
        Ok(Some(Self {
            _children: [first, second],
            plain,
            tls,
        }))
    }
}

/// A port that nobody listens at.
pub(super) async fn free() -> Result<SocketAddr, Failure> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(lost)?;
    listener.local_addr().map_err(lost)
}

fn run(folder: &Path, kind: &str, at: SocketAddr, more: &str) -> Result<Option<Child>, Failure> {
    let listen = format!("{kind}:{},bind=127.0.0.1,reuseaddr,fork,nodelay{more}", at.port());
    let connect = format!("UNIX-CONNECT:{}", folder.join(MACHINE).display());
    let started = Command::new(PROGRAM)
        .args(["-b", BUFFER, &listen, &connect])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        // It says which connections broke: those that only asked whether it listens.
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    match started {
        Ok(child) => Ok(Some(child)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Failure::system(format!("cannot start {PROGRAM}: {e}"))),
    }
}
