//! containerDisk: a container image with exactly one file under `disk/`, as KubeVirt reads it.
//!
//! The image may also bring files under `boot/`, which labels of its config name as kernel and initrd.

use std::io::Read;

use super::archive::{Archive, Entry, Kind};
use super::{BOOT_FILE_MAX, BootFiles, Contents, Error, Workplace, plain, quoted};
use crate::image::decompress::{Peeked, unreadable};
use crate::image::inspect::{self, Hostility};

/// Marks of a layer that takes away what the layers below it have (OCI image specification, `layer.md`).
const WHITEOUT: &str = ".wh.";
const OPAQUE: &str = ".wh..wh..opq";

/// Is this the path of a disk: directly under `disk/`?
pub(super) fn is_disk(path: &str) -> bool {
    path.strip_prefix("disk/").is_some_and(|name| !name.contains('/'))
}

/// Takes the files that we need out of one layer, passing over at most `idle` bytes of others.
pub(super) fn take(
    layer: &mut impl Read,
    number: usize,
    boot: &BootFiles,
    place: &Workplace,
    contents: &mut Contents,
    idle: u64,
) -> Result<(), Error> {
    let mut archive = Archive::new(layer, &place.image, idle);
    while let Some(entry) = archive.next()? {
        let (parent, name) = entry.path.rsplit_once('/').unwrap_or(("", &entry.path));
        if name == OPAQUE {
            let below = format!("{parent}/");
            contents.remove_below(number, |path| parent.is_empty() || path.starts_with(&below))?;
            continue;
        }
        if let Some(gone) = name.strip_prefix(WHITEOUT) {
            let gone = if parent.is_empty() {
                gone.to_owned()
            } else {
                format!("{parent}/{gone}")
            };
            contents.remove_below(number, |path| is_at_or_below(path, &gone))?;
            continue;
        }
        let boot_file = [&boot.kernel, &boot.initrd]
            .into_iter()
            .flatten()
            .find(|path| **path == entry.path);
        if let Some(class) = misplaced(&entry, boot_file.is_some(), boot) {
            return Err(Error::Hostile {
                image: place.image.clone(),
                class,
            });
        }
        let disk = is_disk(&entry.path);
        if !disk && boot_file.is_none() {
            continue;
        }
        match entry.kind {
            Kind::File => {}
            Kind::GnuSparse => {
                return Err(place.unsupported(format!(
                    "{} is stored in GNU tar's sparse encoding; archive it without --sparse",
                    quoted(&entry.path)
                )));
            }
            _ => continue,
        }
        if contents
            .files
            .get(&entry.path)
            .is_some_and(|taken| taken.layer == number)
        {
            return Err(Error::Hostile {
                image: place.image.clone(),
                class: Hostility::AmbiguousArchive("one file stands in it twice"),
            });
        }
        let other = contents
            .files
            .iter()
            .find(|(path, taken)| is_disk(path) && taken.layer == number);
        if let Some((other, _)) = other.filter(|_| disk) {
            return Err(place.unsupported(format!(
                "it has more than one file under disk/: {} and {}",
                quoted(other),
                quoted(&entry.path)
            )));
        }
        let file = contents.next_file(&place.dir);
        let mut body = Peeked::new(archive.body(), 4).map_err(|error| unreadable(&place.image, error))?;
        let dense = !disk || inspect::is_qcow2(body.head());
        let (what, limit) = if disk {
            ("disk", place.limits.max_disk)
        } else {
            ("kernel or initrd", BOOT_FILE_MAX)
        };
        plain::copy(&mut body, Some(entry.size), dense, what, limit, place, &file)?;
        contents.put(&entry.path, number, file)?;
    }
    Ok(())
}

fn is_at_or_below(path: &str, root: &str) -> bool {
    path.strip_prefix(root)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// A link or device where one of our files or its folder belongs: somebody wants us to look elsewhere.
fn misplaced(entry: &Entry, boot_file: bool, boot: &BootFiles) -> Option<Hostility> {
    let folder_of_ours = entry.path == "disk"
        || [&boot.kernel, &boot.initrd]
            .into_iter()
            .flatten()
            .any(|path| *path != entry.path && is_at_or_below(path, &entry.path) && !entry.path.is_empty());
    let ours = folder_of_ours || boot_file || is_disk(&entry.path);
    match entry.kind {
        Kind::Link if ours => Some(Hostility::Link(entry.path.clone())),
        Kind::Special if ours => Some(Hostility::SpecialFile(entry.path.clone())),
        Kind::File | Kind::GnuSparse if folder_of_ours => Some(Hostility::SpecialFile(entry.path.clone())),
        _ => None,
    }
}
