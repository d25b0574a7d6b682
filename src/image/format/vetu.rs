//! vetu's images: a kernel, perhaps an initramfs, and pieces of a raw disk, each an LZ4 frame.
//!
//! Source: what vetu 0.x pushes (`internal/oci`, `internal/vmconfig`).

use serde::Deserialize;

use super::tart::{add, annotated_size};
use super::{BOOT_FILE_MAX, Facts, INITRD, KERNEL, Parts, RAW};
use crate::image::error::{Error, quoted};
use crate::image::hints::{self, Hints};
use crate::image::manifest::Descriptor;
use crate::image::plan::{Codec, PackedBlob, Piece, Pieces, PlannedFile};

pub(super) const CONFIG: &str = "application/vnd.cirruslabs.vetu.config.v1";
const KERNEL_TYPE: &str = "application/vnd.cirruslabs.vetu.kernel.v1";
const INITRAMFS: &str = "application/vnd.cirruslabs.vetu.initramfs.v1";
const DISK: &str = "application/vnd.cirruslabs.vetu.disk.v1";

const NAME: &str = "org.cirruslabs.vetu.name";
const SIZE: &str = "org.cirruslabs.vetu.uncompressed-size";
const CONTENT: &str = "org.cirruslabs.vetu.uncompressed-digest";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Machine {
    version: u64,
    arch: String,
    #[serde(default)]
    cmdline: String,
    #[serde(default)]
    disks: Vec<Disk>,
    cpu_count: Option<u32>,
    /// Bytes.
    memory_size: Option<u64>,
}

#[derive(Deserialize)]
struct Disk {
    name: String,
}

/// What the image wishes, its kernel's command line, and its files.
pub(super) fn recipe(facts: &Facts<'_>) -> Result<(Hints, Option<String>, Parts), Error> {
    let known = [CONFIG, KERNEL_TYPE, INITRAMFS, DISK];
    let foreign = facts
        .manifest
        .layers
        .iter()
        .find(|layer| !known.contains(&layer.media_type.as_str()));
    if let Some(layer) = foreign {
        return Err(facts.unsupported(format!(
            "a vetu image with a layer of type {} cannot be read",
            quoted(&layer.media_type)
        )));
    }
    let ([_], [document]) = (facts.layers(CONFIG).as_slice(), facts.documents) else {
        return Err(facts.malformed("a vetu image has exactly one config layer"));
    };
    let machine: Machine = serde_json::from_slice(document)
        .map_err(|error| facts.malformed(format!("its vetu config is none ({error})")))?;
    if machine.version != 1 {
        return Err(facts.unsupported(format!("its vetu config has version {}", machine.version)));
    }
    facts.architecture(&machine.arch)?;
    let [disk] = machine.disks.as_slice() else {
        return Err(facts.unsupported(format!(
            "it is a vetu image with {} disks, and a machine has one",
            machine.disks.len()
        )));
    };
    let cmdline = match machine.cmdline.as_str() {
        "" => None,
        text => Some(hints::cmdline(text).ok_or_else(|| {
            facts.malformed("its kernel's command line is longer than 2048 bytes or not printable ASCII")
        })?),
    };
    let hints = Hints {
        memory: machine.memory_size,
        cpus: machine.cpu_count,
        ..Hints::default()
    };
    Ok((hints.bounded(), cmdline, Parts::Pieces(files(facts, &disk.name)?)))
}

fn files(facts: &Facts<'_>, disk: &str) -> Result<Pieces, Error> {
    let (kernels, initrds) = (facts.layers(KERNEL_TYPE), facts.layers(INITRAMFS));
    let ([kernel], [] | [_]) = (kernels.as_slice(), initrds.as_slice()) else {
        return Err(facts.malformed("a vetu image has exactly one kernel and at most one initramfs"));
    };
    let (mut files, mut blobs) = (vec![PlannedFile { name: RAW, length: 0 }], Vec::new());
    let mut at = 0;
    for layer in facts.layers(DISK) {
        if layer.annotations.get(NAME).map(String::as_str) != Some(disk) {
            return Err(facts.malformed(format!(
                "a disk layer of it does not belong to its disk {}",
                quoted(disk)
            )));
        }
        let length = annotated_size(facts, layer, SIZE)?;
        // The first versions wrote none; then the blob's own digest has to do.
        let digest = match layer.annotations.get(CONTENT) {
            Some(text) => Some(
                text.parse()
                    .map_err(|error| facts.malformed(format!("its {CONTENT} is wrong: {error}")))?,
            ),
            None => None,
        };
        let piece = Piece {
            packed: 0..layer.size,
            codec: Codec::Lz4Frame,
            file: 0,
            at,
            length,
            digest,
        };
        blobs.push(packed(layer, piece));
        at = add(facts, at, length)?;
    }
    if blobs.is_empty() {
        return Err(facts.malformed("a vetu image has at least one disk layer"));
    }
    files[0].length = at;
    for (name, layer) in [(KERNEL, Some(kernel)), (INITRD, initrds.first())] {
        let Some(layer) = layer else { continue };
        facts.within("kernel or initrd", layer.size, BOOT_FILE_MAX)?;
        if layer.size == 0 {
            return Err(facts.malformed(format!("its {name} is empty")));
        }
        let piece = Piece {
            packed: 0..layer.size,
            codec: Codec::Plain,
            file: files.len(),
            at: 0,
            length: layer.size,
            digest: Some(layer.digest),
        };
        blobs.push(packed(layer, piece));
        files.push(PlannedFile {
            name,
            length: layer.size,
        });
    }
    Ok(Pieces { files, blobs })
}

fn packed(layer: &Descriptor, piece: Piece) -> PackedBlob {
    PackedBlob {
        descriptor: layer.clone(),
        pieces: vec![piece],
    }
}

#[cfg(test)]
mod tests;
