//! Our own format, written with what an earlier image brings: only what changed is sent.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::documents::{self, Document};
use super::{Work, feed, size};
use crate::image::error::Error;
use crate::image::fetch::progress::{Meter, told_of_silence};
use crate::image::fetch::source::{Kind, Source};
use crate::image::layout::Layout;
use crate::image::manifest::{self, Document as Found, Manifest};
use crate::image::native;
use crate::image::platform::Platform;
use crate::image::reference::Reference;
use crate::image::registry::{Purpose, Session, Target};
use crate::image::view::{Guest, Raw};

/// How an image of our own format is written.
#[derive(Debug, Clone, Copy)]
pub struct Native<'a> {
    /// The image whose chunks are referred to. Without one it is what the name means that is written to, if that is such an
    /// image.
    pub base: Option<&'a Reference>,
    /// A folder for a file that is removed again: 64 bytes for each chunk of some 64 KiB.
    pub scratch: &'a Path,
}

/// What is known of a base.
#[derive(Default)]
struct Base {
    known: native::Known,
    repository: Option<String>,
}

impl Work<'_> {
    pub(super) async fn native(&self, how: Native<'_>) -> Result<(Document, u64), Error> {
        let draft = self.draft;
        let base = self.base(how.base).await?;
        let open = |path: &Path| -> Result<Box<dyn Guest + Send>, Error> {
            Ok(Box::new(Raw::open(path).map_err(Error::storage(path))?))
        };
        let boot = draft.boot.as_ref();
        let initrd = boot.and_then(|boot| boot.initrd.as_ref());
        let files = [
            Some(draft.guest()?),
            boot.map(|boot| open(&boot.kernel)).transpose()?,
            initrd.map(|initrd| open(initrd)).transpose()?,
        ];
        let meter = Arc::<Meter>::default();
        let order = native::Order {
            files,
            base: base.known,
            base_repository: base.repository,
            level: native::LEVEL,
            scratch: how.scratch.to_owned(),
            meter: Arc::clone(&meter),
        };
        let work = native::push(order, self.destination);
        let read = || meter.unpacked();
        let written = feed::told(&read, draft.virtual_size, self.progress, work).await?;
        let config = documents::config(&draft.architecture, &draft.labels, None, &[]);
        self.send_document(&config).await?;
        let content = (native::CONTENT.to_owned(), written.content.to_string());
        let manifest = documents::manifest(
            Some(native::ARTIFACT_TYPE),
            &config.descriptor,
            &written.layers,
            &BTreeMap::from([content]),
        );
        Ok((manifest, size(&written.layers)))
    }

    /// What may be referred to. One that was asked for must be usable; else there may simply be none.
    async fn base(&self, asked: Option<&Reference>) -> Result<Base, Error> {
        let reference = asked.unwrap_or(self.to.reference);
        let image = reference.to_string();
        let found = self.base_manifest(reference, &image).await;
        let (source, manifest) = match found {
            Ok(found) => found,
            // Nothing there yet, or whoever may write may not read.
            Err(Error::NotFound { .. } | Error::Denied { .. } | Error::WrongPlatform { .. })
                if asked.is_none() =>
            {
                return Ok(Base::default());
            }
            Err(error) => return Err(error),
        };
        if !native::is_native(&manifest) {
            return match asked {
                None => Ok(Base::default()),
                Some(_) => Err(Error::Unsupported {
                    image,
                    reason: "only an image of cannery's own format can be the base of another".to_owned(),
                }),
            };
        }
        let repository = match (reference, self.to.reference) {
            (
                Reference::Registry {
                    registry: a,
                    repository,
                    ..
                },
                Reference::Registry {
                    registry: b,
                    repository: target,
                    ..
                },
            ) if a == b && repository != target => Some(repository.clone()),
            _ => None,
        };
        Ok(Base {
            known: native::read_base(&source, &manifest, &image).await?,
            repository,
        })
    }

    async fn base_manifest(&self, reference: &Reference, image: &str) -> Result<(Source, Manifest), Error> {
        let malformed = |reason| Error::Malformed {
            image: image.to_owned(),
            reason,
        };
        // A folder that has just been made for this image.
        if let Reference::Layout { dir, .. } = reference
            && !dir.join("index.json").exists()
        {
            return Err(Error::NotFound {
                image: image.to_owned(),
                registry: String::new(),
            });
        }
        let source = self.source(reference, image).await?;
        let root = told_of_silence(self.progress, || source.unanswered(), source.root());
        let (_, bytes) = root.await?;
        let entries = match manifest::parse(&bytes).map_err(malformed)? {
            Found::Image(manifest) => return Ok((source, manifest)),
            Found::Index(entries) => entries,
        };
        let wrong = |found| Error::WrongPlatform {
            image: image.to_owned(),
            wanted: self.draft.architecture.clone(),
            found,
        };
        let platform = Platform::of_machine(&self.draft.machine).ok_or_else(|| wrong(String::new()))?;
        let chosen = manifest::choose(&entries, &platform).map_err(|no| match no {
            manifest::NoChoice::WrongPlatform(found) => wrong(found),
            manifest::NoChoice::Malformed(reason) => malformed(reason),
        })?;
        match manifest::parse(&source.manifest(&chosen).await?).map_err(malformed)? {
            Found::Image(manifest) => Ok((source, manifest)),
            Found::Index(_) => Err(malformed("its index holds another index".to_owned())),
        }
    }

    async fn source(&self, reference: &Reference, image: &str) -> Result<Source, Error> {
        match reference {
            Reference::Layout { dir, tag } => Ok(Kind::Layout(Layout::new(image, dir, tag)).into()),
            Reference::Registry {
                registry, repository, ..
            } => {
                let session = Session::open(Target {
                    image,
                    registry,
                    repository,
                    name: reference.version(),
                    credentials: self.to.credentials,
                    registries: self.to.registries,
                    purpose: Purpose::Read,
                })
                .await?;
                Ok(Kind::Registry(Box::new(session)).into())
            }
            // Nothing is written there, and no manifest is there to build upon.
            Reference::File { .. } | Reference::Web { .. } => Err(Error::Unnameable {
                image: image.to_owned(),
            }),
        }
    }
}
