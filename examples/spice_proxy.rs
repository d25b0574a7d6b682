//! A whole SPICE proxy for one machine: one ticket, which admits whoever has it, and a unix socket behind it.
//!
//! ```text
//! qemu-system-x86_64 … -spice unix=on,addr=/tmp/screen,disable-ticketing=on
//! cargo run --example spice_proxy 127.0.0.1:5900 letmein /tmp/screen
//! remote-viewer spice://127.0.0.1:5900     # and "letmein" as the password
//! ```

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
use futures_util::future::BoxFuture;

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
    let [_, address, ticket, socket] = arguments.as_slice() else {
        return Err("usage: spice_proxy ADDRESS:PORT TICKET SOCKET".into());
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
    let listener = tokio::net::TcpListener::bind(address).await?;
    match proxy.listen(listener, Security::Plain).await {}
}
