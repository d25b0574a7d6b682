//! Both directions of one channel, until either side or the session ends.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::time::timeout;

use super::filter::{Filter, Violation};
use super::hall::Hall;
use super::session::{End, Session};
use super::wire::Wire;

/// How long the other direction may go on once one has ended. SPICE has no use for half a connection; this is for what is
/// still on its way.
const HALF_TIME: Duration = Duration::from_secs(5);

/// Without a single byte taken by the viewer in this time, it is gone or means harm: QEMU waits for viewers that do not
/// read, up to 30 s at a time, while the guest changes its screen.
const STALL_TIME: Duration = Duration::from_secs(15);

/// For the reason of an end to be said.
const NOTICE_TIME: Duration = Duration::from_secs(1);

/// First and largest size of a direction's buffer, in bytes: channels that say little keep little.
const BUFFER_MIN: usize = 4 << 10;
const BUFFER_MAX: usize = 64 << 10;

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
    /// The viewer took nothing any more.
    #[error("the viewer took nothing for {} s", STALL_TIME.as_secs())]
    Stalled,
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
            ChannelEnd::Stalled => End::Stalled,
        }
    }

    /// Whether the whole session ends with it, whatever channel it was.
    pub(super) fn ends_all(&self) -> bool {
        matches!(self, ChannelEnd::Violation(_) | ChannelEnd::Stalled)
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
    pub(super) viewer: Wire,
    pub(super) machine: Wire,
    pub(super) filter: Filter,
    /// On the main channel only.
    pub(super) hall: Option<Hall>,
    pub(super) session: &'a Session,
    /// What is already counted, of bytes that went before.
    pub(super) carried: Carried,
}

/// A buffer that grows with what comes.
struct Buffer(Vec<u8>);

impl Buffer {
    fn new() -> Self {
        Buffer(vec![0; BUFFER_MIN])
    }

    async fn fill(&mut self, from: &mut ReadHalf<Wire>) -> io::Result<usize> {
        let got = from.read(&mut self.0).await?;
        if got == self.0.len() && got < BUFFER_MAX {
            self.0.resize(got * 2, 0);
        }
        Ok(got)
    }
}

/// The machine's direction. What was read and not yet written survives a cancelled write.
struct Down {
    buffer: Buffer,
    hall: Option<Hall>,
    out: Vec<u8>,
    /// What of `out` (with a hall) or of `buffer` is still to be written.
    from: usize,
    to: usize,
}

impl Down {
    async fn write(&mut self, viewer: &mut WriteHalf<Wire>, seen: &mut Seen<'_>) -> Result<(), ChannelEnd> {
        while self.from < self.to {
            let source = if self.hall.is_some() {
                &self.out
            } else {
                &self.buffer.0
            };
            let bytes = source.get(self.from..self.to).unwrap_or_default();
            let wrote = timeout(STALL_TIME, viewer.write(bytes))
                .await
                .map_err(|_| ChannelEnd::Stalled)?
                .map_err(ChannelEnd::ViewerLost)?;
            if wrote == 0 {
                return Err(ChannelEnd::Viewer);
            }
            self.from += wrote;
            seen.down(wrote);
        }
        timeout(STALL_TIME, viewer.flush())
            .await
            .map_err(|_| ChannelEnd::Stalled)?
            .map_err(ChannelEnd::ViewerLost)
    }

    /// Reads once; false at the end.
    async fn read(&mut self, machine: &mut ReadHalf<Wire>, session: &Session) -> Result<bool, ChannelEnd> {
        let got = self.buffer.fill(machine).await.map_err(ChannelEnd::MachineLost)?;
        (self.from, self.to) = (0, got);
        if let Some(hall) = &mut self.hall {
            self.out.clear();
            let bytes = self.buffer.0.get(..got).unwrap_or_default();
            let end = hall.feed(bytes, &mut self.out);
            self.to = self.out.len();
            // Before the viewer has it: its next channel may come at once.
            if let Some(id) = hall.session() {
                session.id.get_or_init(|| id);
            }
            end.map_err(ChannelEnd::Violation)?;
        }
        Ok(got > 0)
    }

    async fn run(
        &mut self,
        machine: &mut ReadHalf<Wire>,
        viewer: &mut WriteHalf<Wire>,
        seen: &mut Seen<'_>,
    ) -> Result<(), ChannelEnd> {
        while self.read(machine, seen.session).await? {
            self.write(viewer, seen).await?;
        }
        // The viewer may be gone already; the end is the same.
        drop(viewer.shutdown().await);
        Ok(())
    }

    /// Says between two messages why it is over.
    async fn say(
        &mut self,
        machine: &mut ReadHalf<Wire>,
        viewer: &mut WriteHalf<Wire>,
        seen: &mut Seen<'_>,
        end: &End,
    ) -> Result<(), ChannelEnd> {
        self.write(viewer, seen).await?;
        while !self.hall.as_ref().is_none_or(Hall::between) {
            if !self.read(machine, seen.session).await? {
                return Ok(());
            }
            self.write(viewer, seen).await?;
        }
        if let Some(hall) = &self.hall {
            let notice = hall.notice(&end.to_string());
            viewer.write_all(&notice).await.map_err(ChannelEnd::ViewerLost)?;
            viewer.flush().await.map_err(ChannelEnd::ViewerLost)?;
        }
        Ok(())
    }
}

/// Counts, here and in the session.
struct Seen<'a> {
    session: &'a Session,
    bytes: u64,
}

impl Seen<'_> {
    fn down(&mut self, bytes: usize) {
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

async fn up(
    viewer: &mut ReadHalf<Wire>,
    machine: &mut WriteHalf<Wire>,
    filter: &mut Filter,
    seen: &mut Seen<'_>,
) -> Result<(), ChannelEnd> {
    let mut buffer = Buffer::new();
    let mut out = Vec::new();
    loop {
        let got = buffer.fill(viewer).await.map_err(ChannelEnd::ViewerLost)?;
        if got == 0 {
            drop(machine.shutdown().await);
            return Ok(());
        }
        out.clear();
        let verdict = filter.feed(buffer.0.get(..got).unwrap_or_default(), &mut out);
        machine.write_all(&out).await.map_err(ChannelEnd::MachineLost)?;
        machine.flush().await.map_err(ChannelEnd::MachineLost)?;
        seen.up(out.len());
        verdict.map_err(ChannelEnd::Violation)?;
    }
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
        let mut state = Down {
            buffer: Buffer::new(),
            hall: self.hall.take(),
            out: Vec::new(),
            from: 0,
            to: 0,
        };
        let end = {
            let up = up(
                &mut viewer_read,
                &mut machine_write,
                &mut self.filter,
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
            && !matches!(end, ChannelEnd::Stalled)
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
