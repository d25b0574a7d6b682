//! Keeps a screen's channel from the machine until its viewer has begun it.
//!
//! spice-server waits up to 30 s, in the thread that QEMU's own control connection needs, for a display channel's first
//! message before it can give the machine to another viewer. So a viewer that opens such a channel and says nothing would
//! stop libvirt. Here the machine learns of the channel only together with that message.

use super::channel::Kind;
use super::filter::Violation;
use super::frame::{Frames, Framing, Piece};

/// The message that begins a display channel, and the bytes that its body has.
const DISPLAY_INIT: u16 = 101;
const DISPLAY_INIT_SIZE: u32 = 14;

/// Most bytes that are held back. What may come before the beginning is small.
const HELD_MAX: usize = 64 << 10;

/// What a viewer has sent on a channel that the machine does not know yet.
#[derive(Clone, Debug)]
pub struct Gate {
    frames: Frames,
    held: Vec<u8>,
    beginning: bool,
}

impl Gate {
    /// For a new display channel.
    pub fn new(framing: Framing) -> Self {
        Gate {
            frames: Frames::new(framing),
            held: Vec::new(),
            beginning: false,
        }
    }

    /// Takes what the viewer sent, already filtered. True when its beginning is complete.
    ///
    /// # Errors
    /// [`Violation`], when it begins in a way that is none.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<bool, Violation> {
        self.held.extend_from_slice(bytes);
        if self.held.len() > HELD_MAX {
            return Err(Violation::NoBeginning);
        }
        let mut open = false;
        while let Some(piece) = self.frames.next(&mut bytes) {
            if let Piece::Head(head) = piece {
                if head.message == DISPLAY_INIT && head.size != DISPLAY_INIT_SIZE {
                    return Err(Violation::NoBeginning);
                }
                // What follows a complete beginning does not undo it.
                open |= self.beginning;
                self.beginning |= head.message == DISPLAY_INIT;
            }
            open |= self.beginning && self.frames.left() == 0;
        }
        Ok(open)
    }

    /// All that was held back, in its order.
    pub fn into_held(self) -> Vec<u8> {
        self.held
    }

    /// Whether channels of this kind have one.
    pub fn guards(kind: Kind) -> bool {
        kind == Kind::Display
    }
}

#[cfg(test)]
mod tests {
    use super::super::frame::message;
    use super::*;

    #[test]
    fn it_opens_with_the_last_byte_of_the_beginning() {
        for framing in [Framing::Mini, Framing::Full] {
            let ack = message(framing, 1, &[0; 4]);
            let bytes = [ack, message(framing, DISPLAY_INIT, &[0; 14])].concat();
            let mut gate = Gate::new(framing);
            for (at, byte) in bytes.iter().enumerate() {
                assert_eq!(gate.feed(&[*byte]), Ok(at == bytes.len() - 1), "byte {at}");
            }
            assert_eq!(gate.into_held(), bytes);
            // In one piece, with more behind it.
            let more = [bytes, message(framing, 103, &[1])[..7].to_vec()].concat();
            let mut gate = Gate::new(framing);
            assert_eq!(gate.feed(&more), Ok(true));
            assert_eq!(gate.into_held(), more);
        }
    }

    #[test]
    fn another_beginning_or_none_at_all_is_refused() {
        let mut gate = Gate::new(Framing::Mini);
        assert_eq!(
            gate.feed(&message(Framing::Mini, DISPLAY_INIT, &[0; 13])),
            Err(Violation::NoBeginning)
        );
        let mut gate = Gate::new(Framing::Mini);
        let filler = message(Framing::Mini, 2, &[0; 4000]);
        let end = (0..20).find_map(|_| gate.feed(&filler).err());
        assert_eq!(end, Some(Violation::NoBeginning));
    }
}
