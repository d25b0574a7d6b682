//! Packed bytes on their way to whoever unpacks them: counted, hashed, and refused if they are not what was announced.

use std::io::{self, Read};
use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};

use super::part::CancelledOnDrop;
use super::progress::Meter;
use crate::image::digest::{Digest, Hasher};
use crate::image::error::Error;
use crate::image::manifest::Descriptor;

/// Counts and hashes blobs that follow each other, and checks each at its end.
pub(super) struct Check<'a> {
    blobs: &'a [Descriptor],
    position: Position,
    /// There was a byte behind the last blob.
    too_long: bool,
    image: &'a str,
}

/// How far the bytes of blobs that follow each other have come; also for another process.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Position {
    /// Which of them is in hand; their number after the last.
    blob: usize,
    /// Bytes of it that were seen, and their hash.
    count: u64,
    hash: Hasher,
}

impl Position {
    /// Bytes of all blobs in front of it; none if there is no such place.
    pub(super) fn offset(&self, blobs: &[Descriptor]) -> Option<u64> {
        let current = blobs.get(self.blob)?;
        let before: u64 = blobs[..self.blob].iter().map(|blob| blob.size).sum();
        (self.count <= current.size).then(|| before + self.count)
    }
}

impl<'a> Check<'a> {
    /// Begins at a position that another has come to, or at the beginning.
    pub(super) fn new(blobs: &'a [Descriptor], position: Position, meter: &'a Meter, image: &'a str) -> Self {
        for blob in blobs.iter().take(position.blob) {
            meter.add_layer(blob, blob.size);
        }
        if let Some(blob) = blobs.get(position.blob) {
            meter.add_layer(blob, position.count);
        }
        Self {
            blobs,
            position,
            too_long: false,
            image,
        }
    }

    /// The next bytes.
    pub(super) fn take(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            self.pass()?;
            let Some(blob) = self.blobs.get(self.position.blob) else {
                self.too_long = true;
                return self.end();
            };
            let left = usize::try_from(blob.size - self.position.count).unwrap_or(usize::MAX);
            let (own, rest) = bytes.split_at(left.min(bytes.len()));
            self.position.hash.update(own);
            self.position.count += own.len() as u64;
            bytes = rest;
        }
        Ok(())
    }

    /// Checks that no bytes are missing.
    pub(super) fn end(&mut self) -> Result<(), Error> {
        self.pass()?;
        match self.blobs.get(self.position.blob) {
            Some(blob) => {
                let reason = format!("has {} bytes instead of {}", self.position.count, blob.size);
                Err(self.corrupt(Some(blob), reason))
            }
            None if self.too_long => {
                Err(self.corrupt(None, "there are more bytes than announced".to_owned()))
            }
            None => Ok(()),
        }
    }

    /// Behind all bytes that were taken.
    pub(super) fn position(&self) -> &Position {
        &self.position
    }

    /// Goes on to the blob that comes next, and checks those that it passes.
    fn pass(&mut self) -> Result<(), Error> {
        let position = &mut self.position;
        while let Some(blob) = self
            .blobs
            .get(position.blob)
            .filter(|blob| blob.size == position.count)
        {
            let found: Digest = position.hash.clone().finish();
            if found != blob.digest {
                return Err(self.corrupt(Some(blob), format!("has the digest {found}")));
            }
            *position = Position {
                blob: position.blob + 1,
                ..Position::default()
            };
        }
        Ok(())
    }

    /// The bytes did not come.
    pub(super) fn failed(&self, error: &io::Error) -> Error {
        let blob = self.blobs.get(self.position.blob);
        self.corrupt(blob, format!("cannot be read to its end ({error})"))
    }

    fn corrupt(&self, blob: Option<&Descriptor>, reason: String) -> Error {
        Error::Corrupt {
            image: self.image.to_owned(),
            blob: blob.map(|blob| blob.digest),
            reason,
        }
    }
}

/// Reads blobs that follow each other, and checks each at its end.
pub(super) struct Verified<'a, R> {
    inner: R,
    check: Check<'a>,
    cancelled: &'a AtomicBool,
}

impl<R: Read> Read for Verified<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        CancelledOnDrop::check(self.cancelled)?;
        let count = self.inner.read(buffer)?;
        self.check.take(&buffer[..count]).map_err(io::Error::other)?;
        if count == 0 && !buffer.is_empty() {
            self.check.end().map_err(io::Error::other)?;
        }
        Ok(count)
    }
}

impl<'a, R: Read> Verified<'a, R> {
    pub(super) fn new(inner: R, check: Check<'a>, cancelled: &'a AtomicBool) -> Self {
        Self {
            inner,
            check,
            cancelled,
        }
    }

    /// Reads what is left and compares.
    pub(super) fn finish(mut self) -> Result<(), Error> {
        let Err(error) = io::copy(&mut self, &mut io::sink()) else {
            return Ok(());
        };
        let ours = error.downcast::<Error>();
        Err(ours.unwrap_or_else(|error| self.check.failed(&error)))
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
        let check = Check::new(&blobs, Position::default(), &meter, "vm");
        let mut verified = Verified::new(bytes, check, &cancelled);
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
