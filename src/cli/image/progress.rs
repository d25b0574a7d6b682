//! How a pull is shown to whoever waits for it.

use std::io::IsTerminal as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::image::{Event, Progress};
use crate::report::{JobLog, Throttle, age, bytes, span};

/// How often a line is written where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);
/// How often a bar is drawn even if nothing happens, so that its time runs.
const DRAW_EVERY: Duration = Duration::from_millis(250);
/// What a bar shows: name, bar, bytes, rate, time left.
const BAR: &str = "{prefix} {bar:24} {bytes}/{total_bytes} {bytes_per_sec} {eta} {msg}";
/// Less of a pull says nothing about its rate.
const RATE_AFTER: Duration = Duration::from_secs(1);

/// A bar on a terminal, else a line every few seconds.
pub(super) struct Lines<'a> {
    name: &'a str,
    log: &'a JobLog,
    throttle: Throttle,
    /// Of how many bytes the first moved when, and how many were there already.
    begin: Mutex<Option<(u64, Instant, u64)>>,
    bar: Option<ProgressBar>,
}

impl<'a> Lines<'a> {
    pub(super) fn new(name: &'a str, log: &'a JobLog) -> Self {
        Self {
            name,
            log,
            throttle: Throttle::new(LINE_EVERY),
            begin: Mutex::new(None),
            bar: std::io::stderr().is_terminal().then(|| bar(name)),
        }
    }

    fn line(&self, text: &str) {
        let line = format!("{}: {text}", self.name);
        match &self.bar {
            Some(bar) => bar.suspend(|| self.log.line(line)),
            None => self.log.line(line),
        }
    }

    fn moving(&self, done: u64, total: u64, how: &'static str) {
        let mut begin = self.begin.lock().unwrap_or_else(PoisonError::into_inner);
        // What is fetched and then written moves twice, and has two rates.
        let known = begin.filter(|(of, ..)| *of == total);
        let (_, since, before) = *begin.insert(known.unwrap_or((total, Instant::now(), done)));
        drop(begin);
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            bar.set_message(how);
        } else if self.throttle.due() {
            self.line(&(pace(before, done, total, since.elapsed()) + how));
        }
    }
}

impl Drop for Lines<'_> {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Progress for Lines<'_> {
    fn event(&self, event: Event<'_>) {
        match event {
            Event::Fetching { done, total } => self.moving(done, total, ""),
            Event::Writing { done, total } => self.moving(done, total, " (writing)"),
            Event::Waiting {
                waited, done, total, ..
            } => {
                let text = format!(
                    "another process fetches it: {} of {}; waiting since {}",
                    bytes(done),
                    bytes(total),
                    span(waited)
                );
                match &self.bar {
                    Some(bar) => bar.set_message(text),
                    None if self.throttle.due() => self.line(&text),
                    None => {}
                }
            }
            Event::Resumed { kept } => {
                self.line(&format!("{} are here from an earlier pull", bytes(kept)));
            }
            Event::Offline { error, ago } => {
                self.line(&format!("{error}; it is taken as it was {} ago", age(ago)));
            }
            Event::PolicyFailed { error } => self.line(&format!("{error}; trying the next pull policy")),
            _ => {}
        }
    }
}

fn bar(name: &str) -> ProgressBar {
    let bar = ProgressBar::new(0).with_prefix(name.to_owned());
    if let Ok(style) = ProgressStyle::with_template(BAR) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(DRAW_EVERY);
    bar
}

/// How far a pull is, how fast, and how long it will take: `before` bytes were here when it began.
fn pace(before: u64, done: u64, total: u64, elapsed: Duration) -> String {
    let far = format!("{} of {}", bytes(done), bytes(total));
    let fetched = done.saturating_sub(before);
    if elapsed < RATE_AFTER || fetched == 0 {
        return far;
    }
    let rate = fetched as f64 / elapsed.as_secs_f64();
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
            // What was here already was not fetched at that rate.
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
            assert_eq!(pace(before, done, total, Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn a_bar_has_a_template_that_can_be_drawn() {
        assert!(ProgressStyle::with_template(BAR).is_ok());
    }
}
