//! Which bytes of a blob are asked for together, and which of them are unpacked together.

use std::ops::Range;

use crate::image::plan::{PackedBlob, Piece};

/// Unpacked or packed bytes from which on a piece is unpacked while it arrives instead of in memory.
const STREAMED_FROM: u64 = 8 << 20;

/// Packed bytes that are unpacked by one thread at a time, unless one piece alone has more.
const BATCH_PACKED: u64 = 1 << 20;

/// Unpacked bytes of a batch, likewise.
const BATCH_UNPACKED: u64 = 8 << 20;

/// Bytes of one request. Large enough that the way to the registry does not count, small enough that all connections have
/// work until the end.
const REQUEST: u64 = 16 << 20;

/// Bytes that nobody wants and that are fetched all the same, because a request of their own would take longer.
const GAP: u64 = 128 << 10;

/// The same where most of a blob is wanted.
const GAP_DENSE: u64 = 1 << 20;

/// Pieces whose packed bytes are held in memory together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Batch {
    /// Where they lie in the blob, gaps included.
    pub(super) range: Range<u64>,
    /// Their indexes in the blob.
    pub(super) pieces: Vec<usize>,
}

/// What one connection does without asking anybody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Unit {
    /// One request, whose bytes are unpacked in batches.
    Batches { blob: usize, batches: Vec<Batch> },
    /// One large piece with a digest of its own, unpacked while it arrives.
    Streamed { blob: usize, piece: usize },
    /// A whole blob, all pieces of it, verified by its own digest.
    Whole { blob: usize },
}

/// Divides what is missing of a blob.
pub(super) fn units(number: usize, blob: &PackedBlob, missing: impl Fn(usize) -> bool) -> Vec<Unit> {
    let wanted: Vec<usize> = (0..blob.pieces.len()).filter(|&index| missing(index)).collect();
    if wanted.is_empty() {
        return Vec::new();
    }
    if blob.pieces.iter().any(|piece| piece.digest.is_none()) {
        return vec![Unit::Whole { blob: number }];
    }
    let bytes: u64 = wanted.iter().map(|&index| packed(&blob.pieces[index])).sum();
    let dense = bytes.saturating_mul(10) >= blob.descriptor.size.saturating_mul(6);
    let gap = if dense { GAP_DENSE } else { GAP };
    let mut units = Vec::new();
    let mut batches: Vec<Batch> = Vec::new();
    for batch in batched(blob, &wanted, gap) {
        let alone = &blob.pieces[batch.pieces[0]];
        if batch.pieces.len() == 1 && is_large(alone) {
            close(number, &mut batches, &mut units);
            units.push(Unit::Streamed {
                blob: number,
                piece: batch.pieces[0],
            });
            continue;
        }
        let joins = batches.last().is_some_and(|last| {
            batch.range.start <= last.range.end + gap && batch.range.end - batches[0].range.start <= REQUEST
        });
        if !joins {
            close(number, &mut batches, &mut units);
        }
        batches.push(batch);
    }
    close(number, &mut batches, &mut units);
    units
}

fn close(blob: usize, batches: &mut Vec<Batch>, units: &mut Vec<Unit>) {
    if !batches.is_empty() {
        let batches = std::mem::take(batches);
        units.push(Unit::Batches { blob, batches });
    }
}

fn batched(blob: &PackedBlob, wanted: &[usize], gap: u64) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    let mut unpacked = 0_u64;
    for &index in wanted {
        let piece = &blob.pieces[index];
        if let Some(last) = batches.last_mut() {
            // Two pieces of the same packed bytes cannot be parted: they are asked for once.
            let same = piece.packed.start < last.range.end;
            let near = piece.packed.start <= last.range.end + gap
                && piece.packed.end - last.range.start <= BATCH_PACKED
                && unpacked.saturating_add(piece.length) <= BATCH_UNPACKED;
            let large = is_large(piece) || is_large(&blob.pieces[last.pieces[0]]);
            if (near || same) && !large {
                last.range.end = piece.packed.end;
                last.pieces.push(index);
                unpacked = unpacked.saturating_add(piece.length);
                continue;
            }
        }
        unpacked = piece.length;
        batches.push(Batch {
            range: piece.packed.clone(),
            pieces: vec![index],
        });
    }
    batches
}

fn packed(piece: &Piece) -> u64 {
    piece.packed.end - piece.packed.start
}

pub(super) fn is_large(piece: &Piece) -> bool {
    piece.length >= STREAMED_FROM || packed(piece) >= STREAMED_FROM
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::image::digest::Digest;
    use crate::image::manifest::Descriptor;
    use crate::image::plan::Codec;

    /// A blob of pieces of these packed lengths and gaps before them.
    fn blob(lengths: &[(u64, u64)], unpacked: u64) -> PackedBlob {
        let mut end = 0;
        let pieces = lengths
            .iter()
            .enumerate()
            .map(|(number, &(gap, length))| {
                let start = end + gap;
                end = start + length;
                Piece {
                    packed: start..end,
                    codec: Codec::Zstd,
                    file: 0,
                    at: number as u64 * unpacked,
                    length: unpacked,
                    digest: Some(Digest::of(b"")),
                }
            })
            .collect();
        PackedBlob {
            descriptor: Descriptor {
                media_type: String::new(),
                digest: Digest::of(b""),
                size: end,
                annotations: std::collections::BTreeMap::new(),
            },
            pieces,
        }
    }

    #[test]
    fn a_blob_that_is_wanted_whole_is_asked_for_in_large_parts() {
        let blob = blob(&[(0, 64 << 10); 1024], 256 << 10);
        let units = units(0, &blob, |_| true);
        assert_eq!(units.len(), 4, "64 MiB in requests of 16");
        let Unit::Batches { batches, .. } = &units[0] else {
            panic!("{units:?}");
        };
        assert_eq!((batches.len(), batches[0].pieces.len()), (16, 16));
    }

    #[test]
    fn what_is_here_already_is_not_asked_for() {
        let blob = blob(&[(0, 64 << 10); 1024], 256 << 10);
        assert_eq!(units(0, &blob, |_| false), []);
        // Every hundredth piece: far from each other, so each is a request of its own.
        assert_eq!(units(0, &blob, |index| index % 100 == 0).len(), 11);
        // Every second: the gaps cost less than requests.
        assert_eq!(units(0, &blob, |index| index % 2 == 0).len(), 4);
    }

    #[test]
    fn large_pieces_are_streamed_and_unverified_ones_come_whole() {
        let mut mixed = blob(&[(0, 1 << 10), (0, 1 << 10), (0, 9 << 20)], 9 << 20);
        mixed.pieces[0].length = 4 << 10;
        let found = units(3, &mixed, |_| true);
        assert!(
            matches!(
                found[..],
                [
                    Unit::Batches { .. },
                    Unit::Streamed { blob: 3, piece: 1 },
                    Unit::Streamed { blob: 3, piece: 2 }
                ]
            ),
            "{found:?}"
        );
        mixed.pieces[2].digest = None;
        assert_eq!(units(3, &mixed, |_| true), [Unit::Whole { blob: 3 }]);
    }

    #[test]
    fn pieces_of_the_same_bytes_stay_together() {
        let mut twice = blob(&[(0, 600 << 10), (0, 600 << 10)], 1 << 20);
        twice.pieces.insert(1, twice.pieces[0].clone());
        let Unit::Batches { batches, .. } = &units(0, &twice, |_| true)[0] else {
            panic!("batches");
        };
        assert_eq!(batches[0].pieces, [0, 1]);
        assert_eq!(batches[1].pieces, [2]);
    }

    proptest! {
        #[test]
        fn every_missing_piece_is_fetched_once_within_bounds(
            lengths in prop::collection::vec((0_u64..300_000, 1_u64..900_000), 1..60),
            missing in prop::collection::vec(any::<bool>(), 60),
        ) {
            let blob = blob(&lengths, 100_000);
            let mut seen = Vec::new();
            let mut last = 0;
            for unit in units(0, &blob, |index| missing[index]) {
                let Unit::Batches { batches, .. } = unit else { panic!("no large pieces here") };
                prop_assert!(batches[batches.len() - 1].range.end - batches[0].range.start <= REQUEST);
                for batch in batches {
                    prop_assert!(batch.range.start >= last);
                    last = batch.range.end;
                    for &index in &batch.pieces {
                        let packed = &blob.pieces[index].packed;
                        prop_assert!(batch.range.start <= packed.start && packed.end <= batch.range.end);
                    }
                    seen.extend(batch.pieces);
                }
            }
            let wanted: Vec<usize> = (0..lengths.len()).filter(|&index| missing[index]).collect();
            prop_assert_eq!(seen, wanted);
        }
    }
}
