//! Images whose disk is several files that lie upon each other, as `sarde export` writes them: what becomes one disk, and what is
//! refused.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

#[path = "support/cake_fixture.rs"]
mod cake_fixture;
#[path = "support/image_fixture.rs"]
#[allow(dead_code, reason = "each suite uses its part of the fixture")]
mod image_fixture;
mod support;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use cake_fixture::{CLUSTER, Cluster, File, SIZE, cake, domain, qcow2, raw};
use image_fixture::{Image, Layout, noise, sha256};
use support::desk::Desk;

/// A desk with a layout folder.
struct Bench {
    desk: Desk,
    layout: Layout,
}

impl Bench {
    fn new() -> Self {
        let desk = Desk::new("keep_free = 0\nmax_disk = \"64M\"");
        let layout = Layout::new(&desk.at("layout"));
        Self { desk, layout }
    }

    /// The folder of the image in the store.
    fn pull(&self, image: &Image) -> PathBuf {
        self.layout.add("vm", image);
        self.again()
    }

    /// The disk of an image.
    fn pull_once(&self, image: &Image) -> Vec<u8> {
        fs::read(self.pull(image).join("disk.raw")).unwrap()
    }

    fn again(&self) -> PathBuf {
        let digest = self
            .desk
            .cannery(&["image", "pull", "--quiet", &self.desk.layout("vm")]);
        let hex = digest.trim_start_matches("sha256:");
        self.desk.at("state/store/disks").join(hex)
    }

    #[track_caller]
    fn refused(&self, image: &Image, part: &str) {
        self.layout.add("vm", image);
        let error = self
            .desk
            .refusal(&["image", "pull", "--quiet", &self.desk.layout("vm")]);
        assert!(error.contains(part), "{part}: {error}");
        for folder in ["disks", "partial"] {
            let left = fs::read_dir(self.desk.at("state/store").join(folder)).unwrap();
            assert_eq!(left.count(), 0, "{folder}: {error}");
        }
    }

    /// A pull that is killed.
    fn killed(&self, point: &str) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cannery"));
        command
            .arg("--config")
            .arg(self.desk.at("cannery.toml"))
            .args(["image", "pull", "--quiet", &self.desk.layout("vm")])
            .env("CANNERY_KILL_AT", point);
        let status = command.status().unwrap();
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(9),
            "{point}"
        );
    }

    fn files(&self, dir: &PathBuf) -> Vec<String> {
        let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// Three files, and what a guest sees of the topmost.
fn three() -> (Vec<File<'static>>, Vec<u8>) {
    use Cluster::{Filled, Zero};
    let base = raw();
    let mid = qcow2(
        &[(5, Filled(1)), (6, Filled(2)), (40, Filled(3))],
        "base.raw",
        "raw",
    );
    let top = qcow2(
        &[(0, Zero), (6, Filled(4)), (127, Filled(5))],
        "mid.qcow2",
        "qcow2",
    );
    let mut disk = base.clone();
    for (number, byte) in [(0, 0), (5, 1), (6, 4), (40, 3), (127, 5)] {
        disk[number * CLUSTER..(number + 1) * CLUSTER].fill(byte);
    }
    let files = vec![
        (Some("base.raw"), base),
        (Some("mid.qcow2"), mid),
        (Some("top.qcow2"), top),
    ];
    (files, disk)
}

#[test]
fn files_that_lie_upon_each_other_become_one_disk() {
    let (files, disk) = three();
    let mut turned = files.clone();
    turned.reverse();
    for (files, chunk) in [(&files, usize::MAX), (&files, 1000), (&turned, usize::MAX)] {
        let bench = Bench::new();
        let dir = bench.pull(&cake(&domain(&[("disk", "top.qcow2")]), files, chunk));
        assert!(fs::read(dir.join("disk.raw")).unwrap() == disk, "{chunk}");
        assert_eq!(bench.files(&dir), ["disk.raw", "image.json"]);
        let list = bench.desk.cannery(&["image", "verify"]);
        assert!(!list.contains("damaged"), "{list}");
    }
}

#[test]
fn names_are_compared_as_gzip_carries_them() {
    use Cluster::Filled;
    let overlay = |below: &str| qcow2(&[(5, Filled(1))], below, "raw");
    let mut disk = raw();
    disk[5 * CLUSTER..6 * CLUSTER].fill(1);
    for (named, below, top) in [
        (Some("b\u{e4}se"), "b\u{e4}se", Some("top")),
        (Some("base"), "base.gz", Some("top")),
        (None, "\u{57fa}.raw", None),
    ] {
        let files = [(named, raw()), (top, overlay(below))];
        let dir = Bench::new().pull_once(&cake(&domain(&[]), &files, usize::MAX));
        assert!(dir == disk, "{below}");
    }
    // sarde counts characters where a manifest has bytes.
    let bench = Bench::new();
    let machine = domain(&[("disk", "b\u{e4}se")]);
    let files = [(Some("b\u{e4}se"), raw())];
    let written = bench.layout.manifest(&cake(&machine, &files, usize::MAX));
    let path = bench.layout.path(written["digest"].as_str().unwrap());
    let mut manifest: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    manifest["layers"][0]["size"] = machine.chars().count().into();
    let bytes = serde_json::to_vec(&manifest).unwrap();
    let media_type = written["mediaType"].as_str().unwrap();
    bench.layout.tag("vm", bench.layout.blob(&bytes, media_type));
    assert!(fs::read(bench.again().join("disk.raw")).unwrap() == raw());
    // Nothing is said of the format of the file below.
    for (below, top) in [
        (raw(), qcow2(&[(5, Filled(1))], "base", "")),
        (qcow2(&[(5, Filled(1))], "", ""), qcow2(&[], "base", "")),
    ] {
        let files = [(Some("base"), below), (Some("top"), top)];
        let found = Bench::new().pull_once(&cake(&domain(&[]), &files, usize::MAX));
        assert!(found[5 * CLUSTER..6 * CLUSTER] == [1; CLUSTER]);
    }
}

#[test]
fn a_cd_in_the_machine_is_passed_over() {
    let (mut files, disk) = three();
    files.push((Some("cd.iso"), noise(9, 4096)));
    let machine = domain(&[("disk", "top.qcow2"), ("cdrom", "cd.iso")]);
    assert!(Bench::new().pull_once(&cake(&machine, &files, usize::MAX)) == disk);
    // Beside a disk that stands alone there is nothing to put together.
    let alone = [(Some("disk.raw"), raw()), (Some("cd.iso"), noise(9, 4096))];
    let machine = |disk, cd| domain(&[("disk", disk), ("cdrom", cd)]);
    let bench = Bench::new();
    let image = cake(&machine("disk.raw", "cd.iso"), &alone, usize::MAX);
    assert!(bench.pull_once(&image) == raw());
    // The same files in other drives are another disk.
    let image = cake(&machine("cd.iso", "disk.raw"), &alone, usize::MAX);
    assert!(bench.pull_once(&image) == noise(9, 4096));
    // The same files in the same drives are not fetched again.
    let larger = machine("cd.iso", "disk.raw").replace("320", "321");
    let image = cake(&larger, &alone, usize::MAX);
    bench.layout.add("vm", &image);
    for (bytes, _) in &image.layers[1..] {
        fs::write(bench.layout.path(&sha256(bytes)), b"gone").unwrap();
    }
    assert!(fs::read(bench.again().join("disk.raw")).unwrap() == noise(9, 4096));
}

#[test]
fn a_disk_that_would_be_taken_for_another_format_stays_a_qcow2() {
    use Cluster::Filled;
    let mut inner = raw();
    inner[..6].copy_from_slice(b"LUKS\xba\xbe");
    let mut base = qcow2(&[(0, Filled(0)), (1, Filled(8))], "", "");
    let data = CLUSTER * 6;
    base[data..data + 6].copy_from_slice(b"LUKS\xba\xbe");
    let files = [
        (Some("base"), base),
        (Some("top"), qcow2(&[(9, Filled(7))], "base", "qcow2")),
    ];
    let bench = Bench::new();
    let dir = bench.pull(&cake(&domain(&[]), &files, usize::MAX));
    assert_eq!(bench.files(&dir), ["disk.qcow2", "image.json"]);
    let back = bench.desk.path("back.raw");
    bench
        .desk
        .cannery(&["image", "convert", "--quiet", &bench.desk.layout("vm"), &back]);
    let back = fs::read(back).unwrap();
    assert!(back.starts_with(b"LUKS\xba\xbe") && back[9 * CLUSTER..10 * CLUSTER] == [7; CLUSTER]);
}

#[test]
fn what_is_not_one_disk_or_looks_outside_is_refused() {
    use Cluster::Filled;
    let on = |below: &str, format: &str| qcow2(&[(5, Filled(1))], below, format);
    let base = || (Some("base"), qcow2(&[], "", ""));
    let with = |number: usize, byte: u8, mut file: Vec<u8>| {
        file[number] = byte;
        file
    };
    let sentences = [
        (vec![base(), (Some("top"), on("/etc/shadow", "raw"))], "by a path"),
        (vec![base(), (Some("top"), on("../base", "raw"))], "by a path"),
        (
            vec![base(), (Some("top"), on("json:{\"file\":{}}", ""))],
            "only QEMU understands",
        ),
        (
            vec![base(), (Some("top"), on("nbd:unix:x", ""))],
            "only QEMU understands",
        ),
        (
            vec![base(), (Some("top"), on("cannery.toml", "raw"))],
            "is not in the image",
        ),
        // The names that the store gives them are none of theirs.
        (
            vec![base(), (Some("top"), on("file.1", "qcow2"))],
            "is not in the image",
        ),
        (
            vec![
                base(),
                (Some("top"), on("base", "qcow2")),
                (Some("more"), on("base", "qcow2")),
            ],
            "both lie on `base`",
        ),
        (
            vec![(Some("a"), on("b", "qcow2")), (Some("b"), on("a", "qcow2"))],
            "in a circle",
        ),
        (vec![base(), (Some("other"), raw())], "it has 2: `base`, `other`"),
        (
            vec![base(), base(), (Some("top"), on("base", "qcow2"))],
            "have that name",
        ),
        (
            vec![base(), (Some("top"), on("base", "raw"))],
            "begins like a qcow2",
        ),
        (
            vec![base(), (Some("top"), on("base", "vmdk"))],
            "neither qcow2 nor raw",
        ),
        (
            vec![(Some("base"), raw()), (Some("top"), on("base", "qcow2"))],
            "is none",
        ),
        // Each file is checked as if it were the only one, but for the name.
        (
            vec![
                (Some("base"), with(79, 4, qcow2(&[], "", ""))),
                (Some("top"), on("base", "qcow2")),
            ],
            "external data file",
        ),
        (
            vec![base(), (Some("top"), with(79, 4, on("base", "qcow2")))],
            "external data file",
        ),
        (
            vec![base(), (Some("top"), with(35, 1, on("base", "qcow2")))],
            "encrypted",
        ),
        (
            vec![base(), (Some("top"), with(79, 2, on("base", "qcow2")))],
            "corrupt",
        ),
        (
            vec![base(), (Some("top"), with(9, 1, on("base", "qcow2")))],
            "names a backing file",
        ),
        (
            vec![
                (Some("base"), b"KDMV".repeat(128)),
                (Some("top"), on("base", "raw")),
            ],
            "vmdk",
        ),
        // What a table of the second level says of places that are not there is nothing; what is packed must unpack.
        (
            vec![
                base(),
                (Some("top"), with(4 * CLUSTER, 0x40, on("base", "qcow2"))),
            ],
            "cannot be put together",
        ),
    ];
    for (files, part) in sentences {
        let image = cake(&domain(&[("disk", "top")]), &files, usize::MAX);
        Bench::new().refused(&image, part);
    }
    let many: Vec<_> = (0..65).map(|_| base()).collect();
    Bench::new().refused(&cake(&domain(&[]), &many, usize::MAX), "more than 64");
    // As of a machine that runs.
    let alone = cake(&domain(&[]), &[(Some("top"), on("base", "qcow2"))], usize::MAX);
    Bench::new().refused(&alone, "`top` lies on `base`, which is not in the image");
}

/// Two disks of which every cluster has an entry and none has data: each table is looked through once.
#[test]
fn a_search_for_data_does_not_grow_with_the_square_of_the_disk() {
    // Of 512 clusters each, which have 4 KiB.
    const TABLES: usize = 32;
    let empty = |below: &str| {
        let mut file = qcow2(&[], below, if below.is_empty() { "" } else { "qcow2" });
        file[20..24].copy_from_slice(&12_u32.to_be_bytes());
        let cluster = 4096;
        file.resize(cluster * (4 + TABLES), 0);
        file[24..32].copy_from_slice(&(64_u64 << 20).to_be_bytes());
        file[36..40].copy_from_slice(&u32::try_from(TABLES).unwrap().to_be_bytes());
        file[40..48].copy_from_slice(&(2 * cluster as u64).to_be_bytes());
        file[48..56].copy_from_slice(&(cluster as u64).to_be_bytes());
        file[512..cluster].fill(0);
        for table in 0..TABLES {
            let at = 2 * cluster + table * 8;
            let place = (cluster * (4 + table)) as u64;
            file[at..at + 8].copy_from_slice(&place.to_be_bytes());
        }
        file
    };
    let files = [(Some("base"), empty("")), (Some("top"), empty("base"))];
    let begin = std::time::Instant::now();
    let disk = Bench::new().pull_once(&cake(&domain(&[]), &files, usize::MAX));
    assert!(disk.len() == 64 << 20 && disk.iter().all(|byte| *byte == 0));
    assert!(
        begin.elapsed() < std::time::Duration::from_secs(20),
        "{:?}",
        begin.elapsed()
    );
}

#[cfg(debug_assertions)]
#[test]
fn a_pull_that_is_killed_is_gone_on_with() {
    let (files, disk) = three();
    let image = cake(&domain(&[("disk", "top.qcow2")]), &files, usize::MAX);
    for point in [
        "layer-unpacked:1",
        "layer-kept:1",
        "layer-begun:2",
        "layer-kept:2",
        "layer-kept:3",
        // The files are one, and still there.
        "layer-kept:4",
        "file-named",
        "disk-named",
        "disk-finished",
        "disk-stored",
    ] {
        let bench = Bench::new();
        bench.layout.add("vm", &image);
        bench.killed(point);
        let unpacked: u64 = point
            .strip_prefix("layer-kept:")
            .map_or(0, |n| n.parse().unwrap());
        // What is unpacked is not read again.
        let blobs: Vec<_> = image.layers.iter().skip(1).collect();
        for (bytes, _) in blobs.iter().take(usize::try_from(unpacked).unwrap()) {
            fs::write(bench.layout.path(&sha256(bytes)), b"gone").unwrap();
        }
        let dir = bench.again();
        assert!(fs::read(dir.join("disk.raw")).unwrap() == disk, "{point}");
        assert_eq!(
            bench.files(&bench.desk.at("state/store/partial")),
            [""; 0],
            "{point}"
        );
    }
}

/// The name of a file is known although its first bytes do not come again.
#[cfg(debug_assertions)]
#[test]
fn a_pull_that_is_killed_within_a_file_knows_its_name() {
    use Cluster::Filled;
    let bench = Bench::new();
    let settings = fs::read_to_string(bench.desk.at("cannery.toml")).unwrap();
    fs::write(bench.desk.at("cannery.toml"), settings.replace("64M", "80M")).unwrap();
    let base = noise(3, 72 << 20);
    let mut disk = base[..SIZE].to_vec();
    disk[5 * CLUSTER..6 * CLUSTER].fill(1);
    let top = qcow2(&[(5, Filled(1))], "base", "raw");
    let files = [(Some("base"), base), (Some("top"), top)];
    bench.layout.add("vm", &cake(&domain(&[]), &files, usize::MAX));
    bench.killed("checkpoint-kept");
    let dir = bench.again();
    assert!(fs::read(dir.join("disk.raw")).unwrap() == disk);
}

#[test]
#[ignore = "needs qemu-img"]
fn what_qemu_makes_is_flattened_as_qemu_flattens_it() {
    let bench = Bench::new();
    let desk = &bench.desk;
    let disk = desk.raw();
    let io = |file: &str, command: &str| drop(desk.tool("qemu-io", &["-f", "qcow2", "-c", command, file]));
    for (number, options) in [
        vec![],
        vec!["-c"],
        vec!["-c", "-o", "compression_type=zstd"],
        vec!["-o", "extended_l2=on,cluster_size=128k"],
        vec!["-o", "compat=0.10"],
    ]
    .iter()
    .enumerate()
    {
        let names = ["base", "mid", "top"].map(|name| format!("{name}-{number}.qcow2"));
        let base = desk.qcow2(&names[0], options);
        let [_, mid, top] = names.each_ref().map(|name| desk.path(name));
        let create = |below: &str, file: &str, more: &[&str]| {
            let mut arguments = vec!["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", below, file];
            arguments.extend(more);
            desk.tool("qemu-img", &arguments);
        };
        create(&names[0], &names[1], &[]);
        create(&names[1], &names[2], &["60M"]);
        io(&mid, "write -P 7 5M 64k");
        io(&mid, "write -P 8 21M 3M");
        io(&top, "write -z 1M 128k");
        io(&top, "write -P 9 55M 4k");
        let file = |path: &str| fs::read(path).unwrap();
        let files = [
            (Some(names[0].as_str()), file(&base)),
            (Some(names[1].as_str()), file(&mid)),
            (Some(names[2].as_str()), file(&top)),
        ];
        let dir = bench.pull(&cake(&domain(&[]), &files, 100_000));
        let flat = dir.join("disk.raw");
        desk.same((flat.to_str().unwrap(), "raw"), (&top, "qcow2"));
    }
    // Upon a raw disk, of which nothing is packed.
    desk.tool(
        "qemu-img",
        &[
            "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "disk.raw", "on.qcow2",
        ],
    );
    io("on.qcow2", "write -P 7 5M 64k");
    let files = [
        (Some("disk.raw"), fs::read(&disk).unwrap()),
        (Some("on.qcow2"), fs::read(desk.at("on.qcow2")).unwrap()),
    ];
    let dir = bench.pull(&cake(&domain(&[]), &files, usize::MAX));
    let flat = dir.join("disk.raw");
    desk.same((flat.to_str().unwrap(), "raw"), (&desk.path("on.qcow2"), "qcow2"));
    let taken = |path: &std::path::Path| std::os::unix::fs::MetadataExt::blocks(&fs::metadata(path).unwrap());
    let (flat, disk) = (taken(&flat), taken(disk.as_ref()));
    // Holes have 64 KiB.
    assert!(flat <= disk + 1024, "zeros take no room: {flat} and {disk}");
}
