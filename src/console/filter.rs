//! Which messages of a viewer reach the machine.
//!
//! QEMU reads them in the process that also runs the guest, so only what a viewer has reason to send goes through: known
//! types, in sizes that they can have. With [`Mode::ViewOnly`] nothing goes through that types, points, speaks or carries
//! data; such messages are left out silently, since viewers send them without asking.

use super::channel::{Kind, Mode};
use super::frame::{Frames, Framing, Head, Piece};

/// What is done with a message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verdict {
    /// It goes through, with a body of so many bytes at most.
    Pass(u32),
    /// It is left out.
    Drop(u32),
    /// No viewer sends this here.
    Forbid,
}

/// Bytes of a message with nothing but numbers in it; the longest known has 28.
const NUMBERS: u32 = 4 << 10;
/// Bytes of a message that is passed on only when it is complete: between two that are, acknowledgements of ours can go, which
/// a viewer must not be able to hold back. Those that are larger are on channels where nobody waits for them.
const WHOLE: u32 = 64 << 10;
/// Bytes of a piece of the guest agent's stream; they are cut into 2 KiB.
const AGENT: u32 = 64 << 10;
/// Bytes of a piece of sound: some hundred milliseconds of uncompressed stereo.
const SOUND: u32 = 1 << 20;
/// Bytes of what a smartcard says.
const CARD: u32 = 64 << 10;
/// Bytes of a transfer from a USB device or a port.
const DATA: u32 = 16 << 20;

/// What a viewer must not do.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Violation {
    /// A type that no viewer sends on this channel.
    #[error("the viewer sent message {message} on its {kind} channel, where none sends it")]
    Message {
        /// The channel's kind.
        kind: Kind,
        /// The message's type.
        message: u16,
    },
    /// A body that is larger than any viewer has.
    #[error("the viewer sent {size} bytes in message {message} on its {kind} channel")]
    Size {
        /// The channel's kind.
        kind: Kind,
        /// The message's type.
        message: u16,
        /// Bytes.
        size: u32,
    },
    /// Messages within a message, which would go past this.
    #[error("the viewer sent messages within a message on its {0} channel")]
    Nested(Kind),
    /// A screen's channel begins with something else.
    #[error("the viewer did not begin its display channel as the protocol wants")]
    NoBeginning,
    /// The machine's own messages are not the protocol's.
    #[error("the machine sent message {0} in a form that it does not have")]
    Machine(u16),
}

/// Passes a viewer's messages on, one channel's.
#[derive(Clone, Debug)]
pub struct Filter {
    kind: Kind,
    mode: Mode,
    frames: Frames,
    passing: bool,
    /// Bytes that were passed of a message that is not complete yet.
    begun: usize,
    large: bool,
}

impl Filter {
    /// For a new channel.
    pub fn new(kind: Kind, mode: Mode, framing: Framing) -> Self {
        Filter {
            kind,
            mode,
            frames: Frames::new(framing),
            passing: false,
            begun: 0,
            large: false,
        }
    }

    /// Appends to `out` what of `input` the machine gets.
    ///
    /// # Errors
    /// [`Violation`]: the channel must be closed. What was appended is still within the rules.
    pub fn feed(&mut self, mut input: &[u8], out: &mut Vec<u8>) -> Result<(), Violation> {
        while let Some(piece) = self.frames.next(&mut input) {
            match piece {
                Piece::Head(head) => {
                    self.passing = self.judge(&head)?;
                    if self.passing {
                        let head_bytes = head.encode(self.frames.framing());
                        out.extend_from_slice(&head_bytes);
                        self.begun = head_bytes.len();
                        self.large = head.size > WHOLE;
                    }
                }
                Piece::Body(body) if self.passing => {
                    out.extend_from_slice(body);
                    self.begun += body.len();
                }
                Piece::Body(_) => {}
            }
            if self.frames.left() == 0 {
                self.begun = 0;
            }
        }
        Ok(())
    }

    /// How many of the bytes that were appended last are to be kept back, until their message is complete.
    pub fn unfinished(&self) -> usize {
        if self.large { 0 } else { self.begun }
    }

    /// Whether other messages may go after what was appended and is not kept back.
    pub fn between(&self) -> bool {
        self.begun == 0 || !self.large
    }

    fn judge(&self, head: &Head) -> Result<bool, Violation> {
        let (most, passes) = match verdict(self.kind, self.mode, head.message) {
            Verdict::Pass(most) => (most, true),
            Verdict::Drop(most) => (most, false),
            Verdict::Forbid => {
                return Err(Violation::Message {
                    kind: self.kind,
                    message: head.message,
                });
            }
        };
        if head.sub_list != 0 {
            return Err(Violation::Nested(self.kind));
        }
        if head.size > most {
            return Err(Violation::Size {
                kind: self.kind,
                message: head.message,
                size: head.size,
            });
        }
        Ok(passes)
    }
}

/// The table: `SPICE_MSGC_…` of spice-protocol's enums.h, without those of a machine's move to another host.
fn verdict(kind: Kind, mode: Mode, message: u16) -> Verdict {
    let only_full = |most| match mode {
        Mode::Full => Verdict::Pass(most),
        Mode::ViewOnly => Verdict::Drop(most),
    };
    match (kind, message) {
        // Of all channels: ack_sync and ack are for us, who acknowledge to the machine by ourselves; pong, disconnecting.
        (_, 1 | 2) => Verdict::Drop(NUMBERS),
        (_, 3 | 6) => Verdict::Pass(NUMBERS),
        // client_info, attach_channels, quality_indicator
        (Kind::Main, 101 | 104 | 112) => Verdict::Pass(NUMBERS),
        // mouse_mode_request
        (Kind::Main, 105) => only_full(NUMBERS),
        // agent_start, agent_data, agent_token
        (Kind::Main, 106..=108) => only_full(AGENT),
        // init, stream_report, preferred_compression, gl_draw_done, preferred_video_codec_type
        (Kind::Display, 101..=105) => Verdict::Pass(NUMBERS),
        // keys, then the mouse
        (Kind::Inputs, 101..=104 | 111..=114) => only_full(NUMBERS),
        // data, mode, start_mark
        (Kind::Record, 101..=103) => only_full(SOUND),
        (Kind::Smartcard, 101) => only_full(CARD),
        // data, compressed_data
        (Kind::Usbredir | Kind::Port | Kind::Webdav, 101 | 102) => only_full(DATA),
        // event
        (Kind::Port | Kind::Webdav, 201) => only_full(NUMBERS),
        _ => Verdict::Forbid,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::frame::message;
    use super::*;

    fn through(kind: Kind, mode: Mode, bytes: &[u8]) -> Result<Vec<u8>, Violation> {
        let mut out = Vec::new();
        Filter::new(kind, mode, Framing::Mini).feed(bytes, &mut out)?;
        Ok(out)
    }

    #[test]
    fn a_viewer_who_only_looks_sends_nothing_but_what_drawing_takes() {
        let all: Vec<(Kind, u16)> = Kind::ALL
            .into_iter()
            .flat_map(|kind| (0..=300).map(move |number| (kind, number)))
            .filter(|(kind, number)| {
                through(*kind, Mode::ViewOnly, &message(Framing::Mini, *number, b"x"))
                    .is_ok_and(|out| !out.is_empty())
            })
            .filter(|(_, number)| ![3, 6].contains(number))
            .collect();
        assert_eq!(
            all,
            [
                (Kind::Main, 101),
                (Kind::Main, 104),
                (Kind::Main, 112),
                (Kind::Display, 101),
                (Kind::Display, 102),
                (Kind::Display, 103),
                (Kind::Display, 104),
                (Kind::Display, 105),
            ]
        );
    }

    #[test]
    fn keys_and_the_agents_data_go_through_where_they_may_and_are_left_out_silently_where_not() {
        for (kind, number) in [(Kind::Inputs, 101), (Kind::Inputs, 112), (Kind::Main, 107)] {
            let pong = message(Framing::Mini, 3, b"");
            let bytes = [message(Framing::Mini, number, b"data"), pong.clone()].concat();
            assert_eq!(through(kind, Mode::Full, &bytes), Ok(bytes.clone()));
            assert_eq!(through(kind, Mode::ViewOnly, &bytes), Ok(pong));
        }
    }

    #[test]
    fn what_a_viewer_acknowledges_goes_nowhere() {
        for kind in Kind::ALL {
            let acks = [message(Framing::Mini, 1, &[0; 4]), message(Framing::Mini, 2, b"")].concat();
            assert_eq!(through(kind, Mode::Full, &acks), Ok(Vec::new()));
        }
    }

    #[test]
    fn what_is_not_complete_is_kept_back_where_it_is_small() {
        let framing = Framing::Mini;
        let mut filter = Filter::new(Kind::Usbredir, Mode::Full, framing);
        let mut out = Vec::new();
        let small = message(framing, 101, &[7; 100]);
        for (at, byte) in small.iter().enumerate() {
            filter.feed(&[*byte], &mut out).unwrap();
            let kept = if at + 1 == small.len() { 0 } else { out.len() };
            assert_eq!((filter.unfinished(), filter.between()), (kept, true), "byte {at}");
        }
        let large = message(framing, 101, &[7; (64 << 10) + 1]);
        let (last, most) = large.split_last().unwrap();
        filter.feed(most, &mut out).unwrap();
        assert_eq!((filter.unfinished(), filter.between()), (0, false));
        filter.feed(&[*last], &mut out).unwrap();
        assert_eq!((filter.unfinished(), filter.between()), (0, true));
        // One that is left out keeps nothing back.
        let mut filter = Filter::new(Kind::Inputs, Mode::ViewOnly, framing);
        filter.feed(&small[..50], &mut out).unwrap();
        assert_eq!((filter.unfinished(), filter.between()), (0, true));
    }

    #[test]
    fn what_no_viewer_sends_ends_the_channel() {
        // A move to another host, data of one, and a channel that has no messages.
        for (kind, number) in [
            (Kind::Main, 102),
            (Kind::Main, 110),
            (Kind::Display, 5),
            (Kind::Cursor, 101),
        ] {
            assert_eq!(
                through(kind, Mode::Full, &message(Framing::Mini, number, b"")),
                Err(Violation::Message {
                    kind,
                    message: number
                })
            );
        }
        // Larger than any: refused by its header, before a byte of it came.
        let head = Head {
            serial: 0,
            message: 101,
            size: u32::MAX,
            sub_list: 0,
        };
        for mode in [Mode::Full, Mode::ViewOnly] {
            assert!(matches!(
                through(Kind::Inputs, mode, &head.encode(Framing::Mini)),
                Err(Violation::Size { size: u32::MAX, .. })
            ));
        }
        let nested = Head {
            serial: 1,
            message: 101,
            size: 40,
            sub_list: 8,
        };
        let mut filter = Filter::new(Kind::Inputs, Mode::ViewOnly, Framing::Full);
        assert_eq!(
            filter.feed(&nested.encode(Framing::Full), &mut Vec::new()),
            Err(Violation::Nested(Kind::Inputs))
        );
    }

    proptest! {
        #[test]
        fn chunks_make_no_difference(
            numbers in prop::collection::vec((prop::sample::select(vec![1u16, 2, 101, 104, 105, 107, 111, 102]),
                prop::collection::vec(any::<u8>(), 0..20)), 0..10),
            full: bool, view: bool, chunk in 1usize..25,
        ) {
            let framing = if full { Framing::Full } else { Framing::Mini };
            let mode = if view { Mode::ViewOnly } else { Mode::Full };
            let stream: Vec<u8> = numbers.iter().flat_map(|(t, b)| message(framing, *t, b)).collect();
            let run = |chunk: usize| {
                let mut filter = Filter::new(Kind::Main, mode, framing);
                let mut out = Vec::new();
                let end = stream.chunks(chunk).try_for_each(|bytes| filter.feed(bytes, &mut out));
                (out, end)
            };
            prop_assert_eq!(run(chunk), run(usize::MAX));
        }
    }
}
