//! What is said while a registry does not answer, by commands that have no other progress to show.

use std::time::Duration;

use crate::image::{Event, Progress};
use crate::report::{JobLog, Throttle, paused, unanswered};

/// How often a long wait says a word.
const WORD_EVERY: Duration = Duration::from_secs(5);

/// Says a word every few seconds for which registry it waits.
pub(super) struct Patient<'a> {
    log: &'a JobLog,
    throttle: Throttle,
}

impl<'a> Patient<'a> {
    pub(super) fn new(log: &'a JobLog) -> Self {
        Self {
            log,
            throttle: Throttle::new(WORD_EVERY),
        }
    }
}

impl Progress for Patient<'_> {
    fn event(&self, event: Event<'_>) {
        let text = match event {
            Event::Unanswered {
                registry,
                waited,
                most,
            } if self.throttle.due() => unanswered(registry, waited, most),
            Event::Paused { registry, left } if self.throttle.due() => paused(registry, left),
            _ => return,
        };
        self.log.line(format!("cannery: {text}."));
    }
}
