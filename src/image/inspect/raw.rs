//! A raw disk is anything that is nothing else.

use super::{Finding, Hostility, ReadAt};

/// Bytes at the start that are compared with magic numbers.
const HEAD: u64 = 512;

/// A sector; the size of every disk is a multiple of it.
const SECTOR: u64 = 512;

/// Formats by their first bytes: all that QEMU would recognise by itself, and packed files that somebody
/// forgot to unpack.
const FOREIGN: [(&[u8], &str); 23] = [
    (b"KDMV", "vmdk"),
    (b"COWD", "vmdk"),
    (b"# Disk DescriptorFile", "vmdk"),
    (b"vhdxfile", "vhdx"),
    (b"conectix", "vhd"),
    (b"QED\0", "qed"),
    (b"<<< ", "vdi"),
    (b"WithoutFreeSpace", "parallels"),
    (b"WithouFreSpacExt", "parallels"),
    (b"Bochs Virtual HD Image", "bochs"),
    (b"#!/bin/sh\n#V2.0 Format", "cloop"),
    (b"OOOM", "cow"),
    (b"shdw", "asif"),
    (b"json:", "a QEMU file description"),
    (b"bv41", "Apple's lz4"),
    (b"bv4-", "Apple's lz4"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\0", "xz"),
    (b"7z\xbc\xaf", "7z"),
    (b"PK\x03\x04", "zip"),
    (b"BZh", "bzip2"),
];

/// Where VDI has its magic number, and the number as it stands in the file.
const VDI: (usize, [u8; 4]) = (64, [0x7f, 0x10, 0xda, 0xbe]);

/// Checks a disk without a qcow2's magic number; its virtual size in bytes.
pub(super) fn check(disk: &impl ReadAt, limit: u64) -> Result<u64, Finding> {
    let length = disk.length()?;
    let mut head = vec![0; usize::try_from(length.min(HEAD)).unwrap_or_default()];
    disk.fill(&mut head, 0)?;
    for (magic, name) in FOREIGN {
        if head.starts_with(magic) {
            return Err(Hostility::ForeignFormat(name).into());
        }
    }
    if is_vmdk_text(&head) {
        return Err(Hostility::ForeignFormat("vmdk").into());
    }
    if head.starts_with(b"LUKS\xba\xbe") {
        return Err(Hostility::Encrypted.into());
    }
    let swapped: Vec<u8> = VDI.1.iter().rev().copied().collect();
    if head
        .get(VDI.0..VDI.0 + 4)
        .is_some_and(|bytes| bytes == VDI.1 || bytes == swapped)
    {
        return Err(Hostility::ForeignFormat("vdi").into());
    }
    // Formats with a trailer instead of a header: fixed VHDs and Apple's disk images.
    if length >= SECTOR {
        let mut tail = [0; 8];
        disk.fill(&mut tail, length - SECTOR)?;
        if tail == *b"conectix" {
            return Err(Hostility::ForeignFormat("vhd").into());
        }
        if tail.starts_with(b"koly") {
            return Err(Hostility::ForeignFormat("dmg").into());
        }
    }
    if length == 0 || length % SECTOR != 0 {
        return Err(
            Hostility::Impossible("size: a raw disk is one or more whole sectors of 512 bytes").into(),
        );
    }
    if length > limit {
        return Err(Finding::TooLarge(length));
    }
    Ok(length)
}

/// Would QEMU take this for the text of a vmdk, which names other files? Comments and empty lines, and then a version.
fn is_vmdk_text(head: &[u8]) -> bool {
    if !head.starts_with(b"#") && !head.starts_with(b"version=") {
        return false;
    }
    head.split(|&byte| byte == b'\n')
        .find(|line| !line.starts_with(b"#") && line.iter().any(|&byte| !matches!(byte, b' ' | b'\r')))
        .is_some_and(|line| line.starts_with(b"version="))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(at: usize, bytes: &[u8]) -> Vec<u8> {
        let mut disk = vec![0; 4096];
        disk[at..at + bytes.len()].copy_from_slice(bytes);
        disk
    }

    #[test]
    fn whole_sectors_are_a_disk() {
        let boot_sector = with(510, &[0x55, 0xaa]);
        assert_eq!(check(&boot_sector.as_slice(), 1 << 20).unwrap(), 4096);
        assert!(matches!(
            check(&boot_sector.as_slice(), 4095),
            Err(Finding::TooLarge(4096))
        ));
        for size in [0, 1, 511, 513] {
            let disk = vec![0; size];
            assert!(
                matches!(
                    check(&disk.as_slice(), 1 << 20),
                    Err(Finding::Hostile(Hostility::Impossible(_)))
                ),
                "{size}"
            );
        }
    }

    #[test]
    fn every_other_format_is_named() {
        for (magic, name) in FOREIGN {
            let disk = with(0, magic);
            match check(&disk.as_slice(), 1 << 20) {
                Err(Finding::Hostile(Hostility::ForeignFormat(found))) => assert_eq!(found, name),
                other => panic!("{name}: {other:?}"),
            }
        }
        for (at, magic) in [
            (64, &VDI.1[..]),
            (64, &[0xbe, 0xda, 0x10, 0x7f]),
            (4096 - 512, b"conectix"),
            (4096 - 512, b"koly"),
        ] {
            let disk = with(at, magic);
            assert!(
                matches!(
                    check(&disk.as_slice(), 1 << 20),
                    Err(Finding::Hostile(Hostility::ForeignFormat(_)))
                ),
                "{magic:?}"
            );
        }
        for text in [
            "# Disk DescriptorFile\nversion=1\n",
            "# x\n \r\n\nversion=2\r\n",
            "version=1\n",
        ] {
            let disk = with(0, text.as_bytes());
            let found = check(&disk.as_slice(), 1 << 20);
            assert!(
                matches!(found, Err(Finding::Hostile(Hostility::ForeignFormat("vmdk")))),
                "{text}"
            );
        }
        // A script that is written on a disk as it is stays a raw disk.
        assert!(check(&with(0, b"#!/bin/sh\necho version=1\n").as_slice(), 1 << 20).is_ok());
        assert!(matches!(
            check(&with(0, b"LUKS\xba\xbe").as_slice(), 1 << 20),
            Err(Finding::Hostile(Hostility::Encrypted))
        ));
    }
}
