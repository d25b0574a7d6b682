//! KubeVirt's containerDisk: a tar with the disk as `disk/disk.img`, and a kernel under `boot/` where there is one.
//!
//! Source: KubeVirt's `docs/container-disks` and what its own builder writes: owner 107:107 (QEMU's user in its
//! containers), the folder 0555, the file 0444. Times are zero, so that the same disk gives the same digest.

use std::io::{self, Read, Write};

use tar::{EntryType, Header};

/// Where KubeVirt looks for the disk, whatever its format is.
pub(super) const DISK: &str = "disk/disk.img";
/// Where the labels say that the kernel and its initial RAM disk are.
pub(super) const KERNEL: &str = "boot/vmlinuz";
pub(super) const INITRD: &str = "boot/initrd";

/// QEMU's user and group in KubeVirt's containers.
const OWNER: u64 = 107;

const BLOCK: u64 = 512;

/// The archive in the making.
pub(super) struct Archive<W> {
    out: W,
    folders: Vec<String>,
}

impl<W: Write> Archive<W> {
    pub(super) fn new(out: W) -> Self {
        Self {
            out,
            folders: Vec::new(),
        }
    }

    /// Adds a file, behind its folder if that is new. `content` must write exactly `length` bytes.
    pub(super) fn add(
        &mut self,
        path: &str,
        length: u64,
        content: &mut dyn FnMut(&mut dyn Write) -> io::Result<()>,
    ) -> io::Result<()> {
        if let Some((folder, _)) = path.rsplit_once('/')
            && !self.folders.iter().any(|known| known == folder)
        {
            self.folders.push(folder.to_owned());
            header(
                &format!("{folder}/"),
                EntryType::Directory,
                0o555,
                0,
                &mut self.out,
            )?;
        }
        header(path, EntryType::Regular, 0o444, length, &mut self.out)?;
        let mut counted = Exactly {
            inner: &mut self.out,
            left: length,
        };
        content(&mut counted)?;
        if counted.left > 0 {
            return Err(changed());
        }
        let padding = length.next_multiple_of(BLOCK) - length;
        io::copy(&mut io::repeat(0).take(padding), &mut self.out)?;
        Ok(())
    }

    /// Two empty blocks are the end.
    pub(super) fn finish(mut self) -> io::Result<()> {
        io::copy(&mut io::repeat(0).take(2 * BLOCK), &mut self.out)?;
        Ok(())
    }
}

fn header(path: &str, kind: EntryType, mode: u32, length: u64, out: &mut dyn Write) -> io::Result<()> {
    // GNU's form: its sizes have no upper bound.
    let mut header = Header::new_gnu();
    header.set_path(path)?;
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(OWNER);
    header.set_gid(OWNER);
    header.set_username("qemu")?;
    header.set_groupname("qemu")?;
    header.set_mtime(0);
    header.set_size(length);
    header.set_cksum();
    out.write_all(header.as_bytes())
}

fn changed() -> io::Error {
    io::Error::other("the file changed while it was read")
}

/// Takes as many bytes as were announced, and no more.
struct Exactly<'a> {
    inner: &'a mut dyn Write,
    left: u64,
}

impl Write for Exactly<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.left = self.left.checked_sub(bytes.len() as u64).ok_or_else(changed)?;
        self.inner.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(length: u64, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        let mut archive = Archive::new(&mut out);
        archive.add(DISK, length, &mut |out| out.write_all(bytes))?;
        archive.finish()?;
        Ok(out)
    }

    #[test]
    fn the_archive_is_the_one_that_kubevirt_wants() {
        let bytes = one(700, &[7; 700]).unwrap();
        assert_eq!(bytes.len(), 512 + 512 + 1024 + 1024);
        let mut archive = tar::Archive::new(bytes.as_slice());
        let seen: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let header = entry.header();
                (
                    entry.path().unwrap().display().to_string(),
                    header.entry_type(),
                    header.mode().unwrap(),
                    (header.uid().unwrap(), header.gid().unwrap()),
                    header.mtime().unwrap(),
                    header.size().unwrap(),
                )
            })
            .collect();
        assert_eq!(
            seen,
            [
                ("disk/".to_owned(), EntryType::Directory, 0o555, (107, 107), 0, 0),
                (DISK.to_owned(), EntryType::Regular, 0o444, (107, 107), 0, 700),
            ]
        );
    }

    #[test]
    fn a_size_beyond_eight_gib_stands_in_the_header() {
        let mut out = Vec::new();
        header(DISK, EntryType::Regular, 0o444, 20 << 30, &mut out).unwrap();
        assert_eq!(Header::from_byte_slice(&out).size().unwrap(), 20 << 30);
    }

    #[test]
    fn a_file_that_changes_meanwhile_is_no_archive() {
        for bytes in [&[1; 99][..], &[1; 101]] {
            let error = one(100, bytes).unwrap_err();
            assert_eq!(error.to_string(), "the file changed while it was read");
        }
    }
}
