//! Packed bytes on their way to whoever unpacks them: counted, hashed, and refused if they are not what was announced.

use std::io::{self, Read};
use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};

use super::part::CancelledOnDrop;
use super::progress::Meter;
use crate::image::digest::{Digest, Hasher};
use crate::image::error::Error;
use crate::image::manifest::Descriptor;

/// Reads blobs that follow each other, and checks each at its end.
pub(super) struct Verified<'a, R> {
    inner: R,
    blobs: &'a [Descriptor],
    /// Which of them is being read; their number after the last.
    blob: usize,
    hasher: Hasher,
    /// Bytes of it that were read.
    count: u64,
    /// There was a byte behind the last blob.
    too_long: bool,
    meter: &'a Meter,
    cancelled: &'a AtomicBool,
    image: &'a str,
}

/// How far a reader is, for another process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Position {
    blob: usize,
    count: u64,
    hash: String,
}

impl Position {
    /// Bytes of all blobs in front of it; none if there is no such place.
    pub(super) fn offset(&self, blobs: &[Descriptor]) -> Option<u64> {
        let current = blobs.get(self.blob)?;
        let before: u64 = blobs[..self.blob].iter().map(|blob| blob.size).sum();
        (self.count <= current.size).then(|| before + self.count)
    }
}

impl<R: Read> Read for Verified<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        CancelledOnDrop::check(self.cancelled)?;
        self.pass().map_err(io::Error::other)?;
        let Some(blob) = self.blobs.get(self.blob) else {
            // Once seen, it is seen each time: the byte itself is gone.
            self.too_long = self.too_long || self.inner.read(&mut [0])? > 0;
            if self.too_long {
                return Err(io::Error::other(
                    self.corrupt("there are more bytes than announced".to_owned()),
                ));
            }
            return Ok(0);
        };
        let left = blob.size - self.count;
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let count = self.inner.read(&mut buffer[..most])?;
        self.hasher.update(&buffer[..count]);
        self.count += count as u64;
        self.meter.add_fetched(blob, count);
        if count == 0 && most > 0 {
            let reason = format!(
                "the layer {} has {} bytes instead of {}",
                blob.digest, self.count, blob.size
            );
            return Err(io::Error::other(self.corrupt(reason)));
        }
        Ok(count)
    }
}

impl<'a, R: Read> Verified<'a, R> {
    pub(super) fn new(
        inner: R,
        blobs: &'a [Descriptor],
        meter: &'a Meter,
        cancelled: &'a AtomicBool,
        image: &'a str,
    ) -> Self {
        Self {
            inner,
            blobs,
            blob: 0,
            hasher: Hasher::default(),
            count: 0,
            too_long: false,
            meter,
            cancelled,
            image,
        }
    }

    /// Goes on at a position that another reader had; false if there is no such place.
    pub(super) fn go_to(&mut self, position: &Position) -> bool {
        let Some(hasher) = Hasher::resume(&position.hash) else {
            return false;
        };
        (self.blob, self.count, self.hasher) = (position.blob, position.count, hasher);
        for blob in self.blobs.iter().take(self.blob) {
            self.meter.add_layer(blob, blob.size);
        }
        if let Some(blob) = self.blobs.get(self.blob) {
            self.meter.add_layer(blob, self.count);
        }
        true
    }

    pub(super) fn position(&self) -> Position {
        Position {
            blob: self.blob,
            count: self.count,
            hash: self.hasher.stop(),
        }
    }

    /// Goes on to the blob that is to be read next, and checks those that it passes.
    fn pass(&mut self) -> Result<(), Error> {
        while let Some(blob) = self.blobs.get(self.blob).filter(|blob| blob.size == self.count) {
            let found: Digest = std::mem::take(&mut self.hasher).finish();
            if found != blob.digest {
                let reason = format!("the layer {} has the digest {found}", blob.digest);
                return Err(self.corrupt(reason));
            }
            (self.blob, self.count) = (self.blob + 1, 0);
        }
        Ok(())
    }

    /// Reads what is left and compares.
    pub(super) fn finish(mut self) -> Result<(), Error> {
        let Err(error) = io::copy(&mut self, &mut io::sink()) else {
            return Ok(());
        };
        Err(error.downcast::<Error>().unwrap_or_else(|error| {
            let blob = self.blobs.get(self.blob);
            let which = blob.map_or_else(String::new, |blob| format!(" {}", blob.digest));
            self.corrupt(format!("the layer{which} cannot be read to its end ({error})"))
        }))
    }

    fn corrupt(&self, reason: String) -> Error {
        Error::Corrupt {
            image: self.image.to_owned(),
            reason,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob(size: u64, digest: Digest) -> Descriptor {
        Descriptor {
            media_type: String::new(),
            digest,
            size,
            annotations: std::collections::BTreeMap::new(),
        }
    }

    /// Reads bytes that are announced as these blobs.
    fn verify(bytes: &[u8], blobs: &[(u64, Digest)]) -> Result<String, Error> {
        let blobs: Vec<Descriptor> = blobs.iter().map(|&(size, digest)| blob(size, digest)).collect();
        let (meter, cancelled) = (Meter::default(), AtomicBool::new(false));
        let mut verified = Verified::new(bytes, &blobs, &meter, &cancelled, "vm");
        let mut out = String::new();
        drop(verified.read_to_string(&mut out));
        verified.finish().map(|()| out)
    }

    #[test]
    fn size_and_digest_are_both_checked() {
        let digest = Digest::of(b"bytes");
        assert_eq!(verify(b"bytes", &[(5, digest)]).unwrap(), "bytes");
        for (bytes, size) in [(&b"bytes"[..], 4), (b"bytes", 6), (b"bytez", 5), (b"", 5)] {
            assert!(
                matches!(verify(bytes, &[(size, digest)]), Err(Error::Corrupt { .. })),
                "{bytes:?} {size}"
            );
        }
    }

    #[test]
    fn each_blob_of_a_stream_is_checked_by_itself() {
        let (one, none, two) = (Digest::of(b"one"), Digest::of(b""), Digest::of(b"three"));
        assert_eq!(
            verify(b"onethree", &[(3, one), (0, none), (5, two)]).unwrap(),
            "onethree"
        );
        for (bytes, blobs) in [
            (&b"onethree"[..], [(4, one), (4, two)]),
            (b"onethre", [(3, one), (5, two)]),
            (b"onethreee", [(3, one), (5, two)]),
            (b"onethree", [(3, two), (5, one)]),
        ] {
            let error = verify(bytes, &blobs).unwrap_err();
            assert!(matches!(error, Error::Corrupt { .. }), "{error}");
        }
    }
}
