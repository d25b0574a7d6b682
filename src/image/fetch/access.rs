//! Who may have an image: asked for each job, answered by the registry or by what it answered a little while ago.

use std::sync::Arc;

use super::progress::{Event, Meter, told_of_silence};
use super::source::{Kind, Source, told};
use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::format;
use crate::image::manifest::Manifest;
use crate::image::reference::Reference;
use crate::image::registry::credentials::{CredentialsError, Origin};
use crate::image::registry::knows;
use crate::image::store::{Asker, Plea, Standing};

use super::make::packed_size;
use super::provide::{Pull, PullPolicy};

impl Pull<'_> {
    /// May whoever asks have this image, which is here? False where it must be fetched from where the reference says.
    pub(super) async fn may_have(&self, digest: &Digest, policy: PullPolicy) -> Result<bool, Error> {
        let Asker::Job {
            project,
            auth_ttl,
            offline_ttl,
        } = &self.request.asker
        else {
            return Ok(true);
        };
        let place = self.request.reference.place();
        match self.store.standing(digest, &place)? {
            Standing::Public => return Ok(true),
            // Though the job may write its digest behind the name of any place.
            Standing::Elsewhere => return Ok(false),
            Standing::Private => {}
        }
        let Reference::Registry {
            registry, repository, ..
        } = &self.request.reference
        else {
            // It came from there, and the operator lists which files, folders and servers a job may name.
            return Ok(true);
        };
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
        match told_of_silence(self.progress, || source.unanswered(), source.root()).await {
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

    /// Asks a registry that has denied the image to a login whether it knows that login at all: a password that is wrong by now is
    /// mended by another than a name of an image is.
    pub(super) async fn who_is_denied(&self, error: Error) -> Error {
        let (
            Error::Denied { .. },
            Reference::Registry {
                registry, repository, ..
            },
        ) = (&error, &self.request.reference)
        else {
            return error;
        };
        let Ok(Some(login)) = self.request.credentials.find(registry, repository).await else {
            return error;
        };
        let (user, origin) = (login.user.clone(), login.origin);
        match knows(registry, login, &self.request.registries, self.progress).await {
            Ok(false) => Error::Credentials(CredentialsError::Refused {
                registry: registry.clone(),
                user,
                origin,
            }),
            // One that does not answer that denies the image all the same.
            Ok(true) | Err(_) => error,
        }
    }

    /// Remembers to whom the image was given, now that its source has given it.
    pub(super) async fn note_access(&self, source: &Source, digest: &Digest) -> Result<(), Error> {
        let (
            Kind::Registry(session),
            Reference::Registry {
                registry, repository, ..
            },
        ) = (&source.kind, &self.request.reference)
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
    pub(super) async fn vouch(
        &self,
        source: &Source,
        digest: &Digest,
        manifest: &Manifest,
    ) -> Result<(), Error> {
        let place = self.request.reference.place();
        if self.store.standing(digest, &place)? != Standing::Elsewhere {
            return Ok(());
        }
        let meter = Arc::new(Meter::default());
        let total = packed_size(manifest);
        let documents = format::recognise(manifest).map(|kind| format::documents(kind, manifest));
        let documents = documents.unwrap_or_default();
        for descriptor in &manifest.layers {
            if documents
                .iter()
                .any(|document| document.digest == descriptor.digest)
            {
                source.document(descriptor).await?;
                continue;
            }
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

    /// Remembers that all bytes of an image came from this source.
    pub(super) async fn note_origin(&self, source: &Source, digest: &Digest) -> Result<(), Error> {
        let public = match &source.kind {
            Kind::Registry(session) => session.is_anonymous().await,
            // Whoever may not name the file or the server has no right to what came from there.
            _ => false,
        };
        self.store
            .note_origin(digest, &self.request.reference.place(), public)
    }
}
