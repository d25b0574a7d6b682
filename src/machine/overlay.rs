//! A job's own files under its machine: the copy-on-write layer, and copies of a kernel.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, prlimit};
use tokio::process::Command;

use super::placement::Backing;
use crate::children;
use crate::kill::{self, Point};

/// Deadline of `qemu-img create`, which takes 20 ms; a host whose disk is overloaded may need seconds.
pub const CREATE_DEADLINE: Duration = Duration::from_secs(30);

/// Bounds for `qemu-img`: address space in bytes and processor time in seconds. It needs some 300 MiB (most of it
/// mapped libraries) and 20 ms.
const QEMU_IMG_MEMORY: u64 = 2 << 30;
const QEMU_IMG_CPU_SECONDS: u64 = 20;

/// Sector size; a disk is a whole number of sectors.
const SECTOR: u64 = 512;

/// Why a file could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The disk that was asked for is smaller than the image's.
    #[error("a disk of {} MiB is too small for the image, whose disk has {} MiB", size >> 20, image.div_ceil(1 << 20))]
    TooSmall {
        /// Asked for, in bytes.
        size: u64,
        /// The image's, in bytes.
        image: u64,
    },
    /// The host's disk is full.
    #[error("the host's disk is full: {} could not be written", .0.display())]
    Full(PathBuf),
    /// A file of the image is not where it should be.
    #[error("the image's file {} cannot be read: {source}", path.display())]
    Missing {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of the job cannot be written.
    #[error("{} cannot be written: {source}", path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// `qemu-img` is not installed or cannot be run.
    #[error("qemu-img cannot be run: {0}")]
    Tool(io::Error),
    /// `qemu-img` took too long.
    #[error("qemu-img did not finish within {} s", CREATE_DEADLINE.as_secs())]
    Late,
    /// `qemu-img` failed.
    #[error("qemu-img could not make the disk: {0}")]
    Failed(String),
}

/// Makes the job's layer on `backing`, `size` bytes large as the guest sees it (rounded up to whole sectors). `image_size` is
/// the virtual size of the backing disk, as its header check found it. Replaces what an earlier try left behind.
///
/// The file belongs to the caller and is 0600; libvirt lends it to QEMU's user while the machine runs. The backing file
/// is not opened, only named, with its format.
///
/// # Errors
/// [`Error::TooSmall`] is the job's author's (or the operator's, who set the size); the rest is the operator's.
pub async fn create(overlay: &Path, backing: &Backing, size: u64, image_size: u64) -> Result<(), Error> {
    if size < image_size {
        return Err(Error::TooSmall {
            size,
            image: image_size,
        });
    }
    File::open(&backing.path).map_err(|source| Error::Missing {
        path: backing.path.clone(),
        source,
    })?;
    own_file(overlay, 0o600)?;
    let mut command = Command::new("qemu-img");
    command
        .args([
            "create",
            "-q",
            "-u",
            "-f",
            "qcow2",
            "-F",
            backing.format.name(),
            "-b",
        ])
        .arg(&backing.path)
        .arg("--")
        .arg(overlay)
        .arg(size.next_multiple_of(SECTOR).to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    children::end_with_us(&mut command);
    let child = command.spawn().map_err(Error::Tool)?;
    bound(&child);
    kill::point(Point::OverlayBegun);
    let output = tokio::time::timeout(CREATE_DEADLINE, child.wait_with_output())
        .await
        .map_err(|_| Error::Late)?
        .map_err(Error::Tool)?;
    if output.status.success() {
        return Ok(());
    }
    // A half-made layer is of no use to anyone; the caller has the reason.
    let _ = std::fs::remove_file(overlay);
    Err(failure(overlay, &String::from_utf8_lossy(&output.stderr)))
}

/// Copies a kernel or initial RAM disk out of the store into the job's folder. libvirt gives such files to QEMU's user
/// while a machine runs, so a file that several machines use must not be handed to it. On file systems that can, the copy
/// shares the original's blocks.
///
/// # Errors
/// [`Error::Missing`], [`Error::Full`] or [`Error::Write`], the operator's.
pub fn private_copy(from: &Path, to: &Path) -> Result<(), Error> {
    let target = own_file(to, 0o400)?;
    copy_into(from, &target, to).inspect_err(|_| {
        // The caller gets the reason; a partial kernel would only mislead.
        let _ = std::fs::remove_file(to);
    })
}

/// The same into a file that is there, and whose name is or will be `to`.
///
/// # Errors
/// As of [`private_copy`].
pub fn copy_into(from: &Path, mut target: &File, to: &Path) -> Result<(), Error> {
    let mut source = File::open(from).map_err(|source| Error::Missing {
        path: from.to_owned(),
        source,
    })?;
    // Between two files this is copy_file_range, which clones where the file system can.
    if rustix::fs::ioctl_ficlone(target, &source).is_ok() {
        return Ok(());
    }
    io::copy(&mut source, &mut target)
        .map(drop)
        .map_err(|error| unwritable(to, error))
}

/// A new, empty file of the caller's own.
pub(super) fn own_file(path: &Path, mode: u32) -> Result<File, Error> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(unwritable(path, error)),
        _ => {}
    }
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .map_err(|error| unwritable(path, error))
}

fn unwritable(path: &Path, source: io::Error) -> Error {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::Full(path),
        _ => Error::Write { path, source },
    }
}

/// Bounds a running `qemu-img`. A limit that cannot be set (the process has ended already) is no loss.
fn bound(child: &tokio::process::Child) {
    let pid = child
        .id()
        .and_then(|id| i32::try_from(id).ok())
        .and_then(Pid::from_raw);
    if pid.is_some() {
        for (resource, limit) in [
            (Resource::As, QEMU_IMG_MEMORY),
            (Resource::Cpu, QEMU_IMG_CPU_SECONDS),
        ] {
            let limit = Rlimit {
                current: Some(limit),
                maximum: Some(limit),
            };
            let _ = prlimit(pid, resource, limit);
        }
    }
}

fn failure(overlay: &Path, stderr: &str) -> Error {
    if stderr.contains("No space left on device") || stderr.contains("Disk quota exceeded") {
        return Error::Full(overlay.to_owned());
    }
    let line = stderr
        .lines()
        .map(|line| line.trim().trim_start_matches("qemu-img: "))
        .rfind(|line| !line.is_empty())
        .unwrap_or("it gave no reason");
    Error::Failed(line.to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::placement::Format;
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_full_disk_is_recognised_in_the_tools_words() {
        let text = "qemu-img: /job/overlay.qcow2: Could not resize file: No space left on device\n";
        assert!(matches!(failure(Path::new("/job/o"), text), Error::Full(_)));
        let error = failure(Path::new("/o"), "Formatting…\nqemu-img: /o: bad thing\n\n");
        assert_eq!(
            error.to_string(),
            "qemu-img could not make the disk: /o: bad thing"
        );
    }

    #[tokio::test]
    async fn a_disk_smaller_than_the_image_is_refused_before_anything_is_made() {
        let folder = tempfile::tempdir().unwrap();
        let overlay = folder.path().join("overlay.qcow2");
        let backing = Backing {
            path: folder.path().join("none"),
            format: Format::Raw,
        };
        let error = create(&overlay, &backing, 5 << 20, (5 << 20) + 1)
            .await
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "a disk of 5 MiB is too small for the image, whose disk has 6 MiB"
        );
        let error = create(&overlay, &backing, 6 << 20, 6 << 20).await.unwrap_err();
        assert!(matches!(error, Error::Missing { .. }), "{error}");
        assert!(!overlay.exists());
    }

    #[test]
    fn a_private_copy_leaves_the_original_alone_and_replaces_an_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let [from, to] = ["vmlinuz", "copy"].map(|name| folder.path().join(name));
        std::fs::write(&from, "kernel").unwrap();
        std::fs::write(&to, "an older and longer one").unwrap();
        private_copy(&from, &to).unwrap();
        assert_eq!(std::fs::read(&to).unwrap(), b"kernel");
        assert_eq!(to.metadata().unwrap().permissions().mode() & 0o777, 0o400);
        let error = private_copy(&folder.path().join("none"), &to).unwrap_err();
        assert!(matches!(error, Error::Missing { .. }));
    }
}
