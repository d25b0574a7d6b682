//! One connection after the other, from its first byte to its end.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::io::AsyncReadExt;
use tokio::time::timeout;

use super::acks::Acks;
use super::backend::{self, Backend, Dialled};
use super::caps::Mirror;
use super::channel::{Kind, Mode};
use super::event::{Event, Observer};
use super::filter::{Filter, Violation};
use super::frame::Framing;
use super::gate::Gate;
use super::hall::Hall;
use super::handshake::{self, HandshakeError};
use super::keys::{Asks, Keys};
use super::limits::{Door as Waiting, Limits, Pass};
use super::link::{Caps, Code, Common, Hello};
use super::refusal::{Denied, Refusal};
use super::relay::{Carried, ChannelEnd, Relay};
use super::session::{Admission, End, Found, Live, NotNow, Registry, Seat, Session, Whose, recent};
use super::wire::{self, Stream, Wire};
use crate::secret::Secret;

/// For the owner's word on a ticket: it reads files.
const REDEEM_TIME: Duration = Duration::from_secs(10);
/// For a viewer to begin its screen's channel. Viewers do so at once.
const BEGIN_TIME: Duration = Duration::from_secs(10);
/// For the channels of a viewer whose machine is taken over to be closed at the machine.
const LEAVE_TIME: Duration = Duration::from_secs(5);
/// For one's turn at a machine: longer than one takeover takes.
const TURN_TIME: Duration = Duration::from_secs(20);

/// Who says what a ticket is good for.
pub trait Door: Send + Sync + 'static {
    /// A machine like the one that a viewer may want. What it can do is shown to viewers before they have sent their
    /// ticket. `None` when there is none, or when it is not worth asking. Not called for ten seconds after one was named, for
    /// channels whose machines have said what they can do.
    fn model(&self) -> Option<Arc<dyn Backend>>;

    /// Redeems a ticket: called once for each session, for its main channel. Later channels belong to the session, and do
    /// not ask again. Dropped when it takes longer than ten seconds.
    fn redeem<'a>(&'a self, ticket: &'a Secret, from: SocketAddr)
    -> BoxFuture<'a, Result<Admission, Denied>>;
}

/// A SPICE proxy.
pub struct Proxy {
    door: Box<dyn Door>,
    observer: Box<dyn Observer>,
    limits: Limits,
    keys: Keys,
    mirror: Mirror,
    waiting: Waiting,
    registry: Arc<Registry>,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy")
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

impl Proxy {
    /// Starts the threads that make keys. Listens nowhere yet.
    ///
    /// # Errors
    /// As [`Keys::start`].
    pub fn new(door: impl Door, observer: impl Observer, limits: Limits) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Proxy {
            door: Box::new(door),
            observer: Box::new(observer),
            keys: Keys::start(limits.keys)?,
            mirror: Mirror::default(),
            waiting: Waiting::new(&limits),
            registry: Arc::new(Registry::new(&limits)),
            limits,
        }))
    }

    /// The sessions that live now, oldest first.
    pub fn sessions(&self) -> Vec<Arc<Session>> {
        self.registry.live()
    }

    /// Ends sessions at once, with all of their channels; says how many. A viewer whose ticket was redeemed before this and
    /// whose session has not begun gets none. Whoever revokes a ticket does that first, and then calls this.
    pub fn end(&self, whose: Whose<'_>, why: &End) -> usize {
        self.registry.end(whose, why)
    }

    /// How many connections have shown no good ticket yet.
    pub fn waiting(&self) -> usize {
        self.waiting.waiting()
    }

    /// How many keys are ready.
    pub fn keys_ready(&self) -> usize {
        self.keys.ready()
    }

    /// Takes a place for a connection that has just been accepted; `None` when there is none, which is noted.
    pub(super) fn enter(&self, from: SocketAddr) -> Option<Pass> {
        let pass = self.waiting.enter(from.ip());
        if pass.is_none() {
            self.refused(from, &Refusal::Crowded);
        }
        pass
    }

    pub(super) fn refused(&self, from: SocketAddr, why: &Refusal) {
        self.observer.saw(&Event::Refused { from, why });
    }

    /// Serves one connection until it ends: any stream of bytes, such as a WebSocket's. It is counted among those that
    /// wait, and refused where they are too many.
    pub async fn serve(&self, stream: impl Stream + 'static, from: SocketAddr) {
        let mut wire: Wire = Box::new(stream);
        match self.enter(from) {
            Some(pass) => self.attend(wire, from, pass).await,
            None => handshake::refuse(&mut wire, Code::Error).await,
        }
    }

    /// The same, for one that has its place.
    pub(super) async fn attend(&self, mut wire: Wire, from: SocketAddr, pass: Pass) {
        let greeted = self.greet(&mut wire, from).await;
        let (visit, ticket) = match greeted {
            Ok(greeted) => greeted,
            Err(why) => return self.turn_away(wire, from, why, pass).await,
        };
        if visit.kind == Kind::Main {
            self.main(wire, from, pass, &visit, &ticket).await;
        } else {
            self.later(wire, from, pass, &visit, &ticket).await;
        }
    }

    /// Tells the viewer, where there is something to tell and someone to hear it.
    async fn turn_away(&self, mut wire: Wire, from: SocketAddr, why: Refusal, pass: Pass) {
        self.refused(from, &why);
        if let Some(code) = why.code() {
            // It has its place until it has heard it.
            drop(handshake::verdict(&mut wire, code).await);
        }
        drop(pass);
    }

    /// The handshake up to the ticket.
    async fn greet(&self, wire: &mut Wire, from: SocketAddr) -> Result<(Visit, Secret), Refusal> {
        let hello = handshake::hello(wire).await?;
        let Some(kind) = Kind::from_number(hello.kind) else {
            handshake::refuse(wire, Code::InvalidData).await;
            return Err(HandshakeError::Refused(Code::InvalidData).into());
        };
        let shown = self.mirror.shown(|| self.door.model(), kind).await;
        if !self.waiting.may_have_key(from.ip()) {
            handshake::refuse(wire, Code::Error).await;
            return Err(Refusal::Crowded);
        }
        // Whose session it is, the ticket says; that there is one is enough for a key.
        let who = if self.registry.has(hello.session) {
            Asks::Member
        } else {
            Asks::Stranger
        };
        let key = handshake::key(&self.keys, who).await?;
        let ticket = match handshake::ticket(wire, &hello, &shown, key).await {
            Ok(ticket) => ticket.ok_or(Refusal::NoTicket),
            Err(error) => Err(error.into()),
        };
        // A key costs us more than a guess costs them: who was shown one and brought nothing has guessed wrong.
        let ticket = ticket.inspect_err(|_| self.waiting.wrong(from.ip()))?;
        Ok((Visit { hello, kind, shown }, ticket))
    }

    async fn main(&self, wire: Wire, from: SocketAddr, pass: Pass, visit: &Visit, ticket: &Secret) {
        let live = match self.admit(from, visit, ticket).await {
            Ok(live) => live,
            Err(why) => return self.turn_away(wire, from, why, pass).await,
        };
        let session = Arc::clone(&live.session);
        let opened = self.take_over(&session, visit).await;
        let (seat, dialled) = match opened {
            Ok(opened) => opened,
            Err(why) => {
                drop(live);
                self.unused(&session.ticket);
                return self.turn_away(wire, from, why, pass).await;
            }
        };
        drop(pass);
        self.observer.saw(&Event::SessionOpened(&session));
        let closed = self.open(wire, Some(dialled), &session, visit, seat).await;
        session.finish(closed.end.of_session());
        // Later channels see the end and close; none can begin any more.
        session.left().await;
        let why = session.ended().unwrap_or(End::ViewerLeft);
        drop(live);
        self.observer.saw(&Event::SessionClosed(&session, &why));
        closed.part().await;
    }

    /// Redeems the ticket of a main channel.
    async fn admit(&self, from: SocketAddr, visit: &Visit, ticket: &Secret) -> Result<Live, Refusal> {
        if visit.hello.session != 0 {
            return Err(Refusal::NoSession);
        }
        let since = self.registry.now();
        let redeemed = timeout(REDEEM_TIME, self.door.redeem(ticket, from)).await;
        let admission = match redeemed {
            Ok(Ok(admission)) => admission,
            Ok(Err(denied)) => {
                if denied == Denied::Unknown {
                    self.waiting.wrong(from.ip());
                }
                return Err(Refusal::Denied(denied));
            }
            Err(_) => return Err(Refusal::Denied(Denied::Unchecked("it took too long".to_owned()))),
        };
        let name = admission.ticket.clone();
        let opened = if admission.kinds.has(Kind::Main) {
            self.registry
                .open(admission, ticket, from, since)
                .map_err(|why| match why {
                    NotNow::Full => Refusal::Full,
                    NotNow::Over => Refusal::Denied(Denied::MachineGone),
                })
        } else {
            Err(Refusal::NotAllowed(Kind::Main))
        };
        opened.inspect_err(|_| self.unused(&name))
    }

    fn unused(&self, ticket: &str) {
        self.observer.saw(&Event::Unused { ticket });
    }

    /// Opens the main channel at the machine, once whoever was there has left.
    async fn take_over(&self, session: &Arc<Session>, visit: &Visit) -> Result<(Seat, Dialled), Refusal> {
        let Ok(mut past) = timeout(TURN_TIME, self.registry.turn(&session.machine)).await else {
            return Err(Refusal::TooManyTakeovers);
        };
        if let Some(end) = session.ended() {
            return Err(Refusal::Ended(end));
        }
        let others = self.registry.others(session);
        // One that waits for its own turn is not at the machine yet.
        let there: Vec<_> = others.iter().filter(|other| other.channels() > 0).collect();
        let may_more = |other: &&&Arc<Session>| other.mode == Mode::Full && other.ticket != session.ticket;
        if session.mode == Mode::ViewOnly && there.iter().any(|other| may_more(&other)) {
            return Err(Refusal::Taken);
        }
        if !there.is_empty() {
            let past = recent(&mut past);
            if past.len() >= self.limits.takeovers {
                return Err(Refusal::TooManyTakeovers);
            }
            past.push_back(std::time::Instant::now());
            for other in there {
                other.finish(End::TakenOver);
                // One that hangs is cut off by the machine itself.
                drop(timeout(LEAVE_TIME, other.left()).await);
            }
        }
        let seat = session.seat(self.limits.channels).ok_or(Refusal::Full)?;
        let dialled = self.dial(session, visit, &[]).await?;
        Ok((seat, dialled))
    }

    async fn later(&self, wire: Wire, from: SocketAddr, pass: Pass, visit: &Visit, ticket: &Secret) {
        let found = match self.registry.find(ticket, visit.hello.session) {
            Found::Session(session) if session.kinds.has(visit.kind) => session
                .seat(self.limits.channels)
                .map(|seat| (session, seat))
                .ok_or(Refusal::Full),
            Found::Session(_) => Err(Refusal::NotAllowed(visit.kind)),
            Found::NoSuchSession => Err(Refusal::NoSession),
            Found::NoSuchTicket => {
                self.waiting.wrong(from.ip());
                Err(Refusal::NoTicket)
            }
        };
        let (session, seat) = match found {
            Ok(found) => found,
            Err(why) => return self.turn_away(wire, from, why, pass).await,
        };
        let dialled = if Gate::guards(visit.kind) {
            None
        } else {
            match self.dial(&session, visit, &[]).await {
                Ok(dialled) => Some(dialled),
                Err(why) => {
                    drop(seat);
                    return self.turn_away(wire, from, why, pass).await;
                }
            }
        };
        drop(pass);
        self.open(wire, dialled, &session, visit, seat).await.part().await;
    }

    /// Opens this channel at the machine, unless its session ends first.
    async fn dial(&self, session: &Session, visit: &Visit, first: &[u8]) -> Result<Dialled, Refusal> {
        let dialled = tokio::select! {
            end = session.finished() => return Err(Refusal::Ended(end)),
            dialled = backend::dial(session.backend.as_ref(), &visit.hello, first, &session.turn) => dialled?,
        };
        self.mirror
            .learn(session.backend.likeness(), visit.kind, dialled.caps.clone());
        if dialled.caps.keeps(&visit.shown) && visit.framing_with(&dialled.caps) == visit.framing() {
            Ok(dialled)
        } else {
            Err(Refusal::Less)
        }
    }

    /// Accepts the viewer and relays. Where the channel is not at the machine yet, it gets there with its beginning.
    async fn open(
        &self,
        mut viewer: Wire,
        dialled: Option<Dialled>,
        session: &Arc<Session>,
        visit: &Visit,
        seat: Seat,
    ) -> Closed {
        let (kind, id) = (visit.kind, visit.hello.id);
        if let Err(error) = handshake::verdict(&mut viewer, Code::Ok).await {
            return Closed {
                end: ChannelEnd::ViewerLost(io::Error::other(error)),
                viewer,
            };
        }
        let mut filter = Filter::new(kind, session.mode, visit.framing());
        let mut carried = Carried::default();
        let opened = match dialled {
            Some(dialled) => Ok((dialled.wire, Vec::new())),
            None => {
                self.begin(&mut viewer, session, visit, &mut filter, &mut carried)
                    .await
            }
        };
        let (machine, begun) = match opened {
            Ok(opened) => opened,
            Err(end) => {
                if end.ends_all() {
                    session.finish(end.of_session());
                }
                return Closed { end, viewer };
            }
        };
        let channel = session.next_channel();
        self.observer.saw(&Event::ChannelOpened {
            session,
            channel,
            kind,
            id,
        });
        let relay = Relay {
            kind,
            viewer,
            machine,
            filter,
            begun,
            acks: Acks::new(visit.framing()),
            hall: (kind == Kind::Main).then(|| Hall::new(session.kinds, visit.framing())),
            session,
            registry: &self.registry,
            limits: &self.limits,
            carried,
        };
        let (end, carried, viewer) = relay.run().await;
        drop(seat);
        self.observer.saw(&Event::ChannelClosed {
            session,
            channel,
            kind,
            id,
            carried,
            end: &end,
        });
        Closed { end, viewer }
    }

    /// Waits until the viewer has begun its screen's channel, and opens it at the machine; says also what came of a message
    /// that is not complete.
    async fn begin(
        &self,
        viewer: &mut Wire,
        session: &Session,
        visit: &Visit,
        filter: &mut Filter,
        carried: &mut Carried,
    ) -> Result<(Wire, Vec<u8>), ChannelEnd> {
        let held = async {
            let mut gate = Gate::new(visit.framing());
            let mut bytes = vec![0; 4096];
            let mut passed = Vec::new();
            loop {
                let got = viewer.read(&mut bytes).await.map_err(ChannelEnd::ViewerLost)?;
                if got == 0 {
                    return Err(ChannelEnd::Viewer);
                }
                passed.clear();
                filter
                    .feed(bytes.get(..got).unwrap_or_default(), &mut passed)
                    .map_err(ChannelEnd::Violation)?;
                if gate.feed(&passed).map_err(ChannelEnd::Violation)? {
                    return Ok(gate.into_held());
                }
            }
        };
        let mut held = tokio::select! {
            end = session.finished() => return Err(ChannelEnd::Session(end)),
            held = timeout(BEGIN_TIME, held) => held.unwrap_or(Err(ChannelEnd::Violation(Violation::NoBeginning)))?,
        };
        let begun = held.split_off(held.len().saturating_sub(filter.unfinished()));
        let machine = self.dial(session, visit, &held).await.map_err(|why| match why {
            Refusal::Ended(end) => ChannelEnd::Session(end),
            other => ChannelEnd::MachineLost(io::Error::other(other)),
        })?;
        carried.to_machine = u64::try_from(held.len()).unwrap_or_default();
        session.count(0, carried.to_machine);
        Ok((machine.wire, begun))
    }
}

/// A channel that the machine is rid of.
struct Closed {
    end: ChannelEnd,
    viewer: Wire,
}

impl Closed {
    /// Lets what was said last arrive. Nobody waits for this: not the session, nor the machine's next viewer.
    async fn part(mut self) {
        if matches!(self.end, ChannelEnd::Session(_) | ChannelEnd::Violation(_)) {
            wire::last_words(&mut self.viewer, &[]).await;
        }
    }
}

/// What a viewer asked for, and what it was shown.
struct Visit {
    hello: Hello,
    kind: Kind,
    shown: Caps,
}

impl Visit {
    fn framing(&self) -> Framing {
        self.framing_with(&self.shown)
    }

    /// Headers are short where both sides can have them so.
    fn framing_with(&self, server: &Caps) -> Framing {
        if self.hello.caps.has(Common::MiniHeader) && server.has(Common::MiniHeader) {
            Framing::Mini
        } else {
            Framing::Full
        }
    }
}
