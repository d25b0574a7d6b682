//! A qcow2 file as a stream: its tables first, then the data in the guest's order.
//!
//! Which clusters hold data must be known before, one bit for each; so a disk of any size is written without a copy
//! of it and within little memory. Source: QEMU's `docs/interop/qcow2.txt`; version 3, clusters of 64 KiB, reference
//! counts of 16 bits, no compression (what carries the file is compressed).

use std::io::{self, Write};

use crate::image::view::Guest;

/// log₂ of a cluster's size.
const CLUSTER_BITS: u32 = 16;
/// A cluster, in bytes.
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// The same, for memory.
const CLUSTER_BYTES: usize = 1 << CLUSTER_BITS;
/// Entries of a table of the second level: 8 bytes each.
const L2_ENTRIES: u64 = CLUSTER / 8;
/// Reference counts in a block: 2 bytes each.
const COUNTS: u64 = CLUSTER / 2;
/// An entry's cluster is used once, so that it may be written to in place.
const COPIED: u64 = 1 << 63;

/// Compared with, byte for byte, by the quickest way there is.
static ZEROS: [u8; CLUSTER_BYTES] = [0; CLUSTER_BYTES];

/// Where everything will stand in the file.
#[derive(Debug)]
pub(super) struct Plan {
    virtual_size: u64,
    /// One bit for each cluster of the guest: does it hold data?
    used: Vec<u64>,
    /// Clusters of the file, by their part.
    count_table: u64,
    count_blocks: u64,
    l1: u64,
    l2: u64,
    data: u64,
}

impl Plan {
    /// Looks through the disk once: clusters that are holes or all zeros take no room.
    pub(super) fn of(disk: &dyn Guest) -> io::Result<Self> {
        let mut used = Bits::new(disk.size().div_ceil(CLUSTER));
        let mut buffer = vec![0; 1 << 20];
        let mut at = 0;
        while let Some(extent) = disk.next_data(at..disk.size())? {
            // Whole clusters, so that none is looked at in halves.
            let mut offset = extent.start / CLUSTER * CLUSTER;
            while offset < extent.end {
                let take = (disk.size() - offset).min(buffer.len() as u64);
                let piece = &mut buffer[..usize::try_from(take).unwrap_or_default()];
                disk.read(piece, offset)?;
                for (number, cluster) in piece.chunks(CLUSTER_BYTES).enumerate() {
                    if cluster != &ZEROS[..cluster.len()] {
                        used.set(offset / CLUSTER + number as u64);
                    }
                }
                offset += take;
            }
            at = offset;
        }
        Ok(Self::lay_out(disk.size(), used))
    }

    fn lay_out(virtual_size: u64, used: Bits) -> Self {
        let guest = virtual_size.div_ceil(CLUSTER);
        let data = used.count(0, guest);
        let tables = guest.div_ceil(L2_ENTRIES);
        let l2 = (0..tables)
            .filter(|table| used.count(table * L2_ENTRIES, guest.min((table + 1) * L2_ENTRIES)) > 0)
            .count() as u64;
        // A disk of no bytes has a table all the same.
        let l1 = (tables * 8).div_ceil(CLUSTER).max(1);
        let (mut count_table, mut count_blocks) = (1, 1);
        // Counts are counted themselves; both numbers only grow, so this ends.
        loop {
            let all = 1 + count_table + count_blocks + l1 + l2 + data;
            let blocks = all.div_ceil(COUNTS);
            let table = (blocks * 8).div_ceil(CLUSTER);
            if (blocks, table) == (count_blocks, count_table) {
                break;
            }
            (count_blocks, count_table) = (blocks, table);
        }
        Self {
            virtual_size,
            used: used.0,
            count_table,
            count_blocks,
            l1,
            l2,
            data,
        }
    }

    fn clusters(&self) -> u64 {
        1 + self.count_table + self.count_blocks + self.l1 + self.l2 + self.data
    }

    /// The file's length, in bytes.
    pub(super) fn length(&self) -> u64 {
        self.clusters() * CLUSTER
    }

    /// Writes the file. `disk` is the one that the plan was made of.
    pub(super) fn write(&self, disk: &dyn Guest, out: &mut dyn Write) -> io::Result<()> {
        self.tables(out)?;
        let used = Bits(self.used.clone());
        let guest = self.virtual_size.div_ceil(CLUSTER);
        let mut buffer = vec![0; CLUSTER_BYTES];
        for cluster in (0..guest).filter(|cluster| used.get(*cluster)) {
            let offset = cluster * CLUSTER;
            let take = usize::try_from((self.virtual_size - offset).min(CLUSTER)).unwrap_or_default();
            disk.read(&mut buffer[..take], offset)?;
            buffer[take..].fill(0);
            out.write_all(&buffer)?;
        }
        Ok(())
    }

    fn tables(&self, out: &mut dyn Write) -> io::Result<()> {
        let count_table_at = CLUSTER;
        let count_blocks_at = count_table_at + self.count_table * CLUSTER;
        let l1_at = count_blocks_at + self.count_blocks * CLUSTER;
        let l2_at = l1_at + self.l1 * CLUSTER;
        let data_at = l2_at + self.l2 * CLUSTER;
        let guest = self.virtual_size.div_ceil(CLUSTER);
        let l1_entries = guest.div_ceil(L2_ENTRIES);
        let narrow = |number: u64| {
            u32::try_from(number).map_err(|_| io::Error::other("the disk is too large for a qcow2"))
        };

        let mut table = Table::new(out);
        for word in [
            u32::from_be_bytes(*b"QFI\xfb"),
            3,
            // No backing file: its offset (two words) and length.
            0,
            0,
            0,
            CLUSTER_BITS,
        ] {
            table.put(&word.to_be_bytes())?;
        }
        table.put(&self.virtual_size.to_be_bytes())?;
        table.put(&0_u32.to_be_bytes())?; // not encrypted
        table.put(&narrow(l1_entries)?.to_be_bytes())?;
        table.put(&l1_at.to_be_bytes())?;
        table.put(&count_table_at.to_be_bytes())?;
        table.put(&narrow(self.count_table)?.to_be_bytes())?;
        table.put(&[0; 12])?; // no snapshots: their number and offset
        table.put(&[0; 24])?; // no features: incompatible, compatible, autoclear
        table.put(&4_u32.to_be_bytes())?; // counts of 2⁴ bits
        table.put(&104_u32.to_be_bytes())?; // the header's length
        table.end()?;

        for block in 0..self.count_blocks {
            table.put(&(count_blocks_at + block * CLUSTER).to_be_bytes())?;
        }
        table.end()?;
        for _ in 0..self.clusters() {
            table.put(&1_u16.to_be_bytes())?;
        }
        table.end()?;

        let used = Bits(self.used.clone());
        let range = |number: u64| number * L2_ENTRIES..guest.min((number + 1) * L2_ENTRIES);
        let mut next = l2_at;
        for number in 0..l1_entries {
            let entry = if used.count(range(number).start, range(number).end) > 0 {
                next += CLUSTER;
                (next - CLUSTER) | COPIED
            } else {
                0
            };
            table.put(&entry.to_be_bytes())?;
        }
        if l1_entries == 0 {
            table.put(&[0; 8])?;
        }
        table.end()?;
        let mut next = data_at;
        for number in 0..l1_entries {
            if used.count(range(number).start, range(number).end) == 0 {
                continue;
            }
            for cluster in range(number) {
                let entry = if used.get(cluster) {
                    next += CLUSTER;
                    (next - CLUSTER) | COPIED
                } else {
                    0
                };
                table.put(&entry.to_be_bytes())?;
            }
            table.end()?;
        }
        Ok(())
    }
}

/// A part of the file, padded with zeros to whole clusters.
struct Table<'a> {
    out: &'a mut dyn Write,
    buffer: Vec<u8>,
}

impl<'a> Table<'a> {
    fn new(out: &'a mut dyn Write) -> Self {
        Self {
            out,
            buffer: Vec::with_capacity(CLUSTER_BYTES),
        }
    }

    /// Adds an entry; none crosses a cluster's border, since all sizes are powers of two (and the header is short).
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() as u64 == CLUSTER {
            self.out.write_all(&self.buffer)?;
            self.buffer.clear();
        }
        Ok(())
    }

    fn end(&mut self) -> io::Result<()> {
        if !self.buffer.is_empty() {
            self.buffer.resize(CLUSTER_BYTES, 0);
            self.out.write_all(&self.buffer)?;
            self.buffer.clear();
        }
        Ok(())
    }
}

/// A row of bits.
struct Bits(Vec<u64>);

impl Bits {
    fn new(length: u64) -> Self {
        Self(vec![0; usize::try_from(length.div_ceil(64)).unwrap_or_default()])
    }

    fn place(at: u64) -> (usize, u64) {
        (usize::try_from(at / 64).unwrap_or(usize::MAX), 1 << (at % 64))
    }

    fn set(&mut self, at: u64) {
        let (word, bit) = Self::place(at);
        if let Some(word) = self.0.get_mut(word) {
            *word |= bit;
        }
    }

    fn get(&self, at: u64) -> bool {
        let (word, bit) = Self::place(at);
        self.0.get(word).is_some_and(|word| word & bit != 0)
    }

    /// How many are set from `from` to `to`.
    fn count(&self, from: u64, to: u64) -> u64 {
        (from..to).filter(|at| self.get(*at)).count() as u64
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;
    use crate::image::inspect;

    fn written(disk: &[u8]) -> Vec<u8> {
        let plan = Plan::of(&disk).unwrap();
        let mut file = Vec::new();
        plan.write(&disk, &mut file).unwrap();
        assert_eq!(file.len() as u64, plan.length());
        file
    }

    /// The guest's bytes of a file that [`Plan::write`] made, read by its tables.
    fn read(file: &[u8]) -> Vec<u8> {
        let be64 = |at: usize| u64::from_be_bytes(file[at..at + 8].try_into().unwrap());
        let at = |offset: u64| usize::try_from(offset & !COPIED).unwrap();
        let size = at(be64(24));
        let mut disk = vec![0; size];
        for (number, piece) in disk.chunks_mut(CLUSTER_BYTES).enumerate() {
            let l2 = at(be64(at(be64(40)) + number / (CLUSTER_BYTES / 8) * 8));
            if l2 != 0 {
                let data = at(be64(l2 + number % (CLUSTER_BYTES / 8) * 8));
                if data != 0 {
                    piece.copy_from_slice(&file[data..data + piece.len()]);
                }
            }
        }
        disk
    }

    #[test]
    fn zeros_take_no_clusters() {
        let mut disk = vec![0; 1 << 30];
        disk[700 << 20] = 1;
        // Header, table of counts, block of counts, first and second level, and one cluster of data.
        assert_eq!(written(&disk).len() as u64, 6 * CLUSTER);
        assert_eq!(written(&[]).len() as u64, 4 * CLUSTER);
    }

    #[test]
    #[ignore = "needs qemu-img"]
    fn qemu_finds_nothing_to_mend_in_what_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let [raw, qcow2] = ["disk.raw", "disk.qcow2"].map(|name| dir.path().join(name));
        let mut disk = vec![0; (600 << 20) + 512];
        for at in [
            0,
            4097,
            65_536,
            100 << 20,
            (512 << 20) - 1,
            512 << 20,
            (600 << 20) + 511,
        ] {
            disk[at] = 0x5a;
        }
        std::fs::write(&raw, &disk).unwrap();
        std::fs::write(&qcow2, written(&disk)).unwrap();
        for arguments in [
            &["check", "-q", "-f", "qcow2"][..],
            &["compare", "-q", "-f", "qcow2", "-F", "raw"],
        ] {
            let mut tool = Command::new("qemu-img");
            tool.args(arguments).arg(&qcow2);
            if arguments[0] == "compare" {
                tool.arg(&raw);
            }
            assert!(tool.status().unwrap().success(), "{arguments:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn what_is_written_passes_our_own_check_and_reads_back(
            sectors in 1_usize..4000,
            spots in prop::collection::vec((any::<prop::sample::Index>(), 1_u8..), 0..8),
        ) {
            let mut disk = vec![0; sectors * 512];
            for (at, value) in spots {
                let at = at.index(disk.len());
                disk[at] = value;
            }
            let file = written(&disk);
            prop_assert!(read(&file) == disk);
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("disk");
            std::fs::write(&path, &file).unwrap();
            let seen = inspect::disk(&path, 1 << 40, "x").unwrap();
            prop_assert_eq!(seen.virtual_size, disk.len() as u64);
        }
    }
}
