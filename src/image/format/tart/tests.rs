use super::*;
use crate::image::digest::Digest;
use crate::image::format::Config;
use crate::image::format::fixture::{blob, manifest, pieces, recipe_of};
use crate::image::manifest::Manifest;

const MACHINE: &str = r#"{"version":1,"os":"linux","arch":"amd64","cpuCountMin":1,"cpuCount":4,"memorySizeMin":0,
    "memorySize":8589934592,"macAddress":"7e:00:00:00:00:01","display":{"width":1024,"height":768}}"#;

fn disk(packed: u64, size: &str) -> Descriptor {
    let content = Digest::of(size.as_bytes()).to_string();
    blob(DISK, packed, &[(SIZE, size), (CONTENT, &content)])
}

fn image(disks: &[(u64, &str)]) -> Manifest {
    let mut layers = vec![blob(CONFIG, 100, &[])];
    layers.extend(disks.iter().map(|&(packed, size)| disk(packed, size)));
    layers.push(blob(NVRAM, 50, &[]));
    manifest(layers)
}

fn refusal(manifest: &Manifest, machine: &str) -> String {
    recipe_of(manifest, &Config::default(), &[machine]).unwrap_err()
}

#[test]
fn a_disk_is_the_sum_of_its_pieces() {
    let recipe = recipe_of(
        &image(&[(10, "512"), (20, "1024"), (7, "3")]),
        &Config::default(),
        &[MACHINE],
    )
    .unwrap();
    assert_eq!(
        recipe.hints,
        Hints {
            memory: Some(8 << 30),
            cpus: Some(4),
            firmware: Some(Firmware::Uefi),
            ..Hints::default()
        }
    );
    let pieces = pieces(recipe);
    assert_eq!(
        pieces.files,
        [PlannedFile {
            name: "disk.raw",
            length: 1539
        }]
    );
    let places: Vec<_> = pieces
        .blobs
        .iter()
        .map(|blob| {
            let piece = &blob.pieces[0];
            assert_eq!(
                (blob.pieces.len(), piece.codec, piece.packed.start),
                (1, Codec::AppleLz4, 0)
            );
            (piece.packed.end, piece.at, piece.length, piece.digest)
        })
        .collect();
    let digest = |size: &str| Some(Digest::of(size.as_bytes()));
    assert_eq!(
        places,
        [
            (10, 0, 512, digest("512")),
            (20, 512, 1024, digest("1024")),
            (7, 1536, 3, digest("3"))
        ]
    );
}

#[test]
fn only_linux_guests_with_raw_disks_are_taken() {
    for (machine, part) in [
        (r#"{"version":1,"arch":"arm64"}"#, "macOS"),
        (r#"{"version":1,"os":"darwin","arch":"arm64"}"#, "macOS"),
        (r#"{"version":1,"os":"linux","arch":"arm64"}"#, "linux/arm64"),
        (
            r#"{"version":1,"os":"linux","arch":"amd64","diskFormat":"asif"}"#,
            "`asif`",
        ),
        (r#"{"version":2,"os":"linux","arch":"amd64"}"#, "version 2"),
        (r#"{"os":"linux","arch":"amd64"}"#, "none"),
        ("[]", "none"),
    ] {
        let error = refusal(&image(&[(10, "512")]), machine);
        assert!(error.contains(part), "{error}");
    }
    let mut config = Config::default();
    config.labels.insert(DISK_FORMAT.to_owned(), "asif".to_owned());
    let error = recipe_of(&image(&[(10, "512")]), &config, &[MACHINE]).unwrap_err();
    assert!(error.contains("`asif`"), "{error}");
}

#[test]
fn absurd_machines_are_no_wishes() {
    let machine = r#"{"version":1,"os":"linux","arch":"amd64","cpuCount":0,"memorySize":1}"#;
    let recipe = recipe_of(&image(&[(10, "512")]), &Config::default(), &[machine]).unwrap();
    assert_eq!((recipe.hints.memory, recipe.hints.cpus), (None, None));
}

#[test]
fn pieces_that_lie_are_refused() {
    let with = |name: &str, value: Option<&str>| {
        let mut image = image(&[(10, "512")]);
        let annotations = &mut image.layers[1].annotations;
        match value {
            Some(value) => annotations.insert(name.to_owned(), value.to_owned()),
            None => annotations.remove(name),
        };
        image
    };
    let mut total = image(&[(10, "512")]);
    total.annotations.insert(DISK_SIZE.to_owned(), "513".to_owned());
    let mut two_configs = image(&[(10, "512")]);
    two_configs.layers.push(blob(CONFIG, 1, &[]));
    let mut old = image(&[(10, "512")]);
    old.layers[1].media_type = OLD_DISK.to_owned();
    let mut strange = image(&[(10, "512")]);
    strange.layers.push(blob(
        "application/vnd.cirruslabs.tart.disk.asif.overlay.v1",
        1,
        &[],
    ));
    for (image, part) in [
        (with(SIZE, None), "no org.cirruslabs.tart.uncompressed-size"),
        (with(SIZE, Some("0")), "uncompressed-size"),
        (with(SIZE, Some("-1")), "uncompressed-size"),
        (with(SIZE, Some("+1")), "uncompressed-size"),
        (with(SIZE, Some("99999999999999999999999")), "uncompressed-size"),
        (with(CONTENT, None), "uncompressed-content-digest"),
        (with(CONTENT, Some("sha256:abc")), "uncompressed-content-digest"),
        (with(SIZE, Some("1073741825")), "too large"),
        (
            self::image(&[(10, "18446744073709551615"), (10, "18446744073709551615")]),
            "too large",
        ),
        (self::image(&[]), "at least one disk layer"),
        (total, "uncompressed-disk-size"),
        (two_configs, "exactly one config"),
        (old, "version 1"),
        (strange, "asif.overlay"),
    ] {
        let error = refusal(&image, MACHINE);
        assert!(error.contains(part) && !error.contains('\n'), "{part}: {error}");
    }
}
