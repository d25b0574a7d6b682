//! tart's images of Linux guests.
//!
//! A manifest with one `config`, pieces of the raw disk in order, and one `nvram`. The latter is the variable store of Apple's
//! firmware, which no OVMF can read: it is passed over, and the guest starts by the fallback path of its EFI partition.
//!
//! Source: what tart 2.x pushes (`OCI/Manifest.swift`, `VMConfig.swift`). Its disks of version 1 had no sizes and are gone since
//! 2023; `asif` is Apple's own sparse format.

use serde::Deserialize;

use super::{Facts, Parts, RAW};
use crate::image::error::{Error, quoted};
use crate::image::hints::{Firmware, Hints};
use crate::image::manifest::Descriptor;
use crate::image::plan::{Codec, PackedBlob, Piece, Pieces, PlannedFile};

pub(super) const CONFIG: &str = "application/vnd.cirruslabs.tart.config.v1";
const DISK: &str = "application/vnd.cirruslabs.tart.disk.v2";
const NVRAM: &str = "application/vnd.cirruslabs.tart.nvram.v1";
const OLD_DISK: &str = "application/vnd.cirruslabs.tart.disk.v1";

const SIZE: &str = "org.cirruslabs.tart.uncompressed-size";
const CONTENT: &str = "org.cirruslabs.tart.uncompressed-content-digest";
const DISK_SIZE: &str = "org.cirruslabs.tart.uncompressed-disk-size";
const DISK_FORMAT: &str = "org.cirruslabs.tart.disk.format";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Machine {
    version: u64,
    /// Absent in images from before tart knew Linux.
    os: Option<String>,
    #[serde(default)]
    arch: String,
    cpu_count: Option<u32>,
    /// Bytes.
    memory_size: Option<u64>,
    disk_format: Option<String>,
}

pub(super) fn recipe(facts: &Facts<'_>) -> Result<(Hints, Parts), Error> {
    if !facts.layers(OLD_DISK).is_empty() {
        return Err(facts.unsupported("its disk is of tart's version 1; push it again with a newer tart"));
    }
    let foreign = facts
        .manifest
        .layers
        .iter()
        .find(|layer| ![CONFIG, DISK, NVRAM].contains(&layer.media_type.as_str()));
    if let Some(layer) = foreign {
        return Err(facts.unsupported(format!(
            "a tart image with a layer of type {} cannot be read",
            quoted(&layer.media_type)
        )));
    }
    let ([_], [document]) = (facts.layers(CONFIG).as_slice(), facts.documents) else {
        return Err(facts.malformed("a tart image has exactly one config layer"));
    };
    let machine: Machine = serde_json::from_slice(document)
        .map_err(|error| facts.malformed(format!("its tart config is none ({error})")))?;
    if machine.version != 1 {
        return Err(facts.unsupported(format!("its tart config has version {}", machine.version)));
    }
    let os = machine.os.as_deref().unwrap_or("darwin");
    if os != "linux" {
        return Err(facts.unsupported(format!(
            "it is a tart image of {}, and only Linux guests can be run",
            if os == "darwin" {
                "macOS".to_owned()
            } else {
                quoted(os)
            }
        )));
    }
    let formats = [machine.disk_format.as_ref(), facts.config.labels.get(DISK_FORMAT)];
    if let Some(format) = formats.into_iter().flatten().find(|format| *format != "raw") {
        return Err(facts.unsupported(format!(
            "its tart disk is in the format {}, which only macOS reads",
            quoted(format)
        )));
    }
    facts.architecture(&machine.arch)?;
    let hints = Hints {
        memory: machine.memory_size,
        cpus: machine.cpu_count,
        firmware: Some(Firmware::Uefi),
        ..Hints::default()
    };
    Ok((hints.bounded(), Parts::Pieces(disk(facts)?)))
}

fn disk(facts: &Facts<'_>) -> Result<Pieces, Error> {
    let mut at = 0_u64;
    let mut blobs = Vec::new();
    for layer in facts.layers(DISK) {
        let length = annotated_size(facts, layer, SIZE)?;
        let digest = layer
            .annotations
            .get(CONTENT)
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| facts.malformed(format!("a disk layer of it has no {CONTENT}")))?;
        blobs.push(PackedBlob {
            descriptor: layer.clone(),
            pieces: vec![Piece {
                packed: 0..layer.size,
                codec: Codec::AppleLz4,
                file: 0,
                at,
                length,
                digest: Some(digest),
            }],
        });
        at = add(facts, at, length)?;
    }
    if blobs.is_empty() {
        return Err(facts.malformed("a tart image has at least one disk layer"));
    }
    let claimed = facts.manifest.annotations.get(DISK_SIZE);
    if claimed.is_some_and(|size| *size != at.to_string()) {
        return Err(facts.malformed(format!(
            "its disk layers make up {at} bytes, and its {DISK_SIZE} is another"
        )));
    }
    Ok(Pieces {
        files: vec![PlannedFile {
            name: RAW,
            length: at,
        }],
        blobs,
    })
}

/// A layer's unpacked size in bytes, from an annotation.
pub(super) fn annotated_size(facts: &Facts<'_>, layer: &Descriptor, name: &str) -> Result<u64, Error> {
    layer
        .annotations
        .get(name)
        .filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))
        .and_then(|text| text.parse().ok())
        .filter(|&size| size > 0)
        .ok_or_else(|| facts.malformed(format!("a disk layer of it has no {name}")))
}

/// Where the next piece begins, within the largest allowed disk.
pub(super) fn add(facts: &Facts<'_>, at: u64, length: u64) -> Result<u64, Error> {
    let end = at.saturating_add(length);
    facts.within("virtual disk", end, facts.limits.max_disk)?;
    Ok(end)
}

#[cfg(test)]
mod tests;
