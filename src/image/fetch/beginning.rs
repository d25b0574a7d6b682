//! How a stream began, packed as it is: in a gzip header stands the name of the file that was packed.
//!
//! The bytes are those that are counted and hashed on their way; so what they say is as true as the stream when it is verified,
//! and worth nothing before.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes that are heard. A gzip header without a comment has the name in its first ten and behind them, and no file system has a
/// longer one than 255.
const HEARD: usize = 4096;

/// The first bytes of a stream; none of one that was not sent from its first byte on.
#[derive(Debug, Default)]
pub(super) struct Beginning(Mutex<Option<Vec<u8>>>);

impl Beginning {
    /// A stream is sent from this byte on.
    pub(super) fn begin(&self, offset: u64) {
        *self.lock() = (offset == 0).then(Vec::new);
    }

    /// Its next bytes.
    pub(super) fn add(&self, bytes: &[u8]) {
        if let Some(heard) = self.lock().as_mut() {
            let take = bytes.len().min(HEARD - heard.len());
            heard.extend_from_slice(&bytes[..take]);
        }
    }

    pub(super) fn heard(&self) -> Option<Vec<u8>> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_stream_that_is_sent_from_its_first_byte_has_a_beginning() {
        let beginning = Beginning::default();
        assert_eq!(beginning.heard(), None);
        beginning.begin(0);
        beginning.add(b"gz");
        beginning.add(b"ip");
        assert_eq!(beginning.heard().as_deref(), Some(&b"gzip"[..]));
        beginning.add(&[1; 2 * HEARD]);
        beginning.add(b"more");
        assert_eq!(beginning.heard().map(|heard| heard.len()), Some(HEARD));
        beginning.begin(7);
        beginning.add(b"middle");
        assert_eq!(beginning.heard(), None);
    }
}
