//! Sessions: somebody who showed a ticket, until the ticket, the machine or the person is gone.
//!
//! A session is opened once and known by a cookie from then on; terminals, logs and screens are channels of a session. So how long a
//! ticket may be redeemed says nothing about how long one may stay, and taking the ticket away ends everything that came of it.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio::sync::watch;

use super::audit::{Audit, Carried, Event, Whose};
use super::count::Counts;
use super::screen;
use crate::console::Proxy;
use crate::record::{JobDir, JobKey};
use crate::secret::Secret;
use crate::ticket::{self, Mode, Redeemed, TicketId};

/// A session with no open channel ends after this: a page that is loaded anew is back at once, a closed one never.
const IDLE: Duration = Duration::from_secs(120);

/// Why a session is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The viewer left.
    Left,
    /// The ticket was taken away.
    Revoked,
    /// The machine is being removed.
    Gone,
    /// An admin ended it.
    Admin,
    /// Nothing was open for a while, or something for far too long.
    Time,
    /// The server stops.
    Stopping,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            End::Left => "you have left",
            End::Revoked => "the ticket was taken away",
            End::Gone => "the machine is gone",
            End::Admin => "the host's operator has ended this session",
            End::Time => "the session's time is over",
            End::Stopping => "the console is being restarted",
        })
    }
}

/// Why a session is not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Full {
    #[error("as many viewers as the ticket allows are there already")]
    Ticket,
    #[error("there are as many console sessions as this host allows")]
    Host,
}

/// Somebody at a machine.
#[derive(Debug)]
pub(super) struct Session {
    /// Its number, for people and programs: a random one, so that it means no other session after a restart.
    pub(super) number: u64,
    pub(super) job: JobDir,
    pub(super) mode: Mode,
    ticket: TicketId,
    /// Until when the ticket may be redeemed.
    expires: Timestamp,
    minted_by: String,
    from: IpAddr,
    opened: Timestamp,
    begin: Instant,
    last: Mutex<Instant>,
    channels: AtomicUsize,
    sent: AtomicU64,
    received: AtomicU64,
    end: watch::Sender<Option<End>>,
    /// Whether the audit log has its end.
    noted: AtomicBool,
}

/// What a list shows of a session.
#[derive(Debug, Serialize)]
pub(super) struct Shown {
    session: u64,
    job: JobKey,
    ticket: String,
    minted_by: String,
    mode: Mode,
    from: IpAddr,
    opened: Timestamp,
    channels: usize,
    bytes_sent: u64,
    bytes_received: u64,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Sessions {
    by_cookie: Mutex<HashMap<[u8; 32], Arc<Session>>>,
    most: usize,
    audit: Arc<Audit>,
    counts: Arc<Counts>,
    /// Where viewers of screens are, who end with their sessions.
    screens: OnceLock<Weak<Proxy>>,
}

fn name_of(cookie: &str) -> [u8; 32] {
    Sha256::digest(cookie.as_bytes()).into()
}

/// 48 bits: JSON's numbers have no more than 53, and no host has so many sessions that two are the same.
fn random_number() -> Result<u64, ticket::Error> {
    let digits = ticket::random_text()?;
    let digits = digits.reveal().get(..12).unwrap_or_default();
    u64::from_str_radix(digits, 16).map_err(|e| ticket::Error::Random(e.to_string()))
}

impl Sessions {
    pub(super) fn new(most: usize, audit: Arc<Audit>, counts: Arc<Counts>) -> Self {
        Self {
            by_cookie: Mutex::default(),
            most,
            audit,
            counts,
            screens: OnceLock::new(),
        }
    }

    /// From now on sessions that end are ended at this proxy, too.
    pub(super) fn end_at(&self, proxy: &Arc<Proxy>) {
        // There is one proxy, and this is called once.
        let _ = self.screens.set(Arc::downgrade(proxy));
    }

    /// What is counted of all that happens.
    pub(super) fn counts(&self) -> &Counts {
        &self.counts
    }

    fn all(&self) -> MutexGuard<'_, HashMap<[u8; 32], Arc<Session>>> {
        self.by_cookie.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a session and returns its cookie.
    pub(super) fn open(
        &self,
        redeemed: Redeemed,
        from: IpAddr,
    ) -> Result<Result<Secret, Full>, ticket::Error> {
        let cookie = ticket::random_text()?;
        let number = random_number()?;
        let mut all = self.all();
        if all.len() >= self.most {
            return Ok(Err(Full::Host));
        }
        let with_ticket = all.values().filter(|session| session.is_by(&redeemed));
        if u32::try_from(with_ticket.count()).unwrap_or(u32::MAX) >= redeemed.grant.viewers {
            return Ok(Err(Full::Ticket));
        }
        let now = Instant::now();
        let session = Arc::new(Session {
            number,
            job: redeemed.job,
            mode: redeemed.grant.mode,
            ticket: redeemed.id,
            expires: redeemed.grant.expires,
            minted_by: redeemed.grant.by,
            from,
            opened: Timestamp::now(),
            begin: now,
            last: Mutex::new(now),
            channels: AtomicUsize::new(0),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            end: watch::Sender::new(None),
            noted: AtomicBool::new(false),
        });
        self.counts.sessions.add(1);
        self.audit.note(&Event::SessionOpened {
            whose: session.whose(),
        });
        all.insert(name_of(cookie.reveal()), session);
        Ok(Ok(cookie))
    }

    /// The session of a cookie, if it is one of this job.
    pub(super) fn of(&self, cookie: &str, job: &JobKey) -> Option<Arc<Session>> {
        let all = self.all();
        let session = all.get(&name_of(cookie)).filter(|s| s.job.key() == job)?;
        Some(Arc::clone(session))
    }

    /// Ends a session and all its channels.
    pub(super) fn end(&self, session: &Session, why: End) {
        let before = self.all().len();
        self.all().retain(|_, other| other.number != session.number);
        if self.all().len() == before {
            return;
        }
        session.end.send_replace(Some(why));
        self.drop_ticket(session, Timestamp::now());
        if let Some(proxy) = self.screens.get().and_then(Weak::upgrade) {
            screen::end(&proxy, session, why);
        }
        session.note_if_over(&self.audit);
    }

    /// Takes a ticket away that opens nothing any more, once nobody is there by it: those of sign-ins would pile up.
    fn drop_ticket(&self, session: &Session, now: Timestamp) {
        let same = |other: &Session| other.ticket == session.ticket && other.job == session.job;
        if session.expires > now || self.all().values().any(|other| same(other)) {
            return;
        }
        if let Err(e) = ticket::revoke(&session.job, &session.ticket) {
            tracing::warn!("an expired ticket stays: {e}");
        }
    }

    /// The session of this number, while it lives.
    pub(super) fn by_number(&self, number: u64) -> Option<Arc<Session>> {
        self.all().values().find(|s| s.number == number).cloned()
    }

    /// Ends the session of this number; false where there is none.
    pub(super) fn end_number(&self, number: u64, why: End) -> bool {
        self.by_number(number)
            .map(|session| self.end(&session, why))
            .is_some()
    }

    pub(super) fn end_all(&self, why: End) {
        let sessions: Vec<_> = self.all().values().cloned().collect();
        sessions.iter().for_each(|session| self.end(session, why));
    }

    /// Ends those whose ticket, machine or time is gone.
    pub(super) fn look(&self, now: Instant) {
        let sessions: Vec<_> = self.all().values().cloned().collect();
        for session in sessions {
            // What cannot be read holds nobody's door open.
            if !ticket::is_live(&session.job).unwrap_or(false) {
                self.end(&session, End::Gone);
            } else if !ticket::holds(&session.job, &session.ticket).unwrap_or(false) {
                self.end(&session, End::Revoked);
            } else if session.is_over(now) {
                self.end(&session, End::Time);
            }
        }
    }

    pub(super) fn list(&self) -> Vec<Shown> {
        let mut list: Vec<Shown> = self.all().values().map(|s| s.shown()).collect();
        list.sort_by_key(|shown| (shown.opened, shown.session));
        list
    }

    /// How many sessions there are, and how many channels in all.
    pub(super) fn size(&self) -> (usize, usize) {
        let all = self.all();
        let channels = all.values().map(|session| session.channels()).sum();
        (all.len(), channels)
    }

    /// Opens a channel of a session.
    pub(super) fn channel(&self, session: &Arc<Session>, name: &'static str) -> Channel {
        session.channels.fetch_add(1, Ordering::Relaxed);
        self.counts.channels.add(1);
        self.audit.note(&Event::ChannelOpened {
            whose: session.whose(),
            channel: name,
        });
        Channel {
            session: Arc::clone(session),
            name,
            begin: Instant::now(),
            sent: 0,
            received: 0,
            audit: Arc::clone(&self.audit),
            counts: Arc::clone(&self.counts),
        }
    }
}

impl Session {
    /// Was it opened with this ticket?
    pub(super) fn is_by(&self, redeemed: &Redeemed) -> bool {
        self.ticket == redeemed.id && self.job == redeemed.job
    }

    /// How many terminals, logs and channels of its screen are open.
    pub(super) fn channels(&self) -> usize {
        self.channels.load(Ordering::Relaxed)
    }

    /// Has nobody ended it?
    pub(super) fn is_live(&self) -> bool {
        self.end.borrow().is_none()
    }

    /// Notes its end, once: when all its channels are closed, so that nothing is missing in what they carried.
    fn note_if_over(&self, audit: &Audit) {
        let why = *self.end.borrow();
        let Some(why) = why.filter(|_| self.channels.load(Ordering::SeqCst) == 0) else {
            return;
        };
        if self.noted.swap(true, Ordering::SeqCst) {
            return;
        }
        audit.note(&Event::SessionClosed {
            whose: self.whose(),
            reason: &why.to_string(),
            carried: Carried {
                seconds: self.begin.elapsed().as_secs_f64(),
                bytes_sent: self.sent.load(Ordering::Relaxed),
                bytes_received: self.received.load(Ordering::Relaxed),
            },
        });
    }

    fn whose(&self) -> Whose<'_> {
        Whose {
            session: self.number,
            job: self.job.key(),
            ticket: self.ticket.short(),
            minted_by: &self.minted_by,
            mode: self.mode,
            from: self.from,
        }
    }

    /// Keeps it for so long, though nothing be open: what it has handed out is good only while it lives.
    pub(super) fn keep(&self, time: Duration, now: Instant) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        *last = (*last).max(now + time.saturating_sub(IDLE));
    }

    fn is_over(&self, now: Instant) -> bool {
        let last = *self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = self.channels() == 0 && now.saturating_duration_since(last) > IDLE;
        idle || now.saturating_duration_since(self.begin) > ticket::LONGEST_SESSION
    }

    fn shown(&self) -> Shown {
        Shown {
            session: self.number,
            job: self.job.key().clone(),
            ticket: self.ticket.short().to_owned(),
            minted_by: self.minted_by.clone(),
            mode: self.mode,
            from: self.from,
            opened: self.opened,
            channels: self.channels(),
            bytes_sent: self.sent.load(Ordering::Relaxed),
            bytes_received: self.received.load(Ordering::Relaxed),
        }
    }

    /// Waits until it is over, and says why.
    pub(super) async fn ended(&self) -> End {
        let mut end = self.end.subscribe();
        match end.wait_for(Option::is_some).await {
            Ok(why) => why.unwrap_or(End::Stopping),
            // Its sender is part of the session that we hold.
            Err(_) => End::Stopping,
        }
    }
}

/// An open terminal, log or screen; dropping it closes it.
#[derive(Debug)]
pub(super) struct Channel {
    pub(super) session: Arc<Session>,
    name: &'static str,
    begin: Instant,
    sent: u64,
    received: u64,
    audit: Arc<Audit>,
    counts: Arc<Counts>,
}

impl Channel {
    /// So many bytes went to the viewer.
    pub(super) fn sent(&mut self, bytes: usize) {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        self.sent += bytes;
        self.session.sent.fetch_add(bytes, Ordering::Relaxed);
        self.counts.sent.add(bytes);
    }

    /// So many bytes came from the viewer.
    pub(super) fn received(&mut self, bytes: usize) {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        self.received += bytes;
        self.session.received.fetch_add(bytes, Ordering::Relaxed);
        self.counts.received.add(bytes);
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.session.keep(IDLE, Instant::now());
        self.audit.note(&Event::ChannelClosed {
            whose: self.session.whose(),
            channel: self.name,
            carried: Carried {
                seconds: self.begin.elapsed().as_secs_f64(),
                bytes_sent: self.sent,
                bytes_received: self.received,
            },
        });
        self.session.channels.fetch_sub(1, Ordering::SeqCst);
        self.session.note_if_over(&self.audit);
    }
}

#[cfg(test)]
mod tests;
