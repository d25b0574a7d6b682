//! Which images may go, and how they go.
//!
//! [`plan`] decides from facts alone. [`Store::collect`] removes one image: it locks it against leases, asks once more whether
//! something else keeps it, renames its folder to where nobody looks for images, and only then removes the files. Whoever is
//! killed in between leaves either an image that is whole, or a folder that the next sweep removes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jiff::{SignedDuration, Timestamp};

use super::Store;
use super::files::{digest_of, entries, remove, sync_dir};
use super::inventory::Shared;
use super::published::SHA512;
use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::manifest::{self, Document};
use crate::kill::{self, Point};

/// What is noted about images beside their folders, by their digests.
const TRACES: [&str; 4] = ["used", "damaged", "origins", SHA512];

/// How a folder is called whose image is being removed.
pub(super) const TRASH: &str = "trash-";

/// Manifests and configs are kept for so long without an image: one may be on its way to the store.
const LOOSE_BLOBS_FOR: Duration = Duration::from_secs(3600);

/// What the plan has to know about one image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its digest.
    pub digest: Digest,
    /// What it alone takes, in bytes: removing it frees as much at least.
    pub bytes: u64,
    /// The files that it shares with others: the last of those that goes frees them.
    pub shared: Vec<Shared>,
    /// When it came.
    pub created: Timestamp,
    /// When it was last used.
    pub used: Timestamp,
    /// The repositories, folders or files that it has names in; none if no name leads to it any more.
    pub repositories: Vec<String>,
    /// Does a pin, a lease, a job or a machine keep it?
    pub kept: bool,
}

/// What is to go. Without any, only what has no name any more.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    /// All that nothing keeps.
    pub all: bool,
    /// Only what was not used for so long, whether it has a name or not.
    pub older_than: Option<Duration>,
    /// Of each repository everything but the newest so many images; with other rules, those are kept as well.
    pub keep_last: Option<usize>,
    /// What was used least recently, until all together take no more than this, in bytes.
    pub max_size: Option<u64>,
    /// What was used least recently, until this many bytes are freed.
    pub free: u64,
}

/// Why an image goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// No name leads to it any more.
    Nameless,
    /// Everything that nothing keeps was to go.
    Unkept,
    /// It was not used for too long.
    Unused,
    /// Its repository has newer ones.
    Superseded,
    /// Of all, it was used least recently, and room was wanted.
    Room,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Reason::Nameless => "no name leads to it",
            Reason::Unkept => "nothing keeps it",
            Reason::Unused => "it was not used for that long",
            Reason::Superseded => "its repository has newer ones",
            Reason::Room => "it was used least recently, and room was wanted",
        })
    }
}

/// Removes images for one that is coming. The store asks; only others know which images are in use.
pub trait MakeRoom: std::fmt::Debug + Send + Sync {
    /// Removes images until `lacking` bytes are free beyond those that are, and all images with `coming` bytes more are within
    /// the operator's budget. Nothing goes if so many bytes cannot be freed; the budget is no hard limit, for which all goes that may
    /// go, unless what comes exceeds it alone. How many bytes were freed.
    fn make_room(&self, coming: u64, lacking: u64) -> Pin<Box<dyn Future<Output = u64> + Send + '_>>;
}

/// One image that is to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Going {
    /// Its digest.
    pub digest: Digest,
    /// What that frees, in bytes, after those in front of it have gone.
    pub bytes: u64,
    /// Why.
    pub reason: Reason,
}

/// What is freed by images that go one after the other.
#[derive(Debug, Default)]
pub struct Freed {
    /// How many names of a shared file have gone.
    gone: BTreeMap<(u64, u64), u64>,
}

impl Freed {
    /// This one goes, too: how many bytes that frees.
    pub fn with(&mut self, image: &Candidate) -> u64 {
        let mut bytes = image.bytes;
        for shared in &image.shared {
            let gone = self.gone.entry(shared.file).or_default();
            *gone += 1;
            if *gone == shared.names {
                bytes += shared.bytes;
            }
        }
        bytes
    }

    /// What all of these free.
    fn by<'a>(images: impl IntoIterator<Item = &'a Candidate>) -> u64 {
        let mut freed = Self::default();
        images.into_iter().map(|image| freed.with(image)).sum()
    }
}

/// What images take together, in bytes.
fn taken(images: &[Candidate]) -> u64 {
    let shared = images.iter().flat_map(|image| &image.shared);
    let shared: BTreeMap<_, _> = shared.map(|shared| (shared.file, shared.bytes)).collect();
    images.iter().map(|image| image.bytes).sum::<u64>() + shared.values().sum::<u64>()
}

/// What goes, in the order in which it goes: what was used least recently first.
pub fn plan(images: &[Candidate], policy: &Policy, now: Timestamp) -> Vec<Going> {
    let newest = policy
        .keep_last
        .map(|count| newest(images, count))
        .unwrap_or_default();
    let idle = |image: &Candidate| {
        let idle = now.duration_since(image.used);
        policy
            .older_than
            .is_none_or(|age| SignedDuration::try_from(age).is_ok_and(|age| idle >= age))
    };
    let reason = |image: &Candidate| {
        if image.repositories.is_empty() {
            Some(Reason::Nameless)
        } else if policy.all {
            Some(Reason::Unkept)
        } else if policy.older_than.is_some() {
            Some(Reason::Unused)
        } else if policy.keep_last.is_some() {
            Some(Reason::Superseded)
        } else {
            None
        }
    };
    // Room alone is no reason to take what has merely lost its name before what was used longer ago.
    let by_age_only = policy.max_size.is_some() || policy.free > 0;
    let selected = policy.all || policy.older_than.is_some() || policy.keep_last.is_some() || !by_age_only;
    let mut order: Vec<&Candidate> = images
        .iter()
        .filter(|image| !image.kept && !newest.contains(&image.digest))
        .collect();
    order.sort_by_key(|image| (image.used, image.digest));
    let mut gone: Vec<(&Candidate, Reason)> = order
        .iter()
        .filter(|image| selected && idle(image))
        .filter_map(|image| Some((*image, reason(image)?)))
        .collect();
    let by_rule = gone.len();
    let wanted = policy
        .max_size
        .map_or(0, |most| taken(images).saturating_sub(most))
        .max(policy.free);
    let freed = |gone: &[(&Candidate, Reason)]| Freed::by(gone.iter().map(|(image, _)| *image));
    for image in order {
        if freed(&gone) >= wanted {
            break;
        }
        if gone.iter().all(|(going, _)| going.digest != image.digest) {
            gone.push((image, Reason::Room));
        }
    }
    // One whose disk stays with another image may have gone for nothing.
    for place in (by_rule..gone.len()).rev() {
        let (image, reason) = gone[place];
        if !image.shared.is_empty() {
            gone.remove(place);
            if freed(&gone) < wanted {
                gone.insert(place, (image, reason));
            }
        }
    }
    let mut freed = Freed::default();
    let going = gone.into_iter().map(|(image, reason)| Going {
        digest: image.digest,
        bytes: freed.with(image),
        reason,
    });
    going.collect()
}

/// The newest images of each repository.
fn newest(images: &[Candidate], count: usize) -> BTreeSet<Digest> {
    let mut by_repository: BTreeMap<&str, Vec<&Candidate>> = BTreeMap::new();
    for image in images {
        for repository in &image.repositories {
            by_repository.entry(repository).or_default().push(image);
        }
    }
    let mut newest = BTreeSet::new();
    for mut images in by_repository.into_values() {
        images.sort_by_key(|image| std::cmp::Reverse((image.created, image.digest)));
        newest.extend(images.iter().take(count).map(|image| image.digest));
    }
    newest
}

impl Store {
    /// The same store, which has images removed where one that is coming needs the room.
    #[must_use]
    pub fn with_room_by(mut self, maker: Arc<dyn MakeRoom>) -> Self {
        self.maker = Some(maker);
        self
    }

    /// Has room made for an image of at least so many bytes, beside what must stay free. How many bytes were freed.
    pub(in crate::image) async fn make_room(&self, coming: u64, keep_free: u64) -> u64 {
        let Some(maker) = &self.maker else { return 0 };
        // Where it cannot be told, whoever writes will say so.
        let free = fs4::available_space(&self.dir).unwrap_or(u64::MAX);
        let lacking = coming.saturating_add(keep_free).saturating_sub(free);
        maker.make_room(coming, lacking).await
    }

    /// Removes an image with its names, unless it is leased or pinned, or `kept` says otherwise once nobody can begin to use it
    /// any more. Whether it was removed; false also when it was not here.
    ///
    /// # Errors
    /// What `kept` fails with; [`Error::Storage`].
    pub fn collect<E: From<Error>>(
        &self,
        digest: &Digest,
        kept: impl FnOnce() -> Result<bool, E>,
    ) -> Result<bool, E> {
        let Some(alone) = self.alone(digest)? else {
            return Ok(false);
        };
        if !self.pins(digest)?.is_empty() || kept()? {
            return Ok(false);
        }
        let trash = self.partial().join(format!("{TRASH}{}", uuid::Uuid::new_v4()));
        let dir = self.disk_dir(digest);
        fs::rename(&dir, &trash).map_err(Error::storage(&dir))?;
        kill::point(Point::ImageHidden);
        sync_dir(&self.dir.join("disks"))?;
        // Nobody finds the folder any more, so that nobody can ask for a lease.
        drop(alone);
        self.forget_names(|other| other != digest)?;
        self.forget_traces(digest)?;
        remove(&trash)?;
        kill::point(Point::ImageRemoved);
        Ok(true)
    }

    /// Removes what only images needed that are gone: names, notes about them, manifests and configs.
    ///
    /// # Errors
    /// [`Error::Storage`].
    pub fn tidy(&self) -> Result<(), Error> {
        let mut here: BTreeSet<Digest> = self.digests()?.into_iter().collect();
        // What is just being made has its notes before it can be seen.
        here.extend(entries(&self.dir.join("unsynced"))?.iter().filter_map(digest_of));
        self.forget_names(|digest| here.contains(digest))?;
        for part in TRACES {
            for entry in entries(&self.dir.join(part))? {
                if digest_of(&entry).is_some_and(|digest| !here.contains(&digest)) {
                    remove(&entry.path())?;
                }
            }
        }
        self.tidy_blobs(&here)
    }

    /// What is noted about an image beside its folder.
    pub(in crate::image) fn forget_traces(&self, digest: &Digest) -> Result<(), Error> {
        for part in TRACES {
            remove(&self.dir.join(part).join(digest.hex()))?;
        }
        Ok(())
    }

    /// Removes manifests and configs of no image that is here. Those of an image that is being fetched are young.
    fn tidy_blobs(&self, here: &BTreeSet<Digest>) -> Result<(), Error> {
        let dir = self.dir.join("blobs/sha256");
        let mut documents = Vec::new();
        let mut wanted = here.clone();
        for entry in entries(&dir)? {
            let Some(digest) = digest_of(&entry) else { continue };
            let bytes = fs::read(entry.path()).unwrap_or_default();
            match manifest::parse(&bytes) {
                Ok(Document::Image(manifest)) if here.contains(&digest) => {
                    wanted.insert(manifest.config.digest);
                }
                Ok(Document::Index(index))
                    if index
                        .iter()
                        .any(|entry| entry.digest.parse().is_ok_and(|d| here.contains(&d))) =>
                {
                    wanted.insert(digest);
                }
                _ => {}
            }
            documents.push((digest, entry.path()));
        }
        let old = |path: &std::path::Path| {
            let modified = fs::metadata(path).and_then(|data| data.modified());
            modified.is_ok_and(|at| {
                SystemTime::now()
                    .duration_since(at)
                    .is_ok_and(|age| age > LOOSE_BLOBS_FOR)
            })
        };
        for (digest, path) in documents {
            if !wanted.contains(&digest) && old(&path) {
                remove(&path)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DAY: u64 = 86_400;

    /// An image that came and was last used so many days before the end of day 100.
    fn image(name: &str, came: i64, used: i64, bytes: u64, repository: &str) -> Candidate {
        let at = |days: i64| Timestamp::from_second((100 - days) * 86_400).unwrap();
        Candidate {
            digest: Digest::of(name.as_bytes()),
            bytes,
            shared: Vec::new(),
            created: at(came),
            used: at(used),
            repositories: match repository {
                "" => Vec::new(),
                repository => vec![repository.to_owned()],
            },
            kept: false,
        }
    }

    fn now() -> Timestamp {
        Timestamp::from_second(100 * 86_400).unwrap()
    }

    fn gone(images: &[Candidate], policy: Policy) -> Vec<(u64, Reason)> {
        plan(images, &policy, now())
            .into_iter()
            .map(|going| (going.bytes, going.reason))
            .collect()
    }

    /// Of different sizes, by which the tests tell them.
    fn some() -> Vec<Candidate> {
        vec![
            image("a1", 30, 1, 1, "r/a"),
            image("a2", 20, 10, 2, "r/a"),
            image("a3", 10, 9, 4, "r/a"),
            image("b", 40, 40, 8, "r/b"),
            image("old tag", 50, 5, 16, ""),
            Candidate {
                kept: true,
                ..image("pinned", 60, 60, 32, "r/a")
            },
        ]
    }

    #[test]
    fn each_rule_takes_what_it_says_and_nothing_that_is_kept() {
        use Reason::{Nameless, Room, Superseded, Unkept, Unused};
        let days = |days| Some(Duration::from_secs(days * DAY));
        for (policy, expected) in [
            (Policy::default(), vec![(16, Nameless)]),
            (
                Policy {
                    all: true,
                    ..Policy::default()
                },
                vec![(8, Unkept), (2, Unkept), (4, Unkept), (16, Nameless), (1, Unkept)],
            ),
            (
                Policy {
                    older_than: days(10),
                    ..Policy::default()
                },
                vec![(8, Unused), (2, Unused)],
            ),
            (
                Policy {
                    older_than: days(5),
                    all: true,
                    ..Policy::default()
                },
                vec![(8, Unkept), (2, Unkept), (4, Unkept), (16, Nameless)],
            ),
            (
                Policy {
                    keep_last: Some(1),
                    ..Policy::default()
                },
                vec![(2, Superseded), (16, Nameless), (1, Superseded)],
            ),
            (
                Policy {
                    keep_last: Some(2),
                    all: true,
                    ..Policy::default()
                },
                vec![(16, Nameless), (1, Unkept)],
            ),
            // 63 bytes are here.
            (
                Policy {
                    max_size: Some(63),
                    ..Policy::default()
                },
                vec![],
            ),
            (
                Policy {
                    max_size: Some(54),
                    ..Policy::default()
                },
                vec![(8, Room), (2, Room)],
            ),
            (
                Policy {
                    max_size: Some(0),
                    ..Policy::default()
                },
                vec![(8, Room), (2, Room), (4, Room), (16, Room), (1, Room)],
            ),
            (
                Policy {
                    free: 9,
                    ..Policy::default()
                },
                vec![(8, Room), (2, Room)],
            ),
            (
                Policy {
                    max_size: Some(50),
                    older_than: days(40),
                    ..Policy::default()
                },
                vec![(8, Unused), (2, Room), (4, Room)],
            ),
            (
                Policy {
                    free: 100,
                    keep_last: Some(1),
                    ..Policy::default()
                },
                vec![(2, Superseded), (16, Nameless), (1, Superseded)],
            ),
        ] {
            assert_eq!(gone(&some(), policy.clone()), expected, "{policy:?}");
        }
    }

    #[test]
    fn what_two_images_share_is_free_once_both_have_gone() {
        let shared = |file: u64, bytes| Shared {
            file: (0, file),
            bytes,
            names: 2,
        };
        let mut images = vec![
            image("vm:1", 9, 9, 1, "r/vm"),
            image("vm:2", 8, 8, 2, "r/vm"),
            image("other", 7, 7, 4, "r/other"),
        ];
        images[0].shared.push(shared(1, 800));
        images[1].shared.push(shared(1, 800));
        let free = |free| Policy {
            free,
            ..Policy::default()
        };
        let bytes = |images: &[Candidate], policy| {
            gone(images, policy)
                .into_iter()
                .map(|(bytes, _)| bytes)
                .collect::<Vec<_>>()
        };
        assert_eq!(bytes(&images, free(500)), [1, 802]);
        assert_eq!(bytes(&images, free(804)), [1, 802, 4]);
        // It counts once: 807 bytes are here.
        let budget = |most| Policy {
            max_size: Some(most),
            ..Policy::default()
        };
        assert!(bytes(&images, budget(807)).is_empty());
        assert_eq!(bytes(&images, budget(400)), [1, 802]);
        // Where the other stays, nothing of it is freed, and the image that would go for nothing stays, too.
        images[1].kept = true;
        assert_eq!(bytes(&images, free(4)), [4]);
        assert_eq!(bytes(&images, free(500)), [1, 4]);
        let all = Policy {
            all: true,
            ..Policy::default()
        };
        assert_eq!(bytes(&images, all), [1, 4]);
    }

    #[test]
    fn an_image_of_two_repositories_is_the_newest_of_one_of_them() {
        let mut images = some();
        images[0].repositories.push("r/c".to_owned());
        let policy = Policy {
            keep_last: Some(1),
            ..Policy::default()
        };
        assert!(!gone(&images, policy).contains(&(1, Reason::Superseded)));
    }

    prop_compose! {
        fn candidate()(name in 0..40_u8, came in 0..100_i64, used in 0..100_i64, bytes in 0..1000_u64,
                       repository in "[ab]?", kept: bool) -> Candidate {
            Candidate { kept, ..image(&name.to_string(), came.max(used), used, bytes, &repository) }
        }
    }

    proptest! {
        #[test]
        fn what_is_kept_stays_and_no_more_goes_for_room_than_is_needed(
            images in prop::collection::vec(candidate(), 0..20),
            max_size in prop::option::of(0..5000_u64), free in 0..5000_u64,
            all: bool, older in prop::option::of(0..100_u64), keep_last in prop::option::of(0..3_usize),
        ) {
            let mut images = images;
            images.sort_by_key(|image| image.digest);
            images.dedup_by_key(|image| image.digest);
            let policy = Policy { all, older_than: older.map(|days| Duration::from_secs(days * DAY)), keep_last, max_size, free };
            let going = plan(&images, &policy, now());
            let digests: BTreeSet<Digest> = going.iter().map(|going| going.digest).collect();
            prop_assert_eq!(digests.len(), going.len(), "each goes once");
            for image in images.iter().filter(|image| digests.contains(&image.digest)) {
                prop_assert!(!image.kept);
            }
            // Without the last one that went for room there would not have been enough.
            if let Some(last) = going.last().filter(|going| going.reason == Reason::Room) {
                let total: u64 = images.iter().map(|image| image.bytes).sum();
                let before: u64 = going.iter().map(|going| going.bytes).sum::<u64>() - last.bytes;
                prop_assert!(before < free || max_size.is_some_and(|most| total - before > most));
            }
        }
    }
}
