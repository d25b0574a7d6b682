//! Who has a machine's screen and may do more than look, for the other processes of this host: each knows its own viewers only.
//!
//! A viewer in full mode holds a shared lock in the job's folder, which the kernel drops with its process. One that may only look, and
//! would take the screen away, tries whether anybody does.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::session::Session;
use crate::record::{JobKey, open_lock};
use crate::ticket::Mode;

/// The lock's file in the job's folder.
const FILE: &str = "screen.lock";
/// Two who try at the same moment are in each other's way: then they try again.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(5);

/// Locks that this process holds, by the session's number: one for each of its viewers.
#[derive(Debug, Default)]
pub(super) struct Leases(Mutex<HashMap<u64, (JobKey, Vec<File>)>>);

impl Leases {
    /// May this session's viewer have the screen? Each yes is given back with [`Leases::leave`]. What goes on in this process is not
    /// asked here.
    pub(super) async fn take(&self, session: &Session) -> bool {
        for tried in 1..=TRIES {
            match self.lock(session) {
                Ok(true) => return true,
                Ok(false) if tried < TRIES => tokio::time::sleep(PAUSE).await,
                Ok(false) => {}
                Err(e) => {
                    // A folder that cannot be locked in is no reason to refuse somebody with a ticket.
                    tracing::warn!("nobody else will know who looks at the screen: {e}");
                    return true;
                }
            }
        }
        false
    }

    fn lock(&self, session: &Session) -> io::Result<bool> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let job = session.job.key();
        let file = open_lock(&session.job.file(FILE))?;
        if session.mode == Mode::Full {
            file.lock_shared()?;
            let (_, locks) = held
                .entry(session.number)
                .or_insert_with(|| (job.clone(), Vec::new()));
            locks.push(file);
            return Ok(true);
        }
        Ok(held.values().any(|(of, _)| of == job) || file.try_lock().is_ok())
    }

    /// One of this session's viewers has left.
    pub(super) fn leave(&self, number: u64) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, locks)) = held.get_mut(&number) {
            locks.pop();
            if locks.is_empty() {
                held.remove(&number);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Place;
    use super::*;

    #[tokio::test]
    async fn who_may_only_look_leaves_the_screen_to_another_process_that_has_it_in_full_mode() {
        let place = Place::new();
        let [typing, looking] = [Mode::Full, Mode::ViewOnly].map(|mode| place.session_that(mode));
        // Two processes.
        let [here, there] = [(); 2].map(|()| Leases::default());
        assert!(there.take(&looking).await);
        for _ in 0..2 {
            assert!(here.take(&typing).await);
        }
        assert!(!there.take(&looking).await);
        assert!(there.take(&typing).await, "it takes the screen over");
        there.leave(typing.number);
        assert!(here.take(&looking).await, "the proxy of this process decides");
        here.leave(typing.number);
        assert!(!there.take(&looking).await, "one is there still");
        here.leave(typing.number);
        assert!(there.take(&looking).await);
    }
}
