//! What an image takes in the store, as its index says it.

use super::FILES;
use super::catalogue;
use super::chunk::BLOCK;
use super::index::CHUNK_MAX;
use crate::image::digest::{Digest, Hasher};
use crate::image::plan::Pieces;

/// Bytes that an image takes, summed up plan by plan.
#[derive(Debug)]
pub(super) struct Need {
    /// Digests of one block of zeros, of two, and so on to the longest chunk.
    zeros: Vec<Digest>,
    bytes: u64,
}

impl Need {
    pub(super) fn new() -> Self {
        let mut hasher = Hasher::default();
        let blocks = usize::try_from(CHUNK_MAX).unwrap_or_default() / BLOCK;
        let zeros = (0..blocks).map(|_| {
            hasher.update(&[0; BLOCK]);
            hasher.clone().finish()
        });
        Self {
            zeros: zeros.collect(),
            bytes: 0,
        }
    }

    /// Adds what a plan makes: its chunks, but for those of zeros, which stay holes, and what is listed of the disk's.
    pub(super) fn add(&mut self, plan: &Pieces) {
        for piece in plan.blobs.iter().flat_map(|blob| &blob.pieces) {
            if !self.is_zeros(piece.length, piece.digest.as_ref()) {
                self.bytes = self.bytes.saturating_add(piece.length);
            }
            if plan.files[piece.file].name == FILES[0] {
                self.bytes = self.bytes.saturating_add(catalogue::BYTES_A_CHUNK);
            }
        }
    }

    /// The sum.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Writers that follow the format's advice pass zeros over; the chunks of others, too, are whole blocks.
    fn is_zeros(&self, length: u64, digest: Option<&Digest>) -> bool {
        let blocks = length / BLOCK as u64;
        let zeros = usize::try_from(blocks)
            .ok()
            .and_then(|blocks| self.zeros.get(blocks.checked_sub(1)?));
        length.is_multiple_of(BLOCK as u64) && zeros.is_some() && zeros == digest
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::image::manifest::Descriptor;
    use crate::image::plan::{Codec, PackedBlob, Piece, PlannedFile};

    /// A plan of one file, with a pack for each chunk.
    fn plan(name: &'static str, chunks: &[&[u8]]) -> Pieces {
        let blob = |chunk: &&[u8]| PackedBlob {
            descriptor: Descriptor {
                media_type: String::new(),
                digest: Digest::of(b"pack"),
                size: 1 << 20,
                annotations: BTreeMap::new(),
            },
            pieces: vec![Piece {
                packed: 0..5,
                codec: Codec::Zstd,
                file: 0,
                at: 0,
                length: chunk.len() as u64,
                digest: Some(Digest::of(chunk)),
            }],
        };
        let length = 1 << 30;
        Pieces {
            files: vec![PlannedFile { name, length }],
            blobs: chunks.iter().map(blob).collect(),
        }
    }

    #[test]
    fn data_is_needed_and_zeros_are_not() {
        const MIB: usize = 1 << 20;
        let (zeros, ones) = (vec![0; MIB], vec![1; MIB]);
        let listed = catalogue::BYTES_A_CHUNK;
        let table: &[(&'static str, &[&[u8]], u64)] = &[
            (FILES[0], &[], 0),
            (FILES[0], &[&ones], (1 << 20) + listed),
            (
                FILES[0],
                &[&ones[..1], &ones[..4096], &ones[..5000]],
                9097 + 3 * listed,
            ),
            (FILES[1], &[&ones[..4096], &ones[..8192]], 12_288),
            // A hole has its line in the lists all the same.
            (
                FILES[0],
                &[&zeros, &zeros[..4096], &ones[..4096]],
                4096 + 3 * listed,
            ),
            (FILES[2], &[&zeros[..8192]], 0),
            // No block: taken for data.
            (FILES[2], &[&zeros[..5000]], 5000),
        ];
        let (mut all, mut sum) = (Need::new(), 0);
        for (name, chunks, bytes) in table {
            let mut need = Need::new();
            for need in [&mut need, &mut all] {
                need.add(&plan(name, chunks));
            }
            assert_eq!(need.bytes(), *bytes, "{name}, {} chunks", chunks.len());
            sum += bytes;
        }
        assert_eq!(all.bytes(), sum);
    }
}
