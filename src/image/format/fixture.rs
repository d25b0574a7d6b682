//! Manifests for the tests of single formats.

use std::collections::BTreeMap;

use super::*;
use crate::image::digest::Digest;
use crate::image::manifest::IMAGE_CONFIG_MEDIA_TYPE;

/// A blob by its type, size and annotations; its digest is the type's.
pub(super) fn blob(media_type: &str, size: u64, annotations: &[(&str, &str)]) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest: Digest::of(media_type.as_bytes()),
        size,
        annotations: annotations
            .iter()
            .map(|&(name, value)| (name.to_owned(), value.to_owned()))
            .collect(),
    }
}

pub(super) fn manifest(layers: Vec<Descriptor>) -> Manifest {
    Manifest {
        config: blob(IMAGE_CONFIG_MEDIA_TYPE, 2, &[]),
        artifact_type: None,
        layers,
        annotations: BTreeMap::new(),
    }
}

/// The recipe of an image with these documents, for x86-64 and disks of at most 1 GiB.
pub(super) fn recipe_of(manifest: &Manifest, config: &Config, documents: &[&str]) -> Result<Recipe, String> {
    let format = recognise(manifest)?;
    let documents: Vec<Vec<u8>> = documents.iter().map(|text| text.as_bytes().to_vec()).collect();
    let facts = Facts {
        image: "r/vm:1",
        manifest,
        config,
        documents: &documents,
        platform: &Platform::of_machine("x86_64").unwrap(),
        limits: Limits {
            max_disk: 1 << 30,
            keep_free: 0,
        },
    };
    recipe(format, &facts).map_err(|error| error.to_string())
}

pub(super) fn pieces(recipe: Recipe) -> Pieces {
    match recipe.parts {
        Parts::Pieces(pieces) => pieces,
        Parts::Streams(layers) => panic!("{layers:?}"),
        Parts::Indexed(indexed) => panic!("{indexed:?}"),
    }
}

pub(super) fn streams(recipe: Recipe) -> Vec<Layer> {
    match recipe.parts {
        Parts::Streams(layers) => layers,
        Parts::Pieces(pieces) => panic!("{pieces:?}"),
        Parts::Indexed(indexed) => panic!("{indexed:?}"),
    }
}
