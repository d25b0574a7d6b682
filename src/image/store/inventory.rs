//! What is in the store, as people and whoever tidies up see it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use jiff::Timestamp;

use super::files::{digest_of, entries};
use super::names::Name;
use super::pins::PinName;
use super::{Disk, Store};
use crate::image::digest::Digest;
use crate::image::error::Error;

/// What the system counts a file's blocks in, in bytes (stat(2)).
const BLOCK: u64 = 512;

/// A file that goes by more than one name: removing the last of them frees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shared {
    /// Which file it is: its device and its number there.
    pub file: (u64, u64),
    /// What it takes, in bytes.
    pub bytes: u64,
    /// How many names it has.
    pub names: u64,
}

/// One image, and what is known about it here.
#[derive(Debug, Clone)]
pub struct Held {
    /// Its digest.
    pub digest: Digest,
    /// The disk, if it is whole.
    pub disk: Option<Disk>,
    /// Whether it is whole will be seen when it is used next: the host was started again before it was known to be on the disk.
    pub unverified: bool,
    /// The names that lead to it.
    pub names: Vec<Name>,
    /// What it takes on the file system, in bytes. What it shares with other images counts for each.
    pub size: u64,
    /// What it alone takes of that.
    pub own: u64,
    /// Those of its files that other images have, too.
    pub shared: Vec<Shared>,
    /// When it came.
    pub created: Timestamp,
    /// When a job last used it; when it came, if none has.
    pub used: Timestamp,
    /// The pins on it.
    pub pins: Vec<PinName>,
    /// The processes that lease it.
    pub leases: Vec<u32>,
}

impl Store {
    /// All images, whole or damaged, by digest.
    ///
    /// # Errors
    /// [`Error::Storage`] when the store cannot be read.
    pub fn inventory(&self) -> Result<Vec<Held>, Error> {
        let mut names: BTreeMap<Digest, Vec<Name>> = BTreeMap::new();
        for name in self.names()? {
            names.entry(name.digest).or_default().push(name);
        }
        let mut held = Vec::new();
        for digest in self.digests()? {
            let names = names.remove(&digest).unwrap_or_default();
            held.extend(self.held(digest, names)?);
        }
        Ok(held)
    }

    /// The digests of all images, whole or damaged, in order.
    pub(super) fn digests(&self) -> Result<Vec<Digest>, Error> {
        let mut digests: Vec<Digest> = entries(&self.dir.join("disks"))?
            .iter()
            .filter_map(digest_of)
            .collect();
        digests.sort_unstable();
        Ok(digests)
    }

    /// None when it was removed meanwhile.
    fn held(&self, digest: Digest, names: Vec<Name>) -> Result<Option<Held>, Error> {
        let dir = self.disk_dir(&digest);
        let Ok(folder) = fs::metadata(&dir) else {
            return Ok(None);
        };
        let (own, shared) = room(&dir)?;
        let created = match self.record(&digest)? {
            Some(record) => record.created,
            None => folder
                .modified()
                .ok()
                .and_then(|time| time.try_into().ok())
                .unwrap_or(Timestamp::UNIX_EPOCH),
        };
        Ok(Some(Held {
            disk: self.find(&digest)?,
            unverified: self.is_doubtful(&digest)?,
            names,
            size: shared.iter().fold(own, |sum, file| sum + file.bytes),
            own,
            shared,
            created,
            used: self.used(&digest).unwrap_or(created).max(created),
            pins: self.pins(&digest)?,
            leases: self.leased_by(&digest),
            digest,
        }))
    }
}

/// What those of a folder's files take that have no other name, in bytes; and the others.
fn room(dir: &Path) -> Result<(u64, Vec<Shared>), Error> {
    let (mut own, mut shared) = (0, Vec::new());
    for entry in entries(dir)? {
        let Ok(data) = entry.metadata() else { continue };
        let bytes = data.blocks() * BLOCK;
        if data.nlink() == 1 {
            own += bytes;
        } else {
            shared.push(Shared {
                file: (data.dev(), data.ino()),
                bytes,
                names: data.nlink(),
            });
        }
    }
    Ok((own, shared))
}
