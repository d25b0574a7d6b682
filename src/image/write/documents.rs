//! The JSON of an image: its config and its manifest.
//!
//! Source: the OCI image specification 1.1 (`config.md`, `manifest.md`). Keys stand in a fixed order and no time is that
//! of the writing, so that the same image has the same digest whenever it is written.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::image::digest::Digest;
use crate::image::manifest::{Descriptor, IMAGE_CONFIG_MEDIA_TYPE, OCI_IMAGE_MEDIA_TYPE};

/// When every image was made: readers want a time, and a true one would make each writing another image.
const CREATED: &str = "1970-01-01T00:00:00Z";

/// The config of an artifact that needs none (OCI image specification, "Guidance for an Empty Descriptor").
pub(super) const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";
pub(super) const EMPTY: &[u8] = b"{}";

/// The annotation with a blob's file name, as ORAS has it.
pub(super) const TITLE: &str = "org.opencontainers.image.title";

/// A layer as the config knows it.
#[derive(Debug, Clone)]
pub(super) struct Unpacked {
    /// The digest of its unpacked bytes.
    pub(super) diff_id: Digest,
    /// How it came about, for people.
    pub(super) made_by: String,
}

/// A small document and the descriptor under which it is referred to.
#[derive(Debug, Clone)]
pub(super) struct Document {
    pub(super) descriptor: Descriptor,
    pub(super) bytes: Vec<u8>,
}

impl Document {
    pub(super) fn new(media_type: &str, bytes: Vec<u8>) -> Self {
        Self {
            descriptor: Descriptor {
                media_type: media_type.to_owned(),
                digest: Digest::of(&bytes),
                size: bytes.len() as u64,
                annotations: BTreeMap::new(),
            },
            bytes,
        }
    }
}

/// An image config. `architecture` is as images write it (`amd64`).
pub(super) fn config(
    architecture: &str,
    labels: &BTreeMap<String, String>,
    entrypoint: Option<&str>,
    layers: &[Unpacked],
) -> Document {
    let mut inner = Map::new();
    if let Some(entrypoint) = entrypoint {
        inner.insert("Entrypoint".to_owned(), json!([entrypoint]));
    }
    if !labels.is_empty() {
        inner.insert("Labels".to_owned(), json!(labels));
    }
    let diff_ids: Vec<&Digest> = layers.iter().map(|layer| &layer.diff_id).collect();
    let history: Vec<Value> = layers
        .iter()
        .map(|layer| json!({"created": CREATED, "created_by": layer.made_by}))
        .collect();
    let config = json!({
        "created": CREATED,
        "architecture": architecture,
        "os": "linux",
        "config": inner,
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": history,
    });
    Document::new(IMAGE_CONFIG_MEDIA_TYPE, config.to_string().into_bytes())
}

/// The config of an artifact.
pub(super) fn empty() -> Document {
    Document::new(EMPTY_TYPE, EMPTY.to_vec())
}

/// A manifest; `artifact_type` for what is no container image.
pub(super) fn manifest(
    artifact_type: Option<&str>,
    config: &Descriptor,
    layers: &[Descriptor],
    annotations: &BTreeMap<String, String>,
) -> Document {
    let mut manifest = Map::new();
    manifest.insert("schemaVersion".to_owned(), json!(2));
    manifest.insert("mediaType".to_owned(), json!(OCI_IMAGE_MEDIA_TYPE));
    if let Some(artifact_type) = artifact_type {
        manifest.insert("artifactType".to_owned(), json!(artifact_type));
    }
    manifest.insert("config".to_owned(), descriptor(config));
    manifest.insert("layers".to_owned(), layers.iter().map(descriptor).collect());
    if !annotations.is_empty() {
        manifest.insert("annotations".to_owned(), json!(annotations));
    }
    Document::new(
        OCI_IMAGE_MEDIA_TYPE,
        Value::Object(manifest).to_string().into_bytes(),
    )
}

fn descriptor(of: &Descriptor) -> Value {
    let mut value = json!({"mediaType": of.media_type, "digest": of.digest, "size": of.size});
    if !of.annotations.is_empty() {
        value["annotations"] = json!(of.annotations);
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::manifest::{self as reading, Document as Read};

    #[test]
    fn what_is_written_is_what_our_own_reader_reads() {
        let labels = BTreeMap::from([("io.cannery.user".to_owned(), "ci".to_owned())]);
        let layer = Document::new("application/x", b"layer".to_vec()).descriptor;
        let unpacked = Unpacked {
            diff_id: layer.digest,
            made_by: "cannery".to_owned(),
        };
        let config = config("amd64", &labels, None, &[unpacked]);
        let manifest = manifest(
            Some("application/y"),
            &config.descriptor,
            std::slice::from_ref(&layer),
            &labels,
        );
        let Read::Image(read) = reading::parse(&manifest.bytes).unwrap() else {
            panic!("an image");
        };
        assert_eq!(read.config, config.descriptor);
        assert_eq!(read.layers, std::slice::from_ref(&layer));
        assert_eq!(read.artifact_type.as_deref(), Some("application/y"));
        let read = crate::image::format::parse_config(&config.bytes, 1).unwrap();
        assert_eq!((read.architecture.as_str(), read.os.as_str()), ("amd64", "linux"));
        assert_eq!((read.labels, read.diff_ids), (labels, vec![layer.digest]));
    }
}
