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
