//! Unpacks gzip (RFC 1952) so that it can be stopped between two blocks and go on in another process.
//!
//! Every deflate stream is a row of blocks, and between two of them a decoder needs no more than the last 32 KiB of its output
//! and the bits of a byte that it has begun. The trailer's CRC is not computed: the layer's digest covers the same bytes.

use std::io;

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::{
    TINFL_FLAG_HAS_MORE_INPUT, TINFL_FLAG_STOP_ON_BLOCK_BOUNDARY,
};
use miniz_oxide::inflate::core::{BlockBoundaryState, DecompressorOxide, decompress};
use serde::{Deserialize, Serialize};

/// How far back deflate refers, in bytes.
const WINDOW: usize = 32 << 10;

/// Where the decoder writes, round and round: a power of two, and several windows so that it rarely turns.
const RING: usize = 256 << 10;

/// Longest header of a member, in bytes: its extra field alone may have 64 KiB.
const HEADER_MAX: usize = 192 << 10;

/// A decoder of members that follow each other.
pub(super) struct Gunzip {
    stage: Stage,
    inflate: Box<DecompressorOxide>,
    ring: Vec<u8>,
    /// Where in the ring the next byte goes.
    at: usize,
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

/// What one step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Step {
    /// Bytes taken from the input.
    pub(super) taken: usize,
    /// Can the decoder be stopped here?
    pub(super) between_blocks: bool,
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
    pub(super) fn new() -> Self {
        Self {
            stage: Stage::Header(Vec::new()),
            inflate: Box::default(),
            ring: vec![0; RING],
            at: 0,
            given: 0,
        }
    }

    /// Goes on where another decoder was stopped; none if that is no such place.
    pub(super) fn resume(stopped: &Stopped) -> Option<Self> {
        let window = hex::decode(&stopped.window).ok()?;
        if window.len() > WINDOW || stopped.bit_count > 7 {
            return None;
        }
        let state = BlockBoundaryState {
            num_bits: stopped.bit_count,
            bit_buf: stopped.bits,
            ..BlockBoundaryState::default()
        };
        let mut ring = vec![0; RING];
        ring[..window.len()].copy_from_slice(&window);
        Some(Self {
            stage: Stage::Body,
            inflate: Box::new(DecompressorOxide::from_block_boundary_state(&state)),
            at: window.len(),
            ring,
            given: stopped.given,
        })
    }

    /// What [`Gunzip::resume`] needs, after a step that ended between two blocks.
    pub(super) fn stop(&self) -> Option<Stopped> {
        let state = self.inflate.block_boundary_state()?;
        let length = usize::try_from(self.given).unwrap_or(WINDOW).min(WINDOW);
        let begin = (self.at + RING - length) % RING;
        let window: Vec<u8> = (0..length).map(|n| self.ring[(begin + n) % RING]).collect();
        Some(Stopped {
            bits: state.bit_buf,
            bit_count: state.num_bits,
            window: hex::encode(window),
            given: self.given,
        })
    }

    /// Takes some of the input and appends what it gives.
    pub(super) fn step(&mut self, input: &[u8], output: &mut Vec<u8>) -> io::Result<Step> {
        match &mut self.stage {
            Stage::Header(seen) => {
                let before = seen.len();
                seen.extend_from_slice(&input[..input.len().min(HEADER_MAX - before)]);
                let Some(length) = header_length(seen)? else {
                    if seen.len() >= HEADER_MAX {
                        return Err(broken("a gzip header has no end"));
                    }
                    return Ok(Step::took(input.len()));
                };
                self.stage = Stage::Body;
                self.inflate.init();
                self.given = 0;
                Ok(Step::took(length - before))
            }
            Stage::Body => self.inflate(input, output),
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
                Ok(Step::took(taken))
            }
        }
    }

    fn inflate(&mut self, input: &[u8], output: &mut Vec<u8>) -> io::Result<Step> {
        let flags = TINFL_FLAG_HAS_MORE_INPUT | TINFL_FLAG_STOP_ON_BLOCK_BOUNDARY;
        let (status, taken, given) = decompress(&mut self.inflate, input, &mut self.ring, self.at, flags);
        output.extend_from_slice(&self.ring[self.at..self.at + given]);
        self.at = (self.at + given) % RING;
        self.given += given as u64;
        match status {
            TINFLStatus::NeedsMoreInput | TINFLStatus::HasMoreOutput => Ok(Step::took(taken)),
            TINFLStatus::BlockBoundary => Ok(Step {
                taken,
                between_blocks: true,
            }),
            TINFLStatus::Done => {
                self.stage = Stage::Trailer(Vec::new());
                Ok(Step::took(taken))
            }
            _ => Err(broken("its gzip data is broken")),
        }
    }

    /// May the input end here?
    pub(super) fn is_complete(&self) -> bool {
        matches!(&self.stage, Stage::Header(seen) if seen.is_empty())
    }
}

impl Step {
    fn took(taken: usize) -> Self {
        Self {
            taken,
            between_blocks: false,
        }
    }
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

fn broken(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

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

    /// Unpacks in reads of some bytes; stopped and resumed between any two blocks if asked.
    fn unpack(packed: &[u8], reads: usize, stopping: bool) -> io::Result<(Vec<u8>, usize)> {
        let mut gunzip = Gunzip::new();
        let (mut output, mut at, mut stops) = (Vec::new(), 0, 0);
        while at < packed.len() || !gunzip.is_complete() {
            let end = (at + reads).min(packed.len());
            let step = gunzip.step(&packed[at..end], &mut output)?;
            if step.taken == 0 && at == packed.len() && !step.between_blocks {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            at += step.taken;
            if step.between_blocks && stopping {
                stops += 1;
                let written = serde_json::to_string(&gunzip.stop().unwrap()).unwrap();
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
            assert!(unpack(&packed, reads, false).unwrap().0 == bytes, "{reads}");
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
            assert!(unpack(bad, 4096, false).is_err());
        }
        let endless = [&[0x1f, 0x8b, 8, 8, 0, 0, 0, 0, 0, 0][..], &[1; HEADER_MAX]].concat();
        assert!(unpack(&endless, 4096, false).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

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
