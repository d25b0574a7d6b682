//! How a pull goes, for the author of the job that needs the image.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::image::{Event, Progress};
use crate::report::{JobLog, Pace, Throttle, age, awaited, bytes, paused, span, unanswered};

/// How often a long wait says a word in the job log.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// Tells the job's author how the pull goes, a line every few seconds.
pub(super) struct PullLog<'a> {
    image: &'a str,
    log: &'a JobLog,
    throttle: Throttle,
    /// Its own, since what does not move is told of meanwhile.
    silence: Throttle,
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
            silence: Throttle::new(PROGRESS_EVERY),
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
            Event::Unanswered {
                registry,
                waited,
                most,
            } if self.silence.due() => {
                format!("Fetching {}: {}.", self.image, unanswered(registry, waited, most))
            }
            Event::Paused { registry, left } if self.silence.due() => {
                format!("Fetching {}: {}.", self.image, paused(registry, left))
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

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    use super::*;

    /// A log that is read afterwards.
    #[derive(Clone, Default)]
    struct Said(Arc<Mutex<Vec<u8>>>);

    impl Write for Said {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_registry_that_does_not_answer_is_told_of_beside_what_does_not_move() {
        let said = Said::default();
        let log = JobLog::new(said.clone());
        let pull = PullLog {
            silence: Throttle::new(Duration::ZERO),
            throttle: Throttle::new(Duration::ZERO),
            ..PullLog::new("r.example.com/vm:1", &log)
        };
        pull.event(Event::Fetching { done: 0, total: 1024 });
        pull.event(Event::Unanswered {
            registry: "r.example.com",
            waited: Duration::from_secs(10),
            most: Duration::from_secs(126),
        });
        pull.event(Event::Paused {
            registry: "r.example.com",
            left: Duration::from_secs(25),
        });
        let said = String::from_utf8(said.0.lock().unwrap().clone()).unwrap();
        assert_eq!(
            said,
            "Fetching r.example.com/vm:1: 0 B of 1.0 KiB.\n\
             Fetching r.example.com/vm:1: waiting for r.example.com, which has not answered for 10.0 s; it is given up after about 2 min 6 s.\n\
             Fetching r.example.com/vm:1: r.example.com has too much to do and asks for a pause, of which 25.0 s are left.\n"
        );
    }
}
