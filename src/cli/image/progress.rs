//! How a pull is shown to whoever waits for it.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::image::{Digest, Event, Progress};
use crate::report::{JobLog, Pace, Throttle, age, awaited, bytes, paused, span, unanswered};

/// How often a line is written where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);
/// How often a bar is drawn even if nothing happens, so that its time runs.
const DRAW_EVERY: Duration = Duration::from_millis(250);
/// What a bar shows: name, bar, bytes, rate, time left.
const BAR: &str = "{prefix} {bar:24} {bytes}/{total_bytes} {bytes_per_sec} {eta} {msg}";
/// What the bar of a layer shows, below that of its image.
const LAYER_BAR: &str = "  {prefix} {bar:24} {bytes}/{total_bytes}";
/// Hexadecimal digits by which people know a layer.
const LAYER_DIGITS: usize = 12;
/// Bars of layers at a time: a terminal has few lines, and no more layers than these come at once.
const LAYERS_MAX: usize = 8;

/// A bar on a terminal, with one for each layer that comes, else a line every few seconds.
pub(super) struct Lines<'a> {
    name: &'a str,
    log: &'a JobLog,
    throttle: Throttle,
    /// Its own, since what does not move is told of meanwhile.
    silence: Throttle,
    pace: Pace,
    /// How many others wait for what is fetched.
    awaited: AtomicUsize,
    bars: Option<Bars>,
}

/// What stands on the terminal.
struct Bars {
    all: MultiProgress,
    image: ProgressBar,
    layers: Mutex<BTreeMap<Digest, ProgressBar>>,
}

impl<'a> Lines<'a> {
    pub(super) fn new(name: &'a str, log: &'a JobLog) -> Self {
        Self {
            name,
            log,
            throttle: Throttle::new(LINE_EVERY),
            silence: Throttle::new(LINE_EVERY),
            pace: Pace::default(),
            awaited: AtomicUsize::new(0),
            bars: std::io::stderr().is_terminal().then(|| Bars::new(name)),
        }
    }

    fn line(&self, text: &str) {
        let line = format!("{}: {text}", self.name);
        match &self.bars {
            Some(bars) => bars.all.suspend(|| self.log.line(line)),
            None => self.log.line(line),
        }
    }

    fn moving(&self, done: u64, total: u64, how: &'static str) {
        let how = format!("{how}{}", awaited(self.awaited.load(Ordering::Relaxed)));
        // Also where no line is due: the rate counts from the first byte.
        let far = self.pace.at(done, total);
        if let Some(Bars { image: bar, .. }) = &self.bars {
            bar.set_length(total);
            bar.set_position(done);
            bar.set_message(how.clone());
        } else if self.throttle.due() {
            self.line(&(far + &how));
        }
    }
}

impl Drop for Lines<'_> {
    fn drop(&mut self) {
        if let Some(bars) = &self.bars {
            bars.clear();
        }
    }
}

impl Progress for Lines<'_> {
    fn event(&self, event: Event<'_>) {
        match event {
            Event::Fetching { done, total } => self.moving(done, total, ""),
            Event::Awaited { by } => self.awaited.store(by, Ordering::Relaxed),
            Event::Layer { digest, done, size } => {
                if let Some(bars) = &self.bars {
                    bars.layer(digest, done, size);
                }
            }
            Event::Writing { done, total } => self.moving(done, total, " (writing)"),
            Event::Waiting {
                waited,
                done,
                total,
                process,
                ..
            } => {
                let who = match process {
                    0 => "another process".to_owned(),
                    process => format!("process {process}"),
                };
                let text = format!(
                    "{who} fetches it: {} of {}; waiting for {}",
                    bytes(done),
                    bytes(total),
                    span(waited)
                );
                match &self.bars {
                    Some(bars) => bars.image.set_message(text),
                    None if self.throttle.due() => self.line(&text),
                    None => {}
                }
            }
            Event::Unanswered {
                registry,
                waited,
                most,
            } if self.silence.due() => self.line(&unanswered(registry, waited, most)),
            Event::Paused { registry, left } if self.silence.due() => self.line(&paused(registry, left)),
            Event::Doubted { .. } => {
                self.line("this host was started again before it was known to be on the disk: comparing it with what came");
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

impl Bars {
    fn new(name: &str) -> Self {
        let all = MultiProgress::new();
        let image = all.add(bar(name.to_owned(), BAR));
        image.enable_steady_tick(DRAW_EVERY);
        let layers = Mutex::default();
        Self { all, image, layers }
    }

    /// Shows a layer while it comes. One that is the whole image has its bar already.
    fn layer(&self, digest: &Digest, done: u64, size: u64) {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        if done >= size || self.image.length() == Some(size) {
            if let Some(bar) = layers.remove(digest) {
                bar.finish_and_clear();
                self.all.remove(&bar);
            }
        } else if layers.contains_key(digest) || layers.len() < LAYERS_MAX {
            let layer = layers.entry(*digest).or_insert_with(|| {
                let name = digest.hex().chars().take(LAYER_DIGITS).collect();
                let layer = self.all.add(bar(name, LAYER_BAR));
                layer.set_length(size);
                layer
            });
            layer.set_position(done);
        }
    }

    fn clear(&self) {
        let layers = std::mem::take(&mut *self.layers.lock().unwrap_or_else(PoisonError::into_inner));
        for bar in layers.values().chain([&self.image]) {
            bar.finish_and_clear();
        }
    }
}

fn bar(name: String, template: &str) -> ProgressBar {
    let bar = ProgressBar::no_length().with_prefix(name);
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_has_a_template_that_can_be_drawn() {
        for template in [BAR, LAYER_BAR] {
            assert!(ProgressStyle::with_template(template).is_ok());
        }
    }

    #[test]
    fn a_layer_has_a_bar_while_it_comes_unless_it_is_the_image() {
        let bars = Bars::new("vm");
        bars.image.set_length(1000);
        let known = || bars.layers.lock().unwrap().len();
        let digest = |number: u64| Digest::of(&number.to_le_bytes());
        bars.layer(&digest(0), 10, 1000);
        assert_eq!(known(), 0, "it is the whole image");
        for number in 0..20 {
            bars.layer(&digest(number), 10, 50);
        }
        assert_eq!(known(), LAYERS_MAX);
        bars.layer(&digest(1), 50, 50);
        assert_eq!(known(), LAYERS_MAX - 1);
        bars.layer(&digest(19), 20, 50);
        assert_eq!(known(), LAYERS_MAX, "there is room for another");
        bars.clear();
        assert_eq!(known(), 0);
    }
}
