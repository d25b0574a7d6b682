//! Pulls that are cut off, meet faults, or have a lot to carry.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(clippy::print_stderr, reason = "the seed of a failure has to be known")]

#[path = "support/faulty_registry.rs"]
#[allow(dead_code, reason = "each suite uses its part of the registry")]
mod faulty_registry;
#[path = "support/image_fixture.rs"]
#[allow(dead_code, reason = "each suite uses its part of the fixture")]
mod image_fixture;

use std::sync::Mutex;
use std::time::{Duration, Instant};

use cannery::image::{
    Addressee, Asker, Credentials, Disk, Draft, Error, Event, Limits, Native, Progress, PullPolicy,
    Registries, Request, Silent, Store, WriteFormat,
};
use cannery::secret::Secret;
use faulty_registry::{Fault, Registry};
use image_fixture::{Image, Layout, OCI_TAR, OCI_TAR_GZIP, OCI_TAR_ZSTD, Tar, noise};

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Packed bytes between two checkpoints.
const CHECKPOINT: u64 = 64 << 20;

/// Where the registry falls silent: behind a checkpoint and all that is on its way.
const HELD: u64 = CHECKPOINT + (48 << 20);

struct Bench {
    dir: tempfile::TempDir,
    registry: Registry,
    store: Store,
}

/// Notes what is told.
#[derive(Default)]
struct Notes {
    resumed: Mutex<Vec<u64>>,
    waiting: Mutex<Vec<(u64, u64)>>,
}

impl Progress for Notes {
    fn event(&self, event: Event<'_>) {
        match event {
            Event::Resumed { kept } => self.resumed.lock().unwrap().push(kept),
            Event::Waiting { done, total, .. } => self.waiting.lock().unwrap().push((done, total)),
            _ => {}
        }
    }
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        Self {
            dir,
            registry: Registry::new(),
            store,
        }
    }

    /// Adds a containerDisk.
    fn add(&self, tag: &str, disk: &[u8], media_type: &str) {
        self.add_labelled(tag, disk, media_type, &[]);
    }

    fn add_labelled(&self, tag: &str, disk: &[u8], media_type: &str, labels: &[(&str, &str)]) {
        let layout = Layout::new(&self.dir.path().join(format!("layout-{tag}")));
        let archive = Tar::new().dir("disk/").file("disk/disk.img", disk).bytes();
        let image = labels.iter().fold(
            Image::container_disk(&archive, media_type),
            |image, (name, value)| image.label(name, value),
        );
        let digest = layout.add(tag, &image);
        self.registry.add(&layout.dir, &digest, tag);
        std::fs::remove_dir_all(&layout.dir).unwrap();
    }

    /// Adds an image in the native format.
    fn add_native(&self, tag: &str, disk: &[u8]) {
        let layout = self.dir.path().join(format!("layout-{tag}"));
        let file = self.dir.path().join("native.raw");
        std::fs::write(&file, disk).unwrap();
        let draft = Draft::of_file(&file, "x86_64", 1 << 30).unwrap();
        let (credentials, registries) = (Credentials::none(), Registries::without_tls([""]));
        let to = Addressee {
            reference: &format!("oci:{}:{tag}", layout.display()).parse().unwrap(),
            credentials: &credentials,
            registries: &registries,
        };
        let native = WriteFormat::Native(Native {
            base: None,
            scratch: self.dir.path(),
        });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let written = runtime
            .block_on(cannery::image::write(&draft, native, to, &Silent))
            .unwrap();
        self.registry.add(&layout, &written.digest.to_string(), tag);
        std::fs::remove_dir_all(&layout).unwrap();
    }

    fn request(&self, tag: &str) -> Request {
        Request {
            requirements: cannery::image::Requirements::default(),
            reference: format!("{}/vm:{tag}", self.registry.host).parse().unwrap(),
            architecture: "x86_64".to_owned(),
            policies: vec![PullPolicy::Always],
            credentials: Credentials::basic(&self.registry.host, "ci", Secret::new("sesame")),
            registries: Registries::without_tls([&self.registry.host]),
            limits: Limits {
                max_disk: 4 << 30,
                keep_free: 0,
            },
            asker: Asker::Operator,
        }
    }

    /// Pulls until `enough`, and then lets everything fall.
    fn pull_until(&self, tag: &str, notes: &Notes, enough: impl Fn() -> bool) -> Option<Result<Disk, Error>> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let request = self.request(tag);
        runtime.block_on(async {
            let watch = async {
                while !enough() {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            tokio::select! {
                result = self.store.provide(&request, notes) => Some(result),
                () = watch => None,
            }
        })
    }

    fn pull(&self, tag: &str) -> Result<Disk, Error> {
        self.pull_until(tag, &Notes::default(), || false).unwrap()
    }

    fn partial(&self, name: &str) -> bool {
        let partial = self.dir.path().join("store/partial");
        let folders = std::fs::read_dir(partial).unwrap();
        folders.flatten().any(|folder| folder.path().join(name).exists())
    }
}

fn is(disk: &Disk, bytes: &[u8]) -> bool {
    std::fs::read(&disk.path).unwrap() == bytes
}

/// A disk of noise and holes.
fn disk(seed: u64, length: usize) -> Vec<u8> {
    let mut disk = noise(seed, length);
    let third = length / 3;
    disk[third..third + length / 10].fill(0);
    disk
}

#[test]
fn whatever_the_registry_does_the_image_is_whole_or_the_error_is_clear() {
    survives_all_faults(17 << 20, |bench, tag, bytes| bench.add(tag, bytes, OCI_TAR_GZIP));
}

#[test]
fn whatever_the_registry_does_an_image_in_chunks_is_whole_or_the_error_is_clear() {
    // Two requests for one pack, so that there are parts.
    survives_all_faults(24 << 20, Bench::add_native);
}

fn survives_all_faults(length: usize, add: impl Fn(&Bench, &str, &[u8])) {
    let bench = Bench::new();
    for (seed, fault) in (21..).zip(Fault::ALL) {
        let tag = format!("seed-{seed}");
        let bytes = disk(seed, length);
        add(&bench, &tag, &bytes);
        bench.registry.misbehave(seed, 50, &[fault]);
        let mut errors = Vec::new();
        let whole = loop {
            if errors.len() == 2 {
                bench.registry.misbehave(seed, 0, &[]);
            }
            match bench.pull(&tag) {
                Ok(disk) => break disk,
                Err(error) => {
                    assert!(
                        matches!(error, Error::Unreachable { .. } | Error::Corrupt { .. }),
                        "{fault:?}, seed {seed}: {error}"
                    );
                    errors.push(error.to_string());
                }
            }
            // A later pull succeeds, and nobody has to tidy up before.
            assert!(errors.len() <= 2, "{fault:?}, seed {seed}: {errors:?}");
        };
        assert!(is(&whole, &bytes), "{fault:?}, seed {seed}");
        eprintln!("{fault:?}, seed {seed}: {errors:?}");
    }
    assert_eq!(
        bench.registry.met().len(),
        Fault::ALL.len(),
        "{:?}",
        bench.registry.met()
    );
}

#[test]
fn a_manifest_that_lies_about_a_layers_size_is_refused_at_once() {
    let bench = Bench::new();
    let bytes = disk(9, 12 << 20);
    for (number, lie) in [-100_000_i64, -1, 1, 100_000].into_iter().enumerate() {
        let tag = format!("lie-{number}");
        let layout = Layout::new(&bench.dir.path().join(&tag));
        let archive = Tar::new().dir("disk/").file("disk/disk.img", &bytes).bytes();
        let digest = layout.add(&tag, &Image::container_disk(&archive, OCI_TAR));
        let honest = std::fs::read(layout.path(&digest)).unwrap();
        let mut manifest: serde_json::Value = serde_json::from_slice(&honest).unwrap();
        let size = manifest["layers"][0]["size"].as_i64().unwrap();
        manifest["layers"][0]["size"] = (size + lie).into();
        let lying = layout.blob(&serde_json::to_vec(&manifest).unwrap(), OCI_MANIFEST);
        bench
            .registry
            .add(&layout.dir, lying["digest"].as_str().unwrap(), &tag);
        let begin = Instant::now();
        let error = bench.pull(&tag).unwrap_err().to_string();
        assert!(
            error.contains(&format!(
                "has {size} bytes there, and its manifest says {}",
                size + lie
            )),
            "{lie}: {error}"
        );
        // No other try: each would give the same.
        assert!(
            begin.elapsed() < Duration::from_secs(3),
            "{lie}: {:?}",
            begin.elapsed()
        );
    }
}

#[test]
fn a_registry_without_ranges_sends_little_more_than_the_image() {
    let bench = Bench::new();
    let bytes = noise(40, 48 << 20);
    bench.add("1", &bytes, OCI_TAR);
    bench.registry.misbehave(40, 100, &[Fault::Whole]);
    assert!(is(&bench.pull("1").unwrap(), &bytes));
    // What was on its way when that was seen comes on top.
    let sent = bench.registry.sent();
    assert!(sent < 96 << 20, "{sent}");
}

#[test]
fn a_pull_that_was_cut_off_goes_on_from_its_last_checkpoint() {
    let bytes = disk(1, 150 << 20);
    for media_type in [OCI_TAR_GZIP, OCI_TAR_ZSTD, OCI_TAR] {
        let bench = Bench::new();
        bench.add("1", &bytes, media_type);
        // A checkpoint is behind, and then nothing comes.
        bench.registry.hold_after(Some(HELD));
        let begin = Instant::now();
        let cut = bench.pull_until("1", &Notes::default(), || {
            assert!(
                begin.elapsed() < Duration::from_secs(120),
                "nothing was written down"
            );
            bench.registry.sent() >= HELD && bench.partial("checkpoint-2.json")
        });
        assert!(cut.is_none());
        bench.registry.hold_after(None);
        let before = bench.registry.sent();
        let notes = Notes::default();
        let whole = bench.pull_until("1", &notes, || false).unwrap().unwrap();
        assert!(is(&whole, &bytes), "{media_type}");
        let again = bench.registry.sent() - before;
        let kept = notes.resumed.lock().unwrap().clone();
        eprintln!(
            "{media_type}: {kept:?} bytes kept, {again} sent again of {}",
            bytes.len()
        );
        assert!(kept[0] >= CHECKPOINT, "{kept:?}");
        assert!(again < bytes.len() as u64 - CHECKPOINT + (1 << 20), "{again}");
        assert_eq!(
            std::fs::read_dir(bench.dir.path().join("store/partial"))
                .unwrap()
                .count(),
            0
        );
    }
}

#[test]
fn who_waits_is_told_how_far_the_other_is() {
    let bytes = disk(1, 44 << 20);
    let bench = Bench::new();
    bench.add("1", &bytes, OCI_TAR);
    // More than what is on its way at once, so that something has arrived.
    bench.registry.hold_after(Some(38 << 20));
    let waiting = Notes::default();
    std::thread::scope(|scope| {
        let first = scope.spawn(|| bench.pull("1").unwrap());
        let begin = Instant::now();
        while bench.registry.sent() == 0 {
            assert!(begin.elapsed() < Duration::from_secs(60), "nothing was fetched");
            std::thread::sleep(Duration::from_millis(5));
        }
        let second = bench.pull_until("1", &waiting, || {
            assert!(begin.elapsed() < Duration::from_secs(150), "nobody waited");
            waiting
                .waiting
                .lock()
                .unwrap()
                .last()
                .is_some_and(|(done, _)| *done > 0)
        });
        bench.registry.hold_after(None);
        assert!(is(&first.join().unwrap(), &bytes));
        assert!(second.is_none());
    });
    let (done, total) = *waiting.waiting.lock().unwrap().last().unwrap();
    assert!(done < total && total > bytes.len() as u64, "{done} of {total}");
}

#[test]
fn a_tag_that_moves_during_a_pull_gives_the_image_that_it_named_at_first() {
    let (old, new) = (disk(1, 1 << 20), disk(2, 1 << 20));
    let bench = Bench::new();
    bench.add("1", &old, OCI_TAR_GZIP);
    bench.registry.hold_after(Some(0));
    let first = std::thread::scope(|scope| {
        let first = scope.spawn(|| bench.pull("1").unwrap());
        let begin = Instant::now();
        while bench.registry.asked("1") == 0 {
            assert!(begin.elapsed() < Duration::from_secs(60), "nobody asked");
            std::thread::sleep(Duration::from_millis(5));
        }
        bench.add("1", &new, OCI_TAR_GZIP);
        bench.registry.hold_after(None);
        first.join().unwrap()
    });
    assert!(is(&first, &old));
    assert_eq!(bench.registry.asked("1"), 1, "the tag was followed once");
    let second = bench.pull("1").unwrap();
    assert!(is(&second, &new) && second.digest != first.digest);
}

/// The number of the file that holds a disk's bytes.
fn inode(disk: &Disk) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(&disk.path).unwrap().ino()
}

#[test]
fn a_new_version_with_other_labels_takes_the_disk_that_is_here_if_it_is_whole() {
    let bytes = disk(5, 3 << 20);
    let bench = Bench::new();
    bench.add("1", &bytes, OCI_TAR_GZIP);
    bench.add_labelled("2", &bytes, OCI_TAR_GZIP, &[("io.cannery.memory", "1G")]);
    let first = bench.pull("1").unwrap();
    let sent = bench.registry.sent();

    let second = bench.pull("2").unwrap();
    assert!(second.digest != first.digest && is(&second, &bytes));
    assert_eq!(second.hints.memory, Some(1 << 30));
    assert_eq!((bench.registry.sent(), inode(&second)), (sent, inode(&first)));
    let verdict = bench.store.verify(&second.digest).unwrap();
    assert_eq!(verdict, Some(cannery::image::Verdict::Whole));

    // Damage is not handed on.
    let mut permissions = std::fs::metadata(&first.path).unwrap().permissions();
    #[allow(clippy::permissions_set_readonly_false, reason = "a file of this test")]
    permissions.set_readonly(false);
    std::fs::set_permissions(&first.path, permissions).unwrap();
    let mut damaged = bytes.clone();
    damaged[1000] ^= 1;
    std::fs::write(&first.path, &damaged).unwrap();
    bench.add_labelled("3", &bytes, OCI_TAR_GZIP, &[("io.cannery.memory", "2G")]);
    let third = bench.pull("3").unwrap();
    assert!(is(&third, &bytes) && inode(&third) != inode(&first));
    assert!(bench.registry.sent() > sent);
}
