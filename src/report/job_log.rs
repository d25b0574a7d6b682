//! The lines that the job's author reads.

use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Writes lines into the job log. A log that cannot be written (the runner is gone) is no reason to stop.
pub struct JobLog {
    out: Mutex<Box<dyn Write + Send>>,
}

impl std::fmt::Debug for JobLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JobLog")
    }
}

impl JobLog {
    /// A log that goes to `out`.
    pub fn new(out: impl Write + Send + 'static) -> Self {
        JobLog {
            out: Mutex::new(Box::new(out)),
        }
    }

    /// A log on standard error: gitlab-runner copies it into the job log while config, prepare and run go.
    pub fn stderr() -> Self {
        JobLog::new(std::io::stderr())
    }

    /// Writes one line.
    pub fn line(&self, text: impl AsRef<str>) {
        let mut line = text.as_ref().to_owned();
        line.push('\n');
        self.raw(line.as_bytes());
    }

    /// Writes bytes as they are.
    pub fn raw(&self, bytes: &[u8]) {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody is left to be told.
        let _ = out.write_all(bytes).and_then(|()| out.flush());
    }
}

/// Lets something through at most once in a while.
#[derive(Debug)]
pub struct Throttle {
    every: Duration,
    last: Mutex<Option<Instant>>,
}

impl Throttle {
    /// Lets something through at most every so often, for the first time after that long.
    pub fn new(every: Duration) -> Self {
        Throttle {
            every,
            last: Mutex::new(Some(Instant::now())),
        }
    }

    /// Is it time?
    pub fn due(&self) -> bool {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last.is_none_or(|at| at.elapsed() >= self.every);
        if due {
            *last = Some(Instant::now());
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_throttle_waits_between_two() {
        let throttle = Throttle::new(Duration::from_millis(30));
        assert!(!throttle.due());
        std::thread::sleep(Duration::from_millis(35));
        assert!(throttle.due());
        assert!(!throttle.due());
    }
}
