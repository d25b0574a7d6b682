//! All that the bench of images says, in the order in which it says it. No effects.

use std::time::Duration;

use super::Plan;
use super::floor::Floor;
use crate::bench::figure::{Figure, Goal, Peer};

/// skopeo and an unpacker need at least so many times as long as we for the same blob.
const SKOPEO_GOAL: Goal = Goal::Times(1.0 / 1.5);
/// What they need for the same disk as a containerDisk, against the native format.
const NATIVE_GOAL: Goal = Goal::Times(1.0 / 4.0);
/// The native format against the slowest part of the work that must be done. Each part has all processors while it is measured: a pull,
/// which does all of them, comes near the slowest only where the others are small beside it, and is never far from all together.
const FLOOR_GOAL: Goal = Goal::Times(1.25);
/// sardinecake against us.
const SARDE_PULL_GOAL: Goal = Goal::Times(1.0 / 4.0);
const SARDE_PUSH_GOAL: Goal = Goal::Times(1.0 / 5.0);
/// However large an image is.
const MEMORY_GOAL: Goal = Goal::Below(200 << 20);
/// An image that is here, and that a job may use.
const CACHED_GOAL: Goal = Goal::Under(Duration::from_millis(30));
/// Why nothing is known about another tool.
const NOT_INSTALLED: &str = "not installed";

/// All figures of the bench.
#[derive(Debug)]
pub(super) struct Figures {
    pub(super) pull_skopeo: Figure,
    pub(super) native_skopeo: Figure,
    pub(super) native_gzip: Figure,
    pub(super) native_floor: Figure,
    pub(super) native_slowest: Figure,
    floors: Vec<Figure>,
    pub(super) pull_sarde: Figure,
    pub(super) push_sarde: Figure,
    pub(super) push_native: Figure,
    pub(super) size: Figure,
    pub(super) granted: Figure,
    pub(super) cached: Figure,
    pub(super) gzip_memory: Figure,
    pub(super) native_memory: Figure,
    pub(super) push_memory: Figure,
    pub(super) pairs: Vec<Figure>,
}

impl Figures {
    /// None measured yet.
    pub(super) fn new(plan: &Plan, skopeo: bool) -> Self {
        let peer = |there| {
            if there {
                Peer::None
            } else {
                Peer::Missing(NOT_INSTALLED)
            }
        };
        let sarde = plan.sarde.is_some();
        Self {
            pull_skopeo: Figure::new(
                "pull of a gzip containerDisk, against skopeo copy and tar",
                peer(skopeo),
                SKOPEO_GOAL,
            ),
            native_skopeo: Figure::new(
                "pull of the same disk in the native format, against that",
                peer(skopeo),
                NATIVE_GOAL,
            ),
            native_gzip: Figure::new(
                "pull in the native format, against ours of the containerDisk",
                Peer::None,
                Goal::None,
            ),
            native_floor: Figure::new(
                "pull in the native format, against the three together",
                Peer::None,
                Goal::None,
            ),
            native_slowest: Figure::new(
                "pull in the native format, against the slowest of the next three",
                Peer::None,
                FLOOR_GOAL,
            ),
            floors: Vec::new(),
            pull_sarde: Figure::new(
                "pull of a sardinecake image, against sarde pull",
                peer(sarde),
                SARDE_PULL_GOAL,
            ),
            push_sarde: Figure::new(
                "push as a sardinecake image, against sarde export and push",
                peer(sarde),
                SARDE_PUSH_GOAL,
            ),
            push_native: Figure::new(
                "push in the native format, against containerDisk",
                Peer::None,
                Goal::None,
            ),
            size: Figure::of_bytes(
                "the native image at the registry, against the containerDisk",
                Peer::None,
                Goal::None,
            ),
            granted: Figure::new(
                "the image's part of prepare, in the cache and private, with a remembered grant",
                Peer::None,
                CACHED_GOAL,
            ),
            cached: Figure::new(
                "pull of an image that is in the cache, as a command",
                Peer::None,
                CACHED_GOAL,
            ),
            gzip_memory: Figure::of_bytes("memory of a pull of the containerDisk", Peer::None, MEMORY_GOAL),
            native_memory: Figure::of_bytes("memory of a pull in the native format", Peer::None, MEMORY_GOAL),
            push_memory: Figure::of_bytes("memory of a push in the native format", Peer::None, MEMORY_GOAL),
            pairs: Vec::new(),
        }
    }

    /// What this machine can do at all.
    pub(super) fn floor(&mut self, floor: Floor) {
        self.native_floor.peer_took(floor.together());
        self.native_slowest.peer_took(floor.slowest());
        for (name, time) in [
            ("SHA-256 of the data, on all processors", floor.hash),
            ("zstd decoding of the data, on all processors", floor.unpack),
            ("writing of the data, on all processors", floor.write),
        ] {
            let mut figure = Figure::new(name, Peer::None, Goal::None);
            figure.took(time);
            self.floors.push(figure);
        }
    }

    /// Takes in what a round gave.
    pub(super) fn add(&mut self, round: Self) {
        for (into, from) in [
            (&mut self.pull_skopeo, round.pull_skopeo),
            (&mut self.native_skopeo, round.native_skopeo),
            (&mut self.native_gzip, round.native_gzip),
            (&mut self.native_floor, round.native_floor),
            (&mut self.native_slowest, round.native_slowest),
            (&mut self.pull_sarde, round.pull_sarde),
            (&mut self.cached, round.cached),
            (&mut self.gzip_memory, round.gzip_memory),
            (&mut self.native_memory, round.native_memory),
        ] {
            into.add(from);
        }
    }

    /// Those of which there are numbers, for the table.
    pub(super) fn list(self) -> Vec<Figure> {
        let mut all = vec![
            self.pull_skopeo,
            self.native_skopeo,
            self.native_gzip,
            self.native_slowest,
            self.native_floor,
        ];
        all.extend(self.floors);
        all.extend([self.pull_sarde, self.push_sarde, self.push_native, self.size]);
        all.extend(self.pairs);
        all.extend([
            self.granted,
            self.cached,
            self.gzip_memory,
            self.native_memory,
            self.push_memory,
        ]);
        all
    }
}
