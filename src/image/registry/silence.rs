//! How long a registry has said nothing to us who wait for it, over all tries: neither given or taken anything, nor refused it.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// A registry that is up answers sooner. Who waits longer than this wants to know for whom.
const WORTH_A_WORD: Duration = Duration::from_secs(5);

/// A registry that is waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::image) struct Unanswered {
    /// `host[:port]`.
    pub(in crate::image) registry: String,
    /// For how long it has said nothing.
    pub(in crate::image) waited: Duration,
    /// After how long it is given up, more or less.
    pub(in crate::image) most: Duration,
    /// How much is left of a pause that it has asked for.
    pub(in crate::image) pause: Option<Duration>,
}

/// What all requests to one registry know of its silence.
#[derive(Debug, Default)]
pub(super) struct Silence {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// How many wait.
    waiting: usize,
    /// When something was heard last, or the first of them began.
    since: Option<Instant>,
    /// When we ask again, of our own choice.
    rests_until: Option<Instant>,
}

/// Somebody waits for as long as this value lives.
#[derive(Debug)]
pub(super) struct Waiting<'a>(&'a Silence);

impl Silence {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody begins to wait.
    pub(super) fn wait(&self) -> Waiting<'_> {
        let mut state = self.state();
        state.waiting += 1;
        state.since.get_or_insert_with(Instant::now);
        Waiting(self)
    }

    /// Something came, was taken, or failed.
    pub(super) fn heard(&self) {
        let mut state = self.state();
        state.since = (state.waiting > 0).then(Instant::now);
    }

    /// A pause was asked for, and we keep one of this length.
    pub(super) fn rest(&self, pause: Duration) {
        self.state().rests_until = Some(Instant::now() + pause);
    }

    /// How much is left of it.
    pub(super) fn rests(&self) -> Option<Duration> {
        let left = self
            .state()
            .rests_until?
            .saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    /// How long those who wait have heard nothing; none while that is not worth a word.
    pub(super) fn lasts(&self) -> Option<Duration> {
        let State {
            since, rests_until, ..
        } = *self.state();
        // What we have rested is no silence of the registry's.
        let rested = rests_until.filter(|until| *until <= Instant::now());
        Some(since?.max(rested.unwrap_or(since?)).elapsed()).filter(|waited| *waited >= WORTH_A_WORD)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.waiting -= 1;
        if state.waiting == 0 {
            state.since = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn silence_lasts_until_something_comes_or_nobody_waits() {
        let silence = Silence::default();
        let pass = |seconds| tokio::time::advance(Duration::from_secs(seconds));
        let lasts = || silence.lasts().map(|waited| waited.as_secs());
        silence.heard();
        pass(60).await;
        assert_eq!(lasts(), None, "nobody waits");
        let first = silence.wait();
        pass(4).await;
        assert_eq!(lasts(), None, "it is too soon");
        let second = silence.wait();
        pass(3).await;
        assert_eq!(lasts(), Some(7));
        drop(second);
        assert_eq!(lasts(), Some(7), "the first one still waits");
        silence.heard();
        pass(6).await;
        assert_eq!(lasts(), Some(6));
        drop(first);
        assert_eq!(lasts(), None);
        let _third = silence.wait();
        assert_eq!(lasts(), None, "what was before does not count");
        silence.rest(Duration::from_secs(30));
        pass(20).await;
        let rests = || silence.rests().map(|left| left.as_secs());
        assert_eq!((rests(), lasts()), (Some(10), Some(20)));
        pass(11).await;
        assert_eq!((rests(), lasts()), (None, None), "it was we who waited");
        pass(6).await;
        assert_eq!(lasts(), Some(7));
    }
}
