//! What passes, and how long to wait for it: one policy for all requests, and one pause for all requests to a registry.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use tokio::time::Instant;

use super::super::error::Error;

/// Pauses before the second, third and fourth try. Long enough for a load balancer to notice a dead server,
/// short enough that a job's author who looks at the log does not give up.
const PAUSES: [Duration; 3] = [
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(3),
];

/// Part of a pause, in percent, by which it is made longer at random: those who failed together must not all come back
/// together.
const JITTER: u32 = 50;

/// Longest pause that a registry may ask for (`Retry-After`). One that wants more is out of reach: a job's author would
/// rather know it.
const PAUSE_MAX: Duration = Duration::from_secs(120);

/// Progress in a transfer that makes up for an earlier failure, in bytes: one that is cut now and then arrives, one that is
/// cut all the time ends.
const PROGRESS_THAT_COUNTS: u64 = 4 << 20;

/// Most transfers at once from one registry. More than a few connections gain nothing on links that people have.
const WIDTH_MAX: usize = 8;

/// Transfers that end well before a registry that once had too much is given one more at a time.
const GOOD_BEFORE_WIDER: usize = 32;

/// Why a request gave nothing.
pub(super) enum Failure {
    /// Try again; not before the pause, if the registry named one.
    Weather { reason: String, pause: Option<Duration> },
    /// Another try gives the same.
    Final(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

/// Something that may be better at the next try.
pub(super) fn weather(reason: impl Into<String>) -> Failure {
    Failure::Weather {
        reason: reason.into(),
        pause: None,
    }
}

/// How often one thing may still fail.
#[derive(Debug)]
pub(super) struct Patience {
    failed: usize,
    tries: usize,
    counted: u64,
    /// When the first try began, or the first after enough progress.
    since: Instant,
}

impl Patience {
    /// For a registry that nobody can stand in for.
    pub(super) fn new() -> Self {
        Self {
            failed: 0,
            tries: PAUSES.len(),
            counted: 0,
            since: Instant::now(),
        }
    }

    /// For one of several: a second try, and then the next one is asked.
    pub(super) fn short() -> Self {
        Self {
            tries: 1,
            ..Self::new()
        }
    }

    /// So much has arrived in all; enough of it makes up for failures.
    pub(super) fn progress(&mut self, bytes: u64) {
        if bytes.saturating_sub(self.counted) >= PROGRESS_THAT_COUNTS {
            (self.failed, self.counted, self.since) = (0, bytes, Instant::now());
        }
    }

    /// How long all tries take together if each takes so long, and none is followed by a pause that the registry asks for.
    pub(super) fn longest(&self, each: Duration) -> Duration {
        let again = PAUSES[..self.tries].iter();
        each + again
            .map(|pause| with_jitter(*pause, JITTER) + each)
            .sum::<Duration>()
    }

    /// What was tried in vain: how often, for how long, and what was asked for.
    pub(super) fn in_vain(&self, asked_for: &str) -> String {
        match self.failed {
            0 => format!("asked for {asked_for}"),
            failed => format!(
                "asked {} times in {} s for {asked_for}",
                failed + 1,
                self.since.elapsed().as_secs()
            ),
        }
    }

    /// How long to wait before the next try; none when it is enough.
    pub(super) fn pause(&mut self, asked: Option<Duration>) -> Option<Duration> {
        if self.failed >= self.tries || asked.is_some_and(|asked| asked > PAUSE_MAX) {
            return None;
        }
        let usual = PAUSES[self.failed.min(PAUSES.len() - 1)];
        self.failed += 1;
        Some(with_jitter(
            usual.max(asked.unwrap_or_default()),
            random_percent(),
        ))
    }
}

fn with_jitter(pause: Duration, percent: u32) -> Duration {
    pause + pause * (percent % (JITTER + 1)) / 100
}

fn random_percent() -> u32 {
    u32::from(uuid::Uuid::new_v4().as_bytes()[0]) * 100 / 256
}

/// What an answer's `Retry-After` asks for (RFC 9110 §10.2.3): seconds, or a date.
pub(super) fn asked_pause(headers: &HeaderMap, now: Timestamp) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = jiff::fmt::rfc2822::DateTimeParser::new()
        .parse_timestamp(text)
        .ok()?;
    Some(Duration::try_from(date.duration_since(now)).unwrap_or_default())
}

/// Reads bytes as a `Retry-After`; for fuzzers.
#[cfg(any(test, fuzzing))]
pub(in crate::image) fn fuzz(bytes: &[u8]) {
    if let Ok(value) = reqwest::header::HeaderValue::from_bytes(bytes) {
        let headers = HeaderMap::from_iter([(RETRY_AFTER, value)]);
        let pause = asked_pause(&headers, Timestamp::UNIX_EPOCH);
        // What is made of it is bounded.
        assert!(
            Patience::new()
                .pause(pause)
                .is_none_or(|pause| pause <= 2 * PAUSE_MAX)
        );
    }
}

/// What all requests of this process to one registry share.
#[derive(Debug)]
pub(super) struct Gate {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    closed_until: Option<Instant>,
    width: usize,
    good: usize,
}

impl Gate {
    fn new() -> Self {
        Self {
            state: Mutex::new(State {
                closed_until: None,
                width: WIDTH_MAX,
                good: 0,
            }),
        }
    }

    /// The gate of a registry: one for all conversations with it.
    pub(super) fn of(origin: &str) -> Arc<Self> {
        static GATES: OnceLock<Mutex<HashMap<String, Arc<Gate>>>> = OnceLock::new();
        let mut gates = GATES
            .get_or_init(Mutex::default)
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        Arc::clone(
            gates
                .entry(origin.to_owned())
                .or_insert_with(|| Arc::new(Self::new())),
        )
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a pause that the registry asked for is over.
    pub(super) async fn pass(&self) {
        loop {
            let until = self.state().closed_until;
            match until {
                Some(until) if until > Instant::now() => tokio::time::sleep_until(until).await,
                _ => return,
            }
        }
    }

    /// How much is left of a pause that the registry asked for.
    pub(super) fn closed_for(&self) -> Option<Duration> {
        let left = self
            .state()
            .closed_until?
            .saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    /// The registry has too much: nobody asks it before the pause is over, and then fewer at once.
    pub(super) fn close(&self, pause: Duration) {
        let now = Instant::now();
        let until = now + pause.min(PAUSE_MAX);
        let mut state = self.state();
        // Requests that were under way together are told the same; that counts once.
        if state.closed_until.is_none_or(|known| known <= now) {
            state.width = (state.width / 2).max(1);
            state.good = 0;
        }
        if state.closed_until.is_none_or(|known| known < until) {
            state.closed_until = Some(until);
        }
    }

    /// A transfer ended well.
    pub(super) fn went_well(&self) {
        let mut state = self.state();
        if state.width < WIDTH_MAX {
            state.good += 1;
            if state.good >= GOOD_BEFORE_WIDER {
                (state.width, state.good) = (state.width + 1, 0);
            }
        }
    }

    /// How many transfers at once the registry takes.
    pub(super) fn width(&self) -> usize {
        self.state().width
    }
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    #[test]
    fn what_a_registry_asks_for_is_read() {
        let now: Timestamp = "1994-11-06T08:49:00Z".parse().unwrap();
        let mut headers = HeaderMap::new();
        assert_eq!(asked_pause(&headers, now), None);
        for (text, seconds) in [
            ("7", Some(7)),
            (" 0 ", Some(0)),
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(37)),
            // In the past: now.
            ("Sun, 06 Nov 1994 08:48:00 GMT", Some(0)),
            ("99999999999999999999", None),
            ("-1", None),
            ("soon", None),
            ("", None),
        ] {
            headers.insert(RETRY_AFTER, HeaderValue::from_static(text));
            assert_eq!(
                asked_pause(&headers, now),
                seconds.map(Duration::from_secs),
                "{text}"
            );
        }
    }

    #[test]
    fn patience_ends_and_progress_restores_it() {
        let mut patience = Patience::new();
        for usual in PAUSES {
            let pause = patience.pause(None).unwrap();
            assert!(pause >= usual && pause <= usual * 3 / 2, "{pause:?}");
        }
        assert_eq!(patience.pause(None), None);
        patience.progress(PROGRESS_THAT_COUNTS - 1);
        assert_eq!(patience.pause(None), None);
        patience.progress(PROGRESS_THAT_COUNTS);
        assert!(patience.pause(None).is_some());
        // What was counted once does not count again.
        patience.progress(PROGRESS_THAT_COUNTS + 1);
        assert_eq!(
            (
                patience.pause(None).is_some(),
                patience.pause(None).is_some(),
                patience.pause(None)
            ),
            (true, true, None)
        );
        let asked = Duration::from_secs(20);
        assert!(Patience::short().pause(Some(asked)).unwrap() >= asked);
        let (new, short, each) = (Patience::new(), Patience::short(), Duration::from_secs(30));
        assert_eq!(new.longest(each), Duration::from_millis(126_750));
        assert_eq!(short.longest(each), Duration::from_millis(60_750));
        assert_eq!(new.in_vain("/v2/"), "asked for /v2/");
        assert_eq!(patience.in_vain("/v2/"), "asked 4 times in 0 s for /v2/");
        assert_eq!(Patience::new().pause(Some(PAUSE_MAX + asked)), None);
        assert_eq!(with_jitter(Duration::from_secs(10), 50), Duration::from_secs(15));
        assert_eq!(with_jitter(Duration::from_secs(10), 0), Duration::from_secs(10));
    }

    #[tokio::test]
    async fn a_pause_holds_everybody_and_makes_it_narrower() {
        let gate = Gate::new();
        let start = Instant::now();
        gate.pass().await;
        assert_eq!(gate.width(), WIDTH_MAX);
        // Three that were refused together.
        for milliseconds in [50, 90, 20] {
            gate.close(Duration::from_millis(milliseconds));
        }
        assert_eq!(gate.width(), WIDTH_MAX / 2);
        gate.pass().await;
        assert!(start.elapsed() >= Duration::from_millis(90));
        for _ in 0..5 {
            gate.close(Duration::ZERO);
        }
        assert_eq!(gate.width(), 1);
        for _ in 0..GOOD_BEFORE_WIDER {
            gate.went_well();
        }
        assert_eq!(gate.width(), 2);
    }
}
