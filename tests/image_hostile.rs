//! Images that attack: one or more for each class, each refused in one sentence, at little cost, without a trace.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a test that cannot go on panics, and a child tells its parent what it saw"
)]

#[path = "support/image_fixture.rs"]
#[allow(dead_code, reason = "each suite uses its part of the fixture")]
mod image_fixture;
mod support;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use cannery::image::{
    Asker, Credentials, Limits, PullPolicy, Registries, Request, Requirements, Silent, Store,
};
use image_fixture::{Image, Layout, OCI_TAR, OCI_TAR_GZIP, Tar, gzip, qcow2_disk, raw_disk, sha256, zstd};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use support::table;
use tar::EntryType;

/// The most that an attack may cost beyond an image that does not exist, in KiB of memory.
const MEMORY_MAX: u64 = 64 * 1024;

/// The most that it may cost, in milliseconds of the processor: on a busy machine the clock tells of others, too.
const PROCESSOR_MAX: u64 = 1000;

const IMAGE: &str = "CANNERY_TEST_HOSTILE_IMAGE";
const STORE: &str = "CANNERY_TEST_HOSTILE_STORE";

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

/// What a child says of one attack.
struct Seen {
    said: String,
    peak: u64,
    processor: u64,
    wall: u64,
}

/// A number behind a word in a file of /proc, in its unit.
fn proc_field(file: &str, word: &str) -> u64 {
    let text = std::fs::read_to_string(file).unwrap();
    let line = text.lines().find(|line| line.starts_with(word)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Milliseconds of the processor that this process has had.
fn processor() -> u64 {
    let text = std::fs::read_to_string("/proc/self/schedstat").unwrap();
    let threads: u64 = std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("schedstat")).ok())
        .filter_map(|text| text.split(' ').next()?.parse::<u64>().ok())
        .sum();
    threads.max(text.split(' ').next().unwrap().parse().unwrap()) / 1_000_000
}

/// The child: pulls one image, and says what it cost. Without being told which it does nothing.
#[test]
#[allow(
    clippy::disallowed_methods,
    reason = "a child of the tests is told by the environment what to do"
)]
fn one_attack() {
    let (Ok(image), Ok(store)) = (std::env::var(IMAGE), std::env::var(STORE)) else {
        return;
    };
    let store = Store::open(Path::new(&store)).unwrap();
    let request = Request {
        reference: image.parse().unwrap(),
        architecture: "x86_64".to_owned(),
        policies: vec![PullPolicy::Always],
        credentials: Credentials::none(),
        registries: Registries::default(),
        requirements: Requirements::default(),
        asker: Asker::Operator,
        limits: Limits {
            max_disk: 64 << 20,
            keep_free: 0,
        },
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (begin, before) = (Instant::now(), processor());
    let result = runtime.block_on(store.provide(&request, &Silent));
    let said = match result {
        Ok(_) => "ACCEPTED".to_owned(),
        Err(error) => error.to_string(),
    };
    println!("\nSAID {}", said.replace(&image, "vm"));
    println!("PEAK {}", proc_field("/proc/self/status", "VmHWM"));
    println!("PROCESSOR {}", processor() - before);
    println!("WALL {}", begin.elapsed().as_millis());
}

fn attack(reference: &str, store: &Path) -> Seen {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "one_attack", "--nocapture", "--test-threads=1"])
        .env(IMAGE, reference)
        .env(STORE, store)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let field = |word: &str| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(word)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{reference}: {text}{}", String::from_utf8_lossy(&output.stderr)))
            .to_owned()
    };
    Seen {
        said: field("SAID"),
        peak: field("PEAK").parse().unwrap(),
        processor: field("PROCESSOR").parse().unwrap(),
        wall: field("WALL").parse().unwrap(),
    }
}

/// Every path below a folder.
fn everything(dir: &Path) -> BTreeSet<PathBuf> {
    let mut all = BTreeSet::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.is_symlink() {
            all.extend(everything(&path));
        }
        all.insert(path);
    }
    all
}

fn qcow2(at: usize, bytes: &[u8]) -> Image {
    let mut disk = qcow2_disk();
    disk[at..at + bytes.len()].copy_from_slice(bytes);
    Image::plain(disk, "application/x-qemu-disk")
}

fn extension(kind: u32, name: &[u8]) -> Vec<u8> {
    let size = u32::try_from(name.len()).unwrap();
    [&kind.to_be_bytes()[..], &size.to_be_bytes(), name].concat()
}

fn archive(tar: Tar) -> Image {
    Image::container_disk(&tar.bytes(), OCI_TAR)
}

/// An entry whose extended header says something.
fn pax(records: &[u8], name: &str, bytes: &[u8]) -> Image {
    archive(
        Tar::new()
            .entry("pax", EntryType::XHeader, records)
            .file(name, bytes),
    )
}

fn raw(beginning: &[u8]) -> Image {
    let mut disk = beginning.to_vec();
    disk.resize(4096, 0);
    Image::plain(disk, "application/octet-stream")
}

/// A chunk of the disk as an index names it: where it lies in the disk, its length, where its frame lies in the pack, that one's
/// length, and its digest.
type Chunk = (u64, u64, u64, u64, [u8; 32]);

/// The manifest of an image in cannery's own format with one pack, as `docs/image-format.md` has it.
fn native(layout: &Layout, disk: u64, pack: &[u8], chunks: &[Chunk]) -> Value {
    fn number(out: &mut Vec<u8>, mut number: u64) {
        while number >= 0x80 {
            out.push((number & 0x7f) as u8 | 0x80);
            number >>= 7;
        }
        out.push((number & 0x7f) as u8);
    }
    let pack_layer = layout.blob(pack, "application/vnd.cannery.image.pack.v1+zstd");
    let mut segment = b"CANINDX1".to_vec();
    for field in [0, disk, 1, chunks.len() as u64] {
        number(&mut segment, field);
    }
    segment.extend(Sha256::digest(pack));
    let mut end = 0;
    for (at, length, ..) in chunks {
        number(&mut segment, at - end);
        end = at + length;
    }
    chunks.iter().for_each(|chunk| number(&mut segment, chunk.1));
    chunks.iter().for_each(|_| number(&mut segment, 0));
    let mut end = 0;
    for (_, _, begin, length, _) in chunks {
        let distance = if *begin >= end {
            2 * (begin - end)
        } else {
            2 * (end - begin) - 1
        };
        number(&mut segment, distance);
        end = begin + length;
    }
    chunks.iter().for_each(|chunk| number(&mut segment, chunk.3));
    chunks.iter().for_each(|chunk| segment.extend(chunk.4));
    let mut content = Sha256::new();
    content.update(b"file");
    content.update(0_u64.to_le_bytes());
    content.update(disk.to_le_bytes());
    for (at, length, _, _, digest) in chunks {
        content.update(b"data");
        content.update(at.to_le_bytes());
        content.update(length.to_le_bytes());
        content.update(digest);
    }
    let index = layout.blob(&zstd(&segment), "application/vnd.cannery.image.index.v1+zstd");
    json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": layout.blob(br#"{"os":"linux","architecture":"amd64"}"#, CONFIG),
        "layers": [pack_layer, index],
        "annotations": {"io.cannery.content": format!("sha256:{}", hex::encode(content.finalize()))},
    })
}

/// As many chunks of one frame as fit into a disk of so many bytes.
fn repeated(chunk: &[u8], frame: &[u8], disk: u64) -> Vec<Chunk> {
    let (length, digest) = (chunk.len() as u64, Sha256::digest(chunk).into());
    let places = (0..disk / length).map(|number| number * length);
    places
        .map(|at| (at, length, 0, frame.len() as u64, digest))
        .collect()
}

/// Images of pieces whose layers have the digests that they should have, and whose pieces are not what is said of them: puts each under a
/// tag.
fn pieces(layout: &Layout) -> Vec<&'static str> {
    let image = |layers: Vec<Value>| json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": layout.blob(br#"{"os":"linux","architecture":"amd64"}"#, CONFIG), "layers": layers});
    let put = |tag: &str, image: &Value| {
        let descriptor = layout.blob(&serde_json::to_vec(image).unwrap(), MANIFEST);
        layout.tag(tag, descriptor)
    };
    let block = vec![7; 4096];
    let tart = |tag: &str, stream: &[u8], digest: &str| {
        let config = layout.blob(
            br#"{"version":1,"os":"linux","arch":"amd64"}"#,
            "application/vnd.cirruslabs.tart.config.v1",
        );
        let mut disk = layout.blob(stream, "application/vnd.cirruslabs.tart.disk.v2");
        disk["annotations"] = json!({
            "org.cirruslabs.tart.uncompressed-size": "4096",
            "org.cirruslabs.tart.uncompressed-content-digest": digest,
        });
        put(tag, &image(vec![config, disk]));
    };
    let plain = |length: u32, bytes: &[u8]| [b"bv4-", &length.to_le_bytes()[..], bytes].concat();
    let honest = [&plain(4096, &block)[..], b"bv4$"].concat();
    let zeros = vec![0; 4 << 20];
    let packed = lz4_flex::block::compress(&zeros);
    let lengths = [zeros.len(), packed.len()].map(|length| u32::try_from(length).unwrap().to_le_bytes());
    let bomb = [b"bv41", &lengths[0][..], &lengths[1], &packed].concat();
    tart(
        "tart-bomb",
        &[bomb.repeat(150), b"bv4$".to_vec()].concat(),
        &sha256(&block),
    );
    tart("tart-block-of-4-GiB", &plain(u32::MAX, &block), &sha256(&block));
    tart("tart-without-an-end", &plain(4096, &block), &sha256(&block));
    tart("tart-digest", &honest, &sha256(b"other"));

    let vetu = |tag: &str, stream: &[u8], digest: &str| {
        let config = layout.blob(
            br#"{"version":1,"arch":"amd64","disks":[{"name":"disk"}]}"#,
            "application/vnd.cirruslabs.vetu.config.v1",
        );
        let kernel = layout.blob(b"kernel", "application/vnd.cirruslabs.vetu.kernel.v1");
        let mut disk = layout.blob(stream, "application/vnd.cirruslabs.vetu.disk.v1");
        disk["annotations"] = json!({
            "org.cirruslabs.vetu.name": "disk",
            "org.cirruslabs.vetu.uncompressed-size": "4096",
            "org.cirruslabs.vetu.uncompressed-digest": digest,
        });
        put(tag, &image(vec![config, kernel, disk]));
    };
    let frame = |bytes: &[u8]| {
        let mut encoder = lz4_flex::frame::FrameEncoder::new(Vec::new());
        std::io::Write::write_all(&mut encoder, bytes).unwrap();
        encoder.finish().unwrap()
    };
    vetu("vetu-bomb", &frame(&vec![0; 600 << 20]), &sha256(&block));
    let mut large = frame(&block);
    large[7..11].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
    vetu("vetu-block-of-2-GiB", &large, &sha256(&block));
    vetu(
        "vetu-frame-to-be-skipped",
        &[0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4],
        &sha256(&block),
    );
    vetu("vetu-digest", &frame(&block), &sha256(b"other"));

    let packed = zstd(&block);
    let mut chunks = repeated(&block, &packed, 64 << 20);
    chunks.iter_mut().for_each(|chunk| chunk.4 = [9; 32]);
    put("native-digest", &native(layout, 64 << 20, &packed, &chunks));
    for (tag, length) in [("native-chunk-too-short", 5000), ("native-chunk-too-long", 4000)] {
        let chunk = (0, length, 0, packed.len() as u64, Sha256::digest(&block).into());
        put(tag, &native(layout, 1 << 20, &packed, &[chunk]));
    }
    vec![
        "tart-bomb",
        "tart-block-of-4-GiB",
        "tart-without-an-end",
        "tart-digest",
        "vetu-bomb",
        "vetu-block-of-2-GiB",
        "vetu-frame-to-be-skipped",
        "vetu-digest",
        "native-digest",
        "native-chunk-too-short",
        "native-chunk-too-long",
    ]
}

/// Attacks that are images, and a part of what is said of each.
fn images() -> Vec<(&'static str, Image, &'static str)> {
    let zeros = vec![0; 600 << 20];
    let bomb = Tar::new()
        .file("other", &zeros)
        .file("disk/disk.img", &raw_disk())
        .bytes();
    let behind = [
        Tar::new().file("disk/disk.img", &raw_disk()).bytes(),
        zeros.clone(),
    ]
    .concat();
    let doubled = |digest: String| Image {
        diff_ids: vec![digest],
        ..Image::container_disk(
            &Tar::new().file("disk/disk.img", &raw_disk()).bytes(),
            OCI_TAR_GZIP,
        )
    };
    vec![
        (
            "backing file",
            qcow2(8, &[0, 0, 0, 0, 0, 0, 0, 112, 0, 0, 0, 11]),
            "a backing file",
        ),
        (
            "backing file, its size alone",
            qcow2(16, &[0, 0, 0, 11]),
            "a backing file",
        ),
        (
            "backing file, its format alone",
            qcow2(104, &extension(0xe279_2aca, b"raw\0\0\0\0\0")),
            "a backing file",
        ),
        ("data file by its bit", qcow2(79, &[4]), "an external data file"),
        (
            "data file by its name",
            qcow2(104, &extension(0x4441_5441, b"/etc/pwd")),
            "an external data file",
        ),
        (
            "data file by its raw bit",
            qcow2(95, &[2]),
            "an external data file",
        ),
        ("encryption", qcow2(35, &[2]), "encrypted"),
        (
            "encryption by its extension",
            qcow2(104, &extension(0x0537_be77, &[0; 16])),
            "encrypted",
        ),
        (
            "unknown feature",
            qcow2(72, &[0x80]),
            "unknown incompatible features",
        ),
        ("corrupt", qcow2(79, &[2]), "marked as corrupt"),
        (
            "bitmaps",
            qcow2(104, &extension(0x2385_2875, &[0; 24])),
            "dirty bitmaps",
        ),
        ("compression type", qcow2(79, &[8]), "compression type"),
        ("cluster size", qcow2(20, &[0xff; 4]), "cluster size"),
        ("header length", qcow2(100, &[0xff; 4]), "header length"),
        ("reference counts", qcow2(96, &[0, 0, 0, 60]), "reference counts"),
        (
            "virtual size",
            qcow2(24, &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe, 0]),
            "too large",
        ),
        (
            "first-level table outside",
            qcow2(40, &[0, 0, 0, 1, 0, 0, 0, 0]),
            "outside of the file",
        ),
        (
            "first-level table of 4 billion",
            qcow2(36, &[0xff; 4]),
            "first-level table",
        ),
        (
            "reference counts of 4 billion",
            qcow2(56, &[0xff; 4]),
            "reference count table",
        ),
        (
            "snapshots of 4 billion",
            qcow2(60, &[0xff; 4]),
            "number of snapshots",
        ),
        (
            "tables that overlap",
            qcow2(40, &[0, 0, 0, 0, 0, 0, 2, 0]),
            "overlap",
        ),
        (
            "second-level table outside",
            qcow2(1536, &[0x80, 0, 0, 1, 0, 0, 0, 0]),
            "outside of the file",
        ),
        ("qcow 1", qcow2(7, &[1]), "qcow (version 1)"),
        ("vmdk", raw(b"KDMV"), "vmdk"),
        (
            "vmdk as text",
            raw(b"# Disk DescriptorFile\nversion=1\nRW 2048 FLAT \"/etc/passwd\" 0\n"),
            "vmdk",
        ),
        ("vhdx", raw(b"vhdxfile"), "vhdx"),
        ("vhd", raw(b"conectix"), "vhd"),
        ("qed", raw(b"QED\0"), "qed"),
        ("luks", raw(b"LUKS\xba\xbe"), "encrypted"),
        ("parallels", raw(b"WithoutFreeSpace"), "parallels"),
        (
            "json:",
            raw(b"json:{\"driver\":\"file\"}"),
            "QEMU file description",
        ),
        (
            "climbing name",
            archive(Tar::new().file("disk/../../x", b"x")),
            "`..`",
        ),
        (
            "absolute name",
            archive(Tar::new().file("/etc/passwd", b"x")),
            "absolute name",
        ),
        (
            "link",
            archive(Tar::new().entry("disk/disk.img", EntryType::Symlink, b"")),
            "is a link",
        ),
        (
            "hard link",
            archive(Tar::new().entry("disk/disk.img", EntryType::Link, b"")),
            "is a link",
        ),
        (
            "link as the folder",
            archive(Tar::new().entry("disk", EntryType::Symlink, b"")),
            "is a link",
        ),
        (
            "device",
            archive(Tar::new().entry("disk/disk.img", EntryType::Block, b"")),
            "special file",
        ),
        (
            "pipe",
            archive(Tar::new().entry("disk/disk.img", EntryType::Fifo, b"")),
            "special file",
        ),
        (
            "pax: another size",
            pax(b"14 size=99999\n", "disk/disk.img", b"x"),
            "two sizes",
        ),
        (
            "pax: a climbing path",
            pax(b"16 path=../../x\n", "disk/disk.img", b"x"),
            "`..`",
        ),
        (
            "pax: GNU sparse",
            pax(b"22 GNU.sparse.major=1\n", "disk/disk.img", b"x"),
            "sparse",
        ),
        (
            "pax: huge",
            archive(Tar::new().entry("pax", EntryType::XHeader, &vec![b'1'; 2 << 20])),
            "too large",
        ),
        (
            "two disks",
            archive(Tar::new().file("disk/a", &raw_disk()).file("disk/b", &raw_disk())),
            "more than one",
        ),
        (
            "gzip bomb beside the disk",
            Image::container_disk(&bomb, OCI_TAR_GZIP),
            "a bomb",
        ),
        (
            "zstd bomb beside the disk",
            Image {
                layers: vec![(zstd(&bomb), OCI_TAR_GZIP.to_owned())],
                ..Image::default()
            },
            "a bomb",
        ),
        (
            "gzip bomb behind the archive",
            Image::container_disk(&behind, OCI_TAR_GZIP),
            "a bomb",
        ),
        (
            "gzip bomb as the disk",
            Image::plain(gzip(&zeros), "application/gzip"),
            "too large",
        ),
        (
            "zstd bomb as the disk",
            Image::plain(zstd(&zeros), "application/zstd"),
            "too large",
        ),
        (
            "gzip in gzip",
            Image::plain(gzip(&gzip(&zeros)), "application/gzip"),
            "gzip",
        ),
        (
            "zstd with a huge window",
            Image::plain(vec![0x28, 0xb5, 0x2f, 0xfd, 0, 0xf8, 0, 0], "application/zstd"),
            "window",
        ),
        (
            "config that lies of its layers",
            doubled(sha256(b"other")),
            "its config says",
        ),
    ]
}

/// Attacks that are documents: puts each under a tag, and gives a part of what is said of it.
fn documents(layout: &Layout) -> Vec<(&'static str, &'static str)> {
    let disk = || layout.blob(&raw_disk(), "application/octet-stream");
    let config = || layout.blob(br#"{"os":"linux","architecture":"amd64"}"#, CONFIG);
    let put = |tag: &str, bytes: &[u8], kind: &str| {
        let descriptor = layout.blob(bytes, kind);
        layout.tag(tag, descriptor)
    };
    let text = |value: &Value| serde_json::to_vec(value).unwrap();
    let image = |layers: Vec<Value>| json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config(), "layers": layers});
    let index =
        |manifests: Vec<Value>| json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests});
    let lying = |field: &str, value: Value| {
        let mut layer = disk();
        layer[field] = value;
        text(&image(vec![layer]))
    };

    put(
        "both",
        &text(&json!({"schemaVersion": 2, "config": config(), "layers": [disk()], "manifests": []})),
        MANIFEST,
    );
    put("layers", &text(&image(vec![disk(); 20_000])), MANIFEST);
    put(
        "layers2",
        &text(&image(vec![
            json!({"mediaType": "t", "digest": sha256(b""), "size": 0});
            33_000
        ])),
        MANIFEST,
    );
    put(
        "deep",
        &[vec![b'['; 2 << 20], vec![b']'; 2 << 20]].concat(),
        MANIFEST,
    );
    let deep = format!(
        r#"{{"layers":[],"config":{}1{}}}"#,
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    put("deep2", deep.as_bytes(), MANIFEST);
    let twice = format!(
        r#"{{"schemaVersion":2,"config":{0},"config":{0},"layers":[{1}]}}"#,
        config(),
        disk()
    );
    put("twice", twice.as_bytes(), MANIFEST);
    put("large", &vec![b' '; 5 << 20], MANIFEST);
    put("short", &lying("size", json!(1000)), MANIFEST);
    put("long", &lying("size", json!(1_u64 << 50)), MANIFEST);
    put("negative", &lying("size", json!(-1)), MANIFEST);
    put("algorithm", &lying("digest", json!("md5:00")), MANIFEST);
    put(
        "path",
        &lying("digest", json!("sha256:../../../../etc/passwd")),
        MANIFEST,
    );
    // Other bytes under the digest's name.
    let mut other = layout.blob(b"what is promised", "application/octet-stream");
    other["size"] = json!(4096);
    std::fs::write(layout.path(other["digest"].as_str().unwrap()), vec![0; 4096]).unwrap();
    put("other", &text(&image(vec![other])), MANIFEST);
    let inner = layout.blob(&text(&index(vec![disk()])), INDEX);
    put("nested", &text(&index(vec![inner])), INDEX);
    // An index cannot hold its own digest; what it can is one that is not there, or that is something else.
    put(
        "loop",
        &text(&index(vec![
            json!({"mediaType": INDEX, "digest": sha256(b"itself"), "size": 100}),
        ])),
        INDEX,
    );
    put(
        "entries",
        &text(&index(vec![
            json!({"mediaType": "t", "digest": sha256(b""), "size": 0, "platform": {"os": "plan9", "architecture": "mips"}});
            20_000
        ])),
        INDEX,
    );
    let lie = layout.blob(&[b' '; 100], MANIFEST);
    put(
        "size",
        &text(&index(vec![
            json!({"mediaType": MANIFEST, "digest": lie["digest"], "size": 99}),
        ])),
        INDEX,
    );
    let strange = |bytes: &[u8]| {
        let strange = layout.blob(bytes, CONFIG);
        text(&json!({"schemaVersion": 2, "config": strange, "layers": [disk()]}))
    };
    put("config", &strange(b"[]"), MANIFEST);
    put(
        "platform",
        &strange(br#"{"os":"linux","architecture":"s390x"}"#),
        MANIFEST,
    );
    put("label", &strange(br#"{"os":"linux","architecture":"amd64","config":{"Labels":{"io.cannery.user":"-oProxyCommand=x"}}}"#), MANIFEST);
    put(
        "tart",
        &text(&image(vec![
            json!({"mediaType": "application/vnd.cirruslabs.tart.disk.v2", "digest": sha256(b""), "size": 0}),
        ])),
        MANIFEST,
    );
    let vetu = layout.blob(
        br#"{"version":1,"arch":"amd64","disks":[{"name":"../../x"}]}"#,
        "application/vnd.cirruslabs.vetu.config.v1",
    );
    put("vetu", &text(&image(vec![vetu])), MANIFEST);
    let domain = layout.blob(
        b"<!DOCTYPE d [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><domain>&a;</domain>",
        "application/vnd.libvirt.domain.config+xml",
    );
    let packed = layout.blob(&gzip(&qcow2_disk()), "application/x-qemu-disk+gzip");
    put("domain", &text(&image(vec![domain, packed])), MANIFEST);
    let frame = zstd(b"x");
    let chunks = repeated(b"x", &frame, 100_000);
    put(
        "chunks",
        &text(&native(layout, 100_000, &frame, &chunks)),
        MANIFEST,
    );
    vec![
        ("chunks", "fewer than 4096 bytes on average"),
        ("both", "an image and an index at once"),
        ("layers", "more than"),
        ("layers2", "more than"),
        ("deep", "expected a JSON object"),
        ("deep2", "no valid manifest"),
        ("twice", "duplicate"),
        ("large", "too large"),
        ("short", "damaged"),
        ("long", "too large"),
        ("negative", "negative"),
        ("algorithm", "a digest is"),
        ("path", "a digest is"),
        ("other", "damaged"),
        ("nested", "index"),
        ("loop", "is missing"),
        ("entries", "not for"),
        ("size", "damaged"),
        ("config", "config"),
        ("platform", "not for"),
        ("label", "io.cannery.user"),
        ("tart", "exactly one config layer"),
        ("vetu", "exactly one kernel"),
        ("domain", "document type"),
    ]
}

/// Words of a programming language are none for people: `BlockTooBig`.
fn names_a_type(said: &str) -> bool {
    let inner = |pair: &[u8]| pair[0].is_ascii_lowercase() && pair[1].is_ascii_uppercase();
    let mut words = said.split(|c: char| !c.is_ascii_alphanumeric());
    words.any(|word| word.as_bytes().windows(2).filter(|pair| inner(pair)).count() > 1)
}

#[test]
fn no_attack_gets_further_than_one_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    let mut attacks: Vec<(String, String, &str)> = Vec::new();
    for (number, (name, image, part)) in images().into_iter().enumerate() {
        let tag = format!("image-{number}");
        layout.add(&tag, &image);
        attacks.push((name.to_owned(), tag, part));
    }
    for (tag, part) in documents(&layout) {
        attacks.push((format!("document: {tag}"), tag.to_owned(), part));
    }
    for tag in pieces(&layout) {
        attacks.push((tag.to_owned(), tag.to_owned(), "as it was pushed"));
    }
    let store = dir.path().join("store");
    drop(Store::open(&store).unwrap());
    // What an image costs that does not exist.
    let floor = attack(&layout.reference("nothing"), &store);
    let before = everything(dir.path());
    let (mut rows, mut wrong) = (Vec::new(), Vec::new());
    for (name, tag, part) in attacks {
        let seen = attack(&layout.reference(&tag), &store);
        let memory = seen.peak.saturating_sub(floor.peak);
        let one_sentence = !seen.said.contains('\n') && seen.said.len() < 400;
        let fits =
            seen.said != "ACCEPTED" && seen.said.contains(part) && one_sentence && !names_a_type(&seen.said);
        if !fits || memory > MEMORY_MAX || seen.processor > PROCESSOR_MAX {
            wrong.push(name.clone());
        }
        let mut said = seen.said;
        said.truncate(110);
        let mib = format!("{:.1}", f64::from(u32::try_from(memory).unwrap()) / 1024.0);
        rows.push(vec![
            name,
            said,
            mib,
            seen.processor.to_string(),
            seen.wall.to_string(),
        ]);
    }
    let header = ["attack", "what is said", "MiB", "processor ms", "wall ms"];
    table::show("Hostile images, each in a process of its own", &header, &rows);
    // Only documents that were read to be judged are left, which the store keeps by their digests, and an empty folder.
    let (blobs, origins) = (store.join("blobs"), store.join("origins"));
    let left: Vec<PathBuf> = everything(dir.path())
        .difference(&before)
        .filter(|path| !path.starts_with(&blobs) && *path != &origins)
        .cloned()
        .collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(wrong.is_empty(), "{wrong:?}");
}
