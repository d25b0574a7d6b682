//! An image that is the disk itself, plain or packed: one blob, or several that `split` made of one.

use std::io::Read;

use super::recognise::chunk;
use super::{Contents, Error, Facts, Kind, Layer, Parts, Workplace};
use crate::image::decompress::{Peeked, unreadable};
use crate::image::inspect;
use crate::image::sparse::SparseFile;

/// The layers of an image that is either a disk or archives.
pub(super) fn streams(facts: &Facts<'_>) -> Result<Parts, Error> {
    let layers = &facts.manifest.layers;
    let diff_id = |number: usize| facts.config.diff_ids.get(number).copied();
    if layers.len() > 1 && layers.iter().all(|layer| chunk(layer).is_some()) {
        let mut blobs = layers.clone();
        blobs.sort_by(|one, other| chunk(one).cmp(&chunk(other)));
        if blobs.windows(2).any(|pair| chunk(&pair[0]) == chunk(&pair[1])) {
            return Err(facts.malformed("two of its chunks have the same title"));
        }
        let kind = Kind::Disk;
        return Ok(Parts::Streams(vec![Layer {
            number: 0,
            kind,
            blobs,
            diff_id: None,
        }]));
    }
    let kind = if layers.len() == 1 {
        Kind::ArchiveOrDisk
    } else {
        Kind::Archive
    };
    let layers = layers.iter().enumerate().map(|(number, descriptor)| Layer {
        number,
        kind,
        blobs: vec![descriptor.clone()],
        diff_id: diff_id(number),
    });
    Ok(Parts::Streams(layers.collect()))
}

/// Writes the disk, which stands at `path` among the contents. `length` is its number of bytes, where it is known before.
pub(super) fn take(
    disk: &mut Peeked<impl Read>,
    length: Option<u64>,
    place: &Workplace,
    path: &str,
    contents: &mut Contents,
) -> Result<(), Error> {
    let qcow2 = inspect::is_qcow2(disk.head());
    let file = contents.next_file(&place.dir);
    copy(disk, length, qcow2, "disk", place.limits.max_disk, place, &file)?;
    contents.put(path, 0, file)
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
    let mut file = SparseFile::create(
        to,
        place.room(),
        place.meter.clone(),
        place.ledger.clone(),
        length.filter(|_| dense),
    )?;
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
