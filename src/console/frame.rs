//! Where one message ends and the next begins.
//!
//! A message is a header and a body. The short header, which both sides use when both can, is a type (u16) and the body's
//! size (u32); the long one has a serial number (u64) before and the place of sub-messages (u32) after them.

/// Which headers a connection has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Framing {
    /// 6 bytes.
    Mini,
    /// 18 bytes.
    Full,
}

impl Framing {
    const fn header(self) -> usize {
        match self {
            Framing::Mini => 6,
            Framing::Full => 18,
        }
    }
}

/// What a header says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Head {
    /// The message's serial number; 0 where headers are short.
    pub serial: u64,
    /// The type, whose meaning depends on the kind of channel and on the direction.
    pub message: u16,
    /// Bytes of the body.
    pub size: u32,
    /// Where sub-messages begin in the body; 0 for none.
    pub sub_list: u32,
}

impl Head {
    /// The header's bytes.
    pub fn encode(&self, framing: Framing) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(framing.header());
        if framing == Framing::Full {
            bytes.extend_from_slice(&self.serial.to_le_bytes());
        }
        bytes.extend_from_slice(&self.message.to_le_bytes());
        bytes.extend_from_slice(&self.size.to_le_bytes());
        if framing == Framing::Full {
            bytes.extend_from_slice(&self.sub_list.to_le_bytes());
        }
        bytes
    }

    fn decode(bytes: &[u8; 18], framing: Framing) -> Self {
        let [
            s0,
            s1,
            s2,
            s3,
            s4,
            s5,
            s6,
            s7,
            t0,
            t1,
            z0,
            z1,
            z2,
            z3,
            l0,
            l1,
            l2,
            l3,
        ] = *bytes;
        match framing {
            Framing::Mini => Head {
                serial: 0,
                message: u16::from_le_bytes([s0, s1]),
                size: u32::from_le_bytes([s2, s3, s4, s5]),
                sub_list: 0,
            },
            Framing::Full => Head {
                serial: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
                message: u16::from_le_bytes([t0, t1]),
                size: u32::from_le_bytes([z0, z1, z2, z3]),
                sub_list: u32::from_le_bytes([l0, l1, l2, l3]),
            },
        }
    }
}

/// A part of a stream of messages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Piece<'a> {
    /// A message begins.
    Head(Head),
    /// Bytes of the body of the message that began last.
    Body(&'a [u8]),
}

/// Follows a stream in whatever chunks it comes, and keeps nothing but an unfinished header.
#[derive(Clone, Debug)]
pub struct Frames {
    framing: Framing,
    head: [u8; 18],
    have: usize,
    left: u32,
}

impl Frames {
    /// At the beginning of a stream.
    pub fn new(framing: Framing) -> Self {
        Frames {
            framing,
            head: [0; 18],
            have: 0,
            left: 0,
        }
    }

    /// Which headers it has.
    pub fn framing(&self) -> Framing {
        self.framing
    }

    /// Takes the next piece off the front of `input`. `None` when that is empty, or too short for a header (which is kept).
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Option<Piece<'a>> {
        if self.left > 0 {
            let most = usize::try_from(self.left).unwrap_or(usize::MAX);
            let body = take(input, most);
            // No more than `left`, so it fits.
            self.left -= u32::try_from(body.len()).unwrap_or(self.left);
            return (!body.is_empty()).then_some(Piece::Body(body));
        }
        let missing = self.framing.header().saturating_sub(self.have);
        let more = take(input, missing);
        for (place, byte) in self.head.iter_mut().skip(self.have).zip(more) {
            *place = *byte;
        }
        self.have += more.len();
        if self.have < self.framing.header() {
            return None;
        }
        self.have = 0;
        let head = Head::decode(&self.head, self.framing);
        self.left = head.size;
        Some(Piece::Head(head))
    }

    /// Bytes of the current message's body that are still to come.
    pub fn left(&self) -> u32 {
        self.left
    }

    /// Whether the last message is complete and no other has begun.
    pub fn between(&self) -> bool {
        self.have == 0 && self.left == 0
    }
}

fn take<'a>(input: &mut &'a [u8], most: usize) -> &'a [u8] {
    let (taken, rest) = input.split_at_checked(most).unwrap_or((*input, &[]));
    *input = rest;
    taken
}

/// A message with a short or long header, for tests of those who read them.
#[cfg(test)]
pub(super) fn message(framing: Framing, message: u16, body: &[u8]) -> Vec<u8> {
    let head = Head {
        serial: 7,
        message,
        size: u32::try_from(body.len()).unwrap(),
        sub_list: 0,
    };
    [head.encode(framing), body.to_vec()].concat()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn messages() -> impl Strategy<Value = Vec<(u16, Vec<u8>)>> {
        let one = (any::<u16>(), prop::collection::vec(any::<u8>(), 0..40));
        prop::collection::vec(one, 0..12)
    }

    proptest! {
        #[test]
        fn messages_are_found_whatever_chunks_they_come_in(
            sent in messages(), full: bool, chunk in 1usize..30,
        ) {
            let framing = if full { Framing::Full } else { Framing::Mini };
            let stream: Vec<u8> = sent.iter().flat_map(|(t, b)| message(framing, *t, b)).collect();
            let mut frames = Frames::new(framing);
            let mut seen: Vec<(u16, Vec<u8>)> = Vec::new();
            for mut bytes in stream.chunks(chunk) {
                while let Some(piece) = frames.next(&mut bytes) {
                    match piece {
                        Piece::Head(head) => seen.push((head.message, Vec::new())),
                        Piece::Body(body) => seen.last_mut().unwrap().1.extend_from_slice(body),
                    }
                }
                prop_assert!(bytes.is_empty());
            }
            prop_assert!(frames.between());
            prop_assert_eq!(seen, sent);
        }
    }
}
