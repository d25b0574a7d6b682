//! Images in the formats that others read: what a disk becomes on its way into a registry, a layout folder or a file.
//!
//! Everything is a stream: no copy of the disk lies anywhere meanwhile, and memory does not grow with it. The same disk and
//! labels give the same digests, whoever writes them when.

mod container_disk;
mod disk;
mod documents;
mod pack;
mod qcow2;
mod sardinecake;

pub(super) use disk::Guest;
pub use pack::Packing;
