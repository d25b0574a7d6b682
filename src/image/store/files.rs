//! Small files of the store, whole or absent, and folders that its group shares.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{SMALL, Store};
use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::kill::{self, Point};
use crate::record::make_finished;

/// Largest small file that is read, in bytes.
const RECORD_MAX: u64 = 64 * 1024;

/// Whoever shares the store may read a small file, and nobody may change it: it is replaced.
const READABLE: u32 = 0o444;

impl Store {
    /// Writes a small file whole or not at all. Where the host crashes within the next seconds, an empty one may be left: to each of
    /// its readers that says nothing.
    pub(super) fn write_small(&self, path: &Path, bytes: &[u8]) -> Result<(), Error> {
        self.replace(self.made_parent(path)?, path, bytes, READABLE, false)
    }

    /// The same, and it is on the disk afterwards.
    pub(super) fn write_durably(&self, path: &Path, bytes: &[u8]) -> Result<(), Error> {
        self.replace(self.made_parent(path)?, path, bytes, READABLE, true)
    }

    /// [`Store::write_small`] in a folder that is there, with a mode of its own.
    pub(super) fn write_small_in(
        &self,
        parent: &Path,
        path: &Path,
        bytes: &[u8],
        mode: u32,
    ) -> Result<(), Error> {
        self.replace(parent, path, bytes, mode, false)
    }

    fn made_parent<'a>(&'a self, path: &'a Path) -> Result<&'a Path, Error> {
        let parent = path.parent().unwrap_or(&self.dir);
        // There are too many of them to look through for what a killed process began.
        make_dirs(parent, &|_| {
            self.partial().join(format!("folder-{}", uuid::Uuid::new_v4()))
        })?;
        Ok(parent)
    }

    fn replace(
        &self,
        parent: &Path,
        path: &Path,
        bytes: &[u8],
        mode: u32,
        durably: bool,
    ) -> Result<(), Error> {
        let (mut file, temporary) = self.begin_small().map_err(Error::storage(path))?;
        let mut write = || {
            fill(&mut file, bytes, mode)?;
            if durably {
                file.sync_all()?;
            }
            kill::point(Point::BlobBegun);
            fs::rename(&temporary, path)?;
            if durably {
                File::open(parent)?.sync_all()?;
            }
            Ok(())
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
    pub(super) fn begin_small(&self) -> io::Result<(File, PathBuf)> {
        loop {
            let path = self.partial().join(format!("{SMALL}{}", uuid::Uuid::new_v4()));
            let file = File::create_new(&path)?;
            file.lock()?;
            // A sweep may have come before the lock.
            if path.exists() {
                return Ok((file, path));
            }
        }
    }
}

/// A small JSON file; none when it is missing, or is not what it should be and so is worth nothing.
pub(super) fn read_record<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
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

/// What is in a folder; one that is missing has nothing.
pub(super) fn entries(dir: &Path) -> Result<Vec<fs::DirEntry>, Error> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(Error::storage(dir))?,
    };
    entries.collect::<Result<_, _>>().map_err(Error::storage(dir))
}

/// The digest that something in the store is called by.
pub(super) fn digest_of(entry: &fs::DirEntry) -> Option<Digest> {
    Digest::from_hex(entry.file_name().to_str()?).ok()
}

pub(super) fn serialised(value: &impl Serialize, path: &Path) -> Result<Vec<u8>, Error> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(|error| Error::Storage {
        path: path.to_owned(),
        source: error.into(),
    })?;
    bytes.push(b'\n');
    Ok(bytes)
}

pub(super) fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    fill(&mut File::create_new(path)?, bytes, READABLE)
}

/// Writes a file's content, which is not to change any more.
fn fill(file: &mut File, bytes: &[u8], mode: u32) -> io::Result<()> {
    file.set_permissions(Permissions::from_mode(mode))?;
    file.write_all(bytes)
}

pub(super) fn sync_dir(dir: &Path) -> Result<(), Error> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(Error::storage(dir))
}

/// Removes a file or a folder, whoever was quicker.
pub(in crate::image) fn remove(path: &Path) -> Result<(), Error> {
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
pub(in crate::image) fn inherited_mode(parent: &Path) -> u32 {
    let mode = fs::metadata(parent).map_or(0, |data| data.mode() & 0o2777);
    // Never writable for everybody, even below /tmp.
    (mode & !0o002) | 0o755
}

/// Makes a folder and those above it, where they are missing; `begun_as` is what each is called until it is finished.
pub(super) fn make_dirs(dir: &Path, begun_as: &dyn Fn(&Path) -> PathBuf) -> Result<(), Error> {
    if dir.is_dir() {
        return Ok(());
    }
    let parent = dir.parent().unwrap_or(Path::new("/"));
    make_dirs(parent, begun_as)?;
    // The umask would take from the mode.
    let finish = |dir: &Path| fs::set_permissions(dir, Permissions::from_mode(inherited_mode(parent)));
    make_finished(dir, &begun_as(dir), finish).map_err(Error::storage(dir))
}
