//! Decoders that can be stopped, and where they were.

use std::io;

use serde::{Deserialize, Serialize};

use super::decompress::Compression;
use super::gunzip::{Gunzip, Stopped};
use super::unzstd::Unzstd;

/// Where the unpacking of a layer was stopped, for another process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Stand {
    /// A layer that is not packed.
    Plain,
    /// Between two blocks of a gzip stream.
    Gzip(Stopped),
    /// Between two zstd frames.
    Zstd,
}

/// What one step of a decoder did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Step {
    /// Bytes taken from the input.
    pub(super) taken: usize,
    /// Bytes given to the output.
    pub(super) given: usize,
}

impl Step {
    /// Without more input nothing comes any more.
    pub(super) fn is_idle(&self) -> bool {
        (self.taken, self.given) == (0, 0)
    }
}

/// A decoder that can be stopped.
pub(super) enum Decoder {
    Gzip(Gunzip),
    Zstd(Unzstd),
}

impl Decoder {
    /// A decoder at the beginning of a layer; none for a packing that has no place to stop at.
    pub(super) fn new(compression: Compression) -> io::Result<Option<Self>> {
        Ok(match compression {
            Compression::Gzip => Some(Self::Gzip(Gunzip::new()?)),
            Compression::Zstd => Some(Self::Zstd(Unzstd::new()?)),
            Compression::None | Compression::Xz | Compression::Other(_) => None,
        })
    }

    /// Goes on where another decoder was stopped; none if that is no such place.
    pub(super) fn resume(stand: &Stand) -> io::Result<Option<Self>> {
        Ok(match stand {
            Stand::Plain => None,
            Stand::Gzip(stopped) => Gunzip::resume(stopped).map(Self::Gzip),
            Stand::Zstd => Some(Self::Zstd(Unzstd::new()?)),
        })
    }

    pub(super) fn compression(&self) -> Compression {
        match self {
            Self::Gzip(_) => Compression::Gzip,
            Self::Zstd(_) => Compression::Zstd,
        }
    }

    /// Takes some of the input and puts what it gives to the beginning of the output. With `stop` it goes no further than to the
    /// next place at which it can be stopped.
    pub(super) fn step(&mut self, input: &[u8], output: &mut [u8], stop: bool) -> io::Result<Step> {
        match self {
            Self::Gzip(gunzip) => gunzip.step(input, output, stop),
            Self::Zstd(unzstd) => unzstd.step(input, output, stop),
        }
    }

    /// What [`Decoder::resume`] needs, if the last step has stopped at such a place.
    pub(super) fn stop(&self) -> Option<Stand> {
        match self {
            Self::Gzip(gunzip) => gunzip.stop().map(Stand::Gzip),
            Self::Zstd(unzstd) => unzstd.is_stopped().then_some(Stand::Zstd),
        }
    }

    /// May the input end here?
    pub(super) fn is_complete(&self) -> bool {
        match self {
            Self::Gzip(gunzip) => gunzip.is_complete(),
            Self::Zstd(unzstd) => unzstd.is_complete(),
        }
    }
}
