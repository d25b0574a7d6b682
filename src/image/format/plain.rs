//! An image that is one blob: the disk itself, plain or packed.

use std::io::Read;

use super::{Contents, Error, PLAIN_DISK, Workplace};
use crate::image::decompress::{Peeked, unreadable};
use crate::image::inspect;
use crate::image::sparse::SparseFile;

/// Writes the disk. `length` is its number of bytes, where it is known before.
pub(super) fn take(
    disk: &mut Peeked<impl Read>,
    length: Option<u64>,
    place: &Workplace,
    contents: &mut Contents,
) -> Result<(), Error> {
    let qcow2 = inspect::is_qcow2(disk.head());
    let file = contents.next_file(&place.dir);
    copy(disk, length, qcow2, "disk", place.limits.max_disk, place, &file)?;
    contents.put(PLAIN_DISK, 0, file)
}

/// Copies one file out of an image, within `limit` bytes.
pub(super) fn copy(
    from: &mut impl Read,
    length: Option<u64>,
    dense: bool,
    what: &'static str,
    limit: u64,
    place: &Workplace,
    to: &std::path::Path,
) -> Result<(), Error> {
    let too_large = |size| Error::TooLarge {
        image: place.image.clone(),
        what,
        size,
        limit,
    };
    if let Some(length) = length {
        if length > limit {
            return Err(too_large(length));
        }
        // A raw disk may be mostly holes; a qcow2 or a kernel takes the room of its length. Asking first
        // saves everybody else from a full disk in the meantime.
        if dense {
            place.room().require(length)?;
        }
    }
    let mut file = SparseFile::create(to, place.room(), place.meter.clone(), length.filter(|_| dense))?;
    let mut buffer = vec![0; 256 * 1024];
    let mut copied = 0_u64;
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(unreadable(&place.image, error)),
        };
        copied += count as u64;
        if copied > limit {
            return Err(too_large(copied));
        }
        file.write(&buffer[..count])?;
    }
    if length.is_some_and(|length| length != copied) {
        return Err(place.malformed("a layer ends before its content does"));
    }
    file.finish()?;
    Ok(())
}
