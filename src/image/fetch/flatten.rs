//! One disk of several files: each hears its name while it is unpacked; when all are here, they become one.
//!
//! ```text
//! beginnings of the streams ─▶ names ─┐
//! unpacked files ─▶ header check ─────┴─▶ which lie upon which ─▶ what a guest sees ─▶ one file
//! ```
//!
//! The files keep the names that we gave them. Until the one file is whole, they are there beside it; a process that is killed
//! meanwhile leaves them to the next one, which writes it anew.

use std::any::Any;
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::beginning::Beginning;
use super::decompress::{Peeked, unreadable};
use super::make::{Shown, keep};
use super::part::{CancelledOnDrop, blocking};
use super::partial::Work;
use super::provide::Pull;
use super::source::{Source, told};
use crate::image::error::Error;
use crate::image::format::stack::{self, Drive, Member};
use crate::image::format::{Contents, Workplace, packed_name};
use crate::image::inspect::{self, DiskFormat};
use crate::image::store::remove;
use crate::image::view::{self, Guest};
use crate::image::write;

/// The file that the others become.
const FLAT: &str = "flat";

/// Bytes of the disk that are looked through before somebody may stop it.
const WINDOW: u64 = 1 << 30;

/// Bytes written between two looks at the free space.
const LOOK_EVERY: u64 = 64 << 20;

/// The names of files by the numbers of their layers, as far as gzip could carry them.
type Names = BTreeMap<usize, Option<String>>;

/// Hears the name of a file, and writes it down before anything else of its layer is.
pub(super) struct Named {
    beginning: Arc<Beginning>,
    work: Arc<Work>,
}

impl Named {
    pub(super) fn new(source: &Source, work: &Arc<Work>) -> Self {
        Self {
            beginning: source.beginning(),
            work: Arc::clone(work),
        }
    }

    /// Gives the unpacked bytes on. Of a layer that another process has begun, that one has written down the name.
    pub(super) fn heard<'a>(
        &self,
        number: usize,
        unpacked: &'a mut dyn Read,
        image: &str,
    ) -> Result<impl Read + use<'a>, Error> {
        // One byte of the content has come, and so has all of the header in front of it.
        let unpacked = Peeked::new(unpacked, 1).map_err(|error| unreadable(image, error))?;
        if let Some(head) = self.beginning.heard() {
            let mut names: Names = self.work.names().unwrap_or_default();
            names.insert(number, packed_name(&head));
            self.work.keep_names(&names)?;
        }
        Ok(unpacked)
    }
}

impl Pull<'_> {
    /// Makes one disk of files that may be several; other contents stay as they are.
    pub(super) async fn one_disk(
        &self,
        contents: Contents,
        drives: Vec<Drive>,
        place: &Workplace,
        work: &Arc<Work>,
        total: u64,
    ) -> Result<Contents, Error> {
        let files = contents.several();
        if files.is_empty() {
            return Ok(contents);
        }
        let cancelled = CancelledOnDrop::default();
        let flattening = Flattening {
            names: work.names().unwrap_or_default(),
            files: files.clone(),
            drives,
            place: place.clone(),
            cancelled: Arc::clone(&cancelled.0),
            _held: Arc::clone(work) as _,
        };
        let shown = Shown::new(self.progress, work);
        let disk = told(&shown, &place.meter, total, blocking(move || flattening.disk()));
        let disk = disk.await?;
        // Before the files go: whoever comes then must not miss them.
        let contents = keep(work, files.len(), contents.became(disk.clone()))?;
        for file in files.iter().filter(|file| **file != disk) {
            remove(file)?;
        }
        Ok(contents)
    }
}

/// Several files on their way to be one.
struct Flattening {
    names: Names,
    files: Vec<PathBuf>,
    drives: Vec<Drive>,
    place: Workplace,
    cancelled: Arc<AtomicBool>,
    /// Lives until this thread is done here.
    _held: Arc<dyn Any + Send + Sync>,
}

impl Flattening {
    /// The file that is the machine's disk.
    fn disk(&self) -> Result<PathBuf, Error> {
        let (limit, image) = (self.place.limits.max_disk, &self.place.image);
        let mut members = Vec::new();
        for (number, file) in self.files.iter().enumerate() {
            let (seen, backing) = inspect::layer(file, limit, image)?;
            members.push(Member {
                name: self.names.get(&number).cloned().flatten(),
                format: seen.format,
                backing,
            });
        }
        let stack = stack::disk(&members, &self.drives).map_err(|reason| Error::Unsupported {
            image: image.clone(),
            reason,
        })?;
        let stack: Vec<(PathBuf, DiskFormat)> = stack
            .into_iter()
            .map(|number| (self.files[number].clone(), members[number].format))
            .collect();
        if let [(alone, _)] = stack.as_slice() {
            return Ok(alone.clone());
        }
        let path = self.place.dir.join(FLAT);
        let guest = view::stacked(&stack)?;
        self.write(&*guest, &path)
            .map_err(|error| self.failed(error, &path))?;
        Ok(path)
    }

    /// Writes what a guest sees: raw, as it is cloned fastest, unless it would be taken for something else then.
    fn write(&self, guest: &dyn Guest, path: &Path) -> io::Result<()> {
        let room = self.place.room();
        room.require(self.data_of(guest)?).map_err(io::Error::other)?;
        let is_raw = inspect::is_raw(guest.size(), |buffer, offset| guest.read(buffer, offset))?;
        let format = if is_raw {
            DiskFormat::Raw
        } else {
            DiskFormat::Qcow2
        };
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)?;
        let mut since_look = 0;
        write::fill(guest, format, &file, &mut |count| {
            CancelledOnDrop::check(&self.cancelled)?;
            self.place.meter.add_unpacked(count);
            since_look += count as u64;
            if since_look >= LOOK_EVERY {
                since_look = 0;
                // What must stay free is not touched.
                room.require(LOOK_EVERY).map_err(io::Error::other)?;
            }
            Ok(())
        })
    }

    /// How many bytes of a disk may be something else than zeros. That is what it takes at most, wherever its files have them.
    fn data_of(&self, guest: &dyn Guest) -> io::Result<u64> {
        let (mut at, mut data) = (0, 0);
        while at < guest.size() {
            CancelledOnDrop::check(&self.cancelled)?;
            let end = guest.size().min(at + WINDOW);
            match guest.next_data(at..end)? {
                Some(found) => {
                    data += found.end - found.start;
                    at = found.end;
                }
                None => at = end,
            }
        }
        Ok(data)
    }

    fn failed(&self, error: io::Error, path: &Path) -> Error {
        match error.downcast::<Error>() {
            Ok(ours) => ours,
            // The bytes are those that the image's author packed: another pull would find the same.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Error::Malformed {
                image: self.place.image.clone(),
                reason: format!("its disk cannot be put together ({error})"),
            },
            Err(error) => self.place.room().write_failed(path, error, 0),
        }
    }
}
