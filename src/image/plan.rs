//! What has to be fetched for an image that comes in pieces, and where each piece belongs.
//!
//! Formats make plans and fetch nothing; the engine carries plans out and knows no format. Pieces may come in any order and
//! at the same time; each says where its packed bytes are, where its unpacked bytes go, and what they must hash to.
//! Nothing is said about bytes that no piece covers: they are holes.

use std::ops::Range;

use super::digest::{Digest, Hasher};
use super::manifest::Descriptor;

/// Pieces of one or more files.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Pieces {
    /// The files that the pieces make up, with their names in the image's folder in the store.
    pub(super) files: Vec<PlannedFile>,
    /// Where the pieces' packed bytes are.
    pub(super) blobs: Vec<PackedBlob>,
}

/// A file in the making.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PlannedFile {
    /// `disk.raw`, `kernel`, `initrd`.
    pub(super) name: &'static str,
    /// Its final length in bytes, holes included.
    pub(super) length: u64,
}

/// One blob of the source, and what lies in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PackedBlob {
    pub(super) descriptor: Descriptor,
    /// In the order of their packed bytes, which are the same or do not overlap.
    pub(super) pieces: Vec<Piece>,
}

/// A piece of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    /// Its packed bytes in the blob.
    pub(super) packed: Range<u64>,
    /// How they are packed.
    pub(super) codec: Codec,
    /// Index of its file in [`Pieces::files`].
    pub(super) file: usize,
    /// Where its unpacked bytes begin in the file.
    pub(super) at: u64,
    /// Unpacked bytes; exactly so many must come out.
    pub(super) length: u64,
    /// What the unpacked bytes must hash to. Without it, the blob is fetched whole and verified by its own digest.
    pub(super) digest: Option<Digest>,
}

/// How a piece is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Codec {
    /// Not at all.
    Plain,
    /// One zstd frame.
    Zstd,
    /// Apple's LZ4 stream (`bv41`, `bv4-`, `bv4$`).
    AppleLz4,
    /// LZ4 frames.
    Lz4Frame,
}

impl Pieces {
    /// Looks for what no honest plan has; the error is a reason.
    pub(super) fn check(&self) -> Result<(), String> {
        let mut places = Vec::new();
        for blob in &self.blobs {
            let size = blob.descriptor.size;
            let mut last: Range<u64> = 0..0;
            // What is verified as a whole is read once, from its beginning to its end.
            let may_repeat = blob.pieces.iter().all(|piece| piece.digest.is_some());
            for piece in &blob.pieces {
                let packed = &piece.packed;
                if packed.start >= packed.end || packed.end > size {
                    return Err(format!(
                        "a piece lies at {}..{} of a layer of {size} bytes",
                        packed.start, packed.end
                    ));
                }
                let again = may_repeat && *packed == last;
                if packed.start < last.end && !again {
                    return Err("pieces of a layer overlap".to_owned());
                }
                last = packed.clone();
                let length = self.files.get(piece.file).map_or(0, |file| file.length);
                let end = piece.at.checked_add(piece.length);
                if piece.length == 0 || end.is_none_or(|end| end > length) {
                    return Err("a piece lies outside of its file".to_owned());
                }
                places.push((piece.file, piece.at, piece.length));
            }
        }
        places.sort_unstable();
        let overlap = places
            .windows(2)
            .any(|pair| pair[0].0 == pair[1].0 && pair[0].1 + pair[0].2 > pair[1].1);
        if overlap {
            return Err("two pieces claim one place of a file".to_owned());
        }
        Ok(())
    }

    /// What identifies the plan: its own digest.
    pub(super) fn identity(&self) -> Digest {
        let mut hasher = Hasher::default();
        let mut number = |number: u64| hasher.update(&number.to_le_bytes());
        number(self.files.len() as u64);
        for file in &self.files {
            number(file.length);
        }
        for blob in &self.blobs {
            number(blob.pieces.len() as u64);
            for piece in &blob.pieces {
                number(piece.packed.start);
                number(piece.packed.end);
                number(piece.codec as u64);
                number(piece.file as u64);
                number(piece.at);
                number(piece.length);
            }
        }
        for file in &self.files {
            hasher.update(file.name.as_bytes());
        }
        for blob in &self.blobs {
            hasher.update(blob.descriptor.digest.hex().as_bytes());
            for digest in blob.pieces.iter().filter_map(|piece| piece.digest) {
                hasher.update(digest.hex().as_bytes());
            }
        }
        hasher.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(packed: Range<u64>, at: u64, length: u64) -> Piece {
        Piece {
            packed,
            codec: Codec::Plain,
            file: 0,
            at,
            length,
            digest: Some(Digest::of(b"piece")),
        }
    }

    fn plan(pieces: Vec<Piece>) -> Pieces {
        Pieces {
            files: vec![PlannedFile {
                name: "disk.raw",
                length: 100,
            }],
            blobs: vec![PackedBlob {
                descriptor: Descriptor {
                    media_type: String::new(),
                    digest: Digest::of(b""),
                    size: 50,
                    annotations: std::collections::BTreeMap::new(),
                },
                pieces,
            }],
        }
    }

    #[test]
    fn only_a_plan_that_can_be_carried_out_passes() {
        let good = [
            vec![],
            vec![piece(0..50, 0, 100)],
            vec![piece(0..10, 50, 50), piece(10..20, 0, 50)],
            vec![piece(0..10, 50, 50), piece(0..10, 0, 50)],
        ];
        for pieces in good {
            assert_eq!(plan(pieces).check(), Ok(()));
        }
        let mut elsewhere = piece(0..10, 0, 1);
        elsewhere.file = 1;
        let mut unverified = piece(0..10, 0, 1);
        unverified.digest = None;
        let bad = [
            vec![piece(0..51, 0, 1)],
            vec![piece(5..5, 0, 1)],
            vec![piece(0..10, 0, 1), piece(9..20, 1, 1)],
            vec![piece(10..20, 0, 1), piece(0..10, 1, 1)],
            vec![piece(0..10, 100, 1)],
            vec![piece(0..10, 0, 0)],
            vec![piece(0..10, u64::MAX, 2)],
            vec![elsewhere],
            vec![unverified, piece(0..10, 1, 1)],
            vec![piece(0..10, 0, 51), piece(10..20, 50, 1)],
        ];
        for pieces in bad {
            assert!(plan(pieces.clone()).check().is_err(), "{pieces:?}");
        }
    }

    #[test]
    fn a_frame_that_many_pieces_have_costs_no_more_than_as_many_frames() {
        let pieces = (0..1_000_000).map(|at| piece(0..50, at, 1)).collect();
        let mut plan = plan(pieces);
        plan.files[0].length = 1_000_000;
        assert_eq!(plan.check(), Ok(()));
    }

    #[test]
    fn two_plans_have_two_identities() {
        let one = plan(vec![piece(0..10, 0, 10)]);
        let mut others = vec![plan(vec![]), plan(vec![piece(0..10, 1, 10)]), one.clone()];
        others[2].blobs[0].pieces[0].digest = Some(Digest::of(b""));
        assert_eq!(one.identity(), one.clone().identity());
        for other in others {
            assert_ne!(one.identity(), other.identity());
        }
    }
}
