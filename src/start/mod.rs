//! The one choreography that needs machine and guest together: from a disk in the store to a guest that answers.
//!
//! There is the cold way: the guest boots, and is introduced by what it reads while it boots.

mod cold;
mod hardware;
mod helper;
mod settle;
mod trial;

pub use cold::{Plan, Started, alive, show_serial, target};
pub use hardware::{Hardware, host_arch};
pub use trial::start;

use std::time::{Duration, Instant};

use crate::record::Phase;
use crate::report::seconds;

/// How long each part of prepare took.
#[derive(Debug)]
pub struct Phases {
    last: Instant,
    done: Vec<(&'static str, Duration)>,
}

impl Default for Phases {
    fn default() -> Self {
        Phases {
            last: Instant::now(),
            done: Vec::new(),
        }
    }
}

impl Phases {
    /// A part ended now; it began when the one before it ended.
    pub fn end(&mut self, name: &'static str) {
        let now = Instant::now();
        self.took(name, now - self.last);
        self.last = now;
    }

    /// What comes next begins now: the time until now was told by [`Phases::took`].
    pub fn skip(&mut self) {
        self.last = Instant::now();
    }

    /// A part took so long; parts of one name add up.
    pub fn took(&mut self, name: &'static str, time: Duration) {
        match self.done.iter_mut().find(|(n, _)| *n == name) {
            Some((_, total)) => *total += time,
            None => self.done.push((name, time)),
        }
    }

    /// For the record.
    pub fn record(&self) -> Vec<Phase> {
        let phase = |(name, time): &(&str, Duration)| Phase {
            name: (*name).to_owned(),
            seconds: time.as_secs_f64(),
        };
        self.done.iter().map(phase).collect()
    }

    /// For the job log: `image 0.01 s · overlay 0.02 s · boot 13.9 s`.
    pub fn line(&self) -> String {
        let parts: Vec<String> = self
            .done
            .iter()
            .map(|(name, time)| format!("{name} {}", seconds(*time)))
            .collect();
        parts.join(" · ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_read_as_one_line_and_add_up() {
        let mut phases = Phases::default();
        phases.took("image", Duration::from_millis(10));
        phases.took("boot", Duration::from_millis(10_900));
        phases.took("boot", Duration::from_secs(3));
        assert_eq!(phases.line(), "image 0.01 s · boot 13.9 s");
        assert_eq!(phases.record()[1].seconds, 13.91 - 0.01);
    }
}
