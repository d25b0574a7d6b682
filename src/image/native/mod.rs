//! Our own format: a disk in chunks, packed one by one, with an index of their digests.
//!
//! ```text
//! disk ─▶ chunk ─▶ digest ─▶ known? ──yes─▶ where it lies packed ─┐
//!                              └─no─▶ zstd frame ─▶ pack ─────────┴▶ index segment ─▶ manifest
//! ```
//!
//! `docs/image-format.md` says how the bytes look, so that somebody else could read and write them. [`Reader`] makes plans
//! for the engine, one segment at a time, so that memory does not grow with the image. A pull reads all segments twice: first for
//! what the image takes, and then to fetch it.

mod base;
mod catalogue;
mod chunk;
mod cutter;
mod index;
mod joined;
mod ledger;
mod need;
mod pull;
mod push;
mod reader;
mod segments;
mod writer;

#[cfg(any(test, fuzzing))]
pub(super) use index::fuzz as fuzz_index;

pub(super) use base::Known;
pub(super) use catalogue::NAME as CHUNKS;
pub(super) use pull::{Pull, pull};
pub(super) use push::{Order, push, read_base};
pub(super) use reader::{Reader, is_native};
pub(super) use writer::LEVEL;

/// The artifact type of an image.
pub(super) const ARTIFACT_TYPE: &str = "application/vnd.cannery.image.v1";

/// The media type of a pack: zstd frames, one a chunk.
pub(super) const PACK_TYPE: &str = "application/vnd.cannery.image.pack.v1+zstd";

/// The media type of a segment of the index.
pub(super) const INDEX_TYPE: &str = "application/vnd.cannery.image.index.v1+zstd";

/// The manifest's annotation with the digest of the content, which is the same however it is packed.
pub(super) const CONTENT: &str = "io.cannery.content";

/// The files of an image, by their numbers in the index, with their names in the store.
pub(super) const FILES: [&str; 3] = ["disk.raw", "kernel", "initrd"];

/// Most layers of an image. With them, its manifest stays below the 4 MiB that registries take.
pub(super) const LAYERS_MAX: usize = 16_384;

#[cfg(test)]
mod tests;
