//! The parsers of this room, each as a function of hostile bytes, with what must hold for all bytes.
//!
//! Compiled for tests and for fuzzers only (`--cfg fuzzing`); `fuzz/` runs each target for as long as one likes.

use super::acks::Acks;
use super::channel::{Kind, Kinds, Mode};
use super::filter::Filter;
use super::frame::{Frames, Framing, Piece};
use super::gate::Gate;
use super::hall::Hall;
use super::link::{self, Code, HEADER, Hello, Reply};

/// One parser: panics where it must not, or where its promise is broken.
pub type Target = fn(&[u8]);

/// Every target by its name, which is also the name of its folder in `tests/corpus`.
pub const TARGETS: &[(&str, Target)] = &[
    ("console_acks", acks),
    ("console_filter", filter),
    ("console_gate", gate),
    ("console_hall", hall),
    ("console_link", link),
    ("console_reply", reply),
];

/// Runs the target with this name; whether there is one.
///
/// # Panics
/// When the target does.
pub fn run(name: &str, bytes: &[u8]) -> bool {
    let target = TARGETS.iter().find(|(known, _)| *known == name);
    if let Some((_, target)) = target {
        target(bytes);
    }
    target.is_some()
}

/// A header and what follows it.
fn parts(bytes: &[u8]) -> Option<([u8; 4], [u8; 12], &[u8])> {
    let (header, body) = bytes.split_first_chunk::<HEADER>()?;
    Some((*header.first_chunk()?, *header.last_chunk()?, body))
}

fn link(bytes: &[u8]) {
    let Some((magic, rest, body)) = parts(bytes) else {
        return;
    };
    assert_eq!(link::check_magic(magic).is_ok(), bytes.starts_with(b"REDQ"));
    if let Ok(size) = link::hello_size(rest) {
        assert!((18..=4096).contains(&size));
        if let Ok(hello) = Hello::decode(body.get(..size).unwrap_or(body)) {
            again(&hello);
        }
    }
}

/// What was understood is sent on to the machine, which must understand the same.
fn again(hello: &Hello) {
    let bytes = hello.encode();
    let body = bytes.get(HEADER..).unwrap_or_default();
    assert_eq!(Hello::decode(body).as_ref(), Ok(hello));
}

fn reply(bytes: &[u8]) {
    let Some((_, rest, body)) = parts(bytes) else {
        return;
    };
    if link::reply_size(rest).is_ok() {
        match Reply::decode(body) {
            Ok(reply) => {
                let bytes = reply.encode();
                assert_eq!(Reply::decode(bytes.get(HEADER..).unwrap_or_default()), Ok(reply));
            }
            Err(code) => assert_ne!(code, Code::Ok),
        }
    }
}

/// How a stream is looked at, from its first two bytes.
fn way(bytes: &[u8]) -> Option<(Kind, Mode, Framing, usize, &[u8])> {
    let ([first, chunk], stream) = bytes.split_first_chunk()?;
    let kind = Kind::ALL.get(usize::from(first & 15))?;
    let mode = if first & 16 == 0 {
        Mode::Full
    } else {
        Mode::ViewOnly
    };
    let framing = if first & 32 == 0 {
        Framing::Mini
    } else {
        Framing::Full
    };
    Some((*kind, mode, framing, usize::from(*chunk) + 1, stream))
}

fn filter(bytes: &[u8]) {
    let Some((kind, mode, framing, chunk, stream)) = way(bytes) else {
        return;
    };
    let run = |mode, chunk, stream: &[u8]| {
        let mut filter = Filter::new(kind, mode, framing);
        let mut out = Vec::new();
        let end = stream
            .chunks(chunk)
            .try_for_each(|bytes| filter.feed(bytes, &mut out));
        (out, end)
    };
    let (out, end) = run(mode, chunk, stream);
    assert_eq!(
        (&out, &end),
        (&run(mode, stream.len().max(1), stream).0, &run(mode, 1, stream).1)
    );
    assert!(out.len() <= stream.len());
    // What passed once passes again, in either mode's rules.
    assert_eq!(run(mode, chunk, &out), (out.clone(), Ok(())));
    assert_eq!(run(Mode::Full, chunk, &out), (out.clone(), Ok(())));
    // And nothing that types.
    if mode == Mode::ViewOnly && kind == Kind::Inputs {
        let mut frames = Frames::new(framing);
        let mut left = out.as_slice();
        while let Some(piece) = frames.next(&mut left) {
            assert!(!matches!(piece, Piece::Head(head) if head.message > 100));
        }
    }
}

fn acks(bytes: &[u8]) {
    let Some((_, _, framing, chunk, stream)) = way(bytes) else {
        return;
    };
    let run = |chunk: usize| {
        let mut acks = Acks::new(framing);
        let end = stream.chunks(chunk).try_for_each(|bytes| acks.feed(bytes));
        let mut out = Vec::new();
        while acks.are_due() {
            acks.take(&mut out);
        }
        (out, end)
    };
    let (out, end) = run(chunk);
    assert_eq!((&out, &end), (&run(1).0, &run(stream.len().max(1)).1));
    // Whole messages, no more of them than came, and of two types only.
    let mut frames = Frames::new(framing);
    let mut left = out.as_slice();
    while let Some(piece) = frames.next(&mut left) {
        assert!(!matches!(piece, Piece::Head(head) if !matches!((head.message, head.size), (1, 4) | (2, 0))));
    }
    assert!(frames.between() && out.len() <= stream.len());
}

fn gate(bytes: &[u8]) {
    let Some((_, _, framing, chunk, stream)) = way(bytes) else {
        return;
    };
    let mut gate = Gate::new(framing);
    let mut sent = 0;
    for bytes in stream.chunks(chunk) {
        sent += bytes.len();
        match gate.feed(bytes) {
            Ok(false) => {}
            Ok(true) => {
                assert_eq!(gate.into_held(), stream.get(..sent).unwrap_or_default());
                return;
            }
            Err(_) => return,
        }
    }
}

fn hall(bytes: &[u8]) {
    let Some((_, _, framing, chunk, stream)) = way(bytes) else {
        return;
    };
    let run = |chunk: usize, stream: &[u8]| {
        let mut hall = Hall::new(Kinds::default(), framing);
        let mut out = Vec::new();
        let end = stream
            .chunks(chunk)
            .try_for_each(|bytes| hall.feed(bytes, &mut out));
        (out, end, hall.session(), hall.between())
    };
    let seen = run(chunk, stream);
    assert_eq!(seen, run(stream.len().max(1), stream));
    assert!(seen.0.len() <= stream.len());
    // A list that was cut down stays as it is.
    if seen.1.is_ok() && seen.3 {
        assert_eq!(run(chunk, &seen.0).0, seen.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fuzzers_found_interesting_stays_harmless() {
        crate::image::fuzz::kept_inputs_stay_harmless(TARGETS);
    }
}
