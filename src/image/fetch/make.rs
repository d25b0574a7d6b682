//! From a manifest to a disk of the store: fetched, unpacked, checked, and put there.

use std::any::Any;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::flatten::Named;
use super::part::blocking;
use super::partial::Work;
use super::pieces;
use super::progress::{Event, Meter, Progress};
use super::source::{Source, told};
use super::stream::{CHECKPOINT_EVERY, Stream};
use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::format::{self, Contents, Format, Layer, Parts, Selected, Workplace};
use crate::image::hints::{BootFiles, Hints};
use crate::image::inspect::{self, DiskFormat};
use crate::image::manifest::Manifest;
use crate::image::native;
use crate::image::store::{self, Disk, Record, RecordedFile, Standing, Store, listed};
use crate::kill::{self, Point};

use super::provide::Pull;

/// How often those who wait are shown how far we are: they look more often than a person reads.
const SHOW_EVERY: Duration = Duration::from_millis(500);

/// Layers that are done, and what they held.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Kept {
    done: usize,
    contents: Contents,
}

/// Writes down that so many layers are done, and what they held.
pub(super) fn keep(work: &Work, done: usize, contents: Contents) -> Result<Contents, Error> {
    let kept = Kept { done, contents };
    work.keep_layers(&kept)?;
    Ok(kept.contents)
}

/// Hands events on, and shows those who wait how far we are.
pub(super) struct Shown<'a> {
    progress: &'a dyn Progress,
    work: &'a Work,
    last: Mutex<Option<Instant>>,
}

impl<'a> Shown<'a> {
    pub(super) fn new(progress: &'a dyn Progress, work: &'a Work) -> Self {
        let last = Mutex::new(None);
        Self { progress, work, last }
    }
}

impl Progress for Shown<'_> {
    fn event(&self, event: Event<'_>) {
        if let Event::Fetching { done, .. } = event {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            if last.is_none_or(|last| last.elapsed() >= SHOW_EVERY) {
                *last = Some(Instant::now());
                self.work.show(done);
                self.progress.event(Event::Awaited {
                    by: self.work.awaited_by(),
                });
            }
        }
        self.progress.event(event);
    }
}

impl Pull<'_> {
    /// Unpacks all layers, from where an earlier process came to.
    pub(super) async fn streams(
        &self,
        source: &Source,
        layers: Vec<Layer>,
        boot: &BootFiles,
        place: &Workplace,
        work: &Arc<Work>,
        total: u64,
    ) -> Result<Contents, Error> {
        let kept: Kept = work.layers().unwrap_or_default();
        let Kept { done, mut contents } = kept;
        let size = |layer: &Layer| layer.blobs.iter().map(|blob| blob.size).sum::<u64>();
        place.meter.add_here(layers.iter().take(done).map(size).sum());
        let shown = Shown::new(self.progress, work);
        for layer in layers.into_iter().skip(done) {
            let before = place.meter.fetched();
            let blobs = layer.blobs.clone();
            let held: Arc<dyn Any + Send + Sync> = Arc::clone(work) as _;
            let stream = Stream {
                source,
                number: layer.number,
                blobs: &blobs,
                diff_id: layer.diff_id,
                place,
                held,
                every: CHECKPOINT_EVERY,
            };
            let number = layer.number;
            let (boot, for_format) = (boot.clone(), place.clone());
            let named = layer.is_one_of_several().then(|| Named::new(source, work));
            let carried = stream.carry(&shown, move |unpacked, compression| {
                let mut heard;
                let unpacked: &mut dyn Read = match named {
                    Some(named) => {
                        heard = named.heard(number, unpacked, &for_format.image)?;
                        &mut heard
                    }
                    None => unpacked,
                };
                format::unpack(unpacked, compression, &layer, &boot, &for_format, contents)
            });
            contents = told(&shown, &place.meter, total, carried).await?;
            tracing::debug!(
                number,
                fetched = place.meter.fetched() - before,
                "a layer is unpacked"
            );
            kill::point(Point::LayerUnpacked);
            contents = keep(work, number + 1, contents)?;
        }
        Ok(contents)
    }

    /// The files of an image that is here and was made of the same, linked into the work place.
    async fn twin(&self, made_of: Digest, place: &Workplace) -> Result<Option<store::Twin>, Error> {
        let (store, from, dir) = (
            self.store.clone(),
            self.request.reference.place(),
            place.dir.clone(),
        );
        let twin = blocking(move || {
            // As for the chunks of others: who only knows what an image is made of has no right to it.
            let may_have = |digest: &Digest| Ok(store.standing(digest, &from)? != Standing::Elsewhere);
            store.twin(&made_of, may_have, &dir)
        });
        let twin = twin.await?;
        for (path, sum) in twin.iter().flat_map(|twin| &twin.sums) {
            place.ledger.summed(path, *sum);
        }
        Ok(twin)
    }

    /// Makes the disk; where there turns out to be no room, once more after others have gone for it. None go for what cannot be an
    /// image.
    pub(super) async fn make_with_room(
        &self,
        source: &Source,
        digest: &Digest,
        manifest: Manifest,
    ) -> Result<Disk, Error> {
        let guess = format::recognise(&manifest).map_err(|reason| Error::Unsupported {
            image: self.image.clone(),
            reason,
        })?;
        let limits = self.request.limits;
        let (coming, most) = (packed_size(&manifest), format::packed_max(limits));
        if coming > most {
            return Err(Error::TooLarge {
                image: self.image.clone(),
                what: "packed content",
                size: coming,
                limit: most,
            });
        }
        self.store.make_room(coming, limits.keep_free).await;
        match self.make(source, digest, manifest.clone(), guess).await {
            Err(error @ Error::DiskFull { needed, .. }) => {
                // What is needed has what must stay free in it.
                if self.store.make_room(needed, 0).await == 0 {
                    self.give_up(digest)?;
                    return Err(error);
                }
                let made = self.make(source, digest, manifest, guess).await;
                if matches!(made, Err(Error::DiskFull { .. })) {
                    self.give_up(digest)?;
                }
                made
            }
            Ok(disk) => {
                // Unpacked it takes more than was known before. It is leased, and stays.
                self.store.make_room(0, limits.keep_free).await;
                Ok(disk)
            }
            failed => failed,
        }
    }

    /// Removes what there is of an image for which there is no room: others need what it takes, running jobs above all.
    pub(super) fn give_up(&self, digest: &Digest) -> Result<(), Error> {
        if let Some(work) = Work::try_lock(&self.store.partial(), digest)? {
            work.discard();
        }
        Ok(())
    }

    /// Makes the disk, unless another process does so in the meantime.
    pub(super) async fn make(
        &self,
        source: &Source,
        digest: &Digest,
        manifest: Manifest,
        guess: Format,
    ) -> Result<Disk, Error> {
        let work = Work::lock(&self.store.partial(), digest, &self.image, self.progress).await?;
        // Shared with the threads that write there: a cancelled one must be gone before others take the lock.
        let work = Arc::new(work);
        if let Some(disk) = self.here(digest).await? {
            self.vouch(source, digest, &manifest).await?;
            self.progress.event(Event::Cached { digest });
            return Ok(disk);
        }
        let made = self.make_in(&work, source, digest, manifest, guess).await;
        // What a registry or a full disk cut off, the next pull goes on with. Whatever else is wrong stays wrong.
        if made.as_ref().is_err_and(|error| !error.lets_a_later_pull_go_on()) {
            work.discard();
            // Whoever opens the store finds a note that is left.
            drop(self.store.forget_unsynced(digest));
        }
        made
    }

    pub(super) async fn make_in(
        &self,
        work: &Arc<Work>,
        source: &Source,
        digest: &Digest,
        manifest: Manifest,
        guess: Format,
    ) -> Result<Disk, Error> {
        let recipe = self.recipe(source, &manifest, guess).await?;
        if self.store.is_doubtful(digest)? {
            work.begin_anew()?;
        }
        self.store.note_unsynced(digest)?;
        let meter = Arc::new(Meter::default());
        let place = Workplace {
            image: self.image.clone(),
            dir: work.dir(&self.request.reference.place())?.to_owned(),
            limits: self.request.limits,
            meter: Arc::clone(&meter),
            ledger: Arc::default(),
        };
        let total = packed_size(&manifest);
        let needed = match &recipe.parts {
            Parts::Streams(layers) => format::packed(layers),
            Parts::Pieces(_) => total,
            // What it takes unpacked is asked for as soon as its index says that.
            Parts::Indexed(reader) => reader.index_size(),
        };
        let missing = work.begin(total, needed)?;
        place.room().require(missing)?;
        let boot = recipe.boot;
        let mut made_of = None;
        let (format, selected) = match recipe.parts {
            Parts::Streams(layers) => {
                let same = *made_of.insert(format::made_of(&layers, &boot, &recipe.drives));
                match self.twin(same, &place).await? {
                    Some(twin) => {
                        self.progress.event(Event::Reused { bytes: total });
                        (twin.format, twin.files)
                    }
                    None => {
                        let contents = self.streams(source, layers, &boot, &place, work, total).await?;
                        let contents = self
                            .one_disk(contents, recipe.drives, &place, work, total)
                            .await?;
                        (
                            contents.format(guess),
                            contents.select(&boot, &manifest, recipe.bootc, &place)?,
                        )
                    }
                }
            }
            Parts::Pieces(plan) => {
                let (plan, held) = (Arc::new(plan), Arc::clone(work) as Arc<dyn Any + Send + Sync>);
                let selected = Selected::planned(&plan, &place.dir);
                let shown = Shown::new(self.progress, work);
                pieces::fetch(source, plan, &place, None, held, total, &shown).await?;
                (guess, selected)
            }
            Parts::Indexed(reader) => {
                let shown = Shown::new(self.progress, work);
                let pull = native::Pull {
                    source,
                    place: &place,
                    others: self.others()?,
                    work,
                    total,
                    progress: &shown,
                };
                let files = native::pull(pull, *reader).await?;
                (guess, Selected::made(files, &place.dir))
            }
        };
        // Before the image can be seen: whoever waits for it must not think that it came from nowhere.
        self.note_origin(source, digest).await?;
        let _held_until_given = self.store.lease_unfinished(&place.dir)?;
        let finished = Finished {
            store: self.store.clone(),
            place,
            selected,
            reference: self.image.clone(),
            digest: *digest,
            cmdline: boot.cmdline,
            hints: recipe.hints,
            format,
            made_of,
            work: Arc::clone(work),
        };
        let committed = tokio::task::spawn_blocking(move || finished.commit()).await;
        let committed = committed.unwrap_or_else(|panic| match panic.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => Err(Error::Storage {
                path: self.store.disk_dir(digest),
                source: std::io::Error::other(error),
            }),
        });
        if let Err(error) = committed {
            if !self.store.disk_dir(digest).exists() {
                self.store.forget_traces(digest)?;
            }
            return Err(error);
        }
        self.progress.event(Event::Verified { digest });
        let mut disk = self.here(digest).await?.ok_or_else(|| Error::Storage {
            path: self.store.disk_dir(digest),
            source: std::io::ErrorKind::NotFound.into(),
        })?;
        disk.from_cache = false;
        disk.fetched_bytes = meter.fetched();
        Ok(disk)
    }
}

/// An image whose bytes are all here and verified.
struct Finished {
    store: Store,
    place: Workplace,
    selected: format::Selected,
    reference: String,
    digest: Digest,
    cmdline: Option<String>,
    hints: Hints,
    format: Format,
    made_of: Option<Digest>,
    /// Held to the end: its lock covers the rename.
    work: Arc<Work>,
}

impl Finished {
    /// The header check, and then the step into the store.
    fn commit(self) -> Result<(), Error> {
        // From here on it is all or nothing.
        self.work.forget_layers()?;
        let inspected = inspect::disk(&self.selected.disk, self.place.limits.max_disk, &self.reference)?;
        let mut files = vec![self.name(&self.selected.disk, store::disk_name(inspected.format))?];
        if let Some(kernel) = &self.selected.kernel {
            files.push(self.name(kernel, store::KERNEL)?);
        }
        if let Some(initrd) = &self.selected.initrd {
            files.push(self.name(initrd, store::INITRD)?);
        }
        let in_place = |name| self.place.dir.join(name);
        if inspected.format == DiskFormat::Raw && in_place(native::CHUNKS).exists() {
            files.push(self.name(&in_place(native::CHUNKS), native::CHUNKS)?);
            files.push(self.name(&in_place(listed::NAME), listed::NAME)?);
            files[0].listed = true;
        }
        self.remove_others(&files)?;
        kill::point(Point::DiskNamed);
        let record = Record {
            version: store::VERSION,
            reference: self.reference.clone(),
            digest: self.digest,
            format: inspected.format,
            image_format: Some(self.format),
            virtual_size: inspected.virtual_size,
            files,
            cmdline: self.cmdline.clone(),
            hints: self.hints.clone(),
            created: Timestamp::now(),
            made_of: self.made_of,
        };
        self.store.commit(&self.place.dir, record)?;
        drop(self.work);
        Ok(())
    }

    fn name(&self, file: &Path, name: &str) -> Result<RecordedFile, Error> {
        let target = self.place.dir.join(name);
        fs::rename(file, &target).map_err(Error::storage(file))?;
        kill::point(Point::FileNamed);
        let length = fs::metadata(&target).map_err(Error::storage(&target))?.len();
        Ok(RecordedFile {
            name: name.to_owned(),
            length,
            sum: self.place.ledger.sum_of(file),
            listed: false,
        })
    }

    /// Removes what was unpacked and is not part of the image after all.
    fn remove_others(&self, files: &[RecordedFile]) -> Result<(), Error> {
        let dir = &self.place.dir;
        for entry in fs::read_dir(dir).map_err(Error::storage(dir))? {
            let entry = entry.map_err(Error::storage(dir))?;
            if !files.iter().any(|file| entry.file_name() == file.name.as_str()) {
                store::remove(&entry.path())?;
            }
        }
        Ok(())
    }
}

/// Packed bytes of all layers.
pub(super) fn packed_size(manifest: &Manifest) -> u64 {
    let sizes = manifest.layers.iter().map(|layer| layer.size);
    sizes.fold(0, u64::saturating_add)
}
