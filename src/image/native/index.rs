//! One segment of the index: which chunks a region of a file is made of, and where each lies packed.
//!
//! `docs/image-format.md` is the specification. A segment was written by a stranger: everything is checked, and nothing is
//! reserved for numbers that the bytes at hand do not bear out.

use std::io::Read as _;

use crate::image::digest::Digest;

/// What a segment begins with; the last letter is the version.
const MAGIC: [u8; 8] = *b"CANINDX1";

/// Most chunks of a segment that we write: their segment has about 2.5 MiB.
pub(super) const CHUNKS_MAX: usize = 1 << 16;

/// Largest segment, packed or not, in bytes: as large as a manifest may be, so that it is fetched like one.
pub(super) const SIZE_MAX: u64 = 4 << 20;

/// Longest chunk that a reader must take, in bytes. Ours end far earlier.
pub(super) const CHUNK_MAX: u64 = 1 << 20;

/// Least bytes of a segment's chunks on average, all but one: so the length of a disk bounds what its index can make a reader do.
/// Writers cut at the borders of blocks, and only the last chunk of a file may be shorter than one.
const MEAN_LEAST: u64 = super::chunk::BLOCK as u64;

/// Bytes that zstd adds at most to a chunk that cannot be packed, beyond a 128th of it.
const FRAME_SLACK: u64 = 1024;

/// Window of a segment's zstd frame, as a power of two: no decoder needs more memory than for the segment itself.
const WINDOW_LOG_MAX: u32 = 22;

/// How hard a segment is packed; most of it are digests, for which nothing helps.
const LEVEL: i32 = 9;

/// A segment, decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Segment {
    /// Which of the image's files: see [`super::FILES`].
    pub(super) file: usize,
    /// The file's length in bytes, holes included.
    pub(super) file_length: u64,
    /// The packs that the chunks lie in.
    pub(super) packs: Vec<Digest>,
    /// In the order of the file; they do not overlap.
    pub(super) chunks: Vec<Chunk>,
}

/// One chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunk {
    /// Where it begins in the file.
    pub(super) at: u64,
    /// Its bytes.
    pub(super) length: u32,
    /// SHA-256 of them.
    pub(super) digest: Digest,
    /// Index in [`Segment::packs`].
    pub(super) pack: u32,
    /// Where its frame begins in the pack.
    pub(super) packed_at: u64,
    /// Bytes of its frame.
    pub(super) packed_length: u32,
}

/// Most bytes that an honest frame has for so many bytes of a chunk.
fn frame_max(length: u64) -> u64 {
    length + length / 128 + FRAME_SLACK
}

/// Packs a segment into the bytes of its layer.
///
/// # Errors
/// What zstd says; it has no reason to.
pub(super) fn encode(segment: &Segment) -> std::io::Result<Vec<u8>> {
    zstd::bulk::compress(&plain(segment), LEVEL)
}

fn plain(segment: &Segment) -> Vec<u8> {
    let mut out = Vec::with_capacity(64 + segment.packs.len() * 32 + segment.chunks.len() * 44);
    out.extend_from_slice(&MAGIC);
    put(&mut out, segment.file as u64);
    put(&mut out, segment.file_length);
    put(&mut out, segment.packs.len() as u64);
    put(&mut out, segment.chunks.len() as u64);
    for pack in &segment.packs {
        out.extend_from_slice(pack.as_bytes());
    }
    // Column by column: like stands beside like, which is what packs well.
    let mut end = 0;
    for chunk in &segment.chunks {
        put(&mut out, chunk.at - end);
        end = chunk.at + u64::from(chunk.length);
    }
    for chunk in &segment.chunks {
        put(&mut out, u64::from(chunk.length));
    }
    for chunk in &segment.chunks {
        put(&mut out, u64::from(chunk.pack));
    }
    // Most frames follow the one before.
    let mut ends = vec![0_u64; segment.packs.len()];
    for chunk in &segment.chunks {
        let end = &mut ends[chunk.pack as usize];
        put(&mut out, zigzag(chunk.packed_at, *end));
        *end = chunk.packed_at + u64::from(chunk.packed_length);
    }
    for chunk in &segment.chunks {
        put(&mut out, u64::from(chunk.packed_length));
    }
    for chunk in &segment.chunks {
        out.extend_from_slice(chunk.digest.as_bytes());
    }
    out
}

/// Reads the bytes of a segment's layer; the error is a reason.
pub(super) fn decode(packed: &[u8]) -> Result<Segment, String> {
    let unreadable = |error: std::io::Error| format!("a segment of its index cannot be unpacked ({error})");
    let mut decoder = zstd::stream::read::Decoder::with_buffer(packed).map_err(unreadable)?;
    decoder.window_log_max(WINDOW_LOG_MAX).map_err(unreadable)?;
    let mut bytes = Vec::new();
    decoder
        .take(SIZE_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    if bytes.len() as u64 > SIZE_MAX {
        return Err(format!("a segment of its index has more than {SIZE_MAX} bytes"));
    }
    parse(&bytes).map_err(|reason| format!("a segment of its index {reason}"))
}

/// Reads an unpacked segment.
pub(super) fn parse(bytes: &[u8]) -> Result<Segment, &'static str> {
    let mut rest = bytes.strip_prefix(&MAGIC).ok_or("does not begin as one")?;
    let rest = &mut rest;
    let file = usize::try_from(take(rest)?).map_err(|_| "names a file that no image has")?;
    let file_length = take(rest)?;
    let packs = count(rest, 32)?;
    let chunks = {
        let chunks = take(rest)?;
        // 32 bytes of digest and one at least in each of five columns.
        if chunks > (rest.len() as u64) / 37 {
            return Err("counts more chunks than it has");
        }
        usize::try_from(chunks).map_err(|_| "counts more chunks than it has")?
    };
    if packs as u64 > (rest.len() as u64) / 32 {
        return Err("counts more packs than it has");
    }
    let packs = (0..packs).map(|_| digest(rest)).collect::<Result<Vec<_>, _>>()?;
    let empty = Chunk {
        at: 0,
        length: 0,
        digest: Digest::from_bytes([0; 32]),
        pack: 0,
        packed_at: 0,
        packed_length: 0,
    };
    let mut all = vec![empty; chunks];
    for chunk in &mut all {
        chunk.at = take(rest)?;
    }
    let (mut end, mut covered) = (0_u64, 0_u64);
    for chunk in &mut all {
        let length = take(rest)?;
        if length == 0 || length > CHUNK_MAX {
            return Err("has a chunk of an impossible length");
        }
        chunk.length = u32::try_from(length).map_err(|_| "has a chunk of an impossible length")?;
        let outside = "has a chunk outside of its file";
        chunk.at = end.checked_add(chunk.at).ok_or(outside)?;
        end = chunk.at.checked_add(length).ok_or(outside)?;
        if end > file_length {
            return Err(outside);
        }
        covered += length;
    }
    if covered / MEAN_LEAST < all.len().saturating_sub(1) as u64 {
        return Err("has chunks of fewer than 4096 bytes on average");
    }
    let mut used = vec![false; packs.len()];
    for chunk in &mut all {
        chunk.pack = u32::try_from(take(rest)?).map_err(|_| "names a pack that it does not list")?;
        *used
            .get_mut(chunk.pack as usize)
            .ok_or("names a pack that it does not list")? = true;
    }
    if !used.iter().all(|&used| used) {
        return Err("lists a pack that it does not use");
    }
    for chunk in &mut all {
        chunk.packed_at = take(rest)?;
    }
    let mut ends = vec![0_u64; packs.len()];
    for chunk in &mut all {
        let packed = take(rest)?;
        if packed == 0 || packed > frame_max(u64::from(chunk.length)) {
            return Err("has a frame of an impossible length");
        }
        chunk.packed_length = u32::try_from(packed).map_err(|_| "has a frame of an impossible length")?;
        let outside = "has a frame outside of its pack";
        let end = ends.get_mut(chunk.pack as usize).ok_or(outside)?;
        chunk.packed_at = unzigzag(chunk.packed_at, *end).ok_or(outside)?;
        *end = chunk.packed_at.checked_add(packed).ok_or(outside)?;
    }
    for chunk in &mut all {
        chunk.digest = digest(rest)?;
    }
    if !rest.is_empty() {
        return Err("has bytes behind its end");
    }
    Ok(Segment {
        file,
        file_length,
        packs,
        chunks: all,
    })
}

/// Reads a segment, packed or not; for fuzzers. What is taken has one spelling.
#[cfg(any(test, fuzzing))]
pub(in crate::image) fn fuzz(bytes: &[u8]) {
    if let Ok(segment) = parse(bytes) {
        assert_eq!(plain(&segment), bytes);
        let end = segment
            .chunks
            .last()
            .map_or(0, |chunk| chunk.at + u64::from(chunk.length));
        assert!(end <= segment.file_length);
    }
    if let Err(reason) = decode(bytes) {
        crate::image::fuzz::one_line(&reason);
    }
}

/// A number of things that take `each` bytes at least.
fn count(rest: &mut &[u8], each: usize) -> Result<usize, &'static str> {
    let count = usize::try_from(take(rest)?).map_err(|_| "counts more than it has")?;
    if count > rest.len() / each {
        return Err("counts more than it has");
    }
    Ok(count)
}

fn digest(rest: &mut &[u8]) -> Result<Digest, &'static str> {
    let (head, tail) = rest.split_first_chunk::<32>().ok_or("ends too early")?;
    *rest = tail;
    Ok(Digest::from_bytes(*head))
}

/// Writes a number in groups of seven bits, the lowest first; the top bit says that more follow.
fn put(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    out.push((number & 0x7f) as u8);
}

/// Reads a number. Each has one spelling only, so that a segment has one digest.
fn take(rest: &mut &[u8]) -> Result<u64, &'static str> {
    let mut number = 0_u64;
    for shift in (0..64).step_by(7) {
        let (&byte, tail) = rest.split_first().ok_or("ends too early")?;
        *rest = tail;
        let bits = u64::from(byte & 0x7f);
        if bits.checked_shl(shift).map(|shifted| shifted >> shift) != Some(bits) {
            break;
        }
        number |= bits << shift;
        if byte & 0x80 == 0 {
            if byte == 0 && shift > 0 {
                return Err("spells a number with needless zeros");
            }
            return Ok(number);
        }
    }
    Err("has a number of more than 64 bits")
}

/// The distance from `from` to `to`, small in either direction; modulo 2^64, so that every pair has one.
fn zigzag(to: u64, from: u64) -> u64 {
    let distance = to.wrapping_sub(from).cast_signed();
    ((distance << 1) ^ (distance >> 63)).cast_unsigned()
}

/// The place at a distance; none when it would lie before 0 or beyond 2^64.
fn unzigzag(distance: u64, from: u64) -> Option<u64> {
    let signed = (distance >> 1).cast_signed() ^ -((distance & 1).cast_signed());
    from.checked_add_signed(signed)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn segment() -> Segment {
        let chunk = |at, length, pack, packed_at, packed_length| Chunk {
            at,
            length,
            digest: Digest::of(&at.to_le_bytes()),
            pack,
            packed_at,
            packed_length,
        };
        Segment {
            file: 0,
            file_length: 1 << 40,
            packs: vec![Digest::of(b"one"), Digest::of(b"two")],
            chunks: vec![
                chunk(4096, 65_536, 1, 0, 20_000),
                chunk(69_632, 4096, 0, 7, 300),
                // The same frame once more, and one that lies before it.
                chunk(1 << 30, 65_536, 1, 0, 20_000),
                chunk(1 << 39, 512, 1, 20_000, 30),
            ],
        }
    }

    #[test]
    fn a_segment_reads_what_it_writes() {
        let segment = segment();
        assert_eq!(decode(&encode(&segment).unwrap()), Ok(segment));
    }

    #[test]
    fn a_segment_has_these_bytes() {
        let small = Segment {
            file: 1,
            file_length: 300,
            packs: vec![Digest::from_bytes([0xaa; 32])],
            chunks: vec![Chunk {
                at: 130,
                length: 129,
                digest: Digest::from_bytes([0xbb; 32]),
                pack: 0,
                packed_at: 3,
                packed_length: 128,
            }],
        };
        // As in docs/image-format.md.
        let expected = [
            b"CANINDX1".as_slice(),
            &[1, 0xac, 2, 1, 1],
            &[0xaa; 32],
            &[0x82, 1, 0x81, 1, 0, 6, 0x80, 1],
            &[0xbb; 32],
        ]
        .concat();
        assert_eq!(plain(&small), expected);
        assert_eq!(parse(&expected), Ok(small));
    }

    #[test]
    fn a_dishonest_segment_is_refused() {
        let change = |change: fn(&mut Segment)| {
            let mut segment = segment();
            change(&mut segment);
            parse(&plain(&segment)).unwrap_err()
        };
        assert!(change(|s| s.file_length = 1 << 39).contains("outside of its file"));
        assert!(change(|s| s.chunks[0].length = 0).contains("impossible length"));
        assert!(change(|s| s.chunks[3].length = u32::MAX).contains("impossible length"));
        assert!(change(|s| s.chunks.iter_mut().for_each(|c| c.length = 3000)).contains("on average"));
        assert!(change(|s| s.chunks[1].packed_length = 0).contains("frame of an impossible length"));
        assert!(
            change(|s| s.chunks[1].packed_length = 4096 + 32 + 1025)
                .contains("frame of an impossible length")
        );
        assert!(change(|s| s.packs.push(Digest::of(b"three"))).contains("does not use"));
        assert!(change(|s| s.chunks[3].at = u64::MAX - 512).contains("outside of its file"));

        let plain = plain(&segment());
        for cut in 0..plain.len() {
            assert!(parse(&plain[..cut]).is_err(), "{cut} bytes");
        }
        assert!(
            parse(&[plain.as_slice(), &[0]].concat())
                .unwrap_err()
                .contains("behind its end")
        );
        let numbers = |numbers: &[u64]| {
            let mut bytes = MAGIC.to_vec();
            numbers.iter().for_each(|&number| put(&mut bytes, number));
            bytes
        };
        assert!(
            parse(&numbers(&[0, 1, u64::MAX, 0]))
                .unwrap_err()
                .contains("counts more")
        );
        assert!(
            parse(&numbers(&[0, 1, 0, u64::MAX]))
                .unwrap_err()
                .contains("counts more")
        );
        let needless = [MAGIC.as_slice(), &[0x80, 0]].concat();
        assert!(parse(&needless).unwrap_err().contains("needless"));
        let long = [MAGIC.as_slice(), &[0xff; 9], &[2]].concat();
        assert!(parse(&long).unwrap_err().contains("64 bits"));
    }

    #[test]
    fn a_bomb_is_cut_off() {
        let zeros = vec![0; 64 << 20];
        let bomb = zstd::bulk::compress(&zeros, 1).unwrap();
        assert!(bomb.len() < 16 << 10);
        assert!(decode(&bomb).unwrap_err().contains("more than"));
        // One that wants a window of 64 MiB is not even begun.
        let wide = zstd::bulk::compress(&zeros, 19).unwrap();
        assert!(decode(&wide).unwrap_err().contains("cannot be unpacked"));
        assert!(decode(b"no zstd").is_err());
        assert!(decode(b"").is_err());
    }

    proptest! {
        #[test]
        fn every_number_reads_what_it_writes(number: u64, other: u64) {
            let mut bytes = Vec::new();
            put(&mut bytes, number);
            let mut rest = bytes.as_slice();
            prop_assert_eq!(take(&mut rest), Ok(number));
            prop_assert!(rest.is_empty());
            let (low, high) = (number >> 1, other >> 1);
            prop_assert_eq!(unzigzag(zigzag(low, high), high), Some(low));
        }

        #[test]
        fn every_segment_reads_what_it_writes(
            shape in prop::collection::vec((0_u64..1 << 20, 1_u32..1 << 20, 0_u32..3, 0_u64..1 << 40, 1_u32..1000, any::<[u8; 32]>()), 0..50),
        ) {
            let mut end = 0;
            let mut chunks: Vec<Chunk> = Vec::new();
            for (gap, length, pack, packed_at, packed_length, digest) in shape {
                let at = end + gap;
                end = at + u64::from(length);
                let digest = Digest::from_bytes(digest);
                chunks.push(Chunk { at, length, digest, pack, packed_at, packed_length });
            }
            let used = chunks.iter().map(|chunk| chunk.pack as usize + 1).max().unwrap_or(0);
            let honest = (0..used).all(|pack| chunks.iter().any(|chunk| chunk.pack as usize == pack));
            prop_assume!(honest);
            let packs = (0..used).map(|pack| Digest::of(&[u8::try_from(pack).unwrap()])).collect();
            let segment = Segment { file: 2, file_length: end, packs, chunks };
            prop_assert_eq!(decode(&encode(&segment).unwrap()), Ok(segment));
        }

        #[test]
        fn changed_bytes_are_read_or_refused_and_have_one_spelling(at in 0_usize..300, to: u8) {
            let mut bytes = plain(&segment());
            let at = at % bytes.len();
            bytes[at] = to;
            if let Ok(segment) = parse(&bytes) {
                prop_assert_eq!(plain(&segment), bytes);
            }
        }
    }
}
