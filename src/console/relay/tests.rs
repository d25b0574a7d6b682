use std::sync::Arc;

use tokio::io::DuplexStream;
use tokio::time::Instant;

use super::super::channel::{Kinds, Mode};
use super::super::frame::{Framing, message};
use super::super::session::test_session_of;
use super::*;

/// A channel between a machine and a viewer, with little room on either side.
struct Channel {
    viewer: DuplexStream,
    machine: DuplexStream,
    session: Arc<Session>,
    over: tokio::task::JoinHandle<ChannelEnd>,
}

const ROOM: usize = 1000;
const PICTURE: u16 = 304;

fn channel(kind: Kind, framing: Framing, limits: Limits) -> Channel {
    let (viewer, theirs) = tokio::io::duplex(ROOM);
    let (machine, its) = tokio::io::duplex(ROOM);
    let (registry, live) = test_session_of(&limits);
    let session = Arc::clone(&live.session);
    let ours = Arc::clone(&session);
    let over = tokio::spawn(async move {
        let relay = Relay {
            kind,
            viewer: Box::new(theirs),
            machine: Box::new(its),
            filter: Filter::new(kind, Mode::ViewOnly, framing),
            begun: Vec::new(),
            acks: Acks::new(framing),
            hall: (kind == Kind::Main).then(|| Hall::new(Kinds::default(), framing)),
            session: &ours,
            registry: &registry,
            limits: &limits,
            carried: Carried::default(),
        };
        let (end, ..) = relay.run().await;
        drop(live);
        end
    });
    Channel {
        viewer,
        machine,
        session,
        over,
    }
}

fn window(framing: Framing, window: u32) -> Vec<u8> {
    message(framing, 3, &[9u32.to_le_bytes(), window.to_le_bytes()].concat())
}

/// A message of the proxy's own, which has no serial number.
fn ours(framing: Framing, number: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = message(framing, number, body);
    if framing == Framing::Full {
        bytes[0] = 0;
    }
    bytes
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_draws_hears_that_it_was_heard_whatever_its_viewer_does() {
    for framing in [Framing::Mini, Framing::Full] {
        let mut channel = channel(Kind::Display, framing, Limits::default());
        // Half a message, and two that are for us.
        let pong = message(framing, 3, &[0; 12]);
        let acks = [message(framing, 1, &[0; 4]), message(framing, 2, b"")].concat();
        channel.viewer.write_all(&acks).await.unwrap();
        channel.viewer.write_all(&pong[..pong.len() - 1]).await.unwrap();
        // Far more than anything has room for, and nobody reads it.
        let picture = message(framing, PICTURE, &[7; 2000]);
        let mut sent = window(framing, 20);
        sent.extend(picture.repeat(2000));
        channel.machine.write_all(&sent).await.unwrap();

        let mut expected = ours(framing, 1, &9u32.to_le_bytes());
        expected.extend(ours(framing, 2, b"").repeat(100));
        let mut heard = vec![0; expected.len()];
        channel.machine.read_exact(&mut heard).await.unwrap();
        assert_eq!(heard, expected);

        // The viewer missed nothing, and the rest of what it said goes through.
        let mut seen = vec![0; sent.len()];
        channel.viewer.read_exact(&mut seen).await.unwrap();
        assert!(seen == sent, "it came as it was sent");
        channel.viewer.write_all(&pong[pong.len() - 1..]).await.unwrap();
        let mut heard = vec![0; pong.len()];
        channel.machine.read_exact(&mut heard).await.unwrap();
        assert_eq!(heard, pong);
        drop(channel.viewer);
        assert!(matches!(channel.over.await.unwrap(), ChannelEnd::Viewer));
        assert_eq!(channel.session.owed(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_viewer_for_whom_too_much_waits_loses_its_session() {
    let limits = Limits {
        untaken: 3 << 20,
        ..Limits::default()
    };
    let mut channel = channel(Kind::Display, Framing::Mini, limits);
    let begin = Instant::now();
    let picture = message(Framing::Mini, PICTURE, &[7; 60_000]);
    while channel.machine.write_all(&picture).await.is_ok() {}
    // The machine was left alone for some hundredths of a second in all.
    assert!(
        begin.elapsed() <= Duration::from_millis(100),
        "{:?}",
        begin.elapsed()
    );
    let end = channel.over.await.unwrap();
    assert!(matches!(end, ChannelEnd::Stalled { .. }), "{end}");
    assert_eq!(channel.session.ended(), Some(End::Stalled));
    assert_eq!(channel.session.owed(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_viewer_that_takes_a_byte_a_second_loses_its_session_after_a_minute() {
    let mut channel = channel(Kind::Display, Framing::Mini, Limits::default());
    let picture = message(Framing::Mini, PICTURE, &[7; 5000]);
    channel.machine.write_all(&picture).await.unwrap();
    let begin = Instant::now();
    let mut byte = [0];
    while channel.viewer.read_exact(&mut byte).await.is_ok() && channel.session.ended().is_none() {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let took = begin.elapsed().as_secs();
    assert!((60..=62).contains(&took), "{took} s");
    let end = channel.over.await.unwrap();
    assert!(matches!(end, ChannelEnd::Stalled { .. }), "{end}");
}

/// 1 Mbit/s, at a guest that now and then draws 3 MB: half a minute's worth, each time within a minute.
#[tokio::test(start_paused = true)]
async fn a_slow_viewer_of_a_guest_that_draws_now_and_then_stays() {
    let mut channel = channel(Kind::Display, Framing::Mini, Limits::default());
    let picture = message(Framing::Mini, PICTURE, &[7; 60_000]);
    let total = picture.len() * 50 * 5;
    let drawing = async {
        for _ in 0..5 {
            for _ in 0..50 {
                channel.machine.write_all(&picture).await.unwrap();
            }
            tokio::time::sleep(Duration::from_secs(40)).await;
        }
    };
    let looking = async {
        let mut seen = 0;
        let mut some = [0; ROOM];
        while seen < total {
            seen += channel.viewer.read(&mut some).await.unwrap();
            tokio::time::sleep(Duration::from_millis(8)).await;
        }
    };
    tokio::join!(drawing, looking);
    assert_eq!(channel.session.ended(), None);
}

#[tokio::test(start_paused = true)]
async fn a_device_waits_for_its_viewer_and_neither_loses_anything() {
    let mut channel = channel(Kind::Playback, Framing::Mini, Limits::default());
    let data = message(Framing::Mini, 101, &[7; 60_000]).repeat(1000);
    let sending = channel.machine.write_all(&data);
    assert!(
        timeout(Duration::from_secs(50), sending).await.is_err(),
        "as much as its viewer takes"
    );
    assert!(channel.session.owed() < 3 * CHUNK_MAX);
    assert_eq!(channel.session.ended(), None);
}

#[tokio::test(start_paused = true)]
async fn what_a_machine_said_last_arrives_and_its_end_does_so_at_once() {
    let mut channel = channel(Kind::Cursor, Framing::Mini, Limits::default());
    let begin = Instant::now();
    let last = message(Framing::Mini, 105, &[7; 3000]);
    channel.machine.write_all(&last).await.unwrap();
    drop(channel.machine);
    let mut seen = Vec::new();
    channel.viewer.read_to_end(&mut seen).await.unwrap();
    assert_eq!(seen, last);
    drop(channel.viewer);
    assert!(matches!(channel.over.await.unwrap(), ChannelEnd::Machine));
    assert!(
        begin.elapsed() < Duration::from_millis(100),
        "{:?}",
        begin.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn who_is_taken_over_hears_so_and_keeps_nobody_waiting() {
    let mut channel = channel(Kind::Main, Framing::Mini, Limits::default());
    let first = message(Framing::Mini, 4, b"ping");
    channel.machine.write_all(&first).await.unwrap();
    let mut seen = vec![0; first.len()];
    channel.viewer.read_exact(&mut seen).await.unwrap();
    let begin = Instant::now();
    channel.session.finish(End::TakenOver);
    assert!(matches!(channel.over.await.unwrap(), ChannelEnd::Session(_)));
    assert!(
        begin.elapsed() < Duration::from_millis(100),
        "{:?}",
        begin.elapsed()
    );
    channel.viewer.read_to_end(&mut seen).await.unwrap();
    assert!(String::from_utf8_lossy(&seen).contains("taken over"));
}
