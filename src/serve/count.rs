//! What Prometheus is told: numbers of the whole process. No label names a job, a person or an address, so that there are as many
//! series after a year as on the first day.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::console::{Denied, Refusal};

/// Counts since the process began.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) sessions: Count,
    pub(super) channels: Count,
    pub(super) sent: Count,
    pub(super) received: Count,
    pub(super) refused_ticket: Count,
    pub(super) refused_role: Count,
    pub(super) refused_full: Count,
    pub(super) refused_often: Count,
    pub(super) refused_connections: Count,
    pub(super) refused_handshake: Count,
    pub(super) refused_screen: Count,
}

/// One of them.
#[derive(Debug, Default)]
pub(super) struct Count(AtomicU64);

impl Count {
    pub(super) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What is so at the moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Now {
    pub(super) sessions: usize,
    pub(super) channels: usize,
    pub(super) connections: usize,
    /// Connections for a screen that have shown no good ticket yet.
    pub(super) waiting: usize,
    /// RSA keys that are ready: each connection for a screen takes one.
    pub(super) keys: usize,
}

impl Counts {
    /// Somebody who came for a screen was refused.
    pub(super) fn refused(&self, why: &Refusal) {
        let count = match why {
            Refusal::Crowded => &self.refused_connections,
            Refusal::Handshake(_) | Refusal::Tls(_) => &self.refused_handshake,
            Refusal::Denied(Denied::Used | Denied::Full) | Refusal::Full => &self.refused_full,
            // These had a ticket.
            Refusal::Denied(Denied::Taken)
            | Refusal::NotAllowed(_)
            | Refusal::Taken
            | Refusal::TooManyTakeovers
            | Refusal::Ended(_)
            | Refusal::Machine(_)
            | Refusal::Less => &self.refused_screen,
            Refusal::NoTicket | Refusal::Denied(_) | Refusal::NoSession => &self.refused_ticket,
        };
        count.add(1);
    }

    /// The text that Prometheus reads.
    pub(super) fn text(&self, now: Now) -> String {
        let mut text = String::new();
        let mut metric = |name: &str, kind: &str, help: &str, samples: &[(&str, u64)]| {
            // A string takes whatever is written to it.
            let _ = writeln!(
                text,
                "# HELP cannery_console_{name} {help}\n# TYPE cannery_console_{name} {kind}"
            );
            for (labels, value) in samples {
                let _ = writeln!(text, "cannery_console_{name}{labels} {value}");
            }
        };
        let wide = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        metric(
            "sessions",
            "gauge",
            "Sessions that are open.",
            &[("", wide(now.sessions))],
        );
        metric(
            "channels",
            "gauge",
            "Terminals, logs and screens that are open.",
            &[("", wide(now.channels))],
        );
        metric(
            "connections",
            "gauge",
            "Connections that are open.",
            &[("", wide(now.connections))],
        );
        metric(
            "screen_connections_waiting",
            "gauge",
            "Connections for a screen that have shown no good ticket yet.",
            &[("", wide(now.waiting))],
        );
        metric(
            "screen_keys_ready",
            "gauge",
            "Keys that are ready for further connections for a screen.",
            &[("", wide(now.keys))],
        );
        metric(
            "sessions_total",
            "counter",
            "Sessions that were opened.",
            &[("", self.sessions.get())],
        );
        metric(
            "channels_total",
            "counter",
            "Terminals, logs and screens that were opened.",
            &[("", self.channels.get())],
        );
        metric(
            "bytes_total",
            "counter",
            "Bytes that went through the channels.",
            &[
                ("{direction=\"sent\"}", self.sent.get()),
                ("{direction=\"received\"}", self.received.get()),
            ],
        );
        metric(
            "refused_total",
            "counter",
            "Who was not let in, and why.",
            &[
                ("{reason=\"ticket\"}", self.refused_ticket.get()),
                ("{reason=\"role\"}", self.refused_role.get()),
                ("{reason=\"full\"}", self.refused_full.get()),
                ("{reason=\"too-often\"}", self.refused_often.get()),
                ("{reason=\"connections\"}", self.refused_connections.get()),
                ("{reason=\"handshake\"}", self.refused_handshake.get()),
                ("{reason=\"screen\"}", self.refused_screen.get()),
            ],
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_metric_has_a_type_and_its_samples() {
        let counts = Counts::default();
        counts.sent.add(5);
        let text = counts.text(Now {
            sessions: 2,
            channels: 3,
            connections: 4,
            waiting: 5,
            keys: 6,
        });
        assert!(
            text.contains("\ncannery_console_bytes_total{direction=\"sent\"} 5\n"),
            "{text}"
        );
        assert!(text.contains("\ncannery_console_sessions 2\n"), "{text}");
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let name = line.split(['{', ' ']).next().unwrap();
            assert!(text.contains(&format!("# TYPE {name} ")), "{line}");
        }
    }
}
