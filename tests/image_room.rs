//! Pulls into a store that is too small.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

#[path = "support/faulty_registry.rs"]
#[allow(dead_code, reason = "each suite uses its part of the registry")]
mod faulty_registry;
#[path = "support/image_fixture.rs"]
#[allow(dead_code, reason = "each suite uses its part of the fixture")]
mod image_fixture;

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use cannery::image::{
    Asker, Credentials, Disk, Error, Limits, PullPolicy, Registries, Request, Requirements, Silent, Store,
};
use cannery::secret::Secret;
use faulty_registry::Registry;
use image_fixture::{Image, Layout, OCI_TAR, OCI_TAR_GZIP, Tar, noise};

/// Bytes of a store's file system.
const SMALL: u64 = 24 << 20;

/// What must stay free of it.
const KEEP_FREE: u64 = 1 << 20;

/// A file system in memory; it goes with this value.
struct Small {
    dir: tempfile::TempDir,
}

impl Small {
    fn new() -> Self {
        Self::of(SMALL)
    }

    fn of(size: u64) -> Self {
        let small = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        small.mount(&["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]);
        small
    }

    fn mount(&self, arguments: &[&str]) {
        let mounted = Command::new("mount")
            .args(arguments)
            .arg(self.dir.path())
            .output()
            .unwrap();
        assert!(mounted.status.success(), "root can mount: {mounted:?}");
    }

    fn grow(&self) {
        self.grow_to(8 * SMALL);
    }

    fn grow_to(&self, size: u64) {
        self.mount(&["-o", &format!("remount,size={size}")]);
    }

    fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn free(&self) -> u64 {
        let room = rustix::fs::statvfs(self.dir.path()).unwrap();
        room.f_bavail * room.f_frsize
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        drop(Command::new("umount").arg(self.dir.path()).status());
    }
}

/// Adds a containerDisk; the size of its layer.
fn add(registry: &Registry, tag: &str, disk: &[u8], media_type: &str) -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(dir.path());
    let archive = Tar::new().dir("disk/").file("disk/disk.img", disk).bytes();
    let image = Image::container_disk(&archive, media_type);
    let digest = layout.add(tag, &image);
    registry.add(&layout.dir, &digest, tag);
    image.layers[0].0.len() as u64
}

/// Adds an image in cannery's own format; the size of its layers.
fn add_native(registry: &Registry, tag: &str, disk: &[u8]) -> u64 {
    let layers = add_written(registry, tag, |file| file.write_all(disk).unwrap());
    layers.iter().map(|(_, size)| size).sum()
}

/// The same of a disk that is written by `write`; the types and sizes of its layers.
fn add_written(registry: &Registry, tag: &str, write: impl FnOnce(&mut File)) -> Vec<(String, u64)> {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    let at = |name: &str| dir.path().join(name);
    write(&mut File::create(at("disk.raw")).unwrap());
    let settings = format!("state_dir = \"{}\"\n", at("state").display());
    fs::write(at("cannery.toml"), settings).unwrap();
    let pushed = Command::new(env!("CARGO_BIN_EXE_cannery"))
        .arg("--config")
        .arg(at("cannery.toml"))
        .args(["image", "push", "--quiet"])
        .arg(at("disk.raw"))
        .arg(layout.reference(tag))
        .output()
        .unwrap();
    assert!(pushed.status.success(), "{pushed:?}");
    let digest = String::from_utf8(pushed.stdout).unwrap();
    registry.add(&layout.dir, digest.trim(), tag);
    let manifest = fs::read(layout.path(digest.trim())).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let layers = manifest["layers"].as_array().unwrap().iter();
    let layers = layers.map(|layer| (layer["mediaType"].as_str().unwrap(), &layer["size"]));
    layers
        .map(|(media_type, size)| (media_type.to_owned(), size.as_u64().unwrap()))
        .collect()
}

fn pull(store: &Path, registry: &Registry, tag: &str) -> Result<Disk, Error> {
    let request = Request {
        requirements: Requirements::default(),
        reference: format!("{}/vm:{tag}", registry.host).parse().unwrap(),
        architecture: "x86_64".to_owned(),
        policies: vec![PullPolicy::Always],
        credentials: Credentials::basic(&registry.host, "ci", Secret::new("sesame")),
        registries: Registries::without_tls([&registry.host]),
        limits: Limits {
            max_disk: 4 << 30,
            keep_free: KEEP_FREE,
        },
        asker: Asker::Operator,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let store = Store::open(store).unwrap();
    runtime.block_on(store.provide(&request, &Silent))
}

fn partial(store: &Path) -> usize {
    fs::read_dir(store.join("partial")).unwrap().count()
}

#[test]
#[ignore = "needs root, to mount a file system of some MiB"]
fn a_full_disk_is_told_in_numbers_and_leaves_nothing() {
    let registry = Registry::new();
    let bytes = noise(1, 40 << 20);
    let packed = add(&registry, "gzip", &bytes, OCI_TAR_GZIP);
    let native = add_native(&registry, "native", &bytes);
    add(&registry, "tar", &bytes, OCI_TAR);
    // A disk that is not packed may have holes: how much it takes shows only when it is written.
    // Packed it would fit several times.
    let text: Vec<u8> = noise(4, 4 << 20).iter().flat_map(|byte| [*byte; 10]).collect();
    assert!(add_native(&registry, "native-text", &text) < SMALL / 3);
    for (tag, bytes, known) in [
        ("gzip", &bytes, Some(packed)),
        ("native", &bytes, Some(native)),
        ("native-text", &text, Some(text.len() as u64)),
        ("tar", &bytes, None),
    ] {
        let small = Small::new();
        let store = small.store();
        for _ in 0..2 {
            drop(Store::open(&store).unwrap());
            let before = small.free();
            let error = pull(&store, &registry, tag).unwrap_err();
            let Error::DiskFull {
                image,
                dir,
                needed,
                free,
                ..
            } = &error
            else {
                panic!("{tag}: {error}")
            };
            assert!(dir.starts_with(&store), "{error}");
            assert_eq!(image, &format!("{}/vm:{tag}", registry.host));
            assert!(*needed > KEEP_FREE && needed > free, "{error}");
            assert!(*free <= before, "{error}: {before}");
            if let Some(known) = known {
                // It is told before anything is written. The index of an image of ours is here by then, and is not counted; its lists are.
                let whole = known + KEEP_FREE;
                assert!(whole.abs_diff(*needed) < 64 << 10, "{error}: {whole}");
                assert!(before - free < 256 << 10, "{error}: {before}");
            }
            assert_eq!(partial(&store), 0, "{tag}");
            assert!(
                before - small.free() < 64 << 10,
                "{tag}: what was written is gone"
            );
        }
        small.grow();
        let disk = pull(&store, &registry, tag).unwrap();
        assert!(fs::read(&disk.path).unwrap() == *bytes, "{tag}");
        assert_eq!(partial(&store), 0, "{tag}");
    }
}

/// A qcow2 of so many bytes that has none of its own, on a raw file.
fn overlay(size: u64, below: &str) -> Vec<u8> {
    const CLUSTER: usize = 64 << 10;
    let mut file = vec![0; CLUSTER * 3];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(8, &200_u64.to_be_bytes());
    put(16, &u32::try_from(below.len()).unwrap().to_be_bytes());
    put(20, &16_u32.to_be_bytes());
    put(24, &size.to_be_bytes());
    put(36, &1_u32.to_be_bytes());
    put(40, &(2 * CLUSTER as u64).to_be_bytes());
    put(48, &(CLUSTER as u64).to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    put(104, b"\xe2\x79\x2a\xca\0\0\0\x03raw");
    put(200, below.as_bytes());
    file
}

#[test]
#[ignore = "needs root, to mount a file system of some MiB"]
fn for_a_disk_of_several_files_room_is_asked_for_beside_them() {
    const BASE: u64 = 14 << 20;
    let registry = Registry::new();
    let base = noise(1, 14 << 20);
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(dir.path());
    let named = |bytes: &[u8], name: &str| {
        let builder = flate2::GzBuilder::new().filename(name);
        let mut encoder = builder.write(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let domain = b"<domain><os><type arch='x86_64'>hvm</type></os></domain>".to_vec();
    let image = Image::default()
        .layer(domain, "application/vnd.libvirt.domain.config+xml", &[])
        .layer(named(&base, "base"), "application/octet-stream+gzip", &[])
        .layer(
            named(&overlay(BASE, "base"), "top"),
            "application/x-qemu-disk+gzip",
            &[],
        );
    let digest = layout.add("stack", &image);
    registry.add(&layout.dir, &digest, "stack");
    let small = Small::new();
    let store = small.store();
    drop(Store::open(&store).unwrap());
    let before = small.free();
    let error = pull(&store, &registry, "stack").unwrap_err();
    let Error::DiskFull { needed, free, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(*needed, BASE + KEEP_FREE, "{error}");
    // Nothing but the files was there by then.
    assert!(before - free < BASE + (512 << 10), "{error}: {before}");
    assert_eq!(partial(&store), 0);
    assert!(before - small.free() < 64 << 10, "what was written is gone");
    small.grow();
    let disk = pull(&store, &registry, "stack").unwrap();
    assert!(fs::read(&disk.path).unwrap() == base);
    assert_eq!(partial(&store), 0);
}

/// Pulls an image whose registry stops when a MiB of it has come, and goes on when something else was done meanwhile.
fn while_held(store: &Path, registry: &Registry, tag: &str, meanwhile: impl FnOnce()) -> Disk {
    const HELD: u64 = 1 << 20;
    registry.hold_after(Some(HELD));
    let begun = registry.sent() + HELD;
    std::thread::scope(|scope| {
        let held = scope.spawn(|| pull(store, registry, tag));
        while registry.sent() < begun {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        meanwhile();
        registry.hold_after(None);
        held.join().unwrap().unwrap()
    })
}

#[test]
#[ignore = "needs root, to mount a file system of some MiB"]
fn what_one_pull_still_needs_is_not_there_for_another() {
    let registry = Registry::new();
    let (first, second) = (noise(1, 14 << 20), noise(2, 14 << 20));
    add(&registry, "first", &first, OCI_TAR_GZIP);
    add(&registry, "second", &second, OCI_TAR_GZIP);
    let small = Small::new();
    let store = small.store();
    // Each of the two would fit.
    let disk = while_held(&store, &registry, "first", || {
        let error = pull(&store, &registry, "second").unwrap_err();
        let Error::DiskFull {
            needed,
            claimed,
            free,
            ..
        } = &error
        else {
            panic!("{error}")
        };
        assert!(*claimed > 8 << 20, "{error}");
        assert!(
            needed - claimed < *free,
            "it would fit but for the other: {error}"
        );
        assert!(
            error.to_string().contains("for pulls that began before"),
            "{error}"
        );
    });
    assert!(fs::read(&disk.path).unwrap() == first);
    assert_eq!(partial(&store), 0);
    // The other's image is here by now, and claims nothing any more.
    small.grow();
    assert!(fs::read(pull(&store, &registry, "second").unwrap().path).unwrap() == second);
}

/// Ten bytes of disk for each that it has packed.
fn text(seed: u64, length: usize) -> Vec<u8> {
    let letters = noise(seed, length.div_ceil(10));
    letters.iter().flat_map(|byte| [*byte; 10]).take(length).collect()
}

#[test]
#[ignore = "needs root, to mount a file system of some MiB"]
fn what_one_pull_will_unpack_is_not_there_for_another() {
    let (one, two) = (Registry::new(), Registry::new());
    let (first, second) = (text(1, 14 << 20), text(2, 14 << 20));
    let packed = add_native(&one, "first", &first) + add_native(&two, "second", &second);
    assert!(packed < 8 << 20, "packed both would fit: {packed}");
    for (size, both_fit) in [(SMALL, false), (30 << 20, true)] {
        let small = Small::of(size);
        let store = small.store();
        // The index comes, and a part of what it names.
        let disk = while_held(&store, &one, "first", || {
            let pulled = pull(&store, &two, "second");
            if both_fit {
                assert!(fs::read(pulled.unwrap().path).unwrap() == second);
                return;
            }
            let error = pulled.unwrap_err();
            let Error::DiskFull {
                needed,
                claimed,
                free,
                ..
            } = &error
            else {
                panic!("{error}")
            };
            assert!((1 << 20..15 << 20).contains(claimed), "{error}");
            let own = needed - claimed - KEEP_FREE;
            assert!(own.abs_diff(14 << 20) < 128 << 10, "{error}");
            assert!(own + KEEP_FREE < *free, "it would fit but for the other: {error}");
        });
        assert!(fs::read(&disk.path).unwrap() == first);
        assert_eq!(partial(&store), 0);
    }
}

#[test]
#[ignore = "needs root, to mount a file system of some MiB"]
fn for_a_disk_of_several_segments_room_is_asked_for_once() {
    const BLOCK: u64 = 4096;
    const GIB: u64 = 1 << 30;
    let block = |number: u64| number.to_le_bytes().repeat(512);
    let write = |file: &mut File| {
        file.set_len(GIB + (64 << 20)).unwrap();
        // As many chunks as a segment has, and then another segment.
        for number in 0..1 << 16 {
            file.write_all_at(&block(number), number * 4 * BLOCK).unwrap();
        }
        for number in 0..(64 << 20) / BLOCK {
            file.write_all_at(&block(GIB + number), GIB + number * BLOCK)
                .unwrap();
        }
    };
    let registry = Registry::new();
    let layers = add_written(&registry, "large", write);
    let index: Vec<u64> = layers
        .iter()
        .filter(|(media_type, _)| media_type.contains(".index."))
        .map(|(_, size)| *size)
        .collect();
    assert_eq!(index.len(), 2, "{layers:?}");
    let index: u64 = index.iter().sum();
    let data = (256 << 20) + (64 << 20);
    // The first segment's part would fit.
    let small = Small::of(300 << 20);
    let store = small.store();
    drop(Store::open(&store).unwrap());
    let (before, sent) = (small.free(), registry.sent());
    let error = pull(&store, &registry, "large").unwrap_err();
    let Error::DiskFull { needed, free, .. } = &error else {
        panic!("{error}")
    };
    let needed = *needed;
    assert!((data..data + (10 << 20)).contains(&needed), "{error}");
    assert!(before - free < index + (256 << 10), "{error}: {before}");
    assert!(
        registry.sent() - sent <= index,
        "nothing but the index was fetched"
    );
    assert_eq!(partial(&store), 0);
    // As much as it said is enough, but for the index.
    small.grow_to((300 << 20) - before + needed + index + (256 << 10));
    let disk = pull(&store, &registry, "large").unwrap();
    let file = File::open(&disk.path).unwrap();
    for number in (0..1 << 16).step_by(1000) {
        let mut found = [0; 4096];
        file.read_exact_at(&mut found, number * 4 * BLOCK).unwrap();
        assert!(found[..] == block(number), "{number}");
    }
}

#[test]
#[ignore = "needs root, to mount a file system of some MiB"]
fn what_must_stay_free_stays_free_whatever_an_image_is_packed_in() {
    let registry = Registry::new();
    // It fits, but for what must stay free.
    let bytes = noise(3, usize::try_from(SMALL - KEEP_FREE / 2).unwrap());
    add(&registry, "tar", &bytes, OCI_TAR);
    let small = Small::new();
    let store = small.store();
    let least = std::thread::scope(|scope| {
        let pulling = scope.spawn(|| pull(&store, &registry, "tar"));
        let mut least = small.free();
        while !pulling.is_finished() {
            least = least.min(small.free());
        }
        let error = pulling.join().unwrap().unwrap_err();
        assert!(matches!(error, Error::DiskFull { .. }), "{error}");
        least
    });
    assert!(least >= KEEP_FREE, "only {least} bytes were free at a time");
    assert_eq!(partial(&store), 0);
}
