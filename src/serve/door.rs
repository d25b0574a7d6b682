//! The port: who may connect, with what deadlines, and how it is closed.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, watch};
use tokio::task::JoinSet;

use super::House;
use super::count::Counts;
use super::limit::Place;
use super::site::{self, Peer};
use crate::console::wire;
use crate::console::{Certificate, Security};
use crate::outcome::Failure;

/// A request's head arrives within this; so long a connection may also idle between two of them.
const HEAD: Duration = Duration::from_secs(20);
/// When there are no descriptors left, the next connection is taken after this.
const PAUSE: Duration = Duration::from_millis(100);
/// How often it is looked whether all have closed.
const LOOK: Duration = Duration::from_millis(20);
/// After the sessions were told to end, connections may take so long to close.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// An open port.
pub(super) struct Door {
    house: Arc<House>,
    certificate: Arc<Certificate>,
    listener: TcpListener,
    address: SocketAddr,
    connections: Mutex<JoinSet<()>>,
    closing: watch::Sender<bool>,
}

impl Door {
    pub(super) async fn open(house: Arc<House>, certificate: Arc<Certificate>) -> Result<Self, Failure> {
        let listen = house.console.listen;
        let failed = |e: std::io::Error| {
            Failure::system(format!("cannot listen on {listen}: {e}"))
                .hint("console.listen in the settings names the address")
        };
        let listener = TcpListener::bind(listen).await.map_err(failed)?;
        Ok(Self {
            address: listener.local_addr().map_err(failed)?,
            house,
            certificate,
            listener,
            connections: Mutex::default(),
            closing: watch::Sender::new(false),
        })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Takes connections, for ever.
    pub(super) async fn serve(&self) {
        let router = site::router(Arc::clone(&self.house));
        loop {
            let (stream, from) = match self.listener.accept().await {
                Ok(taken) => taken,
                Err(e) => {
                    tracing::warn!("no connection can be taken: {e}");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let Some(place) = self.house.connections.place(from.ip()) else {
                self.house.counts.refused_connections.add(1);
                continue;
            };
            let router = router.clone().layer(Extension(Peer(from.ip())));
            let connection = connection(
                stream,
                Arc::clone(&self.certificate),
                router,
                self.closing.subscribe(),
                place,
                Arc::clone(&self.house.counts),
            );
            let mut connections = self.connections.lock().await;
            connections.spawn(connection);
            while connections.try_join_next().is_some() {}
        }
    }

    /// Lets what is open come to its end, for a moment.
    pub(super) async fn close(&self) {
        self.closing.send_replace(true);
        let mut connections = self.connections.lock().await;
        let all = async {
            while connections.join_next().await.is_some() {}
            // A WebSocket outlives the request that it began as, and keeps its place; viewers at the port for screens have none.
            while self.house.connections.len() > 0 || !self.house.proxy.sessions().is_empty() {
                tokio::time::sleep(LOOK).await;
            }
        };
        if tokio::time::timeout(LAST_WORDS, all).await.is_err() {
            tracing::info!("connections that did not end are cut off");
        }
    }
}

async fn connection(
    stream: TcpStream,
    certificate: Arc<Certificate>,
    router: axum::Router,
    mut closing: watch::Receiver<bool>,
    place: Place,
    counts: Arc<Counts>,
) {
    if let Err(e) = wire::tune(&stream) {
        tracing::debug!("a connection cannot be tuned: {e}");
    }
    // A stranger's mistake is no news.
    let Ok(stream) = certificate.accept(stream).await else {
        counts.refused_handshake.add(1);
        return;
    };
    let mut builder = Builder::new(TokioExecutor::new()).http1_only();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD);
    let router = router.layer(Extension(Arc::new(place)));
    let mut serving =
        pin!(builder.serve_connection_with_upgrades(TokioIo::new(stream), TowerToHyperService::new(router)));
    // That the door is gone means the same as that it closes.
    let closing = async { drop(closing.wait_for(|closing| *closing).await) };
    let result = tokio::select! {
        result = &mut serving => result,
        () = closing => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(e) = result {
        tracing::debug!("a connection ended: {e}");
    }
}

/// The port for SPICE viewers, where there is one.
pub(super) struct Spice(Option<(TcpListener, Arc<Certificate>)>);

impl Spice {
    pub(super) async fn open(house: &House, certificate: Arc<Certificate>) -> Result<Self, Failure> {
        let console = &house.console;
        let Some(listen) = console.spice_listen else {
            return Ok(Self(None));
        };
        let listener = TcpListener::bind(listen).await.map_err(|e| {
            Failure::system(format!("cannot listen on {listen}: {e}"))
                .hint("console.spice_listen in the settings names the address")
        })?;
        Ok(Self(Some((listener, certificate))))
    }

    /// Takes viewers, for ever.
    pub(super) async fn serve(self, house: &House) {
        if let Some((listener, certificate)) = self.0 {
            match Arc::clone(&house.proxy)
                .listen(listener, Security::Tls(certificate))
                .await {}
        }
        std::future::pending().await
    }
}
