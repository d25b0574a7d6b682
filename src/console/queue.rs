//! What the machine has sent and the viewer has not taken yet.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use super::frame::{Frames, Framing};
use super::session::Session;

/// First and largest size of a piece of memory, in bytes: channels that say little keep little.
const CHUNK_MIN: usize = 4 << 10;
pub(super) const CHUNK_MAX: usize = 64 << 10;
/// This part of a piece must be free for it to be read into. What is less is left unused.
const ENOUGH: usize = 4;
/// Most bytes of a record of TLS (RFC 8446, 5.1).
const RECORD: u64 = 16 << 10;
/// How exactly it is known since when the first byte waits.
const EXACT: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Chunk {
    bytes: Vec<u8>,
    from: usize,
    to: usize,
}

/// Where the last two messages that came whole end, in bytes of the stream.
#[derive(Debug)]
struct Ends {
    frames: Frames,
    before: u64,
    last: u64,
}

impl Ends {
    /// These bytes come after so many.
    fn feed(&mut self, came: u64, bytes: &[u8]) {
        let mut rest = bytes;
        while self.frames.next(&mut rest).is_some() {
            if self.frames.left() == 0 {
                let end = came + wide(bytes.len() - rest.len());
                (self.before, self.last) = (self.last, end);
            }
        }
    }
}

/// Bytes on their way to the viewer of one channel, in their order. They are read into it and written from it, without
/// another copy; its session knows how many there are.
///
/// The last whole message begins a piece of its own if it is so short that it could share a record of TLS with the one before.
/// spice-gtk waits for its socket after each message, although TLS, of which a record is read at once, may have kept another: one
/// that came in the same record would be seen only when the machine says something else, which on a quiet screen is never.
#[derive(Debug)]
pub(super) struct Queue<'a> {
    session: &'a Session,
    ends: Ends,
    chunks: VecDeque<Chunk>,
    next: usize,
    waiting: usize,
    came: u64,
    went: u64,
    /// How far the last piece goes that was to be written.
    offered: u64,
    /// When bytes came, and how many had come before them.
    marks: VecDeque<(Instant, u64)>,
}

impl<'a> Queue<'a> {
    pub(super) fn new(session: &'a Session, framing: Framing) -> Self {
        Queue {
            session,
            ends: Ends {
                frames: Frames::new(framing),
                before: 0,
                last: 0,
            },
            chunks: VecDeque::new(),
            next: CHUNK_MIN,
            waiting: 0,
            came: 0,
            went: 0,
            offered: 0,
            marks: VecDeque::new(),
        }
    }

    /// Whose they are.
    pub(super) fn session(&self) -> &'a Session {
        self.session
    }

    /// Bytes that wait.
    pub(super) fn len(&self) -> usize {
        self.waiting
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting == 0
    }

    /// Since when the first of them waits, to a second, by which it may be less.
    pub(super) fn oldest(&self) -> Option<Instant> {
        self.marks.front().map(|(at, _)| *at)
    }

    /// Where more can be read into.
    pub(super) fn space(&mut self) -> &mut [u8] {
        let enough = |chunk: &Chunk| chunk.bytes.len() - chunk.to >= chunk.bytes.len() / ENOUGH;
        if !self.chunks.back().is_some_and(enough) {
            self.chunks.push_back(Chunk {
                bytes: vec![0; self.next],
                from: 0,
                to: 0,
            });
        }
        self.chunks
            .back_mut()
            .and_then(|chunk| chunk.bytes.get_mut(chunk.to..))
            .unwrap_or_default()
    }

    /// So many bytes were read into [`space`](Self::space); returns them.
    pub(super) fn filled(&mut self, count: usize, now: Instant) -> &[u8] {
        if self.marks.back().is_none_or(|(at, _)| now - *at >= EXACT) {
            self.marks.push_back((now, self.came));
        }
        let came = self.came;
        self.came += wide(count);
        self.waiting += count;
        self.session.owes(count);
        let Some(chunk) = self.chunks.back_mut() else {
            return &[];
        };
        let from = chunk.to;
        chunk.to += count;
        if chunk.to == chunk.bytes.len() {
            self.next = (chunk.bytes.len() * 2).min(CHUNK_MAX);
        }
        let bytes = chunk.bytes.get(from..chunk.to).unwrap_or_default();
        self.ends.feed(came, bytes);
        bytes
    }

    /// Appends bytes that are elsewhere.
    pub(super) fn push(&mut self, mut bytes: &[u8], now: Instant) {
        while !bytes.is_empty() {
            let space = self.space();
            let (some, rest) = bytes.split_at_checked(space.len()).unwrap_or((bytes, &[]));
            for (place, byte) in space.iter_mut().zip(some) {
                *place = *byte;
            }
            self.filled(some.len(), now);
            bytes = rest;
        }
    }

    /// The first that wait, to be written in one piece. Until some of them are [`taken`](Self::taken) they stay what they
    /// are, and others are only added: TLS wants a write that did not succeed to be tried with the same bytes.
    pub(super) fn front(&mut self) -> &[u8] {
        let Ends { before, last, .. } = self.ends;
        let end = if self.went < before && last - before < RECORD {
            before
        } else {
            self.came
        };
        self.offered = self.offered.max(end);
        let most = usize::try_from(self.offered - self.went).unwrap_or(usize::MAX);
        self.chunks
            .front()
            .and_then(|chunk| {
                chunk
                    .bytes
                    .get(chunk.from..chunk.to.min(chunk.from.saturating_add(most)))
            })
            .unwrap_or_default()
    }

    /// So many of the first were taken.
    pub(super) fn taken(&mut self, count: usize) {
        self.went += wide(count);
        self.waiting = self.waiting.saturating_sub(count);
        self.session.paid(count);
        while self.marks.get(1).is_some_and(|(_, before)| *before <= self.went) {
            self.marks.pop_front();
        }
        if self.waiting == 0 {
            self.marks.clear();
        }
        let others = self.chunks.len() > 1;
        let Some(chunk) = self.chunks.front_mut() else {
            return;
        };
        chunk.from += count;
        if chunk.from < chunk.to {
            return;
        }
        if others || chunk.bytes.len() < self.next {
            self.chunks.pop_front();
        } else {
            (chunk.from, chunk.to) = (0, 0);
        }
    }
}

impl Drop for Queue<'_> {
    fn drop(&mut self) {
        self.session.paid(self.waiting);
    }
}

fn wide(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::frame::message;
    use super::super::limits::Limits;
    use super::super::session::test_session_of;
    use super::*;

    proptest! {
        #[test]
        fn bytes_come_out_as_they_went_in(
            steps in prop::collection::vec((any::<bool>(), 1usize..200_000), 1..60),
        ) {
            let (_, live) = test_session_of(&Limits::default());
            let session = &live.session;
            let now = Instant::now();
            let mut queue = Queue::new(session, Framing::Mini);
            let (mut next, mut awaited) = (0u8, 0u8);
            for (reads, most) in steps {
                if reads {
                    let space = queue.space();
                    prop_assert!(!space.is_empty() && space.len() <= CHUNK_MAX);
                    let count = space.len().min(most);
                    for byte in &mut space[..count] {
                        *byte = next;
                        next = next.wrapping_mul(5).wrapping_add(1);
                    }
                    prop_assert_eq!(queue.filled(count, now).len(), count);
                } else {
                    let empty = queue.is_empty();
                    let front = queue.front();
                    prop_assert_eq!(front.is_empty(), empty);
                    let count = front.len().min(most);
                    for byte in &front[..count] {
                        prop_assert_eq!(*byte, awaited);
                        awaited = awaited.wrapping_mul(5).wrapping_add(1);
                    }
                    queue.taken(count);
                }
                prop_assert_eq!(session.owed(), queue.len());
                // What is not used is less than what is.
                let memory: usize = queue.chunks.iter().map(|chunk| chunk.bytes.len()).sum();
                prop_assert!(memory <= queue.len() * 4 / 3 + 3 * CHUNK_MAX);
            }
            drop(queue);
            prop_assert_eq!(session.owed(), 0);
        }
    }

    proptest! {
        #[test]
        fn a_viewer_that_waits_for_its_socket_after_each_message_misses_none(
            sizes in prop::collection::vec(prop_oneof![0usize..9000, 10_000usize..40_000], 1..40),
            reads in prop::collection::vec((1usize..50_000, any::<bool>()), 1..60),
        ) {
            let (_, live) = test_session_of(&Limits::default());
            let mut queue = Queue::new(&live.session, Framing::Mini);
            let messages = sizes.iter().map(|size| message(Framing::Mini, 1, &vec![0; *size]));
            let stream = messages.collect::<Vec<_>>().concat();
            let ends: Vec<usize> = sizes.iter().scan(0, |at, size| { *at += 6 + size; Some(*at) }).collect();
            let whole = |at: usize| ends.iter().filter(|end| **end <= at).count();
            let (mut rest, mut written, mut seen) = (stream.as_slice(), 0, 0);
            for (most, all) in reads.into_iter().chain(std::iter::repeat((4096, true))) {
                // A write that did not succeed.
                let tried = queue.front().to_vec();
                let (some, after) = rest.split_at(most.min(rest.len()));
                queue.push(some, Instant::now());
                rest = after;
                prop_assert!(queue.front().starts_with(&tried));
                while !queue.is_empty() {
                    let count = queue.front().len();
                    prop_assert!(count > 0);
                    for record in queue.front().chunks(usize::try_from(RECORD).unwrap()) {
                        // It takes what it had of earlier records, and one message that ends in this one.
                        seen = whole(written + record.len()).min(whole(written) + 1);
                        written += record.len();
                    }
                    queue.taken(count);
                    if !all {
                        break;
                    }
                }
                if queue.is_empty() {
                    prop_assert_eq!(seen, whole(written));
                    if rest.is_empty() {
                        break;
                    }
                }
            }
            prop_assert_eq!(seen, sizes.len());
        }
    }

    #[test]
    fn what_is_pushed_waits_like_what_is_read() {
        let (_, live) = test_session_of(&Limits::default());
        let session = &live.session;
        let mut queue = Queue::new(session, Framing::Mini);
        let bytes: Vec<u8> = (0..200_000).map(|n: u32| n.to_le_bytes()[0]).collect();
        queue.push(&bytes, Instant::now());
        let mut out = Vec::new();
        while !queue.is_empty() {
            out.extend_from_slice(queue.front());
            let count = queue.front().len();
            queue.taken(count);
        }
        assert_eq!(out, bytes);
        assert_eq!(queue.oldest(), None);
    }

    #[test]
    fn the_oldest_byte_is_the_one_that_waits_longest() {
        let (_, live) = test_session_of(&Limits::default());
        let session = &live.session;
        let begin = Instant::now();
        let at = |tenths: u32| begin + Duration::from_millis(100) * tenths;
        let age = |queue: &Queue<'_>, now: Instant| queue.oldest().map(|since| now - since);
        let mut queue = Queue::new(session, Framing::Mini);
        for tenths in 0..100 {
            queue.push(&[0; 10], at(tenths));
        }
        assert_eq!(age(&queue, at(100)), Some(Duration::from_secs(10)));
        queue.taken(505);
        assert_eq!(age(&queue, at(100)), Some(Duration::from_secs(5)));
        queue.taken(494);
        assert_eq!(age(&queue, at(100)), Some(Duration::from_secs(1)), "to a second");
        queue.taken(1);
        assert_eq!(age(&queue, at(100)), None);
    }
}
