//! Unpacks gzip (RFC 1952) so that it can be stopped between two blocks and go on in another process.
//!
//! Every deflate stream is a row of blocks, and between two of them a decoder needs no more than the last 32 KiB of its output
//! and the bits of a byte that it has begun. The trailer's CRC is not computed: the layer's digest covers the same bytes.

use std::io;

use serde::{Deserialize, Serialize};

use super::decoder::Step;
use super::inflate::{self, Boundary, Inflate, Place};

/// Longest header of a member, in bytes: its extra field alone may have 64 KiB.
const HEADER_MAX: usize = 192 << 10;

/// A decoder of members that follow each other.
pub(super) struct Gunzip {
    stage: Stage,
    inflate: Inflate,
    /// Bytes that this member has given.
    given: u64,
}

enum Stage {
    /// What has been seen of a member's header.
    Header(Vec<u8>),
    Body,
    /// What has been seen of its trailer.
    Trailer(Vec<u8>),
}

/// A decoder between two blocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stopped {
    bits: u8,
    bit_count: u8,
    /// The end of the output, in hexadecimal digits.
    window: String,
    given: u64,
}

impl Gunzip {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            stage: Stage::Header(Vec::new()),
            inflate: Inflate::new()?,
            given: 0,
        })
    }

    /// Goes on where another decoder was stopped; none if that is no such place.
    pub(super) fn resume(stopped: &Stopped) -> Option<Self> {
        let boundary = Boundary {
            bits: stopped.bits,
            bit_count: stopped.bit_count,
            window: hex::decode(&stopped.window).ok()?,
        };
        Some(Self {
            stage: Stage::Body,
            inflate: Inflate::at(&boundary).ok()??,
            given: stopped.given,
        })
    }

    /// What [`Gunzip::resume`] needs, if the last step has stopped between two blocks.
    pub(super) fn stop(&self) -> Option<Stopped> {
        let boundary = self.inflate.boundary()?;
        Some(Stopped {
            bits: boundary.bits,
            bit_count: boundary.bit_count,
            window: hex::encode(boundary.window),
            given: self.given,
        })
    }

    /// Takes some of the input and puts what it gives to the beginning of the output. With `stop` it goes no further than to the
    /// end of a block.
    pub(super) fn step(&mut self, input: &[u8], output: &mut [u8], stop: bool) -> io::Result<Step> {
        match &mut self.stage {
            Stage::Header(seen) => {
                let before = seen.len();
                seen.extend_from_slice(&input[..input.len().min(HEADER_MAX - before)]);
                let Some(length) = header_length(seen)? else {
                    if seen.len() >= HEADER_MAX {
                        return Err(broken("a gzip header has no end"));
                    }
                    return Ok(took(input.len()));
                };
                self.stage = Stage::Body;
                self.inflate.again()?;
                self.given = 0;
                Ok(took(length - before))
            }
            Stage::Body => {
                let inflate::Step { taken, given, place } = self.inflate.step(input, output, stop)?;
                self.given += given as u64;
                if place == Place::End {
                    self.stage = Stage::Trailer(Vec::new());
                }
                Ok(Step { taken, given })
            }
            Stage::Trailer(seen) => {
                let taken = input.len().min(8 - seen.len());
                seen.extend_from_slice(&input[..taken]);
                if let [_, _, _, _, length @ ..] = seen.as_slice()
                    && let Ok(length) = <[u8; 4]>::try_from(length)
                {
                    // Modulo 2^32, as the format has it.
                    if u64::from(u32::from_le_bytes(length)) != self.given & u64::from(u32::MAX) {
                        return Err(broken("a gzip member has another length than it says"));
                    }
                    self.stage = Stage::Header(Vec::new());
                }
                Ok(took(taken))
            }
        }
    }

    /// May the input end here?
    pub(super) fn is_complete(&self) -> bool {
        matches!(&self.stage, Stage::Header(seen) if seen.is_empty())
    }
}

fn took(taken: usize) -> Step {
    Step { taken, given: 0 }
}

/// The length of a member's header; none while it is not all there.
fn header_length(seen: &[u8]) -> io::Result<Option<usize>> {
    let fixed = [0x1f, 0x8b, 8];
    if !fixed.starts_with(&seen[..seen.len().min(3)]) {
        return Err(broken("what follows a gzip member is none"));
    }
    let Some(&flags) = seen.get(3) else {
        return Ok(None);
    };
    let mut at = 10;
    if flags & 4 != 0 {
        let Some(length) = seen.get(at..at + 2) else {
            return Ok(None);
        };
        at += 2 + usize::from(u16::from_le_bytes([length[0], length[1]]));
    }
    // The name, the comment.
    for flag in [8, 16] {
        if flags & flag != 0 {
            let rest = seen.get(at..).unwrap_or_default();
            let Some(length) = rest.iter().position(|&byte| byte == 0) else {
                return Ok(None);
            };
            at += length + 1;
        }
    }
    if flags & 2 != 0 {
        at += 2;
    }
    Ok((seen.len() >= at).then_some(at))
}

/// Unpacks hostile bytes, once in one go and once stopped between blocks: both must come to the same, whatever it is.
#[cfg(any(test, fuzzing))]
pub(in crate::image) fn fuzz(bytes: &[u8]) {
    // Of output, and of stops, after which a stream has shown what it can do.
    const OUTPUT_MAX: usize = 1 << 20;
    const STOPS_MAX: usize = 50;
    let unpack = |mut stops: usize| {
        let (mut input, mut output, mut block) = (bytes, Vec::new(), vec![0; 5000]);
        let Ok(mut gunzip) = Gunzip::new() else {
            return (output, None);
        };
        while output.len() < OUTPUT_MAX {
            let Ok(step) = gunzip.step(input, &mut block, stops > 0) else {
                return (output, None);
            };
            output.extend_from_slice(&block[..step.given]);
            input = &input[step.taken..];
            if let Some(stopped) = gunzip.stop() {
                stops -= 1;
                match Gunzip::resume(&stopped) {
                    Some(resumed) => gunzip = resumed,
                    None => panic!("it was stopped at no place between blocks: {stopped:?}"),
                }
            } else if step.is_idle() && input.is_empty() {
                break;
            }
        }
        output.truncate(OUTPUT_MAX);
        (output, Some(gunzip.is_complete()))
    };
    let ((whole, whole_end), (stopped, stopped_end)) = (unpack(0), unpack(STOPS_MAX));
    // A step that fails gives nothing, and the steps are not the same.
    assert!(
        whole.starts_with(&stopped) || stopped.starts_with(&whole),
        "stopping changes what is unpacked"
    );
    if whole.len().max(stopped.len()) < OUTPUT_MAX {
        assert_eq!(whole_end, stopped_end, "stopping changes how it ends");
        assert!(
            whole_end.is_none() || whole == stopped,
            "stopping changes how much is unpacked"
        );
    }
}

fn broken(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::{Compress, FlushCompress};
    use proptest::prelude::*;

    use super::*;

    fn gzip(bytes: &[u8], level: u32) -> Vec<u8> {
        let builder = flate2::GzBuilder::new()
            .filename("disk.qcow2")
            .comment("a disk")
            .extra(vec![7; 300]);
        let mut encoder = builder.write(Vec::new(), flate2::Compression::new(level));
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    /// Words and noise, so that there are blocks of every kind.
    fn text(length: usize) -> Vec<u8> {
        let mut state = 1_u32;
        let mut bytes = Vec::with_capacity(length + 64);
        while bytes.len() < length {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if state >> 30 == 0 {
                bytes.extend((0..200_u32).map(|n| (state.rotate_left(n % 32) ^ n).to_le_bytes()[0]));
            } else {
                bytes.extend(format!("line {} of a file, {}\n", state >> 20, state % 7).bytes());
            }
        }
        bytes.truncate(length);
        bytes
    }

    /// A member whose stream is flushed behind pieces of these lengths: that ends a block, and puts an empty one behind it.
    fn flushed(bytes: &[u8], level: u32, pieces: &[(usize, FlushCompress)]) -> Vec<u8> {
        let mut compress = Compress::new(flate2::Compression::new(level), false);
        let mut packed = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
        let mut rest = bytes;
        for (length, flush) in pieces.iter().chain(&[(usize::MAX, FlushCompress::Finish)]) {
            let (mut piece, behind) = rest.split_at(rest.len().min(*length));
            rest = behind;
            loop {
                packed.reserve(1 << 16);
                let before = compress.total_in();
                compress.compress_vec(piece, &mut packed, *flush).unwrap();
                piece = &piece[usize::try_from(compress.total_in() - before).unwrap()..];
                if piece.is_empty() && packed.len() < packed.capacity() {
                    break;
                }
            }
        }
        packed.extend([0; 4]);
        packed.extend(u32::try_from(bytes.len()).unwrap().to_le_bytes());
        packed
    }

    /// Unpacks in reads and writes of some bytes; stopped and resumed between any two blocks if asked.
    fn unpack(packed: &[u8], reads: usize, stopping: bool) -> io::Result<(Vec<u8>, usize)> {
        let mut gunzip = Gunzip::new()?;
        let (mut output, mut at, mut stops) = (Vec::new(), 0, 0);
        let mut block = vec![0; 3 * reads];
        while at < packed.len() || !gunzip.is_complete() {
            let end = (at + reads).min(packed.len());
            let step = gunzip.step(&packed[at..end], &mut block, stopping)?;
            output.extend_from_slice(&block[..step.given]);
            if step.is_idle() && at == packed.len() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            at += step.taken;
            if let Some(stopped) = gunzip.stop() {
                assert!(stopping);
                stops += 1;
                let written = serde_json::to_string(&stopped).unwrap();
                gunzip = Gunzip::resume(&serde_json::from_str(&written).unwrap()).unwrap();
            }
        }
        Ok((output, stops))
    }

    #[test]
    fn members_follow_each_other() {
        let bytes = text(300_000);
        let packed = [gzip(&bytes[..100], 6), gzip(&[], 1), gzip(&bytes[100..], 9)].concat();
        for reads in [1, 100, 1 << 20] {
            for stopping in [false, true] {
                let (output, _) = unpack(&packed, reads, stopping).unwrap();
                assert!(output == bytes, "{reads} {stopping}");
            }
        }
    }

    #[test]
    fn what_is_broken_or_cut_is_an_error() {
        let packed = gzip(&text(100_000), 6);
        let mut trailer = packed.clone();
        let last = trailer.len() - 1;
        trailer[last] ^= 1;
        let garbage = [packed.clone(), b"garbage".to_vec()].concat();
        let mut body = packed.clone();
        body[400..500].fill(0xff);
        for bad in [
            &packed[..packed.len() - 1],
            &packed[..200],
            &trailer,
            &garbage,
            &body,
        ] {
            for reads in [1, 4096] {
                assert!(unpack(bad, reads, false).is_err());
                assert!(unpack(bad, reads, true).is_err());
            }
        }
        let endless = [&[0x1f, 0x8b, 8, 8, 0, 0, 0, 0, 0, 0][..], &[1; HEADER_MAX]].concat();
        assert!(unpack(&endless, 4096, false).is_err());
    }

    #[test]
    fn what_is_no_place_between_blocks_is_refused() {
        let mut gunzip = Gunzip::new().unwrap();
        let bytes = text(300_000);
        let (packed, mut block, mut at) = (gzip(&bytes, 6), vec![0; bytes.len()], 0);
        assert_eq!(gunzip.stop(), None);
        let stopped = loop {
            let step = gunzip.step(&packed[at..], &mut block, true).unwrap();
            at += step.taken;
            if let Some(stopped) = gunzip.stop() {
                break stopped;
            }
        };
        assert!(Gunzip::resume(&stopped).is_some());
        let long = hex::encode(&bytes[..(32 << 10) + 1]);
        for (bits, bit_count, window) in [
            (0, 8, stopped.window.as_str()),
            (4, 2, &stopped.window),
            (1, 0, &stopped.window),
            (0, 0, &long),
            (0, 0, "x"),
        ] {
            let window = window.to_owned();
            let given = stopped.given;
            let none = Stopped {
                bits,
                bit_count,
                window,
                given,
            };
            assert!(Gunzip::resume(&none).is_none(), "{bits} {bit_count}");
        }
    }

    #[test]
    fn a_member_refers_to_nothing_in_front_of_it() {
        let bytes = text(100);
        let twice = flushed(&bytes.repeat(2), 9, &[(100, FlushCompress::Sync)]);
        assert!(unpack(&twice, 4096, false).unwrap().0 == bytes.repeat(2));
        let (mut gunzip, mut block, mut at) = (Gunzip::new().unwrap(), vec![0; 4096], 0);
        // Up to the end of what the flush has written, which is that of a byte.
        while gunzip
            .stop()
            .is_none_or(|stopped| stopped.given < 100 || stopped.bit_count > 0)
        {
            at += gunzip.step(&twice[at..], &mut block, true).unwrap().taken;
        }
        // The second half as a member of its own, behind one that has all the bytes it refers to.
        let body = &twice[at..twice.len() - 4];
        let orphan = [&gzip(&bytes, 9), &twice[..10], body, &100_u32.to_le_bytes()].concat();
        let error = unpack(&orphan, 4096, false).unwrap_err();
        assert_eq!(error.to_string(), "its gzip data is broken");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn stopping_between_blocks_of_all_kinds_changes_nothing(
            length in 0_usize..300_000,
            level in 0_u32..10,
            reads in prop_oneof![1_usize..20, 20_usize..100_000],
            pieces in prop::collection::vec((0_usize..60_000, prop::sample::select(vec![
                FlushCompress::None,
                FlushCompress::Partial,
                FlushCompress::Sync,
                FlushCompress::Full,
            ])), 0..12),
        ) {
            let bytes = text(length);
            let packed = flushed(&bytes, level, &pieces);
            let packed = [packed.clone(), packed].concat();
            let bytes = [bytes.clone(), bytes].concat();
            for stopping in [false, true] {
                let (output, _) = unpack(&packed, reads, stopping).unwrap();
                prop_assert!(output == bytes, "{stopping}");
            }
        }

        #[test]
        fn stopping_between_any_two_blocks_changes_nothing(
            length in 200_000_usize..1_500_000,
            level in 0_u32..10,
            reads in 1000_usize..100_000,
        ) {
            let bytes = text(length);
            let (output, stops) = unpack(&gzip(&bytes, level), reads, true).unwrap();
            prop_assert!(stops > 0);
            prop_assert!(output == bytes);
        }
    }
}
