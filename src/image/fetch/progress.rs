//! What a pull tells while it runs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::image::digest::Digest;
use crate::image::error::Error;

/// Hears what happens. Called from the task that asked, several times a second; the receiver throttles.
pub trait Progress: Sync {
    /// Something happened.
    fn event(&self, event: Event<'_>);
}

/// Hears nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn event(&self, _: Event<'_>) {}
}

/// A step on the way from a reference to a disk.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The reference leads to this manifest.
    Resolved {
        /// Digest of the manifest for this platform.
        digest: &'a Digest,
    },
    /// The disk is in the store already.
    Cached {
        /// Its digest.
        digest: &'a Digest,
    },
    /// Another process fetches the same image; we wait for it.
    Waiting {
        /// What it fetches.
        digest: &'a Digest,
        /// How long we have waited.
        waited: Duration,
        /// Compressed bytes that it has; 0 while it does not say.
        done: u64,
        /// Compressed bytes of the whole image; 0 while it does not say.
        total: u64,
    },
    /// Bytes have arrived.
    Fetching {
        /// Compressed bytes so far.
        done: u64,
        /// Compressed bytes of the whole image.
        total: u64,
    },
    /// An earlier pull of the same image was cut off; what it had brought is used.
    Resumed {
        /// Compressed bytes that are not fetched again.
        kept: u64,
    },
    /// Another image of this host has a part of this one.
    Reused {
        /// Compressed bytes that are not fetched for that reason.
        bytes: u64,
    },
    /// Bytes have been unpacked.
    Unpacking {
        /// Bytes of disk so far, holes included.
        written: u64,
    },
    /// Everything is checked, and the disk stands in the store.
    Verified {
        /// Its digest.
        digest: &'a Digest,
    },
    /// The registry is out of reach; the image is given from the store, since the registry allowed it a short while ago.
    Offline {
        /// How it is out of reach.
        error: &'a Error,
        /// How long ago.
        ago: Duration,
    },
    /// A disk is being read to be written as an image.
    Writing {
        /// Bytes read so far.
        done: u64,
        /// Bytes that will be read.
        total: u64,
    },
    /// A pull policy failed and the next of the list is tried.
    PolicyFailed {
        /// Why.
        error: &'a Error,
    },
}

/// Counts what threads do, for the task that reports it.
#[derive(Debug, Default)]
pub(in crate::image) struct Meter {
    fetched: AtomicU64,
    unpacked: AtomicU64,
    /// Packed bytes that need not be fetched, since they are here in some way.
    here: AtomicU64,
}

impl Meter {
    pub(in crate::image) fn add_fetched(&self, bytes: usize) {
        self.fetched.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(in crate::image) fn add_unpacked(&self, bytes: usize) {
        self.unpacked.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(in crate::image) fn add_here(&self, bytes: u64) {
        self.here.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Packed bytes that are here now, fetched or not.
    pub(in crate::image) fn done(&self) -> u64 {
        self.fetched() + self.here.load(Ordering::Relaxed)
    }

    pub(in crate::image) fn fetched(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    pub(in crate::image) fn unpacked(&self) -> u64 {
        self.unpacked.load(Ordering::Relaxed)
    }
}
