//! Bounds on strangers: how many connections there may be, and how often a ticket may be guessed.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Connections in all: each is a descriptor and some buffers.
const MOST: usize = 2000;
/// Connections of one address, behind which may be an office.
const MOST_OF_ONE: usize = 200;
/// Wrong tickets of one address in a [`PERIOD`]: who pastes wrongly needs a few, and guessing is hopeless anyway.
const WRONG: u32 = 20;
/// After this it may try again.
const PERIOD: Duration = Duration::from_secs(60);
/// Addresses that are remembered; with more, those who are new must wait.
const REMEMBERED: usize = 10_000;

/// Whom an address stands for: a network of IPv6 is one customer.
fn one(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(four) => four.into(),
        IpAddr::V6(six) => {
            let mut parts = six.segments();
            parts[4..].fill(0);
            IpAddr::from(parts)
        }
    }
}

/// The connections that are open.
#[derive(Debug, Default)]
pub(super) struct Connections(Mutex<HashMap<IpAddr, usize>>);

/// A connection's place; dropping it frees it.
#[derive(Debug)]
pub(super) struct Place {
    connections: Arc<Connections>,
    of: IpAddr,
}

impl Connections {
    /// A place for one more, if there is one.
    pub(super) fn place(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let of = one(address);
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if open.values().sum::<usize>() >= MOST || open.get(&of).is_some_and(|n| *n >= MOST_OF_ONE) {
            return None;
        }
        *open.entry(of).or_default() += 1;
        Some(Place {
            connections: Arc::clone(self),
            of,
        })
    }

    pub(super) fn len(&self) -> usize {
        let open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.values().sum()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.connections.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.of) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.of);
            }
        }
    }
}

/// Who has shown wrong tickets.
#[derive(Debug, Default)]
pub(super) struct Guesses(Mutex<HashMap<IpAddr, (u32, Instant)>>);

impl Guesses {
    /// May this address try a ticket?
    pub(super) fn may_try(&self, address: IpAddr, now: Instant) -> bool {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, (_, since)| now.saturating_duration_since(*since) < PERIOD);
        match all.get(&one(address)) {
            Some((count, _)) => *count < WRONG,
            None => all.len() < REMEMBERED,
        }
    }

    /// It has shown a wrong one.
    pub(super) fn wrong(&self, address: IpAddr, now: Instant) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(one(address)).or_insert((0, now)).0 += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_cannot_take_all_places_and_gets_its_own_back() {
        let connections = Arc::new(Connections::default());
        let here: IpAddr = [192, 0, 2, 1].into();
        let mut places: Vec<Place> = (0..MOST_OF_ONE)
            .map(|_| connections.place(here).unwrap())
            .collect();
        assert!(connections.place(here).is_none());
        let mapped: IpAddr = "::ffff:192.0.2.1".parse().unwrap();
        assert!(connections.place(mapped).is_none());
        assert!(connections.place([192, 0, 2, 2].into()).is_some());
        places.pop();
        assert!(connections.place(here).is_some());
        drop(places);
        assert_eq!(connections.len(), 0);
    }

    #[test]
    fn there_are_only_so_many_connections_in_all() {
        let connections = Arc::new(Connections::default());
        let places: Vec<Place> = (0..MOST)
            .map(|n| {
                let [_, _, third, fourth] = u32::try_from(n).unwrap().to_be_bytes();
                connections.place([10, 0, third, fourth].into()).unwrap()
            })
            .collect();
        assert!(connections.place([192, 0, 2, 1].into()).is_none());
        drop(places);
    }

    #[test]
    fn who_guesses_waits_and_others_do_not() {
        let guesses = Guesses::default();
        let now = Instant::now();
        let (guesser, other): (IpAddr, IpAddr) = ("2001:db8::1".parse().unwrap(), [192, 0, 2, 1].into());
        for _ in 0..WRONG {
            assert!(guesses.may_try(guesser, now));
            guesses.wrong(guesser, now);
        }
        assert!(!guesses.may_try(guesser, now));
        assert!(
            !guesses.may_try("2001:db8::2".parse().unwrap(), now),
            "the same network"
        );
        assert!(guesses.may_try(other, now));
        assert!(guesses.may_try(guesser, now + PERIOD));
    }
}
