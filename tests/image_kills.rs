//! Two pulls run, and one is killed behind any of its effects: the other ends well, and so does a later one.
//!
//! Each round has a store of its own. Bytes of layers are counted where they are sent.

#![cfg(debug_assertions)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(clippy::print_stderr, reason = "what is shown is the table of kills")]

#[path = "support/faulty_registry.rs"]
#[allow(dead_code, reason = "each suite uses its part of the registry")]
mod faulty_registry;
#[path = "support/image_fixture.rs"]
#[allow(dead_code, reason = "each suite uses its part of the fixture")]
mod image_fixture;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use cannery::kill::Point;
use faulty_registry::Registry;
use image_fixture::{Image, Layout, OCI_TAR, OCI_TAR_GZIP, Tar, gzip, noise, sha256};
use support::table;

/// Kills that there must be in all.
const KILLS: usize = 100;

/// How often a point is tried again where the other process was quicker.
const TRIES: usize = 4;

/// Which time a call is killed at a point, where it passes it several times: for each small file of the store, each layer.
fn nths(point: Point) -> std::ops::RangeInclusive<u32> {
    match point {
        Point::BlobBegun => 1..=6,
        Point::BlobKept => 1..=5,
        Point::LayerBegun | Point::LayerUnpacked | Point::LayerKept => 1..=2,
        _ => 1..=1,
    }
}

/// Longest that any call may take. The longest take some seconds.
const CALL_MAX: Duration = Duration::from_secs(60);

/// What images of some size meet, and small ones.
const POINTS: [Point; 13] = [
    Point::BlobBegun,
    Point::BlobKept,
    Point::UnsyncedNoted,
    Point::WorkBegun,
    Point::LayerBegun,
    Point::LayerUnpacked,
    Point::LayerKept,
    Point::FileNamed,
    Point::DiskNamed,
    Point::DiskFinished,
    Point::DiskStored,
    Point::OriginKept,
    Point::ReferenceKept,
];

/// What of these only a layer meets that is one stream.
const OF_STREAMS: [Point; 3] = [Point::LayerBegun, Point::LayerUnpacked, Point::LayerKept];

/// What only a plan of pieces meets.
const OF_PIECES: [Point; 2] = [Point::PiecesBegun, Point::PiecesKept];

/// Points at which a layer of more than a checkpoint's distance is met.
const OF_LARGE: [Point; 7] = [
    Point::CheckpointBegun,
    Point::CheckpointKept,
    Point::LayerUnpacked,
    Point::LayerKept,
    Point::FileNamed,
    Point::DiskNamed,
    Point::DiskStored,
];

/// The images of one registry.
struct Shelf {
    registry: Registry,
    disks: BTreeMap<&'static str, Vec<u8>>,
    _dir: tempfile::TempDir,
}

/// A raw disk of noise, with a hole of the same length behind.
fn disk(seed: u64, length: usize) -> Vec<u8> {
    let mut disk = noise(seed, length);
    disk[510] = 0x55;
    disk[511] = 0xaa;
    disk.resize(2 * length, 0);
    disk
}

impl Shelf {
    fn new(tags: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(&dir.path().join("layout"));
        let mut shelf = Self {
            registry: Registry::new(),
            disks: BTreeMap::new(),
            _dir: dir,
        };
        let archive = |disk: &[u8]| Tar::new().dir("disk/").file("disk/disk.img", disk).bytes();
        for (tag, seed, length, media_type) in [
            ("gzip", 1, 1 << 20, OCI_TAR_GZIP),
            ("tar", 2, 1 << 20, OCI_TAR),
            ("large-gzip", 3, 72 << 20, OCI_TAR_GZIP),
            ("large-tar", 4, 72 << 20, OCI_TAR),
        ] {
            if !tags.contains(&tag) {
                continue;
            }
            let bytes = if tag.starts_with("large") {
                noise(seed, length)
            } else {
                disk(seed, length)
            };
            let mut image = Image::container_disk(&archive(&bytes), media_type);
            if tag == "gzip" {
                // Another layer before it, which is done when the second begins.
                let other = Tar::new().file("usr", &noise(7, 1 << 20)).bytes();
                image.diff_ids.insert(0, sha256(&other));
                image.layers.insert(0, (gzip(&other), OCI_TAR_GZIP.to_owned()));
            }
            let digest = layout.add(tag, &image);
            shelf.registry.add(&layout.dir, &digest, tag);
            shelf.disks.insert(tag, bytes);
        }
        // Two that share all chunks but those in the middle.
        let one = disk(5, 4 << 20);
        let mut two = one.clone();
        two[1 << 20..2 << 20].copy_from_slice(&noise(6, 1 << 20));
        for (tag, bytes) in [("native", one), ("native-2", two)] {
            if !tags.contains(&tag) {
                continue;
            }
            let file = shelf._dir.path().join(tag);
            fs::write(&file, &bytes).unwrap();
            let call = Desk::new(&shelf.registry);
            let target = layout.reference(tag);
            let pushed = call.ok(&["image", "push", "--quiet", file.to_str().unwrap(), &target]);
            shelf.registry.add(&layout.dir, pushed.trim(), tag);
            shelf.disks.insert(tag, bytes);
        }
        shelf
    }

    fn reference(&self, tag: &str) -> String {
        format!("{}/vm:{tag}", self.registry.host)
    }
}

/// A host with a store of its own.
struct Desk {
    dir: tempfile::TempDir,
}

impl Desk {
    fn new(registry: &Registry) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let settings = format!(
            "state_dir = \"{}/state\"\n[libvirt]\nuri = \"test:///default\"\n[images]\nkeep_free = 0\nplain_http = [\"{}\"]\n",
            dir.path().display(),
            registry.host
        );
        fs::write(dir.path().join("cannery.toml"), settings).unwrap();
        Self { dir }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cannery"));
        command
            .arg("--config")
            .arg(self.dir.path().join("cannery.toml"))
            .args(arguments)
            .env("HOME", self.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn pull(&self, reference: &str) -> Child {
        self.command(&["image", "pull", "--quiet", reference])
            .spawn()
            .unwrap()
    }

    /// A pull that is to be killed behind the N-th time of a point.
    fn doomed(&self, reference: &str, point: Point, nth: u32) -> Child {
        let mut command = self.command(&["image", "pull", "--quiet", reference]);
        command.env("CANNERY_KILL_AT", format!("{}:{nth}", point.name()));
        command.spawn().unwrap()
    }

    /// The disk of an image, as the store has it.
    fn disk(&self, digest: &str) -> Vec<u8> {
        let hex = digest.trim().trim_start_matches("sha256:");
        let disks = self.dir.path().join("state/store/disks");
        fs::read(disks.join(hex).join("disk.raw")).unwrap()
    }

    fn partial(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path().join("state/store/partial")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect()
    }
}

/// Waits for a call to end; what it left.
fn ended(child: Child) -> Output {
    let begin = Instant::now();
    let mut child = child;
    while child.try_wait().unwrap().is_none() {
        if begin.elapsed() > CALL_MAX {
            child.kill().unwrap();
            panic!("a call hangs: {:?}", child.wait_with_output());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    child.wait_with_output().unwrap()
}

/// One kill.
#[derive(Debug, Clone, Copy)]
struct Round {
    image: &'static str,
    /// What the other process pulls.
    other: &'static str,
    point: Point,
    nth: u32,
    /// Where an earlier pull of the image was killed, which left something to sweep.
    litter: Option<Point>,
}

/// What became of it.
struct Outcome {
    /// Bytes that were sent for the image after the kill.
    again: u64,
    /// What lay around when both calls had ended.
    left: usize,
}

impl Shelf {
    /// Bytes that are sent for an image, where the store has another one already.
    fn scratch(&self, image: &str, other: &str) -> u64 {
        let desk = Desk::new(&self.registry);
        if other != image {
            desk.ok(&["image", "pull", "--quiet", &self.reference(other)]);
        }
        let before = self.registry.sent();
        desk.ok(&["image", "pull", "--quiet", &self.reference(image)]);
        self.registry.sent() - before
    }

    /// None where the point was not met.
    fn round(&self, round: Round) -> Option<Outcome> {
        let desk = Desk::new(&self.registry);
        let (image, other) = (self.reference(round.image), self.reference(round.other));
        if let Some(point) = round.litter {
            let killed = ended(desk.doomed(&image, point, 1));
            assert_eq!(killed.status.signal(), Some(9), "{round:?}");
        }
        // Nothing but small files is sent until both are on their way, or one is dead.
        let registry = &self.registry;
        let asked = |tag: &str| registry.asked(tag);
        let (first, second) = (asked(round.image), asked(round.other));
        registry.hold_after(Some(0));
        let mut doomed = desk.doomed(&image, round.point, round.nth);
        let begin = Instant::now();
        let waits = |doomed: &mut Child, so: &dyn Fn() -> bool| {
            while !so() && doomed.try_wait().unwrap().is_none() && begin.elapsed() < CALL_MAX {
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        if round.image == round.other {
            waits(&mut doomed, &|| asked(round.image) > first);
        }
        let living = desk.pull(&other);
        let both = 1 + usize::from(round.image == round.other);
        waits(&mut doomed, &|| {
            asked(round.image) > first && asked(round.other) >= second + both
        });
        registry.hold_after(None);
        let doomed = ended(doomed);
        let at_death = registry.sent();
        let living = ended(living);
        assert!(living.status.success(), "{round:?}: {living:?}");
        let left = desk.partial().len();
        let killed = match (doomed.status.signal(), doomed.status.success()) {
            (Some(9), _) => true,
            (None, true) => false,
            _ => panic!("{round:?}: {doomed:?}"),
        };
        let before = if round.image == round.other {
            at_death
        } else {
            registry.sent()
        };
        let digest = desk.ok(&["image", "pull", "--quiet", &image]);
        let again = registry.sent() - before;
        assert!(desk.disk(&digest) == self.disks[round.image], "{round:?}");
        let digest = String::from_utf8(living.stdout).unwrap();
        assert!(desk.disk(&digest) == self.disks[round.other], "{round:?}");
        assert_eq!(desk.partial(), [""; 0], "{round:?}");
        killed.then_some(Outcome { again, left })
    }
}

/// All kills at one point.
#[derive(Default)]
struct Row {
    kills: usize,
    left: usize,
    again: u64,
    scratch: u64,
    images: BTreeSet<&'static str>,
}

/// All kills.
#[derive(Default)]
struct Table(BTreeMap<Point, Row>);

/// An image, what the other process pulls, where the one is killed, and what there was before.
type Plan = (&'static str, &'static str, Point, Option<Point>);

/// Carries out all rounds with the images of one registry.
fn kills(tags: &[&str], plans: &[Plan], table: &Mutex<Table>) {
    let begin = Instant::now();
    let shelf = Shelf::new(tags);
    let mut scratch = BTreeMap::new();
    let mut count = 0;
    for (image, other, point, litter) in plans.iter().copied() {
        let whole = *scratch
            .entry((image, other))
            .or_insert_with(|| shelf.scratch(image, other));
        for nth in nths(point) {
            let round = Round {
                image,
                other,
                point,
                nth,
                litter,
            };
            let tries = if nth == 1 { TRIES } else { 1 };
            let Some(outcome) = (0..tries).find_map(|_| shelf.round(round)) else {
                break;
            };
            count += 1;
            let mut table = table.lock().unwrap();
            let row = table.0.entry(point).or_default();
            row.kills += 1;
            row.left += usize::from(outcome.left > 0);
            row.again += outcome.again;
            row.scratch += whole;
            row.images.insert(image);
        }
    }
    eprintln!("{tags:?}: {count} kills in {} s", begin.elapsed().as_secs());
}

#[test]
#[ignore = "takes two minutes: a hundred rounds of three pulls"]
fn a_pull_that_is_killed_anywhere_harms_no_other_and_a_later_one_goes_on() {
    let small = |image, other| -> Vec<Plan> {
        let pieces = OF_PIECES.iter().filter(|_| image == "native");
        let streams = |point: &&Point| image != "native" || !OF_STREAMS.contains(point);
        let points = POINTS.iter().filter(streams).chain(pieces);
        let plans = points.map(|point| (image, other, *point, None));
        let swept = [
            (Point::RemainSwept, Point::BlobBegun),
            (Point::WorkSwept, Point::WorkBegun),
        ];
        let sweeps = swept.map(|(point, litter)| (image, other, point, Some(litter)));
        plans.chain(sweeps).collect()
    };
    let large = |image| OF_LARGE.map(|point| (image, image, point, None));
    let table = Mutex::new(Table::default());
    std::thread::scope(|scope| {
        for (tags, plans) in [
            (&["gzip"][..], small("gzip", "gzip")),
            (&["gzip", "tar"], small("gzip", "tar")),
            (&["tar"], small("tar", "tar")),
            (&["native"], small("native", "native")),
            (&["native", "native-2"], small("native", "native-2")),
            (&["large-gzip"], large("large-gzip").to_vec()),
            (&["large-tar"], large("large-tar").to_vec()),
        ] {
            let table = &table;
            scope.spawn(move || kills(tags, &plans, table));
        }
    });
    table.into_inner().unwrap().shown();
}

impl Table {
    /// Shows what there is, and checks that all points were met and that there was something to go on from.
    fn shown(&self) {
        let kib = |bytes: u64| (bytes >> 10).to_string();
        let rows: Vec<Vec<String>> = self
            .0
            .iter()
            .map(|(point, row)| {
                vec![
                    point.to_string(),
                    row.kills.to_string(),
                    row.images.iter().copied().collect::<Vec<_>>().join(", "),
                    row.left.to_string(),
                    kib(row.again),
                    kib(row.scratch),
                ]
            })
            .collect();
        let kills: usize = self.0.values().map(|row| row.kills).sum();
        table::show(
            &format!(
                "one of two pulls killed, {kills} times; the other and a later one ended well each time"
            ),
            &[
                "killed when",
                "times",
                "images",
                "with something left",
                "KiB sent after",
                "KiB from scratch",
            ],
            &rows,
        );
        let (again, whole) = self
            .0
            .values()
            .fold((0, 0), |sum, row| (sum.0 + row.again, sum.1 + row.scratch));
        eprintln!(
            "{} KiB were sent after kills, {} from scratch",
            kib(again),
            kib(whole)
        );
        for point in POINTS.iter().chain(&OF_PIECES).chain(&OF_LARGE) {
            assert!(self.0.contains_key(point), "never killed at {}", point.name());
        }
        assert!(kills >= KILLS, "{kills} kills");
        assert!(again < whole, "{again} bytes after kills, {whole} from scratch");
    }
}
