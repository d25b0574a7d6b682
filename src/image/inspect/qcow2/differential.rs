//! What QEMU sees in files that pass: changed files, in great number, shown to both.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::super::{Finding, bytes};
use super::*;
use crate::image::fuzz::Dice;

const LIMIT: u64 = 1 << 44;

/// How long files are compared, in seconds, unless the environment says otherwise.
const SECONDS: u64 = 20;
const SECONDS_VARIABLE: &str = "CANNERY_FUZZ_SECONDS";

/// The header's fields: place and width in bytes.
const FIELDS: [(usize, usize); 21] = [
    (0, 4),
    (4, 4),
    (8, 8),
    (16, 4),
    (20, 4),
    (24, 8),
    (32, 4),
    (36, 4),
    (40, 8),
    (48, 8),
    (56, 4),
    (60, 4),
    (64, 8),
    (72, 8),
    (80, 8),
    (88, 8),
    (96, 4),
    (100, 4),
    (104, 1),
    (104, 8),
    (112, 8),
];

const EXTENSIONS: [u32; 8] = [
    EXTENSION_END,
    EXTENSION_BACKING_FORMAT,
    EXTENSION_DATA_FILE,
    EXTENSION_ENCRYPTION,
    EXTENSION_BITMAPS,
    // Names of features.
    0x6803_f857,
    // Nobody's.
    0x1234_5678,
    0xffff_ffff,
];

/// Runs qemu-img in an empty folder, without a network, and within bounds that a hostile file may hit.
fn jailed(dir: &Path, arguments: &[&str]) -> std::process::Output {
    Command::new("prlimit")
        .args([
            "--as=1073741824",
            "--cpu=10",
            "--fsize=1073741824",
            "unshare",
            "-r",
            "-n",
            "qemu-img",
        ])
        .args(arguments)
        .current_dir(dir)
        .stdin(Stdio::null())
        .output()
        .expect("util-linux and qemu-img are installed")
}

/// Honest files of every kind that qemu-img makes, and the dangerous ones: a change may make those pass.
fn seeds(dir: &Path) -> Vec<Vec<u8>> {
    let run = |arguments: &[&str]| {
        let output = jailed(dir, arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {said}");
    };
    std::fs::write(dir.join("data.raw"), vec![7; 200 << 10]).unwrap();
    let mut seeds = Vec::new();
    for options in [
        "compat=0.10",
        "compat=1.1",
        "lazy_refcounts=on",
        "compression_type=zstd,cluster_size=4k",
        "extended_l2=on,cluster_size=16k",
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=1",
        "cluster_size=4k,refcount_bits=64",
    ] {
        run(&["create", "-q", "-f", "qcow2", "-o", options, "disk", "3M"]);
        seeds.push(std::fs::read(dir.join("disk")).unwrap());
        run(&[
            "convert", "-f", "raw", "-O", "qcow2", "-o", options, "data.raw", "disk",
        ]);
        seeds.push(std::fs::read(dir.join("disk")).unwrap());
        // One bit counts one owner, and a snapshot is a second.
        if options.contains("refcount_bits=1") {
            continue;
        }
        run(&["snapshot", "-q", "-c", "one", "disk"]);
        seeds.push(std::fs::read(dir.join("disk")).unwrap());
    }
    run(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4k",
        "disk",
        "3M",
    ]);
    run(&["bitmap", "-f", "qcow2", "--add", "disk", "dirty"]);
    seeds.push(std::fs::read(dir.join("disk")).unwrap());
    run(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4k",
        "-F",
        "raw",
        "-b",
        "data.raw",
        "disk",
    ]);
    seeds.push(std::fs::read(dir.join("disk")).unwrap());
    run(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4k,data_file=data.raw,data_file_raw=on",
        "disk",
        "200k",
    ]);
    seeds.push(std::fs::read(dir.join("disk")).unwrap());
    for name in ["disk", "data.raw"] {
        std::fs::remove_file(dir.join(name)).unwrap();
    }
    seeds
}

fn put(file: &mut [u8], at: usize, width: usize, number: u64) {
    for (byte, new) in file.iter_mut().skip(at).zip(&number.to_be_bytes()[8 - width..]) {
        *byte = *new;
    }
}

/// A number that means something in such a file.
fn number(file: &[u8], old: u64, dice: &mut Dice) -> u64 {
    let cluster = 1_u64 << (be32(file, 20) % 32).min(21);
    let length = file.len() as u64;
    match dice.below(9) {
        0 => dice.roll() >> dice.below(64),
        1 => 1 << dice.below(64),
        2 => old ^ (1 << dice.below(64)),
        3 => old.wrapping_add(dice.of(&[1, 8, 512, cluster])),
        4 => old.wrapping_sub(dice.of(&[1, 8, 512, cluster])),
        5 => length
            .next_multiple_of(cluster)
            .wrapping_sub(dice.of(&[0, 1, cluster])),
        6 => dice.roll() % (length / cluster + 2) * cluster,
        7 => dice.roll() % (length + 1),
        _ => dice.of(&[0, 1, 2, 3, 4, 9, 16, 21, 104, 112, 0xffff, 0xffff_ffff, u64::MAX]),
    }
}

/// One change that a forger might make.
fn change(file: &mut Vec<u8>, dice: &mut Dice) {
    let header_length = if be32(file, 4) == 2 { 72 } else { be32(file, 100) };
    let header_length = usize::try_from(header_length).unwrap().min(file.len() - 8);
    let entry = |table: usize, dice: &mut Dice| {
        let table = usize::try_from(be64(file, table)).unwrap_or_default() % file.len();
        (table + dice.below(4) * 8, 8)
    };
    let (at, width) = match dice.below(12) {
        0..=4 => dice.of(&FIELDS),
        // Entries of the first-level table, of the reference counts', and of the snapshots'.
        5 | 6 => entry(40, dice),
        7 => entry(48, dice),
        8 => entry(64, dice),
        9 => {
            // A header extension in front of the others, with a name for a file behind it.
            let mut extension = dice.of(&EXTENSIONS).to_be_bytes().to_vec();
            let size = dice.of(&[0_u32, 3, 8, 16, 24, 48, 0xffff_fff8]);
            extension.extend(size.to_be_bytes());
            extension.extend(b"raw\0\0\0\0\0/etc/passwd\0\0\0\0\0\0");
            extension.truncate(8 + usize::try_from(size.min(24)).unwrap());
            let end = (header_length + 512)
                .min(file.len() - extension.len())
                .max(header_length);
            if end + extension.len() > file.len() {
                return;
            }
            file.copy_within(header_length..end, header_length + extension.len());
            file[header_length..header_length + extension.len()].copy_from_slice(&extension);
            return;
        }
        10 => {
            let length = match dice.below(3) {
                0 => dice.below(file.len()),
                1 => file.len() + dice.below(1 << 17),
                _ => file.len() / 512 * 512,
            };
            return file.resize(length.max(200), 0);
        }
        _ => (dice.below(file.len()), 1),
    };
    let old = be64(file, at) >> (64 - 8 * width);
    let new = number(file, old, dice);
    put(file, at, width, new);
}

/// Another file that is named anywhere in what qemu-img says.
fn names_another_file(said: &serde_json::Value) -> bool {
    match said {
        serde_json::Value::Object(fields) => fields.iter().any(|(key, value)| {
            let naming = [
                "backing-filename",
                "full-backing-filename",
                "data-file",
                "filename",
            ];
            (naming.contains(&key.as_str()) && value != "disk") || names_another_file(value)
        }),
        serde_json::Value::Array(values) => values.iter().any(names_another_file),
        _ => false,
    }
}

#[test]
#[ignore = "needs qemu-img"]
#[expect(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a test may be told how long to run, and say what it did"
)]
fn what_passes_is_seen_alike_by_qemu() {
    let told = std::env::var(SECONDS_VARIABLE)
        .ok()
        .and_then(|text| text.parse().ok());
    let time = Duration::from_secs(told.unwrap_or(SECONDS));
    let dir = tempfile::tempdir().unwrap();
    let seeds = seeds(dir.path());
    let disk = dir.path().join("disk");
    let mut dice = Dice(20);
    let (mut tried, mut passed, mut opened) = (0, 0, 0);
    let begin = Instant::now();
    while begin.elapsed() < time {
        let mut file = seeds[dice.below(seeds.len())].clone();
        for _ in 0..=dice.below(3) {
            change(&mut file, &mut dice);
        }
        tried += 1;
        if !file.starts_with(&MAGIC) {
            continue;
        }
        let size = match bytes(&file, LIMIT) {
            Ok(inspected) => inspected.virtual_size,
            Err(Finding::Io(error)) => panic!("{error}"),
            Err(_) => continue,
        };
        passed += 1;
        std::fs::write(&disk, &file).unwrap();
        let output = jailed(dir.path(), &["info", "-f", "qcow2", "--output=json", "disk"]);
        // QEMU may refuse what passes; what it opens must be the same disk.
        if output.status.success() {
            opened += 1;
            let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            let alike = said["virtual-size"] == size && !names_another_file(&said);
            if !alike {
                let kept = std::env::temp_dir().join("cannery-differential");
                std::fs::write(&kept, &file).unwrap();
                panic!(
                    "{size} bytes, and qemu-img says {said}; kept as {}",
                    kept.display()
                );
            }
        }
        let left: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(left, ["disk"]);
    }
    println!("{tried} changed files, {passed} passed, QEMU opened {opened} of them, in {time:?}");
    assert!(
        tried > 500 && passed > 50 && opened > 50,
        "too little was compared"
    );
}
