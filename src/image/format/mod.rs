//! The formats that images come in, one file each.
//!
//! | format | file |
//! |---|---|
//! | containerDisk (KubeVirt): tar layers with one file under `disk/` | [`container_disk`] |
//! | plain disk: one blob that is a qcow2 or a raw disk | [`plain`] |
//!
//! Which of them a layer is, its unpacked bytes say. Media types only tell apart what cannot be read at all.

mod archive;
mod container_disk;
mod plain;

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::decompress::{Compression, Peeked, decompress, unreadable};
use super::digest::{Digest, Hasher};
use super::error::{Error, quoted};
use super::hints::BootFiles;
use super::manifest::{Descriptor, IMAGE_CONFIG_MEDIA_TYPE, IMAGE_DOCKER_CONFIG_MEDIA_TYPE, Manifest};
use super::progress::Meter;
use super::room::{Limits, Room};

/// What a containerDisk may hold beside its disk, unpacked, in bytes: a whole operating system, for disks
/// that were put on top of an ordinary container image.
const OTHER_FILES_MAX: u64 = 8 << 30;

/// Bytes that tell a tar from a disk: one header.
const TAR_HEADER: usize = 512;

/// What an image's config says, as far as we listen.
#[derive(Debug, Default)]
pub(super) struct Config {
    pub(super) os: String,
    pub(super) architecture: String,
    pub(super) labels: BTreeMap<String, String>,
    /// Digests of the unpacked layers; empty when it does not say.
    pub(super) diff_ids: Vec<Digest>,
}

/// Is the config an image's, or some artifact's own?
pub(super) fn has_image_config(manifest: &Manifest) -> bool {
    [IMAGE_CONFIG_MEDIA_TYPE, IMAGE_DOCKER_CONFIG_MEDIA_TYPE].contains(&manifest.config.media_type.as_str())
}

/// Reads an image's config. The error is a reason.
pub(super) fn parse_config(bytes: &[u8], layers: usize) -> Result<Config, String> {
    #[derive(Deserialize)]
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

/// Refuses what is none of our formats before a byte of it is fetched. The error is a reason that names
/// every media type.
pub(super) fn recognise(manifest: &Manifest) -> Result<(), String> {
    const NOT_YET: [(&str, &str); 5] = [
        ("cirruslabs.tart", "a tart image"),
        ("cirruslabs.vetu", "a vetu image"),
        ("vnd.libvirt.domain", "a sardinecake image"),
        ("trycua.lume", "a lume image"),
        ("cncf.helm", "a Helm chart"),
    ];
    let types = media_types(manifest);
    if let Some((_, name)) = NOT_YET
        .iter()
        .find(|(part, _)| types.iter().any(|media_type| media_type.contains(part)))
    {
        return Err(format!(
            "it is {name}, which cannot be read (media types: {})",
            listed(&types)
        ));
    }
    let tars = manifest
        .layers
        .iter()
        .all(|layer| layer.media_type.contains("tar"));
    match manifest.layers.len() {
        0 => Err(format!("it has no layers (media types: {})", listed(&types))),
        1 => Ok(()),
        _ if tars => Ok(()),
        count => Err(format!(
            "it has {count} layers that are not all tar archives, and a plain disk is one blob (media types: {})",
            listed(&types)
        )),
    }
}

/// All media types of a manifest, each once.
fn media_types(manifest: &Manifest) -> Vec<&str> {
    let mut types: Vec<&str> = manifest.artifact_type.as_deref().into_iter().collect();
    types.push(&manifest.config.media_type);
    types.extend(manifest.layers.iter().map(|layer| layer.media_type.as_str()));
    let mut seen = std::collections::BTreeSet::new();
    types.retain(|media_type| seen.insert(*media_type));
    types
}

fn listed(types: &[&str]) -> String {
    const MOST: usize = 12;
    let mut names: Vec<String> = types.iter().take(MOST).map(|name| quoted(name)).collect();
    if types.len() > MOST {
        names.push(format!("and {} more", types.len() - MOST));
    }
    names.join(", ")
}

/// Where an image is unpacked, and within which bounds.
#[derive(Debug, Clone)]
pub(super) struct Workplace {
    /// The reference, for errors.
    pub(super) image: String,
    /// An empty folder that nobody else looks at.
    pub(super) dir: PathBuf,
    pub(super) limits: Limits,
    pub(super) meter: Arc<Meter>,
}

impl Workplace {
    fn room(&self) -> Room {
        Room::new(&self.image, &self.dir, self.limits.keep_free)
    }

    fn unsupported(&self, reason: impl Into<String>) -> Error {
        Error::Unsupported {
            image: self.image.clone(),
            reason: reason.into(),
        }
    }

    fn malformed(&self, reason: impl Into<String>) -> Error {
        Error::Malformed {
            image: self.image.clone(),
            reason: reason.into(),
        }
    }
}

/// Files taken out of an image so far, by their paths in it.
#[derive(Debug, Default)]
pub(super) struct Contents {
    files: BTreeMap<String, Taken>,
    /// Files made in the work place, also those that a later layer replaced.
    made: u32,
    /// Bytes unpacked from all layers.
    unpacked: u64,
}

#[derive(Debug)]
struct Taken {
    /// Which layer it came from; a later one may replace it.
    layer: usize,
    file: PathBuf,
}

/// The name under which a plain disk stands among [`Contents`].
const PLAIN_DISK: &str = "disk/plain";

/// The files that a machine needs.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Selected {
    pub(super) disk: PathBuf,
    pub(super) kernel: Option<PathBuf>,
    pub(super) initrd: Option<PathBuf>,
}

/// One layer to unpack.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub(super) number: usize,
    /// Is it the image's only layer?
    pub(super) alone: bool,
    pub(super) descriptor: Descriptor,
    /// What its unpacked bytes must hash to, where the config says so.
    pub(super) diff_id: Option<Digest>,
}

/// Unpacks one layer from its packed bytes and adds its files to `contents`.
pub(super) fn unpack(
    packed: &mut dyn Read,
    layer: &Layer,
    boot: &BootFiles,
    place: &Workplace,
    mut contents: Contents,
) -> Result<Contents, Error> {
    let (compression, unpacked) = decompress(packed, &place.image)?;
    if compression != Compression::None {
        // Packed bytes are never more than a little more than unpacked ones, holes being none.
        place.room().require(layer.descriptor.size)?;
    }
    let mut counted = Counted {
        inner: unpacked,
        hasher: layer.diff_id.map(|_| Hasher::default()),
        count: contents.unpacked,
        limit: place.limits.max_disk.saturating_add(OTHER_FILES_MAX),
        image: &place.image,
    };
    let mut peeked =
        Peeked::new(&mut counted, TAR_HEADER).map_err(|error| unreadable(&place.image, error))?;
    if archive::begins(peeked.head(), &layer.descriptor.media_type) {
        container_disk::take(&mut peeked, layer.number, boot, place, &mut contents)?;
    } else if layer.alone {
        let length = (compression == Compression::None).then_some(layer.descriptor.size);
        plain::take(&mut peeked, length, place, &mut contents)?;
    } else {
        return Err(place.unsupported(format!(
            "its layer {} of type {} is no tar archive",
            layer.number + 1,
            quoted(&layer.descriptor.media_type)
        )));
    }
    // To the end: the digest covers what follows the archive, too.
    io::copy(&mut peeked, &mut io::sink()).map_err(|error| unreadable(&place.image, error))?;
    drop(peeked);
    contents.unpacked = counted.count;
    if let (Some(expected), Some(hasher)) = (layer.diff_id, counted.hasher) {
        let found = hasher.finish();
        if found != expected {
            return Err(place.malformed(format!(
                "its layer {} unpacks to {found}, and its config says {expected}",
                layer.number + 1
            )));
        }
    }
    Ok(contents)
}

impl Contents {
    /// Picks the files that a machine needs, and refuses an image that leaves a choice.
    pub(super) fn select(
        mut self,
        boot: &BootFiles,
        manifest: &Manifest,
        config: &Config,
        place: &Workplace,
    ) -> Result<Selected, Error> {
        let disks: Vec<String> = self
            .files
            .keys()
            .filter(|path| container_disk::is_disk(path))
            .cloned()
            .collect();
        let [disk] = disks.as_slice() else {
            return Err(place.unsupported(match disks.as_slice() {
                [] if config.labels.contains_key("containers.bootc") || config.labels.contains_key("ostree.bootable") => {
                    "it is a bootc container; build a disk image from it first".to_owned()
                }
                [] => format!(
                    "it has no file under disk/, so it is an ordinary container or some other artifact (media types: {})",
                    listed(&media_types(manifest))
                ),
                [first, second, ..] => {
                    format!("it has more than one file under disk/: {} and {}", quoted(first), quoted(second))
                }
                [_] => String::new(),
            }));
        };
        let disk = self
            .files
            .remove(disk)
            .map(|taken| taken.file)
            .unwrap_or_default();
        let mut pick = |path: &Option<String>, label| match path {
            None => Ok(None),
            Some(path) => match self.files.remove(path) {
                Some(taken) => Ok(Some(taken.file)),
                None => Err(Error::Label {
                    image: place.image.clone(),
                    label,
                    reason: "names a file that the image does not have",
                }),
            },
        };
        let kernel = pick(&boot.kernel, "io.cannery.kernel")?;
        let initrd = pick(&boot.initrd, "io.cannery.initrd")?;
        Ok(Selected { disk, kernel, initrd })
    }

    /// A path for the next file in the work place.
    fn next_file(&mut self, dir: &Path) -> PathBuf {
        self.made += 1;
        dir.join(format!("file.{}", self.made))
    }

    /// Puts a file in, in place of what an earlier layer had there.
    fn put(&mut self, path: &str, layer: usize, file: PathBuf) -> Result<(), Error> {
        match self.files.insert(path.to_owned(), Taken { layer, file }) {
            Some(old) => std::fs::remove_file(&old.file).map_err(Error::storage(old.file)),
            None => Ok(()),
        }
    }

    /// Takes out what earlier layers had at and below a path.
    fn remove_below(&mut self, layer: usize, gone: impl Fn(&str) -> bool) -> Result<(), Error> {
        let hidden: Vec<String> = self
            .files
            .iter()
            .filter(|(path, taken)| taken.layer < layer && gone(path))
            .map(|(path, _)| path.clone())
            .collect();
        for path in hidden {
            if let Some(taken) = self.files.remove(&path) {
                std::fs::remove_file(&taken.file).map_err(Error::storage(taken.file))?;
            }
        }
        Ok(())
    }
}

/// Reads an archive to its end; for fuzzers.
#[cfg(any(test, fuzzing))]
pub(super) fn fuzz_archive(bytes: &[u8]) {
    let mut archive = archive::Archive::new(bytes, "vm");
    let mut total = 0;
    loop {
        match archive.next() {
            Ok(Some(entry)) => {
                super::fuzz::inside(&entry.path);
                total += io::copy(&mut archive.body(), &mut io::sink()).unwrap_or_default();
                assert!(total <= bytes.len() as u64, "more content than bytes");
            }
            Ok(None) => return,
            Err(error) => return super::fuzz::one_line(&error.to_string()),
        }
    }
}

/// Counts and hashes unpacked bytes and stops at the limit, so that a bomb costs no more than the largest
/// honest image.
struct Counted<'a, R> {
    inner: R,
    hasher: Option<Hasher>,
    count: u64,
    limit: u64,
    image: &'a str,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.count += count as u64;
        if self.count > self.limit {
            return Err(io::Error::other(Error::TooLarge {
                image: self.image.to_owned(),
                what: "unpacked content",
                size: self.count,
                limit: self.limit,
            }));
        }
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&buffer[..count]);
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn unreadable_formats_are_named_with_their_types() {
        let tar = "application/vnd.oci.image.layer.v1.tar+gzip";
        for layers in [&[tar][..], &[tar, tar], &["application/octet-stream"], &["x/y"]] {
            assert_eq!(
                recognise(&manifest(IMAGE_CONFIG_MEDIA_TYPE, layers)),
                Ok(()),
                "{layers:?}"
            );
        }
        for (layers, part) in [
            (&[][..], "no layers"),
            (&["x/1", "x/2"], "`x/1`, `x/2`"),
            (&[tar, "x/2"], "`x/2`"),
            (
                &[
                    "application/vnd.cirruslabs.tart.config.v1",
                    "application/vnd.cirruslabs.tart.disk.v2",
                ],
                "a tart image",
            ),
            (
                &["application/vnd.libvirt.domain.config+xml"],
                "a sardinecake image",
            ),
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
