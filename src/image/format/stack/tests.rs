use std::path::Path;

use super::*;

fn raw(name: &str) -> Member {
    Member {
        name: Some(name.to_owned()),
        format: DiskFormat::Raw,
        backing: None,
    }
}

fn qcow2(name: &str) -> Member {
    Member {
        format: DiskFormat::Qcow2,
        ..raw(name)
    }
}

/// A qcow2 on another file, of which it says that it is a qcow2.
fn on(name: &str, below: &str) -> Member {
    saying(name, below, Said::Format(DiskFormat::Qcow2))
}

fn saying(name: &str, below: &str, format: Said) -> Member {
    let backing = Backing {
        name: Path::new(below).to_owned(),
        format,
    };
    Member {
        backing: Some(backing),
        ..qcow2(name)
    }
}

/// As gzip carries a name that is none of Latin-1.
fn unnamed(member: Member) -> Member {
    Member { name: None, ..member }
}

fn drive(disk: bool, name: &str) -> Drive {
    Drive {
        disk,
        name: name.to_owned(),
    }
}

#[test]
fn a_stack_is_found_from_its_top_whatever_the_order() {
    let says_raw = Said::Format(DiskFormat::Raw);
    for (members, expected) in [
        (vec![qcow2("a")], vec![0]),
        (vec![qcow2("a"), on("b", "a")], vec![1, 0]),
        (vec![qcow2("a"), on("b", "a"), on("c", "b")], vec![2, 1, 0]),
        (vec![on("c", "b"), qcow2("a"), on("b", "a")], vec![0, 2, 1]),
        (vec![raw("a"), saying("b", "a", says_raw)], vec![1, 0]),
        // Nobody says which format it has: what the check found counts.
        (vec![raw("a"), saying("b", "a", Said::Nothing)], vec![1, 0]),
        (vec![qcow2("a"), saying("b", "a", Said::Nothing)], vec![1, 0]),
        // What Python's gzip makes of names.
        (vec![qcow2("a"), on("b", "a.gz")], vec![1, 0]),
        (vec![qcow2("b\u{e4}se"), on("b", "b\u{e4}se")], vec![1, 0]),
        (
            vec![
                unnamed(qcow2("")),
                unnamed(on("", "\u{57fa}")),
                on("c", "\u{4e2d}"),
            ],
            vec![2, 1, 0],
        ),
    ] {
        assert_eq!(disk(&members, &[]), Ok(expected), "{members:?}");
    }
}

#[test]
fn what_is_in_another_drive_is_passed_over() {
    let drives = [drive(true, "b"), drive(false, "cd.iso"), drive(false, "floppy")];
    let files = [qcow2("a"), on("b", "a"), raw("cd.iso")];
    assert_eq!(disk(&files, &drives), Ok(vec![1, 0]));
    assert_eq!(disk(&[raw("disk"), raw("cd.iso")], &drives), Ok(vec![0]));
    // A file that is both is a disk.
    let both = [drive(true, "cd.iso"), drive(false, "cd.iso")];
    assert_eq!(
        disk(&[raw("disk"), raw("cd.iso")], &both).unwrap_err(),
        "nothing uses its file `disk`"
    );
}

#[test]
fn what_is_not_one_disk_is_refused_in_one_sentence() {
    let drives = [drive(true, "b"), drive(true, "c"), drive(false, "cd.iso")];
    let path = "its file `b` names its backing file by a path, `/etc/shadow`";
    let only_qemu = "its file `b` names its backing file in a way that only QEMU understands, `json:{}`";
    for (members, part) in [
        (vec![qcow2("a"), on("b", "/etc/shadow")], path),
        (vec![qcow2("a"), on("b", "../a")], "by a path, `../a`"),
        (vec![qcow2("a"), on("b", "./a")], "by a path, `./a`"),
        (vec![qcow2("a"), on("b", "json:{}")], only_qemu),
        (vec![qcow2("a"), on("b", "nbd://h/a")], "only QEMU understands"),
        (vec![qcow2("a"), on("b", "file:a")], "only QEMU understands"),
        (
            vec![qcow2("a"), on("b", "lost")],
            "its file `b` lies on `lost`, which is not in the image",
        ),
        (vec![qcow2("a"), on("b", "")], "which is not in the image"),
        (vec![qcow2("a"), on("b", "\u{57fa}")], "which is not in the image"),
        (
            vec![qcow2("a"), qcow2("a"), on("b", "a")],
            "lies on `a`, and 2 of its files have that name",
        ),
        (
            vec![qcow2("a"), on("b", "a"), on("c", "a")],
            "its files `b` and `c` both lie on `a`, and a machine has one disk",
        ),
        (
            vec![on("a", "b"), on("b", "a")],
            "its file `a` lies on itself in a circle",
        ),
        (
            vec![qcow2("a"), on("b", "b")],
            "its file `b` lies on itself in a circle",
        ),
        (
            vec![qcow2("a"), on("b", "a"), on("x", "y"), on("y", "x")],
            "its file `x` lies on itself in a circle",
        ),
        (
            vec![qcow2("a"), on("b", "a"), qcow2("stray")],
            "nothing uses its file `stray`",
        ),
        (
            vec![qcow2("a"), on("b", "a"), qcow2("c")],
            "a machine has one disk, and it has 2: `b`, `c`",
        ),
        (vec![qcow2("x"), qcow2("y")], "and it has 2: `x`, `y`"),
        (
            vec![unnamed(qcow2("")), unnamed(qcow2(""))],
            "and it has 2: number 1, number 2",
        ),
        (
            vec![raw("cd.iso"), raw("cd.iso")],
            "it has no disk, but only `cd.iso`, `cd.iso`",
        ),
        (
            vec![raw("a"), on("b", "a")],
            "its file `a` should be a qcow2 and is none",
        ),
        (
            vec![qcow2("a"), saying("b", "a", Said::Format(DiskFormat::Raw))],
            "its file `a` should be raw and begins like a qcow2",
        ),
        (
            vec![qcow2("a"), saying("b", "a", Said::Foreign)],
            "its file `a` should be neither qcow2 nor raw",
        ),
    ] {
        let reason = disk(&members, &drives).unwrap_err();
        assert!(
            reason.contains(part) && !reason.contains('\n'),
            "{part}: {reason}"
        );
    }
    let mut bytes = on("b", "a");
    if let Some(backing) = &mut bytes.backing {
        use std::os::unix::ffi::OsStringExt as _;
        backing.name = std::ffi::OsString::from_vec(vec![0xff]).into();
    }
    assert!(
        disk(&[qcow2("a"), bytes], &[])
            .unwrap_err()
            .contains("is no text")
    );
}
