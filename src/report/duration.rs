//! Lengths of time for people.

use std::time::Duration;

/// Seconds with the digits that matter: `0.01 s`, `0.5 s`, `13.9 s`, `132 s`.
pub fn seconds(d: Duration) -> String {
    let s = d.as_secs_f64();
    match s {
        s if s < 0.095 => format!("{s:.2} s"),
        s if s < 99.95 => format!("{s:.1} s"),
        s => format!("{s:.0} s"),
    }
}

/// A length of time in the units that people count in: `0.5 s`, `13.9 s`, `2 min 3 s`, `1 h 2 min`.
pub fn span(d: Duration) -> String {
    match d.as_secs() {
        0..=99 => seconds(d),
        s @ 100..=3599 => format!("{} min {} s", s / 60, s % 60),
        s => format!("{} h {} min", s / 3600, s % 3600 / 60),
    }
}

/// A moment as people read a clock, to the minute: `2026-11-21 18:45 UTC`.
pub fn minute(at: jiff::Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M UTC").to_string()
}

/// How long something has been there: `45s`, `12m`, `3h`, `2d`.
pub fn age(d: Duration) -> String {
    match d.as_secs() {
        s @ 0..=119 => format!("{s}s"),
        s @ 120..=7199 => format!("{}m", s / 60),
        s @ 7200..=172_799 => format!("{}h", s / 3600),
        s => format!("{}d", s / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_well() {
        for (ms, text) in [
            (4, "0.00 s"),
            (12, "0.01 s"),
            (480, "0.5 s"),
            (13_940, "13.9 s"),
            (132_400, "132 s"),
        ] {
            assert_eq!(seconds(Duration::from_millis(ms)), text);
        }
        for (s, text) in [
            (12, "12.0 s"),
            (99, "99.0 s"),
            (123, "2 min 3 s"),
            (3599, "59 min 59 s"),
            (90_000, "25 h 0 min"),
        ] {
            assert_eq!(span(Duration::from_secs(s)), text);
        }
        assert_eq!(span(Duration::from_millis(99_990)), "100 s");
        for (s, text) in [(45, "45s"), (720, "12m"), (10_800, "3h"), (200_000, "2d")] {
            assert_eq!(age(Duration::from_secs(s)), text);
        }
    }
}
