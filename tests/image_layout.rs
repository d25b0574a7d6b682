//! Images from OCI layout folders: every format that is read, and every class that is refused.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

#[path = "support/image_fixture.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod image_fixture;

use std::os::unix::fs::{MetadataExt as _, PermissionsExt};
use std::path::Path;

use cannery::image::{
    Credentials, Disk, DiskFormat, Error, Firmware, Hostility, Limits, PullPolicy, Registries, Request,
    Requirements, Silent, Store,
};
use image_fixture::{
    Image, Layout, OCI_TAR, OCI_TAR_GZIP, OCI_TAR_ZSTD, Tar, gzip, noise, qcow2_disk, raw_disk, sha256, zstd,
};
use tar::EntryType;

const LIMITS: Limits = Limits {
    max_disk: 64 << 20,
    keep_free: 0,
};

struct Bench {
    dir: tempfile::TempDir,
    layout: Layout,
    store: Store,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(&dir.path().join("layout"));
        let store = Store::open(&dir.path().join("store")).unwrap();
        Self { dir, layout, store }
    }

    fn request(&self, tag: &str) -> Request {
        Request {
            reference: self.layout.reference(tag).parse().unwrap(),
            architecture: "x86_64".to_owned(),
            policies: vec![PullPolicy::Always],
            credentials: Credentials::none(),
            registries: Registries::default(),
            requirements: Requirements::default(),
            limits: LIMITS,
            asker: cannery::image::Asker::Operator,
        }
    }

    fn provide(&self, request: &Request) -> Result<Disk, Error> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(self.store.provide(request, &Silent))
    }

    fn pull(&self, image: &Image) -> Result<Disk, Error> {
        self.layout.add("vm", image);
        self.provide(&self.request("vm"))
    }

    /// The class of a refusal; nothing may be left of it.
    fn refused(&self, image: &Image) -> Hostility {
        match self.pull(image) {
            Err(Error::Hostile { class, .. }) => {
                self.is_clean();
                class
            }
            other => panic!("{other:?}"),
        }
    }

    /// Nothing half-made, and no disk, is in the store.
    fn is_clean(&self) {
        for part in ["partial", "disks"] {
            let left: Vec<_> = std::fs::read_dir(self.dir.path().join("store").join(part))
                .unwrap()
                .collect();
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

fn disk_archive(name: &str, disk: &[u8]) -> Vec<u8> {
    Tar::new().dir("disk/").file(name, disk).bytes()
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

#[test]
fn a_container_disk_is_read_however_it_is_packed() {
    for (media_type, name) in [
        (OCI_TAR, "disk/disk.img"),
        (OCI_TAR_GZIP, "./disk/disk.img"),
        (OCI_TAR_ZSTD, "disk/x"),
        (
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
            "disk/disk.img",
        ),
    ] {
        let bench = Bench::new();
        let disk = bench
            .pull(&Image::container_disk(
                &disk_archive(name, &raw_disk()),
                media_type,
            ))
            .unwrap();
        assert_eq!(
            (disk.format, disk.virtual_size),
            (DiskFormat::Raw, 2 << 20),
            "{media_type}"
        );
        assert!(read(&disk.path) == raw_disk(), "{media_type}");
        assert!(!disk.from_cache && disk.fetched_bytes > 0);
    }
}

#[test]
fn a_qcow2_stays_a_qcow2() {
    let bench = Bench::new();
    let archive = disk_archive("disk/disk.qcow2", &qcow2_disk());
    let disk = bench
        .pull(&Image::container_disk(&archive, OCI_TAR_GZIP))
        .unwrap();
    assert_eq!((disk.format, disk.virtual_size), (DiskFormat::Qcow2, 65536));
    assert!(disk.path.ends_with("disk.qcow2") && read(&disk.path) == qcow2_disk());
}

#[test]
fn one_blob_is_a_disk_whatever_its_type_says() {
    for (blob, media_type, expected) in [
        (raw_disk(), "application/octet-stream", raw_disk()),
        (gzip(&raw_disk()), OCI_TAR, raw_disk()),
        (zstd(&raw_disk()), "application/zstd", raw_disk()),
        (qcow2_disk(), "application/vnd.qemu.qcow2", qcow2_disk()),
        (zstd(&qcow2_disk()), "application/x-qemu-disk", qcow2_disk()),
    ] {
        let bench = Bench::new();
        let disk = bench.pull(&Image::plain(blob, media_type)).unwrap();
        assert!(read(&disk.path) == expected, "{media_type}");
    }
}

#[test]
fn an_image_brings_its_kernel_and_its_wishes() {
    let bench = Bench::new();
    let archive = Tar::new()
        .dir("disk/")
        .file("disk/disk.img", &raw_disk())
        .file("boot/vmlinuz", b"kernel")
        .file("boot/initrd", b"initrd")
        .file("boot/other", b"other")
        .bytes();
    let image = Image::container_disk(&archive, OCI_TAR_GZIP)
        .label("io.cannery.kernel", "/boot/vmlinuz")
        .label("io.cannery.initrd", "boot/initrd")
        .label("io.cannery.cmdline", "root=/dev/vda console=ttyS0")
        .label("io.cannery.memory", "256M")
        .label("io.cannery.firmware", "uefi")
        .label("io.cannery.user", "ci")
        .label("io.cannery.unknown", "\n")
        .label("maintainer", "somebody");
    let disk = bench.pull(&image).unwrap();
    let boot = disk.boot.unwrap();
    assert_eq!(read(&boot.kernel), b"kernel");
    assert_eq!(read(&boot.initrd.unwrap()), b"initrd");
    assert_eq!(boot.cmdline.as_deref(), Some("root=/dev/vda console=ttyS0"));
    assert_eq!(disk.hints.memory, Some(256 << 20));
    assert_eq!(disk.hints.firmware, Some(Firmware::Uefi));
    assert_eq!(disk.hints.user.as_deref(), Some("ci"));
    let mut names: Vec<String> = std::fs::read_dir(disk.path.parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["disk.raw", "image.json", "initrd", "kernel"]);
}

#[test]
fn later_layers_replace_and_hide_what_earlier_ones_have() {
    let lower = Tar::new()
        .dir("etc")
        .file("etc/os-release", b"x")
        .file("disk/old.img", &noise(3, 4096))
        .bytes();
    let uppers = [
        Tar::new()
            .file("disk/.wh.old.img", b"")
            .file("disk/disk.img", &raw_disk())
            .bytes(),
        Tar::new()
            .file("disk/.wh..wh..opq", b"")
            .file("disk/disk.img", &raw_disk())
            .bytes(),
        Tar::new()
            .file(".wh.disk", b"")
            .file("disk/disk.img", &raw_disk())
            .bytes(),
        Tar::new().file("disk/old.img", &raw_disk()).bytes(),
    ];
    for upper in uppers {
        let bench = Bench::new();
        let image = Image {
            layers: vec![
                (gzip(&lower), OCI_TAR_GZIP.into()),
                (zstd(&upper), OCI_TAR_ZSTD.into()),
            ],
            diff_ids: vec![sha256(&lower), sha256(&upper)],
            ..Image::default()
        };
        let disk = bench.pull(&image).unwrap();
        assert!(read(&disk.path) == raw_disk());
        assert_eq!(std::fs::read_dir(disk.path.parent().unwrap()).unwrap().count(), 2);
    }
}

#[test]
fn an_index_gives_the_image_for_the_machine() {
    let bench = Bench::new();
    let image = |seed, architecture: &str| {
        Image::container_disk(&disk_archive("disk/x", &noise(seed, 4096)), OCI_TAR).architecture(architecture)
    };
    bench
        .layout
        .add_index("vm", &[image(1, "amd64"), image(2, "arm64")]);
    let mut request = bench.request("vm");
    assert!(read(&bench.provide(&request).unwrap().path) == noise(1, 4096));
    request.architecture = "aarch64".to_owned();
    assert!(read(&bench.provide(&request).unwrap().path) == noise(2, 4096));
    assert_eq!(bench.store.list().unwrap().len(), 2);
    bench.layout.add_index("arm", &[image(2, "arm64")]);
    let error = bench.provide(&bench.request("arm")).unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("is not for linux/amd64; it is for linux/arm64"),
        "{error}"
    );
    bench.layout.add("single", &image(3, "arm64"));
    assert!(matches!(
        bench.provide(&bench.request("single")),
        Err(Error::WrongPlatform { .. })
    ));
    request.architecture = "riscv64".to_owned();
    assert!(matches!(
        bench.provide(&request),
        Err(Error::WrongPlatform { .. })
    ));
}

#[test]
fn what_is_in_the_store_is_read_only_and_open_to_qemu() {
    let bench = Bench::new();
    let disk = bench
        .pull(&Image::container_disk(
            &disk_archive("disk/x", &raw_disk()),
            OCI_TAR_GZIP,
        ))
        .unwrap();
    let dir = disk.path.parent().unwrap();
    for entry in std::fs::read_dir(dir).unwrap() {
        let mode = entry.unwrap().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o444);
    }
    for dir in dir.ancestors().take_while(|dir| *dir != bench.dir.path()) {
        assert_eq!(
            dir.metadata().unwrap().mode() & 0o7757,
            0o755,
            "{}",
            dir.display()
        );
    }
    // 300 KiB of data in a disk of 2 MiB: the hole takes no room.
    assert!(disk.path.metadata().unwrap().blocks() * 512 < 512 * 1024);
}

#[test]
fn policies_decide_when_the_source_is_asked() {
    let bench = Bench::new();
    let image = |seed| Image::container_disk(&disk_archive("disk/x", &noise(seed, 4096)), OCI_TAR_GZIP);
    let mut request = bench.request("vm");
    let by = |request: &mut Request, policies: &[PullPolicy]| {
        request.policies = policies.to_vec();
        bench.provide(request)
    };
    assert!(matches!(
        by(&mut request, &[PullPolicy::Never]),
        Err(Error::NotCached { .. })
    ));
    assert!(matches!(
        by(&mut request, &[PullPolicy::Always]),
        Err(Error::NotFound { .. })
    ));
    bench.layout.add("vm", &image(1));
    let first = by(&mut request, &[PullPolicy::Never, PullPolicy::IfNotPresent]).unwrap();
    assert!(!first.from_cache);
    bench.layout.add("vm", &image(2));
    for policy in [PullPolicy::Never, PullPolicy::IfNotPresent] {
        let disk = by(&mut request, &[policy]).unwrap();
        assert_eq!(
            (disk.digest, disk.from_cache, disk.fetched_bytes),
            (first.digest, true, 0)
        );
    }
    let second = by(&mut request, &[PullPolicy::Always]).unwrap();
    assert_ne!(second.digest, first.digest);
    assert!(by(&mut request, &[PullPolicy::Always]).unwrap().from_cache);
    assert_eq!(
        by(&mut request, &[PullPolicy::Never]).unwrap().digest,
        second.digest
    );
    // The old one is still there, by its digest.
    assert_eq!(bench.store.find(&first.digest).unwrap().unwrap().path, first.path);
}

#[test]
fn a_damaged_disk_of_the_store_is_made_again() {
    let bench = Bench::new();
    let image = Image::container_disk(&disk_archive("disk/x", &raw_disk()), OCI_TAR_GZIP);
    let disk = bench.pull(&image).unwrap();
    std::fs::set_permissions(&disk.path, PermissionsExt::from_mode(0o644)).unwrap();
    std::fs::OpenOptions::new()
        .write(true)
        .open(&disk.path)
        .unwrap()
        .set_len(512)
        .unwrap();
    assert_eq!(bench.store.find(&disk.digest).unwrap(), None);
    let again = bench.pull(&image).unwrap();
    assert!(!again.from_cache && read(&again.path) == raw_disk());
    assert_eq!(
        std::fs::read_dir(bench.dir.path().join("store/partial"))
            .unwrap()
            .count(),
        0
    );
}

#[test]
fn images_without_one_disk_are_refused() {
    let bench = Bench::new();
    let two = Tar::new()
        .file("disk/a", &raw_disk())
        .file("disk/b", &raw_disk())
        .bytes();
    let lower = Tar::new().file("disk/a", &raw_disk()).bytes();
    let upper = Tar::new().file("disk/b", &raw_disk()).bytes();
    let layers = Image {
        layers: vec![(lower, OCI_TAR.into()), (upper, OCI_TAR.into())],
        ..Image::default()
    };
    let none = Tar::new()
        .file("etc/os-release", b"x")
        .file("disk/deep/er", b"x")
        .bytes();
    for (image, part) in [
        (
            Image::container_disk(&two, OCI_TAR),
            "more than one file under disk/: `disk/a` and `disk/b`",
        ),
        (layers, "more than one file under disk/: `disk/a` and `disk/b`"),
        (Image::container_disk(&none, OCI_TAR), "no file under disk/"),
        (
            Image::container_disk(&none, OCI_TAR).label("containers.bootc", "1"),
            "bootc",
        ),
        (
            Image::plain(b"BZh91AY".to_vec(), "application/x-bzip2"),
            "compressed with bzip2",
        ),
        (
            Image {
                artifact: Some("x/config".into()),
                ..Image::default()
            },
            "`x/config`",
        ),
        (
            Image::plain(raw_disk(), "application/vnd.trycua.lume.disk.v1"),
            "a lume image",
        ),
    ] {
        let error = bench.pull(&image).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains(part), "{error}");
        bench.is_clean();
    }
}

#[test]
fn archives_that_reach_out_are_refused() {
    use Hostility as H;
    let bench = Bench::new();
    let archive =
        |tar: Tar| Image::container_disk(&tar.file("disk/disk.img", &raw_disk()).bytes(), OCI_TAR_GZIP);
    for (tar, expected) in [
        (
            Tar::new().file("/etc/cron.d/x", b"x"),
            H::AbsoluteName("/etc/cron.d/x".into()),
        ),
        (
            Tar::new().file("disk/../../x", b"x"),
            H::ParentName("disk/../../x".into()),
        ),
        (
            Tar::new().entry("disk", EntryType::Symlink, b""),
            H::Link("disk".into()),
        ),
        (
            Tar::new().entry("disk/link", EntryType::Symlink, b""),
            H::Link("disk/link".into()),
        ),
        (
            Tar::new().entry("disk/link", EntryType::Link, b""),
            H::Link("disk/link".into()),
        ),
        (
            Tar::new().entry("disk/dev", EntryType::Block, b""),
            H::SpecialFile("disk/dev".into()),
        ),
        (
            Tar::new().entry("disk/dev", EntryType::Fifo, b""),
            H::SpecialFile("disk/dev".into()),
        ),
        (Tar::new().file("disk", b"x"), H::SpecialFile("disk".into())),
        (
            Tar::new().file("disk/disk.img", &raw_disk()),
            H::AmbiguousArchive("one file stands in it twice"),
        ),
    ] {
        assert_eq!(bench.refused(&archive(tar)), expected);
    }
    let boot = Tar::new()
        .entry("boot/vmlinuz", EntryType::Symlink, b"")
        .file("disk/disk.img", &raw_disk())
        .bytes();
    let image = Image::container_disk(&boot, OCI_TAR).label("io.cannery.kernel", "boot/vmlinuz");
    assert_eq!(bench.refused(&image), H::Link("boot/vmlinuz".into()));
    // Links elsewhere are everybody's business but ours.
    let harmless = Tar::new()
        .entry("bin", EntryType::Symlink, b"")
        .entry("dev/null", EntryType::Char, b"");
    assert!(bench.pull(&archive(harmless)).is_ok());
}

#[test]
fn disks_that_reach_out_are_refused() {
    let bench = Bench::new();
    let changed = |at: usize, bytes: &[u8]| {
        let mut disk = qcow2_disk();
        disk[at..at + bytes.len()].copy_from_slice(bytes);
        disk
    };
    for (disk, expected) in [
        (changed(15, &[120]), Hostility::BackingFile),
        (changed(79, &[4]), Hostility::DataFile),
        (changed(35, &[1]), Hostility::Encrypted),
        (changed(79, &[64]), Hostility::UnknownFeature(64)),
        (
            b"KDMV".iter().copied().chain([0; 508]).collect(),
            Hostility::ForeignFormat("vmdk"),
        ),
        (
            b"json:{\"file\":\"/etc/shadow\"}"
                .iter()
                .copied()
                .chain([0; 485])
                .collect(),
            Hostility::ForeignFormat("a QEMU file description"),
        ),
        (gzip(&qcow2_disk()), Hostility::ForeignFormat("gzip")),
    ] {
        let archive = disk_archive("disk/disk.img", &disk);
        assert_eq!(
            bench.refused(&Image::container_disk(&archive, OCI_TAR_GZIP)),
            expected
        );
        assert_eq!(
            bench.refused(&Image::plain(zstd(&disk), "application/octet-stream")),
            expected
        );
    }
}

#[test]
fn sizes_have_limits() {
    let bench = Bench::new();
    let too_large = |image: &Image, what: &str| {
        let error = bench.pull(image).unwrap_err();
        assert!(
            matches!(&error, Error::TooLarge { what: found, .. } if *found == what),
            "{error}"
        );
        bench.is_clean();
    };
    let zeros = vec![0; usize::try_from(LIMITS.max_disk).unwrap() + 512];
    too_large(
        &Image::container_disk(&disk_archive("disk/x", &zeros), OCI_TAR_ZSTD),
        "disk",
    );
    let boot_sector_and_zeros = [noise(1, 512), zeros].concat();
    too_large(&Image::plain(zstd(&boot_sector_and_zeros), "x/y"), "disk");
    let mut huge = qcow2_disk();
    huge[20..24].copy_from_slice(&21_u32.to_be_bytes());
    huge[24..32].copy_from_slice(&(1_u64 << 36).to_be_bytes());
    too_large(
        &Image::container_disk(&disk_archive("disk/x", &huge), OCI_TAR),
        "virtual disk",
    );
    let mut extended = tar::Header::new_ustar();
    extended.set_entry_type(EntryType::XHeader);
    extended.set_size(1 << 30);
    extended.set_cksum();
    too_large(
        &Image::container_disk(extended.as_bytes(), OCI_TAR),
        "extended tar header",
    );
    let mut disk = bench.layout.blob(b"{}", "x/y");
    disk["size"] = (5_u64 << 20).into();
    bench.layout.tag("vm", disk);
    std::fs::write(bench.layout.path(&sha256(b"{}")), vec![b' '; 5 << 20]).unwrap();
    let error = bench.provide(&bench.request("vm")).unwrap_err();
    assert!(
        matches!(error, Error::TooLarge { what: "manifest", .. }),
        "{error}"
    );
}

#[test]
fn a_disk_of_the_store_obeys_the_limits_of_each_request() {
    let bench = Bench::new();
    bench
        .pull(&Image::container_disk(
            &disk_archive("disk/x", &raw_disk()),
            OCI_TAR,
        ))
        .unwrap();
    let mut request = bench.request("vm");
    request.limits.max_disk = 1 << 20;
    for policy in [PullPolicy::Always, PullPolicy::Never] {
        request.policies = vec![policy];
        assert!(matches!(bench.provide(&request), Err(Error::TooLarge { .. })));
    }
}

#[test]
fn damage_is_told_from_bad_building() {
    let bench = Bench::new();
    let archive = disk_archive("disk/x", &raw_disk());
    let image = Image::container_disk(&archive, OCI_TAR_GZIP);
    let layer = bench.layout.path(&sha256(&image.layers[0].0));
    // With the file that is to be mended, and nothing about registries.
    let is_told = |error: Error| {
        let damaged = matches!(&error, Error::DamagedLayout { path, .. } if *path == layer);
        let told = cannery::outcome::Failure::from(error).to_string();
        damaged && told.contains("write the image into the folder again") && !told.contains("registry")
    };
    // Damage in the data, at the end, in the packing itself, and missing altogether.
    for (at, byte) in [
        (200_000, 0xff),
        (image.layers[0].0.len() - 1, 0xff),
        (20, 0xff),
        (0, 0),
    ] {
        bench.layout.add("vm", &image);
        let mut bytes = read(&layer);
        bytes[at] ^= byte.max(1);
        std::fs::write(&layer, bytes).unwrap();
        let error = bench.provide(&bench.request("vm")).unwrap_err();
        assert!(is_told(error), "byte {at}");
        bench.is_clean();
    }
    for length in [0, 1000, image.layers[0].0.len() + 1] {
        bench.layout.add("vm", &image);
        let mut bytes = read(&layer);
        bytes.resize(length, 0);
        std::fs::write(&layer, bytes).unwrap();
        let error = bench.provide(&bench.request("vm")).unwrap_err();
        assert!(is_told(error), "{length} bytes");
        bench.is_clean();
    }
    bench.layout.add("vm", &image);
    std::fs::remove_file(&layer).unwrap();
    assert!(
        is_told(bench.provide(&bench.request("vm")).unwrap_err()),
        "missing"
    );
    for document in ["config", "manifest"] {
        let manifest = bench.layout.add("vm", &image);
        let digest = match document {
            "config" => {
                let manifest: serde_json::Value =
                    serde_json::from_slice(&read(&bench.layout.path(&manifest))).unwrap();
                manifest["config"]["digest"].as_str().unwrap().to_owned()
            }
            _ => manifest,
        };
        let path = bench.layout.path(&digest);
        std::fs::write(&path, b"{}").unwrap();
        let error = bench.provide(&bench.request("vm")).unwrap_err();
        assert!(
            matches!(&error, Error::DamagedLayout { path: found, .. } if *found == path),
            "{document}: {error}"
        );
        std::fs::remove_file(&path).unwrap();
    }
    bench.layout.add("vm", &image);
    // Authentic, and wrong all the same.
    let cut = Image::plain(gzip(&raw_disk())[..5000].to_vec(), OCI_TAR_GZIP);
    assert!(matches!(bench.pull(&cut), Err(Error::Malformed { .. })));
    let half = Image::container_disk(&archive[..archive.len() / 2], OCI_TAR_GZIP);
    assert!(matches!(bench.pull(&half), Err(Error::Malformed { .. })));
    let mut lying = Image::container_disk(&archive, OCI_TAR_GZIP);
    lying.diff_ids = vec![sha256(b"something else")];
    assert!(matches!(bench.pull(&lying), Err(Error::Malformed { .. })));
    bench.is_clean();
    assert!(bench.pull(&image).is_ok());
}

#[test]
fn labels_and_files_must_agree() {
    let bench = Bench::new();
    let archive = disk_archive("disk/x", &raw_disk());
    for (label, value) in [
        ("io.cannery.kernel", "boot/vmlinuz"),
        ("io.cannery.kernel", "../../boot/vmlinuz"),
        ("io.cannery.memory", "lots"),
        ("io.cannery.user", "root\n"),
    ] {
        let error = bench
            .pull(&Image::container_disk(&archive, OCI_TAR).label(label, value))
            .unwrap_err();
        assert!(
            matches!(error, Error::Label { .. }) && error.to_string().contains(label),
            "{error}"
        );
        bench.is_clean();
    }
}

#[test]
fn a_store_that_cannot_be_written_is_the_hosts_fault() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), b"").unwrap();
    let error = Store::open(&dir.path().join("file/store")).unwrap_err();
    assert!(matches!(error, Error::Storage { .. }), "{error}");
}

#[test]
fn room_that_must_stay_free_stays_free() {
    let bench = Bench::new();
    let image = Image::container_disk(&disk_archive("disk/x", &raw_disk()), OCI_TAR_GZIP);
    bench.layout.add("vm", &image);
    let mut request = bench.request("vm");
    request.limits.keep_free = 1 << 60;
    let error = bench.provide(&request).unwrap_err();
    assert!(matches!(error, Error::DiskFull { .. }), "{error}");
    bench.is_clean();
}
