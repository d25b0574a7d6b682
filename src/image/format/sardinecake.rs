//! sardinecake's images: the XML of a libvirt domain, perhaps a word on how to enter it, and gzip files.
//!
//! Each file of a disk is one gzip stream, which may be split at any byte; the first blob has the type
//! `application/x-qemu-disk+gzip`, the n-th that follows it the parameter `;chunk=n`. The parameter decides where a file begins, not
//! gzip's magic number, which a later blob may begin with by chance. Neither sizes nor offsets are told.
//!
//! A machine's disk may be a stack of such files, each with the name of the file under it in its header. Their own names stand in
//! gzip's headers, in Latin-1; the lowest comes first. A CD that was in the machine is there, too.
//!
//! Of the domain only what [`domain`] reads is heard. The password in the image is passed over: everybody who can pull the image
//! knows it, and whoever wants to rely on it writes it as `guest.password` into the settings.
//!
//! Source: sardinecake 0.4 (`docs/oci.md`, its schema of `sardineconfig`), and what its `sarde export` writes.

use serde::Deserialize;

use super::stack::Drive;
use super::unpack::Kind;
use super::{Facts, Layer, domain};
use crate::image::error::{Error, quoted};
use crate::image::hints::{self, Hints};
use crate::image::manifest::{Descriptor, Manifest};
use crate::image::view::DEPTH_MAX;

pub(super) const DOMAIN: &str = "application/vnd.libvirt.domain.config+xml";
pub(super) const ACCESS: &str = "application/vnd.sardinecake.vm.config.v1+json";

/// The suffix of a file's media type.
const GZIP: &str = "+gzip";

/// What a layer is, by its media type.
#[derive(Debug, PartialEq, Eq)]
enum Role {
    Document,
    /// The first blob of a file.
    First,
    /// A later one, and its number.
    Chunk(u32),
}

fn role(media_type: &str) -> Option<Role> {
    if [DOMAIN, ACCESS].contains(&media_type) {
        return Some(Role::Document);
    }
    let mut parts = media_type.split(';').map(str::trim);
    if !parts.next()?.ends_with(GZIP) {
        return None;
    }
    match (parts.next(), parts.next()) {
        (None, _) => Some(Role::First),
        (Some(parameter), None) => {
            let number = parameter.strip_prefix("chunk=")?.parse().ok()?;
            Some(Role::Chunk(number))
        }
        _ => None,
    }
}

/// How many documents and files there are: the config has a digest for each.
pub(super) fn files(manifest: &Manifest) -> usize {
    manifest
        .layers
        .iter()
        .filter(|layer| !matches!(role(&layer.media_type), Some(Role::Chunk(_))))
        .count()
}

/// The wishes, the files of disks, and what the image's own machine has them as.
pub(super) fn recipe(facts: &Facts<'_>) -> Result<(Hints, Vec<Layer>, Vec<Drive>), Error> {
    let layers = grouped(facts)?;
    let (domains, accesses) = (facts.layers(DOMAIN), facts.layers(ACCESS));
    let ([_], [] | [_]) = (domains.as_slice(), accesses.as_slice()) else {
        return Err(facts.malformed(
            "a sardinecake image has exactly one domain and at most one document on how to enter it",
        ));
    };
    let ([domain], rest) = facts.documents.split_at_checked(1).unwrap_or_default() else {
        return Err(facts.malformed("a sardinecake image has exactly one domain"));
    };
    let found = domain::read(domain).map_err(|reason| facts.malformed(reason))?;
    facts.architecture(&found.architecture)?;
    let user = match rest.first() {
        Some(document) => user(document).map_err(|reason| facts.malformed(reason))?,
        None => None,
    };
    match layers.len() {
        0 => Err(facts.malformed("a sardinecake image has at least one file of a disk")),
        1..=DEPTH_MAX => Ok((Hints { user, ..found.hints }.bounded(), layers, found.drives)),
        count => Err(facts.unsupported(format!(
            "it has {count} files of disks, and more than {DEPTH_MAX} are not taken"
        ))),
    }
}

/// The name of the file that was packed, as a gzip header says it. `head` are the first bytes of the stream.
pub(in crate::image) fn packed_name(head: &[u8]) -> Option<String> {
    const EXTRA: u8 = 4;
    const NAME: u8 = 8;
    let flags = *head.strip_prefix(&[0x1f, 0x8b, 8])?.first()?;
    let mut rest = head.get(10..)?;
    if flags & EXTRA != 0 {
        let (length, behind) = rest.split_first_chunk::<2>()?;
        rest = behind.get(usize::from(u16::from_le_bytes(*length))..)?;
    }
    if flags & NAME == 0 {
        return None;
    }
    let end = rest.iter().position(|&byte| byte == 0)?;
    // Latin-1: each byte is the character of its number.
    (end > 0).then(|| rest[..end].iter().copied().map(char::from).collect())
}

/// The blobs of each file, in order.
fn grouped(facts: &Facts<'_>) -> Result<Vec<Layer>, Error> {
    let mut layers: Vec<Layer> = Vec::new();
    let mut diff_ids = facts.config.diff_ids.iter();
    for descriptor in &facts.manifest.layers {
        let chunk = match role(&descriptor.media_type) {
            Some(Role::Document) => {
                diff_ids.next();
                continue;
            }
            Some(Role::First) => {
                layers.push(Layer {
                    number: layers.len(),
                    kind: Kind::OneOfSeveral,
                    blobs: vec![descriptor.clone()],
                    diff_id: diff_ids.next().copied(),
                });
                continue;
            }
            Some(Role::Chunk(number)) => number,
            None => return Err(foreign(facts, descriptor)),
        };
        let blobs = layers.last_mut().map(|layer| &mut layer.blobs);
        match blobs {
            Some(blobs) if u32::try_from(blobs.len()) == Ok(chunk) => blobs.push(descriptor.clone()),
            _ => {
                return Err(facts.malformed(format!(
                    "its blob of type {} does not follow the one before",
                    quoted(&descriptor.media_type)
                )));
            }
        }
    }
    Ok(layers)
}

fn foreign(facts: &Facts<'_>, layer: &Descriptor) -> Error {
    facts.unsupported(format!(
        "a sardinecake image with a layer of type {} cannot be read",
        quoted(&layer.media_type)
    ))
}

/// The account that jobs run as: the first one that is named, as sardinecake's own executor does. A name that is none of Unix' is
/// passed over.
fn user(document: &[u8]) -> Result<Option<String>, String> {
    #[derive(Deserialize)]
    struct Access {
        #[serde(default)]
        users: Vec<User>,
    }
    #[derive(Deserialize)]
    struct User {
        username: String,
    }
    let access: Access = serde_json::from_slice(document)
        .map_err(|error| format!("its document on how to enter it cannot be read ({error})"))?;
    Ok(access
        .users
        .first()
        .and_then(|user| hints::account(&user.username)))
}

#[cfg(test)]
mod tests;
