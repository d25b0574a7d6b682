//! A picture of a machine's screen, as PNG whatever the hypervisor gives.
//!
//! QEMU gives a portable pixmap (PPM, `P6`) up to 7.0, and where libvirt does not ask it for PNG. PNG is written here: one image,
//! 8 bits a colour, no filter, as [PNG](https://www.w3.org/TR/png-3/) has it. No effects.

use std::io::Write;

use flate2::Compression;
use flate2::write::ZlibEncoder;

/// The most bytes that a picture may have as it comes: a screen of 4096 by 4096 and more than any video memory of ours shows.
pub const MOST_BYTES: usize = 64 << 20;
/// The longest side in pixels.
const LONGEST_SIDE: u32 = 16384;
/// With what a PNG begins.
const SIGNATURE: &[u8; 8] = b"\x89PNG\r\n\x1a\n";

/// Why a picture cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It is neither PNG nor PPM.
    #[error("the picture of the screen is neither PNG nor PPM")]
    Unknown,
    /// Its header and its content do not fit.
    #[error("the picture of the screen is damaged: {0}")]
    Damaged(&'static str),
}

/// The picture as PNG.
///
/// # Errors
/// It is of another format, or damaged.
pub fn png(picture: Vec<u8>) -> Result<Vec<u8>, Error> {
    if picture.starts_with(SIGNATURE) {
        return Ok(picture);
    }
    let pixmap = Pixmap::read(&picture)?;
    write_png(&pixmap).ok_or(Error::Damaged("it is too large"))
}

/// Red, green and blue of each pixel, a byte each, row by row from the top.
#[derive(Debug, PartialEq, Eq)]
struct Pixmap<'a> {
    width: u32,
    height: u32,
    pixels: &'a [u8],
}

impl<'a> Pixmap<'a> {
    /// Reads a PPM of one byte a colour (ppm(5)).
    fn read(bytes: &'a [u8]) -> Result<Self, Error> {
        let mut rest = bytes.strip_prefix(b"P6").ok_or(Error::Unknown)?;
        let mut next = || {
            let (number, left) = number(rest)?;
            rest = left;
            Some(number)
        };
        let (Some(width), Some(height), Some(most)) = (next(), next(), next()) else {
            return Err(Error::Damaged("its header has no size"));
        };
        let sides = 1..=LONGEST_SIDE;
        if !sides.contains(&width) || !sides.contains(&height) {
            return Err(Error::Damaged("its size cannot be"));
        }
        if most != 255 {
            return Err(Error::Damaged("its colours are not of one byte each"));
        }
        // One white space stands behind the last number, and the pixels behind that.
        let pixels = rest.get(1..).unwrap_or_default();
        let length = u64::from(width) * u64::from(height) * 3;
        let pixels = usize::try_from(length)
            .ok()
            .and_then(|length| pixels.get(..length))
            .ok_or(Error::Damaged("it is cut off"))?;
        Ok(Pixmap {
            width,
            height,
            pixels,
        })
    }
}

/// The next number of a PPM's header, and what follows its digits. Comments reach from `#` to the end of a line.
fn number(mut text: &[u8]) -> Option<(u32, &[u8])> {
    loop {
        match text.first()? {
            b'#' => text = &text[text.iter().position(|b| *b == b'\n')?..],
            b if b.is_ascii_whitespace() => text = &text[1..],
            _ => break,
        }
    }
    let digits = text.iter().take_while(|b| b.is_ascii_digit()).count();
    let number = std::str::from_utf8(&text[..digits]).ok()?.parse().ok()?;
    Some((number, &text[digits..]))
}

fn write_png(pixmap: &Pixmap<'_>) -> Option<Vec<u8>> {
    let mut header = Vec::new();
    header.extend(pixmap.width.to_be_bytes());
    header.extend(pixmap.height.to_be_bytes());
    // 8 bits a colour, three colours, and the only compression, filter method and order of rows that all readers know.
    header.extend([8, 2, 0, 0, 0]);
    let mut rows = ZlibEncoder::new(Vec::new(), Compression::default());
    for row in pixmap
        .pixels
        .chunks_exact(usize::try_from(pixmap.width).ok()? * 3)
    {
        // Each row says how it is filtered: not at all, which suits screens with text.
        rows.write_all(&[0]).ok()?;
        rows.write_all(row).ok()?;
    }
    let mut png = SIGNATURE.to_vec();
    chunk(&mut png, b"IHDR", &header)?;
    chunk(&mut png, b"IDAT", &rows.finish().ok()?)?;
    chunk(&mut png, b"IEND", &[])?;
    Some(png)
}

/// Adds a chunk: length, kind, content, and a checksum over the last two.
fn chunk(png: &mut Vec<u8>, kind: &[u8; 4], content: &[u8]) -> Option<()> {
    let mut sum = flate2::Crc::new();
    sum.update(kind);
    sum.update(content);
    png.extend(u32::try_from(content.len()).ok()?.to_be_bytes());
    png.extend(kind);
    png.extend(content);
    png.extend(sum.sum().to_be_bytes());
    Some(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use proptest::prelude::*;

    use super::*;

    /// Signature and header of a picture of two pixels, with the checksum that Python's zlib gives it.
    const BY_HAND: &str = "89504e470d0a1a0a0000000d49484452000000020000000108020000007b40e8dd";

    /// A reader of what is written here: width, height, pixels.
    fn read_png(png: &[u8]) -> (u32, u32, Vec<u8>) {
        assert!(png.starts_with(SIGNATURE));
        let (mut at, mut size, mut packed, mut ended) = (8, (0, 0), Vec::new(), false);
        let word = |at: usize| u32::from_be_bytes(png[at..at + 4].try_into().unwrap());
        while at < png.len() {
            let length = word(at) as usize;
            let (kind, content) = (&png[at + 4..at + 8], &png[at + 8..at + 8 + length]);
            match kind {
                b"IHDR" => {
                    size = (word(at + 8), word(at + 12));
                    assert_eq!(content[8..], [8, 2, 0, 0, 0]);
                }
                b"IDAT" => packed.extend(content),
                b"IEND" => ended = true,
                other => panic!("{other:?}"),
            }
            at += 12 + length;
        }
        assert!(ended);
        let mut rows = Vec::new();
        flate2::read::ZlibDecoder::new(&packed[..])
            .read_to_end(&mut rows)
            .unwrap();
        let pixels = rows
            .chunks(1 + size.0 as usize * 3)
            .flat_map(|row| {
                assert_eq!(row[0], 0);
                row[1..].to_vec()
            })
            .collect();
        (size.0, size.1, pixels)
    }

    #[test]
    fn the_header_and_its_checksum_are_as_others_write_them() {
        let made = png(b"P6\n2 1\n255\n\xff\0\0\0\0\xff".to_vec()).unwrap();
        assert_eq!(hex::encode(&made[..33]), BY_HAND);
        // The end, too, is the same in every PNG.
        assert_eq!(hex::encode(&made[made.len() - 12..]), "0000000049454e44ae426082");
        assert_eq!(read_png(&made), (2, 1, b"\xff\0\0\0\0\xff".to_vec()));
    }

    #[test]
    fn what_is_png_already_stays_as_it_is() {
        let made = png(b"P6 1 1 255 abc".to_vec()).unwrap();
        assert_eq!(png(made.clone()), Ok(made));
    }

    #[test]
    fn what_is_no_picture_is_refused() {
        let cases: [(&[u8], &str); 9] = [
            (b"", "neither"),
            (b"P5\n1 1\n255\nabc", "neither"),
            (b"P6", "no size"),
            (b"P6\n1 1\n", "no size"),
            (b"P6\n# only words", "no size"),
            (b"P6\n0 1\n255\n", "cannot be"),
            (b"P6\n99999 1\n255\n", "cannot be"),
            (b"P6\n1 1\n65535\nabcdef", "one byte"),
            (b"P6\n16384 16384\n255\nabc", "cut off"),
        ];
        for (picture, part) in cases {
            let error = png(picture.to_vec()).unwrap_err().to_string();
            assert!(error.contains(part), "{error} does not say {part}");
        }
    }

    #[test]
    fn comments_in_the_header_are_passed_over() {
        let made = png(b"P6 # a name\n1 # wide\n1\n255\nabc".to_vec()).unwrap();
        assert_eq!(read_png(&made), (1, 1, b"abc".to_vec()));
    }

    proptest! {
        #[test]
        fn every_pixel_arrives(width in 1u32..20, height in 1u32..20, seed: u8) {
            let count = width * height * 3;
            let pixels: Vec<u8> = (0..count).map(|at| (at * 31 % 251) as u8 ^ seed).collect();
            let mut picture = format!("P6\n{width} {height}\n255\n").into_bytes();
            picture.extend(&pixels);
            prop_assert_eq!(read_png(&png(picture).unwrap()), (width, height, pixels));
        }

        #[test]
        fn no_bytes_bring_the_reader_down(rest in proptest::collection::vec(any::<u8>(), 0..60)) {
            let mut picture = b"P6\n".to_vec();
            picture.extend(rest);
            let _ = png(picture);
        }
    }
}
