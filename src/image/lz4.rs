//! The two framings of LZ4 that virtual machines' disks come in: Apple's (tart), and LZ4's own (vetu).
//!
//! Apple's stream is a row of blocks, numbers little-endian: `bv41`, unpacked and packed length as `u32`, one LZ4 block; `bv4-`,
//! length as `u32`, bytes as they are; `bv4$`, the end. A block may refer to the 64 KiB of output in front of it. Source: what
//! libcompression writes, as libyal's `dtformats` describes it.

use std::io::{self, BufRead, BufReader, Read};

/// Most bytes of one block, packed or not. Apple's encoder makes blocks of 64 KiB; this bounds the decoder's memory.
const BLOCK_MAX: usize = 4 << 20;

/// How far back a block may refer: LZ4's offsets are 16 bits.
const WINDOW: usize = 64 << 10;

/// Unpacks Apple's stream. Bytes behind its end are an error.
pub(super) struct Apple<R> {
    inner: R,
    /// The last output in front of the block, and the block's own.
    output: Vec<u8>,
    /// How much of `output` has been read.
    given: usize,
    packed: Vec<u8>,
    ended: bool,
}

fn broken(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

impl<R: Read> Apple<R> {
    pub(super) fn new(inner: R) -> Self {
        Self {
            inner,
            output: Vec::new(),
            given: 0,
            packed: Vec::new(),
            ended: false,
        }
    }

    fn number(&mut self) -> io::Result<usize> {
        let mut bytes = [0; 4];
        self.inner.read_exact(&mut bytes)?;
        usize::try_from(u32::from_le_bytes(bytes))
            .ok()
            .filter(|&length| length <= BLOCK_MAX)
            .ok_or_else(|| broken("an LZ4 block is larger than 4 MiB"))
    }

    /// Unpacks the next block behind the window; false at the end.
    fn block(&mut self) -> io::Result<bool> {
        let mut marker = [0; 4];
        self.inner.read_exact(&mut marker)?;
        match &marker {
            b"bv41" => {
                let (length, packed) = (self.number()?, self.number()?);
                self.packed.resize(packed, 0);
                self.inner.read_exact(&mut self.packed)?;
                self.slide();
                let window = self.output.len();
                self.output.resize(window + length, 0);
                let (before, block) = self.output.split_at_mut(window);
                let count = lz4_flex::block::decompress_into_with_dict(&self.packed, block, before)
                    .map_err(|_| broken("an LZ4 block is damaged"))?;
                if count != length {
                    return Err(broken("an LZ4 block is shorter than it says"));
                }
            }
            b"bv4-" => {
                let length = self.number()?;
                self.slide();
                let window = self.output.len();
                self.output.resize(window + length, 0);
                self.inner.read_exact(&mut self.output[window..])?;
            }
            b"bv4$" => {
                if self.inner.read(&mut [0])? > 0 {
                    return Err(broken("bytes follow the end of an LZ4 stream"));
                }
                return Ok(false);
            }
            _ => return Err(broken("an LZ4 block has no marker")),
        }
        Ok(true)
    }

    /// Drops what no block can refer to any more.
    fn slide(&mut self) {
        let gone = self.output.len().saturating_sub(WINDOW);
        self.output.drain(..gone);
        self.given = self.output.len();
    }
}

impl<R: Read> Read for Apple<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.given == self.output.len() && !self.ended && !buffer.is_empty() {
            self.ended = !self.block()?;
        }
        let count = (&self.output[self.given..]).read(buffer)?;
        self.given += count;
        Ok(count)
    }
}

/// Unpacks LZ4 frames, one behind the other.
///
/// A frame names its own block size, at most 4 MiB, which bounds the decoder's memory. Each has a decoder of its own, since one that
/// is used again fails an assertion where the next frame's blocks are of another size. Frames of the old form (`lz4 -l`) are
/// refused: they end only where the next begins, and so in the same decoder.
pub(super) struct Frames<R: Read> {
    decoder: lz4_flex::frame::FrameDecoder<Inner<R>>,
    /// Does a frame begin with the next byte?
    between: bool,
}

/// The first byte of a frame of the old form.
const LEGACY: u8 = 0x02;

/// What all frames' decoders read, one after the other; none in one whose turn is over.
struct Inner<R>(Option<BufReader<R>>);

impl<R: Read> Inner<R> {
    /// The first of the bytes that come.
    fn peek(&mut self) -> io::Result<Option<u8>> {
        match &mut self.0 {
            Some(inner) => Ok(inner.fill_buf()?.first().copied()),
            None => Ok(None),
        }
    }
}

impl<R: Read> Read for Inner<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.as_mut().map_or(Ok(0), |inner| inner.read(buffer))
    }
}

/// What the decoder says of a frame is for programmers. What could not be read stays what it is.
fn in_words(error: io::Error) -> io::Error {
    use lz4_flex::frame::Error as E;
    let Some(found) = error.get_ref().and_then(|inner| inner.downcast_ref::<E>()) else {
        return error;
    };
    broken(match found {
        E::WrongMagicNumber => "it is no LZ4 frame",
        E::SkippableFrame(_) => "a frame of it is no LZ4 frame",
        E::BlockTooBig => "an LZ4 block is larger than its frame says",
        E::ContentLengthError { .. } => "an LZ4 frame has another length than it says",
        _ => "an LZ4 frame is damaged",
    })
}

impl<R: Read> Frames<R> {
    pub(super) fn new(inner: R) -> Self {
        Self {
            decoder: lz4_flex::frame::FrameDecoder::new(Inner(Some(BufReader::new(inner)))),
            between: true,
        }
    }
}

impl<R: Read> Read for Frames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // Nothing read would look like the end of a frame.
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if self.between {
                let inner = self.decoder.get_mut();
                if inner.peek()? == Some(LEGACY) {
                    return Err(broken("its LZ4 frames are of the old form; pack it without -l"));
                }
                let inner = Inner(inner.0.take());
                self.decoder = lz4_flex::frame::FrameDecoder::new(inner);
            }
            let count = self.decoder.read(buffer).map_err(in_words)?;
            self.between = count == 0;
            // The decoder pauses at the end of each frame; whether another one follows, the input says.
            if count > 0 || self.decoder.get_mut().peek()?.is_none() {
                return Ok(count);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use lz4_flex::frame::{BlockMode, BlockSize, FrameInfo};
    use proptest::prelude::*;

    use super::*;

    /// Apple's stream, written independently of the decoder: each block with the output in front of it as its dictionary, every third
    /// one as it is.
    fn apple(bytes: &[u8], block: usize) -> Vec<u8> {
        let mut stream = Vec::new();
        let le = |length: usize| u32::try_from(length).unwrap().to_le_bytes();
        for (number, start) in (0..bytes.len()).step_by(block).enumerate() {
            let piece = &bytes[start..bytes.len().min(start + block)];
            if number % 3 == 1 {
                stream.extend([b"bv4-", &le(piece.len())[..], piece].concat());
            } else {
                let window = &bytes[start.saturating_sub(WINDOW)..start];
                let packed = lz4_flex::block::compress_with_dict(piece, window);
                stream.extend([b"bv41", &le(piece.len())[..], &le(packed.len()), &packed].concat());
            }
        }
        stream.extend(b"bv4$");
        stream
    }

    fn unpack(stream: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        Apple::new(stream).read_to_end(&mut out).map(|_| out)
    }

    /// `hello, hello, hello` as a block of two literals' runs and a match, worked out by hand from LZ4's block format.
    #[test]
    fn a_stream_made_by_hand_is_read() {
        // Seven literals, a match 7 back of 8 bytes, then five literals.
        let mut block = vec![0x74];
        block.extend(b"hello, ");
        block.extend([7, 0, 0x40]);
        block.extend(b"ello");
        let mut stream = b"bv41".to_vec();
        stream.extend(19_u32.to_le_bytes());
        stream.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
        stream.extend(&block);
        // The second block is a match into the first: 19 back, 5 bytes, and five literals.
        stream.extend(
            [
                b"bv41",
                &[10, 0, 0, 0, 9, 0, 0, 0][..],
                &[0x01, 19, 0, 0x50],
                b" you.",
            ]
            .concat(),
        );
        stream.extend(b"bv4$");
        assert_eq!(
            String::from_utf8(unpack(&stream).unwrap()).unwrap(),
            "hello, hello, hello".to_owned() + "hello you."
        );
    }

    #[test]
    fn a_broken_stream_is_refused() {
        let good = apple(b"some bytes, some bytes, some bytes, some bytes", 64);
        assert!(unpack(&good).is_ok());
        let behind = [&good[..], b"x"].concat();
        let huge = [b"bv41", &u32::MAX.to_le_bytes()[..], &[0; 4]].concat();
        let huge_packed = [b"bv41", &[1, 0, 0, 0][..], &u32::MAX.to_le_bytes()].concat();
        let huge_plain = [b"bv4-", &u32::MAX.to_le_bytes()[..]].concat();
        let longer = [b"bv41", &[9, 0, 0, 0, 2, 0, 0, 0][..], &[0x10, b'x'], b"bv4$"].concat();
        let before_the_start = [
            b"bv41",
            &[9, 0, 0, 0, 4, 0, 0, 0][..],
            &[0x14, b'x', 9, 0],
            b"bv4$",
        ]
        .concat();
        for (stream, part) in [
            (&b""[..], ""),
            (&good[..good.len() - 4], ""),
            (&good[..20], ""),
            (b"bv42", "marker"),
            (&behind, "follow"),
            (&huge, "4 MiB"),
            (&huge_packed, "4 MiB"),
            (&huge_plain, "4 MiB"),
            (&longer, "block"),
            (&before_the_start, "damaged"),
        ] {
            let error = unpack(stream).unwrap_err();
            assert!(error.to_string().contains(part), "{stream:?}: {error}");
        }
    }

    #[test]
    fn frames_are_read_one_behind_the_other() {
        let frame = |bytes: &[u8]| {
            let mut encoder = lz4_flex::frame::FrameEncoder::new(Vec::new());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        };
        let bytes: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        for packed in [
            frame(&bytes),
            [frame(&bytes[..1000]), frame(b""), frame(&bytes[1000..])].concat(),
        ] {
            let mut out = Vec::new();
            Frames::new(&packed[..]).read_to_end(&mut out).unwrap();
            assert!(out == bytes);
        }
        let sized = |bytes: &[u8], size: BlockSize, mode: BlockMode| {
            let info = FrameInfo::new().block_size(size).block_mode(mode);
            let mut encoder = lz4_flex::frame::FrameEncoder::with_frame_info(info, Vec::new());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        };
        let mut rows = Vec::new();
        let mut expected: Vec<u8> = Vec::new();
        for size in [BlockSize::Max64KB, BlockSize::Max4MB, BlockSize::Max256KB] {
            for mode in [BlockMode::Linked, BlockMode::Independent] {
                rows.extend(sized(&bytes, size, mode));
                expected.extend(&bytes);
            }
        }
        let mut out = Vec::new();
        let mut frames = Frames::new(&rows[..]);
        frames.read_exact(&mut [0; 10]).unwrap();
        assert_eq!(frames.read(&mut []).unwrap(), 0);
        out.extend(&expected[..10]);
        frames.read_to_end(&mut out).unwrap();
        assert!(out == expected);
        let cut = &frame(&bytes)[..1000];
        assert!(Frames::new(cut).read_to_end(&mut Vec::new()).is_err());
        assert!(
            Frames::new(&b"no frame at all"[..])
                .read_to_end(&mut Vec::new())
                .is_err()
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_is_packed_is_unpacked(seed in prop::collection::vec(any::<u8>(), 1..300), times in 1_usize..900, block in 1_usize..100_000) {
            let bytes: Vec<u8> = seed.iter().copied().cycle().take(seed.len() * times).collect();
            let block = block.max(bytes.len() / 64 + 1);
            prop_assert!(unpack(&apple(&bytes, block)).unwrap() == bytes);
        }

        #[test]
        fn no_damage_makes_it_panic(at in 0_usize..400, value: u8, cut in 0_usize..400) {
            let mut stream = apple(&[b"abcdefgh".repeat(20), vec![7; 200]].concat(), 100);
            let length = stream.len();
            stream[at % length] = value;
            stream.truncate(length - cut % length);
            drop(unpack(&stream));
            let mut out = Vec::new();
            drop(Frames::new(&stream[..]).read_to_end(&mut out));
        }
    }
}
