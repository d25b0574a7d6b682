//! Disks written as images of every format, and read again.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on panics"
)]

mod support;

use std::fs;
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};
use sha2::Digest as _;
use support::desk::{Desk, SIZE};
use support::https::{Answer, Server, Speech};
use support::table;

/// Everything that an image is written as.
const FORMATS: [(&str, &[&str]); 5] = [
    ("native", &[]),
    ("containerdisk", &[]),
    ("containerdisk (zstd)", &["--compression", "zstd"]),
    ("sardinecake", &[]),
    ("qcow2", &[]),
];

fn push<'a>(source: &'a str, target: &'a str, format: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let name = format.split(' ').next().unwrap();
    let mut arguments = vec!["image", "push", "--quiet", "--format", name];
    arguments.extend(more);
    arguments.extend([source, target]);
    arguments
}

#[test]
fn the_same_disk_gives_the_same_image_and_every_label_a_different_one() {
    let desk = Desk::new("");
    let disk = desk.raw();
    for (number, (format, more)) in FORMATS.iter().enumerate() {
        let [one, two, three] = ["a", "b", "c"].map(|tag| desk.layout(&format!("{tag}{number}")));
        let first = desk.cannery(&push(&disk, &one, format, more));
        assert!(first.starts_with("sha256:"), "{first}");
        assert_eq!(desk.cannery(&push(&disk, &two, format, more)), first, "{format}");
        let labelled = [more, &["--memory", "512M", "--label", "a=b"][..]].concat();
        assert_ne!(
            desk.cannery(&push(&disk, &three, format, &labelled)),
            first,
            "{format}"
        );
    }
}

#[test]
fn what_cannot_be_written_is_refused_in_a_sentence() {
    let desk = Desk::new("");
    let disk = desk.raw();
    let kernel = desk.path("vmlinuz");
    fs::write(&kernel, "a kernel").unwrap();
    fs::write(desk.at("disk.vmdk"), [b"KDMV".as_slice(), &[0; 508]].concat()).unwrap();
    let (target, vmdk) = (desk.layout("x"), desk.path("disk.vmdk"));
    let pinned = format!("r.example.com/a@sha256:{}", "0".repeat(64));
    let pinned_there = format!("{target}@sha256:{}", "0".repeat(64));
    let there = desk.path("vmlinuz");
    for (arguments, part) in [
        (
            push(&disk, &target, "sardinecake", &["--kernel", &kernel]),
            "cannot hold the kernel",
        ),
        (
            push(&disk, &target, "qcow2", &["--kernel", &kernel]),
            "cannot hold the kernel",
        ),
        (
            push(&disk, &target, "containerdisk", &["--cmdline", "quiet"]),
            "needs a kernel",
        ),
        (
            push(&disk, &target, "containerdisk", &["--memory", "1X"]),
            "'1X' for '--memory <SIZE>': it is not a size from 16M to 16T",
        ),
        (
            push(&disk, &target, "containerdisk", &["--firmware", "grub"]),
            "'--firmware <FIRMWARE>': it is neither bios nor uefi",
        ),
        (
            push(&disk, &target, "containerdisk", &["--user", "a b"]),
            "'--user <NAME>': it is not the name of an account",
        ),
        (
            push(&disk, &target, "json", &[]),
            "--json prints the result as JSON",
        ),
        (
            vec!["image", "convert", &disk, &target, "--format", "json"],
            "--json prints the result as JSON",
        ),
        (
            vec!["image", "export", "web", &target, "--format", "json"],
            "--json prints the result as JSON",
        ),
        (
            push(&disk, &target, "containerdisk", &["--label", "a"]),
            "NAME=VALUE",
        ),
        (
            vec!["image", "convert", &disk, &target, "--format", "raw"],
            "not written as raw",
        ),
        (push(&disk, &pinned, "qcow2", &[]), "written to tags"),
        (push(&disk, &pinned_there, "qcow2", &[]), "by its tag alone"),
        (
            push(&disk, &target, "qcow2", &["--base", "a:1"]),
            "a native image builds upon another",
        ),
        (
            push(&disk, &target, "native", &["--compression", "zstd"]),
            "the layer of a containerDisk is packed",
        ),
        (
            vec!["image", "pull", "docker://r.example.com/a:1"],
            "Leave out docker://",
        ),
        (vec!["image", "pull", &disk], "file:///"),
        (
            push(&vmdk, &target, "qcow2", &[]),
            "`qemu-img convert -f vmdk -O qcow2 ",
        ),
        (push("/nowhere/disk", &target, "qcow2", &[]), "/nowhere/disk"),
        (
            vec!["image", "convert", &disk, &there, "--format", "raw"],
            "is there already",
        ),
        (
            vec![
                "image",
                "convert",
                &disk,
                "/nowhere/disk.qcow2",
                "--kernel",
                &kernel,
            ],
            "Leave out --kernel",
        ),
        (
            vec!["image", "convert", &disk, "/tmp/disk.unknown"],
            "tells no format",
        ),
    ] {
        let said = desk.refusal(&arguments);
        assert!(said.contains(part), "{arguments:?}: {said}");
    }
    assert!(!desk.at("layout/index.json").exists(), "nothing was written");
}

#[test]
fn a_kernel_goes_with_the_disk_and_comes_back() {
    let desk = Desk::new("");
    let disk = desk.raw();
    for name in ["vmlinuz", "initrd"] {
        fs::write(desk.at(name), format!("the {name}")).unwrap();
    }
    let (kernel, initrd, target) = (desk.path("vmlinuz"), desk.path("initrd"), desk.layout("kernel"));
    let wishes = [
        "--kernel",
        &kernel,
        "--initrd",
        &initrd,
        "--cmdline",
        "root=/dev/vda",
        "--memory",
        "256M",
        "--user",
        "ci",
    ];
    desk.cannery(&push(&disk, &target, "containerdisk", &wishes));
    let digest = desk.cannery(&["image", "pull", "--quiet", &target]);
    let folder = desk
        .at("state/store/disks")
        .join(digest.trim_start_matches("sha256:"));
    assert_eq!(fs::read(folder.join("kernel")).unwrap(), b"the vmlinuz");
    assert_eq!(fs::read(folder.join("initrd")).unwrap(), b"the initrd");
    assert!(fs::read(folder.join("disk.raw")).unwrap() == fs::read(&disk).unwrap());
    // What an image wishes stays with it from format to format.
    let again = desk.layout("again");
    desk.cannery(&[
        "image",
        "convert",
        "--quiet",
        "--format",
        "containerdisk",
        &target,
        &again,
    ]);
    assert_eq!(
        desk.cannery(&["image", "pull", "--quiet", &again]),
        digest,
        "an image that is written as it was read is the same one"
    );
    // A file holds the disk alone, which is said.
    let file = desk.path("alone.qcow2");
    let output = desk.call(&["image", "convert", "--quiet", "--json", &target, &file]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("alone.qcow2 is the disk alone, without the image's kernel, initrd, cmdline"),
        "{said}"
    );
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["left_out"], json!(["kernel", "initrd", "cmdline"]));
}

/// Bytes of all blobs of the test's layout.
fn blobs(desk: &Desk) -> u64 {
    let blobs = fs::read_dir(desk.at("layout/blobs/sha256")).unwrap();
    blobs.map(|blob| blob.unwrap().metadata().unwrap().len()).sum()
}

#[test]
fn an_image_of_our_own_format_sends_what_changed_and_is_the_same_from_every_file() {
    let desk = Desk::new("");
    let disk = desk.raw();
    let [one, two, three] = ["one", "two", "three"].map(|tag| desk.layout(tag));
    let first = desk.cannery(&push(&disk, &one, "native", &[]));
    let before = blobs(&desk);
    assert_eq!(
        desk.cannery(&push(&disk, &two, "native", &["--base", &one])),
        first
    );
    assert_eq!(blobs(&desk), before, "nothing is sent twice");
    let mut changed = fs::read(&disk).unwrap();
    changed[2 << 20..][..100_000].fill(0x77);
    fs::write(&disk, &changed).unwrap();
    // Upon what the name means now, without being told.
    assert_ne!(desk.cannery(&push(&disk, &one, "native", &[])), first);
    let sent = blobs(&desk) - before;
    assert!(sent < 400_000, "{sent} bytes for 100000 that changed");
    let said = desk.refusal(&push(&disk, &three, "native", &["--base", &three]));
    assert!(said.contains("does not exist"), "{said}");
}

#[test]
fn programs_are_told_what_was_written() {
    let desk = Desk::new("");
    let (disk, target, file) = (desk.raw(), desk.layout("json"), desk.path("copy.img"));
    let digest = desk.cannery(&push(&disk, &target, "qcow2", &[]));
    for arguments in [
        push(&disk, &target, "qcow2", &["--json"]),
        vec!["image", "convert", &disk, &target, "--format", "qcow2", "--json"],
    ] {
        let said: Value = serde_json::from_slice(&desk.call(&arguments).stdout).unwrap();
        let size = blobs(&desk);
        assert!(
            said["size"]
                .as_u64()
                .is_some_and(|packed| packed > 0 && packed < size)
        );
        let expected =
            json!({"reference": target, "digest": digest, "format": "qcow2", "size": said["size"]});
        assert_eq!(said, expected, "{arguments:?}");
    }
    let convert = ["image", "convert", &target, &file];
    let said = desk.call(&[&convert[..], &["--json"]].concat());
    let said: Value = serde_json::from_slice(&said.stdout).unwrap();
    assert_eq!(
        said,
        json!({"path": file, "format": "raw", "size": SIZE, "left_out": []})
    );
}

#[test]
fn a_registry_that_takes_nothing_is_given_up() {
    for range in ["0-0", "0-99"] {
        let server = Server::start(Speech::Plain, move |seen| {
            let upload = "/v2/vm/blobs/uploads/1";
            let answer = match seen.method.as_str() {
                "POST" => Answer::status(202),
                // The first bytes are all that it ever has.
                "PATCH" => Answer::status(202).with("range", range),
                "GET" if seen.path == upload => Answer::status(204).with("range", range),
                _ => Answer::status(404),
            };
            answer.with("location", upload)
        });
        let desk = Desk::new(&format!("plain_http = [\"{}\"]", server.host()));
        let disk = desk.raw();
        let target = format!("{}/vm:1", server.host());
        let said = desk.refusal(&push(&disk, &target, "qcow2", &[]));
        assert!(said.contains("took nothing"), "{range}: {said}");
        let sent = server.seen();
        let sent = sent.iter().filter(|seen| seen.method == "PATCH").count();
        assert!((4..=6).contains(&sent), "{range}: sent {sent} times");
    }
}

#[test]
fn what_an_image_is_can_be_asked_without_fetching_it() {
    // Also where jobs must name a digest, which somebody has to learn first.
    let desk = Desk::new("require_digest = true");
    let disk = desk.raw();
    let image = desk.layout("seen");
    let wishes = [
        "--memory",
        "512M",
        "--firmware",
        "uefi",
        "--user",
        "ci",
        "--label",
        "a=b\u{1b}[31m",
    ];
    let digest = desk.cannery(&push(&disk, &image, "containerdisk", &wishes));
    let output = desk.call(&["image", "inspect", &image]);
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        digest.as_str(),
        "containerdisk",
        "linux/amd64",
        "Signature: none",
        "512.0 MiB",
        "uefi",
        "User:      ci",
        "a = b",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(
        !text.contains('\u{1b}'),
        "nothing of an image reaches the terminal"
    );
    let output = desk.call(&["image", "inspect", "--format", "json", &image]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["digest"], digest);
    assert_eq!(json["hints"]["memory"], 512 << 20);
    assert_eq!(json["layers"].as_array().unwrap().len(), 1);
    let manifest = desk.call(&["image", "inspect", "--raw", &image]).stdout;
    assert_eq!(
        format!(
            "sha256:{}",
            hex::encode(sha2::Sha256::digest(&manifest[..manifest.len() - 1]))
        ),
        digest
    );
    let config = desk.call(&["image", "inspect", "--image-config", &image]).stdout;
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(config["config"]["Labels"]["io.cannery.user"], "ci");
    assert!(
        !desk.at("state/store/disks").read_dir().unwrap().any(|_| true),
        "no disk was fetched"
    );
}

#[test]
#[ignore = "needs qemu-img"]
fn every_format_becomes_every_other_and_a_guest_sees_the_same() {
    let desk = Desk::new("");
    let disk = desk.raw();
    let sources = [
        ("raw", disk.clone()),
        ("qcow2", desk.qcow2("plain.qcow2", &[])),
        ("qcow2 (zlib)", desk.qcow2("zlib.qcow2", &["-c"])),
        (
            "qcow2 (zstd)",
            desk.qcow2("zstd.qcow2", &["-c", "-o", "compression_type=zstd"]),
        ),
        (
            "qcow2 (version 2)",
            desk.qcow2("old.qcow2", &["-o", "compat=0.10"]),
        ),
        (
            "qcow2 (subclusters)",
            desk.qcow2("sub.qcow2", &["-o", "extended_l2=on,cluster_size=128k"]),
        ),
    ];
    let mut rows = Vec::new();
    for (number, (source, path)) in sources.iter().enumerate() {
        let mut row = vec![(*source).to_owned()];
        for (column, (format, more)) in FORMATS.iter().enumerate() {
            let target = desk.layout(&format!("{number}-{column}"));
            desk.cannery(&push(path, &target, format, more));
            row.push(there_and_back(&desk, &target, number, column));
        }
        for ending in ["qcow2", "raw"] {
            let target = desk.path(&format!("copy.{ending}"));
            desk.cannery(&["image", "convert", "--quiet", path, &target]);
            desk.same((&target, ending), (&disk, "raw"));
            row.push(allocated(Path::new(&target)));
            fs::remove_file(&target).unwrap();
        }
        rows.push(row);
    }
    // From each written format to each other, through the store.
    for (column, (format, _)) in FORMATS.iter().enumerate() {
        let source = desk.layout(&format!("0-{column}"));
        let mut row = vec![format!("image: {format}")];
        for (other, (to, more)) in FORMATS.iter().enumerate() {
            let target = desk.layout(&format!("{column}-to-{other}"));
            let mut arguments = vec![
                "image",
                "convert",
                "--quiet",
                "--format",
                to.split(' ').next().unwrap(),
            ];
            arguments.extend(*more);
            arguments.extend([source.as_str(), target.as_str()]);
            desk.cannery(&arguments);
            row.push(there_and_back(&desk, &target, 10 + column, other));
        }
        for ending in ["qcow2", "raw"] {
            let target = desk.path(&format!("copy.{ending}"));
            desk.cannery(&["image", "convert", "--quiet", &source, &target]);
            desk.same((&target, ending), (&disk, "raw"));
            row.push(allocated(Path::new(&target)));
            fs::remove_file(&target).unwrap();
        }
        rows.push(row);
    }
    table::show(
        "What a disk becomes (qemu-img compare finds no difference; room of the file that came back)",
        &[
            "from",
            "native",
            "containerdisk",
            "containerdisk (zstd)",
            "sardinecake",
            "qcow2",
            "file qcow2",
            "file raw",
        ],
        &rows,
    );
}

/// Takes an image back out of its layout and compares it with the disk that it was made of.
fn there_and_back(desk: &Desk, image: &str, number: usize, column: usize) -> String {
    let back = desk.path(&format!("back-{number}-{column}.raw"));
    desk.cannery(&["image", "convert", "--quiet", image, &back]);
    desk.same((&back, "raw"), (&desk.path("disk.raw"), "raw"));
    let room = allocated(Path::new(&back));
    fs::remove_file(&back).unwrap();
    room
}

/// The room that a file takes.
fn allocated(path: &Path) -> String {
    use std::os::unix::fs::MetadataExt as _;
    format!("{:.1} MiB", fs::metadata(path).unwrap().blocks() as f64 / 2048.0)
}

#[test]
#[ignore = "needs qemu-img and a minute"]
fn memory_does_not_grow_with_the_disk() {
    let desk = Desk::new("");
    // 1 GiB of which half is data that packs badly.
    let path = desk.path("large.raw");
    let file = fs::File::create(&path).unwrap();
    file.set_len(1 << 30).unwrap();
    let mut state = 5_u64;
    let block: Vec<u8> = (0..1 << 20)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_be_bytes()[0] & 0x3f
        })
        .collect();
    for at in (0..1 << 10).step_by(2) {
        std::os::unix::fs::FileExt::write_all_at(&file, &block, at << 20).unwrap();
    }
    let mut rows = Vec::new();
    for (number, (format, more)) in FORMATS.iter().enumerate() {
        let target = desk.layout(&number.to_string());
        let arguments = push(&path, &target, format, more);
        let begin = Instant::now();
        let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_cannery"))
            .arg("--config")
            .arg(desk.at("cannery.toml"))
            .args(&arguments)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let mut peak = 0;
        while child.try_wait().unwrap().is_none() {
            let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let kib = line.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok());
            peak = peak.max(kib.unwrap_or_default());
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        assert!(child.wait().unwrap().success(), "{format}");
        assert!(peak < 200 << 10, "{format}: {peak} KiB");
        rows.push(vec![
            (*format).to_owned(),
            format!("{:.1} s", begin.elapsed().as_secs_f64()),
            format!("{} MiB", peak >> 10),
        ]);
    }
    table::show(
        "A disk of 1 GiB, half of it holes, into a layout folder",
        &["format", "time", "peak memory"],
        &rows,
    );
}
