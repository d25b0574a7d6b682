//! Pictures of screens, pixel by pixel.

use std::io::Read;
use std::process::Command;

use flate2::read::ZlibDecoder;

use super::host::Host;

/// With what a PNG begins.
const SIGNATURE: &[u8] = b"\x89PNG\r\n\x1a\n";

/// A picture, row by row from the top.
#[derive(Debug, PartialEq, Eq)]
pub struct Picture {
    pub width: usize,
    pub height: usize,
    /// Red, green and blue.
    pixels: Vec<[u8; 3]>,
}

impl Picture {
    /// What a job's machine shows now.
    pub fn of_screen(host: &Host, job: &str) -> Self {
        let file = host.folder().join("screen.png");
        host.expect(&["vm", "screenshot", job, "-o", file.to_str().unwrap()]);
        Self::read(&std::fs::read(&file).unwrap())
    }

    /// Reads a PNG of 8 bits a colour without a palette, which is what QEMU and cannery write.
    pub fn read(png: &[u8]) -> Self {
        let mut rest = png.strip_prefix(SIGNATURE).expect("a PNG");
        let (mut header, mut packed) = (Vec::new(), Vec::new());
        while let Some((length, after)) = rest.split_first_chunk() {
            let (name, after) = after.split_at(4);
            let (content, after) = after.split_at(number(*length));
            match name {
                b"IHDR" => header = content.to_vec(),
                b"IDAT" => packed.extend(content),
                _ => {}
            }
            // A checksum stands behind the content.
            rest = &after[4..];
        }
        let side = |at: usize| number(*header[at..].first_chunk().unwrap());
        let (width, height) = (side(0), side(4));
        let channels = match (header[8], header[9], header[12]) {
            (8, 2, 0) => 3,
            (8, 6, 0) => 4,
            other => panic!("depth, colours and interlace {other:?}"),
        };
        let mut lines = Vec::new();
        ZlibDecoder::new(packed.as_slice())
            .read_to_end(&mut lines)
            .unwrap();
        assert_eq!(lines.len(), height * (1 + width * channels));
        let mut above = vec![0; width * channels];
        let mut pixels = Vec::new();
        for line in lines.chunks_exact(1 + width * channels) {
            above = unfiltered(line[0], &line[1..], &above, channels);
            pixels.extend(above.chunks_exact(channels).map(|p| [p[0], p[1], p[2]]));
        }
        Self {
            width,
            height,
            pixels,
        }
    }

    /// How many pixels are not black.
    pub fn lit(&self) -> usize {
        self.pixels.iter().filter(|pixel| **pixel != [0; 3]).count()
    }

    /// How many pixels another picture of this size has in another colour.
    #[track_caller]
    pub fn differs_in(&self, other: &Self) -> usize {
        assert_eq!((self.width, self.height), (other.width, other.height));
        let pairs = self.pixels.iter().zip(&other.pixels);
        pairs.filter(|(one, two)| one != two).count()
    }
}

fn number(bytes: [u8; 4]) -> usize {
    usize::try_from(u32::from_be_bytes(bytes)).unwrap()
}

/// A line before it was filtered ([PNG](https://www.w3.org/TR/png-3/#9Filters), types 0 to 4).
fn unfiltered(filter: u8, line: &[u8], above: &[u8], channels: usize) -> Vec<u8> {
    let mut clear: Vec<u8> = Vec::new();
    for (at, byte) in line.iter().enumerate() {
        let before = |row: &[u8]| at.checked_sub(channels).map_or(0, |at| row[at]);
        let (left, up, corner) = (before(&clear), above[at], before(above));
        let expected = match filter {
            0 => 0,
            1 => left,
            2 => up,
            3 => left.midpoint(up),
            4 => nearest(left, up, corner),
            other => panic!("filter {other}"),
        };
        clear.push(byte.wrapping_add(expected));
    }
    clear
}

/// Which of the three is nearest to what they foretell together.
fn nearest(left: u8, up: u8, corner: u8) -> u8 {
    let foretold = i16::from(left) + i16::from(up) - i16::from(corner);
    // The first of those that are equally near, in this order.
    let all = [left, up, corner];
    all.into_iter()
        .min_by_key(|byte| (i16::from(*byte) - foretold).abs())
        .unwrap()
}

/// A file out of a zip archive.
pub fn unzipped(archive: &std::path::Path, name: &str) -> Vec<u8> {
    let output = Command::new("busybox")
        .args(["unzip", "-p"])
        .arg(archive)
        .arg(name)
        .output()
        .unwrap();
    assert!(
        output.status.success() && !output.stdout.is_empty(),
        "{name}: {output:?}"
    );
    output.stdout
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::ZlibEncoder;

    use super::*;

    fn piece(name: &[u8], content: &[u8]) -> Vec<u8> {
        let length = u32::try_from(content.len()).unwrap().to_be_bytes();
        [&length, name, content, &[0; 4]].concat()
    }

    #[test]
    fn a_picture_is_the_same_whatever_filters_its_lines_have() {
        // Two pixels a line: 10 20 30 and 40 50 60; the differences are worked out by hand from the specification.
        let lines = [
            [0, 10, 20, 30, 40, 50, 60],
            [1, 10, 20, 30, 30, 30, 30],
            [2, 0, 0, 0, 0, 0, 0],
            [3, 5, 10, 15, 15, 15, 15],
            [4, 0, 0, 0, 0, 0, 0],
        ];
        let mut packed = ZlibEncoder::new(Vec::new(), Compression::default());
        packed.write_all(lines.as_flattened()).unwrap();
        let png = [
            SIGNATURE.to_vec(),
            piece(b"IHDR", &[0, 0, 0, 2, 0, 0, 0, 5, 8, 2, 0, 0, 0]),
            piece(b"IDAT", &packed.finish().unwrap()),
            piece(b"IEND", &[]),
        ];
        let picture = Picture::read(&png.concat());
        assert_eq!((picture.width, picture.height), (2, 5));
        assert_eq!(picture.pixels, [[10, 20, 30], [40, 50, 60]].repeat(5));
    }
}
