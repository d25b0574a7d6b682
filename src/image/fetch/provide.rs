//! From a request to a disk: the one choreography of this room.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::part::blocking;
use super::progress::{Event, Progress, told_of_silence};
use super::room::Limits;
use super::source::{Kind, Source};
use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::format::{self, Config, Facts, Format, Recipe};
use crate::image::layout::Layout;
use crate::image::manifest::{self, Document, Manifest, NoChoice};
use crate::image::platform::{self, Platform};
use crate::image::policy::{Requirements, Rules};
use crate::image::reference::Reference;
use crate::image::registry::credentials::Credentials;
use crate::image::registry::{Address, Purpose, Registries, Session, Target, WebFile};
use crate::image::single::LocalFile;
use crate::image::store::{Asker, Disk, Standing, Store};

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
        for (number, policy) in policies.iter().enumerate() {
            match pull.by(*policy).await {
                Ok(disk) => {
                    self.touch(&disk.digest);
                    return Ok(disk);
                }
                Err(error) => {
                    let last = !error.lets_the_next_policy_try();
                    // "Not here" explains less than whatever another policy found out.
                    if first.as_ref().is_none_or(|first| {
                        matches!(first, Error::NotCached { .. } | Error::DamagedHere { .. })
                    }) || last
                    {
                        first = Some(error);
                    }
                    if last {
                        break;
                    }
                    if number + 1 < policies.len()
                        && let Some(error) = &first
                    {
                        progress.event(Event::PolicyFailed { error });
                    }
                }
            }
        }
        let error = first.unwrap_or_else(|| Error::NotCached {
            image: pull.image.clone(),
        });
        Err(pull.who_is_denied(error).await)
    }
}

/// What a reference leads to.
pub(super) struct Found {
    /// What it leads to first: the image, or an index that has it.
    pub(super) root: Digest,
    /// The image's identity.
    pub(super) digest: Digest,
    pub(super) manifest: Manifest,
    /// The manifest as it came; of a disk that is a file by itself, ours.
    pub(super) bytes: Vec<u8>,
}

/// One request on its way.
pub(super) struct Pull<'a> {
    pub(super) store: &'a Store,
    pub(super) request: &'a Request,
    pub(super) platform: Platform,
    pub(super) image: String,
    pub(super) rules: Rules<'a>,
    pub(super) progress: &'a dyn Progress,
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
    pub(super) async fn by(&self, policy: PullPolicy) -> Result<Disk, Error> {
        let pinned = self.request.reference.digest().is_some();
        if (policy != PullPolicy::Always || pinned)
            && let Some(disk) = self.known().await?
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
            return Err(self.not_here()?);
        }
        self.fetch().await
    }

    /// Why the store has nothing to give under this name.
    fn not_here(&self) -> Result<Error, Error> {
        let image = self.image.clone();
        let reference = &self.request.reference;
        let digest = match reference.digest() {
            Some(digest) => Some(*digest),
            None => self.store.reference(reference, &self.request.architecture)?,
        };
        let Some(digest) = digest else {
            return Ok(Error::NotCached { image });
        };
        Ok(match self.store.damage(&digest)? {
            Some(reason) => Error::DamagedHere {
                image,
                digest,
                reason,
            },
            None => Error::NotCached { image },
        })
    }

    /// What the store knows under this name; a digest in it is known by itself.
    pub(super) async fn known(&self) -> Result<Option<Disk>, Error> {
        if let Some(digest) = self.request.reference.digest()
            && let Some(disk) = self.here(digest).await?
        {
            return Ok(Some(disk));
        }
        match self
            .store
            .reference(&self.request.reference, &self.request.architecture)?
        {
            Some(digest) => self.here(&digest).await,
            None => Ok(None),
        }
    }

    /// A disk of the store, if it is allowed by this request. One that may have suffered from a crash of the host is read first.
    pub(super) async fn here(&self, digest: &Digest) -> Result<Option<Disk>, Error> {
        if self.store.is_doubtful(digest)? {
            self.progress.event(Event::Doubted { digest });
            let (store, digest) = (self.store.clone(), *digest);
            blocking(move || store.verify(&digest)).await?;
        }
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

    pub(super) async fn fetch(&self) -> Result<Disk, Error> {
        let source = self.source().await?;
        let fetch = self.fetch_from(&source);
        let fetched = told_of_silence(self.progress, || source.unanswered(), fetch).await;
        fetched.map_err(|error| source.told(error))
    }

    async fn fetch_from(&self, source: &Source) -> Result<Disk, Error> {
        let Found {
            root,
            digest,
            manifest,
            ..
        } = self.resolve(source).await?;
        self.progress.event(Event::Resolved { digest: &digest });
        let verdict = self.rules.check(self.store, source, &root, &digest).await?;
        let disk = match self.here(&digest).await? {
            Some(disk) => {
                self.vouch(source, &digest, &manifest).await?;
                self.progress.event(Event::Cached { digest: &digest });
                disk
            }
            None => self.make_with_room(source, &digest, manifest).await?,
        };
        self.note_access(source, &digest).await?;
        if let Kind::Web(file) = &source.kind
            && let Some(sum) = file.learned()
        {
            self.store.note_sha512(&digest, sum)?;
        }
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

    /// What the reference led to before: the SHA-512 of the bytes, where they were seen to have it, and their digest.
    fn seen_there(&self) -> Result<Option<(String, Digest)>, Error> {
        let (reference, architecture) = (&self.request.reference, &self.request.architecture);
        let Some(digest) = self.store.reference(reference, architecture)? else {
            return Ok(None);
        };
        Ok(self.store.sha512(&digest)?.map(|sum| (sum, digest)))
    }

    /// The same place, asked for another of its images.
    pub(super) async fn source_of(&self, version: String) -> Result<Source, Error> {
        match &self.request.reference {
            Reference::Layout { dir, tag } => Ok(Kind::Layout(Layout::new(&self.image, dir, tag)).into()),
            Reference::File { path, digest } => {
                Ok(Kind::File(LocalFile::new(&self.image, path, *digest)).into())
            }
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
                Ok(Kind::Web(Box::new(file.knowing(self.seen_there()?))).into())
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
                Ok(Kind::Registry(Box::new(session)).into())
            }
        }
    }

    /// The folders of images whose bytes this image's author may have: an index that names a stranger's chunks by their digests
    /// must not get them.
    pub(super) fn others(&self) -> Result<Vec<PathBuf>, Error> {
        let place = self.request.reference.place();
        let mut dirs = Vec::new();
        for disk in self.store.list()? {
            if self.store.standing(&disk.digest, &place)? != Standing::Elsewhere {
                dirs.push(self.store.disk_dir(&disk.digest));
            }
        }
        Ok(dirs)
    }

    /// Follows the reference to the manifest for our platform.
    pub(super) async fn resolve(&self, source: &Source) -> Result<Found, Error> {
        let (root, bytes) = source.root().await?;
        let entries = match self.parsed(&bytes)? {
            Document::Image(manifest) => {
                self.store.keep_blob(&bytes)?;
                return Ok(Found {
                    root,
                    digest: root,
                    manifest,
                    bytes,
                });
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
                Ok(Found {
                    root,
                    digest: chosen.digest,
                    manifest,
                    bytes,
                })
            }
            Document::Index(_) => Err(self.malformed("its index holds another index".to_owned())),
        }
    }

    pub(super) fn parsed(&self, bytes: &[u8]) -> Result<Document, Error> {
        manifest::parse(bytes).map_err(|reason| self.malformed(reason))
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
            documents.push(source.document(descriptor).await?);
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

    pub(super) async fn config(
        &self,
        source: &Source,
        manifest: &Manifest,
        format: Format,
    ) -> Result<Config, Error> {
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

    pub(super) fn wrong_platform(&self, found: String) -> Error {
        Error::WrongPlatform {
            image: self.image.clone(),
            wanted: self.platform.written(),
            found,
        }
    }

    pub(super) fn malformed(&self, reason: String) -> Error {
        Error::Malformed {
            image: self.image.clone(),
            reason,
        }
    }
}
