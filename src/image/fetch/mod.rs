//! The pull engine: brings an image's bytes to the disk, verified, and forgets nothing that it has.
//!
//! ```text
//!            ┌─ source ── stream ──▶ decompress ─▶ format ─▶ sparse ─┐
//! provide ──▶┤                                                       ├─▶ work folder ─▶ store
//!            └─ plan::Pieces ──▶ pieces (ranges, threads) ───────────┘
//! ```
//!
//! | concern | modules |
//! |---|---|
//! | in which order | [`provide`], [`make`] |
//! | who may have what is here | [`access`] |
//! | where bytes come from | [`source`] |
//! | how a stream is unpacked | `stream` starts the threads, `verified` counts and hashes, `unpacker` unpacks ([`decompress`], `decoder`, `gunzip`, `inflate`, `unzstd`), `unpacked` is what formats read, [`sparse`] writes |
//! | how a stream goes on in another process | [`ledger`], `checkpoint` |
//! | how several files become one disk | `flatten`; `beginning` hears their names |
//! | how pieces are fetched | [`pieces`] brings them, `batch` divides them, `site` and `codec` unpack, `placed` writes, `done` remembers |
//! | who else makes the same image, and what is there of it | [`partial`], [`sight`] |
//! | whether there is room beside what others will take | [`room`], [`sight`] |
//! | what an image is, without fetching it | [`look`] |
//! | what is told meanwhile | [`progress`] |

mod access;
mod batch;
mod beginning;
mod checkpoint;
mod codec;
mod decoder;
pub(super) mod decompress;
mod done;
mod flatten;
mod gunzip;
mod inflate;
pub(super) mod ledger;
pub(super) mod look;
mod make;
mod part;
pub(super) mod partial;
pub(super) mod pieces;
mod placed;
pub(super) mod progress;
pub(super) mod provide;
pub(super) mod room;
mod sight;
mod site;
pub(super) mod source;
pub(super) mod sparse;
mod stream;
mod unpacked;
mod unpacker;
mod unzstd;
mod verified;

#[cfg(any(test, fuzzing))]
pub(super) use gunzip::fuzz as fuzz_gunzip;
