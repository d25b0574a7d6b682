//! How far something is, how fast it goes, and how long it will take.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{bytes, span};

/// Less time than this says nothing about a rate.
const RATE_AFTER: Duration = Duration::from_secs(1);

/// Remembers where something began.
#[derive(Debug, Default)]
pub struct Pace {
    /// Of how many bytes the first moved when, and how many were there already.
    begin: Mutex<Option<(u64, Instant, u64)>>,
}

impl Pace {
    /// So many of so many bytes are there: `100.0 MiB of 400.0 MiB, 10.0 MiB/s, 30.0 s left`.
    pub fn at(&self, done: u64, total: u64) -> String {
        let mut begin = self.begin.lock().unwrap_or_else(PoisonError::into_inner);
        // What is fetched and then written moves twice, and has two rates.
        let known = begin.filter(|(of, ..)| *of == total);
        let (_, since, before) = *begin.insert(known.unwrap_or((total, Instant::now(), done)));
        drop(begin);
        written(before, done, total, since.elapsed())
    }
}

/// `before` bytes were there when it began.
fn written(before: u64, done: u64, total: u64, elapsed: Duration) -> String {
    let far = format!("{} of {}", bytes(done), bytes(total));
    let moved = done.saturating_sub(before);
    if elapsed < RATE_AFTER || moved == 0 {
        return far;
    }
    let rate = moved as f64 / elapsed.as_secs_f64();
    let left = Duration::try_from_secs_f64(total.saturating_sub(done) as f64 / rate).unwrap_or(Duration::MAX);
    // More digits than people want to read.
    let per_second = bytes(format!("{rate:.0}").parse().unwrap_or(0));
    format!(
        "{far}, {per_second}/s, {} left",
        span(Duration::from_secs(left.as_secs()))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_far_how_fast_and_how_long() {
        const MIB: u64 = 1 << 20;
        for (before, done, total, seconds, text) in [
            (
                0,
                100 * MIB,
                400 * MIB,
                10,
                "100.0 MiB of 400.0 MiB, 10.0 MiB/s, 30.0 s left",
            ),
            // What was there already did not come at that rate.
            (
                90 * MIB,
                100 * MIB,
                400 * MIB,
                10,
                "100.0 MiB of 400.0 MiB, 1.0 MiB/s, 5 min 0 s left",
            ),
            (0, 0, 400 * MIB, 10, "0 B of 400.0 MiB"),
            (0, MIB, 400 * MIB, 0, "1.0 MiB of 400.0 MiB"),
            (0, MIB, MIB, 1, "1.0 MiB of 1.0 MiB, 1.0 MiB/s, 0.00 s left"),
        ] {
            assert_eq!(written(before, done, total, Duration::from_secs(seconds)), text);
        }
    }
}
