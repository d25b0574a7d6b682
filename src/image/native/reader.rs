//! From a manifest and its index to plans for the engine.

use std::collections::HashMap;

use super::index::{self, Segment};
use super::{ARTIFACT_TYPE, CONTENT, FILES, INDEX_TYPE, PACK_TYPE};
use crate::image::digest::{Digest, Hasher};
use crate::image::manifest::{Descriptor, Manifest};
use crate::image::plan::{Codec, PackedBlob, Piece, Pieces, PlannedFile};

/// Is this an image of ours?
pub(in crate::image) fn is_native(manifest: &Manifest) -> bool {
    manifest.artifact_type.as_deref() == Some(ARTIFACT_TYPE)
        || manifest.layers.iter().any(|layer| layer.media_type == INDEX_TYPE)
}

/// Reads an image's segments, one after the other. All errors are reasons for [`crate::image::Error::Malformed`].
#[derive(Debug, Clone)]
pub(in crate::image) struct Reader {
    segments: Vec<Descriptor>,
    packs: HashMap<Digest, Descriptor>,
    /// What the manifest says about the content.
    promised: Digest,
    content: ContentDigest,
    /// The file of the last segment, and where its last chunk ended.
    place: Option<(usize, u64)>,
    lengths: [Option<u64>; FILES.len()],
    seen: usize,
}

impl Reader {
    /// Looks at the layers.
    pub(in crate::image) fn new(manifest: &Manifest) -> Result<Self, String> {
        let (mut segments, mut packs) = (Vec::new(), HashMap::new());
        for layer in &manifest.layers {
            match layer.media_type.as_str() {
                INDEX_TYPE if layer.size > index::SIZE_MAX => {
                    return Err(format!(
                        "a segment of its index has {} bytes, more than {}",
                        layer.size,
                        index::SIZE_MAX
                    ));
                }
                INDEX_TYPE => segments.push(layer.clone()),
                PACK_TYPE => {
                    let size = layer.size;
                    if packs
                        .insert(layer.digest, layer.clone())
                        .is_some_and(|other| other.size != size)
                    {
                        return Err(format!("its pack {} has two sizes", layer.digest));
                    }
                }
                // Room for what later versions add.
                _ => {}
            }
        }
        let promised = manifest
            .annotations
            .get(CONTENT)
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| format!("its manifest has no digest in the annotation {CONTENT}"))?;
        if segments.is_empty() {
            return Err("it has no index".to_owned());
        }
        Ok(Self {
            segments,
            packs,
            promised,
            content: ContentDigest::default(),
            place: None,
            lengths: [None; FILES.len()],
            seen: 0,
        })
    }

    /// The layers of the index, in the order in which [`Reader::next`] wants them. Each is small enough to be held in memory.
    pub(in crate::image) fn segments(&self) -> &[Descriptor] {
        &self.segments
    }

    /// Bytes of the index, packed.
    pub(in crate::image) fn index_size(&self) -> u64 {
        let sizes = self.segments.iter().map(|segment| segment.size);
        sizes.fold(0, u64::saturating_add)
    }

    /// Takes the bytes of the next segment, which are verified already, and says what to fetch for it.
    pub(in crate::image) fn next(&mut self, bytes: &[u8]) -> Result<Pieces, String> {
        let segment = index::decode(bytes)?;
        self.place(&segment)?;
        self.seen += 1;
        for chunk in &segment.chunks {
            self.content.chunk(chunk.at, chunk.length, &chunk.digest);
        }
        self.pieces(&segment)
    }

    /// After the last segment: is it what the manifest promised? Says which of [`FILES`] there are.
    pub(in crate::image) fn finish(self) -> Result<[bool; FILES.len()], String> {
        if self.seen != self.segments.len() {
            return Err(format!(
                "{} of its {} segments were read",
                self.seen,
                self.segments.len()
            ));
        }
        let found = self.content.finish();
        if found != self.promised {
            return Err(format!(
                "its index lists the content {found}, and its manifest promises {}",
                self.promised
            ));
        }
        let [disk, kernel, initrd] = self.lengths.map(|length| length.is_some());
        if !disk {
            return Err("its index has no disk".to_owned());
        }
        if initrd && !kernel {
            return Err("its index has an initial RAM disk and no kernel".to_owned());
        }
        Ok([disk, kernel, initrd])
    }

    /// Segments come in the order of the files and, in each, of the chunks.
    fn place(&mut self, segment: &Segment) -> Result<(), String> {
        let name = *FILES
            .get(segment.file)
            .ok_or("a segment of its index names a file that no image has")?;
        let known = &mut self.lengths[segment.file];
        match (*known, self.place) {
            (None, last) if last.is_none_or(|(file, _)| file < segment.file) => {
                *known = Some(segment.file_length);
                self.content.file(segment.file, segment.file_length);
            }
            (Some(length), Some((file, end))) if file == segment.file => {
                if length != segment.file_length {
                    return Err(format!("its index gives two lengths for its {name}"));
                }
                match segment.chunks.first() {
                    None => return Err("a segment of its index is empty".to_owned()),
                    Some(first) if first.at < end => {
                        return Err(format!("two segments of its index claim one place of its {name}"));
                    }
                    Some(_) => {}
                }
            }
            _ => return Err("the segments of its index are out of order".to_owned()),
        }
        let end = segment
            .chunks
            .last()
            .map_or(0, |last| last.at + u64::from(last.length));
        self.place = Some((segment.file, end));
        Ok(())
    }

    fn pieces(&self, segment: &Segment) -> Result<Pieces, String> {
        let mut blobs = Vec::with_capacity(segment.packs.len());
        for pack in &segment.packs {
            let descriptor = self
                .packs
                .get(pack)
                .ok_or_else(|| format!("its index names the pack {pack}, which is none of its layers"))?;
            blobs.push(PackedBlob {
                descriptor: descriptor.clone(),
                pieces: Vec::new(),
            });
        }
        for chunk in &segment.chunks {
            let end = chunk.packed_at + u64::from(chunk.packed_length);
            blobs[chunk.pack as usize].pieces.push(Piece {
                packed: chunk.packed_at..end,
                codec: Codec::Zstd,
                file: 0,
                at: chunk.at,
                length: u64::from(chunk.length),
                digest: Some(chunk.digest),
            });
        }
        for blob in &mut blobs {
            blob.pieces
                .sort_by_key(|piece| (piece.packed.start, piece.packed.end, piece.at));
            let pack = &blob.descriptor;
            let mut last: Option<&Piece> = None;
            for piece in &blob.pieces {
                if piece.packed.end > pack.size {
                    return Err(format!(
                        "a chunk of its index lies outside of the pack {}",
                        pack.digest
                    ));
                }
                if let Some(last) = last
                    && piece.packed.start < last.packed.end
                    // One frame may be many chunks' only if they are the same.
                    && (piece.packed != last.packed || piece.digest != last.digest || piece.length != last.length)
                {
                    return Err(format!("frames of the pack {} overlap", pack.digest));
                }
                last = Some(piece);
            }
        }
        Ok(Pieces {
            files: vec![PlannedFile {
                name: FILES[segment.file],
                length: segment.file_length,
            }],
            blobs,
        })
    }
}

/// The image-wide digest: over files and chunks, not over how they are packed.
#[derive(Debug, Clone, Default)]
pub(super) struct ContentDigest(Hasher);

impl ContentDigest {
    /// A file begins.
    pub(super) fn file(&mut self, file: usize, length: u64) {
        self.entry(b"file", file as u64, length);
    }

    /// The next chunk of the file.
    pub(super) fn chunk(&mut self, at: u64, length: u32, digest: &Digest) {
        self.entry(b"data", at, u64::from(length));
        self.0.update(digest.as_bytes());
    }

    fn entry(&mut self, kind: &[u8; 4], first: u64, second: u64) {
        self.0.update(kind);
        self.0.update(&first.to_le_bytes());
        self.0.update(&second.to_le_bytes());
    }

    /// The digest of all of it.
    pub(super) fn finish(self) -> Digest {
        self.0.finish()
    }
}
