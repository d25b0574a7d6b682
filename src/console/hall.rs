//! What the machine says on its main channel, where the session gets its number.
//!
//! The number is the first field of the first message; later channels name it. The list of channels that a viewer is
//! offered is cut down to those that it may open, so that none asks in vain. And since messages are told apart here, one of
//! ours can go between two of the machine's: the reason for which a session ends.

use std::time::{SystemTime, UNIX_EPOCH};

use super::channel::{Kind, Kinds};
use super::filter::Violation;
use super::frame::{Frames, Framing, Head, Piece};

/// `SPICE_MSG_NOTIFY`, of all channels.
const NOTIFY: u16 = 7;
/// `SPICE_MSG_MAIN_INIT`.
const INIT: u16 = 103;
/// `SPICE_MSG_MAIN_CHANNELS_LIST`.
const LIST: u16 = 104;

/// Most bytes of the two messages that are read whole: a list has two for each channel, and a machine has a few.
const READ_MAX: u32 = 4 << 10;

/// Follows the machine's side of a main channel.
#[derive(Clone, Debug)]
pub struct Hall {
    frames: Frames,
    kinds: Kinds,
    held: Option<(Head, Vec<u8>)>,
    session: Option<u32>,
    serial: u64,
}

impl Hall {
    /// At the beginning of a session that may have these channels.
    pub fn new(kinds: Kinds, framing: Framing) -> Self {
        Hall {
            frames: Frames::new(framing),
            kinds,
            held: None,
            session: None,
            serial: 0,
        }
    }

    /// Appends to `out` what the viewer gets of what the machine sent.
    ///
    /// # Errors
    /// [`Violation::Machine`].
    pub fn feed(&mut self, mut input: &[u8], out: &mut Vec<u8>) -> Result<(), Violation> {
        while let Some(piece) = self.frames.next(&mut input) {
            match piece {
                Piece::Head(head) => {
                    self.serial = head.serial;
                    match head.message {
                        INIT | LIST if head.size > READ_MAX => return Err(Violation::Machine(head.message)),
                        INIT | LIST => self.held = Some((head, Vec::new())),
                        _ => out.extend_from_slice(&head.encode(self.frames.framing())),
                    }
                }
                Piece::Body(body) => match &mut self.held {
                    Some((_, held)) => held.extend_from_slice(body),
                    None => out.extend_from_slice(body),
                },
            }
            if self.frames.left() == 0
                && let Some((head, body)) = self.held.take()
            {
                self.whole(head, body, out)?;
            }
        }
        Ok(())
    }

    fn whole(&mut self, mut head: Head, body: Vec<u8>, out: &mut Vec<u8>) -> Result<(), Violation> {
        let malformed = Violation::Machine(head.message);
        let (number, rest) = body.split_first_chunk().ok_or(malformed.clone())?;
        let number = u32::from_le_bytes(*number);
        let body = if head.message == INIT {
            self.session.get_or_insert(number);
            body
        } else {
            let (pairs, odd) = rest.as_chunks::<2>();
            if usize::try_from(number).ok() != Some(pairs.len()) || !odd.is_empty() {
                return Err(malformed);
            }
            self.offered(pairs)
        };
        head.size = u32::try_from(body.len()).map_err(|_| malformed)?;
        out.extend_from_slice(&head.encode(self.frames.framing()));
        out.extend_from_slice(&body);
        Ok(())
    }

    /// The list, without what may not be opened.
    fn offered(&self, channels: &[[u8; 2]]) -> Vec<u8> {
        let left: Vec<&[u8; 2]> = channels
            .iter()
            .filter(|[kind, _]| Kind::from_number(*kind).is_some_and(|kind| self.kinds.has(kind)))
            .collect();
        let mut body = u32::try_from(left.len())
            .unwrap_or_default()
            .to_le_bytes()
            .to_vec();
        body.extend(left.into_iter().flatten());
        body
    }

    /// The session's number, once the machine has said it.
    pub fn session(&self) -> Option<u32> {
        self.session
    }

    /// Whether a message of ours may go here.
    pub fn between(&self) -> bool {
        self.frames.between()
    }

    /// A message that viewers show or log: why it is over.
    pub fn notice(&self, text: &str) -> Vec<u8> {
        /// `SPICE_NOTIFY_SEVERITY_WARN`
        const SEVERITY: u32 = 1;
        /// `SPICE_NOTIFY_VISIBILITY_HIGH`
        const VISIBILITY: u32 = 2;
        /// `SPICE_WARN_GENERAL`
        const WHAT: u32 = 0;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut body = u64::try_from(now.as_nanos())
            .unwrap_or_default()
            .to_le_bytes()
            .to_vec();
        let length = u32::try_from(text.len()).unwrap_or_default();
        for number in [SEVERITY, VISIBILITY, WHAT, length] {
            body.extend_from_slice(&number.to_le_bytes());
        }
        body.extend_from_slice(text.as_bytes());
        body.push(0);
        let head = Head {
            serial: self.serial.wrapping_add(1),
            message: NOTIFY,
            size: u32::try_from(body.len()).unwrap_or_default(),
            sub_list: 0,
        };
        [head.encode(self.frames.framing()), body].concat()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::frame::message;
    use super::*;

    fn list(channels: &[(u8, u8)]) -> Vec<u8> {
        let mut body = u32::try_from(channels.len()).unwrap().to_le_bytes().to_vec();
        body.extend(channels.iter().flat_map(|(kind, id)| [*kind, *id]));
        body
    }

    fn said(framing: Framing) -> Vec<u8> {
        let mut init = 0xcafe_u32.to_le_bytes().to_vec();
        init.resize(32, 1);
        [
            message(framing, INIT, &init),
            message(framing, 113, b"name"),
            message(
                framing,
                LIST,
                &list(&[(2, 0), (3, 0), (9, 0), (9, 1), (77, 0), (4, 0)]),
            ),
            message(framing, 4, b"ping"),
        ]
        .concat()
    }

    fn heard(framing: Framing) -> Vec<u8> {
        let mut init = 0xcafe_u32.to_le_bytes().to_vec();
        init.resize(32, 1);
        [
            message(framing, INIT, &init),
            message(framing, 113, b"name"),
            message(framing, LIST, &list(&[(2, 0), (3, 0), (4, 0)])),
            message(framing, 4, b"ping"),
        ]
        .concat()
    }

    proptest! {
        #[test]
        fn a_viewer_is_offered_only_what_it_may_open(full: bool, chunk in 1usize..200) {
            let framing = if full { Framing::Full } else { Framing::Mini };
            let mut hall = Hall::new(Kinds::default(), framing);
            let mut out = Vec::new();
            for bytes in said(framing).chunks(chunk) {
                hall.feed(bytes, &mut out).unwrap();
            }
            prop_assert_eq!(hall.session(), Some(0xcafe));
            prop_assert!(hall.between());
            prop_assert_eq!(out, heard(framing));
        }
    }

    #[test]
    fn a_list_that_is_none_is_not_passed_on() {
        for body in [&b"\x02\0\0\0\x02\0"[..], b"\x01\0\0\0\x02\0\x03", b"\x01"] {
            let mut out = Vec::new();
            let end = Hall::new(Kinds::default(), Framing::Mini)
                .feed(&message(Framing::Mini, LIST, body), &mut out);
            assert_eq!((end, out.len()), (Err(Violation::Machine(LIST)), 0));
        }
    }

    #[test]
    fn a_notice_is_a_message_like_the_machines_own() {
        let notice = Hall::new(Kinds::default(), Framing::Mini).notice("taken over");
        let mut bytes = notice.as_slice();
        let mut frames = Frames::new(Framing::Mini);
        let Some(Piece::Head(head)) = frames.next(&mut bytes) else {
            panic!("no header");
        };
        assert_eq!((head.message, bytes.len()), (NOTIFY, 8 + 16 + 10 + 1));
        assert_eq!(bytes[20..24], 10u32.to_le_bytes());
        assert!(bytes.ends_with(b"taken over\0"));
    }
}
