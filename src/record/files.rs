//! Files that are whole or absent, whenever the process or the host dies.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Error;
use super::caller::exists;
use crate::kill::{self, Point};

/// How the name of a file ends that [`write_atomic`] is still writing, or that a kill left so.
pub const UNFINISHED: &str = ".new";

/// How often a folder is begun: two processes that make the same one get into each other's way once.
const MAKE_TRIES: u32 = 5;
/// How long the other one may take meanwhile.
const MAKE_PAUSE: Duration = Duration::from_millis(5);

/// Writes a file so that a reader finds the old content or the new, never a part: a new file beside
/// it, fsync, rename, fsync of the folder.
pub fn write_atomic(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let mut temporary = name.to_owned();
    temporary.push(format!(".{}{UNFINISHED}", std::process::id()));
    let temporary = dir.join(temporary);
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&temporary)?;
        // The umask has no say in who may clean up.
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(content)?;
        file.sync_all()?;
        kill::point(Point::FileBegun);
        fs::rename(&temporary, path)?;
        File::open(dir)?.sync_all()
    })();
    if written.is_err() {
        // The error that is reported is the first one.
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Removes from a folder what [`write_atomic`] and [`make_finished`] left half-made in processes that were killed. What only
/// another user may remove is left to that user; a folder that is missing has nothing.
pub fn sweep(folder: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let Some(begun) = name.to_str().and_then(|name| name.strip_suffix(UNFINISHED)) else {
            continue;
        };
        let removed = if entry.file_type()?.is_dir() && begun.starts_with('.') {
            // Whoever is just making it begins again, and one with something in it is none of ours.
            fs::remove_dir(entry.path())
        } else if is_orphan(begun) {
            fs::remove_file(entry.path())
        } else {
            continue;
        };
        use io::ErrorKind::{DirectoryNotEmpty, NotFound, PermissionDenied};
        match removed {
            Ok(()) => kill::point(Point::RemainSwept),
            Err(e) if matches!(e.kind(), DirectoryNotEmpty | NotFound | PermissionDenied) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The process whose number ends a name. One that has taken a dead one's number only puts a sweep off.
pub(super) fn maker(name: &str) -> Option<u32> {
    name.rsplit_once('.')?.1.parse().ok()
}

/// Does a name end with the number of a process that is gone? Then nobody finishes what it began.
pub fn is_orphan(name: &str) -> bool {
    maker(name).is_some_and(|pid| !exists(pid))
}

/// Makes a folder that appears with its owner, mode and whatever else `finish` gives it: it is made as `hidden`, on the same file
/// system, and renamed. One that another process makes at the same time is as good.
pub fn make_finished(dir: &Path, hidden: &Path, finish: impl Fn(&Path) -> io::Result<()>) -> io::Result<()> {
    let mut tries = 0;
    loop {
        let make = || {
            match fs::create_dir(hidden) {
                // A killed process's, or another's that makes the same.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                made => made?,
            }
            kill::point(Point::FolderBegun);
            finish(hidden)?;
            // Never onto one that is there: of two makers, the slower may hold one that a third has only begun, and an empty folder
            // would be replaced by it.
            match renameat_with(CWD, hidden, CWD, dir, RenameFlags::NOREPLACE) {
                // A file system that does not know how.
                Err(Errno::INVAL | Errno::NOSYS) => fs::rename(hidden, dir),
                renamed => renamed.map_err(io::Error::from),
            }
        };
        let Err(e) = make() else { return Ok(()) };
        // Ours to remove where the folder above is, even if another user's process began it.
        let _ = fs::remove_dir(hidden);
        if dir.is_dir() {
            return Ok(());
        }
        tries += 1;
        if tries == MAKE_TRIES {
            return Err(e);
        }
        std::thread::sleep(MAKE_PAUSE);
    }
}

/// The name under which a folder is made beside the place that it is to have; [`sweep`] knows it.
pub fn hidden(dir: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(dir.file_name().unwrap_or_default());
    name.push(UNFINISHED);
    dir.with_file_name(name)
}

/// Writes a value as JSON, atomically.
pub fn write_json<T: Serialize>(path: &Path, value: &T, mode: u32) -> Result<(), Error> {
    let io = |source| Error::Io {
        action: "write",
        path: path.to_owned(),
        source,
    };
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| io(e.into()))?;
    text.push(b'\n');
    write_atomic(path, &text, mode).map_err(io)
}

/// Reads a value from JSON; `None` where there is no file.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    match fs::read(path) {
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(|e| Error::Damaged {
                path: path.to_owned(),
                message: e.to_string(),
            }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Io {
            action: "read",
            path: path.to_owned(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of a process that is gone.
    fn dead() -> u32 {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        child.id()
    }

    #[test]
    fn what_killed_processes_left_half_made_is_swept_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let (gone, alive) = (format!("net.json.{}.new", dead()), "net.json.1.new");
        for name in [&gone, alive, "net.json", "other.new", "net.json.x.new"] {
            fs::write(at(name), "").unwrap();
        }
        fs::create_dir(at(".slots.new")).unwrap();
        fs::create_dir_all(at(".mine.new/file")).unwrap();
        sweep(folder.path()).unwrap();
        let mut left: Vec<String> = fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort_unstable();
        assert_eq!(
            left,
            [".mine.new", "net.json", alive, "net.json.x.new", "other.new"]
        );
        sweep(&at("none")).unwrap();
    }

    #[test]
    fn a_folder_that_a_killed_process_began_is_finished_by_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("slots");
        fs::create_dir(hidden(&dir)).unwrap();
        let private = |path: &Path| fs::set_permissions(path, Permissions::from_mode(0o2771));
        make_finished(&dir, &hidden(&dir), private).unwrap();
        assert_eq!(dir.metadata().unwrap().permissions().mode() & 0o7777, 0o2771);
        assert!(!hidden(&dir).exists());
    }

    #[test]
    fn a_folder_that_cannot_be_finished_is_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("slots");
        let refused = |_: &Path| Err(io::ErrorKind::PermissionDenied.into());
        let error = make_finished(&dir, &hidden(&dir), refused).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn however_many_make_a_folder_at_once_each_finds_it_finished() {
        let folder = tempfile::tempdir().unwrap();
        for round in 0..200 {
            let dir = folder.path().join(round.to_string());
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        let finish = |path: &Path| fs::set_permissions(path, Permissions::from_mode(0o2771));
                        make_finished(&dir, &hidden(&dir), finish).unwrap();
                        assert_eq!(dir.metadata().unwrap().permissions().mode() & 0o7777, 0o2771);
                    });
                }
            });
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 200);
    }
}
