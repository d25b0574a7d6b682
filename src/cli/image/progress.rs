//! How a pull is shown to whoever waits for it.

use std::time::Duration;

use crate::image::{Event, Progress};
use crate::report::{JobLog, Throttle, bytes};

/// How often a line is written where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// A line every few seconds.
pub(super) struct Lines<'a> {
    name: &'a str,
    log: &'a JobLog,
    throttle: Throttle,
}

impl<'a> Lines<'a> {
    pub(super) fn new(name: &'a str, log: &'a JobLog) -> Self {
        Self {
            name,
            log,
            throttle: Throttle::new(LINE_EVERY),
        }
    }
}

impl Progress for Lines<'_> {
    fn event(&self, event: Event<'_>) {
        let name = self.name;
        let line = match event {
            Event::Waiting { waited, .. } if self.throttle.due() => format!(
                "{name}: another process fetches it; waiting since {} s",
                waited.as_secs()
            ),
            Event::Fetching { done, total } if self.throttle.due() => {
                format!("{name}: {} of {}", bytes(done), bytes(total))
            }
            Event::Writing { done, total } if self.throttle.due() => {
                format!("{name}: {} of {} written", bytes(done), bytes(total))
            }
            Event::PolicyFailed { error } => format!("{name}: {error}; trying the next pull policy"),
            _ => return,
        };
        self.log.line(line);
    }
}
