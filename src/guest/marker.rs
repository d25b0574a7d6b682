//! Finds the wrapper's own words in the stream of a script's output.
//!
//! The wrapper in the guest (see [`super::shell`]) writes `RS nonce SP word LF` into the very pipe that the script
//! writes to, where RS is the byte 0x1e and the nonce is 32 hexadecimal digits that no script can guess. What stands before
//! such a line in the stream was written before it. The scanner takes the stream in pieces of any size and gives
//! the script's bytes out at once, but for those that may yet turn out to be the beginning of a marker.

/// Begins every marker: ASCII's record separator, rare in output, so that little of it is ever held back.
const START: u8 = 0x1e;
/// Longest word that a marker carries; longer ones are output that looks alike.
const LONGEST_WORD: usize = 24;

/// One piece of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Bytes that are no marker.
    Bytes(Vec<u8>),
    /// A marker's word, such as `start` or `exit 3`.
    Word(String),
}

/// Tells markers from other bytes.
#[derive(Debug)]
pub struct Scanner {
    prefix: Vec<u8>,
    held: Vec<u8>,
}

impl Scanner {
    /// A scanner for markers with this nonce.
    pub fn new(nonce: &str) -> Self {
        let mut prefix = vec![START];
        prefix.extend_from_slice(nonce.as_bytes());
        prefix.push(b' ');
        Self {
            prefix,
            held: Vec::new(),
        }
    }

    /// Takes the next bytes of the stream and returns what is now certain, in order.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut plain = Vec::new();
        let joined;
        let mut rest = if self.held.is_empty() {
            bytes
        } else {
            self.held.extend_from_slice(bytes);
            joined = std::mem::take(&mut self.held);
            &joined
        };
        while !rest.is_empty() {
            let Some(at) = rest.iter().position(|&b| b == START) else {
                plain.extend_from_slice(rest);
                break;
            };
            plain.extend_from_slice(&rest[..at]);
            rest = &rest[at..];
            match self.marker(rest) {
                Look::Marker(word, length) => {
                    if !plain.is_empty() {
                        pieces.push(Piece::Bytes(std::mem::take(&mut plain)));
                    }
                    pieces.push(Piece::Word(word));
                    rest = &rest[length..];
                }
                Look::Other => {
                    plain.push(START);
                    rest = &rest[1..];
                }
                Look::Undecided => {
                    self.held = rest.to_vec();
                    break;
                }
            }
        }
        if !plain.is_empty() {
            pieces.push(Piece::Bytes(plain));
        }
        pieces
    }

    /// What is held back when the stream ends: bytes that began like a marker and were none.
    pub fn finish(self) -> Vec<u8> {
        self.held
    }

    fn marker(&self, bytes: &[u8]) -> Look {
        let known = bytes.len().min(self.prefix.len());
        if bytes[..known] != self.prefix[..known] {
            return Look::Other;
        }
        let word = &bytes[known..];
        match word.iter().take(LONGEST_WORD + 1).position(|&b| b == b'\n') {
            Some(end) => match std::str::from_utf8(&word[..end]) {
                Ok(text) => Look::Marker(text.to_owned(), known + end + 1),
                Err(_) => Look::Other,
            },
            None if word.len() > LONGEST_WORD => Look::Other,
            None => Look::Undecided,
        }
    }
}

enum Look {
    Marker(String, usize),
    Other,
    Undecided,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NONCE: &str = "0123456789abcdef0123456789abcdef";

    fn mark(word: &str) -> Vec<u8> {
        format!("\x1e{NONCE} {word}\n").into_bytes()
    }

    /// Everything in one line of bytes and one list of words with the place where each stood.
    fn scan(stream: &[u8], cuts: &[usize]) -> (Vec<u8>, Vec<(usize, String)>) {
        let mut scanner = Scanner::new(NONCE);
        let (mut bytes, mut words) = (Vec::new(), Vec::new());
        let mut from = 0;
        for &cut in cuts.iter().chain([&stream.len()]) {
            let cut = cut.clamp(from, stream.len());
            for piece in scanner.feed(&stream[from..cut]) {
                match piece {
                    Piece::Bytes(b) => bytes.extend(b),
                    Piece::Word(w) => words.push((bytes.len(), w)),
                }
            }
            from = cut;
        }
        bytes.extend(scanner.finish());
        (bytes, words)
    }

    #[test]
    fn output_without_a_newline_at_its_end_stays_so() {
        let stream = [b"no newline".to_vec(), mark("exit 0")].concat();
        assert_eq!(
            scan(&stream, &[]),
            (b"no newline".to_vec(), vec![(10, "exit 0".into())])
        );
    }

    #[test]
    fn a_prompt_is_given_out_at_once() {
        let mut scanner = Scanner::new(NONCE);
        assert_eq!(
            scanner.feed(b"Password: "),
            [Piece::Bytes(b"Password: ".to_vec())]
        );
    }

    #[test]
    fn look_alikes_are_output() {
        for text in [
            "\x1e".to_owned(),
            "\x1e\x1e\x1e".to_owned(),
            format!("\x1e{NONCE}"),
            format!("{NONCE} exit 0\n"),
            format!("\x1e{} exit 0\n", NONCE.replace('0', "1")),
            format!("\x1e{NONCE} a word that is far too long for any marker\n"),
        ] {
            assert_eq!(scan(text.as_bytes(), &[]), (text.into_bytes(), vec![]));
        }
    }

    #[test]
    fn a_half_marker_before_a_whole_one_is_output() {
        let half = format!("\x1e{}", &NONCE[..7]).into_bytes();
        let stream = [half.clone(), mark("exit 7")].concat();
        assert_eq!(scan(&stream, &[3, 5, 9, 20]), (half, vec![(8, "exit 7".into())]));
    }

    proptest! {
        #[test]
        fn nothing_is_lost_added_or_moved(
            before in proptest::collection::vec(prop_oneof![Just(0x1e_u8), Just(b'\n'), Just(b'0'), any::<u8>()], 0..200),
            between in proptest::collection::vec(any::<u8>(), 0..50),
            mut cuts in proptest::collection::vec(0..400_usize, 0..40),
        ) {
            cuts.sort_unstable();
            let stream = [before.clone(), mark("start"), between.clone(), mark("exit 255")].concat();
            let expected = vec![
                (before.len(), "start".to_owned()),
                (before.len() + between.len(), "exit 255".to_owned()),
            ];
            prop_assert_eq!(scan(&stream, &cuts), ([before, between].concat(), expected));
        }
    }
}
