//! Fetches an image: its index part by part, and what each part names.

use std::any::Any;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::FILES;
use super::catalogue::{Catalogue, Maker};
use super::joined::Joined;
use super::reader::Reader;
use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::fetch::pieces::{self, Known};
use crate::image::fetch::progress::Progress;
use crate::image::fetch::source::Source;
use crate::image::format::{BOOT_FILE_MAX, Workplace};
use crate::image::plan::Pieces;

/// What a pull needs.
pub(in crate::image) struct Pull<'a> {
    pub(in crate::image) source: &'a Source,
    pub(in crate::image) place: &'a Workplace,
    /// Folders of images that may have chunks already.
    pub(in crate::image) others: Vec<PathBuf>,
    /// Lives until no thread works in the place any more.
    pub(in crate::image) held: Arc<dyn Any + Send + Sync>,
    /// The image's packed size in bytes.
    pub(in crate::image) total: u64,
    pub(in crate::image) progress: &'a dyn Progress,
}

/// Fetches everything into the place, with a list of the disk's chunks. Says which of [`FILES`] there are.
///
/// # Errors
/// What the source and the engine say, [`Error::Malformed`] for an index that is not what it should be, and
/// [`Error::TooLarge`].
pub(in crate::image) async fn pull(pull: Pull<'_>, mut reader: Reader) -> Result<[bool; FILES.len()], Error> {
    let image = &pull.place.image;
    let malformed = |reason| Error::Malformed {
        image: image.clone(),
        reason,
    };
    let catalogue = Arc::new(Catalogue::open(pull.others.iter().cloned()));
    let dir = &pull.place.dir;
    let mut maker = Maker::create(dir).map_err(Error::storage(dir))?;
    let mut waiting: Option<Joined> = None;
    for segment in reader.segments().to_vec() {
        let bytes = pull.source.config(&segment).await?;
        let plan = reader.next(&bytes).map_err(malformed)?;
        within(&plan, &pull)?;
        match &mut waiting {
            None => waiting = Some(Joined::new(plan)),
            Some(before) => before.add(plan),
        }
        if let Some(joined) = waiting.take_if(|joined| joined.is_enough()) {
            fetch(&pull, &catalogue, &mut maker, joined.finish()).await?;
        }
    }
    // The last of it only when all of the index is known to be good.
    let files = reader.finish().map_err(malformed)?;
    if let Some(joined) = waiting {
        fetch(&pull, &catalogue, &mut maker, joined.finish()).await?;
    }
    maker.finish().map_err(Error::storage(dir))?;
    Ok(files)
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

/// Fetches what a plan names, and lists it.
async fn fetch(
    pull: &Pull<'_>,
    catalogue: &Arc<Catalogue>,
    maker: &mut Maker,
    plan: Pieces,
) -> Result<(), Error> {
    let dir = &pull.place.dir;
    maker.add(&plan).map_err(Error::storage(dir))?;
    let plan = Arc::new(plan);
    let (wanted, lists) = (Arc::clone(&plan), Arc::clone(catalogue));
    // A list that could not be looked through has nothing.
    let found = tokio::task::spawn_blocking(move || lists.look_up(&wanted))
        .await
        .unwrap_or_default();
    let known: Option<Arc<dyn Known>> = (!found.is_empty()).then(|| Arc::new(Found(found)) as _);
    pieces::fetch(
        pull.source,
        plan,
        pull.place,
        known,
        Arc::clone(&pull.held),
        pull.total,
        pull.progress,
    )
    .await
}

/// What the host has of a plan.
struct Found(HashMap<(Digest, u64), (PathBuf, u64)>);

impl Known for Found {
    fn find(&self, digest: &Digest, length: u64) -> Option<(PathBuf, u64)> {
        self.0.get(&(*digest, length)).cloned()
    }
}
