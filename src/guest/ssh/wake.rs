//! Wakes a connection's thread out of `poll`, and tells it to stop.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};

use super::Error;

/// Shared between a thread and its handle.
#[derive(Debug)]
pub(super) struct Wake {
    event: OwnedFd,
    stop: AtomicBool,
    /// Set by the thread while a channel waits for room, so that its reader knows to ring.
    pub(super) waits_for_room: AtomicBool,
}

impl Wake {
    pub(super) fn new() -> Result<Self, Error> {
        let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).map_err(|e| Error::Host {
            doing: "make an event descriptor",
            reason: e.to_string(),
        })?;
        Ok(Self {
            event,
            stop: AtomicBool::new(false),
            waits_for_room: AtomicBool::new(false),
        })
    }

    /// Makes the thread look around.
    pub(super) fn ring(&self) {
        // The only failure is a counter that is full already: then the thread is awake anyway.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    /// Makes the thread end.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.ring();
    }

    pub(super) fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Takes back all rings so far.
    pub(super) fn calm(&self) {
        let mut count = [0; 8];
        // Nothing to read means that nobody rang.
        let _ = rustix::io::read(&self.event, &mut count);
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
