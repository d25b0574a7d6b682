//! The SPICE proxy before a real QEMU, with spice-gtk's own tools and with viewers that mean harm.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "support/spice.rs"]
mod spice;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use cannery::console::link::{Caps, Hello};
use cannery::console::{Kind, Mode, Security};
use serde_json::{Value, json};
use spice::{PATIENCE, Running, Screen, hello, limits};

#[test]
#[ignore = "needs qemu-system-x86_64 with SPICE and spice-client-gtk"]
fn a_usual_viewer_sees_the_screen_and_one_with_a_wrong_ticket_does_not() {
    let screen = Screen::start();
    let running = Running::before(&screen);
    running.admit("a-ticket", "machine", Mode::Full, screen.backend());
    let picture = screen.folder().join("picture.ppm");
    let out = picture.to_str().unwrap();

    let (fine, said) = running.run("spicy-screenshot", "a-ticket", &["-o", out]);
    assert!(fine, "{said}");
    let bytes = std::fs::read(&picture).unwrap();
    assert!(bytes.starts_with(b"P6\n640 480\n"), "{said}");
    assert_eq!(bytes.len(), b"P6\n640 480\n255\n".len() + 640 * 480 * 3);
    running.notes.await_line("session 1: the viewer left");
    assert!(
        running.notes.has("display 0 opened"),
        "{:#?}",
        running.notes.all()
    );

    std::fs::remove_file(&picture).unwrap();
    let (_, said) = running.run("spicy-screenshot", "another", &["-o", out]);
    assert!(!picture.exists(), "{said}");
    running.notes.await_line("refused: the ticket is not known");
}

#[test]
#[ignore = "needs qemu-system-x86_64 with SPICE and spice-client-gtk"]
fn spicy_stats_counts_what_every_channel_carried() {
    let screen = Screen::start();
    let running = Running::before(&screen);
    running.admit("a-ticket", "machine", Mode::Full, screen.backend());
    // It goes on until it is interrupted.
    let (_, said) = running.run("spicy-stats", "a-ticket", &[]);
    for channel in ["main: ", "display: ", "inputs: ", "cursor: "] {
        assert!(said.contains(channel), "{said}");
    }
    running.notes.await_line("session 1: the viewer left");
}

#[test]
#[ignore = "needs qemu-system-x86_64 with SPICE"]
fn a_viewer_is_shown_what_the_machine_itself_can_do() {
    let screen = Screen::start();
    let running = Running::before(&screen);
    for kind in [Kind::Main, Kind::Display, Kind::Inputs, Kind::Cursor, Kind::Port] {
        let shown = running.viewer().link(&hello(0, kind)).unwrap().caps;
        assert_eq!(shown, screen.caps(kind), "{kind}");
    }
}

#[test]
#[ignore = "needs qemu-system-x86_64 with SPICE"]
fn tickets_sessions_and_channels_are_refused_with_the_protocols_codes() {
    let screen = Screen::start();
    let running = Running::before(&screen);
    running.admit("mine", "machine", Mode::Full, screen.backend());
    running.admit("yours", "machine", Mode::Full, screen.backend());
    let code = |hello: &Hello, ticket: &str| running.viewer().handshake(hello, ticket).unwrap();

    assert_eq!(code(&hello(0, Kind::Main), "wrong"), 7);
    assert_eq!(code(&hello(0, Kind::Main), ""), 7);
    assert_eq!(
        code(&hello(0, Kind::Inputs), "mine"),
        7,
        "no session has that ticket yet"
    );
    // A machine's move to another host, which would leave QEMU waiting for it.
    assert_eq!(code(&hello(1, Kind::Main), "mine"), 8);

    let (_main, id) = running.session("mine");
    assert_eq!(code(&hello(id ^ 1, Kind::Inputs), "mine"), 8);
    assert_eq!(
        code(&hello(id, Kind::Inputs), "yours"),
        7,
        "someone else's session"
    );
    assert_eq!(code(&hello(id, Kind::Usbredir), "mine"), 9, "not allowed");
    let other = Hello {
        id: 9,
        ..hello(id, Kind::Playback)
    };
    assert_eq!(code(&other, "mine"), 9, "the machine has none");
    // What follows a zero byte is not part of the ticket.
    assert_eq!(code(&hello(id, Kind::Inputs), "mine\0and more"), 0);

    // A mechanism that is not ours.
    let mut viewer = running.viewer();
    viewer.link(&hello(0, Kind::Main)).unwrap();
    viewer.send(&2u32.to_le_bytes());
    assert_eq!(viewer.word().unwrap(), 3);
    // 128 bytes that were never under the key.
    let mut viewer = running.viewer();
    viewer.link(&hello(0, Kind::Main)).unwrap();
    viewer.send(&1u32.to_le_bytes());
    viewer.send(&[0x5a; 128]);
    assert_eq!(viewer.word().unwrap(), 7);
}

#[test]
#[ignore = "needs qemu-system-x86_64 with SPICE"]
fn old_viewers_that_choose_nothing_and_have_long_headers_are_served() {
    let screen = Screen::start();
    let running = Running::before(&screen);
    running.admit("a-ticket", "machine", Mode::Full, screen.backend());
    for common in [vec![], vec![0], vec![0b0001], vec![0b1000]] {
        let old = Hello {
            caps: Caps {
                common: common.clone(),
                channel: vec![],
            },
            ..hello(0, Kind::Main)
        };
        let mut main = running.viewer();
        main.open(&old, "a-ticket").unwrap();
        let init = main.until(103);
        assert_eq!(init.len(), 32, "{common:?}");
        let id = u32::from_le_bytes(*init.first_chunk().unwrap());
        let mut display = running.viewer();
        display
            .open(
                &Hello {
                    session: id,
                    kind: Kind::Display.number(),
                    ..old
                },
                "a-ticket",
            )
            .unwrap();
        display.say(101, &[0; 14]);
        // A surface is created: the machine has read the beginning.
        display.until(314);
    }
}

/// Malformed link messages over a real connection; what each is told. The machine is never asked.
#[test]
fn what_is_no_link_message_is_told_so() {
    let running = Running::start(None, limits(), Security::Plain);
    let usual = hello(0, Kind::Main).encode();
    let changed = |at: usize, byte: u8| {
        let mut bytes = usual.clone();
        bytes[at] = byte;
        bytes
    };
    for (what, bytes, code) in [
        ("HTTP", b"GET / HTTP/1.1\r\n\r\n".to_vec(), 2),
        ("major 1", changed(4, 1), 4),
        ("size 4", changed(12, 4), 3),
        ("size 5000", changed(13, 0x13), 3),
        ("offset 10", changed(30, 10), 3),
        ("kind 0", changed(20, 0), 3),
        ("kind 7", changed(20, 7), 3),
        ("kind 12", changed(20, 12), 3),
    ] {
        let mut viewer = running.viewer();
        viewer.send(&bytes);
        let reply = viewer.read(194).unwrap();
        assert_eq!(reply[16..20], u32::to_le_bytes(code), "{what}");
        assert!(viewer.read(1).is_err(), "{what}: it goes on");
    }
    let running = Running::start(None, limits(), Security::NeedTls);
    let mut viewer = running.viewer();
    assert_eq!(
        viewer.link(&hello(0, Kind::Main)).unwrap_err().to_string(),
        "only allowed over TLS"
    );
}

/// ryll, a viewer that shares no code with spice-gtk, told what to do by lines of JSON.
struct Ryll {
    child: Child,
    lines: BufReader<UnixStream>,
}

impl Ryll {
    /// Starts it before this proxy.
    fn start(screen: &Screen, running: &Running, ticket: &str) -> Self {
        let (file, socket) = (screen.folder().join("console.vv"), screen.folder().join("ryll"));
        let port = running.address.port();
        let text = format!("[virt-viewer]\ntype=spice\nhost=127.0.0.1\nport={port}\npassword={ticket}\n");
        std::fs::write(&file, text).unwrap();
        let program = concat!(env!("CARGO_MANIFEST_DIR"), "/.cache/peers/ryll/bin/ryll");
        let child = Command::new(program)
            .args(["--headless", "--file"])
            .arg(&file)
            .arg("--control-socket")
            .arg(&socket)
            // Where it writes its log.
            .env("TMPDIR", screen.folder())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("{program} cannot be started (contrib/ryll puts it there): {e}"));
        let end = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(e) => assert!(Instant::now() < end, "{e}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut ryll = Ryll {
            child,
            lines: BufReader::new(stream),
        };
        ryll.ask(
            "hello",
            &json!({"client_name": "test", "protocol_version": "1.0"}),
        );
        ryll
    }

    /// Has it do something; what came of it.
    fn ask(&mut self, what: &str, parameters: &Value) -> Value {
        let request = json!({"id": what, "method": what, "params": parameters});
        writeln!(self.lines.get_mut(), "{request}").unwrap();
        loop {
            let mut line = String::new();
            assert!(self.lines.read_line(&mut line).unwrap() > 0, "it has ended");
            let answer: Value = serde_json::from_str(&line).unwrap();
            if answer["id"] == what {
                assert_eq!(answer["ok"], true, "{answer}");
                return answer["result"].clone();
            }
        }
    }
}

impl Drop for Ryll {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[test]
#[ignore = "needs qemu-system-x86_64 with SPICE and ryll (contrib/ryll)"]
fn ryll_draws_the_screen_and_its_keys_arrive() {
    // It asks for no channels before it is pinged twice, which QEMU does at a port only, to see how fast the network is.
    let port = TcpListener::bind(("127.0.0.1", 0))
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let screen = Screen::at_port(port);
    let machine = Screen::backend_at(port);
    let running = Running::start(Some(machine.clone()), limits(), Security::Plain);
    running.admit("a-ticket", "machine", Mode::Full, machine);
    screen.run_guest();
    let mut ryll = Ryll::start(&screen, &running, "a-ticket");
    for channel in ["main", "display", "inputs", "cursor"] {
        running
            .notes
            .await_line(&format!("session 1: {channel} 0 opened"));
    }

    // What the firmware has written, in more than one colour.
    let end = Instant::now() + PATIENCE;
    loop {
        let status = ryll.ask("status", &json!({}));
        if status["surfaces"].as_array().is_some_and(|all| !all.is_empty()) {
            let picture = ryll.ask("screenshot", &json!({"format": "rgba"}));
            let data = BASE64.decode(picture["data_base64"].as_str().unwrap()).unwrap();
            let size = picture["width"].as_u64().unwrap() * picture["height"].as_u64().unwrap();
            assert_eq!(data.len(), usize::try_from(size * 4).unwrap());
            let written = data.chunks_exact(4).filter(|pixel| *pixel != &data[..4]).count();
            if size >= 640 * 400 && written > 100 {
                break;
            }
        }
        assert!(Instant::now() < end, "{status}");
        std::thread::sleep(Duration::from_millis(100));
    }

    ryll.ask("send_key", &json!({"scancode": 30, "state": "press"}));
    let end = Instant::now() + PATIENCE;
    while screen.keys().len() < 2 {
        assert!(Instant::now() < end, "the keys: {:?}", screen.keys());
        std::thread::sleep(Duration::from_millis(20));
    }
    let all = running.notes.all();
    assert!(
        !all.iter().any(|line| line.contains("where none sends it")),
        "{all:#?}"
    );
    drop(ryll);
    running.notes.await_line("session 1: the viewer left");
}
