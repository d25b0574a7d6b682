use proptest::prelude::*;

use super::*;

/// An entry's header with any name, also names that a decent writer refuses.
fn head(name: &str, kind: EntryType, size: u64) -> Vec<u8> {
    let mut header = Header::new_ustar();
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o444);
    header.set_cksum();
    header.as_bytes().to_vec()
}

fn body(bytes: &[u8]) -> Vec<u8> {
    let mut padded = bytes.to_vec();
    padded.resize(bytes.len().next_multiple_of(BLOCK), 0);
    padded
}

fn pax(records: &[(&str, &str)]) -> Vec<u8> {
    let mut data = String::new();
    for (key, value) in records {
        let bare = key.len() + value.len() + 3;
        let mut length = bare + 1;
        while length != bare + length.to_string().len() {
            length = bare + length.to_string().len();
        }
        data.push_str(&format!("{length} {key}={value}\n"));
    }
    [
        head("pax", EntryType::XHeader, data.len() as u64),
        body(data.as_bytes()),
    ]
    .concat()
}

fn read(archive: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, Error> {
    let mut archive = Archive::new(archive, "vm", u64::MAX);
    let mut entries = Vec::new();
    while let Some(entry) = archive.next()? {
        let mut bytes = Vec::new();
        archive
            .body()
            .read_to_end(&mut bytes)
            .map_err(|error| unreadable("vm", error))?;
        entries.push((entry, bytes));
    }
    Ok(entries)
}

fn paths(archive: &[u8]) -> Vec<String> {
    read(archive)
        .unwrap()
        .into_iter()
        .map(|(entry, _)| entry.path)
        .collect()
}

fn file(path: &str, bytes: &[u8]) -> (Entry, Vec<u8>) {
    let entry = Entry {
        path: path.into(),
        kind: Kind::File,
        size: bytes.len() as u64,
    };
    (entry, bytes.to_vec())
}

#[test]
fn entries_come_with_their_bytes() {
    let long = "d/".repeat(120) + "file";
    let archive = [
        head("./disk/", EntryType::Directory, 0),
        head("./disk/disk.img", EntryType::Regular, 700),
        body(&[7; 700]),
        pax(&[("path", &long), ("size", "3"), ("mtime", "1.5")]),
        head("short", EntryType::Regular, 0),
        body(b"abc"),
        head("././@LongLink", EntryType::GNULongName, 5),
        body(b"long\0"),
        head("shor", EntryType::Regular, 0),
        vec![0; 1024],
        b"rubbish behind the end is passed over".to_vec(),
    ]
    .concat();
    let entries = read(&archive).unwrap();
    assert_eq!(
        entries[0].0,
        Entry {
            path: "disk".into(),
            kind: Kind::Directory,
            size: 0
        }
    );
    assert_eq!(entries[1], file("disk/disk.img", &[7; 700]));
    assert_eq!(entries[2], file(&long, b"abc"));
    assert_eq!(entries[3], file("long", b""));
    assert_eq!(entries.len(), 4);
}

#[test]
fn what_other_writers_write_is_read() {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = Header::new_gnu();
    header.set_size(4);
    builder
        .append_data(&mut header, "x/".repeat(100) + "disk", &b"data"[..])
        .unwrap();
    let mut link = Header::new_gnu();
    link.set_entry_type(EntryType::Symlink);
    link.set_size(0);
    builder.append_link(&mut link, "bin", "usr/".repeat(60)).unwrap();
    let archive = builder.into_inner().unwrap();
    let entries = read(&archive).unwrap();
    assert_eq!(entries[0], file(&("x/".repeat(100) + "disk"), b"data"));
    assert_eq!(entries[1].0.kind, Kind::Link);
    // Neither the two empty blocks nor the last padding are needed.
    assert_eq!(paths(&head("a", EntryType::Regular, 0)), ["a"]);
    assert_eq!(
        paths(&[head("a", EntryType::Regular, 3), b"abc".to_vec()].concat()),
        ["a"]
    );
}

#[test]
fn names_that_leave_the_archive_are_refused() {
    for (name, absolute) in [
        ("/etc/passwd", true),
        ("../x", false),
        ("disk/../../x", false),
        ("a/..", false),
        ("..", false),
    ] {
        for archive in [
            head(name, EntryType::Regular, 0),
            [pax(&[("path", name)]), head("x", EntryType::Regular, 0)].concat(),
        ] {
            match read(&archive) {
                Err(Error::Hostile {
                    class: Hostility::AbsoluteName(_),
                    ..
                }) => assert!(absolute, "{name}"),
                Err(Error::Hostile {
                    class: Hostility::ParentName(_),
                    ..
                }) => assert!(!absolute, "{name}"),
                other => panic!("{name}: {other:?}"),
            }
        }
    }
}

#[test]
fn archives_that_can_be_read_in_two_ways_are_refused() {
    let after = [head("x", EntryType::Regular, 3), body(b"abc")].concat();
    for archive in [
        [pax(&[("size", "512")]), after.clone()].concat(),
        [pax(&[("size", "3"), ("size", "4")]), after.clone()].concat(),
        [pax(&[("path", "disk/a"), ("path", "disk/b")]), after.clone()].concat(),
        [
            head("long", EntryType::GNULongName, 8),
            body(b"other/b\0"),
            pax(&[("path", "disk/a")]),
            after.clone(),
        ]
        .concat(),
        [vec![0; 512], after.clone()].concat(),
        [head("x", EntryType::Symlink, 3), body(b"abc")].concat(),
        [
            head("g", EntryType::XGlobalHeader, 10),
            body(b"10 path=x\n"),
            after.clone(),
        ]
        .concat(),
        pax(&[("a", "b")]).repeat(6),
    ] {
        match read(&archive) {
            Err(Error::Hostile {
                class: Hostility::AmbiguousArchive(_),
                ..
            }) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn broken_and_huge_headers_are_refused() {
    let mut sum = head("x", EntryType::Regular, 0);
    sum[0] = b'y';
    for archive in [
        sum,
        head("x", EntryType::Regular, 0)[..300].to_vec(),
        head("x", EntryType::Regular, 600),
        head("x", EntryType::XHeader, 600),
        [head("p", EntryType::XHeader, 4), body(b"abcd")].concat(),
        [head("p", EntryType::XHeader, 9), body(b"99 a=b\n..")].concat(),
        [head("p", EntryType::XHeader, 7), body(b"0 a=bc\n")].concat(),
        [head("p", EntryType::XHeader, 10), body(b"+9 size=1\n")].concat(),
    ] {
        assert!(
            matches!(read(&archive), Err(Error::Malformed { .. })),
            "{:?}",
            read(&archive)
        );
    }
    let bomb = head("p", EntryType::XHeader, 5 << 30);
    assert!(matches!(read(&bomb), Err(Error::TooLarge { .. })));
}

/// The same bytes again and again.
struct Endless {
    piece: Vec<u8>,
    at: usize,
    given: u64,
}

impl Read for &mut Endless {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = &self.piece[self.at..];
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        self.at = (self.at + count) % self.piece.len();
        self.given += count as u64;
        Ok(count)
    }
}

#[test]
fn an_archive_of_headers_alone_has_an_end() {
    const IDLE: u64 = 1 << 20;
    let extension = [
        head("p", EntryType::XHeader, 100_000),
        body(&vec![0; 100_000]),
        head("x", EntryType::Regular, 0),
    ];
    for piece in [head("x", EntryType::Regular, 0), extension.concat()] {
        let mut endless = Endless {
            piece,
            at: 0,
            given: 0,
        };
        let mut archive = Archive::new(&mut endless, "vm", IDLE);
        let error = loop {
            if let Err(error) = archive.next() {
                break error;
            }
        };
        let bomb = Hostility::Bomb;
        assert!(matches!(error, Error::Hostile { class, .. } if class == bomb));
        assert!(endless.given <= IDLE + EXTENSION_MAX, "{}", endless.given);
    }
}

#[test]
fn sparse_files_are_told_apart_from_plain_ones() {
    let old = head("s", EntryType::GNUSparse, 0);
    let new = [
        pax(&[("GNU.sparse.major", "1")]),
        head("s", EntryType::Regular, 0),
    ]
    .concat();
    for archive in [old, new] {
        assert_eq!(read(&archive).unwrap()[0].0.kind, Kind::GnuSparse);
    }
}

#[test]
fn a_tar_is_known_by_its_first_header() {
    let tar = "application/vnd.oci.image.layer.v1.tar";
    assert!(begins(&head("x", EntryType::Regular, 0), "x/y"));
    assert!(begins(&[0; 512], tar));
    assert!(!begins(&[0; 512], "x/y"));
    assert!(!begins(&[1; 512], tar));
    assert!(!begins(b"short", tar));
}

proptest! {
    #[test]
    fn no_damage_makes_it_panic(changes in prop::collection::vec((0_usize..3072, any::<u8>()), 0..8), cut in 0_usize..3072) {
        let mut archive = [
            pax(&[("path", "disk/disk.img"), ("size", "3")]),
            head("x", EntryType::Regular, 0),
            body(b"abc"),
            head("y", EntryType::Symlink, 0),
            vec![0; 512],
        ].concat();
        for (at, byte) in changes {
            let end = archive.len() - 1;
            archive[at.min(end)] = byte;
        }
        archive.truncate(cut);
        drop(read(&archive));
    }
}
