//! Where viewers arrive.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::handshake;
use super::link::Code;
use super::proxy::Proxy;
use super::refusal::Refusal;
use super::tls::Certificate;
use super::wire::{self, Wire};

/// After an accept that failed, for want of descriptors for example: trying at once would only keep the processor busy.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// How many that find no place are told so at one time; more are only closed.
const TOLD_MAX: usize = 64;

/// For those to get as far as hearing it.
const TOLD_TIME: Duration = Duration::from_secs(2);

/// What a port speaks.
#[derive(Clone, Debug)]
pub enum Security {
    /// Plain SPICE.
    Plain,
    /// Plain, and every viewer is told to come back with TLS: what viewers expect of the port that a machine's address
    /// names first.
    NeedTls,
    /// TLS at once.
    Tls(Arc<Certificate>),
}

impl Proxy {
    /// Serves all that arrive, each in a task of its own, which goes on when this is dropped.
    pub async fn listen(self: Arc<Self>, listener: TcpListener, security: Security) -> Infallible {
        let told = Arc::new(Semaphore::new(TOLD_MAX));
        loop {
            match listener.accept().await {
                Ok((stream, from)) => self.arrived(stream, from, &security, &told),
                Err(_) => tokio::time::sleep(ACCEPT_AGAIN).await,
            }
        }
    }

    fn arrived(
        self: &Arc<Self>,
        stream: TcpStream,
        from: SocketAddr,
        security: &Security,
        told: &Arc<Semaphore>,
    ) {
        let Some(pass) = self.enter(from) else {
            if let Ok(permit) = Arc::clone(told).try_acquire_owned() {
                let security = security.clone();
                tokio::spawn(async move {
                    // Whoever is slow about it is only closed.
                    if let Ok(Ok(mut wire)) = timeout(TOLD_TIME, secured(stream, &security)).await {
                        handshake::refuse(&mut wire, Code::Error).await;
                    }
                    drop(permit);
                });
            }
            return;
        };
        let proxy = Arc::clone(self);
        let security = security.clone();
        tokio::spawn(async move {
            match secured(stream, &security).await {
                Ok(wire) => proxy.attend(wire, from, pass).await,
                Err(why) => proxy.refused(from, &why),
            }
        });
    }
}

/// What is left to speak SPICE with.
async fn secured(stream: TcpStream, security: &Security) -> Result<Wire, Refusal> {
    wire::tune(&stream).map_err(Refusal::Tls)?;
    match security {
        Security::Plain => Ok(Box::new(stream)),
        Security::Tls(certificate) => {
            let stream = certificate.accept(stream).await.map_err(Refusal::Tls)?;
            Ok(Box::new(stream))
        }
        Security::NeedTls => {
            let mut stream = stream;
            handshake::hello(&mut stream).await?;
            handshake::refuse(&mut stream, Code::NeedSecured).await;
            Err(Refusal::Tls(io::Error::other(
                "the viewer was sent to the port with TLS",
            )))
        }
    }
}
