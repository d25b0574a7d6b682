//! What people see: the job log for the job's author, lists for the shell, a log for the operator.

mod duration;
mod job_log;
mod operator_log;
mod pace;
mod table;

use std::time::Duration;

pub use duration::{age, minute, seconds, span};
pub use job_log::{JobLog, Throttle};
pub use operator_log::{OperatorLog, start as start_operator_log};
pub use pace::Pace;
pub use table::table;

/// A number of bytes for people, in binary units with one decimal: `412.0 MiB`.
pub fn bytes(n: u64) -> String {
    let mut value = n as f64;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if unit == "B" {
        format!("{n} B")
    } else {
        format!("{value:.1} {unit}")
    }
}

/// What stands behind a line of progress for which others wait: `; 2 others wait for it`.
pub fn awaited(by: usize) -> String {
    match by {
        0 => String::new(),
        1 => "; another one waits for it".to_owned(),
        others => format!("; {others} others wait for it"),
    }
}

/// That a registry is waited for, which has given nothing for so long and is given up after so long.
pub fn unanswered(registry: &str, waited: Duration, most: Duration) -> String {
    format!(
        "waiting for {}, which has not answered for {}; it is given up after about {}",
        plain(registry, 200),
        span(waited),
        span(most)
    )
}

/// What whoever waits is told of a registry that has too much to do.
pub fn paused(registry: &str, left: Duration) -> String {
    format!(
        "{} has too much to do and asks for a pause, of which {} are left",
        plain(registry, 200),
        span(left)
    )
}

/// A text that came from a stranger, safe to show on a terminal, in a log and in XML: control characters, and those that stand for
/// no character, are left out, and it is not longer than `most` characters.
pub fn plain(text: &str, most: usize) -> String {
    let shown = |c: &char| !c.is_control() && !matches!(c, '\u{fffe}' | '\u{ffff}');
    let mut shown: String = text.chars().filter(shown).take(most).collect();
    if text.chars().count() > most {
        shown.push('…');
    }
    shown
}

/// A text that came from a stranger as one line, safe as [`plain`] makes it: line breaks and tabs become blanks.
pub fn line(text: &str, most: usize) -> String {
    plain(&text.replace(['\n', '\r', '\t'], " "), most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_who_wait_are_counted() {
        let lines: Vec<String> = (0..3).map(awaited).collect();
        assert_eq!(
            lines,
            ["", "; another one waits for it", "; 2 others wait for it"]
        );
    }

    #[test]
    fn a_registry_that_is_waited_for_is_named() {
        let (waited, most) = (Duration::from_secs(10), Duration::from_millis(126_750));
        assert_eq!(
            unanswered("r.example.com\x1b[1m", waited, most),
            "waiting for r.example.com[1m, which has not answered for 10.0 s; it is given up after about 2 min 6 s"
        );
    }

    #[test]
    fn bytes_read_well() {
        for (n, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (432_013_312, "412.0 MiB"),
            (1 << 41, "2.0 TiB"),
        ] {
            assert_eq!(bytes(n), text);
        }
    }

    #[test]
    fn a_strangers_text_cannot_move_the_cursor() {
        assert_eq!(plain("a\x1b[2Jb\r\nc", 10), "a[2Jbc");
        assert_eq!(plain("abcdef", 3), "abc…");
        assert_eq!(line("a\tb\nc\x07", 10), "a b c");
        // XML has no way to write these.
        assert_eq!(plain("a\u{fffe}b\u{ffff}\u{1}é", 10), "abé");
    }
}
