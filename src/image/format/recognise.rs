//! Which of the formats an image has, by its manifest alone.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::quoted;
use crate::image::manifest::{Descriptor, Manifest};

/// The annotation that names a blob's file.
const TITLE: &str = "org.opencontainers.image.title";

/// The annotation by which podman tells its disks apart.
const DISK_TYPE: &str = "disktype";

/// The format that an image came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Format {
    /// Our own: chunks in packs, and an index.
    Native,
    /// KubeVirt's: a container image with a disk under `disk/`. Earlier records of the store spell it with a hyphen.
    #[serde(rename = "containerdisk", alias = "container-disk")]
    ContainerDisk,
    /// One disk, packed or not, perhaps split into `chunk-*`.
    Plain,
    /// tart's, of Linux guests.
    Tart,
    /// vetu's.
    Vetu,
    /// sardinecake's.
    Sardinecake,
    /// podman's for its machines.
    PodmanMachine,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::ContainerDisk => "containerdisk",
            Self::Plain => "plain",
            Self::Tart => "tart",
            Self::Vetu => "vetu",
            Self::Sardinecake => "sardinecake",
            Self::PodmanMachine => "podman-machine",
        })
    }
}

/// Names the format, or refuses what is none of ours before a byte of it is fetched. The error is a reason that names every media
/// type.
pub(in crate::image) fn recognise(manifest: &Manifest) -> Result<Format, String> {
    const BY_TYPE: [(&str, Result<Format, &str>); 8] = [
        ("vnd.cannery.image.", Ok(Format::Native)),
        ("vnd.cirruslabs.tart.", Ok(Format::Tart)),
        ("vnd.cirruslabs.vetu.", Ok(Format::Vetu)),
        ("vnd.libvirt.domain", Ok(Format::Sardinecake)),
        ("vnd.sardinecake.", Ok(Format::Sardinecake)),
        ("trycua.lume", Err("a lume image")),
        ("cncf.helm", Err("a Helm chart")),
        ("sigstore.bundle", Err("a signature")),
    ];
    let types = media_types(manifest);
    let known = BY_TYPE
        .iter()
        .find(|(part, _)| types.iter().any(|media_type| media_type.contains(part)));
    match known {
        Some((_, Ok(format))) => return Ok(*format),
        Some((_, Err(name))) => {
            return Err(format!(
                "it is {name}, which cannot be read (media types: {})",
                listed(&types)
            ));
        }
        None => {}
    }
    let tars = manifest
        .layers
        .iter()
        .all(|layer| layer.media_type.contains("tar"));
    match manifest.layers.as_slice() {
        [] => Err(format!("it has no layers (media types: {})", listed(&types))),
        [_] if manifest.annotations.contains_key(DISK_TYPE) => Ok(Format::PodmanMachine),
        // What one layer is, its bytes will say; this is a guess.
        [_] if !tars => Ok(Format::Plain),
        layers if !tars && layers.iter().all(|layer| chunk(layer).is_some()) => Ok(Format::Plain),
        layers if !tars => Err(format!(
            "it has {} layers that are not all tar archives, and a plain disk is one blob or several with the titles chunk-* \
             (media types: {})",
            layers.len(),
            listed(&types)
        )),
        _ => Ok(Format::ContainerDisk),
    }
}

/// The title of a blob that is a piece of a file, as `split` names them.
pub(super) fn chunk(layer: &Descriptor) -> Option<&str> {
    let title = layer.annotations.get(TITLE)?;
    title.starts_with("chunk-").then_some(title.as_str())
}

/// All media types of a manifest, each once.
pub(super) fn media_types(manifest: &Manifest) -> Vec<&str> {
    let mut types: Vec<&str> = manifest.artifact_type.as_deref().into_iter().collect();
    types.push(&manifest.config.media_type);
    types.extend(manifest.layers.iter().map(|layer| layer.media_type.as_str()));
    let mut seen = std::collections::BTreeSet::new();
    types.retain(|media_type| seen.insert(*media_type));
    types
}

pub(super) fn listed(types: &[&str]) -> String {
    const MOST: usize = 12;
    let mut names: Vec<String> = types.iter().take(MOST).map(|name| quoted(name)).collect();
    if types.len() > MOST {
        names.push(format!("and {} more", types.len() - MOST));
    }
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::image::digest::Digest;
    use crate::image::manifest::IMAGE_CONFIG_MEDIA_TYPE;

    fn manifest(config: &str, layers: &[&str]) -> Manifest {
        let descriptor = |media_type: &str| Descriptor {
            media_type: media_type.into(),
            digest: Digest::of(b""),
            size: 0,
            annotations: BTreeMap::new(),
        };
        Manifest {
            config: descriptor(config),
            artifact_type: None,
            annotations: BTreeMap::new(),
            layers: layers.iter().map(|layer| descriptor(layer)).collect(),
        }
    }

    #[test]
    fn a_format_is_known_by_its_types() {
        let tar = "application/vnd.oci.image.layer.v1.tar+gzip";
        for (layers, format) in [
            (&[tar][..], Format::ContainerDisk),
            (&[tar, tar], Format::ContainerDisk),
            (&["application/octet-stream"], Format::Plain),
            (&["x/y"], Format::Plain),
            (
                &[
                    "application/vnd.cirruslabs.tart.config.v1",
                    "application/vnd.cirruslabs.tart.disk.v2",
                ],
                Format::Tart,
            ),
            (&["application/vnd.cirruslabs.vetu.config.v1"], Format::Vetu),
            (
                &[
                    "application/vnd.libvirt.domain.config+xml",
                    "application/x-qemu-disk+gzip",
                ],
                Format::Sardinecake,
            ),
        ] {
            assert_eq!(
                recognise(&manifest(IMAGE_CONFIG_MEDIA_TYPE, layers)),
                Ok(format),
                "{layers:?}"
            );
        }
    }

    #[test]
    fn annotations_tell_what_types_do_not() {
        let mut podman = manifest("application/vnd.oci.empty.v1+json", &["application/zstd"]);
        podman.annotations.insert(DISK_TYPE.into(), "qemu".into());
        assert_eq!(recognise(&podman), Ok(Format::PodmanMachine));
        let mut split = manifest("application/vnd.oci.empty.v1+json", &["a/b", "a/b"]);
        for (layer, title) in split.layers.iter_mut().zip(["chunk-aa", "chunk-ab"]) {
            layer.annotations.insert(TITLE.into(), title.into());
        }
        assert_eq!(recognise(&split), Ok(Format::Plain));
        split.layers[1].annotations.insert(TITLE.into(), "disk-2".into());
        assert!(recognise(&split).is_err());
    }

    #[test]
    fn unreadable_formats_are_named_with_their_types() {
        let tar = "application/vnd.oci.image.layer.v1.tar+gzip";
        for (layers, part) in [
            (&[][..], "no layers"),
            (&["x/1", "x/2"], "`x/1`, `x/2`"),
            (&[tar, "x/2"], "`x/2`"),
            (&["application/vnd.trycua.lume.disk.v1"], "a lume image"),
        ] {
            let reason = recognise(&manifest(IMAGE_CONFIG_MEDIA_TYPE, layers)).unwrap_err();
            assert!(
                reason.contains(part) && reason.contains(IMAGE_CONFIG_MEDIA_TYPE),
                "{reason}"
            );
        }
        let many: Vec<String> = (0..100).map(|n| format!("x/{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert!(
            recognise(&manifest("c", &many))
                .unwrap_err()
                .ends_with("and 89 more)")
        );
    }
}
