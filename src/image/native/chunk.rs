//! Where chunks begin and end: at places that depend on what the disk holds, not on where it holds it.
//!
//! A file system moves files by whole blocks, so only the borders of blocks are candidates, and most files end in the zeros
//! that fill up their last block, so such a block is a good one. `docs/image-format.md` is the specification; a reader
//! needs nothing of it, but two writers that cut alike find each other's chunks.

/// Bytes between two places where a chunk may end: the block of nearly every file system.
pub(super) const BLOCK: usize = 4096;

/// Least bytes of a chunk, unless a hole or the end of the disk is nearer.
pub(super) const LEAST: usize = 16 << 10;

/// Most bytes of a chunk.
pub(super) const MOST: usize = 256 << 10;

/// Zeros at the end of a block by which it is taken for the last of a file, in bytes.
const TAIL: usize = 64;

/// Of this many blocks, one ends a chunk by its hash, as a power of two.
const CUT_BITS: u32 = 4;

/// The multiplier of the block's hash: 2^64 divided by the golden ratio.
const FACTOR: u64 = 0x9E37_79B9_7F4A_7C15;

/// Whole zero bytes?
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    // Groups are compared at once, and most blocks that are no zeros say so in their first.
    let groups = bytes.chunks_exact(128);
    groups.remainder().iter().all(|&byte| byte == 0)
        && bytes.chunks_exact(128).all(|group| {
            group.chunks_exact(8).fold(0, |all, word| {
                all | u64::from_le_bytes(word.try_into().unwrap_or_default())
            }) == 0
        })
}

/// How many bytes at the start of `bytes` are blocks of nothing but zeros.
pub(super) fn hole(bytes: &[u8]) -> usize {
    bytes
        .chunks(BLOCK)
        .take_while(|block| is_zero(block))
        .map(<[u8]>::len)
        .sum()
}

/// Length of the chunk at the start of `bytes`, which must begin with a block that is no hole and go on for
/// [`MOST`] bytes or to the end of the region.
pub(super) fn length(bytes: &[u8]) -> usize {
    let mut length = 0;
    for block in bytes[..bytes.len().min(MOST)].chunks(BLOCK) {
        if length >= LEAST && is_zero(block) {
            break;
        }
        length += block.len();
        if length >= LEAST && ends_chunk(block) {
            break;
        }
    }
    // Zeros at the end need not be kept; what follows them is another chunk.
    while length > BLOCK && length.is_multiple_of(BLOCK) && is_zero(&bytes[length - BLOCK..length]) {
        length -= BLOCK;
    }
    length
}

fn ends_chunk(block: &[u8]) -> bool {
    is_zero(&block[block.len().saturating_sub(TAIL)..]) || hash(block) >> (64 - CUT_BITS) == 0
}

/// Mixes a block's words, as little-endian numbers; what is left over at the end of a disk plays no part.
fn hash(block: &[u8]) -> u64 {
    block.chunks_exact(8).fold(0_u64, |hash, word| {
        let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
        (hash.rotate_left(5) ^ word).wrapping_mul(FACTOR)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that look random and end no chunk by a tail of zeros.
    fn noise(length: usize, seed: u64) -> Vec<u8> {
        let mut state = seed;
        (0..length)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                (state >> 56).to_le_bytes()[0] | 1
            })
            .collect()
    }

    fn lengths(mut bytes: &[u8]) -> Vec<usize> {
        let mut all = Vec::new();
        loop {
            bytes = &bytes[hole(bytes)..];
            if bytes.is_empty() {
                return all;
            }
            all.push(length(bytes));
            bytes = &bytes[all[all.len() - 1]..];
        }
    }

    /// So that nobody changes by accident where chunks end: all that was pushed before would have to be pushed again.
    #[test]
    fn chunks_end_where_they_always_did() {
        let lengths = lengths(&noise(4 << 20, 1));
        assert_eq!(lengths.iter().sum::<usize>(), 4 << 20);
        assert_eq!(&lengths[..6], &[24_576, 81_920, 40_960, 28_672, 45_056, 20_480]);
    }

    #[test]
    fn chunks_keep_within_their_bounds() {
        let lengths = lengths(&noise(4 << 20, 2));
        let (_, but_last) = lengths.split_last().unwrap();
        assert!(
            but_last
                .iter()
                .all(|length| (LEAST..=MOST).contains(length) && length.is_multiple_of(BLOCK))
        );
        let same = vec![1; 1 << 20];
        assert_eq!(
            super::length(&same),
            MOST,
            "a block that ends no chunk never does"
        );
    }

    #[test]
    fn the_last_block_of_a_file_ends_a_chunk() {
        let mut bytes = vec![1; 1 << 20];
        bytes[40_960 - TAIL..40_960].fill(0);
        assert_eq!(length(&bytes), 40_960);
        bytes[40_960 - TAIL] = 1;
        assert_eq!(length(&bytes), MOST);
        // Too early.
        bytes[LEAST - BLOCK - TAIL..LEAST - BLOCK].fill(0);
        assert_eq!(length(&bytes), MOST);
    }

    #[test]
    fn zeros_end_a_chunk_and_belong_to_none() {
        let mut bytes = vec![1; 1 << 20];
        bytes[20_480..24_576].fill(0);
        assert_eq!(length(&bytes), 20_480);
        // Few data and many zeros.
        let mut bytes = vec![0; 1 << 20];
        bytes[..10].fill(1);
        assert_eq!(length(&bytes), BLOCK);
        bytes[2 * BLOCK] = 1;
        assert_eq!(length(&bytes), 3 * BLOCK, "a short hole is not worth a chunk");
        assert_eq!(hole(&bytes), 0);
        assert_eq!(hole(&bytes[3 * BLOCK..]), (1 << 20) - 3 * BLOCK);
        // A disk may end within a block.
        assert_eq!(length(&bytes[..100]), 100);
        assert_eq!(hole(&[0; 5000]), 5000);
        let mut bytes = [0; 5000];
        bytes[4500] = 1;
        assert_eq!(hole(&bytes), BLOCK);
    }

    #[test]
    fn what_moves_by_blocks_is_cut_alike() {
        let body = noise(4 << 20, 3);
        let moved = [noise(5 * BLOCK, 4), body.clone()].concat();
        let digests = |bytes: &[u8]| {
            let mut at = 0;
            let chunks: std::collections::BTreeSet<_> = lengths(bytes)
                .into_iter()
                .map(|length| {
                    at += length;
                    crate::image::Digest::of(&bytes[at - length..at])
                })
                .collect();
            chunks
        };
        let (before, after) = (digests(&body), digests(&moved));
        let shared = before.intersection(&after).count();
        assert!(
            shared + 5 > before.len() && before.len() > 30,
            "{shared} of {}",
            before.len()
        );
    }
}
