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
pub(super) const EXTENSION_END: u32 = 0;
pub(super) const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
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

pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_be_bytes)
}

pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
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
mod differential;
#[cfg(test)]
mod tests;
