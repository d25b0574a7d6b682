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

/// Whose session it is: in each of its lines, so that none needs another one to be understood.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Whose<'a> {
    /// A random number, so that no two runs of the console have the same.
    pub(super) session: u64,
    pub(super) job: &'a JobKey,
    pub(super) ticket: &'a str,
    pub(super) minted_by: &'a str,
    pub(super) mode: Mode,
    pub(super) from: IpAddr,
}

/// What went through.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Carried {
    pub(super) seconds: f64,
    /// To the viewer.
    pub(super) bytes_sent: u64,
    /// From the viewer.
    pub(super) bytes_received: u64,
}

/// One line.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub(super) enum Event<'a> {
    /// A ticket was minted: over the API, or by somebody on this host.
    TicketMinted {
        job: &'a JobKey,
        ticket: &'a str,
        minted_by: &'a str,
        mode: Mode,
        #[serde(skip_serializing_if = "Option::is_none")]
        from: Option<IpAddr>,
    },
    /// Somebody came in.
    SessionOpened {
        #[serde(flatten)]
        whose: Whose<'a>,
    },
    /// A terminal, the serial log or the screen was opened.
    ChannelOpened {
        #[serde(flatten)]
        whose: Whose<'a>,
        channel: &'a str,
    },
    /// And closed.
    ChannelClosed {
        #[serde(flatten)]
        whose: Whose<'a>,
        channel: &'a str,
        #[serde(flatten)]
        carried: Carried,
    },
    /// The session is over.
    SessionClosed {
        #[serde(flatten)]
        whose: Whose<'a>,
        reason: &'a str,
        #[serde(flatten)]
        carried: Carried,
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

    /// The log that `cannery serve` writes, for another process of this host. One that is not there yet is not made: it would be
    /// another user's.
    pub(super) fn beside(path: Option<&Path>) -> Self {
        let open = |path: &Path| {
            OpenOptions::new()
                .append(true)
                .open(path)
                .inspect_err(|e| tracing::warn!("console.audit_log {} is not written: {e}", path.display()))
        };
        Self(path.and_then(|path| open(path).ok()).map(Mutex::new))
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
        let job = "aaaa1111-7-1".parse().unwrap();
        let whose = Whose {
            session: 7,
            job: &job,
            ticket: "abc",
            minted_by: "root",
            mode: Mode::Full,
            from: [192, 0, 2, 1].into(),
        };
        for channel in ["terminal", "serial"] {
            audit.note(&Event::ChannelOpened { whose, channel });
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[1]["event"], "channel-opened");
        assert_eq!(lines[1]["channel"], "serial");
        assert_eq!(lines[1]["job"], "aaaa1111-7-1");
        assert_eq!(lines[1]["minted_by"], "root");
        assert_eq!(lines[1]["from"], "192.0.2.1");
        assert!(lines[1]["time"].as_str().unwrap().parse::<Timestamp>().is_ok());
    }
}
