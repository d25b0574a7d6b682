//! The loop of a connection's thread: runs commands on channels and notices when the guest falls silent.
//!
//! libssh2 keeps one outgoing packet half-sent at most and wants the very same call again to send the rest. So when a
//! channel's step would block on sending, only that channel is stepped until it got through (`stuck`). And it opens
//! one channel at a time. Incoming packets are sorted into all channels by whichever call reads them, so every
//! channel is stepped again after any of them made progress, before the loop sleeps.

use std::io::{ErrorKind, Read, Write};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use ssh2::{Channel, ErrorCode};
use tokio::sync::mpsc::{Sender, error::TrySendError};

use super::Error;
use super::input::Input;
use super::link::{Link, would_block};
use super::terminal::{self, Desk, Next};
use super::wake::Wake;

/// How many bytes of output a server may send ahead of what we have taken: bounds our memory, and is enough for
/// 2 GB/s at a round trip of a millisecond.
const WINDOW: u32 = 2 << 20;
/// The largest packet that OpenSSH sends; it never fills larger ones.
const PACKET: u32 = 32 << 10;
/// Bytes taken from libssh2 at a time.
const CHUNK: usize = 64 << 10;
/// So many keepalives go out within the time that a guest may be silent: a lost one or two do not decide.
const KEEPALIVES: u32 = 6;
/// How long the loop sleeps at most: a bound on what a missed wake-up could cost.
const LONGEST_SLEEP: Duration = Duration::from_secs(5);

// libssh2.h
const CHANNEL_FAILURE: i32 = -21;
const CHANNEL_REQUEST_DENIED: i32 = -22;

/// What a running command has to say.
#[derive(Debug)]
pub enum Event {
    /// Bytes from its standard output.
    Output(Vec<u8>),
    /// Bytes from its standard error.
    Diagnostics(Vec<u8>),
    /// It has ended and all its output was handed on; no code when a signal ended it.
    Ended(Option<i32>),
    /// It could not run, or nobody knows what became of it.
    Failed(Error),
}

/// A command to run.
pub(super) struct Request {
    pub(super) command: String,
    pub(super) input: Input,
    /// Where the command runs on a terminal: then it reads what is typed, not `input`.
    pub(super) desk: Option<Desk>,
    pub(super) events: Sender<Event>,
}

struct Task {
    request: Request,
    stage: Stage,
    channel: Option<Channel>,
    /// Taken from libssh2, not yet taken by the reader.
    pending: Option<Event>,
    output_ended: bool,
    diagnostics_ended: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Opening,
    Equipping,
    Starting,
    Talking,
    Sending,
    Closing,
    Reading,
    Ending,
}

enum Step {
    Progress,
    Blocked,
    /// The reader is slower than the guest.
    NoRoom,
    Done,
}

/// Serves until the handle is dropped.
pub(super) fn serve(link: &Link, requests: &Receiver<Request>, silence: Duration, wake: &Wake) {
    let interval = (silence / KEEPALIVES).max(Duration::from_secs(2));
    let seconds = u32::try_from(interval.as_secs()).unwrap_or(u32::MAX);
    link.session.set_keepalive(true, seconds);
    let mut tasks: Vec<Task> = Vec::new();
    let mut buffer = vec![0; CHUNK];
    let mut heard = Instant::now();
    loop {
        wake.calm();
        if wake.stopped() {
            return;
        }
        loop {
            match requests.try_recv() {
                Ok(request) => tasks.push(Task::new(request)),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return,
            }
        }
        let round = step_all(link, &mut tasks, &mut buffer, wake);
        if round.progress {
            heard = Instant::now();
            continue;
        }
        if !round.listening {
            // Nothing reads from the socket now, so nothing can be concluded from silence.
            heard = Instant::now();
        }
        let silent = heard.elapsed();
        if silent >= silence {
            fail_all(&mut tasks, &Error::Silent(silent));
            return;
        }
        let mut sleep = LONGEST_SLEEP.min(silence.saturating_sub(silent));
        if round.listening && !round.stuck {
            match link.session.keepalive_send() {
                Ok(next) => sleep = sleep.min(Duration::from_secs(next.max(1).into())),
                Err(e) => return fail_all(&mut tasks, &lost(&e)),
            }
        }
        let what = if round.stuck {
            PollFlags::IN | PollFlags::OUT
        } else if round.listening {
            PollFlags::IN
        } else {
            PollFlags::empty()
        };
        match link.wait(what, wake, Instant::now() + sleep) {
            Ok(true) => heard = Instant::now(),
            Ok(false) => {}
            Err(e) => return fail_all(&mut tasks, &e),
        }
    }
}

#[derive(Default)]
struct Round {
    progress: bool,
    stuck: bool,
    listening: bool,
}

fn step_all(link: &Link, tasks: &mut Vec<Task>, buffer: &mut [u8], wake: &Wake) -> Round {
    let mut round = Round::default();
    let mut waits_for_room = false;
    let mut opening = false;
    let mut index = 0;
    while let Some(task) = tasks.get_mut(index) {
        if task.stage == Stage::Opening && std::mem::replace(&mut opening, true) {
            index += 1;
            continue;
        }
        match task.step(link, buffer) {
            Step::Progress => {
                round.progress = true;
                index += 1;
            }
            Step::Blocked => {
                round.listening = true;
                if link.wants().contains(PollFlags::OUT) {
                    round.stuck = true;
                    // The others may not send before this one got through; next time it is the first to try.
                    tasks.swap(0, index);
                    break;
                }
                index += 1;
            }
            Step::NoRoom => {
                waits_for_room = true;
                index += 1;
            }
            Step::Done => {
                round.progress = true;
                drop(tasks.remove(index));
            }
        }
    }
    let waited = wake.waits_for_room.swap(waits_for_room, Ordering::SeqCst);
    // The reader may have made room before it could see that somebody waits for it: look once more.
    round.progress |= waits_for_room && !waited;
    round
}

fn fail_all(tasks: &mut Vec<Task>, error: &Error) {
    for task in tasks.drain(..) {
        // A reader that is gone or does not read learns it from the closed channel.
        let _ = task.request.events.try_send(Event::Failed(error.clone()));
    }
}

fn lost(e: &ssh2::Error) -> Error {
    Error::Lost(e.message().to_owned())
}

impl Task {
    fn new(request: Request) -> Self {
        Self {
            request,
            stage: Stage::Opening,
            channel: None,
            pending: None,
            output_ended: false,
            diagnostics_ended: false,
        }
    }

    fn step(&mut self, link: &Link, buffer: &mut [u8]) -> Step {
        if let Some(event) = self.pending.take() {
            let last = matches!(event, Event::Ended(_) | Event::Failed(_));
            match self.request.events.try_send(event) {
                Ok(()) if last => return Step::Done,
                Ok(()) => return Step::Progress,
                Err(TrySendError::Full(event)) => {
                    self.pending = Some(event);
                    return Step::NoRoom;
                }
                Err(TrySendError::Closed(_)) => return Step::Done,
            }
        }
        if self.request.events.is_closed() {
            return Step::Done;
        }
        match self.advance(link, buffer) {
            Ok(true) => Step::Progress,
            Ok(false) => Step::Blocked,
            Err(error) => {
                self.pending = Some(Event::Failed(error));
                Step::Progress
            }
        }
    }

    /// One step; false when it would block.
    fn advance(&mut self, link: &Link, buffer: &mut [u8]) -> Result<bool, Error> {
        let Some(channel) = self.channel.as_mut() else {
            let opened = link.session.channel_open("session", WINDOW, PACKET, None);
            let Some(channel) = settle(opened)? else {
                return Ok(false);
            };
            self.channel = Some(channel);
            self.stage = match self.request.desk {
                Some(_) => Stage::Equipping,
                None => Stage::Starting,
            };
            return Ok(true);
        };
        match self.stage {
            Stage::Opening | Stage::Starting => {
                if settle(channel.exec(&self.request.command))?.is_none() {
                    return Ok(false);
                }
                self.stage = match self.request.desk {
                    Some(_) => Stage::Talking,
                    None => Stage::Sending,
                };
            }
            Stage::Equipping => {
                let window = self
                    .request
                    .desk
                    .as_ref()
                    .map(|desk| desk.window)
                    .unwrap_or_default();
                let size = Some((window.columns(), window.rows(), 0, 0));
                if settle(channel.request_pty(terminal::TYPE, None, size))?.is_none() {
                    return Ok(false);
                }
                self.stage = Stage::Starting;
            }
            Stage::Talking => {
                let sent = match self.request.desk.as_mut().and_then(Desk::next) {
                    None => return self.receive(buffer),
                    Some(Next::Resize(window)) => {
                        let size = channel.request_pty_size(window.columns(), window.rows(), None, None);
                        settle(size)?.map(|()| 0)
                    }
                    Some(Next::Keys(keys)) => match channel.write(keys) {
                        Ok(count) => Some(count),
                        Err(e) if e.kind() == ErrorKind::WouldBlock => None,
                        Err(e) => return Err(Error::Lost(e.to_string())),
                    },
                };
                match (sent, &mut self.request.desk) {
                    (Some(count), Some(desk)) => {
                        desk.sent(count);
                        return Ok(true);
                    }
                    _ if link.wants().contains(PollFlags::OUT) => return Ok(false),
                    _ => return self.receive(buffer),
                }
            }
            Stage::Sending => {
                let rest = self.request.input.rest().map_err(|e| Error::Host {
                    doing: "read what is to be sent to the guest",
                    reason: e.to_string(),
                })?;
                if rest.is_empty() {
                    self.request.input = Vec::new().into();
                    self.stage = Stage::Closing;
                    return Ok(true);
                }
                match channel.write(rest) {
                    Ok(count @ 1..) => self.request.input.sent(count),
                    Err(e) if e.kind() != ErrorKind::WouldBlock => {
                        return Err(Error::Lost(e.to_string()));
                    }
                    // A packet that is half out comes before anything that reading could send.
                    _ if link.wants().contains(PollFlags::OUT) => return Ok(false),
                    // No room at the other end: it may have something to say, or have ended without reading all.
                    _ => return self.receive(buffer),
                }
            }
            Stage::Closing => {
                if settle(channel.send_eof())?.is_none() {
                    return Ok(false);
                }
                self.stage = Stage::Reading;
            }
            Stage::Reading => return self.receive(buffer),
            Stage::Ending => {
                if settle(channel.wait_close())?.is_none() {
                    return Ok(false);
                }
                let signalled = channel
                    .exit_signal()
                    .is_ok_and(|signal| signal.exit_signal.is_some());
                let code = channel.exit_status().ok().filter(|_| !signalled);
                self.pending = Some(Event::Ended(code));
            }
        }
        Ok(true)
    }

    /// Takes what the command has printed, if anything; false when it would block.
    fn receive(&mut self, buffer: &mut [u8]) -> Result<bool, Error> {
        let Some(channel) = self.channel.as_mut() else {
            return Ok(false);
        };
        let output = read(&mut channel.stream(0), buffer)?;
        if let Some(count @ 1..) = output {
            self.pending = Some(Event::Output(buffer[..count].to_vec()));
            return Ok(true);
        }
        let diagnostics = read(&mut channel.stderr(), buffer)?;
        if let Some(count @ 1..) = diagnostics {
            self.pending = Some(Event::Diagnostics(buffer[..count].to_vec()));
            return Ok(true);
        }
        self.output_ended |= output.is_some();
        self.diagnostics_ended |= diagnostics.is_some();
        let ended = self.output_ended && self.diagnostics_ended;
        if ended {
            self.stage = Stage::Ending;
        }
        Ok(ended)
    }
}

/// The bytes read; zero at the end, `None` when it would block.
fn read(stream: &mut ssh2::Stream, buffer: &mut [u8]) -> Result<Option<usize>, Error> {
    match stream.read(buffer) {
        Ok(count) => Ok(Some(count)),
        Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(e) => Err(Error::Lost(e.to_string())),
    }
}

/// `None` when it would block.
fn settle<T>(result: Result<T, ssh2::Error>) -> Result<Option<T>, Error> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if would_block(&e) => Ok(None),
        Err(e)
            if [CHANNEL_FAILURE, CHANNEL_REQUEST_DENIED]
                .into_iter()
                .any(|code| e.code() == ErrorCode::Session(code)) =>
        {
            Err(Error::Refused(e.message().to_owned()))
        }
        Err(e) => Err(lost(&e)),
    }
}
