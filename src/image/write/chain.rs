//! A guest's view of a qcow2, with the files under it.
//!
//! Only files that passed the header check are opened, each with the format that the file above it names; nothing is
//! probed. What the tables of the second level say is bounded where it is used. Source: QEMU's `docs/interop/qcow2.txt`.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use flate2::{Decompress, FlushDecompress};

use super::disk::{Guest, Raw};
use crate::image::error::Error;
use crate::image::inspect::{self, DiskFormat};

/// Deepest chain that is followed. libvirt's snapshots of years stay below; a circle does not.
const DEPTH_MAX: usize = 64;

/// Bits of an entry of a second-level table.
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Sectors in which the length of a compressed cluster is counted, in bytes.
const SECTOR: u64 = 512;

/// Opens the topmost file of a chain, and what lies under it. `format` is what its owner says that it is.
pub(super) fn open(path: &Path, format: DiskFormat, limit: u64) -> Result<Box<dyn Guest + Send>, Error> {
    let mut layers = Vec::new();
    let mut next = Some((path.to_owned(), format));
    while let Some((path, format)) = next {
        let unusable = |reason: &str| Error::Unsupported {
            image: path.display().to_string(),
            reason: reason.to_owned(),
        };
        if layers.len() == DEPTH_MAX {
            return Err(unusable("it lies under 64 other files, or they lie in a circle"));
        }
        let (seen, backing) = inspect::layer(&path, limit, &path.display().to_string())?;
        if seen.format != format {
            return Err(unusable(match format {
                DiskFormat::Qcow2 => "it should be a qcow2 and is none",
                // A guest can write a header of its own into a raw disk.
                DiskFormat::Raw => {
                    "it should be raw and begins like a qcow2, so that nobody can tell which it is"
                }
            }));
        }
        next = match backing {
            None => None,
            Some(backing) => {
                let below = below(&path, &backing.name).ok_or_else(|| {
                    unusable("its backing file is named in a way that only QEMU understands")
                })?;
                let format = backing.format.ok_or_else(|| {
                    unusable("it does not say which format its backing file has; `qemu-img rebase -u -F` can tell it")
                })?;
                Some((below, format))
            }
        };
        layers.push((path, format));
    }
    let mut guest: Option<Box<dyn Guest + Send>> = None;
    for (path, format) in layers.into_iter().rev() {
        let opened: io::Result<Box<dyn Guest + Send>> = match format {
            DiskFormat::Raw => Raw::open(&path).map(|raw| Box::new(raw) as _),
            DiskFormat::Qcow2 => Qcow2::open(&path, guest.take()).map(|qcow2| Box::new(qcow2) as _),
        };
        guest = Some(opened.map_err(Error::storage(path))?);
    }
    guest.ok_or_else(|| Error::Storage {
        path: path.to_owned(),
        source: io::ErrorKind::NotFound.into(),
    })
}

/// The path of a backing file; none for what is no plain path (`json:…`, `nbd://…`).
fn below(layer: &Path, name: &Path) -> Option<PathBuf> {
    let text = name.to_str()?;
    let first = text.split('/').next().unwrap_or_default();
    if text.is_empty() || first.contains(':') {
        return None;
    }
    // Relative to the file that names it, as QEMU has it.
    Some(layer.parent().unwrap_or(Path::new(".")).join(name))
}

/// One file of the chain, with the next one under it.
struct Qcow2 {
    file: File,
    size: u64,
    cluster_bits: u32,
    /// Entries of the second level have a bitmap of 32 parts of their cluster.
    extended: bool,
    zstd: bool,
    l1: Vec<u64>,
    below: Option<Box<dyn Guest + Send>>,
    /// The table and the unpacked cluster that were used last: readers go forwards.
    last: Mutex<Last>,
}

#[derive(Default)]
struct Last {
    table: Option<(u64, Arc<Vec<u8>>)>,
    unpacked: Option<(u64, Arc<Vec<u8>>)>,
}

/// What a stretch of the guest's disk is in this file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Whatever lies below says.
    Absent,
    Zero,
    /// At this place of the file.
    Data(u64),
    /// A compressed cluster: its entry.
    Packed(u64),
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the qcow2 is damaged: {what}"),
    )
}

impl Qcow2 {
    /// Opens a file whose header was checked.
    fn open(path: &Path, below: Option<Box<dyn Guest + Send>>) -> io::Result<Self> {
        let file = File::open(path)?;
        let mut header = [0; 112];
        // A file of version 2 may be shorter than the newest header.
        let mut present = 0;
        while present < header.len() {
            match file.read_at(&mut header[present..], present as u64)? {
                0 => break,
                count => present += count,
            }
        }
        let be32 =
            |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let be64 = |at: usize| u64::from(be32(at)) << 32 | u64::from(be32(at + 4));
        let v3 = be32(4) == 3;
        let incompatible = if v3 { be64(72) } else { 0 };
        let mut table = vec![0; usize::try_from(be32(36)).unwrap_or_default() * 8];
        file.read_exact_at(&mut table, be64(40))?;
        Ok(Self {
            size: be64(24),
            cluster_bits: be32(20),
            extended: incompatible & (1 << 4) != 0,
            zstd: v3 && be32(100) > 104 && header[104] == 1,
            l1: table
                .chunks_exact(8)
                .map(|entry| u64::from_be_bytes(entry.try_into().unwrap_or_default()) & OFFSET)
                .collect(),
            file,
            below,
            last: Mutex::default(),
        })
    }

    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The least stretch that has a state of its own.
    fn unit(&self) -> u64 {
        if self.extended {
            self.cluster() / 32
        } else {
            self.cluster()
        }
    }

    /// What one table of the second level covers.
    fn span(&self) -> u64 {
        self.cluster() * (self.cluster() / if self.extended { 16 } else { 8 })
    }

    /// A table or cluster of the file; what lies behind its end is zeros, as QEMU reads it.
    fn piece(&self, offset: u64, length: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
        self.fill(&mut bytes, offset)?;
        Ok(bytes)
    }

    fn fill(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            match self.file.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => {
                    buffer[done..].fill(0);
                    return Ok(());
                }
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The state at a place, and where it ends at the latest (it may go on behind that).
    fn state(&self, at: u64) -> io::Result<(State, u64)> {
        let number = usize::try_from(at / self.span()).map_err(|_| damaged("its size"))?;
        let table_at = self.l1.get(number).copied().unwrap_or_default();
        if table_at == 0 {
            return Ok((State::Absent, (at / self.span() + 1) * self.span()));
        }
        let table = {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            match &last.table {
                Some((offset, table)) if *offset == table_at => Arc::clone(table),
                _ => {
                    let table = Arc::new(self.piece(table_at, self.cluster())?);
                    last.table = Some((table_at, Arc::clone(&table)));
                    table
                }
            }
        };
        let width = if self.extended { 16 } else { 8 };
        let index = usize::try_from(at % self.span() / self.cluster()).unwrap_or_default() * width;
        let word = |at: usize| {
            table
                .get(at..at + 8)
                .and_then(|bytes| bytes.try_into().ok())
                .map_or(0, u64::from_be_bytes)
        };
        let entry = word(index);
        let cluster_end = (at / self.cluster() + 1) * self.cluster();
        if entry & COMPRESSED != 0 {
            return Ok((State::Packed(entry), cluster_end));
        }
        let inside = at % self.cluster();
        let place = entry & OFFSET;
        if self.extended {
            let part = inside / self.unit();
            let bits = word(index + 8);
            let state = match (bits >> part & 1, bits >> (part + 32) & 1) {
                (1, 0) if place != 0 => State::Data(place + inside),
                (0, 1) => State::Zero,
                (0, 0) => State::Absent,
                _ => return Err(damaged("a part of a cluster is two things at once")),
            };
            return Ok((state, (at / self.unit() + 1) * self.unit()));
        }
        let state = match (entry & ZERO, place) {
            (ZERO, _) => State::Zero,
            (_, 0) => State::Absent,
            (_, place) => State::Data(place + inside),
        };
        Ok((state, cluster_end))
    }

    /// The cluster behind a compressed entry.
    fn unpack(&self, entry: u64) -> io::Result<Arc<Vec<u8>>> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((key, cluster)) = &last.unpacked
            && *key == entry
        {
            return Ok(Arc::clone(cluster));
        }
        let bits = 62 - (self.cluster_bits - 8);
        let offset = entry & ((1 << bits) - 1);
        let sectors = ((entry & (COMPRESSED - 1)) >> bits) + 1;
        let length = sectors * SECTOR - offset % SECTOR;
        // Never longer than the cluster and a sector, or it would not have been packed.
        if length > self.cluster() + 2 * SECTOR {
            return Err(damaged("a compressed cluster is longer than a plain one"));
        }
        let packed = self.piece(offset, length)?;
        let size = usize::try_from(self.cluster()).unwrap_or_default();
        let cluster = if self.zstd {
            unpack_zstd(&packed, size)?
        } else {
            unpack_deflate(&packed, size)?
        };
        let cluster = Arc::new(cluster);
        last.unpacked = Some((entry, Arc::clone(&cluster)));
        Ok(cluster)
    }

    fn read_below(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        let size = self.below.as_ref().map_or(0, |below| below.size());
        let there = usize::try_from(size.saturating_sub(at))
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        // A disk may be larger than the one under it.
        buffer[there..].fill(0);
        match &self.below {
            Some(below) if there > 0 => below.read(&mut buffer[..there], at),
            _ => Ok(()),
        }
    }
}

fn unpack_deflate(packed: &[u8], size: usize) -> io::Result<Vec<u8>> {
    let mut cluster = Vec::with_capacity(size);
    // Without zlib's header; what follows the data is not its.
    Decompress::new(false)
        .decompress_vec(packed, &mut cluster, FlushDecompress::Finish)
        .map_err(|_| damaged("a compressed cluster cannot be unpacked"))?;
    if cluster.len() != size {
        return Err(damaged("a compressed cluster is too short"));
    }
    Ok(cluster)
}

fn unpack_zstd(packed: &[u8], size: usize) -> io::Result<Vec<u8>> {
    use std::io::Read as _;
    let mut cluster = Vec::with_capacity(size);
    let decoder = zstd::stream::Decoder::with_buffer(packed)?.single_frame();
    decoder.take(size as u64).read_to_end(&mut cluster)?;
    if cluster.len() != size {
        return Err(damaged("a compressed cluster is too short"));
    }
    Ok(cluster)
}

impl Guest for Qcow2 {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut at = offset;
        let mut rest = buffer;
        while !rest.is_empty() {
            let (state, end) = self.state(at)?;
            let take = usize::try_from(end - at).unwrap_or(usize::MAX).min(rest.len());
            let (piece, after) = rest.split_at_mut(take);
            match state {
                State::Zero => piece.fill(0),
                State::Data(place) => self.fill(piece, place)?,
                State::Absent => self.read_below(piece, at)?,
                State::Packed(entry) => {
                    let cluster = self.unpack(entry)?;
                    let inside = usize::try_from(at % self.cluster()).unwrap_or_default();
                    piece.copy_from_slice(&cluster[inside..inside + take]);
                }
            }
            at += take as u64;
            rest = after;
        }
        Ok(())
    }

    fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        let mut at = from;
        let mut found: Option<Range<u64>> = None;
        while at < self.size {
            let (state, end) = self.state(at)?;
            let end = end.min(self.size);
            let data = match state {
                State::Data(_) | State::Packed(_) => Some(at..end),
                State::Zero => None,
                State::Absent => match &self.below {
                    Some(below) if at < below.size() => below
                        .next_data(at)?
                        .filter(|data| data.start < end)
                        .map(|data| data.start.max(at)..data.end.min(end)),
                    _ => None,
                },
            };
            match (&mut found, data) {
                (None, Some(data)) => {
                    at = data.end;
                    found = Some(data);
                }
                (Some(found), Some(data)) if data.start == found.end => {
                    at = data.end;
                    found.end = data.end;
                }
                (Some(_), _) => break,
                (None, None) => at = end,
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const LIMIT: u64 = 1 << 40;

    #[test]
    fn only_plain_paths_lead_below() {
        let below = |name: &str| below(Path::new("/vms/top.qcow2"), Path::new(name));
        assert_eq!(below("base.img").unwrap(), Path::new("/vms/base.img"));
        assert_eq!(below("/b/base.img").unwrap(), Path::new("/b/base.img"));
        assert_eq!(below("a/b:c").unwrap(), Path::new("/vms/a/b:c"));
        for name in ["json:{}", "nbd://x", "file:x", ""] {
            assert_eq!(below(name), None, "{name}");
        }
    }

    fn tool(arguments: &[&str], dir: &Path) {
        let status = Command::new("qemu-img").args(arguments).current_dir(dir).status();
        assert!(status.unwrap().success(), "{arguments:?}");
    }

    fn all(guest: &dyn Guest) -> Vec<u8> {
        let mut disk = vec![0; usize::try_from(guest.size()).unwrap()];
        let mut at = 0;
        while let Some(data) = guest.next_data(at).unwrap() {
            assert!(data.start >= at && data.end > data.start && data.end <= guest.size());
            let range = usize::try_from(data.start).unwrap()..usize::try_from(data.end).unwrap();
            guest.read(&mut disk[range], data.start).unwrap();
            at = data.end;
        }
        disk
    }

    /// Bytes that pack a little, with long stretches of zeros.
    fn content() -> Vec<u8> {
        let mut state = 7_u64;
        let mut disk = vec![0_u8; 40 << 20];
        for start in [0, 65_536 * 3, 5 << 20, (20 << 20) + 512, (40 << 20) - 70_000] {
            for byte in disk.iter_mut().skip(start).take(70_000) {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (state >> 60).to_le_bytes()[0];
            }
        }
        disk
    }

    #[test]
    #[ignore = "needs qemu-img"]
    fn every_kind_of_qcow2_reads_as_qemu_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let disk = content();
        std::fs::write(dir.path().join("disk.raw"), &disk).unwrap();
        for options in [
            vec![],
            vec!["-o", "compat=0.10"],
            vec!["-o", "cluster_size=4096"],
            vec!["-o", "extended_l2=on,cluster_size=128k"],
            vec!["-c"],
            vec!["-c", "-o", "compression_type=zstd"],
            vec!["-c", "-o", "cluster_size=2M"],
            vec!["-S", "0"],
        ] {
            let mut arguments = vec!["convert", "-q", "-f", "raw", "-O", "qcow2"];
            arguments.extend(&options);
            arguments.extend(["disk.raw", "disk.qcow2"]);
            tool(&arguments, dir.path());
            let guest = open(&dir.path().join("disk.qcow2"), DiskFormat::Qcow2, LIMIT).unwrap();
            assert!(all(&*guest) == disk, "{options:?}");
        }
    }

    #[test]
    #[ignore = "needs qemu-img"]
    fn a_chain_reads_as_its_topmost_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut disk = content();
        std::fs::write(dir.path().join("base.raw"), &disk).unwrap();
        tool(
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-F",
                "raw",
                "-b",
                "base.raw",
                "mid.qcow2",
            ],
            dir.path(),
        );
        tool(
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-F",
                "qcow2",
                "-b",
                "mid.qcow2",
                "top.qcow2",
                "50M",
            ],
            dir.path(),
        );
        let top = dir.path().join("top.qcow2");
        let write = |file: &str, command: &str| {
            let status = Command::new("qemu-io")
                .args(["-f", "qcow2", "-c", command, file])
                .current_dir(dir.path())
                .stdout(std::process::Stdio::null())
                .status();
            assert!(status.unwrap().success());
        };
        write("mid.qcow2", "write -P 7 5M 64k");
        write("top.qcow2", "write -z 0 64k");
        write("top.qcow2", "write -P 9 45M 4k");
        disk[5 << 20..(5 << 20) + 65_536].fill(7);
        disk[..65_536].fill(0);
        disk.resize(50 << 20, 0);
        disk[45 << 20..(45 << 20) + 4096].fill(9);
        let guest = open(&top, DiskFormat::Qcow2, LIMIT).unwrap();
        assert!(all(&*guest) == disk);

        // A chain in a circle, a format that is not said, another format than is said.
        tool(
            &[
                "rebase",
                "-u",
                "-f",
                "qcow2",
                "-F",
                "qcow2",
                "-b",
                "top.qcow2",
                "mid.qcow2",
            ],
            dir.path(),
        );
        let refused = |path: &Path, format| open(path, format, LIMIT).err().unwrap().to_string();
        assert!(refused(&top, DiskFormat::Qcow2).contains("circle"));
        assert!(refused(&top, DiskFormat::Raw).contains("should be raw"));
        assert!(refused(&dir.path().join("base.raw"), DiskFormat::Qcow2).contains("is none"));
    }
}
