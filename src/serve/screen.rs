//! Screens: the SPICE proxy, with our tickets at its door and libvirt behind it.
//!
//! A viewer's password is one of two: a ticket, for viewers that people start by themselves; or a *pass*, which a session hands out to its own
//! page, or in the file that starts a viewer, and which is good once and for a few minutes. Either way the viewer belongs to a session, and
//! ends with it.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use axum::extract::ws::{Message, WebSocket};
use futures_util::future::{BoxFuture, ready};
use futures_util::{SinkExt, StreamExt};
use jiff::Timestamp;
use sha2::{Digest, Sha256};

use super::lease::Leases;
use super::session::{Channel, End, Full, Session, Sessions};
use crate::console::backend::{Opened, from_descriptor};
use crate::console::wire::Wire;
use crate::console::{self, Admission, Backend, Denied, Door, Event, Kinds, Limits, Observer, Proxy, Whose};
use crate::machine::Libvirt;
use crate::record::{JobDir, Jobs};
use crate::secret::Secret;
use crate::ticket::{self, Mode, Refusal};

/// How long a pass is good: the page uses it at once, and whoever saves a viewer's file opens it soon.
pub(super) const GOOD_FOR: Duration = Duration::from_secs(300);
/// Passes that are out; more push out those that are soonest over.
const PASSES: usize = 1000;

/// Whose a pass is, and until when it is good.
type Pass = (Weak<Session>, Instant);

/// Passes that are out, by the SHA-256 of their text.
#[derive(Debug, Default)]
pub(super) struct Passes(Mutex<HashMap<[u8; 32], Pass>>);

impl Passes {
    /// A new pass of a session.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub(super) fn hand_out(&self, session: &Arc<Session>, now: Instant) -> Result<Secret, ticket::Error> {
        let text = ticket::random_text()?;
        let mut out = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        out.retain(|_, (session, until)| *until > now && session.strong_count() > 0);
        if out.len() >= PASSES
            && let Some(first) = out
                .iter()
                .min_by_key(|(_, (_, until))| *until)
                .map(|(name, _)| *name)
        {
            out.remove(&first);
        }
        out.insert(
            Sha256::digest(text.reveal()).into(),
            (Arc::downgrade(session), now + GOOD_FOR),
        );
        Ok(text)
    }

    /// The session of a pass, which is used up by this.
    fn take(&self, text: &str, now: Instant) -> Option<Arc<Session>> {
        let name: [u8; 32] = Sha256::digest(text).into();
        let mut out = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (session, until) = out.remove(&name)?;
        session
            .upgrade()
            .filter(|session| until > now && session.is_live())
    }
}

/// How the proxy calls a session, so that it ends with it.
fn name_of(session: &Session) -> String {
    format!("session-{}", session.number)
}

/// Which of our sessions the proxy means.
fn number_of(name: &str) -> Option<u64> {
    name.strip_prefix("session-")?.parse().ok()
}

/// Ends a session's viewers.
pub(super) fn end(proxy: &Proxy, session: &Session, why: End) {
    let why = match why {
        End::Left => console::End::ViewerLeft,
        End::Gone => console::End::MachineGone,
        End::Revoked | End::Admin => console::End::Revoked,
        End::Time => console::End::OutOfTime,
        End::Stopping => console::End::Stopped,
    };
    proxy.end(Whose::Ticket(&name_of(session)), &why);
}

/// The proxy of all machines.
pub(super) fn proxy(
    jobs: Jobs,
    sessions: Arc<Sessions>,
    passes: Arc<Passes>,
    most: usize,
) -> io::Result<Arc<Proxy>> {
    let limits = Limits {
        sessions: most,
        ..Limits::default()
    };
    proxy_within(limits, jobs, sessions, passes)
}

/// The same with limits of the caller's.
pub(super) fn proxy_within(
    limits: Limits,
    jobs: Jobs,
    sessions: Arc<Sessions>,
    passes: Arc<Passes>,
) -> io::Result<Arc<Proxy>> {
    let (alone, leases) = (Arc::new(Mutex::default()), Arc::<Leases>::default());
    let desk = Desk {
        jobs,
        sessions: Arc::clone(&sessions),
        passes,
        alone: Arc::clone(&alone),
        leases: Arc::clone(&leases),
    };
    let notes = Notes {
        sessions,
        alone,
        leases,
        open: Mutex::default(),
    };
    Proxy::new(desk, notes, limits)
}

/// The screen of a job's machine, if it has one yet.
pub(super) fn screen(job: &JobDir) -> Option<Arc<dyn Backend>> {
    let machine = job.read().ok().flatten()?.machine?;
    // A thread of its own, so that a machine that hangs holds up no other's viewers. Only with the first channel: whoever knocks
    // without a ticket asks for a screen, too.
    let line: OnceLock<Libvirt> = OnceLock::new();
    let open = move || -> BoxFuture<'static, io::Result<Wire>> {
        let opened = match line.get() {
            Some(libvirt) => Ok(libvirt.clone()),
            None => Libvirt::open(&machine.uri).map(|new| line.get_or_init(|| new).clone()),
        };
        let name = machine.name.clone();
        Box::pin(async move {
            let libvirt = opened.map_err(io::Error::other)?;
            let descriptor = libvirt.open_graphics(&name).await.map_err(io::Error::other)?;
            from_descriptor(descriptor)
        })
    };
    // All machines of a host have the same screen.
    Some(Arc::new(Opened::new("cannery", open)))
}

/// Who says what a password is good for.
struct Desk {
    jobs: Jobs,
    sessions: Arc<Sessions>,
    passes: Arc<Passes>,
    alone: Arc<Mutex<HashSet<u64>>>,
    leases: Arc<Leases>,
}

impl Desk {
    fn session(&self, password: &str, from: SocketAddr) -> Result<Arc<Session>, Denied> {
        if let Some(session) = self.passes.take(password, Instant::now()) {
            return Ok(session);
        }
        let unchecked = |e: ticket::Error| {
            tracing::error!("{e}");
            Denied::Unchecked("the host cannot read its own files".to_owned())
        };
        let redeemed = match ticket::redeem(&self.jobs, password, Timestamp::now()).map_err(unchecked)? {
            Ok(redeemed) => redeemed,
            Err(Refusal::Unknown) => return Err(Denied::Unknown),
            Err(Refusal::Expired) => return Err(Denied::Expired),
        };
        // A machine without a screen is no reason to take one of the ticket's places.
        if screen(&redeemed.job).is_none() {
            return Err(Denied::MachineGone);
        }
        let key = redeemed.job.key().clone();
        let opened = self.sessions.open(redeemed, from.ip()).map_err(unchecked)?;
        let cookie = opened.map_err(|full| match full {
            Full::Ticket => Denied::Used,
            Full::Host => Denied::Full,
        })?;
        let session = self.sessions.of(cookie.reveal(), &key);
        let session = session.ok_or(Denied::MachineGone)?;
        let mut alone = self.alone.lock().unwrap_or_else(PoisonError::into_inner);
        alone.insert(session.number);
        Ok(session)
    }
}

impl Door for Desk {
    fn model(&self) -> Option<Arc<dyn Backend>> {
        self.jobs.list().ok()?.iter().find_map(screen)
    }

    fn redeem<'a>(
        &'a self,
        password: &'a Secret,
        from: SocketAddr,
    ) -> BoxFuture<'a, Result<Admission, Denied>> {
        Box::pin(async move {
            let session = self.session(password.reveal(), from)?;
            let backend = screen(&session.job).ok_or(Denied::MachineGone);
            let backend = match backend {
                Ok(backend) if self.leases.take(&session).await => Ok(backend),
                Ok(_) => Err(Denied::Taken),
                gone => gone,
            };
            let backend =
                backend.inspect_err(|_| end_if_alone(&self.sessions, &self.alone, session.number))?;
            Ok(Admission {
                ticket: name_of(&session),
                viewer: from.ip().to_string(),
                machine: session.job.key().to_string(),
                mode: match session.mode {
                    Mode::Full => console::Mode::Full,
                    Mode::ViewOnly => console::Mode::ViewOnly,
                },
                kinds: Kinds::default(),
                backend,
            })
        })
    }
}

/// Makes the proxy's channels those of our sessions.
struct Notes {
    sessions: Arc<Sessions>,
    /// Sessions that are a viewer's and nothing else: nobody comes back to them.
    alone: Arc<Mutex<HashSet<u64>>>,
    leases: Arc<Leases>,
    /// By the proxy's numbers of a session and a channel.
    open: Mutex<HashMap<(u64, u64), Channel>>,
}

impl Notes {
    /// A session of which the proxy has nothing any more is over where it was that viewer's alone: its ticket may be used again.
    fn gone(&self, name: &str) {
        let Some(number) = number_of(name) else { return };
        self.leases.leave(number);
        end_if_alone(&self.sessions, &self.alone, number);
    }
}

/// Ends a session that was a viewer's alone, and whose viewer has no screen.
fn end_if_alone(sessions: &Sessions, alone: &Mutex<HashSet<u64>>, number: u64) {
    let was_alone = alone
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .remove(&number);
    if was_alone {
        sessions.end_number(number, End::Left);
    }
}

impl Observer for Notes {
    fn saw(&self, event: &Event<'_>) {
        let open = || self.open.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::ChannelOpened {
                session,
                channel,
                kind,
                ..
            } => {
                let ours = number_of(&session.ticket).and_then(|number| self.sessions.by_number(number));
                if let Some(ours) = ours {
                    let opened = self.sessions.channel(&ours, kind.name());
                    open().insert((session.number, *channel), opened);
                }
            }
            Event::ChannelClosed {
                session,
                channel,
                carried,
                ..
            } => {
                let closed = open().remove(&(session.number, *channel));
                if let Some(mut channel) = closed {
                    let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
                    channel.sent(size(carried.to_viewer));
                    channel.received(size(carried.to_machine));
                }
            }
            Event::SessionOpened(_) => tracing::info!("screen: {event}"),
            Event::SessionClosed(session, _) => {
                tracing::info!("screen: {event}");
                self.gone(&session.ticket);
            }
            Event::Unused { ticket } => self.gone(ticket),
            // Whoever knocks at the port can make as many as they like.
            Event::Refused { why, .. } => {
                self.sessions.counts().refused(why);
                tracing::debug!("screen: {event}");
            }
        }
    }
}

/// Serves the screen to a browser: one WebSocket is one channel of SPICE. It ends when the proxy ends the session's channels.
pub(super) async fn serve(proxy: Arc<Proxy>, socket: WebSocket, from: SocketAddr) {
    let (outgoing, incoming) = socket.split();
    let incoming = incoming
        .take_while(|message| ready(!matches!(message, Ok(Message::Close(_)) | Err(_))))
        .filter_map(|message| {
            ready(match message {
                Ok(Message::Binary(bytes)) => Some(bytes),
                _ => None,
            })
        });
    let outgoing = outgoing.with(|bytes| ready(Ok::<_, axum::Error>(Message::Binary(bytes))));
    proxy.serve_websocket(incoming, outgoing, from).await;
}

/// How a viewer reaches the proxy.
#[derive(Debug, Clone, Copy)]
pub(super) enum Port {
    Tls(u16),
    /// On this host only.
    Plain(u16),
}

/// What keys do in a viewer's own window: once a file names some, all others do nothing there.
const HOT_KEYS: &str =
    "toggle-fullscreen=shift+f11\nrelease-cursor=shift+f12\nsecure-attention=ctrl+alt+end\n";

/// The file that starts a viewer at a machine (virt-viewer's own format), with a pass in it.
pub(super) fn viewer_file(
    host: &str,
    port: Port,
    title: &str,
    pass: &Secret,
    authority: Option<&str>,
) -> String {
    let port = match port {
        Port::Tls(port) => format!("tls-port={port}\nsecure-channels=all"),
        Port::Plain(port) => format!("port={port}"),
    };
    // One line a key; what a project is called is not to add one.
    let title: String = title.chars().filter(|c| !c.is_control()).collect();
    let authority = authority.map_or(String::new(), |pem| {
        format!("ca={}\n", pem.trim().replace('\n', "\\n"))
    });
    format!(
        "[virt-viewer]\ntype=spice\nhost={host}\n{port}\npassword={}\ntitle={title}\n\
         {HOT_KEYS}delete-this-file=1\nenable-usbredir=0\n{authority}",
        pass.reveal()
    )
}

#[cfg(test)]
mod tests {
    use super::super::tests::Place;
    use super::*;

    #[test]
    fn a_pass_is_good_once_and_ends_with_its_session_however_long_somebody_holds_that() {
        let place = Place::new();
        let session = place.session();
        let (passes, now) = (Passes::default(), Instant::now());
        let [one, two, three] = [(); 3].map(|()| passes.hand_out(&session, now).unwrap());
        assert!(passes.take(one.reveal(), now).is_some());
        assert!(passes.take(one.reveal(), now).is_none(), "used up");
        assert!(passes.take(two.reveal(), now + GOOD_FOR).is_none(), "too late");
        place.house.sessions.end(&session, End::Revoked);
        assert!(passes.take(three.reveal(), now).is_none());
    }

    #[test]
    fn a_viewer_who_gets_no_screen_leaves_the_tickets_place_free() {
        let place = Place::new();
        let session = place.session();
        let notes = Notes {
            sessions: Arc::clone(&place.house.sessions),
            alone: Arc::default(),
            leases: Arc::default(),
            open: Mutex::default(),
        };
        let name = name_of(&session);
        let unused = Event::Unused { ticket: &name };
        notes.saw(&unused);
        assert!(session.is_live(), "it is a page's, too");
        notes.alone.lock().unwrap().insert(session.number);
        notes.saw(&unused);
        assert!(!session.is_live());
    }

    #[test]
    fn a_viewers_file_has_one_line_a_key_whatever_its_title_says() {
        let pass = Secret::new("secret");
        let file = viewer_file(
            "ci.example.com",
            Port::Tls(5901),
            "a\npassword=x",
            &pass,
            Some("-----A\nB\n"),
        );
        assert_eq!(
            file,
            "[virt-viewer]\ntype=spice\nhost=ci.example.com\ntls-port=5901\nsecure-channels=all\npassword=secret\n\
             title=apassword=x\ntoggle-fullscreen=shift+f11\nrelease-cursor=shift+f12\nsecure-attention=ctrl+alt+end\n\
             delete-this-file=1\nenable-usbredir=0\nca=-----A\\nB\n"
        );
        let plain = viewer_file("127.0.0.1", Port::Plain(5900), "t", &pass, None);
        assert!(
            plain.contains("\nport=5900\n") && !plain.contains("tls") && !plain.contains("ca="),
            "{plain}"
        );
    }
}
