//! What an image is, by its documents alone.

use std::collections::BTreeMap;

use serde::Serialize;

use super::progress::{Progress, told_of_silence};
use super::provide::{Found, Pull, Request};
use super::source::Source;
use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::format;
use crate::image::hints::Hints;
use crate::image::manifest::{Descriptor, Manifest};
use crate::image::policy::Signature;
use crate::image::store::Store;

/// What sardinecake keeps beside the description of a machine: accounts and services, as JSON.
const SARDINECAKE_CONFIG: &str = "application/vnd.sardinecake.vm.config.v1+json";

/// An image as its documents describe it. Everything in it was written by a stranger.
#[derive(Debug, Clone, Serialize)]
pub struct Sight {
    /// The name that was asked for.
    pub reference: String,
    /// The digest of the manifest for this platform.
    pub digest: Digest,
    /// The format, by its manifest.
    pub format: String,
    /// `linux/amd64`; empty for what does not say.
    pub platform: String,
    /// What its blobs have together, in bytes.
    pub size: u64,
    /// Its blobs, in their order.
    pub layers: Vec<Part>,
    /// What it wishes for its machine.
    pub hints: Hints,
    /// Its signatures, or its index's.
    pub signatures: Vec<Signature>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its manifest's annotations.
    pub annotations: BTreeMap<String, String>,
    /// The manifest, byte for byte.
    #[serde(skip)]
    pub manifest: Vec<u8>,
    /// The format's own configuration: what sardinecake keeps of its machine, else the image's config.
    #[serde(skip)]
    pub config: Vec<u8>,
}

/// A blob of an image.
#[derive(Debug, Clone, Serialize)]
pub struct Part {
    /// Its media type.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
    /// Its file's name, if it says one.
    pub title: Option<String>,
}

impl Part {
    fn of(descriptor: &Descriptor) -> Self {
        Self {
            media_type: descriptor.media_type.clone(),
            digest: descriptor.digest,
            size: descriptor.size,
            title: descriptor
                .annotations
                .get("org.opencontainers.image.title")
                .cloned(),
        }
    }
}

impl Store {
    /// Asks where the reference leads what the image is; its disk is not fetched.
    ///
    /// # Errors
    /// See [`Error`]: each variant says whose fault it is.
    pub async fn look(&self, request: &Request, progress: &dyn Progress) -> Result<Sight, Error> {
        let pull = Pull::new(self, request, progress)?;
        let source = pull.source().await?;
        let look = pull.look_at(&source);
        match told_of_silence(progress, || source.unanswered(), look).await {
            Ok(sight) => Ok(sight),
            Err(error) => Err(pull.who_is_denied(source.told(error)).await),
        }
    }
}

impl Pull<'_> {
    async fn look_at(&self, source: &Source) -> Result<Sight, Error> {
        let Found {
            root,
            digest,
            manifest,
            bytes,
        } = self.resolve(source).await?;
        let image = self.image.clone();
        let kind = format::recognise(&manifest).map_err(|reason| Error::Unsupported {
            image: image.clone(),
            reason,
        })?;
        let recipe = self.recipe(source, &manifest, kind).await?;
        let config = if format::has_image_config(&manifest) {
            source.config(&manifest.config).await?
        } else {
            Vec::new()
        };
        let read = format::parse_config(&config, format::described(kind, &manifest)).unwrap_or_default();
        Ok(Sight {
            reference: image.clone(),
            digest,
            format: kind.to_string(),
            platform: [read.os, read.architecture]
                .join("/")
                .trim_matches('/')
                .to_owned(),
            size: manifest
                .layers
                .iter()
                .fold(0, |sum: u64, layer| sum.saturating_add(layer.size)),
            layers: manifest.layers.iter().map(Part::of).collect(),
            hints: recipe.hints,
            signatures: self.rules.signatures(source, &root, &digest).await?,
            labels: read.labels,
            annotations: manifest.annotations.clone(),
            config: machine_config(source, &manifest).await?.unwrap_or(config),
            manifest: bytes,
        })
    }
}

async fn machine_config(source: &Source, manifest: &Manifest) -> Result<Option<Vec<u8>>, Error> {
    match manifest
        .layers
        .iter()
        .find(|layer| layer.media_type == SARDINECAKE_CONFIG)
    {
        Some(layer) => source.config(layer).await.map(Some),
        None => Ok(None),
    }
}
