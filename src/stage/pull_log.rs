//! How a pull goes, for the author of the job that needs the image.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::image::{Event, Progress};
use crate::report::{JobLog, Pace, Throttle, age, awaited, bytes, span};

/// How often a long wait says a word in the job log.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// Tells the job's author how the pull goes, a line every few seconds.
pub(super) struct PullLog<'a> {
    image: &'a str,
    log: &'a JobLog,
    throttle: Throttle,
    pace: Pace,
    /// How many others wait for it.
    awaited: AtomicUsize,
}

impl<'a> PullLog<'a> {
    pub(super) fn new(image: &'a str, log: &'a JobLog) -> Self {
        PullLog {
            image,
            log,
            throttle: Throttle::new(PROGRESS_EVERY),
            pace: Pace::default(),
            awaited: AtomicUsize::new(0),
        }
    }
}

impl Progress for PullLog<'_> {
    fn event(&self, event: Event<'_>) {
        let line = match event {
            Event::Waiting {
                waited, done, total, ..
            } if self.throttle.due() => {
                format!(
                    "Another process is fetching {}, {} of {}: waiting for it for {}.",
                    self.image,
                    bytes(done),
                    bytes(total),
                    span(waited)
                )
            }
            Event::Fetching { done, total } => {
                // Also where no line is due: the rate counts from the first byte.
                let far = self.pace.at(done, total);
                if !self.throttle.due() {
                    return;
                }
                let others = awaited(self.awaited.load(Ordering::Relaxed));
                format!("Fetching {}: {far}{others}.", self.image)
            }
            Event::Awaited { by } => return self.awaited.store(by, Ordering::Relaxed),
            Event::Doubted { .. } => format!(
                "The host was started again before {} was known to be on its disk: comparing it with what came.",
                self.image
            ),
            Event::Offline { error, ago } => format!(
                "{error}. {} is taken from the cache: its registry allowed this project to have it {} ago.",
                self.image,
                age(ago)
            ),
            Event::PolicyFailed { error } => format!("{}. Trying the next pull policy.", error),
            _ => return,
        };
        self.log.line(line);
    }
}
