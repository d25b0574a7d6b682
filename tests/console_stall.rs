//! The SPICE proxy, viewers that take less than they should, and whether a real QEMU's control connection notices.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

#[path = "support/spice.rs"]
mod spice;
#[path = "support/spice_stub.rs"]
mod spice_stub;

use std::net::TcpStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use cannery::console::{Kind, Limits, Mode, Security};
use spice::{HELD_UP, Running, Screen, Viewer, hello, limits, slowest_beside};

/// What begins a display channel.
const DISPLAY_INIT: u16 = 101;

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
        let end = Instant::now() + Duration::from_secs(10);
        while !running.proxy.sessions().is_empty() {
            assert!(Instant::now() < end, "{:?}", running.notes.all());
            thread::sleep(Duration::from_millis(10));
        }
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
    assert!(
        running.notes.has("bytes wait for the viewer"),
        "{:?}",
        running.notes.all()
    );
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
