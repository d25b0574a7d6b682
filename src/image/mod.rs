//! From a reference to a verified, read-only disk in the host's store.
//!
//! ```text
//! reference ─▶ source (registry, layout folder) ─▶ manifest for our platform
//!                                                       │ each layer, streamed once:
//!                                                       ▼
//!    digest ◀─ packed bytes ─▶ decompress ─▶ digest ─▶ format ─▶ sparse file in partial/
//!                                                       │ header check, one rename
//!                                                       ▼
//!                                                  disks/DIGEST
//! ```
//!
//! | concern | modules |
//! |---|---|
//! | what is asked for | [`Reference`], [`Request`], [`Credentials`] |
//! | where it comes from | `registry`, `layout`; both behind `fetch::source` |
//! | where it goes | `destination` |
//! | what it is | `manifest`, `platform`, `format`, `hints` |
//! | how it is fetched and unpacked | `fetch`; for images in pieces by a `plan` |
//! | whether it is harmless | `inspect` |
//! | what a guest sees of it | `view` |
//! | whether the operator wants it | [`Requirements`] |
//! | where it stays | [`Store`], `fetch::partial` |
//! | in which order | `fetch::provide` |
//!
//! Everything in an image was written by a stranger. Memory is bounded whatever it claims; nothing is visible
//! in the store before digests, sizes and headers are checked; no other program reads it before that.

mod destination;
mod digest;
mod error;
mod fetch;
mod format;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
mod hints;
mod inspect;
mod layout;
mod lz4;
mod manifest;
mod native;
mod plan;
mod platform;
mod policy;
mod reference;
mod registry;
mod single;
mod store;
mod view;
mod write;

pub use fetch::look::{Part, Sight};
use fetch::{decompress, ledger, progress, provide, room, source, sparse};

pub use digest::{Digest, NoDigest};
pub use error::Error;
pub use format::Format;
pub use hints::{DiskBus, Firmware, Hints, Nic};
pub use inspect::{DiskFormat, Hostility};
pub use policy::{Requirements, Signature};
pub use progress::{Event, Progress, Silent};
pub use provide::{PullPolicy, Request};
pub use reference::{InvalidReference, Reference};
pub use registry::credentials::{Credentials, CredentialsError, Login, Origin};
pub use registry::{AuthFile, Keeper, Private, Registries, RegistryOptions, verify_login};
pub use room::Limits;
pub use store::{
    Asker, Boot, Candidate, Disk, Freed, Going, Held, InvalidPinName, Lease, MakeRoom, Name, PinName, Policy,
    Reason, Shared, Store, Verdict, plan,
};
pub use write::{Addressee, Draft, Format as WriteFormat, Native, Packing, Written, make, save, write};
