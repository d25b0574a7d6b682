//! The header and the tables of a qcow2, version 2 or 3.
//!
//! Source: QEMU's `docs/interop/qcow2.txt`. All numbers are big-endian. Only what QEMU reads when it opens a
//! file is checked; the mapping tables of the second level are data that a guest sees through and harm nobody
//! but itself.

use super::{Finding, Hostility, ReadAt};

pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Largest table of the first level, in bytes. QEMU allows 32 MiB; 4 MiB map 256 TiB with ordinary clusters.
const L1_MAX: u64 = 4 << 20;

/// Largest table of reference counts, in bytes. QEMU allows 8 MiB; 2 MiB count 512 TiB of ordinary clusters.
const REFCOUNT_TABLE_MAX: u64 = 2 << 20;

/// Most snapshots inside a file, far more than anybody publishes. QEMU allows 65536.
const SNAPSHOTS_MAX: u32 = 1024;

/// Incompatible features, as bits.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// Autoclear feature: the external data file can be read as raw.
const RAW_DATA_FILE: u64 = 1 << 1;

/// Header extensions that mean something to us.
const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;
const EXTENSION_ENCRYPTION: u32 = 0x0537_be77;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;

/// Where an entry of a first-level table has its offset, and which of its bits must be zero.
const L1_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;

/// The fields of the header that are looked at.
struct Header {
    version: u32,
    backing_offset: u64,
    backing_size: u32,
    cluster_bits: u32,
    size: u64,
    crypt_method: u32,
    l1_entries: u32,
    l1_offset: u64,
    refcount_offset: u64,
    refcount_clusters: u32,
    snapshots: u32,
    snapshots_offset: u64,
    incompatible: u64,
    autoclear: u64,
    refcount_order: u32,
    header_length: u32,
    compression_type: u8,
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_be_bytes)
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..at + 8)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u64::from_be_bytes)
}

/// Reads the fields; `bytes` are the first 112 of the file (fewer when it is shorter).
fn header(bytes: &[u8]) -> Result<Header, Hostility> {
    let version = be32(bytes, 4);
    let v3 = match version {
        2 => false,
        3 => true,
        1 => return Err(Hostility::ForeignFormat("qcow (version 1)")),
        _ => return Err(Hostility::Impossible("version of the qcow2 format")),
    };
    if bytes.len() < if v3 { 104 } else { 72 } {
        return Err(Hostility::TableOutside("header"));
    }
    let header_length = if v3 { be32(bytes, 100) } else { 72 };
    Ok(Header {
        version,
        backing_offset: be64(bytes, 8),
        backing_size: be32(bytes, 16),
        cluster_bits: be32(bytes, 20),
        size: be64(bytes, 24),
        crypt_method: be32(bytes, 32),
        l1_entries: be32(bytes, 36),
        l1_offset: be64(bytes, 40),
        refcount_offset: be64(bytes, 48),
        refcount_clusters: be32(bytes, 56),
        snapshots: be32(bytes, 60),
        snapshots_offset: be64(bytes, 64),
        incompatible: if v3 { be64(bytes, 72) } else { 0 },
        autoclear: if v3 { be64(bytes, 88) } else { 0 },
        refcount_order: if v3 { be32(bytes, 96) } else { 4 },
        header_length,
        compression_type: if header_length > 104 {
            bytes.get(104).copied().unwrap_or_default()
        } else {
            0
        },
    })
}

impl Header {
    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// All that can be judged without the rest of the file; `limit` is the largest virtual size.
    fn check(&self, limit: u64) -> Result<(), Finding> {
        if self.backing_offset != 0 || self.backing_size != 0 {
            return Err(Hostility::BackingFile.into());
        }
        if self.incompatible & DATA_FILE != 0 || self.autoclear & RAW_DATA_FILE != 0 {
            return Err(Hostility::DataFile.into());
        }
        if self.crypt_method != 0 {
            return Err(Hostility::Encrypted.into());
        }
        let unknown = self.incompatible & !(DIRTY | CORRUPT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2);
        if unknown != 0 {
            return Err(Hostility::UnknownFeature(unknown).into());
        }
        if self.incompatible & CORRUPT != 0 {
            return Err(Hostility::Unclean("corrupt").into());
        }
        if self.incompatible & DIRTY != 0 {
            return Err(Hostility::Unclean("dirty").into());
        }
        if !(9..=21).contains(&self.cluster_bits)
            || (self.incompatible & EXTENDED_L2 != 0 && self.cluster_bits < 14)
        {
            return Err(Hostility::Impossible("cluster size").into());
        }
        if self.version == 3
            && (self.header_length < 104
                || !self.header_length.is_multiple_of(8)
                || u64::from(self.header_length) > self.cluster())
        {
            return Err(Hostility::Impossible("header length").into());
        }
        // 0 is deflate and 1 is zstd; the feature bit stands exactly when it is not deflate.
        if self.compression_type > 1
            || (self.compression_type != 0) != (self.incompatible & COMPRESSION_TYPE != 0)
        {
            return Err(Hostility::Impossible("compression type").into());
        }
        if self.refcount_order > 6 {
            return Err(Hostility::Impossible("width of its reference counts").into());
        }
        if self.size == 0 || !self.size.is_multiple_of(512) {
            return Err(Hostility::Impossible("virtual size").into());
        }
        if self.size > limit {
            return Err(Finding::TooLarge(self.size));
        }
        let entry = if self.incompatible & EXTENDED_L2 != 0 {
            16
        } else {
            8
        };
        let mapped_by_one = self.cluster() * (self.cluster() / entry);
        if self.size.div_ceil(mapped_by_one) > u64::from(self.l1_entries) {
            return Err(Hostility::Impossible("size of its first-level table").into());
        }
        if u64::from(self.l1_entries) * 8 > L1_MAX {
            return Err(Hostility::Impossible("size of its first-level table").into());
        }
        if self.refcount_clusters == 0
            || u64::from(self.refcount_clusters) << self.cluster_bits > REFCOUNT_TABLE_MAX
        {
            return Err(Hostility::Impossible("size of its reference count table").into());
        }
        if self.snapshots > SNAPSHOTS_MAX {
            return Err(Hostility::Impossible("number of snapshots").into());
        }
        Ok(())
    }
}

/// Pieces of the file that hold tables: they must lie in the file and share no byte.
struct Tables {
    /// Length of the file.
    length: u64,
    cluster: u64,
    /// Few of any length: start and end.
    fixed: Vec<(u64, u64)>,
    /// Many of one cluster each: their starts.
    clusters: Vec<u64>,
}

impl Tables {
    fn add(&mut self, name: &'static str, start: u64, bytes: u64) -> Result<(), Hostility> {
        if !start.is_multiple_of(self.cluster) {
            return Err(Hostility::Impossible("place of a table"));
        }
        match start.checked_add(bytes) {
            Some(end) if end <= self.length && start > 0 => self.fixed.push((start, end)),
            _ => return Err(Hostility::TableOutside(name)),
        }
        Ok(())
    }

    fn add_cluster(&mut self, name: &'static str, start: u64) -> Result<(), Hostility> {
        if !start.is_multiple_of(self.cluster) {
            return Err(Hostility::Impossible("place of a table"));
        }
        match start.checked_add(self.cluster) {
            Some(end) if end <= self.length => self.clusters.push(start),
            _ => return Err(Hostility::TableOutside(name)),
        }
        Ok(())
    }

    fn overlap(mut self) -> bool {
        self.fixed.sort_unstable();
        self.clusters.sort_unstable();
        let fixed = self.fixed.windows(2).any(|pair| pair[0].1 > pair[1].0);
        let clusters = self.clusters.windows(2).any(|pair| pair[0] == pair[1]);
        let mixed = self.fixed.iter().any(|&(start, end)| {
            let first_after = self.clusters.partition_point(|&at| at + self.cluster <= start);
            self.clusters.get(first_after).is_some_and(|&at| at < end)
        });
        fixed || clusters || mixed
    }
}

/// Checks a file that begins with [`MAGIC`]; its virtual size in bytes.
pub(super) fn check(disk: &impl ReadAt, limit: u64) -> Result<u64, Finding> {
    let length = disk.length()?;
    let mut bytes = [0; 112];
    let present = usize::try_from(length.min(112)).unwrap_or_default();
    disk.fill(&mut bytes[..present], 0)?;
    let header = header(&bytes[..present])?;
    header.check(limit)?;
    let cluster = header.cluster();
    let mut tables = Tables {
        length,
        cluster,
        fixed: vec![(0, cluster)],
        clusters: Vec::new(),
    };
    tables.add(
        "first-level table",
        header.l1_offset,
        u64::from(header.l1_entries) * 8,
    )?;
    let refcount_bytes = u64::from(header.refcount_clusters) * cluster;
    tables.add("reference count table", header.refcount_offset, refcount_bytes)?;
    extensions(disk, &header, length)?;
    snapshots(disk, &header, &mut tables)?;
    entries(disk, header.l1_offset, u64::from(header.l1_entries), |entry| {
        if entry & L1_RESERVED != 0 {
            return Err(Hostility::Impossible("entry in its first-level table"));
        }
        match entry & L1_OFFSET {
            0 => Ok(()),
            at => tables.add_cluster("second-level table", at),
        }
    })?;
    entries(
        disk,
        header.refcount_offset,
        refcount_bytes / 8,
        |entry| match entry {
            0 => Ok(()),
            at => tables.add_cluster("reference count block", at),
        },
    )?;
    if tables.overlap() {
        return Err(Hostility::TablesOverlap.into());
    }
    Ok(header.size)
}

/// Reads a table of 64-bit entries piece by piece.
fn entries(
    disk: &impl ReadAt,
    offset: u64,
    count: u64,
    mut each: impl FnMut(u64) -> Result<(), Hostility>,
) -> Result<(), Finding> {
    let mut buffer = vec![0; 64 * 1024];
    let (mut at, mut left) = (offset, count * 8);
    while left > 0 {
        let take = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        disk.fill(&mut buffer[..take], at)?;
        for entry in buffer[..take].chunks_exact(8) {
            each(be64(entry, 0))?;
        }
        at += take as u64;
        left -= take as u64;
    }
    Ok(())
}

/// Walks the header extensions, which fill the first cluster behind the header.
fn extensions(disk: &impl ReadAt, header: &Header, length: u64) -> Result<(), Finding> {
    let end = header.cluster().min(length);
    let mut at = u64::from(header.header_length);
    while at + 8 <= end {
        let mut head = [0; 8];
        disk.fill(&mut head, at)?;
        let size = u64::from(be32(&head, 4));
        match be32(&head, 0) {
            EXTENSION_END => return Ok(()),
            EXTENSION_BACKING_FORMAT => return Err(Hostility::BackingFile.into()),
            EXTENSION_DATA_FILE => return Err(Hostility::DataFile.into()),
            EXTENSION_ENCRYPTION => return Err(Hostility::Encrypted.into()),
            // Harmless by themselves, but their directory is one more table, and nobody publishes them.
            EXTENSION_BITMAPS => return Err(Hostility::Unclean("carrying dirty bitmaps").into()),
            _ if size > end - at - 8 => return Err(Hostility::TableOutside("header extension").into()),
            _ => at += 8 + size.next_multiple_of(8),
        }
    }
    Ok(())
}

/// Walks the table of snapshots inside the file.
fn snapshots(disk: &impl ReadAt, header: &Header, tables: &mut Tables) -> Result<(), Finding> {
    if header.snapshots == 0 {
        return Ok(());
    }
    const NAME: &str = "snapshot table";
    if !header.snapshots_offset.is_multiple_of(8) {
        return Err(Hostility::Impossible("place of a table").into());
    }
    let mut at = header.snapshots_offset;
    let mut end = at;
    for _ in 0..header.snapshots {
        let outside = || Finding::from(Hostility::TableOutside(NAME));
        if at.checked_add(40).is_none_or(|end| end > tables.length) {
            return Err(outside());
        }
        let mut entry = [0; 40];
        disk.fill(&mut entry, at)?;
        let extra = be32(&entry, 36);
        // QEMU knows 24 bytes of extra data and allows 1024.
        if extra > 1024 {
            return Err(Hostility::Impossible("snapshot").into());
        }
        let names = (be32(&entry, 12) >> 16) + (be32(&entry, 12) & 0xffff);
        end = at + 40 + u64::from(extra) + u64::from(names);
        if end > tables.length {
            return Err(outside());
        }
        // The last entry of a file may stand without its padding.
        at = end.next_multiple_of(8);
        let l1_bytes = u64::from(be32(&entry, 8)) * 8;
        if l1_bytes > L1_MAX {
            return Err(Hostility::Impossible("snapshot").into());
        }
        if l1_bytes > 0 {
            tables.add("first-level table of a snapshot", be64(&entry, 0), l1_bytes)?;
        }
    }
    tables.add(NAME, header.snapshots_offset, end - header.snapshots_offset)?;
    Ok(())
}

#[cfg(test)]
mod tests {
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

    /// What QEMU itself says, asked in a way that cannot open a second file.
    fn qemu_says(path: &std::path::Path) -> Option<serde_json::Value> {
        let output = Command::new("qemu-img")
            .args(["info", "-f", "qcow2", "--output=json"])
            .arg(path)
            .output()
            .expect("qemu-img is installed");
        output
            .status
            .success()
            .then(|| serde_json::from_slice(&output.stdout).unwrap())
    }

    fn qemu_img(arguments: &[&str], dir: &std::path::Path) {
        let output = Command::new("qemu-img")
            .args(arguments)
            .current_dir(dir)
            .output()
            .unwrap();
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
                "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1",
                "luks",
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

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(600) })]

        #[test]
        #[ignore = "needs qemu-img"]
        fn what_passes_is_seen_alike_by_qemu(changes in prop::collection::vec((0_usize..120, any::<u8>(), 512_usize..4096, any::<u8>()), 1..3)) {
            let mut file = valid();
            for (head, byte, body, other) in changes {
                file[head] = byte;
                file[body] = other;
            }
            file[..4].copy_from_slice(&MAGIC);
            if let Ok(size) = check(&file.as_slice(), LIMIT) {
                let dir = tempfile::tempdir().unwrap();
                let path = dir.path().join("disk");
                std::fs::write(&path, &file).unwrap();
                // QEMU may refuse what passes here; what it opens must be the same disk.
                if let Some(info) = qemu_says(&path) {
                    prop_assert_eq!(info["virtual-size"].as_u64(), Some(size));
                    prop_assert!(info.get("backing-filename").is_none());
                    prop_assert!(info["format-specific"]["data"].get("data-file").is_none());
                }
            }
        }
    }
}
