//! The formats that images come in, one file each.
//!
//! | format | file |
//! |---|---|
//! | our own: chunks of a raw disk in packs, with an index | [`crate::image::native`] |
//! | containerDisk (KubeVirt): tar layers with one file under `disk/` | [`container_disk`] |
//! | plain disk: a qcow2 or a raw disk, in one blob or in several that follow each other | [`plain`] |
//! | tart, of Linux guests: pieces of a raw disk in Apple's LZ4 | [`tart`] |
//! | vetu: kernel, initramfs and pieces of a raw disk in LZ4 frames | [`vetu`] |
//! | sardinecake: a gzip file per file of a disk, split by bytes, and a libvirt domain | [`sardinecake`], [`domain`], [`stack`] |
//! | podman-machine: a plain disk, picked from an index by its `disktype` | [`crate::image::manifest::choose`] |
//!
//! [`recognise()`] names the format by the manifest alone; whether one layer is an archive or a disk, its unpacked bytes say.
//! [`recipe`] then says what has to be fetched and how it becomes a disk: as streams, which [`unpack()`] takes in order, or as
//! pieces, which may come in any order.

mod archive;
mod config;
mod container_disk;
mod domain;
mod plain;
mod recognise;
mod sardinecake;
pub(super) mod stack;
mod tart;
mod unpack;
mod vetu;

use super::error::{Error, quoted};
use super::hints::{self, BootFiles, Hints};
use super::manifest::{Descriptor, Manifest};
use super::native;
use super::plan::Pieces;
use super::platform::{self, Platform};
use super::room::Limits;

pub use recognise::Format;

pub(super) use config::{Config, has_image_config, parse_config};
pub(super) use recognise::recognise;
pub(super) use sardinecake::packed_name;
pub(super) use unpack::{Contents, Layer, Selected, Workplace, made_of, packed, packed_max, unpack};

use stack::Drive;
use unpack::Kind;

/// The files that a plan can name; the store's names for them.
const RAW: &str = "disk.raw";
const KERNEL: &str = super::store::KERNEL;
const INITRD: &str = super::store::INITRD;

/// Largest kernel or initrd, in bytes.
pub(super) const BOOT_FILE_MAX: u64 = 512 << 20;

/// How an image becomes a disk.
#[derive(Debug)]
pub(super) struct Recipe {
    pub(super) hints: Hints,
    pub(super) boot: BootFiles,
    /// Is it a container that a tool of bootc can make a disk of?
    pub(super) bootc: bool,
    pub(super) parts: Parts,
    /// What the image's own machine has its files as, where they may be several.
    pub(super) drives: Vec<Drive>,
}

/// What has to be fetched.
#[derive(Debug)]
pub(super) enum Parts {
    /// One after the other, through [`unpack()`].
    Streams(Vec<Layer>),
    /// In any order.
    Pieces(Pieces),
    /// In any order within each part of the index, which is read as it is needed.
    Indexed(Box<native::Reader>),
}

/// What is known of an image before its disk is fetched.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts<'a> {
    /// The reference, for errors.
    pub(super) image: &'a str,
    pub(super) manifest: &'a Manifest,
    pub(super) config: &'a Config,
    /// The bytes of what [`documents`] named.
    pub(super) documents: &'a [Vec<u8>],
    pub(super) platform: &'a Platform,
    pub(super) limits: Limits,
}

impl Facts<'_> {
    fn unsupported(&self, reason: impl Into<String>) -> Error {
        Error::Unsupported {
            image: self.image.to_owned(),
            reason: reason.into(),
        }
    }

    fn malformed(&self, reason: impl Into<String>) -> Error {
        Error::Malformed {
            image: self.image.to_owned(),
            reason: reason.into(),
        }
    }

    /// Refuses an image for another processor. An empty name claims nothing.
    fn architecture(&self, name: &str) -> Result<(), Error> {
        if self.platform.matches("", name) {
            return Ok(());
        }
        Err(Error::WrongPlatform {
            image: self.image.to_owned(),
            wanted: self.platform.written(),
            found: platform::written("linux", name),
        })
    }

    /// The layers of one media type.
    fn layers(&self, media_type: &str) -> Vec<&Descriptor> {
        self.manifest
            .layers
            .iter()
            .filter(|layer| layer.media_type == media_type)
            .collect()
    }

    /// Refuses a disk that is larger than allowed.
    fn within(&self, what: &'static str, size: u64, limit: u64) -> Result<(), Error> {
        if size <= limit {
            return Ok(());
        }
        Err(Error::TooLarge {
            image: self.image.to_owned(),
            what,
            size,
            limit,
        })
    }
}

/// The small blobs that say what the image is, beside its config.
pub(super) fn documents(format: Format, manifest: &Manifest) -> Vec<&Descriptor> {
    let wanted: &[&str] = match format {
        Format::Native | Format::ContainerDisk | Format::Plain | Format::PodmanMachine => &[],
        Format::Tart => &[tart::CONFIG],
        Format::Vetu => &[vetu::CONFIG],
        Format::Sardinecake => &[sardinecake::DOMAIN, sardinecake::ACCESS],
    };
    // Each once: of several, the format's own rule says what is wrong.
    wanted
        .iter()
        .filter_map(|media_type| {
            manifest
                .layers
                .iter()
                .find(|layer| layer.media_type == *media_type)
        })
        .collect()
}

/// How many things the config's list of unpacked digests speaks of.
pub(super) fn described(format: Format, manifest: &Manifest) -> usize {
    match format {
        Format::Sardinecake => sardinecake::files(manifest),
        _ => manifest.layers.len(),
    }
}

/// Says how the image becomes a disk.
pub(super) fn recipe(format: Format, facts: &Facts<'_>) -> Result<Recipe, Error> {
    let mut drives = Vec::new();
    let (labelled, mut boot) = hints::read(&facts.config.labels, facts.image)?;
    let (own, parts) = match format {
        Format::Native => {
            let reader = native::Reader::new(facts.manifest).map_err(|reason| facts.malformed(reason))?;
            (Hints::default(), Parts::Indexed(Box::new(reader)))
        }
        Format::ContainerDisk | Format::Plain | Format::PodmanMachine => {
            (Hints::default(), plain::streams(facts)?)
        }
        Format::Tart => tart::recipe(facts)?,
        Format::Vetu => {
            let (hints, cmdline, pieces) = vetu::recipe(facts)?;
            boot.cmdline = cmdline;
            (hints, pieces)
        }
        Format::Sardinecake => {
            let (hints, layers, found) = sardinecake::recipe(facts)?;
            drives = found;
            (hints, Parts::Streams(layers))
        }
    };
    let bootc = ["containers.bootc", "ostree.bootable"];
    Ok(Recipe {
        hints: labelled.or(own),
        boot,
        bootc: bootc.iter().any(|label| facts.config.labels.contains_key(*label)),
        parts,
        drives,
    })
}

#[cfg(test)]
mod fixture;
#[cfg(any(test, fuzzing))]
pub(super) mod fuzz;
