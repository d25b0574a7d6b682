//! The machine's direction of a channel: what it sends is taken at once, and goes to the viewer as that takes it.
//!
//! QEMU waits for what it draws to be taken, in the thread that its control connection needs, when its guest changes the
//! screen's mode. So a machine is read whether its viewer reads or not, and what the viewer has not taken waits in a [`Queue`],
//! up to [`Limits::untaken`] bytes and for [`Limits::untaken_for`]. Past either the session ends, and the machine is rid of it.
//! On channels for which nothing in QEMU waits (sound, devices, files), it is left alone while its viewer has plenty to take: it
//! slows down by itself then, or leaves sound out.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf, ReadHalf, WriteHalf};
use tokio::time::{Instant, sleep_until};

use super::channel::Kind;
use super::frame::Framing;
use super::hall::Hall;
use super::limits::Limits;
use super::queue::{CHUNK_MAX, Queue};
use super::relay::{Buffer, ChannelEnd, Receipts, Seen};
use super::session::{End, Registry, Session};
use super::wire::Wire;

/// Bytes for the viewer after which the machine is left alone, until the viewer has taken some.
const PLENTY: usize = CHUNK_MAX;
/// A machine that draws is left alone so long at a time, and then read on as far as this many bytes, whatever the viewer does:
/// it must not wait for longer than anybody notices, and one that would draw without end is not to fill memory at once.
const PAUSE: Duration = Duration::from_millis(10);
const AFTER_PAUSE: usize = 1 << 20;

/// When a machine is read whose viewer has plenty to take.
#[derive(Debug, Default)]
struct Pace {
    /// Whether the machine waits for nobody.
    draws: bool,
    pause: Option<Instant>,
    may_read: usize,
}

impl Pace {
    /// Whether it is read now, with so many bytes that wait.
    fn goes_on(&mut self, waiting: usize, now: Instant) -> bool {
        if waiting < PLENTY {
            (self.pause, self.may_read) = (None, 0);
            return true;
        }
        if !self.draws || self.may_read > 0 {
            return self.draws;
        }
        let over = *self.pause.get_or_insert(now + PAUSE) <= now;
        if over {
            (self.pause, self.may_read) = (None, AFTER_PAUSE);
        }
        over
    }

    fn has_read(&mut self, bytes: usize) {
        self.may_read = self.may_read.saturating_sub(bytes);
    }
}

/// The next thing that could be done.
enum Step {
    Wrote(usize),
    /// All that was written is on its way.
    Flushed,
    Read(usize),
}

/// The machine's direction.
pub(super) struct Down<'a> {
    queue: Queue<'a>,
    pace: Pace,
    receipts: &'a Receipts,
    limits: &'a Limits,
    registry: &'a Registry,
    /// On the main channel, with where the machine is read into and what comes of that.
    hall: Option<(Hall, Buffer, Vec<u8>)>,
    flushed: bool,
}

impl<'a> Down<'a> {
    pub(super) fn new(
        kind: Kind,
        framing: Framing,
        hall: Option<Hall>,
        receipts: &'a Receipts,
        session: &'a Session,
        registry: &'a Registry,
        limits: &'a Limits,
    ) -> Self {
        Down {
            queue: Queue::new(session, framing),
            pace: Pace {
                draws: matches!(kind, Kind::Display | Kind::Cursor),
                ..Pace::default()
            },
            receipts,
            limits,
            registry,
            hall: hall.map(|hall| (hall, Buffer::new(), Vec::new())),
            flushed: true,
        }
    }

    /// Writes where there is something to write, or reads. Cancelled in between, it has done neither.
    fn step(
        &mut self,
        cx: &mut Context<'_>,
        machine: &mut ReadHalf<Wire>,
        viewer: &mut WriteHalf<Wire>,
        reads: bool,
    ) -> Poll<Result<Step, ChannelEnd>> {
        if !self.queue.is_empty() {
            if let Poll::Ready(wrote) = Pin::new(viewer).poll_write(cx, self.queue.front()) {
                self.flushed = false;
                return Poll::Ready(wrote.map(Step::Wrote).map_err(ChannelEnd::ViewerLost));
            }
        } else if !self.flushed
            && let Poll::Ready(flushed) = Pin::new(viewer).poll_flush(cx)
        {
            self.flushed = true;
            return Poll::Ready(flushed.map(|()| Step::Flushed).map_err(ChannelEnd::ViewerLost));
        }
        if !reads {
            return Poll::Pending;
        }
        let space = match &mut self.hall {
            Some((_, buffer, _)) => buffer.0.as_mut_slice(),
            None => self.queue.space(),
        };
        let mut space = ReadBuf::new(space);
        let read = ready!(Pin::new(machine).poll_read(cx, &mut space));
        let got = space.filled().len();
        Poll::Ready(read.map(|()| Step::Read(got)).map_err(ChannelEnd::MachineLost))
    }

    /// So many bytes were read.
    fn read(&mut self, got: usize) -> Result<(), ChannelEnd> {
        let now = Instant::now();
        self.pace.has_read(got);
        let session = self.queue.session();
        match &mut self.hall {
            None => self.receipts.came(self.queue.filled(got, now)),
            Some((hall, buffer, out)) => {
                let bytes = buffer.0.get(..got).unwrap_or_default();
                out.clear();
                let end = self.receipts.came(bytes).and(hall.feed(bytes, out));
                buffer.grow(got);
                self.queue.push(out, now);
                // Before the viewer has it: its next channel may come at once.
                if let Some(id) = hall.session() {
                    session.id.get_or_init(|| id);
                }
                end
            }
        }
        .map_err(ChannelEnd::Violation)?;
        self.registry.relieve();
        self.within_limits(now)
    }

    fn within_limits(&self, now: Instant) -> Result<(), ChannelEnd> {
        let oldest = self.queue.oldest().map_or(Duration::ZERO, |since| now - since);
        if oldest < self.limits.untaken_for && self.queue.session().owed() <= self.limits.untaken {
            return Ok(());
        }
        Err(ChannelEnd::Stalled {
            waiting: self.queue.len(),
            oldest,
        })
    }

    fn wrote(&mut self, count: usize, seen: &mut Seen<'_>) -> Result<(), ChannelEnd> {
        if count == 0 {
            return Err(ChannelEnd::Viewer);
        }
        self.queue.taken(count);
        seen.down(count);
        Ok(())
    }

    /// Carries on until the machine closes and the viewer has all.
    pub(super) async fn run(
        &mut self,
        machine: &mut ReadHalf<Wire>,
        viewer: &mut WriteHalf<Wire>,
        seen: &mut Seen<'_>,
    ) -> Result<(), ChannelEnd> {
        let mut ended = false;
        while !(ended && self.queue.is_empty() && self.flushed) {
            let reads = !ended && self.pace.goes_on(self.queue.len(), Instant::now());
            let too_late = self.queue.oldest().map(|since| since + self.limits.untaken_for);
            let look = [too_late, self.pace.pause].into_iter().flatten().min();
            let step = tokio::select! {
                biased;
                step = std::future::poll_fn(|cx| self.step(cx, machine, viewer, reads)) => Some(step?),
                () = until(look) => None,
            };
            match step {
                Some(Step::Wrote(count)) => self.wrote(count, seen)?,
                Some(Step::Flushed) => {}
                Some(Step::Read(0)) => ended = true,
                Some(Step::Read(got)) => self.read(got)?,
                None => self.within_limits(Instant::now())?,
            }
        }
        // The viewer may be gone already; the end is the same.
        drop(viewer.shutdown().await);
        Ok(())
    }

    /// Says between two messages why it is over.
    pub(super) async fn say(
        &mut self,
        machine: &mut ReadHalf<Wire>,
        viewer: &mut WriteHalf<Wire>,
        seen: &mut Seen<'_>,
        end: &End,
    ) -> Result<(), ChannelEnd> {
        let mut said = false;
        loop {
            let Some((hall, ..)) = &self.hall else {
                return Ok(());
            };
            let between = hall.between();
            if between && !said {
                let notice = hall.notice(&end.to_string());
                self.queue.push(&notice, Instant::now());
                said = true;
            }
            if said && self.queue.is_empty() && self.flushed {
                return Ok(());
            }
            let step = std::future::poll_fn(|cx| self.step(cx, machine, viewer, !between));
            match step.await? {
                Step::Wrote(count) => self.wrote(count, seen)?,
                Step::Flushed => {}
                Step::Read(0) => return Ok(()),
                Step::Read(got) => self.read(got)?,
            }
        }
    }
}

/// Waits for this moment; where there is none, for ever.
async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}
