//! What a pull tells while it runs.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::manifest::Descriptor;
use crate::image::registry::Unanswered;

/// How often progress is told while something goes on.
const TELL_EVERY: Duration = Duration::from_millis(250);

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
    /// The disk is in the store, but the host was started again before it was known to be on the disk: it is compared with what came.
    Doubted {
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
        /// Its process; 0 while it does not say.
        process: u32,
    },
    /// A registry does not answer; we wait for it.
    Unanswered {
        /// `host[:port]`.
        registry: &'a str,
        /// For how long it has given nothing.
        waited: Duration,
        /// After how long it is given up, more or less.
        most: Duration,
    },
    /// A registry that has too much to do asks for a pause; we keep it.
    Paused {
        /// `host[:port]`.
        registry: &'a str,
        /// How much is left of it.
        left: Duration,
    },
    /// Bytes have arrived.
    Fetching {
        /// Compressed bytes so far.
        done: u64,
        /// Compressed bytes of the whole image.
        total: u64,
    },
    /// So many other processes wait for what is being fetched.
    Awaited {
        /// How many.
        by: usize,
    },
    /// Bytes of one layer have arrived.
    Layer {
        /// Its digest.
        digest: &'a Digest,
        /// Compressed bytes of it that are here.
        done: u64,
        /// Its compressed size.
        size: u64,
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

/// Calls `tell` again and again while `work` goes on.
pub(super) async fn telling<T>(tell: impl Fn(), work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    let mut tick = tokio::time::interval(TELL_EVERY);
    loop {
        tokio::select! {
            result = &mut work => return result,
            _ = tick.tick() => tell(),
        }
    }
}

/// Tells for which registry we wait while `work` goes on, as long as it does not answer.
pub(in crate::image) async fn told_of_silence<T>(
    progress: &dyn Progress,
    unanswered: impl Fn() -> Option<Unanswered>,
    work: impl Future<Output = T>,
) -> T {
    let tell = || {
        if let Some(Unanswered {
            registry,
            waited,
            most,
            pause,
        }) = unanswered()
        {
            let registry = &registry;
            progress.event(match pause {
                Some(left) => Event::Paused { registry, left },
                None => Event::Unanswered {
                    registry,
                    waited,
                    most,
                },
            });
        }
    };
    telling(tell, work).await
}

/// Counts what threads do, for the task that reports it.
#[derive(Debug, Default)]
pub(in crate::image) struct Meter {
    fetched: AtomicU64,
    unpacked: AtomicU64,
    /// Packed bytes that need not be fetched, since they are here in some way.
    here: AtomicU64,
    layers: Mutex<BTreeMap<Digest, Moving>>,
}

/// A layer that comes.
#[derive(Debug, Clone, Copy)]
struct Moving {
    done: u64,
    size: u64,
    /// How much of it was told.
    told: Option<u64>,
}

impl Meter {
    /// So many bytes of a layer have come.
    pub(in crate::image) fn add_fetched(&self, layer: &Descriptor, bytes: usize) {
        self.fetched.fetch_add(bytes as u64, Ordering::Relaxed);
        self.add_layer(layer, bytes as u64);
    }

    /// So many bytes of a layer are here, fetched or not.
    pub(in crate::image) fn add_layer(&self, layer: &Descriptor, bytes: u64) {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        let moving = layers.entry(layer.digest).or_insert(Moving {
            done: 0,
            size: layer.size,
            told: None,
        });
        // What arrives damaged comes once more.
        moving.done = (moving.done + bytes).min(layer.size);
    }

    /// Tells about the layers that came further since this was asked last.
    pub(in crate::image) fn tell_layers(&self, progress: &dyn Progress) {
        let mut moved = Vec::new();
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        for (digest, moving) in layers.iter_mut() {
            if moving.told.replace(moving.done) != Some(moving.done) {
                moved.push((*digest, *moving));
            }
        }
        drop(layers);
        for (digest, Moving { done, size, .. }) in moved {
            let digest = &digest;
            progress.event(Event::Layer { digest, done, size });
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Layers(Mutex<Vec<(u64, u64)>>);

    impl Progress for Layers {
        fn event(&self, event: Event<'_>) {
            if let Event::Layer { done, size, .. } = event {
                self.0.lock().unwrap().push((done, size));
            }
        }
    }

    #[test]
    fn a_layer_is_told_of_when_it_came_further_and_never_has_more_than_all() {
        let layer = |name: &[u8], size| Descriptor {
            media_type: String::new(),
            digest: Digest::of(name),
            size,
            annotations: BTreeMap::new(),
        };
        let (one, two) = (layer(b"one", 100), layer(b"two", 7));
        let (meter, layers) = (Meter::default(), Layers::default());
        let told = || {
            meter.tell_layers(&layers);
            let mut told = std::mem::take(&mut *layers.0.lock().unwrap());
            told.sort_unstable();
            told
        };
        assert_eq!(told(), []);
        meter.add_fetched(&one, 30);
        meter.add_layer(&two, 7);
        assert_eq!(told(), [(7, 7), (30, 100)]);
        meter.add_fetched(&one, 30);
        assert_eq!(told(), [(60, 100)]);
        meter.add_fetched(&one, 60);
        assert_eq!(told(), [(100, 100)]);
        assert_eq!(told(), []);
        assert_eq!((meter.fetched(), meter.done()), (120, 120));
    }
}
