//! Files that get their name when they are whole, so that whatever ends us leaves nothing behind.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

/// A file that nobody finds by a name. Dropped, it is gone.
#[derive(Debug)]
pub struct Unnamed {
    file: File,
    /// Where it is meanwhile on a file system on which every file has a name.
    scratch: Option<Scratch>,
}

/// A name that goes with this value.
#[derive(Debug)]
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // It is of no use, and the reason to end is the one that counts.
        let _ = fs::remove_file(&self.0);
    }
}

impl Unnamed {
    /// Begins one that is to get its name in `dir`.
    ///
    /// # Errors
    /// What the system says, such as that there is no such folder.
    pub fn begin(dir: &Path, mode: u32) -> io::Result<Self> {
        let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
        match rustix::fs::open(dir, flags, Mode::from_raw_mode(mode)) {
            Ok(file) => Ok(Self {
                file: file.into(),
                scratch: None,
            }),
            // A file system that does not know how, such as NFS.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
                let scratch = dir.join(format!(".{}.tmp", uuid::Uuid::new_v4().simple()));
                let file = OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(mode)
                    .open(&scratch)?;
                Ok(Self {
                    file,
                    scratch: Some(Scratch(scratch)),
                })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The file, to be written.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Gives it its name once its bytes are on the disk. What has that name already stays.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`], or whatever else the system says.
    pub fn name(&self, path: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        match &self.scratch {
            Some(Scratch(scratch)) => fs::hard_link(scratch, path)?,
            None => {
                let open = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                rustix::fs::linkat(CWD, open, CWD, path, AtFlags::SYMLINK_FOLLOW)?;
            }
        }
        File::open(folder_of(path))?.sync_all()
    }

    /// Gives it its name, and takes it from whatever has it. `through` is a name beside it that is free for this: what a killed
    /// process left there is removed.
    ///
    /// # Errors
    /// What the system says.
    pub fn replace(&self, path: &Path, through: &Path) -> io::Result<()> {
        match fs::remove_file(through) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        self.name(through)?;
        fs::rename(through, path)?;
        File::open(folder_of(path))?.sync_all()
    }
}

/// The folder that a file is in; the current one for a bare name.
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if dir != Path::new("") => dir,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn of(dir: &Path, bytes: &[u8]) -> Unnamed {
        let unnamed = Unnamed::begin(dir, 0o600).unwrap();
        unnamed.file().write_all(bytes).unwrap();
        unnamed
    }

    #[test]
    fn a_file_appears_whole_and_takes_no_name_from_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let count = || fs::read_dir(dir.path()).unwrap().count();
        let first = of(dir.path(), b"first");
        assert_eq!(count(), 0);
        first.name(&path).unwrap();
        let second = of(dir.path(), b"second");
        let error = second.name(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!((fs::read(&path).unwrap(), count()), (b"first".to_vec(), 1));
        // Also where a killed process was at it.
        let through = dir.path().join("disk.tmp");
        fs::write(&through, "half").unwrap();
        second.replace(&path, &through).unwrap();
        assert_eq!((fs::read(&path).unwrap(), count()), (b"second".to_vec(), 1));
    }

    #[test]
    fn a_file_that_has_a_name_meanwhile_loses_it() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = dir.path().join(".scratch");
        let unnamed = Unnamed {
            file: File::create(&scratch).unwrap(),
            scratch: Some(Scratch(scratch)),
        };
        unnamed.name(&dir.path().join("disk")).unwrap();
        drop(unnamed);
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(names.len(), 1);
        assert_eq!(names[0].as_ref().unwrap().file_name(), "disk");
    }
}
