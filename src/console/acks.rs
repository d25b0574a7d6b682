//! Acknowledges what the machine has sent, in the viewer's place.
//!
//! spice-server stops sending on a screen's or pointer's channel when two windows of messages, of twenty each, were not
//! acknowledged. When its guest then changes the screen's mode, it waits for room, up to 30 s, in the thread that QEMU's own
//! control connection needs. So a viewer that never acknowledges would stop libvirt. Here the machine hears from the proxy
//! that the proxy has it; what the viewer acknowledges was meant for us, and goes nowhere.

use super::filter::Violation;
use super::frame::{Frames, Framing, Head, Piece};

/// `SPICE_MSG_SET_ACK`, of all channels: generation (u32) and window (u32).
const SET_ACK: u16 = 3;
const SET_ACK_SIZE: u32 = 8;
/// `SPICE_MSGC_ACK_SYNC`: the generation that is acknowledged from here on.
const ACK_SYNC: u16 = 1;
/// `SPICE_MSGC_ACK`: a window of messages has come.
const ACK: u16 = 2;

/// Most acknowledgements that are written in one piece. There is one at a time, but for a machine that takes none for long.
const AT_ONCE: u32 = 64;

/// Follows the machine's side of one channel.
#[derive(Clone, Debug)]
pub struct Acks {
    frames: Frames,
    order: Option<Vec<u8>>,
    window: u32,
    left: u32,
    sync: Option<u32>,
    due: u32,
}

impl Acks {
    /// For a new channel. Nothing is acknowledged until the machine asks for it.
    pub fn new(framing: Framing) -> Self {
        Acks {
            frames: Frames::new(framing),
            order: None,
            window: 0,
            left: 0,
            sync: None,
            due: 0,
        }
    }

    /// Counts the messages in what the machine sent.
    ///
    /// # Errors
    /// [`Violation::Machine`].
    pub fn feed(&mut self, mut input: &[u8]) -> Result<(), Violation> {
        while let Some(piece) = self.frames.next(&mut input) {
            match piece {
                Piece::Head(head) if head.message == SET_ACK => {
                    if head.size != SET_ACK_SIZE {
                        return Err(Violation::Machine(SET_ACK));
                    }
                    self.order = Some(Vec::new());
                }
                Piece::Head(_) => {}
                Piece::Body(body) => {
                    if let Some(order) = &mut self.order {
                        order.extend_from_slice(body);
                    }
                }
            }
            if self.frames.left() == 0 {
                self.whole();
            }
        }
        Ok(())
    }

    /// A message is complete.
    fn whole(&mut self) {
        if let Some(order) = self.order.take() {
            let (numbers, _) = order.as_chunks::<4>();
            if let [generation, window] = *numbers {
                self.sync = Some(u32::from_le_bytes(generation));
                self.window = u32::from_le_bytes(window);
                self.left = self.window;
                // Those of another generation count for nothing.
                self.due = 0;
            }
        } else if self.window > 0 {
            self.left -= 1;
            if self.left == 0 {
                self.left = self.window;
                self.due = self.due.saturating_add(1);
            }
        }
    }

    /// Which headers the channel has.
    pub fn framing(&self) -> Framing {
        self.frames.framing()
    }

    /// Whether the machine is to hear something.
    pub fn are_due(&self) -> bool {
        self.sync.is_some() || self.due > 0
    }

    /// Appends whole messages for the machine to `out`. Some may be left for the next time.
    pub fn take(&mut self, out: &mut Vec<u8>) {
        // Servers do not read the serial numbers of what they get.
        let head = |message, size| {
            let head = Head {
                serial: 0,
                message,
                size,
                sub_list: 0,
            };
            head.encode(self.frames.framing())
        };
        if let Some(generation) = self.sync.take() {
            out.extend_from_slice(&head(ACK_SYNC, 4));
            out.extend_from_slice(&generation.to_le_bytes());
        }
        let now = self.due.min(AT_ONCE);
        for _ in 0..now {
            out.extend_from_slice(&head(ACK, 0));
        }
        self.due -= now;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::frame::message;
    use super::*;

    fn set_ack(framing: Framing, generation: u32, window: u32) -> Vec<u8> {
        let body = [generation.to_le_bytes(), window.to_le_bytes()].concat();
        message(framing, SET_ACK, &body)
    }

    /// The types of what the machine hears, with the first number of their bodies.
    fn heard(acks: &mut Acks, framing: Framing) -> Vec<(u16, Option<u32>)> {
        let mut out = Vec::new();
        while acks.are_due() {
            acks.take(&mut out);
        }
        let (mut frames, mut left) = (Frames::new(framing), out.as_slice());
        let mut seen = Vec::new();
        while let Some(piece) = frames.next(&mut left) {
            match piece {
                Piece::Head(head) => seen.push((head.message, None)),
                Piece::Body(body) => {
                    seen.last_mut().unwrap().1 = body.first_chunk().copied().map(u32::from_le_bytes);
                }
            }
        }
        assert!(frames.between());
        seen
    }

    proptest! {
        #[test]
        fn a_window_is_acknowledged_when_its_last_message_is_complete(
            before in 0usize..30, after in 0usize..200, window in 1u32..40, full: bool, chunk in 1usize..60,
        ) {
            let framing = if full { Framing::Full } else { Framing::Mini };
            let some = |count| message(framing, 304, b"picture").repeat(count);
            let stream = [some(before), set_ack(framing, 7, window), some(after)].concat();
            let mut acks = Acks::new(framing);
            let last = stream.len() - 1;
            for bytes in stream[..last].chunks(chunk) {
                acks.feed(bytes).unwrap();
            }
            let mut all = heard(&mut acks, framing);
            acks.feed(&stream[last..]).unwrap();
            let more = heard(&mut acks, framing);
            let full_windows = after / usize::try_from(window).unwrap();
            prop_assert_eq!(more.is_empty(), after % usize::try_from(window).unwrap() != 0);
            all.extend(more);
            let mut expected = vec![(ACK_SYNC, Some(7))];
            expected.extend(vec![(ACK, None); full_windows]);
            prop_assert_eq!(all, expected);
        }
    }

    #[test]
    fn a_new_generation_takes_the_place_of_what_was_due() {
        let framing = Framing::Mini;
        let mut acks = Acks::new(framing);
        let empty = message(framing, 306, b"");
        for bytes in [
            set_ack(framing, 1, 2),
            empty.repeat(5),
            set_ack(framing, 2, 3),
            empty.repeat(3),
        ] {
            acks.feed(&bytes).unwrap();
        }
        assert_eq!(heard(&mut acks, framing), [(ACK_SYNC, Some(2)), (ACK, None)]);
        // No window: nothing to acknowledge.
        acks.feed(&set_ack(framing, 3, 0)).unwrap();
        acks.feed(&empty.repeat(100)).unwrap();
        assert_eq!(heard(&mut acks, framing), [(ACK_SYNC, Some(3))]);
    }

    #[test]
    fn many_that_are_due_go_out_in_parts_and_an_order_that_is_none_is_refused() {
        let framing = Framing::Full;
        let mut acks = Acks::new(framing);
        acks.feed(&set_ack(framing, 1, 1)).unwrap();
        acks.feed(&message(framing, 306, b"").repeat(200)).unwrap();
        let mut out = Vec::new();
        acks.take(&mut out);
        assert!(acks.are_due() && out.len() == 18 + 4 + 64 * 18);
        assert_eq!(heard(&mut acks, framing).len(), 200 - 64);
        assert_eq!(
            acks.feed(&message(framing, SET_ACK, &[0; 7])),
            Err(Violation::Machine(SET_ACK))
        );
    }
}
