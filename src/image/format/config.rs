//! The config of an image, as far as we listen to it.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::image::digest::Digest;
use crate::image::manifest::{IMAGE_CONFIG_MEDIA_TYPE, IMAGE_DOCKER_CONFIG_MEDIA_TYPE, Manifest};

/// What an image's config says, as far as we listen.
#[derive(Debug, Default)]
pub(in crate::image) struct Config {
    pub(in crate::image) os: String,
    pub(in crate::image) architecture: String,
    pub(in crate::image) labels: BTreeMap<String, String>,
    /// Digests of the unpacked layers; empty when it does not say.
    pub(in crate::image) diff_ids: Vec<Digest>,
}

/// Is the config an image's, or some artifact's own?
pub(in crate::image) fn has_image_config(manifest: &Manifest) -> bool {
    [IMAGE_CONFIG_MEDIA_TYPE, IMAGE_DOCKER_CONFIG_MEDIA_TYPE].contains(&manifest.config.media_type.as_str())
}

/// Reads an image's config. `layers` is how many things it can speak of. The error is a reason.
pub(in crate::image) fn parse_config(bytes: &[u8], layers: usize) -> Result<Config, String> {
    #[derive(Deserialize)]
    #[serde(expecting = "a JSON object")]
    struct Raw {
        os: Option<String>,
        architecture: Option<String>,
        config: Option<Inner>,
        rootfs: Option<Rootfs>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Inner {
        labels: Option<BTreeMap<String, String>>,
    }
    #[derive(Deserialize)]
    struct Rootfs {
        diff_ids: Option<Vec<Digest>>,
    }
    let raw: Raw =
        serde_json::from_slice(bytes).map_err(|error| format!("its config is no image config ({error})"))?;
    let diff_ids = raw.rootfs.and_then(|rootfs| rootfs.diff_ids).unwrap_or_default();
    if !diff_ids.is_empty() && diff_ids.len() != layers {
        return Err(format!(
            "its config speaks of {} layers, its manifest of {layers}",
            diff_ids.len()
        ));
    }
    Ok(Config {
        os: raw.os.unwrap_or_default(),
        architecture: raw.architecture.unwrap_or_default(),
        labels: raw.config.and_then(|inner| inner.labels).unwrap_or_default(),
        diff_ids,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_is_read_leniently_and_its_layers_are_counted() {
        let config = parse_config(b"{}", 3).unwrap();
        assert_eq!(
            (config.os.as_str(), config.labels.len(), config.diff_ids.len()),
            ("", 0, 0)
        );
        let id = Digest::of(b"");
        let text = format!(
            r#"{{"os":"linux","architecture":"arm64","config":{{"Labels":{{"a":"b"}}}},"rootfs":{{"type":"layers","diff_ids":["{id}"]}}}}"#
        );
        let config = parse_config(text.as_bytes(), 1).unwrap();
        assert_eq!(
            (config.architecture.as_str(), config.labels["a"].as_str()),
            ("arm64", "b")
        );
        assert_eq!(config.diff_ids, [id]);
        assert!(
            parse_config(text.as_bytes(), 2)
                .unwrap_err()
                .contains("speaks of 1 layers")
        );
        assert!(parse_config(b"[", 1).is_err());
        assert!(parse_config(br#"{"config":{"Labels":{"a":1}}}"#, 1).is_err());
    }
}
