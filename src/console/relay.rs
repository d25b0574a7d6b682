//! Both directions of one channel, until either side or the session ends.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::acks::Acks;
use super::channel::Kind;
use super::down::Down;
use super::filter::{Filter, Violation};
use super::hall::Hall;
use super::limits::Limits;
use super::queue::CHUNK_MAX;
use super::session::{End, Registry, Session};
use super::wire::Wire;

/// How long the other direction may go on once one has ended. SPICE has no use for half a connection; this is for what is
/// still on its way.
const HALF_TIME: Duration = Duration::from_secs(5);

/// For the reason of an end to be said.
const NOTICE_TIME: Duration = Duration::from_secs(1);

/// First size of a buffer, in bytes.
const BUFFER_MIN: usize = 4 << 10;

/// Why a channel ended.
#[derive(Debug, thiserror::Error)]
pub enum ChannelEnd {
    /// The viewer closed it.
    #[error("the viewer closed it")]
    Viewer,
    /// The machine closed it.
    #[error("the machine closed it")]
    Machine,
    /// The whole session ended.
    #[error("its session ended: {0}")]
    Session(End),
    /// The viewer, or the machine, sent what it must not.
    #[error("{0}")]
    Violation(Violation),
    /// The viewer took too little.
    #[error("{waiting} bytes wait for the viewer, the first of them for {} s", oldest.as_secs())]
    Stalled {
        /// Bytes that wait on this channel.
        waiting: usize,
        /// How long the first of them has waited.
        oldest: Duration,
    },
    /// The viewer's connection broke.
    #[error("the viewer's connection broke: {0}")]
    ViewerLost(io::Error),
    /// The machine's connection broke.
    #[error("the machine's connection broke: {0}")]
    MachineLost(io::Error),
}

impl ChannelEnd {
    /// What becomes of the session when its main channel ends so.
    pub(super) fn of_session(&self) -> End {
        match self {
            ChannelEnd::Viewer | ChannelEnd::ViewerLost(_) => End::ViewerLeft,
            ChannelEnd::Machine | ChannelEnd::MachineLost(_) => End::MachineLeft,
            ChannelEnd::Session(end) => end.clone(),
            ChannelEnd::Violation(Violation::Machine(_)) => End::MachineLeft,
            ChannelEnd::Violation(_) => End::Misbehaved,
            ChannelEnd::Stalled { .. } => End::Stalled,
        }
    }

    /// Whether the whole session ends with it, whatever channel it was.
    pub(super) fn ends_all(&self) -> bool {
        matches!(self, ChannelEnd::Violation(_) | ChannelEnd::Stalled { .. })
    }
}

/// Bytes that a channel has carried.
#[derive(Clone, Copy, Default, Debug)]
pub struct Carried {
    /// From the machine to the viewer.
    pub to_viewer: u64,
    /// From the viewer to the machine.
    pub to_machine: u64,
}

/// A channel whose handshakes are done on both sides.
pub(super) struct Relay<'a> {
    pub(super) kind: Kind,
    pub(super) viewer: Wire,
    pub(super) machine: Wire,
    pub(super) filter: Filter,
    /// What passed the filter already and is kept back, since its message is not complete.
    pub(super) begun: Vec<u8>,
    pub(super) acks: Acks,
    /// On the main channel only.
    pub(super) hall: Option<Hall>,
    pub(super) session: &'a Session,
    pub(super) registry: &'a Registry,
    pub(super) limits: &'a Limits,
    /// What is already counted, of bytes that went before.
    pub(super) carried: Carried,
}

/// What one direction learns and the other one says.
#[derive(Debug)]
pub(super) struct Receipts {
    acks: Mutex<Acks>,
    due: Notify,
}

impl Receipts {
    pub(super) fn came(&self, bytes: &[u8]) -> Result<(), Violation> {
        let mut acks = self.acks.lock().unwrap_or_else(PoisonError::into_inner);
        acks.feed(bytes)?;
        if acks.are_due() {
            self.due.notify_one();
        }
        Ok(())
    }

    /// Appends some; false when there were none.
    fn take(&self, out: &mut Vec<u8>) -> bool {
        let mut acks = self.acks.lock().unwrap_or_else(PoisonError::into_inner);
        let are_due = acks.are_due();
        acks.take(out);
        are_due
    }
}

/// A buffer that grows with what comes.
pub(super) struct Buffer(pub(super) Vec<u8>);

impl Buffer {
    pub(super) fn new() -> Self {
        Buffer(vec![0; BUFFER_MIN])
    }

    async fn fill(&mut self, from: &mut ReadHalf<Wire>) -> io::Result<usize> {
        let got = from.read(&mut self.0).await?;
        self.grow(got);
        Ok(got)
    }

    pub(super) fn grow(&mut self, got: usize) {
        if got == self.0.len() && got < CHUNK_MAX {
            self.0.resize(got * 2, 0);
        }
    }
}

/// Counts, here and in the session.
pub(super) struct Seen<'a> {
    session: &'a Session,
    bytes: u64,
}

impl Seen<'_> {
    pub(super) fn down(&mut self, bytes: usize) {
        let bytes = u64::try_from(bytes).unwrap_or_default();
        self.bytes += bytes;
        self.session.count(bytes, 0);
    }

    fn up(&mut self, bytes: usize) {
        let bytes = u64::try_from(bytes).unwrap_or_default();
        self.bytes += bytes;
        self.session.count(0, bytes);
    }
}

/// The viewer's direction, and what the proxy says itself: always between two messages.
async fn up(
    viewer: &mut ReadHalf<Wire>,
    machine: &mut WriteHalf<Wire>,
    filter: &mut Filter,
    mut out: Vec<u8>,
    receipts: &Receipts,
    seen: &mut Seen<'_>,
) -> Result<(), ChannelEnd> {
    let mut buffer = Buffer::new();
    let mut ours = Vec::new();
    loop {
        let got = tokio::select! {
            biased;
            () = receipts.due.notified(), if filter.between() => {
                ours.clear();
                while receipts.take(&mut ours) {
                    send(machine, &ours).await?;
                    ours.clear();
                }
                continue;
            }
            got = buffer.fill(viewer) => got.map_err(ChannelEnd::ViewerLost)?,
        };
        if got == 0 {
            drop(machine.shutdown().await);
            return Ok(());
        }
        let verdict = filter.feed(buffer.0.get(..got).unwrap_or_default(), &mut out);
        let whole = out.len().saturating_sub(filter.unfinished());
        if whole > 0 {
            send(machine, out.get(..whole).unwrap_or_default()).await?;
            seen.up(whole);
            out.drain(..whole);
        }
        verdict.map_err(ChannelEnd::Violation)?;
    }
}

async fn send(machine: &mut WriteHalf<Wire>, bytes: &[u8]) -> Result<(), ChannelEnd> {
    machine.write_all(bytes).await.map_err(ChannelEnd::MachineLost)?;
    machine.flush().await.map_err(ChannelEnd::MachineLost)
}

impl Relay<'_> {
    /// Runs until it ends. The machine's side is closed then; the viewer's is handed back, for its last words to arrive.
    pub(super) async fn run(mut self) -> (ChannelEnd, Carried, Wire) {
        let (mut viewer_read, mut viewer_write) = tokio::io::split(self.viewer);
        let (mut machine_read, mut machine_write) = tokio::io::split(self.machine);
        let (mut seen_up, mut seen_down) = (
            Seen {
                session: self.session,
                bytes: self.carried.to_machine,
            },
            Seen {
                session: self.session,
                bytes: self.carried.to_viewer,
            },
        );
        let framing = self.acks.framing();
        let receipts = Receipts {
            acks: Mutex::new(self.acks),
            due: Notify::new(),
        };
        let mut state = Down::new(
            self.kind,
            framing,
            self.hall.take(),
            &receipts,
            self.session,
            self.registry,
            self.limits,
        );
        let end = {
            let up = up(
                &mut viewer_read,
                &mut machine_write,
                &mut self.filter,
                self.begun,
                &receipts,
                &mut seen_up,
            );
            let down = state.run(&mut machine_read, &mut viewer_write, &mut seen_down);
            tokio::pin!(up, down);
            tokio::select! {
                end = self.session.finished() => ChannelEnd::Session(end),
                first = &mut up => match first {
                    Ok(()) => other_half(down, self.session).await.unwrap_or(ChannelEnd::Viewer),
                    Err(end) => end,
                },
                first = &mut down => match first {
                    Ok(()) => other_half(up, self.session).await.unwrap_or(ChannelEnd::Machine),
                    Err(end) => end,
                },
            }
        };
        if end.ends_all() {
            self.session.finish(end.of_session());
        }
        if let Some(why) = self.session.ended()
            && !matches!(end, ChannelEnd::Stalled { .. })
        {
            let say = state.say(&mut machine_read, &mut viewer_write, &mut seen_down, &why);
            // Who does not hear it, does not.
            drop(timeout(NOTICE_TIME, say).await);
        }
        let carried = Carried {
            to_viewer: seen_down.bytes,
            to_machine: seen_up.bytes,
        };
        (end, carried, viewer_read.unsplit(viewer_write))
    }
}

/// Lets what is still on its way arrive. `None` when it ended as it should, or not at all.
async fn other_half(
    half: impl Future<Output = Result<(), ChannelEnd>>,
    session: &Session,
) -> Option<ChannelEnd> {
    tokio::select! {
        end = session.finished() => Some(ChannelEnd::Session(end)),
        done = timeout(HALF_TIME, half) => match done {
            // Its other side has said that it is going; how this side takes that says nothing new.
            Ok(Err(end)) if end.ends_all() => Some(end),
            _ => None,
        },
    }
}

#[cfg(test)]
mod tests;
