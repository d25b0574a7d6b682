//! The disk that is measured with: real files, laid out as a file system would, with as many holes behind them.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use super::cannot;
use crate::outcome::Failure;

/// Files begin on blocks, as in most file systems; what is left of the last one is zeros.
const BLOCK: u64 = 4096;

/// Writes files from below `from` to `disk` until they are `size` bytes, and as many bytes of hole behind them.
///
/// # Errors
/// There are not so many bytes, or the disk cannot be written.
pub(super) fn write(from: &Path, size: u64, disk: &Path) -> Result<(), Failure> {
    let written = fill(from, size, disk).map_err(|e| cannot("write", disk, &e))?;
    if written < size {
        return Err(Failure::system(format!(
            "the files below {} are only {} of the {} that the bench wants",
            from.display(),
            crate::report::bytes(written),
            crate::report::bytes(size)
        ))
        .hint("Name a larger folder with --data, or a smaller --size"));
    }
    Ok(())
}

fn fill(from: &Path, size: u64, disk: &Path) -> io::Result<u64> {
    let mut out = File::create(disk)?;
    let mut written = 0;
    let mut folders = vec![from.to_owned()];
    while let Some(folder) = folders.pop() {
        // In the order of their names, so that two runs measure the same.
        let Ok(entries) = std::fs::read_dir(&folder) else {
            continue;
        };
        let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            let Ok(data) = path.symlink_metadata() else {
                continue;
            };
            if data.is_dir() {
                folders.push(path);
            } else if data.is_file()
                && let Ok(file) = File::open(&path)
            {
                let copied = io::copy(&mut file.take(size - written), &mut out)?;
                written = (written + copied).next_multiple_of(BLOCK).min(size);
                out.seek(SeekFrom::Start(written))?;
            }
            if written >= size {
                out.set_len(2 * size)?;
                out.sync_all()?;
                return Ok(written);
            }
        }
    }
    out.flush()?;
    Ok(written)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn a_disk_is_half_full_of_the_files_that_there_are() {
        let dir = tempfile::tempdir().unwrap();
        let (files, disk) = (dir.path().join("files"), dir.path().join("disk"));
        std::fs::create_dir_all(files.join("sub")).unwrap();
        std::fs::write(files.join("a"), [1; 5000]).unwrap();
        std::fs::write(files.join("sub/b"), [2; 90_000]).unwrap();
        write(&files, 65_536, &disk).unwrap();
        let bytes = std::fs::read(&disk).unwrap();
        assert_eq!(bytes.len(), 131_072);
        assert_eq!(
            (
                bytes[4999],
                bytes[5000],
                bytes[8192],
                bytes[65_535],
                bytes[65_536]
            ),
            (1, 0, 2, 2, 0)
        );
        assert!(disk.metadata().unwrap().blocks() * 512 <= 65_536);
        let failure = write(&files, 1 << 20, &disk).unwrap_err();
        assert!(
            failure.message.contains("are only 96.0 KiB of the 1.0 MiB"),
            "{}",
            failure.message
        );
    }
}
