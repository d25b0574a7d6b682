use std::process::Command;

use proptest::prelude::*;

use super::super::{DiskFormat, Inspected};
use super::*;

const LIMIT: u64 = 1 << 40;

/// A small and valid file as `qemu-img create` lays it out, with two second-level tables: clusters of
/// 512 bytes, 64 KiB of disk.
fn valid() -> Vec<u8> {
    let mut file = vec![0; 512 * 8];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &MAGIC);
    put(4, &3_u32.to_be_bytes());
    put(20, &9_u32.to_be_bytes());
    put(24, &65536_u64.to_be_bytes());
    put(36, &2_u32.to_be_bytes());
    put(40, &1536_u64.to_be_bytes());
    put(48, &512_u64.to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    put(512, &1024_u64.to_be_bytes());
    put(1536, &(2048 | 1_u64 << 63).to_be_bytes());
    put(1544, &(2560 | 1_u64 << 63).to_be_bytes());
    file
}

fn changed(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut file = valid();
    file[at..at + bytes.len()].copy_from_slice(bytes);
    file
}

fn class(file: &[u8]) -> Hostility {
    match check(&file, LIMIT) {
        Err(Finding::Hostile(class)) => class,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_plain_file_passes() {
    assert_eq!(check(&valid().as_slice(), LIMIT).unwrap(), 65536);
    assert!(matches!(
        check(&valid().as_slice(), 65535),
        Err(Finding::TooLarge(65536))
    ));
    // A version 2 header is shorter, and what follows it are extensions.
    let mut v2 = changed(4, &2_u32.to_be_bytes());
    v2[72..112].fill(0);
    assert_eq!(check(&v2.as_slice(), LIMIT).unwrap(), 65536);
}

#[test]
fn every_class_is_refused_by_its_name() {
    use Hostility as H;
    let be = |n: u64| n.to_be_bytes();
    let extension = |kind: u32, size: u32| [kind.to_be_bytes(), size.to_be_bytes()].concat();
    for (file, expected) in [
        (changed(4, &[0, 0, 0, 1]), H::ForeignFormat("qcow (version 1)")),
        (
            changed(4, &[0, 0, 0, 4]),
            H::Impossible("version of the qcow2 format"),
        ),
        (valid()[..90].to_vec(), H::TableOutside("header")),
        (changed(8, &be(256)), H::BackingFile),
        (changed(16, &[0, 0, 0, 9]), H::BackingFile),
        (
            changed(104, &extension(EXTENSION_BACKING_FORMAT, 3)),
            H::BackingFile,
        ),
        (changed(72, &be(DATA_FILE)), H::DataFile),
        (changed(88, &be(RAW_DATA_FILE)), H::DataFile),
        (changed(104, &extension(EXTENSION_DATA_FILE, 11)), H::DataFile),
        (changed(32, &[0, 0, 0, 1]), H::Encrypted),
        (changed(32, &[0, 0, 0, 2]), H::Encrypted),
        (changed(104, &extension(EXTENSION_ENCRYPTION, 16)), H::Encrypted),
        (changed(72, &be(1 << 5)), H::UnknownFeature(32)),
        (changed(72, &be(1 << 63)), H::UnknownFeature(1 << 63)),
        (changed(72, &be(DIRTY)), H::Unclean("dirty")),
        (changed(72, &be(CORRUPT)), H::Unclean("corrupt")),
        (
            changed(104, &extension(EXTENSION_BITMAPS, 24)),
            H::Unclean("carrying dirty bitmaps"),
        ),
        (changed(72, &be(EXTENDED_L2)), H::Impossible("cluster size")),
        (changed(20, &[0, 0, 0, 8]), H::Impossible("cluster size")),
        (changed(20, &[0, 0, 0, 22]), H::Impossible("cluster size")),
        (changed(20, &[255; 4]), H::Impossible("cluster size")),
        (
            changed(72, &be(COMPRESSION_TYPE)),
            H::Impossible("compression type"),
        ),
        (changed(100, &[0, 0, 0, 96]), H::Impossible("header length")),
        (changed(100, &[255; 4]), H::Impossible("header length")),
        (
            changed(96, &[0, 0, 0, 7]),
            H::Impossible("width of its reference counts"),
        ),
        (changed(24, &be(0)), H::Impossible("virtual size")),
        (changed(24, &be(65535)), H::Impossible("virtual size")),
        (
            changed(24, &be(1 << 30)),
            H::Impossible("size of its first-level table"),
        ),
        (
            changed(36, &[255; 4]),
            H::Impossible("size of its first-level table"),
        ),
        (
            changed(56, &[0; 4]),
            H::Impossible("size of its reference count table"),
        ),
        (
            changed(56, &[255; 4]),
            H::Impossible("size of its reference count table"),
        ),
        (changed(60, &[255; 4]), H::Impossible("number of snapshots")),
        (changed(40, &be(1 << 40)), H::TableOutside("first-level table")),
        (changed(40, &be(0)), H::TableOutside("first-level table")),
        (
            changed(40, &be(u64::MAX - 511)),
            H::TableOutside("first-level table"),
        ),
        (changed(40, &be(1537)), H::Impossible("place of a table")),
        (
            changed(48, &be(1 << 40)),
            H::TableOutside("reference count table"),
        ),
        (changed(1536, &be(1 << 40)), H::TableOutside("second-level table")),
        (
            changed(1536, &be(2048 | 1)),
            H::Impossible("entry in its first-level table"),
        ),
        (changed(512, &be(4096)), H::TableOutside("reference count block")),
        (changed(512, &be(1025)), H::Impossible("place of a table")),
        (
            changed(104, &extension(0x1234_5678, 500)),
            H::TableOutside("header extension"),
        ),
        // Overlaps: two second-level tables in one place, a table on the header, on another table.
        (changed(1544, &be(2048)), H::TablesOverlap),
        (changed(48, &be(2048)), H::TablesOverlap),
        (changed(1536, &be(1536)), H::TablesOverlap),
        (changed(512, &be(2048)), H::TablesOverlap),
    ] {
        assert_eq!(class(&file), expected);
    }
    let mut snapshot = changed(60, &[0, 0, 0, 1]);
    snapshot[64..72].copy_from_slice(&be(4096));
    assert_eq!(class(&snapshot), H::TableOutside("snapshot table"));
    snapshot[64..72].copy_from_slice(&be(3072));
    snapshot[3072..3080].copy_from_slice(&be(1536));
    snapshot[3083] = 2;
    assert_eq!(
        class(&snapshot),
        H::TablesOverlap,
        "a snapshot that shares the first-level table"
    );
    snapshot[3072..3080].copy_from_slice(&be(3584));
    assert_eq!(check(&snapshot.as_slice(), LIMIT).unwrap(), 65536);
}

#[test]
fn all_clusters_in_use_stay_cheap() {
    // The largest tables that pass the header check: both full of the same cluster.
    let tables = L1_MAX + REFCOUNT_TABLE_MAX;
    let mut file = vec![0; 512 + usize::try_from(tables).unwrap()];
    file[..512].copy_from_slice(&valid()[..512]);
    file[36..40].copy_from_slice(&u32::try_from(L1_MAX / 8).unwrap().to_be_bytes());
    file[40..48].copy_from_slice(&512_u64.to_be_bytes());
    file[48..56].copy_from_slice(&(512 + L1_MAX).to_be_bytes());
    file[56..60].copy_from_slice(&u32::try_from(REFCOUNT_TABLE_MAX / 512).unwrap().to_be_bytes());
    for entry in file[512..].chunks_exact_mut(8) {
        entry.copy_from_slice(&512_u64.to_be_bytes());
    }
    let start = std::time::Instant::now();
    assert_eq!(class(&file), Hostility::TablesOverlap);
    assert!(
        start.elapsed() < std::time::Duration::from_secs(20),
        "{:?}",
        start.elapsed()
    );
}

fn qemu_img(arguments: &[&str], dir: &std::path::Path) {
    let run = || {
        let mut command = Command::new("qemu-img");
        command.args(arguments).current_dir(dir).output().unwrap()
    };
    // It gives up a key where the clock of its processor time did not move while it was stretched, which another try may see.
    let output = std::iter::repeat_with(run)
        .take(20)
        .find(|output| !String::from_utf8_lossy(&output.stderr).contains("Unable to get accurate CPU usage"))
        .expect("a processor whose time is told");
    assert!(
        output.status.success(),
        "qemu-img {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
#[ignore = "needs qemu-img"]
fn what_qemu_img_writes_passes_and_its_dangerous_files_do_not() {
    let dir = tempfile::tempdir().unwrap();
    qemu_img(&["create", "-f", "raw", "base.raw", "3M"], dir.path());
    std::fs::write(dir.path().join("base.raw"), vec![7; 3 << 20]).unwrap();
    for (name, options) in [
        ("v2", "compat=0.10"),
        ("v3", "compat=1.1"),
        ("lazy", "lazy_refcounts=on"),
        ("zstd", "compression_type=zstd"),
        ("extended", "extended_l2=on,cluster_size=32k"),
        ("small", "cluster_size=512"),
        ("large", "cluster_size=2M"),
        ("refcounts", "refcount_bits=64"),
    ] {
        let empty = format!("{name}.empty");
        qemu_img(
            &["create", "-f", "qcow2", "-o", options, &empty, "10G"],
            dir.path(),
        );
        let full = format!("{name}.full");
        qemu_img(
            &["convert", "-O", "qcow2", "-o", options, "base.raw", &full],
            dir.path(),
        );
        for (file, size) in [(empty, 10 << 30), (full, 3 << 20)] {
            let file = std::fs::File::open(dir.path().join(&file)).unwrap();
            assert_eq!(
                super::super::check(&file, LIMIT).unwrap(),
                Inspected {
                    format: DiskFormat::Qcow2,
                    virtual_size: size
                },
                "{name}"
            );
        }
    }
    qemu_img(&["snapshot", "-c", "one", "v3.full"], dir.path());
    qemu_img(&["snapshot", "-c", "two", "v3.full"], dir.path());
    let snapshots = std::fs::File::open(dir.path().join("v3.full")).unwrap();
    assert_eq!(
        super::super::check(&snapshots, LIMIT).unwrap().virtual_size,
        3 << 20
    );
    let create = |options: &[&str]| {
        qemu_img(&[&["create", "-f", "qcow2"], options].concat(), dir.path());
        let file = std::fs::File::open(dir.path().join(options[options.len() - 2])).unwrap();
        match super::super::check(&file, LIMIT) {
            Err(Finding::Hostile(class)) => class,
            other => panic!("{options:?}: {other:?}"),
        }
    };
    assert_eq!(
        create(&["-F", "raw", "-b", "base.raw", "backed", "3M"]),
        Hostility::BackingFile
    );
    assert_eq!(
        create(&["-o", "data_file=data.raw", "external", "3M"]),
        Hostility::DataFile
    );
    assert_eq!(
        create(&[
            "--object",
            "secret,id=s,data=x",
            "-o",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1,encrypt.hash-alg=sha512",
            "luks",
            "3M"
        ]),
        Hostility::Encrypted
    );
    assert_eq!(
        create(&[
            "--object",
            "secret,id=s,data=x",
            "-o",
            "encrypt.format=aes,encrypt.key-secret=s",
            "aes",
            "3M"
        ]),
        Hostility::Encrypted
    );
    qemu_img(&["bitmap", "--add", "v3.empty", "b"], dir.path());
    let bitmaps = std::fs::File::open(dir.path().join("v3.empty")).unwrap();
    assert!(super::super::check(&bitmaps, LIMIT).is_err());
}

proptest! {
    #[test]
    fn no_mutation_makes_it_panic(changes in prop::collection::vec((0_usize..4096, any::<u8>()), 1..12), cut in 0_usize..4096) {
        let mut file = valid();
        for (at, byte) in changes {
            file[at] = byte;
        }
        drop(super::super::check(&file.as_slice(), LIMIT));
        drop(super::super::check(&&file[..cut], LIMIT));
    }
}
