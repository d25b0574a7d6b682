//! The SPICE proxy and viewers that mean harm, before a real QEMU and before a machine that is none.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

#[path = "support/spice.rs"]
mod spice;
#[path = "support/spice_stub.rs"]
mod spice_stub;

use std::collections::HashSet;
use std::io::{self, Read as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cannery::console::{End, Kind, Limits, Mode, Security, Whose, keys};
use cannery::secret::Secret;
use spice::{Running, Screen, Viewer, hello, limits};

/// A key pressed, as scancode set 1 in an inputs message.
const KEY_DOWN: u16 = 101;
const KEY_UP: u16 = 102;
const ENTER_DOWN: [u8; 4] = [0x1c, 0, 0, 0];
const ENTER_UP: [u8; 4] = [0x9c, 0, 0, 0];

/// Types one key, and waits until the channel is closed.
fn type_enter(running: &Running, ticket: &str) -> Viewer<TcpStream> {
    let (main, id) = running.session(ticket);
    let mut inputs = running.channel(ticket, id, Kind::Inputs);
    inputs.until(101);
    inputs.say(KEY_DOWN, &ENTER_DOWN);
    inputs.say(KEY_UP, &ENTER_UP);
    inputs.part();
    main
}

#[test]
#[ignore = "needs qemu-system-x86_64 with SPICE"]
fn a_viewer_who_only_looks_cannot_type_and_one_who_may_can() {
    let screen = Screen::start();
    screen.run_guest();
    let running = Running::before(&screen);
    running.admit("look", "machine", Mode::ViewOnly, screen.backend());
    running.admit("type", "machine", Mode::Full, screen.backend());

    let mut main = type_enter(&running, "look");
    // The agent's data, and a mouse that moves the guest's.
    main.say(106, &10u32.to_le_bytes());
    main.say(107, b"clipboard");
    main.say(105, &1u16.to_le_bytes());
    main.part();
    running.notes.await_line("main 0 closed");
    for channel in ["main 0 closed", "inputs 0 closed"] {
        let lines = running.notes.all();
        let line = lines.iter().find(|line| line.contains(channel)).unwrap();
        assert!(line.ends_with(", 0 to the machine"), "{line}");
    }
    running.notes.await_line("session 1: the viewer left");

    type_enter(&running, "type").part();
    let end = Instant::now() + Duration::from_secs(10);
    while screen.keys().len() < 2 {
        assert!(
            Instant::now() < end,
            "the key did not arrive: {:?}",
            running.notes.all()
        );
        thread::sleep(Duration::from_millis(20));
    }
    // The first viewer's key came before, if at all.
    assert_eq!(screen.keys().len(), 2, "{:?}", screen.keys());
    println!("keys at QEMU after both typed one: {:?}", screen.keys());
}

#[test]
#[ignore = "needs qemu-system-x86_64 with SPICE"]
fn a_revoked_session_loses_all_of_its_channels_at_once_and_hears_why() {
    let screen = Screen::start();
    let running = Running::before(&screen);
    running.admit("a-ticket", "machine", Mode::Full, screen.backend());
    let (mut main, id) = running.session("a-ticket");
    let mut others: Vec<_> = [Kind::Display, Kind::Inputs, Kind::Cursor]
        .map(|kind| running.channel("a-ticket", id, kind))
        .into();
    others[0].say(101, &[0; 14]);
    others[0].until(314);
    // One that has not begun.
    others.push(running.channel("a-ticket", id, Kind::Display));
    assert_eq!(running.proxy.sessions().len(), 1);

    assert_eq!(running.proxy.end(Whose::Machine("another"), &End::MachineGone), 0);
    assert_eq!(running.proxy.end(Whose::Machine("machine"), &End::MachineGone), 1);
    for other in &mut others {
        other.until_the_end();
    }
    let last = main.until_the_end().pop().unwrap();
    assert_eq!(last.0, 7);
    assert!(
        String::from_utf8_lossy(&last.1).contains("the machine is gone"),
        "{last:?}"
    );
    running.notes.await_line("session 1: the machine is gone");
    assert!(running.proxy.sessions().is_empty());
    // And no later channel comes in.
    assert_eq!(
        running
            .viewer()
            .handshake(&hello(id, Kind::Inputs), "a-ticket")
            .unwrap(),
        7
    );
}

#[test]
#[ignore = "needs qemu-system-x86_64 with SPICE"]
fn when_the_machine_dies_its_viewers_do_not_wait() {
    let mut screen = Screen::start();
    let running = Running::before(&screen);
    running.admit("a-ticket", "machine", Mode::Full, screen.backend());
    let (mut main, id) = running.session("a-ticket");
    let mut inputs = running.channel("a-ticket", id, Kind::Inputs);
    screen.kill();
    main.until_the_end();
    inputs.until_the_end();
    running
        .notes
        .await_line("session 1: the machine closed its console");
    // The next one is told at its handshake, not after it.
    assert_eq!(
        running
            .viewer()
            .handshake(&hello(0, Kind::Main), "a-ticket")
            .unwrap(),
        1
    );
}

#[test]
fn takeovers_are_limited_and_who_may_only_look_takes_nothing_from_who_may_type() {
    let limits = Limits {
        takeovers: 2,
        ..limits()
    };
    let screen = spice_stub::screen();
    let running = Running::start(Some(Arc::clone(&screen)), limits, Security::Plain);
    running.admit("type", "machine", Mode::Full, Arc::clone(&screen));
    running.admit("look", "machine", Mode::ViewOnly, Arc::clone(&screen));
    let code = |ticket| running.viewer().handshake(&hello(0, Kind::Main), ticket).unwrap();

    let (look, _) = running.session("look");
    let (type_, _) = running.session("type");
    running
        .notes
        .await_line("session 1: another viewer has taken over");
    assert_eq!(code("look"), 7);
    running.notes.await_line("#look was redeemed and opened nothing");
    running
        .notes
        .await_line("refused: the machine is used by someone who may do more than look");
    // The same viewer comes back, as after a broken connection.
    let (again, _) = running.session("type");
    assert_eq!(code("type"), 7);
    running
        .notes
        .await_line("refused: the machine was taken over too often");
    assert_eq!(running.proxy.sessions().len(), 1);
    drop((look, type_, again));
    running.notes.await_line("session 4: the viewer left");
    // Nobody is there, so nothing is taken.
    drop(running.session("look"));
}

#[test]
fn what_no_viewer_sends_ends_its_whole_session() {
    let screen = spice_stub::screen();
    let running = Running::start(Some(Arc::clone(&screen)), limits(), Security::Plain);
    running.admit("a-ticket", "machine", Mode::Full, screen);
    let (mut main, id) = running.session("a-ticket");
    let mut inputs = running.channel("a-ticket", id, Kind::Inputs);
    // A size that spice-server would make room for.
    inputs.send(&[101, 0, 0xff, 0xff, 0xff, 0x7f]);
    inputs.until_the_end();
    let last = main.until_the_end().pop().unwrap();
    assert!(
        String::from_utf8_lossy(&last.1).contains("broke the protocol"),
        "{last:?}"
    );
    running
        .notes
        .await_line("inputs 0 closed: the viewer sent 2147483647 bytes in message 101");
    running
        .notes
        .await_line("session 1: the viewer broke the protocol");
}

#[test]
fn those_who_wait_without_a_ticket_are_bounded_and_those_inside_lose_nothing() {
    let limits = Limits {
        waiting: 40,
        waiting_per_address: 20,
        keys: 40,
        ..limits()
    };
    let screen = spice_stub::screen();
    let running = Running::start(Some(Arc::clone(&screen)), limits, Security::Plain);
    running.admit("a-ticket", "machine", Mode::Full, screen);
    let (main, id) = running.session("a-ticket");

    let mut half_open: Vec<TcpStream> = (0..300)
        .map(|_| TcpStream::connect(running.address).unwrap())
        .collect();
    let most = half_open.split_off(20);
    // Those past the limit are told so, or closed where even those are too many.
    let told = most
        .into_iter()
        .map(|mut stream| {
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let mut bytes = Vec::new();
            drop(stream.read_to_end(&mut bytes));
            bytes
        })
        .inspect(|bytes| {
            assert!(
                bytes.is_empty() || (bytes.len() == 194 && bytes[16] == 1),
                "{bytes:?}"
            )
        })
        .filter(|bytes| !bytes.is_empty())
        .count();
    assert!(told > 0, "nobody was told");
    assert_eq!(running.proxy.waiting(), 20);
    running
        .notes
        .await_line("refused: too many connections are waiting");
    assert_eq!(running.proxy.sessions()[0].channels(), 1);

    drop(half_open);
    until(|| running.proxy.waiting() == 0);
    drop(running.channel("a-ticket", id, Kind::Inputs));
    drop(main);
}

/// Waits until this is so.
#[track_caller]
fn until(so: impl Fn() -> bool) {
    // Hundreds of keys take a busy machine this long.
    let end = Instant::now() + Duration::from_secs(120);
    while !so() {
        assert!(Instant::now() < end);
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn who_guesses_tickets_is_not_listened_to_after_a_while() {
    let limits = Limits {
        wrong_tickets: 5,
        ..limits()
    };
    let screen = spice_stub::screen();
    let running = Running::start(Some(screen), limits, Security::Plain);
    for _ in 0..5 {
        assert_eq!(
            running
                .viewer()
                .handshake(&hello(0, Kind::Main), "guess")
                .unwrap(),
            7
        );
    }
    let refused = running.viewer().link(&hello(0, Kind::Main)).unwrap_err();
    assert_eq!(refused.to_string(), "refused");
}

/// Strangers at so many addresses, who ask for keys and bring no ticket, until this is dropped.
struct Strangers {
    over: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<usize>>,
}

impl Strangers {
    /// At each address so many at a time.
    const EACH: usize = 16;

    fn at(addresses: u8, to: SocketAddr) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&over);
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let all = (0..addresses).flat_map(|last| (0..Self::EACH).map(move |_| last));
                let all = all.map(|last| {
                    let stop = Arc::clone(&stop);
                    async move {
                        let mut keys = 0;
                        while !stop.load(Ordering::Relaxed) {
                            if ask_for_a_key(Ipv4Addr::new(127, 0, 9, 1 + last), to)
                                .await
                                .is_ok()
                            {
                                keys += 1;
                            } else {
                                tokio::time::sleep(Duration::from_millis(20)).await;
                            }
                        }
                        keys
                    }
                });
                futures_util::future::join_all(all).await.into_iter().sum()
            })
        });
        Strangers {
            over,
            thread: Some(thread),
        }
    }

    /// Stops them; how many keys they have seen.
    fn stop(mut self) -> usize {
        self.over.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

/// Connects, asks for a key, reads it and closes.
async fn ask_for_a_key(from: Ipv4Addr, to: SocketAddr) -> io::Result<()> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let socket = tokio::net::TcpSocket::new_v4()?;
    socket.bind((from, 0).into())?;
    let mut stream = socket.connect(to).await?;
    stream.write_all(&hello(0, Kind::Main).encode()).await?;
    let mut reply = [0; 20];
    stream.read_exact(&mut reply).await?;
    match reply[16] {
        0 => Ok(()),
        code => Err(io::Error::other(format!("refused with {code}"))),
    }
}

#[test]
#[ignore = "needs some seconds of computing, for keys"]
fn strangers_who_ask_for_keys_and_bring_no_ticket_get_few_and_a_session_opens_its_channels() {
    /// For a channel, with strangers at eight addresses and a busy processor: without them it takes some milliseconds.
    const SOON: Duration = Duration::from_secs(2);
    let limits = Limits {
        keys: 64,
        ..Limits::default()
    };
    // And those that were at the door before the last wrong one was noted.
    let most = usize::try_from(limits.wrong_tickets).unwrap() + limits.waiting_per_address;
    let screen = spice_stub::screen();
    let running = Running::start(Some(Arc::clone(&screen)), limits, Security::Plain);
    running.admit("a-ticket", "machine", Mode::Full, screen);
    let (main, id) = running.session("a-ticket");
    for addresses in [1, 8] {
        until(|| running.proxy.keys_ready() == 64);
        let strangers = Strangers::at(addresses, running.address);
        // Until they have taken what they can.
        let mut slowest = Duration::ZERO;
        for _ in 0..12 {
            let begin = Instant::now();
            running.channel("a-ticket", id, Kind::Inputs).part();
            slowest = slowest.max(begin.elapsed());
            thread::sleep(Duration::from_millis(200));
        }
        let keys = strangers.stop();
        println!("strangers at {addresses} addresses got {keys} keys; a channel took {slowest:?} at most");
        assert!(keys <= most * usize::from(addresses), "{keys} keys");
        assert!(slowest < SOON, "{slowest:?}");
    }
    assert!(
        running.notes.has("too many came from that address"),
        "they are not listened to"
    );
    main.part();
}

#[test]
#[ignore = "needs some seconds of computing, for keys"]
fn a_burst_of_a_hundred_sessions_is_served_and_no_key_is_used_twice() {
    const SESSIONS: usize = 100;
    const KINDS: [Kind; 3] = [Kind::Display, Kind::Inputs, Kind::Cursor];
    let limits = Limits {
        waiting_per_address: 512,
        keys_per_address: 1000,
        keys: SESSIONS * 4,
        ..limits()
    };
    let running = Running::start(Some(spice_stub::screen()), limits, Security::Plain);
    for number in 0..SESSIONS {
        running.admit(
            &format!("t{number}"),
            &format!("m{number}"),
            Mode::Full,
            spice_stub::screen(),
        );
    }
    until(|| running.proxy.keys_ready() == SESSIONS * 4);
    let begin = Instant::now();
    let seen: Vec<[u8; 162]> = thread::scope(|scope| {
        let viewers: Vec<_> = (0..SESSIONS)
            .map(|number| {
                let running = &running;
                scope.spawn(move || {
                    let ticket = format!("t{number}");
                    let mut main = running.viewer();
                    let mut keys = vec![open(&mut main, 0, Kind::Main, &ticket)];
                    let id = u32::from_le_bytes(*main.until(103).first_chunk().unwrap());
                    for kind in KINDS {
                        keys.push(open(&mut running.viewer(), id, kind, &ticket));
                    }
                    keys
                })
            })
            .collect();
        viewers
            .into_iter()
            .flat_map(|viewer| viewer.join().unwrap())
            .collect()
    });
    println!(
        "{SESSIONS} sessions of 4 channels in {:?}, the viewers' own work included",
        begin.elapsed()
    );
    assert_eq!(seen.len(), SESSIONS * 4);
    assert_eq!(seen.iter().collect::<HashSet<_>>().len(), SESSIONS * 4);
}

/// Opens a channel; the key that it was shown.
fn open(viewer: &mut Viewer<TcpStream>, session: u32, kind: Kind, ticket: &str) -> [u8; 162] {
    let reply = viewer.link(&hello(session, kind)).unwrap();
    viewer.send(&1u32.to_le_bytes());
    viewer.send(&keys::seal(&Secret::new(ticket), &reply.key).unwrap());
    assert_eq!(viewer.word().unwrap(), 0);
    reply.key
}
