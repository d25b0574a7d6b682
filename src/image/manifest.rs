//! Manifests and indexes, reduced to what we need and checked on the way.
//!
//! Source: the OCI image specification 1.1 (`manifest.md`, `image-index.md`) and Docker's schema 2, whose
//! JSON is the same but for the media types.

use std::collections::BTreeMap;

use oci_client::manifest::{ImageIndexEntry, OciDescriptor, OciImageIndex, OciImageManifest};
use serde::Deserialize;

use super::digest::Digest;
use super::error::quoted;
use super::platform::{self, Platform};

pub(super) use oci_client::manifest::{
    IMAGE_CONFIG_MEDIA_TYPE, IMAGE_DOCKER_CONFIG_MEDIA_TYPE, IMAGE_MANIFEST_LIST_MEDIA_TYPE,
    IMAGE_MANIFEST_MEDIA_TYPE, OCI_IMAGE_INDEX_MEDIA_TYPE, OCI_IMAGE_MEDIA_TYPE,
};

/// Most layers that are looked at: what an image in our own format can have. Docker stops at 127, some builders go higher.
const LAYERS_MAX: usize = 16_384;

/// A blob by name: what its bytes must hash to, and how many there are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) media_type: String,
    pub(super) digest: Digest,
    /// Bytes.
    pub(super) size: u64,
    pub(super) annotations: BTreeMap<String, String>,
}

/// The manifest of one image for one platform.
#[derive(Debug, Clone)]
pub(super) struct Manifest {
    pub(super) config: Descriptor,
    pub(super) artifact_type: Option<String>,
    pub(super) layers: Vec<Descriptor>,
    pub(super) annotations: BTreeMap<String, String>,
}

impl Manifest {
    /// Adds what the entry of an index says about this manifest; the manifest's own word counts more.
    pub(super) fn described_as(&mut self, entry: BTreeMap<String, String>) {
        for (name, value) in entry {
            self.annotations.entry(name).or_insert(value);
        }
    }
}

/// What a reference leads to.
#[derive(Debug, Clone)]
pub(super) enum Document {
    Image(Manifest),
    Index(Vec<ImageIndexEntry>),
}

/// Reads a manifest or an index by its structure; the media types in it are a stranger's claim.
///
/// The error is a reason for [`super::Error::Malformed`].
pub(super) fn parse(bytes: &[u8]) -> Result<Document, String> {
    #[derive(Deserialize)]
    #[serde(expecting = "a JSON object")]
    struct Shape {
        layers: Option<serde::de::IgnoredAny>,
        manifests: Option<serde::de::IgnoredAny>,
    }
    let json = |error: serde_json::Error| format!("its manifest is no valid manifest ({error})");
    let shape: Shape = serde_json::from_slice(bytes).map_err(json)?;
    match (shape.layers.is_some(), shape.manifests.is_some()) {
        // Two readers would see two different images (CVE-2021-41190).
        (true, true) => Err("its manifest claims to be an image and an index at once".to_owned()),
        (false, false) => Err("its manifest has neither layers nor manifests".to_owned()),
        (_, true) => {
            let index: OciImageIndex = serde_json::from_slice(bytes).map_err(json)?;
            Ok(Document::Index(index.manifests))
        }
        (true, _) => {
            let image: OciImageManifest = serde_json::from_slice(bytes).map_err(json)?;
            if image.layers.len() > LAYERS_MAX {
                return Err(format!(
                    "it has {} layers, more than {LAYERS_MAX}",
                    image.layers.len()
                ));
            }
            Ok(Document::Image(Manifest {
                config: descriptor(&image.config)?,
                artifact_type: image.artifact_type,
                annotations: image.annotations.unwrap_or_default(),
                layers: image.layers.iter().map(descriptor).collect::<Result<_, _>>()?,
            }))
        }
    }
}

fn descriptor(raw: &OciDescriptor) -> Result<Descriptor, String> {
    Ok(Descriptor {
        media_type: raw.media_type.clone(),
        digest: raw
            .digest
            .parse()
            .map_err(|error| format!("{}: {error}", quoted(&raw.digest)))?,
        size: u64::try_from(raw.size).map_err(|_| "a layer has a negative size".to_owned())?,
        annotations: raw.annotations.clone().unwrap_or_default(),
    })
}

/// Why an index has nothing for us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum NoChoice {
    /// Its platforms, separated by commas.
    WrongPlatform(String),
    /// The entry's digest cannot be used.
    Malformed(String),
}

/// By which podman's indexes tell disks for its hypervisors apart, and the one of ours.
const DISK_TYPE: &str = "disktype";
const QEMU: &str = "qemu";

/// Picks the entry for `wanted` from an index.
///
/// podman-machine's index holds a disk for each hypervisor, and a bootable container beside them, all for one platform: there, only a
/// disk for QEMU is ever picked.
pub(super) fn choose(entries: &[ImageIndexEntry], wanted: &Platform) -> Result<Descriptor, NoChoice> {
    let disk_type = |entry: &ImageIndexEntry| entry.annotations.as_ref()?.get(DISK_TYPE).cloned();
    let disks = entries.iter().any(|entry| disk_type(entry).is_some());
    let fits = |entry: &&ImageIndexEntry| match &entry.platform {
        _ if disks && disk_type(entry).as_deref() != Some(QEMU) => false,
        Some(p) => wanted.matches(&p.os.to_string(), &p.architecture.to_string()),
        // A lone entry without a platform can only be meant for everybody.
        None => entries.len() == 1,
    };
    let Some(entry) = entries.iter().find(fits) else {
        let mut found: Vec<String> = entries
            .iter()
            .filter_map(|entry| entry.platform.as_ref())
            .map(|p| platform::written(&p.os.to_string(), &p.architecture.to_string()))
            // Attestations stand in an index as unknown/unknown.
            .filter(|text| text != "unknown/unknown")
            .collect();
        found.dedup();
        found.truncate(16);
        let found = if found.is_empty() {
            "no platform".to_owned()
        } else {
            found.join(", ")
        };
        return Err(NoChoice::WrongPlatform(found));
    };
    let digest = entry
        .digest
        .parse()
        .map_err(|error| NoChoice::Malformed(format!("{}: {error}", quoted(&entry.digest))))?;
    let size = u64::try_from(entry.size)
        .map_err(|_| NoChoice::Malformed("a manifest has a negative size".into()))?;
    Ok(Descriptor {
        media_type: entry.media_type.clone(),
        digest,
        size,
        annotations: entry.annotations.clone().unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(fill: &str) -> String {
        format!("sha256:{}", fill.repeat(64))
    }

    fn index(entries: &[(&str, &str, &str)]) -> Vec<ImageIndexEntry> {
        let manifests: Vec<_> = entries
            .iter()
            .map(|(fill, os, architecture)| {
                serde_json::json!({
                    "mediaType": OCI_IMAGE_MEDIA_TYPE, "digest": hex(fill), "size": 7,
                    "platform": {"os": os, "architecture": architecture}
                })
            })
            .collect();
        let bytes =
            serde_json::to_vec(&serde_json::json!({"schemaVersion": 2, "manifests": manifests})).unwrap();
        match parse(&bytes).unwrap() {
            Document::Index(entries) => entries,
            Document::Image(_) => panic!("an index"),
        }
    }

    #[test]
    fn an_index_gives_the_entry_for_the_machine() {
        let entries = index(&[
            ("0", "unknown", "unknown"),
            ("a", "linux", "arm64"),
            ("b", "linux", "amd64"),
            ("c", "linux", "x86_64"),
        ]);
        let x86 = Platform::of_machine("x86_64").unwrap();
        assert_eq!(choose(&entries, &x86).unwrap().digest.to_string(), hex("b"));
        // podman-machine writes the kernel's names.
        assert_eq!(choose(&entries[3..], &x86).unwrap().digest.to_string(), hex("c"));
        assert_eq!(
            choose(&entries[..2], &x86),
            Err(NoChoice::WrongPlatform("linux/arm64".to_owned())),
            "attestations are not named"
        );
        assert_eq!(
            choose(&[], &x86),
            Err(NoChoice::WrongPlatform("no platform".to_owned()))
        );
    }

    #[test]
    fn a_manifest_keeps_layers_in_their_order() {
        let bytes = serde_json::to_vec(&serde_json::json!({
            "schemaVersion": 2,
            "config": {"mediaType": IMAGE_CONFIG_MEDIA_TYPE, "digest": hex("c"), "size": 2},
            "layers": [
                {"mediaType": "x/1", "digest": hex("1"), "size": 10},
                {"mediaType": "x/2", "digest": hex("2"), "size": 20},
            ]
        }))
        .unwrap();
        let Document::Image(manifest) = parse(&bytes).unwrap() else {
            panic!("an image")
        };
        let sizes: Vec<u64> = manifest.layers.iter().map(|layer| layer.size).collect();
        assert_eq!(sizes, [10, 20]);
    }

    #[test]
    fn what_is_no_manifest_is_refused() {
        let layer = |size: i64, digest: &str| {
            format!(
                r#"{{"schemaVersion":2,"config":{{"mediaType":"c","digest":"{}","size":2}},"layers":[{{"mediaType":"l","digest":"{digest}","size":{size}}}]}}"#,
                hex("c")
            )
        };
        for (text, reason) in [
            ("", "no valid manifest"),
            ("[]", "no valid manifest"),
            ("{}", "neither"),
            (r#"{"schemaVersion":2,"layers":[],"manifests":[]}"#, "at once"),
            (r#"{"schemaVersion":2,"layers":[]}"#, "no valid manifest"),
            (&layer(-1, &hex("a")), "negative"),
            (&layer(1, "sha512:00"), "64 lower-case"),
            (&layer(1, "sha256:../../etc/passwd"), "64 lower-case"),
        ] {
            let error = parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn of_podmans_disks_the_one_for_qemu_is_picked() {
        let mut entries = index(&[
            ("a", "linux", "amd64"),
            ("b", "linux", "x86_64"),
            ("c", "linux", "x86_64"),
            ("d", "linux", "aarch64"),
        ]);
        for (entry, kind) in entries[1..].iter_mut().zip(["hyperv", "qemu", "qemu"]) {
            entry.annotations = Some([(DISK_TYPE.to_owned(), kind.to_owned())].into());
        }
        let x86 = Platform::of_machine("x86_64").unwrap();
        let chosen = choose(&entries, &x86).unwrap();
        assert_eq!(chosen.digest.to_string(), hex("c"));
        // Without one for us, the bootable container beside them is none either.
        assert!(matches!(
            choose(&entries[..2], &x86),
            Err(NoChoice::WrongPlatform(_))
        ));
    }
}
