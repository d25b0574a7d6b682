//! One plan of many segments: pulls are quicker with few large ones.

use std::collections::HashMap;

use crate::image::digest::Digest;
use crate::image::plan::Pieces;

/// Pieces from which on a plan is carried out. Fewer would keep connections waiting for each other at each end, more
/// would need more memory than 10 MiB.
const ENOUGH: usize = 1 << 16;

/// The plans of segments, joined in time that grows with their pieces and not with how many segments they are.
#[derive(Debug, Default)]
pub(super) struct Joined {
    plan: Pieces,
    /// Where in the plan each pack is.
    packs: HashMap<Digest, usize>,
    pieces: usize,
}

impl Joined {
    /// Adds the plan of the segment that follows.
    pub(super) fn add(&mut self, next: Pieces) {
        let mut files = Vec::with_capacity(next.files.len());
        for file in next.files {
            let known = self.plan.files.iter().position(|known| known.name == file.name);
            files.push(known.unwrap_or_else(|| {
                self.plan.files.push(file);
                self.plan.files.len() - 1
            }));
        }
        for mut blob in next.blobs {
            self.pieces += blob.pieces.len();
            for piece in &mut blob.pieces {
                piece.file = files[piece.file];
            }
            let blobs = &mut self.plan.blobs;
            match self.packs.get(&blob.descriptor.digest) {
                Some(&number) => blobs[number].pieces.append(&mut blob.pieces),
                None => {
                    self.packs.insert(blob.descriptor.digest, blobs.len());
                    blobs.push(blob);
                }
            }
        }
    }

    /// Is there nothing to carry out?
    pub(super) fn is_empty(&self) -> bool {
        self.plan.files.is_empty()
    }

    /// Is it worth carrying out?
    pub(super) fn is_enough(&self) -> bool {
        self.pieces >= ENOUGH
    }

    /// The plan.
    pub(super) fn finish(mut self) -> Pieces {
        for blob in &mut self.plan.blobs {
            blob.pieces
                .sort_by_key(|piece| (piece.packed.start, piece.packed.end, piece.file, piece.at));
        }
        self.plan
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::image::manifest::{Descriptor, Manifest};
    use crate::image::native::index::{self, Chunk, Segment};
    use crate::image::native::reader::{ContentDigest, Reader};
    use crate::image::native::{CONTENT, INDEX_TYPE, LAYERS_MAX, PACK_TYPE};

    /// An image of a disk of one byte a segment, and the bytes of its segments.
    fn tiny(segments: usize, packs: usize) -> (Manifest, Vec<Vec<u8>>) {
        let layer = |media_type: &str, digest, size| Descriptor {
            media_type: media_type.to_owned(),
            digest,
            size,
            annotations: BTreeMap::new(),
        };
        let length = 512 * segments as u64;
        let pack = |number: usize| Digest::of(&number.to_le_bytes());
        let mut layers: Vec<_> = (0..packs)
            .map(|number| layer(PACK_TYPE, pack(number), length))
            .collect();
        let mut content = ContentDigest::default();
        content.file(0, length);
        let mut all = Vec::new();
        for number in 0..segments {
            let chunk = Chunk {
                at: 512 * number as u64,
                length: 1,
                digest: Digest::of(b"x"),
                pack: 0,
                // The last comes first in its pack.
                packed_at: (segments - number) as u64,
                packed_length: 1,
            };
            content.chunk(chunk.at, chunk.length, &chunk.digest);
            let segment = Segment {
                file: 0,
                file_length: length,
                packs: vec![pack(number % packs)],
                chunks: vec![chunk],
            };
            let bytes = index::encode(&segment).unwrap();
            layers.push(layer(INDEX_TYPE, Digest::of(&bytes), bytes.len() as u64));
            all.push(bytes);
        }
        let manifest = Manifest {
            config: layers[0].clone(),
            artifact_type: None,
            layers,
            annotations: BTreeMap::from([(CONTENT.to_owned(), content.finish().to_string())]),
        };
        (manifest, all)
    }

    #[test]
    fn an_index_of_tiny_segments_costs_no_more_than_one_of_few() {
        for packs in [1, LAYERS_MAX / 2] {
            let (manifest, segments) = tiny(LAYERS_MAX - packs, packs);
            let start = Instant::now();
            let mut reader = Reader::new(&manifest).unwrap();
            let mut joined = Joined::default();
            for segment in &segments {
                joined.add(reader.next(segment).unwrap());
            }
            assert!(!joined.is_enough());
            let plan = joined.finish();
            reader.finish().unwrap();
            assert_eq!(plan.check(), Ok(()));
            let took = start.elapsed();
            assert_eq!((plan.files.len(), plan.blobs.len()), (1, packs));
            let pieces: usize = plan.blobs.iter().map(|blob| blob.pieces.len()).sum();
            assert_eq!(pieces, segments.len());
            // It takes a tenth of that, unoptimised.
            assert!(took < Duration::from_secs(5), "{packs} packs: {took:?}");
        }
    }
}
