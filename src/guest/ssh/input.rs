//! What a command reads from its standard input.

use std::fs::File;
use std::io::{self, Read};

/// How much of a file is in memory at a time, in bytes: some packets' worth.
const PIECE: usize = 256 << 10;

/// Bytes, or a file of this host that is read while it is sent, from where it stands to its end.
#[derive(Debug)]
pub struct Input {
    bytes: Vec<u8>,
    sent: usize,
    file: Option<File>,
}

impl From<Vec<u8>> for Input {
    fn from(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            sent: 0,
            file: None,
        }
    }
}

impl From<File> for Input {
    fn from(file: File) -> Self {
        Self {
            bytes: Vec::new(),
            sent: 0,
            file: Some(file),
        }
    }
}

impl Input {
    /// What is to be sent next; nothing at the end. The same bytes again until some were [`sent`](Self::sent), since libssh2 wants
    /// them again after it would have blocked.
    pub(super) fn rest(&mut self) -> io::Result<&[u8]> {
        if self.sent == self.bytes.len()
            && let Some(file) = &mut self.file
        {
            self.bytes.resize(PIECE, 0);
            let count = file.read(&mut self.bytes)?;
            self.bytes.truncate(count);
            self.sent = 0;
            if count == 0 {
                self.file = None;
            }
        }
        Ok(self.bytes.get(self.sent..).unwrap_or_default())
    }

    /// So many bytes are on their way.
    pub(super) fn sent(&mut self, count: usize) {
        self.sent += count;
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use super::*;

    fn drain(mut input: Input, at_once: usize) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let rest = input.rest().unwrap();
            if rest.is_empty() {
                return all;
            }
            let count = rest.len().min(at_once);
            all.extend_from_slice(&rest[..count]);
            assert!(rest.len() <= PIECE);
            input.sent(count);
        }
    }

    #[test]
    fn a_file_of_any_length_is_sent_whole_in_pieces() {
        for length in [0, 1, PIECE - 1, PIECE, 2 * PIECE + 7] {
            let bytes: Vec<u8> = (0..=250).cycle().take(length).collect();
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&bytes).unwrap();
            file.rewind().unwrap();
            assert_eq!(drain(file.into(), 32_000), bytes, "{length}");
        }
    }

    #[test]
    fn bytes_are_sent_as_they_are_and_again_until_they_went_out() {
        assert_eq!(drain(vec![7; 100].into(), 33), vec![7; 100]);
        let mut input = Input::from(vec![1, 2]);
        assert_eq!(input.rest().unwrap(), [1, 2]);
        assert_eq!(input.rest().unwrap(), [1, 2]);
    }
}
