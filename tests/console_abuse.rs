//! The SPICE proxy and viewers that mean harm, before a real QEMU and before a machine that is none.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

#[path = "support/spice.rs"]
mod spice;
#[path = "support/spice_stub.rs"]
mod spice_stub;

use std::collections::HashSet;
use std::io::Read as _;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cannery::console::{End, Kind, Kinds, Limits, Mode, Security, Whose, keys};
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
fn a_port_is_reached_where_the_policy_has_it_and_never_by_who_only_looks() {
    const NOT_AVAILABLE: u32 = 9;
    let more = [
        Kind::Port,
        Kind::Webdav,
        Kind::Usbredir,
        Kind::Smartcard,
        Kind::Record,
    ];
    let screen = Screen::start();
    let running = Running::before(&screen);
    let all = more.into_iter().fold(Kinds::default(), Kinds::with);
    running.admit("usual", "machine", Mode::Full, screen.backend());
    running.admit_to("look", "machine", Mode::ViewOnly, screen.backend(), all);
    running.admit_to("all", "machine", Mode::Full, screen.backend(), all);
    for ticket in ["usual", "look"] {
        let (main, id) = running.session(ticket);
        for kind in more {
            let code = running.viewer().handshake(&hello(id, kind), ticket).unwrap();
            assert_eq!(code, NOT_AVAILABLE, "{ticket}: {kind}");
        }
        main.part();
    }
    let (main, id) = running.session("all");
    let mut port = running.channel("all", id, Kind::Port);
    let name = port.until(PORT_INIT);
    assert!(name.windows(6).any(|part| part == b"a.port"), "{name:?}");
    port.say(PORT_DATA, b"into the machine");
    port.part();
    running.notes.await_line("port 0 closed");
    let lines = running.notes.all();
    let line = lines.iter().find(|line| line.contains("port 0 closed")).unwrap();
    assert!(line.ends_with(", 22 to the machine"), "{line}");
    main.part();
}

/// The port's name, and bytes for it.
const PORT_INIT: u16 = 201;
const PORT_DATA: u16 = 101;

/// What begins a display channel.
const DISPLAY_INIT: u16 = 101;

/// An answer of QEMU's control connection that took so long was held up by somebody: QEMU's own waits are a second and
/// more. Without that it takes some hundredths of a second at most, and more only where the host has no processor for it.
const HELD_UP: Duration = Duration::from_millis(700);

/// The slowest answer of a machine's control connection, which is asked again and again during some work.
fn slowest_beside<T>(screen: &Screen, work: impl FnOnce() -> T) -> (Duration, T) {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut slowest = Duration::ZERO;
            while !over.load(Ordering::Relaxed) {
                slowest = slowest.max(screen.answers_in());
                thread::sleep(Duration::from_millis(5));
            }
            slowest
        });
        let done = work();
        over.store(true, Ordering::Relaxed);
        (asking.join().unwrap(), done)
    })
}

/// How a viewer takes what its screen's channel brings.
#[derive(Clone, Copy, Debug)]
enum Takes {
    /// Reads all and acknowledges it, as viewers do.
    All,
    /// Reads all and acknowledges nothing.
    Unacknowledged,
    Nothing,
    AByteASecond,
}

impl Takes {
    /// Does so for as long.
    fn look(self, display: &mut Viewer<TcpStream>, within: Duration) -> usize {
        let end = Instant::now() + within;
        let mut window = (0, 0);
        let mut messages = 0;
        display
            .stream
            .set_read_timeout(Some(Duration::from_secs(2)))
            .unwrap();
        while Instant::now() < end {
            match self {
                Takes::Nothing => thread::sleep(Duration::from_millis(100)),
                Takes::AByteASecond => {
                    display.read(1).unwrap();
                    thread::sleep(Duration::from_secs(1));
                }
                Takes::All | Takes::Unacknowledged => {
                    let (message, body) = display.hear().unwrap();
                    messages += 1;
                    if matches!(self, Takes::All) {
                        acknowledge(display, &mut window, message, &body);
                    }
                }
            }
        }
        messages
    }
}

/// What viewers say about a message that has come. A window has a size, and a number of messages until it is full.
fn acknowledge(display: &mut Viewer<TcpStream>, window: &mut (u32, u32), message: u16, body: &[u8]) {
    if message == 3 {
        display.say(1, &body[..4]);
        let size = u32::from_le_bytes(*body[4..].first_chunk().unwrap());
        *window = (size, size);
    } else if window.0 > 0 {
        window.1 -= 1;
        if window.1 == 0 {
            display.say(2, &[]);
            window.1 = window.0;
        }
    }
}

#[test]
#[ignore = "needs qemu-system-x86_64 with SPICE"]
fn a_viewer_that_acknowledges_or_reads_nothing_does_not_hold_a_machine_up_that_changes_its_screen() {
    const LOOK: Duration = Duration::from_secs(8);
    let screen = Screen::switching();
    let running = Running::before(&screen);
    // With the headers that viewers have, and with those of old ones.
    for (long, mode, takes) in [
        (false, Mode::Full, Takes::All),
        (true, Mode::Full, Takes::All),
        (false, Mode::ViewOnly, Takes::Unacknowledged),
        (true, Mode::Full, Takes::Unacknowledged),
        (false, Mode::Full, Takes::Nothing),
        (false, Mode::ViewOnly, Takes::AByteASecond),
    ] {
        let ticket = format!("{takes:?} {long}");
        // None takes it from another.
        running.admit(&ticket, &ticket, mode, screen.backend());
        let common = if long { 0b0001 } else { 0b1001 };
        let mut main = running.viewer();
        let mut first = hello(0, Kind::Main);
        first.caps.common = vec![common];
        main.open(&first, &ticket).unwrap();
        let id = u32::from_le_bytes(*main.until(103).first_chunk().unwrap());
        let mut later = hello(id, Kind::Display);
        later.caps.common = vec![common];
        let mut display = running.viewer();
        display.open(&later, &ticket).unwrap();
        let (slowest, seen) = slowest_beside(&screen, || {
            display.say(DISPLAY_INIT, &[0; 14]);
            takes.look(&mut display, LOOK)
        });
        println!("{takes:?}, long headers {long}: QMP {slowest:?} at most, {seen} messages seen");
        // Asked directly, the machine takes 30 s beside all but the first.
        assert!(slowest < HELD_UP, "{takes:?}: {slowest:?}");
        if matches!(takes, Takes::All | Takes::Unacknowledged) {
            assert!(seen > 100, "{takes:?}: what is sent goes on: {seen}");
        }
        main.part();
        drop(display);
        running.notes.await_line(&format!("at {ticket}"));
        until(|| running.proxy.sessions().is_empty());
    }
}

#[test]
fn a_viewer_for_whom_too_much_waits_is_told_so_and_its_session_ends() {
    let limits = Limits {
        untaken_for: Duration::from_secs(1),
        ..limits()
    };
    let screen = spice_stub::drawing_screen();
    let running = Running::start(Some(Arc::clone(&screen)), limits, Security::Plain);
    running.admit("a-ticket", "machine", Mode::ViewOnly, screen);
    let (mut main, id) = running.session("a-ticket");
    let mut display = running.channel("a-ticket", id, Kind::Display);
    display.say(DISPLAY_INIT, &[0; 14]);
    let last = main.until_the_end().pop().unwrap();
    assert!(
        last.0 == 7 && String::from_utf8_lossy(&last.1).contains("did not keep up"),
        "{last:?}"
    );
    running.notes.await_line("display 0 closed: ");
    running
        .notes
        .await_line("session 1: the viewer did not keep up with what the machine shows");
    assert!(running.notes.has("bytes wait for the viewer"), "{:?}", running.notes.all());
    drop(display);
}

#[test]
#[ignore = "needs qemu-system-x86_64 with SPICE"]
fn a_display_channel_that_never_begins_does_not_hold_the_machine_up() {
    let screen = Screen::start();
    let running = Running::before(&screen);
    running.admit("first", "machine", Mode::Full, screen.backend());
    running.admit("second", "machine", Mode::Full, screen.backend());
    let (mut main, id) = running.session("first");
    let mut display = running.channel("first", id, Kind::Display);

    let (slowest, (took, mut second)) = slowest_beside(&screen, || {
        let begin = Instant::now();
        let (main, id) = running.session("second");
        let mut display = running.channel("second", id, Kind::Display);
        display.say(DISPLAY_INIT, &[0; 14]);
        display.until(314);
        (begin.elapsed(), (main, display))
    });
    println!(
        "takeover of a viewer without INIT: QMP {slowest:?} at most, second viewer's screen after {took:?}"
    );
    // Asked directly, the machine takes 29 s.
    assert!(slowest < HELD_UP, "{slowest:?}");
    second.1.say(103, &[1]);

    assert!(display.hear().is_err(), "the first viewer's screen is closed");
    let last = main.until_the_end().pop().unwrap();
    let text = String::from_utf8_lossy(&last.1).into_owned();
    assert!(
        last.0 == 7 && text.contains("another viewer has taken over"),
        "{last:?}"
    );
    running
        .notes
        .await_line("session 1: another viewer has taken over this console");
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

#[test]
#[ignore = "needs some seconds of computing, for keys"]
fn a_burst_of_a_hundred_sessions_is_served_and_no_key_is_used_twice() {
    const SESSIONS: usize = 100;
    const KINDS: [Kind; 3] = [Kind::Display, Kind::Inputs, Kind::Cursor];
    let limits = Limits {
        waiting_per_address: 512,
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
