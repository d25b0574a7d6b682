//! Unpacks zstd (RFC 8878) so that it can be stopped between two frames and go on in another process.
//!
//! Between two frames a decoder knows nothing that another one would need. Many writers make one frame of a whole layer, which has no
//! such place; cannery's own, `pzstd` and whoever wants to read a layer in parts make one frame of each MiB or so.

use std::io;

use zstd::stream::raw::{DParameter, Decoder, Operation as _};

use super::decoder::Step;
use super::decompress::ZSTD_WINDOW_LOG_MAX;

/// A decoder of frames that follow each other.
pub(super) struct Unzstd {
    decoder: Decoder<'static>,
    place: Place,
}

/// Where a decoder is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Inside,
    BetweenFrames,
    /// The same, and somebody wanted to stop there.
    Stopped,
}

impl Unzstd {
    /// A decoder between two frames.
    pub(super) fn new() -> io::Result<Self> {
        let mut decoder = Decoder::new()?;
        decoder.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG_MAX))?;
        Ok(Self {
            decoder,
            place: Place::BetweenFrames,
        })
    }

    /// Takes some of the input and puts what it gives to the beginning of the output; goes no further than to the end of a frame.
    /// `stop` is whether to stop there.
    pub(super) fn step(&mut self, input: &[u8], output: &mut [u8], stop: bool) -> io::Result<Step> {
        let status = self.decoder.run_on_buffers(input, output)?;
        let step = Step {
            taken: status.bytes_read,
            given: status.bytes_written,
        };
        self.place = match status.remaining {
            // Without input it waits for a frame as it did before.
            _ if step.is_idle() => match self.place {
                Place::Stopped => Place::BetweenFrames,
                place => place,
            },
            0 if stop => Place::Stopped,
            0 => Place::BetweenFrames,
            _ => Place::Inside,
        };
        Ok(step)
    }

    /// Has the last step stopped between two frames?
    pub(super) fn is_stopped(&self) -> bool {
        self.place == Place::Stopped
    }

    /// May the input end here?
    pub(super) fn is_complete(&self) -> bool {
        self.place != Place::Inside
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A frame that decoders skip.
    const SKIPPED: [u8; 12] = [0x5a, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4];

    /// Unpacks in reads and writes of some bytes; by another decoder behind each frame if asked, and says how many there were.
    fn unpack(packed: &[u8], reads: usize, stopping: bool) -> io::Result<(Vec<u8>, usize)> {
        let mut unzstd = Unzstd::new()?;
        let (mut output, mut block) = (Vec::new(), vec![0; 3 * reads]);
        let (mut at, mut stops) = (0, 0);
        loop {
            let end = (at + reads).min(packed.len());
            let step = unzstd.step(&packed[at..end], &mut block, stopping)?;
            at += step.taken;
            output.extend_from_slice(&block[..step.given]);
            if unzstd.is_stopped() {
                stops += 1;
                unzstd = Unzstd::new()?;
            }
            if at == packed.len() && step.is_idle() {
                break;
            }
        }
        if unzstd.is_complete() {
            Ok((output, stops))
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }

    fn frames(parts: &[Vec<u8>]) -> Vec<u8> {
        let frames = parts.iter().map(|part| zstd::encode_all(&part[..], 1).unwrap());
        frames.collect::<Vec<_>>().concat()
    }

    #[test]
    fn frames_that_are_skipped_are_frames() {
        let packed = [&SKIPPED[..], &frames(&[vec![1; 5000]]), &SKIPPED].concat();
        assert_eq!(unpack(&packed, 100, true).unwrap(), (vec![1; 5000], 3));
        assert_eq!(unpack(&SKIPPED, 5, true).unwrap(), (Vec::new(), 1));
    }

    #[test]
    fn what_ends_inside_a_frame_or_is_followed_by_none_is_broken() {
        let packed = frames(&[vec![1; 5000], (0..=255).collect()]);
        for end in [packed.len() - 1, packed.len() - 40, 3] {
            let error = unpack(&packed[..end], 64, false).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{end}");
        }
        assert!(unpack(&[&packed[..], b"none"].concat(), 64, false).is_err());
    }

    #[test]
    fn a_huge_window_is_refused_before_it_costs_memory() {
        let error = unpack(&[0x28, 0xb5, 0x2f, 0xfd, 0, 0xf8, 0, 0], 64, false).unwrap_err();
        assert!(error.to_string().contains("too much memory"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn another_decoder_goes_on_behind_any_frame(
            parts in prop::collection::vec(prop::collection::vec(0_u8..4, 0..9000), 1..6),
            reads in 1_usize..3000,
        ) {
            let (packed, whole) = (frames(&parts), parts.concat());
            prop_assert_eq!(unpack(&packed, reads, false).unwrap(), (whole.clone(), 0));
            prop_assert_eq!(unpack(&packed, reads, true).unwrap(), (whole, parts.len()));
        }
    }
}
