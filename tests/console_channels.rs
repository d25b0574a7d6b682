//! All kinds of channels of a real QEMU through the SPICE proxy: reached where the policy has them, refused where not.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "support/spice.rs"]
mod spice;

use cannery::console::link::Hello;
use cannery::console::{Kind, Kinds, Mode};
use spice::{Running, Screen, hello};

/// The port's name, and bytes for it.
const PORT_INIT: u16 = 201;
const PORT_DATA: u16 = 101;
/// The protocol's word for a channel that is not there, or not for this one.
const NOT_AVAILABLE: u32 = 9;

/// Kinds that bring something into the machine.
const MORE: [Kind; 5] = [
    Kind::Port,
    Kind::Webdav,
    Kind::Usbredir,
    Kind::Smartcard,
    Kind::Record,
];

fn nth(session: u32, kind: Kind, id: u8) -> Hello {
    Hello {
        id,
        ..hello(session, kind)
    }
}

#[test]
#[ignore = "needs qemu-system-x86_64 with SPICE"]
fn every_kind_of_channel_is_reached_where_the_policy_has_it_and_no_way_in_by_who_only_looks() {
    let screen = Screen::start();
    let running = Running::before(&screen);
    let all = MORE.into_iter().fold(Kinds::default(), Kinds::with);
    let silent = Kinds::default().without(Kind::Playback);
    running.admit("usual", "machine", Mode::Full, screen.backend());
    running.admit_to("look", "machine", Mode::ViewOnly, screen.backend(), all);
    running.admit_to("all", "machine", Mode::Full, screen.backend(), all);
    running.admit_to("silent", "machine", Mode::Full, screen.backend(), silent);
    for (ticket, kinds) in [
        ("usual", Kinds::default()),
        ("look", Kinds::default()),
        ("all", all),
        ("silent", silent),
    ] {
        let (main, id) = running.session(ticket);
        let mut open = Vec::new();
        let asked = Kind::ALL.into_iter().filter(|kind| *kind != Kind::Main);
        let mut channels: Vec<(Kind, u8)> = asked.map(|kind| (kind, 0)).collect();
        // The second screen, and two that this machine does not have.
        channels.extend([(Kind::Display, 1), (Kind::Display, 9), (Kind::Usbredir, 9)]);
        for (kind, number) in channels {
            let mut viewer = running.viewer();
            let code = viewer.handshake(&nth(id, kind, number), ticket).unwrap();
            let there = kinds.has(kind) && number < 9;
            // Whether there is such a screen is not known before it has begun.
            if there || (kind == Kind::Display) {
                assert_eq!(code, 0, "{ticket}: {kind} {number}");
                if kind == Kind::Display {
                    viewer.say(101, &[0; 14]);
                }
            } else {
                assert_eq!(code, NOT_AVAILABLE, "{ticket}: {kind} {number}");
            }
            if there {
                open.push((kind, number, viewer));
            }
        }
        let session = running.proxy.sessions()[0].number;
        for (kind, number, _) in &open {
            running
                .notes
                .await_line(&format!("session {session}: {kind} {number} opened"));
        }
        assert!(!running.notes.has("display 9 opened"));
        for (kind, number, viewer) in &mut open {
            match (*kind, *number) {
                (Kind::Display, 0) => drop(viewer.until(314)),
                (Kind::Port, _) => drop(viewer.until(PORT_INIT)),
                // The others have nothing to say while no guest runs.
                _ => {}
            }
        }
        drop(open);
        main.part();
        running
            .notes
            .await_line(&format!("session {session}: the viewer left"));
    }
}

#[test]
#[ignore = "needs qemu-system-x86_64 with SPICE"]
fn what_is_said_at_a_port_arrives_and_is_counted() {
    let screen = Screen::start();
    let running = Running::before(&screen);
    let kinds = Kinds::default().with(Kind::Port);
    running.admit_to("all", "machine", Mode::Full, screen.backend(), kinds);
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
