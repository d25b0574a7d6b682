//! The SPICE proxy over TLS, on both sides, with remote-viewer.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "support/spice.rs"]
mod spice;
mod support;

use std::io;
use std::net::TcpStream;
use std::path::Path;
use std::pin::Pin;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use cannery::console::backend::Tcp;
use cannery::console::tls::MachineTls;
use cannery::console::wire::Wire;
use cannery::console::{Backend, Certificate, Kind, Limits, Mode, Security};
use cannery::secret::Secret;
use futures_util::future::BoxFuture;
use openssl::ssl::{SslConnector, SslMethod};
use spice::{Running, Screen, hello, limits};
use support::desktop::Desktop;
use support::https::Authority;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

fn certificate(authority: &Authority) -> Arc<Certificate> {
    Arc::new(Certificate::load(&authority.file("server.pem"), &authority.file("server.key")).unwrap())
}

#[test]
#[ignore = "needs qemu-system-x86_64 with SPICE, remote-viewer and xvfb"]
fn a_viewer_that_comes_plain_is_sent_to_tls_where_it_checks_whom_it_has() {
    let screen = Screen::start();
    let authority = Authority::new();
    let limits = limits();
    let tls = Running::start(
        Some(screen.backend()),
        limits.clone(),
        Security::Tls(certificate(&authority)),
    );
    tls.admit("a-ticket", "machine", Mode::Full, screen.backend());
    let plain = Running::start(None, limits, Security::NeedTls);

    let file = screen.folder().join("console.vv");
    let ca = std::fs::read_to_string(authority.file("ca.pem"))
        .unwrap()
        .replace('\n', "\\n");
    let desktop = Desktop::start();
    let viewer = RemoteViewer::open(
        &desktop,
        &file,
        &format!(
            "[virt-viewer]\ntype=spice\nhost={}\nport={}\ntls-port={}\npassword=a-ticket\nca={ca}\nhost-subject=CN=another\n",
            plain.address.ip(),
            plain.address.port(),
            tls.address.port(),
        ),
    );
    plain.notes.await_line("the viewer was sent to the port with TLS");
    tls.notes.await_line("refused: ");
    assert!(!tls.notes.has("session 1"), "{:#?}", tls.notes.all());
    drop(viewer);

    let right = std::fs::read_to_string(&file)
        .unwrap()
        .replace("CN=another", "CN=server");
    let viewer = RemoteViewer::open(&desktop, &file, &right);
    for channel in ["main", "display", "inputs", "cursor"] {
        tls.notes.await_line(&format!("session 1: {channel} 0 opened"));
    }
    drop(viewer);
    tls.notes.await_line("session 1: the viewer left");
    assert!(
        !tls.notes.has("refused: it may not open"),
        "{:#?}",
        tls.notes.all()
    );
}

/// A server that is asked plain first.
#[derive(Debug)]
struct PlainFirst {
    plain: Tcp,
    tls: Tcp,
}

impl Backend for PlainFirst {
    fn likeness(&self) -> &str {
        "qemu"
    }

    fn connect(&self) -> BoxFuture<'_, io::Result<Wire>> {
        self.plain.connect()
    }

    fn connect_secured(&self) -> Option<BoxFuture<'_, io::Result<Wire>>> {
        Some(self.tls.connect())
    }

    fn ticket(&self) -> Option<&Secret> {
        self.plain.ticket()
    }
}

/// A machine of which much comes at once.
#[derive(Debug)]
struct InBursts(Arc<dyn Backend>);

impl Backend for InBursts {
    fn likeness(&self) -> &str {
        self.0.likeness()
    }

    fn connect(&self) -> BoxFuture<'_, io::Result<Wire>> {
        Box::pin(async {
            let wire = self.0.connect().await?;
            Ok(Box::new(Bursts { wire, next: None }) as Wire)
        })
    }

    fn ticket(&self) -> Option<&Secret> {
        self.0.ticket()
    }
}

/// What comes within a moment is read together.
struct Bursts {
    wire: Wire,
    next: Option<Pin<Box<tokio::time::Sleep>>>,
}

impl AsyncRead for Bursts {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let moment = || Box::pin(tokio::time::sleep(Duration::from_millis(100)));
        ready!(self.next.get_or_insert_with(moment).as_mut().poll(cx));
        ready!(Pin::new(&mut self.wire).poll_read(cx, buffer))?;
        self.next = None;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Bursts {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.wire).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.wire).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.wire).poll_shutdown(cx)
    }
}

#[test]
#[ignore = "needs qemu-system-x86_64 with SPICE and spice-client-gtk"]
fn a_viewer_over_tls_sees_the_screen_however_much_the_machine_says_at_once() {
    let screen = Screen::start();
    let authority = Authority::new();
    let running = Running::start(None, limits(), Security::Tls(certificate(&authority)));
    running.admit(
        "a-ticket",
        "machine",
        Mode::Full,
        Arc::new(InBursts(screen.backend())),
    );
    let picture = screen.folder().join("picture.ppm");
    let address = format!("spice://localhost?tls-port={}", running.address.port());
    let output = Command::new("timeout")
        .args([
            "20",
            "spicy-screenshot",
            "--uri",
            &address,
            "-w",
            "a-ticket",
            "-o",
        ])
        .arg(&picture)
        .env("SSL_CERT_FILE", authority.file("ca.pem"))
        .output()
        .unwrap();
    assert!(picture.exists(), "{output:?} {:#?}", running.notes.all());
}

/// A port that nobody listens at.
fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    listener.local_addr().unwrap().port()
}

#[test]
#[ignore = "needs qemu-system-x86_64 with SPICE"]
fn qemus_own_tls_is_used_for_the_channels_that_want_it_and_left_for_those_that_want_none() {
    const NEED_UNSECURED: u32 = 6;
    let authority = Authority::new();
    let (port, tls_port) = (free_port(), free_port());
    let files = ["ca.pem", "server.pem", "server.key"].map(|name| authority.file(name));
    let [a, b, c] = &files;
    let screen = Screen::at_ports(port, tls_port, [a, b, c]);
    let ca = std::fs::read(authority.file("ca.pem")).unwrap();
    let tcp = |port, subject: Option<&str>| Tcp {
        tls: subject.map(|subject| (tls_port, MachineTls::new(&ca, Some(subject)).unwrap())),
        ..Screen::tcp(port)
    };
    let running = Running::start(None, limits(), Security::Plain);
    let plain_first = PlainFirst {
        plain: tcp(Some(port), None),
        tls: tcp(None, Some("CN=server")),
    };
    // QEMU takes the main channel over TLS only, and the pointer's without it only.
    for (ticket, backend, main, cursor) in [
        (
            "both",
            Arc::new(tcp(Some(port), Some("CN=server"))) as Arc<dyn Backend>,
            0,
            0,
        ),
        (
            "TLS only",
            Arc::new(tcp(None, Some("CN=server"))),
            0,
            NEED_UNSECURED,
        ),
        ("plain first", Arc::new(plain_first), 0, 0),
        (
            "another subject",
            Arc::new(tcp(Some(port), Some("CN=another"))),
            1,
            0,
        ),
    ] {
        running.admit(ticket, ticket, Mode::Full, backend);
        let mut viewer = running.viewer();
        assert_eq!(
            viewer.handshake(&hello(0, Kind::Main), ticket).unwrap(),
            main,
            "{ticket}"
        );
        if main == 0 {
            let id = u32::from_le_bytes(*viewer.until(103).first_chunk().unwrap());
            let code = running
                .viewer()
                .handshake(&hello(id, Kind::Cursor), ticket)
                .unwrap();
            assert_eq!(code, cursor, "{ticket}");
            viewer.part();
            running.notes.await_line(&format!("at {ticket}"));
        }
    }
    drop(screen);
}

/// The viewer that most people have.
struct RemoteViewer(Child);

impl RemoteViewer {
    fn open(desktop: &Desktop, file: &Path, content: &str) -> Self {
        std::fs::write(file, content).unwrap();
        let mut viewer = Command::new("remote-viewer");
        viewer.arg(file).stderr(Stdio::null());
        Self(desktop.shows(&mut viewer).spawn().unwrap())
    }
}

impl Drop for RemoteViewer {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
#[ignore = "needs qemu-system-x86_64 with SPICE"]
fn a_machine_behind_tls_is_known_by_its_subject_and_its_plain_port_is_left_alone() {
    let screen = Screen::start();
    let authority = Authority::new();
    let ca = std::fs::read(authority.file("ca.pem")).unwrap();
    // Another proxy stands for a host whose QEMU has TLS; it has a ticket of its own.
    let secured = Running::start(
        Some(screen.backend()),
        limits(),
        Security::Tls(certificate(&authority)),
    );
    secured.admit("the-hosts", "machine", Mode::Full, screen.backend());
    let plain = Running::start(None, limits(), Security::NeedTls);
    let backend = |port, authorities: &[u8], subject| -> Arc<dyn Backend> {
        Arc::new(Tcp {
            host: "127.0.0.1".to_owned(),
            port,
            tls: Some((
                secured.address.port(),
                MachineTls::new(authorities, subject).unwrap(),
            )),
            ticket: Some(Secret::new("the-hosts")),
            likeness: "host".to_owned(),
        })
    };
    let stranger = std::fs::read(Authority::new().file("ca.pem")).unwrap();
    let running = Running::before(&screen);
    for (ticket, backend, code) in [
        ("subject", backend(None, &ca, Some("CN=server")), 0),
        (
            "both ports",
            backend(Some(plain.address.port()), &ca, Some("CN=server")),
            0,
        ),
        ("another subject", backend(None, &ca, Some("CN=another")), 1),
        (
            "another authority",
            backend(None, &stranger, Some("CN=server")),
            1,
        ),
        (
            "plain only",
            {
                Arc::new(Tcp {
                    host: "127.0.0.1".to_owned(),
                    port: Some(plain.address.port()),
                    tls: None,
                    ticket: None,
                    likeness: "host".to_owned(),
                })
            },
            5,
        ),
    ] {
        running.admit(ticket, ticket, Mode::Full, backend);
        let mut viewer = running.viewer();
        assert_eq!(
            viewer.handshake(&hello(0, Kind::Main), ticket).unwrap(),
            code,
            "{ticket}"
        );
        if code == 0 {
            assert_eq!(viewer.until(103).len(), 32, "{ticket}");
            viewer.part();
        }
    }
}

#[test]
fn who_finds_no_place_is_told_over_tls_too() {
    let authority = Authority::new();
    let one = Limits {
        waiting: 1,
        ..limits()
    };
    let running = Running::start(None, one, Security::Tls(certificate(&authority)));
    let half_open = TcpStream::connect(running.address).unwrap();
    while running.proxy.waiting() == 0 {
        std::thread::yield_now();
    }
    let mut builder = SslConnector::builder(SslMethod::tls_client()).unwrap();
    builder.set_ca_file(authority.file("ca.pem")).unwrap();
    let mut configuration = builder.build().configure().unwrap();
    configuration.set_verify_hostname(false);
    let stream = TcpStream::connect(running.address).unwrap();
    let mut stream = configuration.connect("server", stream).unwrap();
    let mut answer = [0; 20];
    std::io::Read::read_exact(&mut stream, &mut answer).unwrap();
    assert_eq!(answer[..4], *b"REDQ");
    assert_eq!(answer[16], 1, "the protocol's word for an error");
    drop(half_open);
}

#[test]
fn a_certificate_is_changed_and_sessions_that_began_before_go_on() {
    let (old, new) = (Authority::new(), Authority::new());
    let shown = certificate(&old);
    let running = Running::start(None, limits(), Security::Tls(Arc::clone(&shown)));
    let connect = |authority: &Authority| {
        let mut builder = SslConnector::builder(SslMethod::tls_client()).unwrap();
        builder.set_ca_file(authority.file("ca.pem")).unwrap();
        let mut configuration = builder.build().configure().unwrap();
        configuration.set_verify_hostname(false);
        configuration.connect("server", TcpStream::connect(running.address).unwrap())
    };
    let mut before = connect(&old).unwrap();
    assert!(connect(&new).is_err());
    let put = |name: &str| std::fs::copy(new.file(name), old.file(name)).unwrap();
    put("server.pem");
    let error = shown.reload().unwrap_err().to_string();
    assert!(
        error.contains("server.pem with the key") && error.contains("mismatch"),
        "{error}"
    );
    assert!(connect(&old).is_ok(), "a change that fails changes nothing");
    put("server.key");
    shown.reload().unwrap();
    assert!(connect(&new).is_ok() && connect(&old).is_err());
    // The first is still in the middle of its handshake.
    std::io::Write::write_all(&mut before, &hello(0, Kind::Main).encode()).unwrap();
    let mut magic = [0; 4];
    std::io::Read::read_exact(&mut before, &mut magic).unwrap();
    assert_eq!(magic, *b"REDQ");
}
