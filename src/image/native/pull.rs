//! Fetches an image: all of its index, and then, part by part, what that names.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::FILES;
use super::catalogue::{Catalogue, Maker};
use super::joined::Joined;
use super::need::Need;
use super::reader::Reader;
use super::segments::Segments;
use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::fetch::partial::Work;
use crate::image::fetch::pieces::{self, Known};
use crate::image::fetch::progress::Progress;
use crate::image::fetch::source::{Source, told};
use crate::image::format::{BOOT_FILE_MAX, Workplace};
use crate::image::plan::Pieces;

/// What a pull needs.
pub(in crate::image) struct Pull<'a> {
    pub(in crate::image) source: &'a Source,
    pub(in crate::image) place: &'a Workplace,
    /// Folders of images that may have chunks already.
    pub(in crate::image) others: Vec<PathBuf>,
    /// Whose folder the place is. Lives until no thread works there any more.
    pub(in crate::image) work: &'a Arc<Work>,
    /// The image's packed size in bytes.
    pub(in crate::image) total: u64,
    pub(in crate::image) progress: &'a dyn Progress,
}

/// Fetches everything into the place, with a list of the disk's chunks. Says which of [`FILES`] there are. What all of it takes is
/// asked for once, before any of it is fetched.
///
/// # Errors
/// What the source and the engine say, [`Error::Malformed`] for an index that is not what it should be,
/// [`Error::TooLarge`], and [`Error::DiskFull`].
pub(in crate::image) async fn pull(pull: Pull<'_>, reader: Reader) -> Result<[bool; FILES.len()], Error> {
    // Before room is asked for: what an earlier pull has left of the lists is written again.
    let mut maker = Maker::create(&pull.place.dir).map_err(|error| pull.write_failed(error))?;
    let reading = pull.read(reader.clone());
    let index = told(pull.progress, &pull.place.meter, pull.total, reading).await?;
    pull.place.room().require(pull.work.will_hold(index.need)?)?;
    pull.carry_out(&index.segments, reader, &mut maker).await?;
    maker.finish().map_err(|error| pull.write_failed(error))?;
    Ok(index.files)
}

/// An index that has been read, and is good.
struct Index {
    segments: Segments,
    /// Bytes that the image takes.
    need: u64,
    /// Which of [`FILES`] there are.
    files: [bool; FILES.len()],
}

impl Pull<'_> {
    /// Reads all of the index, and keeps it.
    async fn read(&self, mut reader: Reader) -> Result<Index, Error> {
        let mut segments = Segments::create(&self.place.dir).map_err(|error| self.write_failed(error))?;
        let mut need = Need::new();
        for segment in reader.segments().to_vec() {
            let bytes = self.source.config(&segment).await?;
            self.place.meter.add_fetched(&segment, bytes.len());
            let plan = self.next(&mut reader, &bytes)?;
            within(&plan, self)?;
            need.add(&plan);
            segments.add(&bytes).map_err(|error| self.write_failed(error))?;
        }
        Ok(Index {
            segments,
            need: need.bytes(),
            files: reader.finish().map_err(|reason| self.malformed(reason))?,
        })
    }

    /// Fetches what an index names.
    async fn carry_out(
        &self,
        segments: &Segments,
        mut reader: Reader,
        maker: &mut Maker,
    ) -> Result<(), Error> {
        let catalogue = Arc::new(Catalogue::open(self.others.iter().cloned()));
        let mut joined = Joined::default();
        for number in 0..segments.len() {
            let bytes = segments.get(number).map_err(Error::storage(&self.place.dir))?;
            joined.add(self.next(&mut reader, &bytes)?);
            if joined.is_enough() {
                let plan = std::mem::take(&mut joined).finish();
                self.fetch(&catalogue, maker, plan).await?;
            }
        }
        if joined.is_empty() {
            return Ok(());
        }
        self.fetch(&catalogue, maker, joined.finish()).await
    }

    /// Fetches what a plan names, and lists it.
    async fn fetch(&self, catalogue: &Arc<Catalogue>, maker: &mut Maker, plan: Pieces) -> Result<(), Error> {
        maker.add(&plan).map_err(|error| self.write_failed(error))?;
        let plan = Arc::new(plan);
        let (wanted, lists) = (Arc::clone(&plan), Arc::clone(catalogue));
        // A list that could not be looked through has nothing.
        let found = tokio::task::spawn_blocking(move || lists.look_up(&wanted))
            .await
            .unwrap_or_default();
        let known: Option<Arc<dyn Known>> = (!found.is_empty()).then(|| Arc::new(Found(found)) as _);
        pieces::fetch(
            self.source,
            plan,
            self.place,
            known,
            Arc::clone(self.work) as _,
            self.total,
            self.progress,
        )
        .await
    }

    fn next(&self, reader: &mut Reader, bytes: &[u8]) -> Result<Pieces, Error> {
        reader.next(bytes).map_err(|reason| self.malformed(reason))
    }

    fn malformed(&self, reason: String) -> Error {
        Error::Malformed {
            image: self.place.image.clone(),
            reason,
        }
    }

    fn write_failed(&self, error: io::Error) -> Error {
        self.place.room().write_failed(&self.place.dir, error, 0)
    }
}

fn within(plan: &Pieces, pull: &Pull<'_>) -> Result<(), Error> {
    for file in &plan.files {
        let (what, limit) = if file.name == FILES[0] {
            ("virtual disk", pull.place.limits.max_disk)
        } else {
            ("kernel or initrd", BOOT_FILE_MAX)
        };
        if file.length > limit {
            return Err(Error::TooLarge {
                image: pull.place.image.clone(),
                what,
                size: file.length,
                limit,
            });
        }
    }
    Ok(())
}

/// What the host has of a plan.
struct Found(HashMap<(Digest, u64), (PathBuf, u64)>);

impl Known for Found {
    fn find(&self, digest: &Digest, length: u64) -> Option<(PathBuf, u64)> {
        self.0.get(&(*digest, length)).cloned()
    }
}
