//! The host's content-addressed store of images.
//!
//! ```text
//! store/
//!   blobs/sha256/HEX      manifests and configs, as they came
//!   disks/HEX/            one image, by the digest of its manifest; nothing in here ever changes
//!     disk.raw | disk.qcow2
//!     kernel, initrd      where the image brings them
//!     image.json          what is known about it
//!   refs/…                which digest a name had when it was last asked for
//!   partial/              what is being made: HEX/ and HEX.lock
//! ```
//!
//! An image becomes visible by one `rename` of its finished, synced folder, and a process that dies leaves
//! nothing but a folder in `partial/` whose lock the kernel has let go; whoever comes next sweeps it.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::error::Error;
use super::format::Format;
use super::hints::Hints;
use super::inspect::DiskFormat;
use super::partial;
use super::reference::Reference;
use crate::kill::{self, Point};
use crate::record::{hidden, make_finished};

/// Version of `image.json` and of the files in `refs/`.
pub(super) const VERSION: u32 = 1;

/// Largest `image.json` or ref that is read, in bytes.
const RECORD_MAX: u64 = 64 * 1024;

/// The store of one host, shared by all processes that open the same folder.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
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
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RecordedFile {
    pub(super) name: String,
    pub(super) length: u64,
}

/// A file in `refs/`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Ref {
    version: u32,
    reference: String,
    digest: Digest,
    asked: Timestamp,
}

pub(super) const KERNEL: &str = "kernel";
pub(super) const INITRD: &str = "initrd";
const RECORD: &str = "image.json";

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
        let store = Self { dir: dir.to_owned() };
        make_dirs(dir, &hidden)?;
        for part in ["blobs/sha256", "disks", "refs", "partial"] {
            make_dirs(&dir.join(part), &hidden)?;
        }
        store.sweep()?;
        Ok(store)
    }

    /// The disk with this digest, if it is here and whole. Costs no network and reads no data.
    ///
    /// # Errors
    /// [`Error::Storage`] when its record cannot be read.
    pub fn find(&self, digest: &Digest) -> Result<Option<Disk>, Error> {
        let dir = self.disk_dir(digest);
        let Some(record) = read_record::<Record>(&dir.join(RECORD))? else {
            return Ok(None);
        };
        let whole = record.version == VERSION
            && record.digest == *digest
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
            let name = entry.map_err(Error::storage(&dir))?.file_name();
            if let Some(digest) = name.to_str().and_then(|name| Digest::from_hex(name).ok())
                && let Some(disk) = self.find(&digest)?
            {
                disks.push(disk);
            }
        }
        disks.sort_by_key(|disk| disk.digest);
        Ok(disks)
    }

    pub(super) fn disk_dir(&self, digest: &Digest) -> PathBuf {
        self.dir.join("disks").join(digest.hex())
    }

    pub(super) fn partial(&self) -> PathBuf {
        self.dir.join("partial")
    }

    /// The digest that a name had when it was last asked for, whether its disk is here or not.
    pub(super) fn reference(
        &self,
        reference: &Reference,
        architecture: &str,
    ) -> Result<Option<Digest>, Error> {
        let path = self.dir.join("refs").join(ref_path(reference, architecture));
        let written: Option<Ref> = read_record(&path)?;
        let same = |found: &Ref| found.version == VERSION && found.reference == reference.to_string();
        Ok(written.filter(same).map(|found| found.digest))
    }

    /// Remembers the digest of a name.
    pub(super) fn remember(
        &self,
        reference: &Reference,
        architecture: &str,
        digest: &Digest,
    ) -> Result<(), Error> {
        let path = self.dir.join("refs").join(ref_path(reference, architecture));
        let written = Ref {
            version: VERSION,
            reference: reference.to_string(),
            digest: *digest,
            asked: Timestamp::now(),
        };
        self.write_small(&path, &serialised(&written, &path)?)?;
        kill::point(Point::ReferenceKept);
        Ok(())
    }

    /// Keeps a manifest or config.
    pub(super) fn keep_blob(&self, bytes: &[u8]) -> Result<(), Error> {
        let path = self.dir.join("blobs/sha256").join(Digest::of(bytes).hex());
        if path.exists() {
            Ok(())
        } else {
            self.write_small(&path, bytes)?;
            kill::point(Point::BlobKept);
            Ok(())
        }
    }

    /// Writes a small file whole or not at all.
    fn write_small(&self, path: &Path, bytes: &[u8]) -> Result<(), Error> {
        let parent = path.parent().unwrap_or(&self.dir);
        // There are too many of them to look through for what a killed process began.
        make_dirs(parent, &|_| {
            self.partial().join(format!("folder-{}", uuid::Uuid::new_v4()))
        })?;
        let (mut file, temporary) = self.begin_small().map_err(Error::storage(path))?;
        let mut write = || {
            fill(&mut file, bytes)?;
            kill::point(Point::BlobBegun);
            fs::rename(&temporary, path)?;
            File::open(parent)?.sync_all()
        };
        write().map_err(|error| {
            // The rename may not have happened; a leftover would wait for the sweep.
            drop(fs::remove_file(&temporary));
            Error::Storage {
                path: path.to_owned(),
                source: error,
            }
        })
    }

    /// A new file in `partial/`, locked for as long as it is open: by that a sweep knows that it is still being written.
    fn begin_small(&self) -> io::Result<(File, PathBuf)> {
        loop {
            let path = self.partial().join(format!("small-{}", uuid::Uuid::new_v4()));
            let file = File::create_new(&path)?;
            file.lock()?;
            // A sweep may have come before the lock.
            if path.exists() {
                return Ok((file, path));
            }
        }
    }

    /// Turns a finished work folder into a disk of the store. The caller holds the digest's lock.
    pub(super) fn commit(&self, work: &Path, record: &Record) -> Result<(), Error> {
        let json = work.join(RECORD);
        write_synced(&json, &serialised(record, &json)?).map_err(Error::storage(&json))?;
        for name in record.files.iter().map(|file| file.name.as_str()).chain([RECORD]) {
            let path = work.join(name);
            fs::set_permissions(&path, Permissions::from_mode(0o444)).map_err(Error::storage(&path))?;
        }
        let target = self.disk_dir(&record.digest);
        let partial = self.partial();
        fs::set_permissions(work, Permissions::from_mode(inherited_mode(&partial)))
            .map_err(Error::storage(work))?;
        sync_dir(work)?;
        kill::point(Point::DiskFinished);
        // Only a damaged disk can be here: its digest was looked up under the lock that we hold.
        if target.exists() {
            let aside = partial.join(format!("{}.damaged", record.digest.hex()));
            fs::rename(&target, &aside).map_err(Error::storage(&target))?;
        }
        fs::rename(work, &target).map_err(Error::storage(&target))?;
        kill::point(Point::DiskStored);
        sync_dir(&self.dir.join("disks"))?;
        sync_dir(&partial)
    }

    /// Removes what dead processes left in `partial/`; what a living one holds stays.
    pub(super) fn sweep(&self) -> Result<(), Error> {
        let dir = self.partial();
        for entry in fs::read_dir(&dir).map_err(Error::storage(&dir))? {
            let entry = entry.map_err(Error::storage(&dir))?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if name.starts_with("small-") {
                // Held until it is removed, so that its writer, if there is one, notices. One that cannot be opened has got its
                // name by now, or is for its owner to sweep.
                if let Ok(file) = File::open(entry.path())
                    && file.try_lock().is_ok()
                {
                    remove(&entry.path())?;
                    kill::point(Point::RemainSwept);
                }
            } else if name.starts_with("folder-") {
                // Whoever is just making it makes another; one that another user began is empty, too.
                if fs::remove_dir(entry.path()).is_ok() {
                    kill::point(Point::RemainSwept);
                }
            } else if let Some(digest) = name.split('.').next().and_then(|hex| Digest::from_hex(hex).ok()) {
                // Dropping the lock removes everything that belongs to it, but for what a later pull can go on with.
                if let Some(work) = partial::Work::try_lock(&dir, &digest)? {
                    work.discard_if_old();
                    drop(work);
                    kill::point(Point::WorkSwept);
                }
            }
        }
        Ok(())
    }
}

/// Where a name's digest is written down, below `refs/`.
///
/// No part of a repository begins with an underscore, so names and repositories cannot meet.
fn ref_path(reference: &Reference, architecture: &str) -> PathBuf {
    match reference {
        Reference::Registry {
            registry,
            repository,
            tag,
            digest,
        } => {
            let name = match (digest, tag) {
                (Some(digest), _) => digest.hex(),
                (None, tag) => tag.clone().unwrap_or_default(),
            };
            Path::new(registry)
                .join(repository)
                .join("_")
                .join(format!("{name}@{architecture}.json"))
        }
        Reference::Layout { .. } => {
            let name = Digest::of(reference.to_string().as_bytes()).hex();
            Path::new("_layouts").join(format!("{name}@{architecture}.json"))
        }
    }
}

/// A small JSON file; none when it is missing, or is not what it should be and so is worth nothing.
fn read_record<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    let mut bytes = Vec::new();
    match File::open(path).and_then(|file| file.take(RECORD_MAX).read_to_end(&mut bytes)) {
        Ok(_) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::Storage {
            path: path.to_owned(),
            source: error,
        }),
    }
}

fn serialised(value: &impl Serialize, path: &Path) -> Result<Vec<u8>, Error> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(|error| Error::Storage {
        path: path.to_owned(),
        source: error.into(),
    })?;
    bytes.push(b'\n');
    Ok(bytes)
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    fill(&mut File::create_new(path)?, bytes)
}

/// Writes a file's content, which is not to change any more.
fn fill(file: &mut File, bytes: &[u8]) -> io::Result<()> {
    file.write_all(bytes)?;
    file.set_permissions(Permissions::from_mode(0o444))?;
    file.sync_all()
}

fn sync_dir(dir: &Path) -> Result<(), Error> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(Error::storage(dir))
}

/// Removes a file or a folder, whoever was quicker.
pub(super) fn remove(path: &Path) -> Result<(), Error> {
    let removed = match fs::symlink_metadata(path) {
        Ok(data) if data.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::Storage {
            path: path.to_owned(),
            source: error,
        }),
        _ => Ok(()),
    }
}

/// The mode for a new folder in `parent`: whoever may write there may write in it (a store that is shared by a
/// group is made by giving its folder that group and mode), and everybody may pass, for QEMU runs as somebody
/// else.
pub(super) fn inherited_mode(parent: &Path) -> u32 {
    let mode = fs::metadata(parent).map_or(0, |data| data.mode() & 0o2777);
    // Never writable for everybody, even below /tmp.
    (mode & !0o002) | 0o755
}

/// Makes a folder and those above it, where they are missing; `begun_as` is what each is called until it is finished.
fn make_dirs(dir: &Path, begun_as: &dyn Fn(&Path) -> PathBuf) -> Result<(), Error> {
    if dir.is_dir() {
        return Ok(());
    }
    let parent = dir.parent().unwrap_or(Path::new("/"));
    make_dirs(parent, begun_as)?;
    // The umask would take from the mode.
    let finish = |dir: &Path| fs::set_permissions(dir, Permissions::from_mode(inherited_mode(parent)));
    make_finished(dir, &begun_as(dir), finish).map_err(Error::storage(dir))
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
        store.sweep().unwrap();
        assert!(kept.exists() && !swept.exists());
        drop(held);
        store.sweep().unwrap();
        assert!(!kept.exists());
        store.keep_blob(b"{}").unwrap();
        let blob = dir.path().join("blobs/sha256").join(Digest::of(b"{}").hex());
        assert_eq!(blob.metadata().unwrap().mode() & 0o7777, 0o444);
        assert_eq!(fs::read_dir(store.partial()).unwrap().count(), 0);
    }
}
