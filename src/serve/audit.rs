//! Who saw and entered which machine, as JSON lines. Nothing of what they typed or saw is in it, and no secret.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use jiff::Timestamp;
use serde::Serialize;

use crate::record::JobKey;
use crate::ticket::Mode;

/// Names and addresses are not for everybody.
const MODE: u32 = 0o640;

/// One line.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub(super) enum Event<'a> {
    /// A ticket was minted over the API.
    TicketMinted {
        job: &'a JobKey,
        ticket: &'a str,
        mode: Mode,
        from: IpAddr,
    },
    /// Somebody came in.
    SessionOpened {
        session: u64,
        job: &'a JobKey,
        ticket: &'a str,
        minted_by: &'a str,
        mode: Mode,
        from: IpAddr,
    },
    /// A terminal, the serial log or the screen was opened.
    ChannelOpened { session: u64, channel: &'a str },
    /// And closed.
    ChannelClosed {
        session: u64,
        channel: &'a str,
        seconds: f64,
        /// To the viewer.
        bytes_sent: u64,
        /// From the viewer.
        bytes_received: u64,
    },
    /// The session is over.
    SessionClosed {
        session: u64,
        job: &'a JobKey,
        reason: &'a str,
        seconds: f64,
        bytes_sent: u64,
        bytes_received: u64,
    },
}

#[derive(Serialize)]
struct Line<'a> {
    time: Timestamp,
    #[serde(flatten)]
    event: &'a Event<'a>,
}

/// The log, where the operator wants one.
#[derive(Debug, Default)]
pub(super) struct Audit(Option<Mutex<File>>);

impl Audit {
    pub(super) fn open(path: Option<&Path>) -> io::Result<Self> {
        let open = |path| OpenOptions::new().create(true).append(true).mode(MODE).open(path);
        Ok(Self(path.map(open).transpose()?.map(Mutex::new)))
    }

    pub(super) fn note(&self, event: &Event<'_>) {
        let Some(file) = &self.0 else { return };
        let line = Line {
            time: Timestamp::now(),
            event,
        };
        let written = serde_json::to_vec(&line)
            .map_err(io::Error::from)
            .and_then(|mut text| {
                text.push(b'\n');
                // One call a line, so that others who append do not come between.
                file.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .write_all(&text)
            });
        if let Err(e) = written {
            tracing::error!("the audit log cannot be written: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_happened_and_when() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.log");
        let audit = Audit::open(Some(&path)).unwrap();
        for channel in ["terminal", "serial"] {
            audit.note(&Event::ChannelOpened { session: 7, channel });
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[1]["event"], "channel-opened");
        assert_eq!(lines[1]["channel"], "serial");
        assert!(lines[1]["time"].as_str().unwrap().parse::<Timestamp>().is_ok());
    }
}
