//! What fuzzers run of this room.

use std::io;

use super::*;
use crate::image::fuzz::{inside, one_line};
use crate::image::manifest::{self, Document};

/// Reads an archive to its end.
pub(in crate::image) fn tar(bytes: &[u8]) {
    let mut archive = archive::Archive::new(bytes, "vm", u64::MAX);
    let mut total = 0;
    loop {
        match archive.next() {
            Ok(Some(entry)) => {
                inside(&entry.path);
                total += io::copy(&mut archive.body(), &mut io::sink()).unwrap_or_default();
                assert!(total <= bytes.len() as u64, "more content than bytes");
            }
            Ok(None) => return,
            Err(error) => return one_line(&error.to_string()),
        }
    }
}

/// Reads a libvirt domain.
pub(in crate::image) fn domain(bytes: &[u8]) {
    match domain::read(bytes) {
        Ok(found) => one_line(&format!("{:?}", found.hints)),
        Err(reason) => one_line(&reason),
    }
}

/// Makes a recipe of a manifest and the documents that it names, with zero bytes between them.
pub(in crate::image) fn recipe(bytes: &[u8]) {
    let mut parts = bytes.split(|&byte| byte == 0);
    let Some(Ok(Document::Image(manifest))) = parts.next().map(manifest::parse) else {
        return;
    };
    let documents: Vec<Vec<u8>> = parts.map(<[u8]>::to_vec).collect();
    let (Some(platform), Ok(format)) = (Platform::of_machine("x86_64"), recognise(&manifest)) else {
        return;
    };
    let wanted = super::documents(format, &manifest).len();
    if documents.len() < wanted {
        return;
    }
    let limits = Limits {
        max_disk: 1 << 40,
        keep_free: 0,
    };
    let facts = Facts {
        image: "vm",
        manifest: &manifest,
        config: &Config::default(),
        documents: &documents[..wanted],
        platform: &platform,
        limits,
    };
    match super::recipe(format, &facts) {
        Ok(Recipe {
            parts: Parts::Pieces(pieces),
            ..
        }) => sound(&pieces, &limits),
        Ok(_) => {}
        Err(error) => one_line(&error.to_string()),
    }
}

/// Every piece lies in its blob and in its file.
fn sound(pieces: &Pieces, limits: &Limits) {
    for file in &pieces.files {
        assert!(file.length <= limits.max_disk, "{}", file.length);
    }
    for blob in &pieces.blobs {
        for piece in &blob.pieces {
            assert!(piece.packed.start <= piece.packed.end && piece.packed.end <= blob.descriptor.size);
            let end = piece.at.checked_add(piece.length);
            let file = &pieces.files[piece.file];
            assert!(end.is_some_and(|end| end <= file.length), "{piece:?} in {file:?}");
        }
    }
}
