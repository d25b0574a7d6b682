//! Bounds on strangers: how many connections there may be, and how often a ticket may be guessed.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::console::limits::{Wrong, owner};

/// Connections in all: each is a descriptor and some buffers.
const MOST: usize = 2000;
/// Connections of one address, behind which may be an office.
const MOST_OF_ONE: usize = 200;
/// Wrong tickets of one address in a minute: who pastes wrongly needs a few, and guessing is hopeless anyway.
const WRONG: u32 = 20;

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
        let of = owner(address);
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
#[derive(Debug)]
pub(super) struct Guesses(Mutex<Wrong>);

impl Default for Guesses {
    fn default() -> Self {
        Self(Mutex::new(Wrong::new(WRONG)))
    }
}

impl Guesses {
    /// May this address try a ticket?
    pub(super) fn may_try(&self, address: IpAddr, now: Instant) -> bool {
        let wrong = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        wrong.may_try(address, now)
    }

    /// It has shown a wrong one.
    pub(super) fn wrong(&self, address: IpAddr, now: Instant) {
        let mut wrong = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        wrong.note(address, now);
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
}
