//! The job log that the double writes: sections, masked secrets, a limit.

use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use super::super::super::coordinator::Desk;

/// The log of one job.
#[derive(Debug)]
pub(super) struct Trace<'a> {
    desk: &'a Desk,
    id: u64,
    left: Mutex<Option<usize>>,
    masked: Vec<String>,
}

impl<'a> Trace<'a> {
    pub(super) fn new(desk: &'a Desk, id: u64, limit: usize, masked: Vec<String>) -> Self {
        Self {
            desk,
            id,
            left: Mutex::new(Some(limit)),
            masked: masked.into_iter().filter(|secret| !secret.is_empty()).collect(),
        }
    }

    pub(super) fn line(&self, text: &str) {
        self.bytes(format!("{text}\n").as_bytes());
    }

    /// Adds a piece of output, at best a whole line: a secret is found within a piece only.
    pub(super) fn bytes(&self, piece: &[u8]) {
        let piece = self.mask(piece);
        let mut left = self.left.lock().expect("the trace's lock");
        let Some(room) = *left else { return };
        if piece.len() <= room {
            *left = Some(room - piece.len());
            self.desk.log(self.id, &piece);
        } else {
            *left = None;
            self.desk.log(self.id, &piece[..room]);
            self.desk.log(self.id, b"\nJob's log exceeded its limit.\n");
        }
    }

    pub(super) fn section<T>(&self, name: &str, title: &str, body: impl FnOnce() -> T) -> T {
        self.bytes(format!("section_start:{}:{name}\r\x1b[0K", now()).as_bytes());
        self.line(&format!("\x1b[0K\x1b[36;1m{title}\x1b[0;m\x1b[0;m"));
        let value = body();
        self.line(&format!("section_end:{}:{name}\r\x1b[0K", now()));
        value
    }

    fn mask(&self, piece: &[u8]) -> Vec<u8> {
        let mut piece = piece.to_vec();
        for secret in &self.masked {
            let secret = secret.as_bytes();
            while let Some(at) = piece.windows(secret.len()).position(|window| window == secret) {
                piece.splice(at..at + secret.len(), b"[MASKED]".iter().copied());
            }
        }
        piece
    }
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.expect("the clock is past 1970").as_secs()
}
