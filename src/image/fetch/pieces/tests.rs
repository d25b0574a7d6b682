use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;

use super::*;
use crate::image::layout::Layout;
use crate::image::manifest::Descriptor;
use crate::image::plan::{Codec, PackedBlob, Piece, PlannedFile};
use crate::image::progress::Silent;
use crate::image::room::Limits;

const CHUNK: usize = 64 << 10;

/// Data that no compression makes small.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(length.div_ceil(8)).flatten().take(length).collect()
}

struct Scene {
    dir: tempfile::TempDir,
    files: Vec<PlannedFile>,
    blobs: Vec<PackedBlob>,
}

impl Scene {
    fn new(length: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        std::fs::create_dir(dir.path().join("work")).unwrap();
        let files = vec![PlannedFile {
            name: "disk.raw",
            length,
        }];
        Self {
            dir,
            files,
            blobs: Vec::new(),
        }
    }

    /// A blob of pieces of one codec; where each belongs, and its bytes.
    fn blob(mut self, codec: Codec, verified: bool, pieces: &[(u64, Vec<u8>)]) -> Self {
        let mut bytes = b"lead".to_vec();
        let mut planned = Vec::new();
        for (at, unpacked) in pieces {
            let packed = match codec {
                Codec::Zstd => zstd::bulk::compress(unpacked, 1).unwrap(),
                _ => unpacked.clone(),
            };
            let begin = bytes.len() as u64;
            bytes.extend(packed);
            planned.push(Piece {
                packed: begin..bytes.len() as u64,
                codec,
                file: 0,
                at: *at,
                length: unpacked.len() as u64,
                digest: verified.then(|| Digest::of(unpacked)),
            });
        }
        let digest = Digest::of(&bytes);
        std::fs::write(self.packed(&digest), &bytes).unwrap();
        self.blobs.push(PackedBlob {
            descriptor: Descriptor {
                media_type: String::new(),
                digest,
                size: bytes.len() as u64,
                annotations: BTreeMap::new(),
            },
            pieces: planned,
        });
        self
    }

    fn packed(&self, digest: &Digest) -> PathBuf {
        self.dir.path().join("blobs/sha256").join(digest.hex())
    }

    /// Flips one byte of a blob, counted from its end.
    fn damage(&self, blob: usize, from_end: usize) {
        let path = self.packed(&self.blobs[blob].descriptor.digest);
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes.len() - from_end;
        bytes[at] ^= 1;
        std::fs::write(path, bytes).unwrap();
    }

    fn plan(&self) -> Pieces {
        Pieces {
            files: self.files.clone(),
            blobs: self.blobs.clone(),
        }
    }

    fn place(&self) -> Workplace {
        Workplace {
            image: "vm".to_owned(),
            dir: self.dir.path().join("work"),
            limits: Limits {
                keep_free: 0,
                ..Limits::default()
            },
            meter: Arc::default(),
            ledger: Arc::default(),
        }
    }

    /// Bytes fetched, and what became of it.
    fn fetch_knowing(&self, known: Option<Arc<dyn Known>>) -> (u64, Result<(), Error>) {
        let source = Source::from(crate::image::source::Kind::Layout(Layout::new(
            "vm",
            self.dir.path(),
            "vm",
        )));
        let (plan, place) = (Arc::new(self.plan()), self.place());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let result = runtime.block_on(fetch(&source, plan, &place, known, Arc::new(()), 0, &Silent));
        (place.meter.fetched(), result)
    }

    fn fetch(&self) -> (u64, Result<(), Error>) {
        self.fetch_knowing(None)
    }

    fn disk(&self) -> Vec<u8> {
        std::fs::read(self.dir.path().join("work/disk.raw")).unwrap()
    }
}

fn chunks(seed: u64, count: usize, first: u64) -> Vec<(u64, Vec<u8>)> {
    (0..count as u64)
        .map(|n| (first + n * CHUNK as u64, noise(seed + n, CHUNK)))
        .collect()
}

fn expected(length: usize, parts: &[&[(u64, Vec<u8>)]]) -> Vec<u8> {
    let mut disk = vec![0; length];
    for (at, bytes) in parts.iter().copied().flatten() {
        let at = usize::try_from(*at).unwrap();
        disk[at..at + bytes.len()].copy_from_slice(bytes);
    }
    disk
}

#[test]
fn pieces_of_all_sizes_land_where_they_belong() {
    let length = 64 << 20;
    let small = chunks(1, 80, 3 * CHUNK as u64);
    let plain = chunks(500, 20, (8 << 20) + 5);
    let large = vec![(20 << 20, noise(7, 9 << 20)), (30 << 20, noise(8, 8 << 20))];
    let whole = vec![(50 << 20, noise(9, 3 << 20)), (60 << 20, noise(10, 100))];
    let scene = Scene::new(length)
        .blob(Codec::Zstd, true, &small)
        .blob(Codec::Plain, true, &plain)
        .blob(Codec::Zstd, true, &large)
        .blob(Codec::Zstd, false, &whole);
    scene.fetch().1.unwrap();
    let expected = expected(64 << 20, &[&small, &plain, &large, &whole]);
    assert!(scene.disk() == expected);
    let (fetched, result) = scene.fetch();
    result.unwrap();
    assert_eq!(fetched, 0, "all of it is here");
}

#[test]
fn one_damaged_piece_costs_no_other() {
    let pieces = chunks(1, 64, 0);
    let scene = Scene::new(4 << 20).blob(Codec::Zstd, true, &pieces);
    scene.damage(0, 10);
    let error = scene.fetch().1.unwrap_err();
    assert!(
        matches!(&error, Error::Corrupt { .. }) && error.to_string().contains("the piece at"),
        "{error}"
    );
    assert!(scene.disk()[..63 * CHUNK] == expected(4 << 20, &[&pieces])[..63 * CHUNK]);
    assert!(
        scene.disk()[63 * CHUNK..].iter().all(|&byte| byte == 0),
        "unverified bytes were written"
    );
    scene.damage(0, 10);
    let (fetched, result) = scene.fetch();
    result.unwrap();
    assert!(fetched < 2 * CHUNK as u64, "{fetched}");
    assert!(scene.disk() == expected(4 << 20, &[&pieces]));
}

#[test]
fn what_a_damaged_large_piece_left_is_no_part_of_the_disk() {
    // Damage turns zeros into something else; then the same place has to become zeros again.
    let mut bytes = noise(1, 16 << 20);
    bytes[15 << 20..].fill(0);
    for verified in [true, false] {
        let pieces = vec![(0, bytes.clone())];
        let scene = Scene::new(16 << 20).blob(Codec::Plain, verified, &pieces);
        scene.damage(0, 1);
        let error = scene.fetch().1.unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
        scene.damage(0, 1);
        scene.fetch().1.unwrap();
        assert!(scene.disk() == bytes);
    }
}

struct Other(Mutex<BTreeMap<Digest, (PathBuf, u64)>>);

impl Known for Other {
    fn find(&self, digest: &Digest, _: u64) -> Option<(PathBuf, u64)> {
        self.0.lock().unwrap().get(digest).cloned()
    }
}

#[test]
fn what_the_host_has_is_verified_and_not_fetched() {
    let pieces = chunks(1, 32, 0);
    let scene = Scene::new(2 << 20).blob(Codec::Zstd, true, &pieces);
    let path = scene.dir.path().join("other");
    let mut other: Vec<u8> = pieces[..31].iter().flat_map(|(_, bytes)| bytes.clone()).collect();
    // One is damaged here; one is nowhere.
    other[0] ^= 1;
    std::fs::write(&path, other).unwrap();
    let known = pieces[..31]
        .iter()
        .map(|(at, bytes)| (Digest::of(bytes), (path.clone(), *at)))
        .chain([(Digest::of(&pieces[31].1), (Path::new("/nowhere").to_owned(), 0))])
        .collect();
    let (fetched, result) = scene.fetch_knowing(Some(Arc::new(Other(Mutex::new(known)))));
    result.unwrap();
    assert!(
        fetched < 3 * CHUNK as u64 && fetched > 2 * CHUNK as u64 - 100,
        "{fetched}"
    );
    assert!(scene.disk() == expected(2 << 20, &[&pieces]));
}

#[test]
fn a_plan_that_lies_is_refused_before_anything_is_fetched() {
    let mut scene = Scene::new(1 << 20).blob(Codec::Zstd, true, &chunks(1, 4, 0));
    scene.blobs[0].pieces[1].at = 1;
    let (fetched, result) = scene.fetch();
    assert!(matches!(result, Err(Error::Malformed { .. })));
    assert_eq!(fetched, 0);
    scene.blobs[0].pieces[1].at = CHUNK as u64;
    scene.blobs[0].pieces[1].length += 1;
    scene.blobs[0].pieces.truncate(2);
    assert!(
        matches!(scene.fetch().1, Err(Error::Malformed { .. })),
        "it unpacks to less"
    );
    scene.blobs[0].pieces[1].length -= 2;
    assert!(
        matches!(scene.fetch().1, Err(Error::Malformed { .. })),
        "it unpacks to more"
    );
}

#[test]
fn who_is_to_blame_for_a_piece_says_its_whole_blob() {
    let small = chunks(1, 4, 0);
    let large = vec![(4 << 20, noise(9, 9 << 20))];
    for pieces in [small, large] {
        let mut scene = Scene::new(16 << 20).blob(Codec::Zstd, true, &pieces);
        scene.blobs[0].pieces[0].digest = Some(Digest::of(b"another"));
        let error = scene.fetch().1.unwrap_err();
        assert!(matches!(&error, Error::Malformed { .. }), "{error}");
        assert!(error.to_string().contains("as it was pushed"), "{error}");
        // Of a blob that is no more what it was nobody can say who made it so.
        scene.damage(0, 1);
        let error = scene.fetch().1.unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    }
}

#[test]
fn a_cancelled_pull_leaves_a_frame_of_many_pieces_alone() {
    const LENGTH: usize = 1 << 20;
    // Unpacked it would take minutes.
    let count = 1_u64 << 18;
    let mut scene = Scene::new(count * LENGTH as u64).blob(Codec::Zstd, true, &[(0, vec![0; LENGTH])]);
    let first = scene.blobs[0].pieces[0].clone();
    let pieces = (0..count).map(|number| Piece {
        at: number * LENGTH as u64,
        ..first.clone()
    });
    scene.blobs[0].pieces = pieces.collect();
    let packed = std::fs::read(scene.packed(&scene.blobs[0].descriptor.digest)).unwrap();
    let frame = usize::try_from(first.packed.start).unwrap()..;
    let (plan, place) = (Arc::new(scene.plan()), scene.place());
    let cancelled = CancelledOnDrop::default();
    let site = Site::open(plan, &place, Arc::clone(&cancelled.0), Arc::new(())).unwrap();
    let all: Vec<usize> = (0..scene.blobs[0].pieces.len()).collect();
    std::thread::scope(|scope| {
        let unpacking = scope.spawn(|| site.unpack_batch(0, &all, first.packed.start, &packed[frame]));
        while site.done.unwritten() == 0 && !unpacking.is_finished() {
            std::thread::yield_now();
        }
        drop(cancelled);
        let error = unpacking.join().unwrap().unwrap_err();
        assert!(error.to_string().contains("cancelled"), "{error}");
    });
    assert!(!site.done.has(0, all.len() - 1));
}
