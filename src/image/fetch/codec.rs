//! Unpacks single pieces.

use std::io::{self, Read};

use super::decompress::ZSTD_WINDOW_LOG_MAX;
use crate::image::lz4;
use crate::image::plan::Codec;

/// Unpacks pieces in memory, one after the other.
pub(super) struct Unpacker(zstd::bulk::Decompressor<'static>);

impl Unpacker {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(zstd::bulk::Decompressor::new()?))
    }

    /// Unpacks one piece, which must fill `to` exactly.
    pub(super) fn unpack(&mut self, codec: Codec, packed: &[u8], to: &mut [u8]) -> io::Result<()> {
        match codec {
            Codec::Plain => {
                if packed.len() != to.len() {
                    return Err(wrong_length());
                }
                to.copy_from_slice(packed);
                Ok(())
            }
            // It writes nowhere else than into `to`, whatever the frame claims.
            Codec::Zstd => {
                if self.0.decompress_to_buffer(packed, to)? == to.len() {
                    Ok(())
                } else {
                    Err(wrong_length())
                }
            }
            Codec::AppleLz4 | Codec::Lz4Frame => {
                let mut unpacked = reader(codec, packed)?;
                unpacked.read_exact(to)?;
                match unpacked.read(&mut [0])? {
                    0 => Ok(()),
                    _ => Err(wrong_length()),
                }
            }
        }
    }
}

fn wrong_length() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "it has another length")
}

/// Unpacks a piece while it arrives.
pub(super) fn reader<'a>(codec: Codec, packed: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match codec {
        Codec::Plain => Box::new(packed),
        Codec::Zstd => {
            let mut decoder = zstd::Decoder::new(packed)?.single_frame();
            decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
            Box::new(decoder)
        }
        Codec::AppleLz4 => Box::new(lz4::Apple::new(packed)),
        Codec::Lz4Frame => Box::new(lz4::Frames::new(packed)),
    })
}
