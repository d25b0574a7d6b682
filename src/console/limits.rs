//! How many may wait at the door, and how often one may knock in vain.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What one proxy takes on. The defaults suit a host with some tens of machines.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections that have not shown a good ticket yet, from everywhere; counted from accept.
    pub waiting: usize,
    /// The same from one address. Viewers open one connection per channel, so less than ten stops a single one.
    pub waiting_per_address: usize,
    /// Wrong tickets from one address in a minute, after which it is not listened to for the rest of that minute. Whoever was
    /// shown a key and brought no ticket at all counts, too.
    pub wrong_tickets: u32,
    /// Keys that one address is shown at once, with good tickets or not: one for each channel. A viewer has four to eight, and
    /// some thirty viewers may share an address. As many come anew in a minute.
    pub keys_per_address: u32,
    /// Sessions.
    pub sessions: usize,
    /// Channels of one session.
    pub channels: usize,
    /// How often in a minute the viewers of one machine may take it from each other.
    pub takeovers: usize,
    /// Keys that are made ahead; each channel takes one.
    pub keys: usize,
    /// Bytes of a session's machine that its viewer has not taken, on all of its channels; past it the session ends. A machine
    /// that draws is never made to wait, since QEMU waits for it in the thread of its control connection, so what a slow
    /// viewer has not taken lies here. A full HD screen has 8 MiB without any compression.
    pub untaken: usize,
    /// The same of all sessions together: past it the one for whose viewer most waits ends.
    pub untaken_by_all: usize,
    /// How long a byte may wait for its viewer; past it the session ends. With 1 Mbit/s, 7 MB are taken in a minute: some
    /// full HD screens of what guests show, when they change all at once.
    pub untaken_for: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            waiting: 512,
            waiting_per_address: 64,
            wrong_tickets: 30,
            keys_per_address: 240,
            sessions: 500,
            channels: 32,
            takeovers: 6,
            keys: 600,
            untaken: 32 << 20,
            untaken_by_all: 256 << 20,
            untaken_for: Duration::from_secs(60),
        }
    }
}

/// For how long wrong tickets and takeovers are counted.
pub(super) const COUNTED: Duration = Duration::from_secs(60);

/// Most addresses of which wrong tickets are remembered.
const ADDRESSES_MAX: usize = 10_000;

/// The addresses that one owner has: one of IPv4, a /64 of IPv6.
pub(crate) fn owner(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(six) => IpAddr::V6(Ipv6Addr::from_bits(six.to_bits() & (!0 << 64))),
        four @ IpAddr::V4(_) => four,
    }
}

#[derive(Debug)]
struct Counts {
    wrong: Wrong,
    shown: Shown,
    waiting: usize,
    by_owner: HashMap<IpAddr, usize>,
}

/// Who has shown wrong tickets lately.
#[derive(Debug)]
pub(crate) struct Wrong {
    most: u32,
    by_owner: HashMap<IpAddr, (u32, Instant)>,
}

impl Wrong {
    /// So many from one owner in a minute, and it is not listened to for the rest of that minute.
    pub(crate) fn new(most: u32) -> Self {
        Self {
            most,
            by_owner: HashMap::new(),
        }
    }

    /// May this address try one?
    pub(crate) fn may_try(&self, address: IpAddr, now: Instant) -> bool {
        let noted = self.by_owner.get(&owner(address));
        noted.is_none_or(|(count, since)| *count < self.most || !counts(*since, now))
    }

    /// It has shown a wrong one. Where too many addresses have, those who are new are not noted: nobody who shows a good one is kept
    /// out by others, and tickets are too long to be guessed by however many.
    pub(crate) fn note(&mut self, address: IpAddr, now: Instant) {
        if self.by_owner.len() >= ADDRESSES_MAX {
            self.by_owner.retain(|_, (_, since)| counts(*since, now));
        }
        let owner = owner(address);
        if self.by_owner.len() >= ADDRESSES_MAX && !self.by_owner.contains_key(&owner) {
            return;
        }
        let (count, since) = self.by_owner.entry(owner).or_insert((0, now));
        if !counts(*since, now) {
            (*count, *since) = (0, now);
        }
        *count = count.saturating_add(1);
    }
}

/// How many keys addresses were shown lately: a bucket for each, which is empty at first and runs out evenly in a minute.
#[derive(Debug)]
struct Shown {
    most: u32,
    by_owner: HashMap<IpAddr, (f64, Instant)>,
}

impl Shown {
    fn new(most: u32) -> Self {
        Self {
            most,
            by_owner: HashMap::new(),
        }
    }

    /// What is left in a bucket now.
    fn left(most: u32, (filled, since): (f64, Instant), now: Instant) -> f64 {
        let passed = now.saturating_duration_since(since).as_secs_f64() / COUNTED.as_secs_f64();
        (filled - passed * f64::from(most)).max(0.0)
    }

    /// Counts one more, unless there are too many. Where too many addresses are noted, those that are new are not.
    fn one_more(&mut self, address: IpAddr, now: Instant) -> bool {
        let most = self.most;
        if self.by_owner.len() >= ADDRESSES_MAX {
            self.by_owner
                .retain(|_, bucket| Self::left(most, *bucket, now) > 0.0);
        }
        let owner = owner(address);
        if self.by_owner.len() >= ADDRESSES_MAX && !self.by_owner.contains_key(&owner) {
            return true;
        }
        let bucket = self.by_owner.entry(owner).or_insert((0.0, now));
        let filled = Self::left(most, *bucket, now) + 1.0;
        let fits = filled <= f64::from(most);
        if fits {
            *bucket = (filled, now);
        }
        fits
    }
}

/// Whether a minute that began then is not over.
fn counts(since: Instant, now: Instant) -> bool {
    now.saturating_duration_since(since) < COUNTED
}

/// Who waits at the door.
#[derive(Debug, Clone)]
pub(super) struct Door {
    counts: Arc<Mutex<Counts>>,
    total: usize,
    per_owner: usize,
}

/// One place at the door, given back when dropped.
#[derive(Debug)]
pub(super) struct Pass {
    counts: Arc<Mutex<Counts>>,
    owner: IpAddr,
}

impl Door {
    pub(super) fn new(limits: &Limits) -> Self {
        Door {
            counts: Arc::new(Mutex::new(Counts {
                wrong: Wrong::new(limits.wrong_tickets),
                shown: Shown::new(limits.keys_per_address),
                waiting: 0,
                by_owner: HashMap::new(),
            })),
            total: limits.waiting,
            per_owner: limits.waiting_per_address,
        }
    }

    /// Takes a place, if there is one for this address.
    pub(super) fn enter(&self, address: IpAddr) -> Option<Pass> {
        let owner = owner(address);
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let same = counts.by_owner.get(&owner).copied().unwrap_or(0);
        let guessing = !counts.wrong.may_try(address, Instant::now());
        if counts.waiting >= self.total || same >= self.per_owner || guessing {
            return None;
        }
        counts.waiting += 1;
        counts.by_owner.insert(owner, same + 1);
        Some(Pass {
            counts: Arc::clone(&self.counts),
            owner,
        })
    }

    /// Notes a wrong ticket.
    pub(super) fn wrong(&self, address: IpAddr) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.wrong.note(address, Instant::now());
    }

    /// Whether this address may be shown a key, which counts.
    pub(super) fn may_have_key(&self, address: IpAddr) -> bool {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.shown.one_more(address, Instant::now())
    }

    /// How many wait.
    pub(super) fn waiting(&self) -> usize {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).waiting
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.waiting = counts.waiting.saturating_sub(1);
        if let Some(same) = counts.by_owner.get_mut(&self.owner) {
            *same -= 1;
            if *same == 0 {
                counts.by_owner.remove(&self.owner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn door(waiting: usize, per_address: usize, wrong: u32) -> Door {
        Door::new(&Limits {
            waiting,
            waiting_per_address: per_address,
            wrong_tickets: wrong,
            ..Limits::default()
        })
    }

    fn at(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn places_are_counted_in_all_and_by_owner_and_given_back() {
        let door = door(3, 2, 9);
        let first = door.enter(at("192.0.2.1")).unwrap();
        let _second = door.enter(at("::ffff:192.0.2.1")).unwrap();
        assert!(door.enter(at("192.0.2.1")).is_none(), "two from one address");
        let _third = door.enter(at("2001:db8::1")).unwrap();
        assert!(door.enter(at("192.0.2.9")).is_none(), "three in all");
        drop(first);
        let _fourth = door.enter(at("2001:db8::2")).unwrap();
        assert!(door.enter(at("2001:db8::3")).is_none(), "one owner has a /64");
        assert_eq!(door.waiting(), 3);
    }

    #[test]
    fn a_minute_after_the_first_wrong_ticket_one_may_try_again_and_nobody_keeps_others_out() {
        let now = Instant::now();
        let mut wrong = Wrong::new(2);
        let (guesser, same) = (at("2001:db8::1"), at("2001:db8::2"));
        for second in [0, 59] {
            assert!(wrong.may_try(same, now + Duration::from_secs(second)));
            wrong.note(guesser, now + Duration::from_secs(second));
        }
        assert!(
            !wrong.may_try(same, now + Duration::from_secs(59)),
            "the same network"
        );
        assert!(wrong.may_try(at("192.0.2.1"), now));
        assert!(wrong.may_try(same, now + COUNTED));
        wrong.note(guesser, now + COUNTED);
        assert!(wrong.may_try(same, now + COUNTED), "counted anew");

        for n in 0..ADDRESSES_MAX {
            let n = u32::try_from(n).unwrap();
            wrong.note(std::net::Ipv4Addr::from_bits(n).into(), now + COUNTED);
        }
        for _ in 0..5 {
            wrong.note(at("192.0.2.9"), now + COUNTED);
        }
        assert!(wrong.may_try(at("192.0.2.9"), now + COUNTED));
        assert!(wrong.by_owner.len() <= ADDRESSES_MAX);
    }

    #[test]
    fn who_guesses_tickets_is_not_listened_to_and_others_are() {
        let door = door(9, 9, 2);
        door.wrong(at("192.0.2.1"));
        assert!(door.enter(at("192.0.2.1")).is_some());
        door.wrong(at("192.0.2.1"));
        assert!(door.enter(at("192.0.2.1")).is_none());
        assert!(door.enter(at("192.0.2.2")).is_some());
    }

    #[test]
    fn an_address_is_shown_so_many_keys_at_once_and_as_many_in_a_minute() {
        let now = Instant::now();
        let mut shown = Shown::new(60);
        let (one, same) = (at("2001:db8::1"), at("2001:db8::2"));
        assert!((0..60).all(|_| shown.one_more(one, now)));
        assert!(!shown.one_more(same, now) && shown.one_more(at("192.0.2.1"), now));
        let later = now + Duration::from_secs(2);
        assert!(shown.one_more(one, later) && shown.one_more(one, later));
        assert!(!shown.one_more(one, later));
        assert!((0..60).all(|_| shown.one_more(one, later + COUNTED)));
    }
}
