//! Unpacks what comes as streams: layers of archives, and disks packed as a whole.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::recognise::{Format, listed, media_types};
use super::stack::Drive;
use super::{Error, archive, container_disk, plain, quoted};
use crate::image::decompress::{Compression, Peeked, unreadable};
use crate::image::digest::{Digest, Hasher};
use crate::image::hints::BootFiles;
use crate::image::inspect::Hostility;
use crate::image::ledger::Ledger;
use crate::image::manifest::{Descriptor, Manifest};
use crate::image::plan;
use crate::image::progress::Meter;
use crate::image::room::{Limits, Room};
use crate::image::store::remove;

/// What a containerDisk may hold beside its disk, unpacked, in bytes: a whole operating system, for disks
/// that were put on top of an ordinary container image.
const OTHER_FILES_MAX: u64 = 8 << 30;

/// Largest image by its packed bytes: a disk, what may stand beside it, and what packing adds to bytes that it cannot make fewer.
/// What claims more is none that could be unpacked.
pub(in crate::image) fn packed_max(limits: Limits) -> u64 {
    let unpacked = limits.max_disk.saturating_add(OTHER_FILES_MAX);
    unpacked.saturating_add(unpacked / 64)
}

/// Bytes that tell a tar from a disk: one header.
const TAR_HEADER: usize = 512;

/// Where an image is unpacked, and within which bounds.
#[derive(Debug, Clone)]
pub(in crate::image) struct Workplace {
    /// The reference, for errors.
    pub(in crate::image) image: String,
    /// An empty folder that nobody else looks at.
    pub(in crate::image) dir: PathBuf,
    pub(in crate::image) limits: Limits,
    pub(in crate::image) meter: Arc<Meter>,
    /// What was read of the layer in hand.
    pub(in crate::image) ledger: Arc<Ledger>,
}

impl Workplace {
    pub(in crate::image) fn room(&self) -> Room {
        Room::new(&self.image, &self.dir, self.limits.keep_free)
    }

    pub(super) fn unsupported(&self, reason: impl Into<String>) -> Error {
        Error::Unsupported {
            image: self.image.clone(),
            reason: reason.into(),
        }
    }

    pub(super) fn malformed(&self, reason: impl Into<String>) -> Error {
        Error::Malformed {
            image: self.image.clone(),
            reason: reason.into(),
        }
    }
}

/// Files taken out of an image so far, by their paths in it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(in crate::image) struct Contents {
    pub(super) files: BTreeMap<String, Taken>,
    /// Files made in the work place, also those that a later layer replaced.
    made: u32,
    /// Bytes unpacked from all layers.
    unpacked: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Taken {
    /// Which layer it came from; a later one may replace it.
    pub(super) layer: usize,
    file: PathBuf,
}

/// The name under which a plain disk stands among [`Contents`].
const PLAIN_DISK: &str = "disk/plain";

/// How the names begin under which the files of one disk stand there, with the number of their layer behind.
const ONE_OF_SEVERAL: &str = "several/";

/// The files that a machine needs.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::image) struct Selected {
    pub(in crate::image) disk: PathBuf,
    pub(in crate::image) kernel: Option<PathBuf>,
    pub(in crate::image) initrd: Option<PathBuf>,
}

/// What a layer may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A tar archive.
    Archive,
    /// Either an archive or the disk itself: its bytes say.
    ArchiveOrDisk,
    /// A disk, whatever it begins with.
    Disk,
    /// The same, and other files may lie under it, or upon it.
    OneOfSeveral,
}

/// One stream to unpack.
#[derive(Debug, Clone)]
pub(in crate::image) struct Layer {
    pub(in crate::image) number: usize,
    pub(super) kind: Kind,
    /// Its packed bytes: one blob, or several that follow each other.
    pub(in crate::image) blobs: Vec<Descriptor>,
    /// What its unpacked bytes must hash to, where the config says so.
    pub(in crate::image) diff_id: Option<Digest>,
}

impl Layer {
    /// Is it a file that may have its place among others by its name?
    pub(in crate::image) fn is_one_of_several(&self) -> bool {
        self.kind == Kind::OneOfSeveral
    }
}

/// What the files of an image depend on, as one digest: its layers, which of their files are taken, and which of them its machine
/// has as a disk. Two images with the same have the same files, whatever else they say.
pub(in crate::image) fn made_of(layers: &[Layer], boot: &BootFiles, drives: &[Drive]) -> Digest {
    let mut hasher = Hasher::default();
    // Each part with its length, so that no two lists run together into the same bytes.
    let mut add = |part: &[u8]| {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    };
    for file in [&boot.kernel, &boot.initrd] {
        add(&[u8::from(file.is_some())]);
        add(file.as_deref().unwrap_or_default().as_bytes());
    }
    for layer in layers {
        let kind = match layer.kind {
            Kind::Archive => "archive",
            Kind::ArchiveOrDisk => "archive-or-disk",
            Kind::Disk => "disk",
            Kind::OneOfSeveral => "one-of-several",
        };
        add(kind.as_bytes());
        for blob in &layer.blobs {
            // An empty archive is told from an empty disk by its type.
            add(blob.media_type.as_bytes());
            add(blob.digest.as_bytes());
        }
        add(layer.diff_id.as_ref().map_or(&[][..], |id| id.as_bytes()));
    }
    for drive in drives {
        add(if drive.disk { b"drive" } else { b"other-drive" });
        add(drive.name.as_bytes());
    }
    hasher.finish()
}

/// Bytes of those layers that are surely packed, by their type: unpacked they are no fewer. What is not may be zeros, which take
/// no room.
pub(in crate::image) fn packed(layers: &[Layer]) -> u64 {
    let blobs = layers.iter().flat_map(|layer| &layer.blobs);
    let packed = blobs.filter(|blob| {
        ["gzip", "zstd", "xz"]
            .iter()
            .any(|name| blob.media_type.contains(name))
    });
    packed.fold(0, |sum, blob| sum.saturating_add(blob.size))
}

/// Takes the files that a machine needs out of one layer, and adds them to `contents`.
pub(in crate::image) fn unpack(
    unpacked: &mut dyn Read,
    compression: Compression,
    layer: &Layer,
    boot: &BootFiles,
    place: &Workplace,
    mut contents: Contents,
) -> Result<Contents, Error> {
    let size = layer
        .blobs
        .iter()
        .fold(0_u64, |sum, blob| sum.saturating_add(blob.size));
    let media_type = layer.blobs.first().map_or("", |blob| blob.media_type.as_str());
    if compression != Compression::None {
        // Packed bytes are never more than a little more than unpacked ones, holes being none.
        place.room().require(size)?;
    }
    let mut counted = Counted {
        inner: unpacked,
        count: contents.unpacked,
        limit: place.limits.max_disk.saturating_add(OTHER_FILES_MAX),
        image: &place.image,
    };
    let mut peeked =
        Peeked::new(&mut counted, TAR_HEADER).map_err(|error| unreadable(&place.image, error))?;
    match layer.kind {
        Kind::Archive | Kind::ArchiveOrDisk if archive::begins(peeked.head(), media_type) => {
            let idle = idle(size);
            container_disk::take(&mut peeked, layer.number, boot, place, &mut contents, idle)?;
            // What follows the archive, of which nobody reads anything either.
            let rest = io::copy(&mut peeked.by_ref().take(idle), &mut io::sink());
            if rest.map_err(|error| unreadable(&place.image, error))? == idle {
                let (image, class) = (place.image.clone(), Hostility::Bomb);
                return Err(Error::Hostile { image, class });
            }
        }
        Kind::Archive => {
            return Err(place.unsupported(format!(
                "its layer {} of type {} is no tar archive",
                layer.number + 1,
                quoted(media_type)
            )));
        }
        Kind::ArchiveOrDisk | Kind::Disk | Kind::OneOfSeveral => {
            let length = (compression == Compression::None).then_some(size);
            let path = if layer.is_one_of_several() {
                format!("{ONE_OF_SEVERAL}{}", layer.number)
            } else {
                PLAIN_DISK.to_owned()
            };
            plain::take(&mut peeked, length, place, &path, &mut contents)?;
        }
    }
    // To the end: the digest covers what follows the archive, too.
    io::copy(&mut peeked, &mut io::sink()).map_err(|error| unreadable(&place.image, error))?;
    drop(peeked);
    contents.unpacked = counted.count;
    Ok(contents)
}

impl Selected {
    /// The files that a plan made in `dir`.
    pub(in crate::image) fn planned(pieces: &plan::Pieces, dir: &Path) -> Self {
        let made = |name: &str| {
            let planned = pieces.files.iter().any(|file| file.name == name);
            planned.then(|| dir.join(name))
        };
        Self {
            disk: dir.join(super::RAW),
            kernel: made(super::KERNEL),
            initrd: made(super::INITRD),
        }
    }

    /// The disk, the kernel and the initial RAM disk, as far as they were made under the store's names.
    pub(in crate::image) fn made([_, kernel, initrd]: [bool; 3], dir: &Path) -> Self {
        Self {
            disk: dir.join(super::RAW),
            kernel: kernel.then(|| dir.join(super::KERNEL)),
            initrd: initrd.then(|| dir.join(super::INITRD)),
        }
    }
}

impl Contents {
    /// What the layers turned out to be.
    pub(in crate::image) fn format(&self, guess: Format) -> Format {
        match guess {
            Format::ContainerDisk | Format::Plain if self.files.contains_key(PLAIN_DISK) => Format::Plain,
            Format::Plain => Format::ContainerDisk,
            other => other,
        }
    }

    /// Picks the files that a machine needs, and refuses an image that leaves a choice.
    pub(in crate::image) fn select(
        mut self,
        boot: &BootFiles,
        manifest: &Manifest,
        bootc: bool,
        place: &Workplace,
    ) -> Result<Selected, Error> {
        let disks: Vec<String> = self
            .files
            .keys()
            .filter(|path| container_disk::is_disk(path))
            .cloned()
            .collect();
        let [disk] = disks.as_slice() else {
            return Err(place.unsupported(match disks.as_slice() {
                [] if bootc => {
                    "it is a bootc container; build a disk image from it first".to_owned()
                }
                [] => format!(
                    "it has no file under disk/, so it is an ordinary container or some other artifact (media types: {})",
                    listed(&media_types(manifest))
                ),
                [first, second, ..] => {
                    format!("it has more than one file under disk/: {} and {}", quoted(first), quoted(second))
                }
                [_] => String::new(),
            }));
        };
        let disk = self
            .files
            .remove(disk)
            .map(|taken| taken.file)
            .unwrap_or_default();
        let mut pick = |path: &Option<String>, label| match path {
            None => Ok(None),
            Some(path) => match self.files.remove(path) {
                Some(taken) => Ok(Some(taken.file)),
                None => Err(Error::Label {
                    image: place.image.clone(),
                    label,
                    reason: "names a file that the image does not have",
                }),
            },
        };
        let kernel = pick(&boot.kernel, "io.cannery.kernel")?;
        let initrd = pick(&boot.initrd, "io.cannery.initrd")?;
        Ok(Selected { disk, kernel, initrd })
    }

    /// The files of several layers of which one disk is to be made, in their order, while there are any.
    pub(in crate::image) fn several(&self) -> Vec<PathBuf> {
        let number = |path: &str| path.strip_prefix(ONE_OF_SEVERAL)?.parse::<usize>().ok();
        let mut found: Vec<(usize, &Taken)> = self
            .files
            .iter()
            .filter_map(|(path, taken)| Some((number(path)?, taken)))
            .collect();
        found.sort_by_key(|(number, _)| *number);
        found.into_iter().map(|(_, taken)| taken.file.clone()).collect()
    }

    /// The same, now that this file is the disk and the others are nothing.
    pub(in crate::image) fn became(mut self, disk: PathBuf) -> Self {
        self.files.retain(|path, _| !path.starts_with(ONE_OF_SEVERAL));
        let taken = Taken { layer: 0, file: disk };
        self.files.insert(PLAIN_DISK.to_owned(), taken);
        self
    }

    /// A path for the next file in the work place.
    pub(super) fn next_file(&mut self, dir: &Path) -> PathBuf {
        self.made += 1;
        dir.join(format!("file.{}", self.made))
    }

    /// Puts a file in, in place of what an earlier layer had there.
    pub(super) fn put(&mut self, path: &str, layer: usize, file: PathBuf) -> Result<(), Error> {
        match self.files.insert(path.to_owned(), Taken { layer, file }) {
            // Gone already where an earlier process was here.
            Some(old) => remove(&old.file),
            None => Ok(()),
        }
    }

    /// Takes out what earlier layers had at and below a path.
    pub(super) fn remove_below(&mut self, layer: usize, gone: impl Fn(&str) -> bool) -> Result<(), Error> {
        let hidden: Vec<String> = self
            .files
            .iter()
            .filter(|(path, taken)| taken.layer < layer && gone(path))
            .map(|(path, _)| path.clone())
            .collect();
        for path in hidden {
            if let Some(taken) = self.files.remove(&path) {
                remove(&taken.file)?;
            }
        }
        Ok(())
    }
}

/// How many unpacked bytes of a layer may serve nothing: a bomb must not cost more than what was sent for it. Files of an
/// operating system pack to a tenth at best.
fn idle(packed: u64) -> u64 {
    const ANYHOW: u64 = 64 << 20;
    const RATIO: u64 = 32;
    packed.saturating_mul(RATIO).saturating_add(ANYHOW)
}

/// Counts unpacked bytes and stops at the limit, so that a bomb costs no more than the largest
/// honest image.
struct Counted<'a, R> {
    inner: R,
    count: u64,
    limit: u64,
    image: &'a str,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.count += count as u64;
        if self.count > self.limit {
            return Err(io::Error::other(Error::TooLarge {
                image: self.image.to_owned(),
                what: "unpacked content",
                size: self.count,
                limit: self.limit,
            }));
        }
        Ok(count)
    }
}
