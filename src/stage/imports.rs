//! Imports of machines that may be cut off: what each has made is noted, and whoever comes later finishes it.
//!
//! ```text
//! state_dir/imports/NAME.lock   held for as long as the import of machine NAME goes on
//! state_dir/imports/NAME.json   which files it gives names to, from before the first until the machine is defined
//! ```
//!
//! A note whose lock is free was left by a killed import. If the machine is there, its files are its own and only the note goes; if
//! it is not, the files go first. A file is known by its inode, so that nothing is removed that somebody else has put there since.

use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::kill::{self, Point};
use crate::machine::Libvirt;
use crate::machine::libvirt::Kept;
use crate::outcome::Failure;
use crate::record::{self, Unnamed};
use crate::settings::Settings;

/// Who may read a note: the group may remove it, and has no use for more.
const NOTE_MODE: u32 = 0o664;

const NOTE: &str = "json";
const LOCK: &str = "lock";

/// A note.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    /// Which libvirt the machine is defined in.
    uri: String,
    /// The files that get names.
    files: Vec<Made>,
}

/// A file that an import has made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Made {
    path: PathBuf,
    device: u64,
    inode: u64,
    /// When it was made, where the file system knows: a number of an inode is given again.
    born: Option<Timestamp>,
}

impl Made {
    fn of(path: &Path, file: &fs::Metadata) -> Self {
        Self {
            path: path.to_owned(),
            device: file.dev(),
            inode: file.ino(),
            born: file
                .created()
                .ok()
                .and_then(|time| Timestamp::try_from(time).ok()),
        }
    }

    /// Removes it, unless it is gone, or another file has its name.
    fn remove(&self) -> io::Result<()> {
        let there = match self.path.symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            there => there?,
        };
        if Self::of(&self.path, &there) != *self {
            return Ok(());
        }
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// The right to import a machine of one name. The kernel drops it however the process ends.
#[derive(Debug)]
pub(super) struct Turn {
    folder: PathBuf,
    name: String,
    _lock: File,
}

impl Turn {
    /// Takes the turn for a name; none while another process has it.
    fn take(folder: &Path, name: &str) -> io::Result<Option<Self>> {
        let path = of(folder, name, LOCK);
        loop {
            let lock = record::open_lock(&path)?;
            match lock.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(error),
            }
            // Whoever had it may have removed it in between.
            let ours = lock.metadata()?;
            let same = |there: fs::Metadata| (there.dev(), there.ino()) == (ours.dev(), ours.ino());
            if fs::metadata(&path).is_ok_and(same) {
                return Ok(Some(Self {
                    folder: folder.to_owned(),
                    name: name.to_owned(),
                    _lock: lock,
                }));
            }
        }
    }

    /// Gives files their names, noted before.
    pub(super) fn name(&self, uri: &str, files: &[(PathBuf, Unnamed)]) -> Result<(), Failure> {
        let unusable = |path: &Path, error: io::Error| match error.kind() {
            io::ErrorKind::AlreadyExists => there_already(path),
            _ => Failure::system(format!("{} cannot be written: {error}", path.display())),
        };
        let made = files.iter().map(|(path, file)| {
            let known = file.file().metadata().map_err(|e| unusable(path, e))?;
            Ok(Made::of(path, &known))
        });
        let note = Note {
            uri: uri.to_owned(),
            files: made.collect::<Result<_, Failure>>()?,
        };
        record::write_json(&self.note(), &note, NOTE_MODE)?;
        kill::point(Point::ImportNoted);
        for (path, file) in files {
            file.name(path).map_err(|e| unusable(path, e))?;
            kill::point(Point::ImportNamed);
        }
        Ok(())
    }

    /// Removes what was made, since no machine will use it.
    pub(super) fn undo(&self) -> Result<(), Failure> {
        let Some(note) = record::read_json::<Note>(&self.note())? else {
            return Ok(());
        };
        for made in &note.files {
            made.remove()
                .map_err(|e| Failure::system(format!("cannot remove {}: {e}", made.path.display())))?;
            kill::point(Point::ImportUndone);
        }
        self.forget()
    }

    /// Removes the note: the files are the machine's, or gone.
    pub(super) fn forget(&self) -> Result<(), Failure> {
        let note = self.note();
        match fs::remove_file(&note) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(Failure::system(format!("cannot remove {}: {e}", note.display())))
            }
            _ => Ok(()),
        }
    }

    fn note(&self) -> PathBuf {
        of(&self.folder, &self.name, NOTE)
    }

    /// Is there a note of a process that is gone, for us to see to? What another user's names may not be ours to remove.
    fn left(&self) -> bool {
        let us = rustix::process::geteuid().as_raw();
        self.note().symlink_metadata().is_ok_and(|note| note.uid() == us)
    }

    /// Finishes what a killed import of this name began; were files removed?
    async fn settle(&self) -> Result<bool, Failure> {
        if !self.left() {
            return Ok(false);
        }
        let Some(note) = record::read_json::<Note>(&self.note())? else {
            return Ok(false);
        };
        let missing = Libvirt::open(&note.uri)?.kept(&self.name).await? == Kept::Missing;
        if missing { self.undo() } else { self.forget() }?;
        Ok(missing)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        // With a note left, whoever comes next locks it. That the file goes only keeps the folder tidy.
        if !self.note().exists() {
            let _ = fs::remove_file(of(&self.folder, &self.name, LOCK));
        }
    }
}

/// The turn for a machine's name, once what killed imports left is finished.
pub(super) async fn begin(settings: &Settings, name: &str) -> Result<Turn, Failure> {
    let folder = folder(settings);
    let failed = |e| Failure::system(format!("{} cannot be used: {e}", folder.display()));
    settle(settings).await;
    record::make_shared(&folder).map_err(failed)?;
    let turn = Turn::take(&folder, name).map_err(failed)?.ok_or_else(|| {
        Failure::system(format!("another import of machine {name} is under way"))
            .hint("Wait until it is over, or choose another name with --name")
    })?;
    // One that could not be finished, or was killed just now: its note must not be written over.
    turn.settle().await?;
    Ok(turn)
}

/// Finishes what killed imports of any machine began: the names of those whose files went. What cannot be finished is for the
/// operator's log, and for the next call.
pub async fn settle(settings: &Settings) -> Vec<String> {
    let folder = folder(settings);
    let mut gone = Vec::new();
    for name in names(&folder) {
        let settled = async {
            let turn = Turn::take(&folder, &name).map_err(|e| Failure::system(e.to_string()))?;
            match turn {
                Some(turn) => turn.settle().await,
                None => Ok(false),
            }
        };
        match settled.await {
            Ok(true) => gone.push(name),
            Ok(false) => {}
            Err(e) => tracing::warn!(machine = name, "a killed import is not finished: {e}"),
        }
    }
    if let Err(e) = record::sweep(&folder) {
        tracing::warn!("{} is not swept: {e}", folder.display());
    }
    gone
}

/// The names that have a note or a lock.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| {
            let path = entry.path();
            let ours = [NOTE, LOCK].map(OsStr::new).contains(&path.extension()?);
            ours.then(|| Some(path.file_stem()?.to_str()?.to_owned()))?
        })
        .collect();
    names.sort_unstable();
    names.dedup();
    names
}

fn folder(settings: &Settings) -> PathBuf {
    settings.state_dir.join("imports")
}

fn of(folder: &Path, name: &str, ending: &str) -> PathBuf {
    folder.join(format!("{name}.{ending}"))
}

/// A name that is taken.
pub(super) fn there_already(path: &Path) -> Failure {
    Failure::system(format!("{} is there already", path.display())).hint("Choose another --name or --dir")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unnamed(path: &Path) -> (PathBuf, Unnamed) {
        let file = Unnamed::begin(path.parent().unwrap(), 0o600).unwrap();
        (path.to_owned(), file)
    }

    #[test]
    fn only_what_an_import_made_itself_is_undone() {
        let dir = tempfile::tempdir().unwrap();
        let (kernel, disk) = (dir.path().join("web.kernel"), dir.path().join("web.qcow2"));
        let imports = dir.path().join("imports");
        record::make_shared(&imports).unwrap();
        let turn = Turn::take(&imports, "web").unwrap().unwrap();
        assert!(Turn::take(&imports, "web").unwrap().is_none(), "it is taken");
        assert!(Turn::take(&imports, "web2").unwrap().is_some());
        // Somebody else's disk appears in the last moment.
        fs::write(&disk, "another's").unwrap();
        let files = [unnamed(&kernel), unnamed(&disk)];
        let said = turn.name("test:///default", &files).unwrap_err().to_string();
        assert!(said.contains("web.qcow2 is there already"), "{said}");
        assert!(kernel.exists());
        turn.undo().unwrap();
        assert!(!kernel.exists());
        assert_eq!(fs::read(&disk).unwrap(), b"another's");
        drop(turn);
        assert_eq!(names(&imports), Vec::<String>::new());
    }

    #[test]
    fn a_file_that_took_the_place_of_ours_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.qcow2");
        let (_, file) = unnamed(&path);
        let made = Made::of(&path, &file.file().metadata().unwrap());
        file.name(&path).unwrap();
        fs::rename(&path, dir.path().join("saved")).unwrap();
        fs::write(&path, "another's").unwrap();
        made.remove().unwrap();
        assert!(path.exists());
        fs::rename(dir.path().join("saved"), &path).unwrap();
        made.remove().unwrap();
        assert!(!path.exists());
        made.remove().unwrap();
    }
}
