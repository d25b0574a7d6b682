//! The files under a disk of this host, as each of them names the next.
//!
//! Only files that passed the header check are opened, each with the format that the file above it names; nothing is
//! probed.

use std::path::{Path, PathBuf};

use crate::image::error::Error;
use crate::image::inspect::{self, DiskFormat, Said};
use crate::image::view::{self, DEPTH_MAX, Guest};

/// Opens the topmost file of a chain, and what lies under it. `format` is what its owner says that it is.
pub(super) fn open(path: &Path, format: DiskFormat, limit: u64) -> Result<Box<dyn Guest + Send>, Error> {
    let mut layers = Vec::new();
    let mut next = Some((path.to_owned(), format));
    while let Some((path, format)) = next {
        let unusable = |reason: &str| Error::Unsupported {
            image: path.display().to_string(),
            reason: reason.to_owned(),
        };
        if layers.len() == DEPTH_MAX {
            return Err(unusable("it lies under 64 other files, or they lie in a circle"));
        }
        let (seen, backing) = inspect::layer(&path, limit, &path.display().to_string())?;
        if seen.format != format {
            return Err(unusable(match format {
                DiskFormat::Qcow2 => "it should be a qcow2 and is none",
                // A guest can write a header of its own into a raw disk.
                DiskFormat::Raw => {
                    "it should be raw and begins like a qcow2, so that nobody can tell which it is"
                }
            }));
        }
        next = match backing {
            None => None,
            Some(backing) => {
                let below = below(&path, &backing.name).ok_or_else(|| {
                    unusable("its backing file is named in a way that only QEMU understands")
                })?;
                let Said::Format(format) = backing.format else {
                    return Err(unusable(
                        "it does not say which format its backing file has; `qemu-img rebase -u -F` can tell it",
                    ));
                };
                Some((below, format))
            }
        };
        layers.push((path, format));
    }
    view::stacked(&layers)
}

/// The path of a backing file; none for what is no plain path (`json:…`, `nbd://…`).
fn below(layer: &Path, name: &Path) -> Option<PathBuf> {
    let text = name.to_str()?;
    let first = text.split('/').next().unwrap_or_default();
    if text.is_empty() || first.contains(':') {
        return None;
    }
    // Relative to the file that names it, as QEMU has it.
    Some(layer.parent().unwrap_or(Path::new(".")).join(name))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const LIMIT: u64 = 1 << 40;

    #[test]
    fn only_plain_paths_lead_below() {
        let below = |name: &str| below(Path::new("/vms/top.qcow2"), Path::new(name));
        assert_eq!(below("base.img").unwrap(), Path::new("/vms/base.img"));
        assert_eq!(below("/b/base.img").unwrap(), Path::new("/b/base.img"));
        assert_eq!(below("a/b:c").unwrap(), Path::new("/vms/a/b:c"));
        for name in ["json:{}", "nbd://x", "file:x", ""] {
            assert_eq!(below(name), None, "{name}");
        }
    }

    fn tool(arguments: &[&str], dir: &Path) {
        let status = Command::new("qemu-img").args(arguments).current_dir(dir).status();
        assert!(status.unwrap().success(), "{arguments:?}");
    }

    fn all(guest: &dyn Guest) -> Vec<u8> {
        let mut disk = vec![0; usize::try_from(guest.size()).unwrap()];
        let mut at = 0;
        while let Some(data) = guest.next_data(at..guest.size()).unwrap() {
            assert!(data.start >= at && data.end > data.start && data.end <= guest.size());
            let range = usize::try_from(data.start).unwrap()..usize::try_from(data.end).unwrap();
            guest.read(&mut disk[range], data.start).unwrap();
            at = data.end;
        }
        disk
    }

    /// Bytes that pack a little, with long stretches of zeros.
    fn content() -> Vec<u8> {
        let mut state = 7_u64;
        let mut disk = vec![0_u8; 40 << 20];
        for start in [0, 65_536 * 3, 5 << 20, (20 << 20) + 512, (40 << 20) - 70_000] {
            for byte in disk.iter_mut().skip(start).take(70_000) {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (state >> 60).to_le_bytes()[0];
            }
        }
        disk
    }

    #[test]
    #[ignore = "needs qemu-img"]
    fn every_kind_of_qcow2_reads_as_qemu_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let disk = content();
        std::fs::write(dir.path().join("disk.raw"), &disk).unwrap();
        for options in [
            vec![],
            vec!["-o", "compat=0.10"],
            vec!["-o", "cluster_size=4096"],
            vec!["-o", "extended_l2=on,cluster_size=128k"],
            vec!["-c"],
            vec!["-c", "-o", "compression_type=zstd"],
            vec!["-c", "-o", "cluster_size=2M"],
            vec!["-S", "0"],
        ] {
            let mut arguments = vec!["convert", "-q", "-f", "raw", "-O", "qcow2"];
            arguments.extend(&options);
            arguments.extend(["disk.raw", "disk.qcow2"]);
            tool(&arguments, dir.path());
            let guest = open(&dir.path().join("disk.qcow2"), DiskFormat::Qcow2, LIMIT).unwrap();
            assert!(all(&*guest) == disk, "{options:?}");
        }
    }

    #[test]
    #[ignore = "needs qemu-img"]
    fn a_chain_reads_as_its_topmost_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut disk = content();
        std::fs::write(dir.path().join("base.raw"), &disk).unwrap();
        tool(
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-F",
                "raw",
                "-b",
                "base.raw",
                "mid.qcow2",
            ],
            dir.path(),
        );
        tool(
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-F",
                "qcow2",
                "-b",
                "mid.qcow2",
                "top.qcow2",
                "50M",
            ],
            dir.path(),
        );
        let top = dir.path().join("top.qcow2");
        let write = |file: &str, command: &str| {
            let status = Command::new("qemu-io")
                .args(["-f", "qcow2", "-c", command, file])
                .current_dir(dir.path())
                .stdout(std::process::Stdio::null())
                .status();
            assert!(status.unwrap().success());
        };
        write("mid.qcow2", "write -P 7 5M 64k");
        write("top.qcow2", "write -z 0 64k");
        write("top.qcow2", "write -P 9 45M 4k");
        disk[5 << 20..(5 << 20) + 65_536].fill(7);
        disk[..65_536].fill(0);
        disk.resize(50 << 20, 0);
        disk[45 << 20..(45 << 20) + 4096].fill(9);
        let guest = open(&top, DiskFormat::Qcow2, LIMIT).unwrap();
        assert!(all(&*guest) == disk);

        // A chain in a circle, a format that is not said, another format than is said.
        tool(
            &[
                "rebase",
                "-u",
                "-f",
                "qcow2",
                "-F",
                "qcow2",
                "-b",
                "top.qcow2",
                "mid.qcow2",
            ],
            dir.path(),
        );
        let refused = |path: &Path, format| open(path, format, LIMIT).err().unwrap().to_string();
        assert!(refused(&top, DiskFormat::Qcow2).contains("circle"));
        assert!(refused(&top, DiskFormat::Raw).contains("should be raw"));
        assert!(refused(&dir.path().join("base.raw"), DiskFormat::Qcow2).contains("is none"));
    }
}
