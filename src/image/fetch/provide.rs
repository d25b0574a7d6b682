//! From a request to a disk: the one choreography of this room.

use std::any::Any;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::partial::{Sight, Work};
use super::pieces;
use super::progress::{Event, Meter, Progress};
use super::room::Limits;
use super::source::{Source, told};
use super::stream::{CHECKPOINT_EVERY, Stream};
use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::format::{
    self, Config, Contents, Facts, Format, Layer, Parts, Recipe, Selected, Workplace,
};
use crate::image::hints::{BootFiles, Hints};
use crate::image::inspect::{self, DiskFormat};
use crate::image::layout::Layout;
use crate::image::manifest::{self, Document, Manifest, NoChoice};
use crate::image::native;
use crate::image::platform::{self, Platform};
use crate::image::policy::{Requirements, Rules};
use crate::image::reference::Reference;
use crate::image::registry::credentials::{Credentials, Origin};
use crate::image::registry::{Address, Purpose, Registries, Session, Target, WebFile};
use crate::image::single::LocalFile;
use crate::image::store::{self, Asker, Disk, Plea, Record, RecordedFile, Standing, Store};
use crate::kill::{self, Point};

/// When to ask the registry, spelled as GitLab spells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PullPolicy {
    /// Ask each time what the name means now; fetch only what is not here.
    Always,
    /// Ask only when no disk is here for this name.
    IfNotPresent,
    /// Never ask.
    Never,
}

/// What is wanted, and under which conditions.
#[derive(Debug, Clone)]
pub struct Request {
    /// The image.
    pub reference: Reference,
    /// The machine's: `x86_64` or `aarch64`.
    pub architecture: String,
    /// Tried in this order; the next one only after a registry was out of reach or a policy may not fetch.
    /// Empty is the same as [`PullPolicy::Always`].
    pub policies: Vec<PullPolicy>,
    /// Logins that this job may use.
    pub credentials: Credentials,
    /// How registries are spoken to.
    pub registries: Registries,
    /// What the image may cost.
    pub limits: Limits,
    /// On whose behalf.
    pub asker: Asker,
    /// What it must be to be used at all.
    pub requirements: Requirements,
}

/// How often those who wait are shown how far we are: they look more often than a person reads.
const SHOW_EVERY: Duration = Duration::from_millis(500);

impl Store {
    /// Provides the disk of an image: from the store, or fetched, verified and put there.
    ///
    /// At most one process fetches an image at a time; the others wait and say so. Cancelling (dropping the
    /// future) or killing the process leaves no half of an image behind that anybody would use.
    ///
    /// A digest in the reference needs no network when its disk is here, nor does [`PullPolicy::IfNotPresent`]; but a job is
    /// given a private image only if its registry lets the job's own credentials have it, now or a short while ago (see
    /// [`Asker`]). [`PullPolicy::Never`] does not ask, and so gives a job a private image only by what is remembered, or where
    /// the operator lends the host's own login.
    ///
    /// # Errors
    /// See [`Error`]: each variant says whose fault it is.
    pub async fn provide(&self, request: &Request, progress: &dyn Progress) -> Result<Disk, Error> {
        let pull = Pull::new(self, request, progress)?;
        let policies = if request.policies.is_empty() {
            &[PullPolicy::Always][..]
        } else {
            &request.policies
        };
        let mut first: Option<Error> = None;
        for policy in policies {
            match pull.by(*policy).await {
                Ok(disk) => {
                    self.touch(&disk.digest);
                    return Ok(disk);
                }
                Err(error) => {
                    let last = !error.lets_the_next_policy_try();
                    // "Not here" explains less than whatever another policy found out.
                    if first
                        .as_ref()
                        .is_none_or(|first| matches!(first, Error::NotCached { .. }))
                        || last
                    {
                        first = Some(error);
                    }
                    if last {
                        break;
                    }
                    if let Some(error) = &first {
                        progress.event(Event::PolicyFailed { error });
                    }
                }
            }
        }
        Err(first.unwrap_or(Error::NotCached { image: pull.image }))
    }
}

/// Layers that are done, and what they held.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Kept {
    done: usize,
    contents: Contents,
}

/// Hands events on, and shows those who wait how far we are.
struct Shown<'a> {
    progress: &'a dyn Progress,
    work: &'a Work,
    last: Mutex<Option<Instant>>,
}

impl<'a> Shown<'a> {
    fn new(progress: &'a dyn Progress, work: &'a Work) -> Self {
        let last = Mutex::new(None);
        Self { progress, work, last }
    }
}

impl Progress for Shown<'_> {
    fn event(&self, event: Event<'_>) {
        if let Event::Fetching { done, total } = event {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            if last.is_none_or(|last| last.elapsed() >= SHOW_EVERY) {
                *last = Some(Instant::now());
                self.work.show(Sight { done, total });
            }
        }
        self.progress.event(event);
    }
}

/// One request on its way.
pub(super) struct Pull<'a> {
    store: &'a Store,
    request: &'a Request,
    platform: Platform,
    image: String,
    rules: Rules<'a>,
    progress: &'a dyn Progress,
}

impl<'a> Pull<'a> {
    pub(super) fn new(
        store: &'a Store,
        request: &'a Request,
        progress: &'a dyn Progress,
    ) -> Result<Self, Error> {
        let platform = Platform::of_machine(&request.architecture).ok_or_else(|| Error::WrongPlatform {
            image: request.reference.to_string(),
            wanted: request.architecture.clone(),
            found: "x86_64 and aarch64 only".to_owned(),
        })?;
        let image = request.reference.to_string();
        Ok(Self {
            rules: Rules::new(&request.requirements, &request.reference, &image)?,
            store,
            request,
            platform,
            image,
            progress,
        })
    }
}

impl Pull<'_> {
    async fn by(&self, policy: PullPolicy) -> Result<Disk, Error> {
        let pinned = self.request.reference.digest().is_some();
        if (policy != PullPolicy::Always || pinned)
            && let Some(disk) = self.known()?
            && self.may_have(&disk.digest, policy).await?
        {
            if self.rules.are_met(self.store, &disk.digest)? {
                self.progress.event(Event::Cached { digest: &disk.digest });
                return Ok(disk);
            }
            if policy == PullPolicy::Never {
                return Err(self.rules.unknown());
            }
        }
        if policy == PullPolicy::Never {
            return Err(Error::NotCached {
                image: self.image.clone(),
            });
        }
        self.fetch().await
    }

    /// What the store knows under this name; a digest in it is known by itself.
    fn known(&self) -> Result<Option<Disk>, Error> {
        if let Some(digest) = self.request.reference.digest()
            && let Some(disk) = self.here(digest)?
        {
            return Ok(Some(disk));
        }
        match self
            .store
            .reference(&self.request.reference, &self.request.architecture)?
        {
            Some(digest) => self.here(&digest),
            None => Ok(None),
        }
    }

    /// A disk of the store, if it is allowed by this request.
    fn here(&self, digest: &Digest) -> Result<Option<Disk>, Error> {
        let Some(mut disk) = self.store.take(digest)? else {
            return Ok(None);
        };
        let limit = self.request.limits.max_disk;
        if disk.virtual_size > limit {
            let (image, size) = (self.image.clone(), disk.virtual_size);
            return Err(Error::TooLarge {
                image,
                what: "virtual disk",
                size,
                limit,
            });
        }
        disk.reference = self.image.clone();
        Ok(Some(disk))
    }

    async fn fetch(&self) -> Result<Disk, Error> {
        let source = self.source().await?;
        let (root, digest, manifest) = self.resolve(&source).await?;
        self.progress.event(Event::Resolved { digest: &digest });
        let verdict = self.rules.check(self.store, &source, &root, &digest).await?;
        let disk = match self.here(&digest)? {
            Some(disk) => {
                self.vouch(&source, &digest, &manifest).await?;
                self.progress.event(Event::Cached { digest: &digest });
                disk
            }
            None => self.make_with_room(&source, &digest, manifest).await?,
        };
        self.note_access(&source, &digest).await?;
        if let Some(verdict) = verdict {
            verdict.keep(self.store)?;
        }
        self.store
            .remember(&self.request.reference, &self.request.architecture, &digest)?;
        Ok(disk)
    }

    pub(super) async fn source(&self) -> Result<Source, Error> {
        self.source_of(self.request.reference.version()).await
    }

    /// The same place, asked for another of its images.
    async fn source_of(&self, version: String) -> Result<Source, Error> {
        match &self.request.reference {
            Reference::Layout { dir, tag } => Ok(Source::Layout(Layout::new(&self.image, dir, tag))),
            Reference::File { path, digest } => Ok(Source::File(LocalFile::new(&self.image, path, *digest))),
            Reference::Web {
                plain,
                host,
                path,
                digest,
            } => {
                let address = Address {
                    image: &self.image,
                    plain: *plain,
                    host,
                    path,
                };
                let file = WebFile::open(&address, *digest, &self.request.registries)?;
                Ok(Source::Web(Box::new(file)))
            }
            Reference::Registry {
                registry, repository, ..
            } => {
                let session = Session::open(Target {
                    image: &self.image,
                    registry,
                    repository,
                    name: version,
                    credentials: &self.request.credentials,
                    registries: &self.request.registries,
                    purpose: Purpose::Read,
                })
                .await?;
                Ok(Source::Registry(Box::new(session)))
            }
        }
    }

    /// May whoever asks have this image, which is here? False where it must be fetched from where the reference says.
    async fn may_have(&self, digest: &Digest, policy: PullPolicy) -> Result<bool, Error> {
        let Asker::Job {
            project,
            auth_ttl,
            offline_ttl,
        } = &self.request.asker
        else {
            return Ok(true);
        };
        let Reference::Registry {
            registry, repository, ..
        } = &self.request.reference
        else {
            // The operator lists which folders a job may name.
            return Ok(true);
        };
        let place = self.request.reference.place();
        match self.store.standing(digest, &place)? {
            Standing::Public => return Ok(true),
            Standing::Elsewhere => return Ok(false),
            Standing::Private => {}
        }
        let login = self.request.credentials.find(registry, repository).await?;
        let plea = Plea {
            project,
            place: &place,
            login: login.as_ref(),
            digest,
        };
        let granted = self.store.granted(&plea);
        if granted.is_some_and(|ago| ago <= *auth_ttl) {
            return Ok(true);
        }
        if policy == PullPolicy::Never {
            // What is the host's own, the operator lends to every job that names the image.
            return if login.is_some_and(|login| login.origin == Origin::Host) {
                Ok(true)
            } else {
                Err(Error::NotGranted {
                    image: self.image.clone(),
                })
            };
        }
        let source = self.source_of(digest.to_string()).await?;
        match source.root().await {
            Ok(_) => {
                self.note_access(&source, digest).await?;
                Ok(true)
            }
            // It is gone there, or was never there for this login: what the name means now is another question.
            Err(Error::NotFound { .. }) => Ok(false),
            Err(error @ Error::Unreachable { .. }) => match granted {
                Some(ago) if ago <= *offline_ttl => {
                    self.progress.event(Event::Offline { error: &error, ago });
                    Ok(true)
                }
                _ => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    /// Remembers to whom the image was given, now that its source has given it.
    async fn note_access(&self, source: &Source, digest: &Digest) -> Result<(), Error> {
        let (
            Source::Registry(session),
            Reference::Registry {
                registry, repository, ..
            },
        ) = (source, &self.request.reference)
        else {
            return Ok(());
        };
        let place = self.request.reference.place();
        let anonymous = session.is_anonymous().await;
        self.store.renew_origin(digest, &place, anonymous)?;
        if anonymous {
            return Ok(());
        }
        if let Asker::Job {
            project,
            auth_ttl,
            offline_ttl,
        } = &self.request.asker
        {
            let login = self.request.credentials.find(registry, repository).await?;
            let plea = Plea {
                project,
                place: &place,
                login: login.as_ref(),
                digest,
            };
            self.store.grant(&plea, *auth_ttl.max(offline_ttl))?;
        }
        Ok(())
    }

    /// Makes sure that a place has an image that is here already, and does not only know its digest: all bytes are read from
    /// there once. What everybody may have needs no proof.
    async fn vouch(&self, source: &Source, digest: &Digest, manifest: &Manifest) -> Result<(), Error> {
        let place = self.request.reference.place();
        if !matches!(source, Source::Registry(_))
            || self.store.standing(digest, &place)? != Standing::Elsewhere
        {
            return Ok(());
        }
        let meter = Arc::new(Meter::default());
        let total = packed_size(manifest);
        for descriptor in &manifest.layers {
            let image = self.image.clone();
            let read = move |packed: &mut dyn std::io::Read| match std::io::copy(packed, &mut std::io::sink())
            {
                Ok(_) => Ok(()),
                // What it was is told by whoever sent it.
                Err(error) => Err(Error::Malformed {
                    image,
                    reason: error.to_string(),
                }),
            };
            let verified = source.verified(std::slice::from_ref(descriptor), &meter, read);
            told(self.progress, &meter, total, verified).await?;
        }
        self.note_origin(source, digest).await
    }

    /// The folders of images whose bytes this image's author may have: an index that names a stranger's chunks by their digests
    /// must not get them.
    fn others(&self) -> Result<Vec<PathBuf>, Error> {
        let place = self.request.reference.place();
        let mut dirs = Vec::new();
        for disk in self.store.list()? {
            if self.store.standing(&disk.digest, &place)? != Standing::Elsewhere {
                dirs.push(self.store.disk_dir(&disk.digest));
            }
        }
        Ok(dirs)
    }

    /// Remembers that all bytes of an image came from this source.
    async fn note_origin(&self, source: &Source, digest: &Digest) -> Result<(), Error> {
        if let Source::Registry(session) = source {
            let (place, anonymous) = (self.request.reference.place(), session.is_anonymous().await);
            self.store.note_origin(digest, &place, anonymous)?;
        }
        Ok(())
    }

    /// Follows the reference to the manifest for our platform; what it leads to first, and that manifest.
    pub(super) async fn resolve(&self, source: &Source) -> Result<(Digest, Digest, Manifest), Error> {
        let (root, bytes) = source.root().await?;
        let entries = match self.parsed(&bytes)? {
            Document::Image(manifest) => {
                self.store.keep_blob(&bytes)?;
                return Ok((root, root, manifest));
            }
            Document::Index(entries) => entries,
        };
        let chosen = manifest::choose(&entries, &self.platform).map_err(|no| match no {
            NoChoice::WrongPlatform(found) => self.wrong_platform(found),
            NoChoice::Malformed(reason) => self.malformed(reason),
        })?;
        self.store.keep_blob(&bytes)?;
        let bytes = source.manifest(&chosen).await?;
        match self.parsed(&bytes)? {
            Document::Image(mut manifest) => {
                self.store.keep_blob(&bytes)?;
                manifest.described_as(chosen.annotations);
                Ok((root, chosen.digest, manifest))
            }
            Document::Index(_) => Err(self.malformed("its index holds another index".to_owned())),
        }
    }

    fn parsed(&self, bytes: &[u8]) -> Result<Document, Error> {
        manifest::parse(bytes).map_err(|reason| self.malformed(reason))
    }

    /// Unpacks all layers, from where an earlier process came to.
    async fn streams(
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
            let carried = stream.carry(&shown, move |unpacked, compression| {
                format::unpack(unpacked, compression, &layer, &boot, &for_format, contents)
            });
            contents = told(&shown, &place.meter, total, carried).await?;
            tracing::debug!(
                number,
                fetched = place.meter.fetched() - before,
                "a layer is unpacked"
            );
            kill::point(Point::LayerUnpacked);
            let kept = Kept {
                done: number + 1,
                contents,
            };
            work.keep_layers(&kept)?;
            contents = kept.contents;
        }
        Ok(contents)
    }

    /// Makes the disk; where there turns out to be no room, once more after others have gone for it.
    async fn make_with_room(
        &self,
        source: &Source,
        digest: &Digest,
        manifest: Manifest,
    ) -> Result<Disk, Error> {
        let keep_free = self.request.limits.keep_free;
        self.store.make_room(packed_size(&manifest), keep_free).await;
        match self.make(source, digest, manifest.clone()).await {
            Err(error @ Error::DiskFull { needed, .. }) => {
                // What is needed has what must stay free in it.
                if self.store.make_room(needed, 0).await == 0 {
                    self.give_up(digest)?;
                    return Err(error);
                }
                let made = self.make(source, digest, manifest).await;
                if matches!(made, Err(Error::DiskFull { .. })) {
                    self.give_up(digest)?;
                }
                made
            }
            made => made,
        }
    }

    /// Removes what there is of an image for which there is no room: others need what it takes, running jobs above all.
    fn give_up(&self, digest: &Digest) -> Result<(), Error> {
        if let Some(work) = Work::try_lock(&self.store.partial(), digest)? {
            work.discard();
        }
        Ok(())
    }

    /// Makes the disk, unless another process does so in the meantime.
    async fn make(&self, source: &Source, digest: &Digest, manifest: Manifest) -> Result<Disk, Error> {
        let unsupported = |reason| Error::Unsupported {
            image: self.image.clone(),
            reason,
        };
        let guess = format::recognise(&manifest).map_err(unsupported)?;
        let work = Work::lock(&self.store.partial(), digest, &self.image, self.progress).await?;
        // Shared with the threads that write there: a cancelled one must be gone before others take the lock.
        let work = Arc::new(work);
        if let Some(disk) = self.here(digest)? {
            self.vouch(source, digest, &manifest).await?;
            self.progress.event(Event::Cached { digest });
            return Ok(disk);
        }
        let made = self.make_in(&work, source, digest, manifest, guess).await;
        // What a registry or a full disk cut off, the next pull goes on with. Whatever else is wrong stays wrong.
        if made.as_ref().is_err_and(|error| !error.lets_a_later_pull_go_on()) {
            work.discard();
        }
        made
    }

    async fn make_in(
        &self,
        work: &Arc<Work>,
        source: &Source,
        digest: &Digest,
        manifest: Manifest,
        guess: Format,
    ) -> Result<Disk, Error> {
        let recipe = self.recipe(source, &manifest, guess).await?;
        let meter = Arc::new(Meter::default());
        let place = Workplace {
            image: self.image.clone(),
            dir: work.dir(&self.request.reference.place())?.to_owned(),
            limits: self.request.limits,
            meter: Arc::clone(&meter),
            ledger: Arc::default(),
        };
        let total = packed_size(&manifest);
        let boot = recipe.boot;
        let (format, selected) = match recipe.parts {
            Parts::Streams(layers) => {
                let contents = self.streams(source, layers, &boot, &place, work, total).await?;
                (
                    contents.format(guess),
                    contents.select(&boot, &manifest, recipe.bootc, &place)?,
                )
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
                    held: Arc::clone(work) as _,
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
            work: Arc::clone(work),
        };
        let committed = tokio::task::spawn_blocking(move || finished.commit()).await;
        committed.unwrap_or_else(|panic| match panic.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => Err(Error::Storage {
                path: self.store.disk_dir(digest),
                source: std::io::Error::other(error),
            }),
        })?;
        self.progress.event(Event::Verified { digest });
        let mut disk = self.here(digest)?.ok_or_else(|| Error::Storage {
            path: self.store.disk_dir(digest),
            source: std::io::ErrorKind::NotFound.into(),
        })?;
        disk.from_cache = false;
        disk.fetched_bytes = meter.fetched();
        Ok(disk)
    }

    /// Reads all that is said about the image, and decides how it becomes a disk.
    pub(super) async fn recipe(
        &self,
        source: &Source,
        manifest: &Manifest,
        format: Format,
    ) -> Result<Recipe, Error> {
        let config = self.config(source, manifest, format).await?;
        let mut documents = Vec::new();
        for descriptor in format::documents(format, manifest) {
            documents.push(source.config(descriptor).await?);
        }
        let facts = Facts {
            image: &self.image,
            manifest,
            config: &config,
            documents: &documents,
            platform: &self.platform,
            limits: self.request.limits,
        };
        format::recipe(format, &facts)
    }

    async fn config(&self, source: &Source, manifest: &Manifest, format: Format) -> Result<Config, Error> {
        if !format::has_image_config(manifest) {
            return Ok(Config::default());
        }
        let bytes = source.config(&manifest.config).await?;
        let described = format::described(format, manifest);
        let config = format::parse_config(&bytes, described).map_err(|reason| self.malformed(reason))?;
        // What runs in a sardinecake's machine, its config guesses from another file; that it is a machine is what counts.
        let os = if format == Format::Sardinecake {
            ""
        } else {
            &config.os
        };
        if !self.platform.matches(os, &config.architecture) {
            return Err(self.wrong_platform(platform::written(os, &config.architecture)));
        }
        self.store.keep_blob(&bytes)?;
        Ok(config)
    }

    fn wrong_platform(&self, found: String) -> Error {
        Error::WrongPlatform {
            image: self.image.clone(),
            wanted: self.platform.written(),
            found,
        }
    }

    fn malformed(&self, reason: String) -> Error {
        Error::Malformed {
            image: self.image.clone(),
            reason,
        }
    }
}

/// Packed bytes of all layers.
fn packed_size(manifest: &Manifest) -> u64 {
    let sizes = manifest.layers.iter().map(|layer| layer.size);
    sizes.fold(0, u64::saturating_add)
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
        let chunks = self.place.dir.join(native::CHUNKS);
        if inspected.format == DiskFormat::Raw && chunks.exists() {
            files.push(self.name(&chunks, native::CHUNKS)?);
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
            sum: None,
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
