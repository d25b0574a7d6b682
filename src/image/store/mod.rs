//! The host's content-addressed store of images.
//!
//! ```text
//! store/
//!   blobs/sha256/HEX      manifests and configs, as they came
//!   disks/HEX/            one image, by the digest of its manifest; nothing in here ever changes
//!     disk.raw | disk.qcow2
//!     disk.sums, chunks   of a disk that came in chunks: what each must hash to, and where which digest lies
//!     kernel, initrd      where the image brings them
//!     image.json          what is known about it
//!   refs/…                which digest a name had when it was last asked for
//!   pins/HEX@NAME.json    which images the operator wants kept
//!   used/HEX              when an image was last used: the file's time
//!   origins/HEX/…         which repositories an image came from, and whether everybody may have it there
//!   grants/UID/…          which project was allowed which image, for a while
//!   sha512/HEX            what a disk of a web server was published as, and was seen to be, where nobody publishes its SHA-256
//!   damaged/HEX           images whose bytes have changed since they were put here, and how
//!   unsynced/HEX          images whose bytes may still be in memory, and in which run of the host they came
//!   verdicts/HEX.json     whose signature an image has, where the settings ask for one
//!   partial/              what is being made: HEX/ and HEX.lock; what is being removed: trash-…
//! ```
//!
//! An image becomes visible by one `rename` of its finished folder, and a process that dies leaves nothing but a folder in
//! `partial/` whose lock the kernel has let go; whoever comes next sweeps it. What a crash of the whole host leaves is read once
//! more before anybody gets it ([`unsynced`]).

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::error::Error;
use super::fetch::partial;
use super::format::{self, Format};
use super::hints::Hints;
use super::inspect::DiskFormat;
use super::manifest::{self, Document};
use crate::kill::{self, Point};
use crate::record::hidden;

mod access;
mod collect;
mod files;
mod inventory;
mod leases;
pub(super) mod listed;
mod names;
mod pins;
mod published;
pub(super) mod sum;
mod twins;
mod unsynced;
mod verdicts;
mod verify;

pub use access::Asker;
pub(super) use access::{Plea, Standing};
pub use collect::{Candidate, Freed, Going, MakeRoom, Policy, Reason, plan};
use files::{digest_of, make_dirs, read_record, serialised, write_new};
pub(super) use files::{inherited_mode, remove};
pub use inventory::{Held, Shared};
pub use leases::Lease;
pub use names::Name;
pub use pins::{InvalidPinName, PinName};
pub(super) use twins::Twin;
pub use verify::Verdict;

/// Version of `image.json` and of the files in `refs/`.
pub(super) const VERSION: u32 = 1;

/// The store of one host, shared by all processes that open the same folder.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
    /// Who removes images where one that is coming needs the room.
    maker: Option<Arc<dyn MakeRoom>>,
}

/// A verified, read-only disk in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The reference by which it was asked for; in [`Store::list`], by which it came.
    pub reference: String,
    /// Digest of the manifest for this platform: the image's identity.
    pub digest: Digest,
    /// The file. Read-only for ever.
    pub path: PathBuf,
    /// How its bytes are to be read.
    pub format: DiskFormat,
    /// What it came as; absent in the records of older versions.
    pub image_format: Option<Format>,
    /// What a guest sees, in bytes.
    pub virtual_size: u64,
    /// Files for direct kernel boot, where the image brings them.
    pub boot: Option<Boot>,
    /// What the image wishes for its machine.
    pub hints: Hints,
    /// Packed bytes that were fetched for this call; 0 from the cache.
    pub fetched_bytes: u64,
    /// Was it there already?
    pub from_cache: bool,
    /// Keeps it from being removed while this value lives; only [`Store::provide`] gives one.
    pub lease: Option<Lease>,
}

/// What a machine boots without a boot loader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Boot {
    /// The kernel's file.
    pub kernel: PathBuf,
    /// The initial RAM disk's file.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line: printable ASCII.
    pub cmdline: Option<String>,
}

/// `image.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) version: u32,
    pub(super) reference: String,
    pub(super) digest: Digest,
    pub(super) format: DiskFormat,
    #[serde(default)]
    pub(super) image_format: Option<Format>,
    pub(super) virtual_size: u64,
    /// Every file with its length in bytes, so that a cut one is noticed without reading it.
    pub(super) files: Vec<RecordedFile>,
    pub(super) cmdline: Option<String>,
    pub(super) hints: Hints,
    pub(super) created: Timestamp,
    /// What its files were made of, for images that come as streams: those with the same have the same files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) made_of: Option<Digest>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RecordedFile {
    pub(super) name: String,
    pub(super) length: u64,
    /// What its data hashes to, as [`sum`] defines it; filled in when the image is put into the store, unless it is known.
    #[serde(default)]
    pub(super) sum: Option<sum::Sum>,
    /// Where it has no sum: does [`listed`] say what its chunks hash to?
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) listed: bool,
}

/// How long what a pull has brought that was cut off is kept for the next one, unless the caller says otherwise: over a long
/// weekend.
const PARTIAL_TTL: Duration = Duration::from_secs(7 * 24 * 3600);

pub(super) const KERNEL: &str = "kernel";
pub(super) const INITRD: &str = "initrd";
const RECORD: &str = "image.json";

/// How the names of small files begin in `partial/` that are locked for as long as they are somebody's.
pub(super) const SMALL: &str = "small-";

/// The name of a disk's file.
pub(super) fn disk_name(format: DiskFormat) -> &'static str {
    match format {
        DiskFormat::Raw => "disk.raw",
        DiskFormat::Qcow2 => "disk.qcow2",
    }
}

impl Store {
    /// Opens the store in `dir`, makes its folders where they are missing, and sweeps what dead processes left.
    ///
    /// # Errors
    /// [`Error::Storage`] when the folder cannot be made or read.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        Self::open_for(dir, PARTIAL_TTL)
    }

    /// The same; what a pull that was cut off has brought is kept for so long.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_for(dir: &Path, partial_ttl: Duration) -> Result<Self, Error> {
        let store = Self {
            dir: dir.to_owned(),
            maker: None,
        };
        make_dirs(dir, &hidden)?;
        for part in ["blobs/sha256", "disks", "refs", "partial", "unsynced"] {
            make_dirs(&dir.join(part), &hidden)?;
        }
        store.sweep(partial_ttl)?;
        if let Err(error) = store.settle_old() {
            // Who may only read the store leaves it to those who may write there.
            tracing::debug!(%error, "no image was brought to the disk");
        }
        Ok(store)
    }

    /// The disk with this digest, if it is here and whole. Costs no network and reads no data.
    ///
    /// # Errors
    /// [`Error::Storage`] when its record cannot be read.
    pub fn find(&self, digest: &Digest) -> Result<Option<Disk>, Error> {
        let dir = self.disk_dir(digest);
        let Some(record) = self.record(digest)? else {
            return Ok(None);
        };
        let whole = !self.is_damaged(digest)
            && !self.is_doubtful(digest)?
            && record.files.iter().all(|file| {
                fs::metadata(dir.join(&file.name))
                    .is_ok_and(|data| data.is_file() && data.len() == file.length)
            });
        let has = |name: &str| record.files.iter().any(|file| file.name == name);
        let name = disk_name(record.format);
        if !whole || !has(name) {
            return Ok(None);
        }
        Ok(Some(Disk {
            path: dir.join(name),
            boot: has(KERNEL).then(|| Boot {
                kernel: dir.join(KERNEL),
                initrd: has(INITRD).then(|| dir.join(INITRD)),
                cmdline: record.cmdline,
            }),
            reference: record.reference,
            digest: *digest,
            format: record.format,
            image_format: record.image_format,
            virtual_size: record.virtual_size,
            hints: record.hints,
            fetched_bytes: 0,
            from_cache: true,
            lease: None,
        }))
    }

    /// All disks that are here and whole, by digest.
    ///
    /// # Errors
    /// [`Error::Storage`] when the store cannot be read.
    pub fn list(&self) -> Result<Vec<Disk>, Error> {
        let dir = self.dir.join("disks");
        let mut disks = Vec::new();
        for entry in fs::read_dir(&dir).map_err(Error::storage(&dir))? {
            if let Some(digest) = digest_of(&entry.map_err(Error::storage(&dir))?)
                && let Some(disk) = self.find(&digest)?
            {
                disks.push(disk);
            }
        }
        disks.sort_by_key(|disk| disk.digest);
        Ok(disks)
    }

    /// The same, and nobody removes it while the lease in it is held.
    pub(super) fn take(&self, digest: &Digest) -> Result<Option<Disk>, Error> {
        // Before it is looked at: what is leased stays as it is found.
        let Some(lease) = self.lease(digest)? else {
            return Ok(None);
        };
        let disk = self.find(digest)?;
        Ok(disk.map(|disk| Disk {
            lease: Some(lease),
            ..disk
        }))
    }

    /// What is known about an image, whether its files are whole or not.
    fn record(&self, digest: &Digest) -> Result<Option<Record>, Error> {
        let record: Option<Record> = read_record(&self.disk_dir(digest).join(RECORD))?;
        Ok(record.filter(|record| record.version == VERSION && record.digest == *digest))
    }

    pub(super) fn disk_dir(&self, digest: &Digest) -> PathBuf {
        self.dir.join("disks").join(digest.hex())
    }

    pub(super) fn partial(&self) -> PathBuf {
        self.dir.join("partial")
    }

    /// Keeps a manifest or config. One of another length is what a crash of the host has left of it.
    pub(super) fn keep_blob(&self, bytes: &[u8]) -> Result<(), Error> {
        let path = self.dir.join("blobs/sha256").join(Digest::of(bytes).hex());
        if fs::metadata(&path).is_ok_and(|there| there.len() == bytes.len() as u64) {
            Ok(())
        } else {
            self.write_small(&path, bytes)?;
            kill::point(Point::BlobKept);
            Ok(())
        }
    }

    /// The labels of an image of the store; none of a disk that is a file by itself, or whose documents are gone.
    pub fn labels(&self, digest: &Digest) -> BTreeMap<String, String> {
        let blob = |digest: &Digest| fs::read(self.dir.join("blobs/sha256").join(digest.hex())).ok();
        let labels = || {
            let Ok(Document::Image(manifest)) = manifest::parse(&blob(digest)?) else {
                return None;
            };
            let kind = format::recognise(&manifest).ok()?;
            let config = blob(&manifest.config.digest)?;
            let config = format::parse_config(&config, format::described(kind, &manifest)).ok()?;
            Some(config.labels)
        };
        labels().unwrap_or_default()
    }

    /// Turns a finished work folder into a disk of the store. The caller holds the digest's lock.
    pub(super) fn commit(&self, work: &Path, record: Record) -> Result<(), Error> {
        let record = &summed(work, record)?;
        let json = work.join(RECORD);
        write_new(&json, &serialised(record, &json)?).map_err(Error::storage(&json))?;
        for name in record.files.iter().map(|file| file.name.as_str()).chain([RECORD]) {
            let path = work.join(name);
            // A twin's file may be another user's, who has made it so.
            if fs::metadata(&path).is_ok_and(|data| data.mode() & 0o7777 == 0o444) {
                continue;
            }
            fs::set_permissions(&path, Permissions::from_mode(0o444)).map_err(Error::storage(&path))?;
        }
        let target = self.disk_dir(&record.digest);
        let partial = self.partial();
        fs::set_permissions(work, Permissions::from_mode(inherited_mode(&partial)))
            .map_err(Error::storage(work))?;
        kill::point(Point::DiskFinished);
        // Only a damaged disk can be here: its digest was looked up under the lock that we hold.
        if target.exists() {
            let aside = partial.join(format!("{}.damaged", record.digest.hex()));
            fs::rename(&target, &aside).map_err(Error::storage(&target))?;
        }
        fs::rename(work, &target).map_err(Error::storage(&target))?;
        kill::point(Point::DiskStored);
        self.is_whole(&record.digest)
    }

    /// Removes what dead processes left in `partial/`; what a living one holds stays.
    fn sweep(&self, partial_ttl: Duration) -> Result<(), Error> {
        let dir = self.partial();
        for entry in fs::read_dir(&dir).map_err(Error::storage(&dir))? {
            let entry = entry.map_err(Error::storage(&dir))?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if name.starts_with(SMALL) {
                // Held until it is removed, so that its writer, if there is one, notices. One that cannot be opened has got its
                // name by now, or is for its owner to sweep.
                if let Ok(file) = File::open(entry.path())
                    && file.try_lock().is_ok()
                {
                    remove(&entry.path())?;
                    kill::point(Point::RemainSwept);
                }
            } else if name.starts_with(collect::TRASH) {
                remove(&entry.path())?;
                kill::point(Point::RemainSwept);
            } else if name.starts_with("folder-") {
                // Whoever is just making it makes another; one that another user began is empty, too.
                if fs::remove_dir(entry.path()).is_ok() {
                    kill::point(Point::RemainSwept);
                }
            } else if let Some(digest) = name.split('.').next().and_then(|hex| Digest::from_hex(hex).ok()) {
                // Dropping the lock removes everything that belongs to it, but for what a later pull can go on with.
                if let Some(work) = partial::Work::try_lock(&dir, &digest)? {
                    work.discard_if_old(partial_ttl);
                    drop(work);
                    kill::point(Point::WorkSwept);
                }
            }
        }
        Ok(())
    }
}

/// The record with the sums of its files, which are all in the folder. What came verified in chunks, or was summed while it was
/// written, is not read again.
fn summed(work: &Path, mut record: Record) -> Result<Record, Error> {
    for file in &mut record.files {
        if file.listed || file.sum.is_some() {
            continue;
        }
        let path = work.join(&file.name);
        let sum = File::open(&path).and_then(|file| sum::of_file(&file));
        file.sum = Some(sum.map_err(Error::storage(path))?);
    }
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_file_is_swept_unless_its_writer_holds_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let (held, kept) = store.begin_small().unwrap();
        let (left, swept) = store.begin_small().unwrap();
        drop(left);
        store.sweep(PARTIAL_TTL).unwrap();
        assert!(kept.exists() && !swept.exists());
        drop(held);
        store.sweep(PARTIAL_TTL).unwrap();
        assert!(!kept.exists());
        store.keep_blob(b"{}").unwrap();
        let blob = dir.path().join("blobs/sha256").join(Digest::of(b"{}").hex());
        assert_eq!(blob.metadata().unwrap().mode() & 0o7777, 0o444);
        assert_eq!(fs::read_dir(store.partial()).unwrap().count(), 0);
    }
}
