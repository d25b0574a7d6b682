//! Layers come plain, gzip, zstd or xz; which of them their first bytes say, never their media type.

use std::io::{self, Read};

use crate::image::error::Error;

/// Largest window of a zstd frame, as a power of two: 32 MiB. It bounds the decoder's memory. `zstd -19` and
/// all builders of images stay below; `--ultra` and `--long` do not.
pub(super) const ZSTD_WINDOW_LOG_MAX: u32 = 25;

/// Most memory of an xz decoder, in bytes: `xz -8` wants 33 MiB, `xz -9` 65 MiB.
const XZ_MEMORY_MAX: u64 = 48 << 20;

/// Bytes that decide: the longest magic number of a compression.
pub(super) const MAGIC: usize = 6;

/// How bytes are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::image) enum Compression {
    None,
    Gzip,
    Zstd,
    Xz,
    /// Known and not read; its name.
    Other(&'static str),
}

/// Names a compression by the first bytes.
pub(in crate::image) fn sniff(head: &[u8]) -> Compression {
    // zstd has 16 magic numbers for frames that a decoder skips; such a frame may come first.
    let skippable = head.len() >= 4 && head[0] & 0xf0 == 0x50 && head[1..4] == [0x2a, 0x4d, 0x18];
    match head {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
        _ if skippable => Compression::Zstd,
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Compression::Xz,
        [b'B', b'Z', b'h', b'1'..=b'9', ..] => Compression::Other("bzip2"),
        [b'7', b'z', 0xbc, 0xaf, ..] => Compression::Other("7z"),
        [b'P', b'K', 3, 4, ..] => Compression::Other("zip"),
        [0x04, 0x22, 0x4d, 0x18, ..] => Compression::Other("lz4"),
        [b'b', b'v', b'4', b'1' | b'-', ..] => Compression::Other("Apple's lz4"),
        _ => Compression::None,
    }
}

/// A reader whose first bytes have been looked at and will be read again.
pub(in crate::image) struct Peeked<R> {
    head: Vec<u8>,
    given: usize,
    rest: R,
}

impl<R: Read> Peeked<R> {
    /// Looks at up to `length` bytes.
    pub(in crate::image) fn new(mut rest: R, length: usize) -> io::Result<Self> {
        let mut head = Vec::with_capacity(length);
        rest.by_ref().take(length as u64).read_to_end(&mut head)?;
        Ok(Self { head, given: 0, rest })
    }

    /// The first bytes; fewer than asked for only when there are no more.
    pub(in crate::image) fn head(&self) -> &[u8] {
        &self.head
    }
}

impl<R: Read> Read for Peeked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.given == self.head.len() {
            return self.rest.read(buffer);
        }
        let count = (&self.head[self.given..]).read(buffer)?;
        self.given += count;
        Ok(count)
    }
}

/// Unpacks `packed`, and says how it was packed. `image` is for errors.
pub(in crate::image) fn decompress<'a>(
    packed: impl Read + 'a,
    image: &str,
) -> Result<(Compression, Box<dyn Read + 'a>), Error> {
    let peeked = Peeked::new(packed, MAGIC).map_err(|error| unreadable(image, error))?;
    let compression = sniff(peeked.head());
    let unpacked: Box<dyn Read + 'a> = match compression {
        Compression::None => Box::new(peeked),
        Compression::Gzip => Box::new(flate2::read::MultiGzDecoder::new(peeked)),
        Compression::Zstd => {
            let mut decoder = zstd::Decoder::new(peeked).map_err(|error| unreadable(image, error))?;
            decoder
                .window_log_max(ZSTD_WINDOW_LOG_MAX)
                .map_err(|error| unreadable(image, error))?;
            Box::new(decoder)
        }
        Compression::Xz => {
            // Concatenated: `pixz` and `xz -T` write several streams, some mirrors join files.
            let stream =
                liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY_MAX, liblzma::stream::CONCATENATED)
                    .map_err(|error| unreadable(image, error.into()))?;
            Box::new(liblzma::read::XzDecoder::new_stream(peeked, stream))
        }
        Compression::Other(name) => {
            return Err(Error::Unsupported {
                image: image.to_owned(),
                reason: format!(
                    "it is compressed with {name}; gzip, zstd, xz and no compression can be read"
                ),
            });
        }
    };
    Ok((compression, unpacked))
}

/// A failed read of a layer: either an [`Error`] of ours that travelled as `io::Error`, or broken data.
pub(in crate::image) fn unreadable(image: &str, error: io::Error) -> Error {
    match error.downcast::<Error>() {
        Ok(ours) => ours,
        // zstd's own words for a frame beyond the window.
        Err(error) if error.to_string().contains("too much memory") => Error::Unsupported {
            image: image.to_owned(),
            reason: format!(
                "its zstd window is larger than {} MiB; compress it without --ultra and --long",
                (1_u64 << ZSTD_WINDOW_LOG_MAX) >> 20
            ),
        },
        Err(error) if is_memory_limit(&error) => Error::Unsupported {
            image: image.to_owned(),
            reason: format!(
                "its xz decoder wants more than {} MiB of memory; compress it with xz -8 or less",
                XZ_MEMORY_MAX >> 20
            ),
        },
        Err(error) => Error::Malformed {
            image: image.to_owned(),
            reason: format!("a layer cannot be unpacked ({error})"),
        },
    }
}

fn is_memory_limit(error: &io::Error) -> bool {
    let inner = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<liblzma::stream::Error>());
    inner == Some(&liblzma::stream::Error::MemLimit)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn xz(bytes: &[u8], preset: u32) -> Vec<u8> {
        let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), preset);
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn unpack(packed: &[u8]) -> Result<Vec<u8>, Error> {
        let (_, mut reader) = decompress(packed, "vm")?;
        let mut out = Vec::new();
        reader
            .read_to_end(&mut out)
            .map_err(|error| unreadable("vm", error))?;
        Ok(out)
    }

    #[test]
    fn every_packing_gives_the_same_bytes() {
        let bytes: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
        let twice = [gzip(&bytes[..1000]), gzip(&bytes[1000..])].concat();
        let skippable = [
            vec![0x5a, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 9],
            zstd::encode_all(&bytes[..], 1).unwrap(),
        ];
        for packed in [
            bytes.clone(),
            gzip(&bytes),
            twice,
            zstd::encode_all(&bytes[..], 3).unwrap(),
            skippable.concat(),
            xz(&bytes, 1),
            [xz(&bytes[..1000], 8), xz(&bytes[1000..], 0)].concat(),
        ] {
            assert!(unpack(&packed).unwrap() == bytes);
        }
        assert_eq!(unpack(b"").unwrap(), b"");
    }

    #[test]
    fn broken_and_foreign_packing_is_told_apart() {
        let cut = &gzip(&[7; 5000])[..30];
        assert!(matches!(unpack(cut), Err(Error::Malformed { .. })));
        let cut = &xz(&[7; 5000], 1)[..30];
        assert!(matches!(unpack(cut), Err(Error::Malformed { .. })));
        let error = unpack(b"BZh9").unwrap_err();
        assert!(error.to_string().contains("bzip2"), "{error}");
    }

    #[test]
    fn a_huge_window_is_refused_before_it_costs_memory() {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(27).unwrap();
        encoder.write_all(&[1; 300_000]).unwrap();
        let error = unpack(&encoder.finish().unwrap()).unwrap_err();
        assert!(error.to_string().contains("window"), "{error}");
    }

    #[test]
    fn an_xz_dictionary_beyond_the_limit_is_refused() {
        let error = unpack(&xz(&[1; 300_000], 9)).unwrap_err();
        assert!(error.to_string().contains("xz -8"), "{error}");
    }
}
