use super::*;
use crate::image::digest::Digest;
use crate::image::format::Config;
use crate::image::format::fixture::{blob, manifest, pieces, recipe_of};
use crate::image::manifest::Manifest;

const MACHINE: &str = r#"{"version":1,"arch":"amd64","cmdline":"console=hvc0 root=/dev/vda1","disks":[{"name":"disk.img"}],
    "cpuCount":2,"memorySize":4294967296,"macAddress":"7e:00:00:00:00:01"}"#;

fn image() -> Manifest {
    let content = Digest::of(b"content").to_string();
    manifest(vec![
        blob(CONFIG, 100, &[]),
        blob(KERNEL_TYPE, 1000, &[]),
        blob(INITRAMFS, 2000, &[]),
        blob(
            DISK,
            10,
            &[(NAME, "disk.img"), (SIZE, "512"), (CONTENT, &content)],
        ),
        blob(DISK, 20, &[(NAME, "disk.img"), (SIZE, "1024")]),
    ])
}

#[test]
fn a_kernel_comes_beside_the_disk() {
    let recipe = recipe_of(&image(), &Config::default(), &[MACHINE]).unwrap();
    assert_eq!((recipe.hints.memory, recipe.hints.cpus), (Some(4 << 30), Some(2)));
    assert_eq!(recipe.hints.firmware, None);
    assert_eq!(
        recipe.boot.cmdline.as_deref(),
        Some("console=hvc0 root=/dev/vda1")
    );
    let pieces = pieces(recipe);
    let files: Vec<_> = pieces.files.iter().map(|file| (file.name, file.length)).collect();
    assert_eq!(files, [("disk.raw", 1536), ("kernel", 1000), ("initrd", 2000)]);
    let places: Vec<_> = pieces
        .blobs
        .iter()
        .flat_map(|blob| &blob.pieces)
        .map(|piece| (piece.file, piece.codec, piece.at, piece.length, piece.digest))
        .collect();
    assert_eq!(
        places,
        [
            (0, Codec::Lz4Frame, 0, 512, Some(Digest::of(b"content"))),
            (0, Codec::Lz4Frame, 512, 1024, None),
            (1, Codec::Plain, 0, 1000, Some(Digest::of(KERNEL_TYPE.as_bytes()))),
            (2, Codec::Plain, 0, 2000, Some(Digest::of(INITRAMFS.as_bytes()))),
        ]
    );
}

#[test]
fn what_does_not_fit_a_machine_is_refused() {
    let without = |media_type: &str| {
        let mut image = image();
        image.layers.retain(|layer| layer.media_type != media_type);
        image
    };
    let with = |layer| {
        let mut image = image();
        image.layers.push(layer);
        image
    };
    let long = MACHINE.replace("hvc0", &"x".repeat(2048));
    let two = MACHINE.replace(
        r#"[{"name":"disk.img"}]"#,
        r#"[{"name":"disk.img"},{"name":"b"}]"#,
    );
    for (image, machine, part) in [
        (without(CONFIG), MACHINE, "exactly one config"),
        (without(KERNEL_TYPE), MACHINE, "exactly one kernel"),
        (without(DISK), MACHINE, "at least one disk"),
        (with(blob(INITRAMFS, 1, &[])), MACHINE, "at most one initramfs"),
        (
            with(blob(DISK, 1, &[(NAME, "../disk.img"), (SIZE, "1")])),
            MACHINE,
            "does not belong",
        ),
        (
            with(blob(DISK, 1, &[(NAME, "disk.img"), (SIZE, "1073741824")])),
            MACHINE,
            "too large",
        ),
        (
            with(blob(DISK, 1, &[(NAME, "disk.img"), (SIZE, "1"), (CONTENT, "x")])),
            MACHINE,
            "is wrong",
        ),
        (
            with(blob("application/vnd.cirruslabs.vetu.new.v1", 1, &[])),
            MACHINE,
            "vetu.new",
        ),
        (image(), &MACHINE.replace("amd64", "arm64"), "linux/arm64"),
        (
            image(),
            &MACHINE.replace("\"version\":1", "\"version\":3"),
            "version 3",
        ),
        (image(), &MACHINE.replace("hvc0", "a\\nb"), "command line"),
        (image(), &long, "command line"),
        (image(), &two, "2 disks"),
        (image(), "{}", "config is none"),
    ] {
        let error = recipe_of(&image, &Config::default(), &[machine]).unwrap_err();
        assert!(error.contains(part) && !error.contains('\n'), "{part}: {error}");
    }
    let mut huge = image();
    huge.layers[1].size = BOOT_FILE_MAX + 1;
    assert!(
        recipe_of(&huge, &Config::default(), &[MACHINE])
            .unwrap_err()
            .contains("kernel or initrd")
    );
    let mut empty = image();
    empty.layers[1].size = 0;
    assert!(
        recipe_of(&empty, &Config::default(), &[MACHINE])
            .unwrap_err()
            .contains("empty")
    );
}
