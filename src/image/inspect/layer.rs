//! A file of a chain: of somebody on this host, or of an image whose files lie upon each other. Only there may a backing file be
//! named, and whoever asks decides what the name may lead to.

use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use super::qcow2::{EXTENSION_BACKING_FORMAT, EXTENSION_END, MAGIC, be32, be64};
use super::{DiskFormat, Error, Inspected, ReadAt, check, named};

/// Longest name of a backing file, in bytes; QEMU's own limit.
const NAME_MAX: u32 = 1023;

/// What the extension with the backing file's format is shown as: one that means nothing.
const MEANINGLESS: u32 = 0x6361_6e73;

/// Most header extensions that are looked through; QEMU writes four.
const EXTENSIONS_MAX: usize = 64;

/// The file under a layer, as the layer names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::image) struct Backing {
    /// As it is written there.
    pub(in crate::image) name: PathBuf,
    pub(in crate::image) format: Said,
}

/// What a layer says of the format of the file under it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::image) enum Said {
    Nothing,
    Format(DiskFormat),
    /// Another than qcow2 and raw.
    Foreign,
}

/// Checks one file of a chain as strictly as an image's disk, but for the backing file that it may name.
pub(in crate::image) fn layer(
    path: &Path,
    limit: u64,
    image: &str,
) -> Result<(Inspected, Option<Backing>), Error> {
    let file = File::open(path).map_err(Error::storage(path))?;
    let seen = layer_of(file).and_then(|(alone, backing)| Ok((check(&alone, limit)?, backing)));
    seen.map_err(|finding| named(finding, path, limit, image))
}

/// A file, seen without its backing file.
struct Alone<R> {
    file: R,
    /// Bytes that are shown as others: where, and which.
    shown: Vec<(u64, Vec<u8>)>,
}

impl<R: ReadAt> ReadAt for Alone<R> {
    fn length(&self) -> io::Result<u64> {
        self.file.length()
    }

    fn fill(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.fill(buffer, offset)?;
        for (at, bytes) in &self.shown {
            for (byte, place) in bytes.iter().zip(*at..) {
                if let Some(index) = place.checked_sub(offset)
                    && let Some(target) = usize::try_from(index).ok().and_then(|i| buffer.get_mut(i))
                {
                    *target = *byte;
                }
            }
        }
        Ok(())
    }
}

fn layer_of<R: ReadAt>(file: R) -> Result<(Alone<R>, Option<Backing>), super::Finding> {
    let length = file.length()?;
    let mut header = [0; 104];
    let present = usize::try_from(length.min(104)).unwrap_or_default();
    file.fill(&mut header[..present], 0)?;
    let (offset, size) = (be64(&header, 8), be32(&header, 16));
    let mut alone = Alone {
        file,
        shown: Vec::new(),
    };
    // Whatever is strange about the rest, the check finds.
    let names_one = header.starts_with(&MAGIC)
        && (1..=NAME_MAX).contains(&size)
        && offset
            .checked_add(u64::from(size))
            .is_some_and(|end| offset >= 72 && end <= length);
    if !names_one {
        return Ok((alone, None));
    }
    let mut name = vec![0; usize::try_from(size).unwrap_or_default()];
    alone.file.fill(&mut name, offset)?;
    let mut format = Said::Nothing;
    let mut at = match be32(&header, 4) {
        2 => 72,
        _ => u64::from(be32(&header, 100)),
    };
    for _ in 0..EXTENSIONS_MAX {
        let mut head = [0; 8];
        if at < 72 || at.saturating_add(8) > length {
            break;
        }
        alone.file.fill(&mut head, at)?;
        let size = u64::from(be32(&head, 4));
        match be32(&head, 0) {
            EXTENSION_END => break,
            EXTENSION_BACKING_FORMAT => {
                let mut text = [0; 5];
                let read = size.min(5).min(length - at - 8);
                let text = &mut text[..usize::try_from(read).unwrap_or_default()];
                alone.file.fill(text, at + 8)?;
                format = match (&*text, size) {
                    (b"qcow2", 5) => Said::Format(DiskFormat::Qcow2),
                    (b"raw", 3) => Said::Format(DiskFormat::Raw),
                    _ => Said::Foreign,
                };
                alone.shown.push((at, MEANINGLESS.to_be_bytes().to_vec()));
                break;
            }
            _ => at = at.saturating_add(8 + size.next_multiple_of(8)),
        }
    }
    alone.shown.push((8, vec![0; 12]));
    let name = std::ffi::OsString::from_vec(name).into();
    Ok((alone, Some(Backing { name, format })))
}

#[cfg(test)]
mod tests {
    use super::super::{Finding, Hostility};
    use super::*;

    /// 64 KiB of empty disk in clusters of 512 bytes, on a backing file.
    fn layer_bytes(name: &[u8], format: Option<&[u8]>) -> Vec<u8> {
        let mut file = vec![0; 512 * 4];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"QFI\xfb\0\0\0\x03");
        put(8, &300_u64.to_be_bytes());
        put(16, &u32::try_from(name.len()).unwrap().to_be_bytes());
        put(20, &9_u32.to_be_bytes());
        put(24, &65536_u64.to_be_bytes());
        put(36, &2_u32.to_be_bytes());
        put(40, &1536_u64.to_be_bytes());
        put(48, &512_u64.to_be_bytes());
        put(56, &1_u32.to_be_bytes());
        put(96, &4_u32.to_be_bytes());
        put(100, &104_u32.to_be_bytes());
        if let Some(format) = format {
            put(104, &EXTENSION_BACKING_FORMAT.to_be_bytes());
            put(108, &u32::try_from(format.len()).unwrap().to_be_bytes());
            put(112, format);
        }
        put(300, name);
        put(512, &1024_u64.to_be_bytes());
        file
    }

    fn seen(bytes: &[u8]) -> Result<(Inspected, Option<Backing>), Finding> {
        layer_of(bytes).and_then(|(alone, backing)| Ok((check(&alone, 1 << 30)?, backing)))
    }

    #[test]
    fn a_layers_backing_file_is_named_and_everything_else_checked() {
        for (format, expected) in [
            (Some(b"raw".as_slice()), Said::Format(DiskFormat::Raw)),
            (Some(b"qcow2"), Said::Format(DiskFormat::Qcow2)),
            (Some(b"vmdk"), Said::Foreign),
            (None, Said::Nothing),
        ] {
            let (inspected, backing) = seen(&layer_bytes(b"../base.img", format)).unwrap();
            assert_eq!(inspected.virtual_size, 65536);
            let backing = backing.unwrap();
            assert_eq!(backing.name, Path::new("../base.img"));
            assert_eq!(backing.format, expected);
        }
        let bytes = layer_bytes(b"base", None);
        assert!(
            matches!(
                check(&bytes.as_slice(), 1 << 30),
                Err(Finding::Hostile(Hostility::BackingFile))
            ),
            "without this door it is refused"
        );
        let mut bytes = layer_bytes(b"base", Some(b"raw"));
        bytes[79] = 4; // an external data file
        assert!(matches!(seen(&bytes), Err(Finding::Hostile(Hostility::DataFile))));
        let mut bytes = layer_bytes(b"base", None);
        bytes[9] = 0xff; // its name far outside of the file
        assert!(matches!(
            seen(&bytes),
            Err(Finding::Hostile(Hostility::BackingFile))
        ));
    }
}
