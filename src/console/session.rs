//! Sessions: a viewer at a machine, from its main channel's beginning to its end.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Instant, SystemTime};

use sha2::{Digest as _, Sha256};
use tokio::sync::{Mutex as Turn, OwnedMutexGuard, watch};

use super::backend::Backend;
use super::channel::{Kinds, Mode};
use super::limits::{COUNTED, Limits};
use crate::secret::Secret;

/// Most ends of machines and tickets that are remembered for sessions that are just beginning.
const ENDS_KEPT: usize = 1000;

/// What a ticket admits to.
#[derive(Clone, Debug)]
pub struct Admission {
    /// A name of the ticket that is no secret: for the audit, and to revoke it.
    pub ticket: String,
    /// Who the viewer is, as far as that is known.
    pub viewer: String,
    /// The machine's name.
    pub machine: String,
    /// What the viewer may do.
    pub mode: Mode,
    /// Which channels it may open; the mode takes some away.
    pub kinds: Kinds,
    /// The machine's screen.
    pub backend: Arc<dyn Backend>,
}

/// Why a session ended. Its text is for the viewer.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum End {
    /// The viewer closed it, or its connection broke.
    #[error("the viewer left")]
    ViewerLeft,
    /// The machine's screen closed it.
    #[error("the machine closed its console")]
    MachineLeft,
    /// Another viewer took the machine, which shows itself to one at a time.
    #[error("another viewer has taken over this console")]
    TakenOver,
    /// The machine was removed.
    #[error("the machine is gone, and its console with it")]
    MachineGone,
    /// The ticket was revoked, or an admin ended the session.
    #[error("this console session was ended by the operator")]
    Revoked,
    /// It has lasted as long as it may.
    #[error("this console session's time is over")]
    OutOfTime,
    /// The proxy is being stopped.
    #[error("the console service is being stopped; try again later")]
    Stopped,
    /// The viewer did what no viewer does.
    #[error("the viewer broke the protocol")]
    Misbehaved,
    /// The viewer did not take what the machine sent.
    #[error("the viewer did not keep up with what the machine shows, or stopped reading")]
    Stalled,
}

impl End {
    /// A word for metrics: one of a few.
    pub fn name(&self) -> &'static str {
        match self {
            End::ViewerLeft => "viewer_left",
            End::MachineLeft => "machine_left",
            End::TakenOver => "taken_over",
            End::MachineGone => "machine_gone",
            End::Revoked => "revoked",
            End::OutOfTime => "out_of_time",
            End::Stopped => "stopped",
            End::Misbehaved => "misbehaved",
            End::Stalled => "stalled",
        }
    }
}

/// A viewer at a machine.
#[derive(Debug)]
pub struct Session {
    /// A number that no other session of this proxy has. It is ours, and not the one that viewers send.
    pub number: u64,
    /// See [`Admission::ticket`].
    pub ticket: String,
    /// See [`Admission::viewer`].
    pub viewer: String,
    /// The machine's name.
    pub machine: String,
    /// What the viewer may do.
    pub mode: Mode,
    /// Which channels it may open.
    pub kinds: Kinds,
    /// Where it comes from.
    pub from: SocketAddr,
    /// Since when.
    pub opened: SystemTime,
    pub(super) backend: Arc<dyn Backend>,
    /// For channels to be opened at the machine one after the other.
    pub(super) turn: Turn<()>,
    secret: [u8; 32],
    pub(super) id: OnceLock<u32>,
    end: watch::Sender<Option<End>>,
    channels: watch::Sender<usize>,
    to_viewer: AtomicU64,
    to_machine: AtomicU64,
    next_channel: AtomicU64,
    /// Bytes of the machine that the viewer has not taken: this one's, and all viewers'.
    owed: AtomicUsize,
    owed_by_all: Arc<AtomicUsize>,
}

impl Session {
    /// Bytes that the viewer was sent so far.
    pub fn to_viewer(&self) -> u64 {
        self.to_viewer.load(Ordering::Relaxed)
    }

    /// Bytes that the machine was sent so far.
    pub fn to_machine(&self) -> u64 {
        self.to_machine.load(Ordering::Relaxed)
    }

    /// How many channels are open at the machine.
    pub fn channels(&self) -> usize {
        *self.channels.borrow()
    }

    /// Why it has ended; `None` while it lives.
    pub fn ended(&self) -> Option<End> {
        self.end.borrow().clone()
    }

    /// Ends it. The first reason counts.
    pub(super) fn finish(&self, end: End) {
        self.end.send_if_modified(|now| {
            let first = now.is_none();
            if first {
                *now = Some(end);
            }
            first
        });
    }

    /// Waits for its end.
    pub(super) async fn finished(&self) -> End {
        let mut end = self.end.subscribe();
        let why = end
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|why| why.clone());
        // The sender is in `self`, so there is always a reason.
        why.unwrap_or(End::ViewerLeft)
    }

    /// Waits until the machine has none of its channels any more.
    pub(super) async fn left(&self) {
        let mut channels = self.channels.subscribe();
        drop(channels.wait_for(|open| *open == 0).await);
    }

    /// A place for one more channel. `None` when there are `most`.
    pub(super) fn seat(self: &Arc<Self>, most: usize) -> Option<Seat> {
        let taken = self.channels.send_if_modified(|open| {
            let free = *open < most;
            if free {
                *open += 1;
            }
            free
        });
        taken.then(|| Seat(Arc::clone(self)))
    }

    /// A number for a channel that opens now.
    pub(super) fn next_channel(&self) -> u64 {
        self.next_channel.fetch_add(1, Ordering::Relaxed)
    }

    /// So many more bytes wait for the viewer.
    pub(super) fn owes(&self, bytes: usize) {
        self.owed.fetch_add(bytes, Ordering::Relaxed);
        self.owed_by_all.fetch_add(bytes, Ordering::Relaxed);
    }

    /// So many of them wait no more.
    pub(super) fn paid(&self, bytes: usize) {
        self.owed.fetch_sub(bytes, Ordering::Relaxed);
        self.owed_by_all.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Bytes that wait for the viewer, on all of its channels.
    pub(super) fn owed(&self) -> usize {
        self.owed.load(Ordering::Relaxed)
    }

    pub(super) fn count(&self, to_viewer: u64, to_machine: u64) {
        self.to_viewer.fetch_add(to_viewer, Ordering::Relaxed);
        self.to_machine.fetch_add(to_machine, Ordering::Relaxed);
    }
}

/// One channel's place in its session.
#[derive(Debug)]
pub(super) struct Seat(Arc<Session>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.channels.send_modify(|open| *open = open.saturating_sub(1));
    }
}

/// Whose sessions are meant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Whose<'a> {
    /// All that are at this machine.
    Machine(&'a str),
    /// All that this ticket opened.
    Ticket(&'a str),
    /// The one with this number.
    Number(u64),
    /// Everyone's.
    All,
}

impl Whose<'_> {
    fn is(self, session: &Session) -> bool {
        match self {
            Whose::Machine(name) => session.machine == name,
            Whose::Ticket(name) => session.ticket == name,
            Whose::Number(number) => session.number == number,
            Whose::All => true,
        }
    }
}

/// What a later channel's session and ticket led to.
#[derive(Debug)]
pub(super) enum Found {
    Session(Arc<Session>),
    /// The ticket has sessions, but none with that number.
    NoSuchSession,
    /// No session has this ticket.
    NoSuchTicket,
}

/// A session may not begin.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum NotNow {
    /// There are too many.
    Full,
    /// Its machine or ticket has ended meanwhile.
    Over,
}

/// When a machine was last taken from one viewer by another.
pub(super) type Takeovers = VecDeque<Instant>;

#[derive(Debug, Default)]
struct State {
    next: u64,
    live: Vec<Arc<Session>>,
    turns: HashMap<String, Arc<Turn<Takeovers>>>,
    ends: VecDeque<(u64, Option<String>, Option<String>)>,
    ended: u64,
}

/// All sessions of a proxy.
#[derive(Debug)]
pub(super) struct Registry {
    state: Mutex<State>,
    most: usize,
    /// See [`Limits::untaken_by_all`].
    untaken: usize,
    owed: Arc<AtomicUsize>,
}

impl Registry {
    pub(super) fn new(limits: &Limits) -> Self {
        Registry {
            state: Mutex::default(),
            most: limits.sessions,
            untaken: limits.untaken_by_all,
            owed: Arc::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that panics is done under it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A moment: what ends after it is noticed by a session that was asked for before.
    pub(super) fn now(&self) -> u64 {
        self.state().ended
    }

    /// Begins a session that was admitted after `since`.
    pub(super) fn open(
        self: &Arc<Self>,
        admission: Admission,
        ticket: &Secret,
        from: SocketAddr,
        since: u64,
    ) -> Result<Live, NotNow> {
        let mut state = self.state();
        if state.live.len() >= self.most {
            return Err(NotNow::Full);
        }
        let forgotten =
            state.ends.front().is_some_and(|(at, ..)| *at > since) && state.ends.len() == ENDS_KEPT;
        let over = state.ends.iter().any(|(at, machine, name)| {
            *at >= since
                && machine
                    .as_ref()
                    .is_none_or(|machine| *machine == admission.machine)
                && name.as_ref().is_none_or(|name| *name == admission.ticket)
        });
        if over || forgotten {
            return Err(NotNow::Over);
        }
        state.next += 1;
        let session = Arc::new(Session {
            number: state.next,
            ticket: admission.ticket,
            viewer: admission.viewer,
            machine: admission.machine,
            mode: admission.mode,
            kinds: admission.kinds.under(admission.mode),
            from,
            opened: SystemTime::now(),
            backend: admission.backend,
            turn: Turn::default(),
            secret: digest(ticket),
            id: OnceLock::new(),
            end: watch::Sender::new(None),
            channels: watch::Sender::new(0),
            to_viewer: AtomicU64::new(0),
            to_machine: AtomicU64::new(0),
            next_channel: AtomicU64::new(1),
            owed: AtomicUsize::new(0),
            owed_by_all: Arc::clone(&self.owed),
        });
        state.live.push(Arc::clone(&session));
        Ok(Live {
            session,
            registry: Arc::clone(self),
        })
    }

    /// Whether there is a session with this number.
    pub(super) fn has(&self, id: u32) -> bool {
        let state = self.state();
        state.live.iter().any(|session| session.id.get() == Some(&id))
    }

    /// The session of a later channel: both its number and the ticket must be those of the same one.
    pub(super) fn find(&self, ticket: &Secret, id: u32) -> Found {
        // Compared as hashes, whose bytes tell nothing about those of the tickets.
        let secret = digest(ticket);
        let state = self.state();
        let mut known = false;
        for session in state.live.iter().filter(|session| session.secret == secret) {
            known = true;
            if session.id.get() == Some(&id) && session.ended().is_none() {
                return Found::Session(Arc::clone(session));
            }
        }
        if known {
            Found::NoSuchSession
        } else {
            Found::NoSuchTicket
        }
    }

    /// Where more waits for all viewers together than may, ends the session of the one for whom most does.
    pub(super) fn relieve(&self) {
        if self.owed.load(Ordering::Relaxed) <= self.untaken {
            return;
        }
        let state = self.state();
        // Those that end will soon owe nothing.
        let staying = || state.live.iter().filter(|session| session.ended().is_none());
        if staying().map(|session| session.owed()).sum::<usize>() > self.untaken
            && let Some(slowest) = staying().max_by_key(|session| session.owed())
        {
            slowest.finish(End::Stalled);
        }
    }

    /// All, oldest first.
    pub(super) fn live(&self) -> Vec<Arc<Session>> {
        self.state().live.clone()
    }

    /// Ends those that are meant; says how many there were. A session of such a machine or ticket that is just beginning
    /// does not begin.
    pub(super) fn end(&self, whose: Whose<'_>, why: &End) -> usize {
        let mut state = self.state();
        let noted = match whose {
            Whose::Machine(name) => Some((Some(name.to_owned()), None)),
            Whose::Ticket(name) => Some((None, Some(name.to_owned()))),
            Whose::All => Some((None, None)),
            Whose::Number(_) => None,
        };
        if let Some((machine, ticket)) = noted {
            if state.ends.len() == ENDS_KEPT {
                state.ends.pop_front();
            }
            let at = state.ended;
            state.ends.push_back((at, machine, ticket));
            state.ended += 1;
        }
        let meant = state.live.iter().filter(|session| whose.is(session));
        meant.map(|session| session.finish(why.clone())).count()
    }

    /// Waits for the right to change who is at this machine, which one has at a time.
    pub(super) async fn turn(&self, machine: &str) -> OwnedMutexGuard<Takeovers> {
        let turn = {
            let mut state = self.state();
            state.turns.retain(|_, turn| {
                Arc::strong_count(turn) > 1
                    || turn
                        .try_lock()
                        .is_ok_and(|mut past| !recent(&mut past).is_empty())
            });
            Arc::clone(state.turns.entry(machine.to_owned()).or_default())
        };
        turn.lock_owned().await
    }

    /// The other sessions at the same machine.
    pub(super) fn others(&self, than: &Session) -> Vec<Arc<Session>> {
        let state = self.state();
        let same = |session: &&Arc<Session>| session.machine == than.machine && session.number != than.number;
        state.live.iter().filter(same).cloned().collect()
    }
}

/// Those takeovers that still count.
pub(super) fn recent(past: &mut Takeovers) -> &mut Takeovers {
    while past.front().is_some_and(|at| at.elapsed() >= COUNTED) {
        past.pop_front();
    }
    past
}

/// A session that is in the registry until this is dropped.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) session: Arc<Session>,
    registry: Arc<Registry>,
}

impl Drop for Live {
    fn drop(&mut self) {
        self.session.finish(End::ViewerLeft);
        let mut state = self.registry.state();
        state.live.retain(|session| session.number != self.session.number);
    }
}

fn digest(ticket: &Secret) -> [u8; 32] {
    Sha256::digest(ticket.reveal().as_bytes()).into()
}

/// A session that no proxy has, for tests of what sessions are asked.
#[cfg(test)]
pub(super) fn test_session_of(limits: &Limits) -> (Arc<Registry>, Live) {
    let registry = Arc::new(Registry::new(limits));
    let live = tests::open(&registry, "a machine", "a ticket").unwrap();
    (registry, live)
}

#[cfg(test)]
mod tests;
