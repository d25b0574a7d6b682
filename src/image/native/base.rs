//! What an earlier image brings: chunks that lie packed already.

use std::collections::HashMap;

use super::reader::Reader;
use crate::image::digest::Digest;
use crate::image::manifest::{Descriptor, Manifest};

/// Most chunks that are remembered, for the sake of memory: 56 MiB hold those of 64 GiB and more of data. Chunks beyond are
/// packed again when they are met.
const CHUNKS_MAX: usize = 1 << 20;

/// Where a chunk lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Index of the pack.
    pub(super) pack: u32,
    pub(super) at: u64,
    /// Bytes of the frame.
    pub(super) packed: u32,
}

/// An image whose packs the next one may refer to.
#[derive(Debug)]
pub(in crate::image) struct Base {
    reader: Reader,
    packs: Vec<Descriptor>,
    numbers: HashMap<Digest, u32>,
    chunks: Vec<(Digest, u32, Place)>,
}

impl Base {
    /// Begins with the manifest. The error is a reason.
    pub(in crate::image) fn new(manifest: &Manifest) -> Result<Self, String> {
        Ok(Self {
            reader: Reader::new(manifest)?,
            packs: Vec::new(),
            numbers: HashMap::new(),
            chunks: Vec::new(),
        })
    }

    /// The layers of its index, whose bytes [`Base::next`] wants one after the other.
    pub(in crate::image) fn segments(&self) -> &[Descriptor] {
        self.reader.segments()
    }

    /// Takes the next segment. The error is a reason.
    pub(in crate::image) fn next(&mut self, bytes: &[u8]) -> Result<(), String> {
        let pieces = self.reader.next(bytes)?;
        for blob in pieces.blobs {
            let packs = &mut self.packs;
            let number = *self.numbers.entry(blob.descriptor.digest).or_insert_with(|| {
                packs.push(blob.descriptor.clone());
                u32::try_from(packs.len() - 1).unwrap_or(u32::MAX)
            });
            for piece in blob.pieces {
                let sizes = (
                    u32::try_from(piece.length),
                    u32::try_from(piece.packed.end - piece.packed.start),
                );
                if let ((Ok(length), Ok(packed)), Some(digest)) = (sizes, piece.digest)
                    && self.chunks.len() < CHUNKS_MAX
                {
                    let at = piece.packed.start;
                    self.chunks.push((
                        digest,
                        length,
                        Place {
                            pack: number,
                            at,
                            packed,
                        },
                    ));
                }
            }
        }
        Ok(())
    }

    /// Ends the reading. The error is a reason.
    pub(in crate::image) fn finish(self) -> Result<Known, String> {
        self.reader.finish()?;
        let mut chunks = self.chunks;
        chunks.sort_unstable_by_key(|(digest, length, place)| (*digest, *length, place.pack, place.at));
        chunks.dedup_by_key(|(digest, length, _)| (*digest, *length));
        Ok(Known {
            packs: self.packs,
            chunks,
        })
    }
}

/// The chunks of a base, by digest.
#[derive(Debug, Default)]
pub(in crate::image) struct Known {
    pub(super) packs: Vec<Descriptor>,
    chunks: Vec<(Digest, u32, Place)>,
}

impl Known {
    pub(super) fn find(&self, digest: &Digest, length: u32) -> Option<Place> {
        let found = self
            .chunks
            .binary_search_by_key(&(*digest, length), |(digest, length, _)| (*digest, *length));
        Some(self.chunks[found.ok()?].2)
    }
}
