//! Every format of other programs that is read, from layout folders made by hand, and what in them is refused.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

#[path = "support/image_fixture.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod image_fixture;
#[path = "support/web_fixture.rs"]
mod web_fixture;

use std::io::Write as _;
use std::path::Path;

use cannery::image::{
    Addressee, Asker, Credentials, Disk, DiskBus, DiskFormat, Draft, Error, Firmware, Format, Limits, Nic,
    PullPolicy, Registries, Request, Requirements, Sight, Silent, Store, WriteFormat,
};
use image_fixture::{Image, Layout, gzip, noise, qcow2_disk, raw_disk, sha256, zstd};
use serde_json::json;
use web_fixture::Web;

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

    fn pull(&self, image: &Image) -> Result<Disk, Error> {
        self.layout.add("vm", image);
        self.provide(&self.layout.reference("vm"))
    }

    fn provide(&self, reference: &str) -> Result<Disk, Error> {
        self.provide_from(reference, "")
    }

    fn look(&self, reference: &str) -> Result<Sight, Error> {
        runtime().block_on(self.store.look(&Self::request(reference, ""), &Silent))
    }

    /// Without TLS from this host.
    fn provide_from(&self, reference: &str, plain: &str) -> Result<Disk, Error> {
        runtime().block_on(self.store.provide(&Self::request(reference, plain), &Silent))
    }

    fn request(reference: &str, plain: &str) -> Request {
        Request {
            reference: reference.parse().unwrap(),
            architecture: "x86_64".to_owned(),
            policies: vec![PullPolicy::Always],
            credentials: Credentials::none(),
            registries: Registries::without_tls([plain]),
            limits: Limits {
                max_disk: 64 << 20,
                keep_free: 0,
            },
            requirements: Requirements::default(),
            asker: Asker::Operator,
        }
    }

    fn refused(&self, image: &Image) -> String {
        let error = self.pull(image).unwrap_err().to_string();
        let disks = std::fs::read_dir(self.dir.path().join("store/disks")).unwrap();
        assert_eq!(disks.count(), 0, "{error}");
        assert!(!error.contains('\n'), "{error}");
        error
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

/// A disk with data and holes, in three pieces.
fn pieces() -> [Vec<u8>; 3] {
    let mut last = vec![0; 1 << 20];
    last[..700].copy_from_slice(&noise(7, 700));
    [raw_disk(), vec![0; 3 << 20], last]
}

/// Apple's stream of LZ4 blocks, as libcompression writes it: 64 KiB each, every one with the output in front of it to refer to.
fn apple_lz4(bytes: &[u8]) -> Vec<u8> {
    const BLOCK: usize = 64 << 10;
    let mut stream = Vec::new();
    let mut before: &[u8] = b"";
    for block in bytes.chunks(BLOCK) {
        let packed = lz4_flex::block::compress_with_dict(block, before);
        if packed.len() < block.len() {
            stream.extend(b"bv41");
            stream.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
            stream.extend(u32::try_from(packed.len()).unwrap().to_le_bytes());
            stream.extend(packed);
        } else {
            stream.extend(b"bv4-");
            stream.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
            stream.extend(block);
        }
        before = block;
    }
    stream.extend(b"bv4$");
    stream
}

fn lz4_frame(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = lz4_flex::frame::FrameEncoder::new(Vec::new());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn tart(pieces: &[Vec<u8>]) -> Image {
    const TART: &str = "application/vnd.cirruslabs.tart";
    let machine = br#"{"version":1,"os":"linux","arch":"amd64","cpuCount":3,"memorySize":1073741824,"diskFormat":"raw"}"#;
    let mut image = Image::default().layer(machine.to_vec(), &format!("{TART}.config.v1"), &[]);
    for piece in pieces {
        let annotations = [
            ("org.cirruslabs.tart.uncompressed-size", piece.len().to_string()),
            ("org.cirruslabs.tart.uncompressed-content-digest", sha256(piece)),
        ];
        let annotations = annotations
            .each_ref()
            .map(|(name, value)| (*name, value.as_str()));
        image = image.layer(apple_lz4(piece), &format!("{TART}.disk.v2"), &annotations);
    }
    image.layer(b"variables".to_vec(), &format!("{TART}.nvram.v1"), &[])
}

fn vetu(pieces: &[Vec<u8>]) -> Image {
    const VETU: &str = "application/vnd.cirruslabs.vetu";
    let machine = br#"{"version":1,"arch":"amd64","cmdline":"root=/dev/vda1","disks":[{"name":"disk.img"}],"cpuCount":2,"memorySize":536870912}"#;
    let mut image = Image::default()
        .layer(machine.to_vec(), &format!("{VETU}.config.v1"), &[])
        .layer(noise(3, 50_000), &format!("{VETU}.kernel.v1"), &[])
        .layer(noise(4, 90_000), &format!("{VETU}.initramfs.v1"), &[]);
    for piece in pieces {
        let annotations = [
            ("org.cirruslabs.vetu.name", "disk.img".to_owned()),
            ("org.cirruslabs.vetu.uncompressed-size", piece.len().to_string()),
            ("org.cirruslabs.vetu.uncompressed-digest", sha256(piece)),
        ];
        let annotations = annotations
            .each_ref()
            .map(|(name, value)| (*name, value.as_str()));
        image = image.layer(lz4_frame(piece), &format!("{VETU}.disk.v1"), &annotations);
    }
    image
}

const DOMAIN: &[u8] = b"<domain type='kvm'><memory unit='KiB'>524288</memory><vcpu>8</vcpu>
    <os firmware='efi'><type arch='x86_64'>hvm</type></os><devices><emulator>/tmp/evil</emulator>
    <disk device='disk'><source file='/etc/shadow'/><target dev='sda' bus='sata'/></disk>
    <interface type='direct'><model type='e1000'/></interface></devices></domain>";

/// A gzip stream that carries its file's name.
fn gzip_named(bytes: &[u8], name: &str) -> Vec<u8> {
    let mut encoder = flate2::GzBuilder::new()
        .filename(name)
        .write(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn sardinecake(disk: &[u8], chunk: usize) -> Image {
    const DISK: &str = "application/x-qemu-disk+gzip";
    let login = br#"{"users":[{"username":"vagrant","password":"vagrant"}]}"#;
    let mut image = Image::default()
        .layer(DOMAIN.to_vec(), "application/vnd.libvirt.domain.config+xml", &[])
        .layer(
            login.to_vec(),
            "application/vnd.sardinecake.vm.config.v1+json",
            &[],
        );
    image.diff_ids = vec![sha256(DOMAIN), sha256(login), sha256(disk)];
    for (number, piece) in gzip_named(disk, "disk.qcow2").chunks(chunk).enumerate() {
        let media_type = match number {
            0 => DISK.to_owned(),
            _ => format!("{DISK};chunk={number}"),
        };
        image = image.layer(piece.to_vec(), &media_type, &[]);
    }
    image
}

#[test]
fn a_tart_image_is_put_together_from_its_pieces() {
    let disk = Bench::new()
        .pull(&tart(&pieces()))
        .map(|disk| (read(&disk.path), disk));
    let (bytes, disk) = disk.unwrap();
    assert!(bytes == pieces().concat());
    assert_eq!(
        (disk.format, disk.image_format),
        (DiskFormat::Raw, Some(Format::Tart))
    );
    assert_eq!((disk.hints.memory, disk.hints.cpus), (Some(1 << 30), Some(3)));
    assert_eq!(disk.hints.firmware, Some(Firmware::Uefi));
    assert!(disk.boot.is_none());
}

#[test]
fn a_vetu_image_brings_its_kernel() {
    let bench = Bench::new();
    let disk = bench.pull(&vetu(&pieces())).unwrap();
    assert!(read(&disk.path) == pieces().concat());
    assert_eq!(disk.image_format, Some(Format::Vetu));
    let boot = disk.boot.unwrap();
    assert!(read(&boot.kernel) == noise(3, 50_000) && read(&boot.initrd.unwrap()) == noise(4, 90_000));
    assert_eq!(boot.cmdline.as_deref(), Some("root=/dev/vda1"));
}

#[test]
fn a_sardinecake_image_is_put_together_from_its_chunks() {
    for chunk in [10_000, 100_000, usize::MAX] {
        let bench = Bench::new();
        let disk = bench.pull(&sardinecake(&raw_disk(), chunk)).unwrap();
        assert!(read(&disk.path) == raw_disk(), "{chunk}");
        assert_eq!(disk.image_format, Some(Format::Sardinecake));
        let hints = &disk.hints;
        assert_eq!(
            (hints.memory, hints.cpus, hints.user.as_deref()),
            (Some(512 << 20), Some(8), Some("vagrant"))
        );
        assert_eq!(
            (hints.disk_bus, hints.nic),
            (Some(DiskBus::Sata), Some(Nic::E1000e))
        );
        assert_eq!(hints.firmware, Some(Firmware::Uefi));
    }
}

#[test]
fn a_sardinecake_image_that_is_written_again_wishes_for_the_same_machine() {
    let bench = Bench::new();
    let disk = bench.pull(&sardinecake(&raw_disk(), 100_000)).unwrap();
    let draft = Draft::of_disk(&disk, "x86_64").unwrap();
    let again = bench.layout.reference("again");
    let (credentials, registries) = (Credentials::none(), Registries::without_tls([""]));
    let to = Addressee {
        reference: &again.parse().unwrap(),
        credentials: &credentials,
        registries: &registries,
    };
    runtime()
        .block_on(cannery::image::write(
            &draft,
            WriteFormat::Sardinecake,
            to,
            &Silent,
        ))
        .unwrap();
    let copy = bench.provide(&again).unwrap();
    assert_eq!(copy.hints, disk.hints);
    assert_eq!(copy.hints.disk_bus, Some(DiskBus::Sata));
}

#[test]
fn of_a_podman_index_the_disk_for_qemu_is_taken() {
    let bench = Bench::new();
    let entry = |disk: &[u8], architecture: &str, kind: Option<&str>| {
        let mut image = Image::plain(zstd(disk), "application/zstd");
        image.annotations = vec![(
            0,
            "org.opencontainers.image.title".to_owned(),
            "podman-machine.x86_64.qemu.qcow2.zst".to_owned(),
        )];
        let mut descriptor = bench.layout.manifest(&image);
        descriptor["platform"] = json!({"os": "linux", "architecture": architecture});
        if let Some(kind) = kind {
            descriptor["annotations"] = json!({"disktype": kind});
        }
        descriptor
    };
    let entries = vec![
        entry(b"a container", "amd64", None),
        entry(b"another hypervisor's", "x86_64", Some("hyperv")),
        entry(&qcow2_disk(), "x86_64", Some("qemu")),
    ];
    bench.layout.add_entries("machine", entries);
    let disk = bench.provide(&bench.layout.reference("machine")).unwrap();
    assert!(read(&disk.path) == qcow2_disk());
    assert_eq!(
        (disk.format, disk.image_format),
        (DiskFormat::Qcow2, Some(Format::PodmanMachine))
    );
}

#[test]
fn a_plain_disk_may_be_packed_or_split() {
    let title = "org.opencontainers.image.title";
    let split = |disk: &[u8]| {
        let third = disk.len() / 3;
        let piece = |range: std::ops::Range<usize>| disk[range].to_vec();
        // In another order than their titles have.
        Image {
            artifact: Some("application/vnd.oci.empty.v1+json".to_owned()),
            ..Image::default()
        }
        .layer(
            piece(2 * third..disk.len()),
            "application/octet-stream",
            &[(title, "chunk-ac")],
        )
        .layer(
            piece(0..third),
            "application/octet-stream",
            &[(title, "chunk-aa")],
        )
        .layer(
            piece(third..2 * third),
            "application/octet-stream",
            &[(title, "chunk-ab")],
        )
    };
    for image in [
        Image::plain(xz(&raw_disk()), "application/x-xz"),
        Image::plain(gzip(&raw_disk()), "application/octet-stream"),
        split(&raw_disk()),
        split(&xz(&raw_disk())),
    ] {
        let bench = Bench::new();
        let disk = bench.pull(&image).unwrap();
        assert!(read(&disk.path) == raw_disk());
        assert_eq!(disk.image_format, Some(Format::Plain));
    }
}

#[test]
fn pieces_that_are_not_what_they_say_are_refused() {
    let with = |mut image: Image, layer: usize, name: &str, value: &str| {
        let wrong = |(number, key, _): &&mut (usize, String, String)| *number == layer && key == name;
        image.annotations.iter_mut().find(wrong).unwrap().2 = value.to_owned();
        image
    };
    let size = "org.cirruslabs.tart.uncompressed-size";
    let content = "org.cirruslabs.tart.uncompressed-content-digest";
    let mut broken = tart(&pieces());
    broken.layers[1].0[4..12].fill(0xff);
    let mut cut = sardinecake(&raw_disk(), 100_000);
    cut.layers.pop();
    let mut other = sardinecake(&raw_disk(), 100_000);
    other.diff_ids[2] = sha256(b"other");
    for (image, part) in [
        (with(tart(&pieces()), 1, size, "2097153"), "ends too early"),
        (with(tart(&pieces()), 1, size, "2097151"), "another length"),
        (with(tart(&pieces()), 2, size, "99999999999"), "too large"),
        (
            with(tart(&pieces()), 1, content, &sha256(b"other")),
            "another digest",
        ),
        (broken, "larger than 4 MiB"),
        (cut, "unpacked"),
        (other, "its config says"),
    ] {
        let error = Bench::new().refused(&image);
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn a_file_of_the_host_is_an_image() {
    let bench = Bench::new();
    let path = bench.dir.path().join("debian.img.xz");
    let packed = xz(&raw_disk());
    std::fs::write(&path, &packed).unwrap();
    let name = format!("file://{}", path.display());
    let disk = bench.provide(&name).unwrap();
    assert!(read(&disk.path) == raw_disk());
    assert_eq!(
        (disk.digest.to_string(), disk.from_cache),
        (sha256(&packed), false)
    );
    assert!(bench.provide(&name).unwrap().from_cache);
    let sight = bench.look(&name).unwrap();
    assert_eq!(
        (sight.digest.to_string(), sight.size),
        (sha256(&packed), packed.len() as u64)
    );
    assert!(sight.manifest.starts_with(b"{"));
    // Other bytes are another image, and not what a digest asked for.
    std::fs::write(&path, qcow2_disk()).unwrap();
    let other = bench.provide(&name).unwrap();
    assert_eq!(
        (other.digest.to_string(), other.format),
        (sha256(&qcow2_disk()), DiskFormat::Qcow2)
    );
    let pinned = |bytes: &[u8]| format!("{name}#{}", sha256(bytes).replace(':', "="));
    assert!(bench.provide(&pinned(&packed)).unwrap().from_cache);
    assert!(matches!(
        bench.provide(&pinned(b"other")),
        Err(Error::NotAsPinned { .. })
    ));
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(bench.provide(&name), Err(Error::NotFound { .. })));
    assert!(
        bench
            .provide(&format!("file://{}", bench.dir.path().display()))
            .is_err()
    );
}

#[test]
fn a_file_with_a_sha512_is_read_again_only_when_that_has_changed() {
    let list = |disk: &[u8]| {
        let sum = hex::encode(openssl::sha::sha512(disk));
        format!("{sum}  disk.raw\n").into_bytes()
    };
    let (first, second) = (raw_disk(), noise(8, 1 << 20));
    let web = Web::new(vec![("/disk.raw", first.clone()), ("/SHA512SUMS", list(&first))]);
    let bench = Bench::new();
    let provide = || bench.provide_from(&format!("http://{}/disk.raw", web.host), &web.host);
    let lists = ["HEAD /disk.raw", "GET /SHA256SUMS", "GET /SHA512SUMS"];
    let (learn, fetch) = ("GET /disk.raw", "GET /disk.raw");
    assert!(read(&provide().unwrap().path) == first);
    assert_eq!(web.asked(), [&lists[..], &[learn, fetch]].concat());
    assert!(provide().unwrap().from_cache);
    assert_eq!(web.asked(), lists);
    // The list counts, as it does with SHA-256.
    *web.files.lock().unwrap() = vec![("/disk.raw", second.clone()), ("/SHA512SUMS", list(&second))];
    assert!(read(&provide().unwrap().path) == second);
    assert_eq!(web.asked(), [&lists[..], &[learn, fetch]].concat());
    assert!(provide().unwrap().from_cache);
    assert_eq!(web.asked(), lists);
    // Nothing is learned from bytes that are not those of the list.
    *web.files.lock().unwrap() = vec![("/disk.raw", first.clone()), ("/SHA512SUMS", list(b"other"))];
    for _ in 0..2 {
        assert!(matches!(provide(), Err(Error::NotAsListed { .. })));
        assert_eq!(web.asked(), [&lists[..], &[learn]].concat());
    }
    // What it was before is known by its digest, and no longer what this name leads to.
    *web.files.lock().unwrap() = vec![("/disk.raw", first.clone()), ("/SHA512SUMS", list(&first))];
    assert!(provide().unwrap().from_cache);
    assert_eq!(web.asked(), [&lists[..], &[learn]].concat());
}

#[test]
fn a_file_on_a_web_server_is_an_image_where_its_sum_is_known() {
    let (raw, packed) = (raw_disk(), gzip(&raw_disk()));
    let long = hex::encode(openssl::sha::sha512(&packed));
    let sum = |bytes: &[u8]| sha256(bytes).trim_start_matches("sha256:").to_owned();
    let web = Web::new(vec![
        ("/new/disk.raw", raw.clone()),
        (
            "/new/SHA256SUMS",
            format!("{}  disk.raw\n{}  lost.raw\n", sum(&raw), sum(&raw)).into_bytes(),
        ),
        ("/old/disk.img.gz", packed.clone()),
        ("/old/SHA512SUMS", format!("{long} *disk.img.gz\n").into_bytes()),
        ("/bad/disk.raw", qcow2_disk()),
        (
            "/bad/SHA256SUMS",
            format!("{}  disk.raw\n", sum(b"other")).into_bytes(),
        ),
        ("/bad/other.raw", raw.clone()),
        ("/worse/disk.raw", qcow2_disk()),
        ("/worse/SHA512SUMS", format!("{long}  disk.raw\n").into_bytes()),
        ("/none/disk.raw", raw.clone()),
    ]);
    let bench = Bench::new();
    let provide = |path: &str| bench.provide_from(&format!("http://{}{path}", web.host), &web.host);
    let disk = provide("/new/disk.raw").unwrap();
    assert!(read(&disk.path) == raw);
    assert_eq!(disk.digest.to_string(), sha256(&raw));
    // Asked again, the list alone says that nothing has changed.
    web.asked();
    assert!(provide("/new/disk.raw").unwrap().from_cache);
    assert_eq!(web.asked(), ["HEAD /new/disk.raw", "GET /new/SHA256SUMS"]);
    let disk = provide("/old/disk.img.gz").unwrap();
    assert!(read(&disk.path) == raw);
    assert_eq!(disk.digest.to_string(), sha256(&packed));
    let pinned = format!("/none/disk.raw#sha256={}", sum(&raw));
    assert!(provide(&pinned).unwrap().from_cache);
    let mistyped = format!("/new/disk.raw#sha256={}", sum(b"another"));
    let found = sha256(&qcow2_disk());
    let stale = |list: &str, says: &str, has: &str| {
        format!(
            "does not fit http://{}{list}, which says {says}: it has the {has}",
            web.host
        )
    };
    let no_line = format!("no line of http://{}/bad/SHA256SUMS is for it", web.host);
    let found_long = hex::encode(openssl::sha::sha512(&qcow2_disk()));
    for (path, part) in [
        (
            "/bad/disk.raw",
            stale("/bad/SHA256SUMS", &sha256(b"other"), &format!("digest {found}")),
        ),
        (
            &mistyped,
            format!(
                "another file than the digest behind its name says: it has the digest {}",
                sha256(&raw)
            ),
        ),
        (
            "/worse/disk.raw",
            stale("/worse/SHA512SUMS", &long, &format!("SHA-512 {found_long}")),
        ),
        ("/bad/other.raw", no_line),
        (
            "/none/disk.raw",
            "there is neither SHA256SUMS nor SHA512SUMS beside it".to_owned(),
        ),
        ("/new/lost.raw", "does not exist".to_owned()),
    ] {
        let error = provide(path).unwrap_err().to_string();
        assert!(error.contains(&part) && !error.contains('\n'), "{path}: {error}");
        let told = cannery::outcome::Failure::from(provide(path).unwrap_err()).to_string();
        assert!(!told.contains("registry") && !told.contains("layer"), "{told}");
    }
    let unlisted = bench
        .provide(&format!("http://{}/new/disk.raw", web.host))
        .unwrap_err();
    assert!(unlisted.to_string().contains("images.plain_http"), "{unlisted}");
}
