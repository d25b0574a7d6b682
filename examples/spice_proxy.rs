//! A whole SPICE proxy for one machine: one ticket, which admits whoever has it, and a unix socket behind it. Viewers come over
//! TCP; browsers with spice-html5 over WebSockets, at the second address.
//!
//! ```text
//! qemu-system-x86_64 … -spice unix=on,addr=/tmp/screen,disable-ticketing=on
//! cargo run --example spice_proxy 127.0.0.1:5900 letmein /tmp/screen 127.0.0.1:5901
//! remote-viewer spice://127.0.0.1:5900     # and "letmein" as the password
//! ```
//!
//! For a listener with TLS, give `Security::Tls(Arc::new(Certificate::load(chain, key)?))` instead of `Security::Plain`; for
//! the port beside it that sends viewers there, `Security::NeedTls`. All of them may be one proxy's.

// An example prints: it is a program.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::net::SocketAddr;
use std::sync::Arc;

use cannery::console::backend::Unix;
use cannery::console::{
    Admission, Backend, Denied, Door, Event, Kinds, Limits, Mode, Observer, Proxy, Security,
};
use cannery::secret::Secret;
use futures_util::future::{BoxFuture, ready};
use futures_util::{SinkExt, StreamExt};
use tokio::net::TcpListener;
use tokio_tungstenite::tungstenite::handshake::server::{Request, Response};
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::{self, Message};

/// Knows one ticket.
struct OneTicket {
    ticket: Secret,
    machine: Arc<Unix>,
}

impl Door for OneTicket {
    fn model(&self) -> Option<Arc<dyn Backend>> {
        Some(self.machine.clone())
    }

    fn redeem<'a>(
        &'a self,
        ticket: &'a Secret,
        from: SocketAddr,
    ) -> BoxFuture<'a, Result<Admission, Denied>> {
        Box::pin(async move {
            if *ticket != self.ticket {
                return Err(Denied::Unknown);
            }
            Ok(Admission {
                ticket: "the only one".to_owned(),
                viewer: from.to_string(),
                machine: "the only one".to_owned(),
                mode: Mode::Full,
                kinds: Kinds::default(),
                backend: self.machine.clone(),
            })
        })
    }
}

/// Prints what happens.
struct Print;

impl Observer for Print {
    fn saw(&self, event: &Event<'_>) {
        println!("{event}");
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, address, ticket, socket, for_browsers] = arguments.as_slice() else {
        return Err("usage: spice_proxy ADDRESS:PORT TICKET SOCKET ADDRESS:PORT".into());
    };
    let door = OneTicket {
        ticket: Secret::new(ticket.as_str()),
        machine: Arc::new(Unix {
            path: socket.into(),
            ticket: None,
            likeness: "the only one".to_owned(),
        }),
    };
    let proxy = Proxy::new(door, Print, Limits::default())?;
    let (listener, for_browsers) = (
        TcpListener::bind(address).await?,
        TcpListener::bind(for_browsers).await?,
    );
    tokio::select! {
        never = Arc::clone(&proxy).listen(listener, Security::Plain) => match never {},
        ended = listen_for_websockets(proxy, for_browsers) => ended,
    }
}

/// Any library for WebSockets will do: what the proxy wants is what their messages hold.
#[expect(clippy::result_large_err, reason = "the library's own type")]
async fn listen_for_websockets(proxy: Arc<Proxy>, listener: TcpListener) -> Result<(), Box<dyn Error>> {
    loop {
        let (stream, from) = listener.accept().await?;
        let proxy = Arc::clone(&proxy);
        tokio::spawn(async move {
            // Browsers want the sub-protocol that they have named to be named to them.
            let binary = |_: &Request, mut answer: Response| {
                let protocol = HeaderValue::from_static("binary");
                answer.headers_mut().insert("sec-websocket-protocol", protocol);
                Ok(answer)
            };
            let Ok(socket) = tokio_tungstenite::accept_hdr_async(stream, binary).await else {
                return;
            };
            let (outgoing, incoming) = socket.split();
            let incoming = incoming
                .take_while(|message| ready(!matches!(message, Ok(Message::Close(_)) | Err(_))))
                .filter_map(|message| {
                    ready(match message {
                        Ok(Message::Binary(bytes)) => Some(bytes),
                        _ => None,
                    })
                });
            let outgoing = outgoing.with(|bytes| ready(Ok::<_, tungstenite::Error>(Message::Binary(bytes))));
            proxy.serve_websocket(incoming, outgoing, from).await;
        });
    }
}
