//! What has to be fetched for an image that comes in pieces, and where each piece belongs.
//!
//! Formats make plans and fetch nothing; the engine carries plans out and knows no format. Pieces may come in any order and
//! at the same time; each says where its packed bytes are, where its unpacked bytes go, and what they must hash to.
//! Nothing is said about bytes that no piece covers: they are holes.

use std::ops::Range;

use super::digest::Digest;
use super::manifest::Descriptor;

/// Pieces of one or more files.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// In the order of their packed bytes, which do not overlap.
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
