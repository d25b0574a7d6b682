//! A raw disk is anything that is nothing else.

use super::{Finding, Hostility, ReadAt};

/// Bytes at the start that are compared with magic numbers.
const HEAD: u64 = 512;

/// A sector; the size of every disk is a multiple of it.
const SECTOR: u64 = 512;

/// Formats by their first bytes: all that QEMU would recognise by itself, and packed files that somebody
/// forgot to unpack.
const FOREIGN: [(&[u8], &str); 19] = [
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
    (b"json:", "a QEMU file description"),
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
        assert!(matches!(
            check(&with(0, b"LUKS\xba\xbe").as_slice(), 1 << 20),
            Err(Finding::Hostile(Hostility::Encrypted))
        ));
    }
}
