//! Reads a tar, entry by entry, as strictly as a stranger's archive deserves.
//!
//! A reader of our own because the `tar` crate keeps whole extended headers in memory, however large they
//! claim to be, and hides where a header and its extension disagree. Its parsing of the single header is used.
//!
//! Source: POSIX.1-2017 `pax`, and the GNU extensions in GNU tar's manual.

use std::io::{self, Read};

use tar::{EntryType, Header};

use super::Error;
use crate::image::decompress::unreadable;
use crate::image::inspect::Hostility;

const BLOCK: usize = 512;

/// Largest extended header, in bytes. Real ones hold a path and some numbers.
const EXTENSION_MAX: u64 = 1 << 20;

/// Most extended headers in front of one entry: a local one, and GNU's long name and long link.
const EXTENSIONS_MAX: usize = 4;

/// The largest number that an octal size field holds: what some writers put there when the size is in the
/// extended header.
const OCTAL_MAX: u64 = 0o77_777_777_777;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Directory,
    Link,
    /// Devices and pipes.
    Special,
    /// A file with holes in GNU's encodings; its bytes are not its content.
    GnuSparse,
    Other,
}

/// One entry. Its bytes follow from [`Archive::body`].
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// In normal form: no leading `./`, no trailing slash; the archive's root is empty.
    pub(super) path: String,
    pub(super) kind: Kind,
    /// Bytes.
    pub(super) size: u64,
}

/// A tar that is being read.
pub(super) struct Archive<'a, R> {
    inner: R,
    image: &'a str,
    /// Bytes that may still be passed over.
    idle: u64,
    /// Bytes of the current entry that nobody has read, and of the padding behind it.
    body: u64,
    padding: u64,
}

/// Does a layer begin like a tar? `head` are its first 512 bytes.
pub(super) fn begins(head: &[u8], media_type: &str) -> bool {
    if head.iter().all(|&byte| byte == 0) {
        // An empty archive, or the first sector of an empty disk: only here the type decides.
        return media_type.contains("tar");
    }
    header(head).is_some()
}

/// A header whose checksum is right.
fn header(block: &[u8]) -> Option<&Header> {
    let block: &[u8; BLOCK] = block.try_into().ok()?;
    let header = Header::from_byte_slice(block);
    let sum: u32 = block
        .iter()
        .enumerate()
        .map(|(at, &byte)| {
            if (148..156).contains(&at) {
                u32::from(b' ')
            } else {
                u32::from(byte)
            }
        })
        .sum();
    (header.cksum().ok()? == sum).then_some(header)
}

/// What the extended headers in front of an entry say about it.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    size: Option<u64>,
    sparse: bool,
}

impl<'a, R: Read> Archive<'a, R> {
    /// `idle` is how many bytes may be passed over, being none that anybody reads.
    pub(super) fn new(inner: R, image: &'a str, idle: u64) -> Self {
        Self {
            idle,
            inner,
            image,
            body: 0,
            padding: 0,
        }
    }

    /// The bytes of the entry that [`Archive::next`] gave.
    pub(super) fn body(&mut self) -> impl Read + use<'_, 'a, R> {
        Body { archive: self }
    }

    /// The next entry; what is left of the last one is passed over.
    pub(super) fn next(&mut self) -> Result<Option<Entry>, Error> {
        let mut extended = Extended::default();
        for _ in 0..=EXTENSIONS_MAX {
            self.skip()?;
            let Some(block) = self.block()? else {
                return Ok(None);
            };
            let header = header(&block).ok_or_else(|| self.malformed("has a broken header"))?;
            let size = header
                .entry_size()
                .map_err(|_| self.malformed("has an entry without a size"))?;
            match header.entry_type() {
                EntryType::XHeader => {
                    let data = self.extension(size)?;
                    self.pax(&data, &mut extended)?;
                }
                EntryType::XGlobalHeader => {
                    let data = self.extension(size)?;
                    let mut global = Extended::default();
                    self.pax(&data, &mut global)?;
                    if global.path.is_some() || global.size.is_some() || global.sparse {
                        return Err(
                            self.hostile(Hostility::AmbiguousArchive("a global header changes every entry"))
                        );
                    }
                }
                EntryType::GNULongName => {
                    let mut name = self.extension(size)?;
                    name.truncate(name.iter().position(|&byte| byte == 0).unwrap_or(name.len()));
                    self.named(&mut extended, name)?;
                }
                // Where a link leads does not matter: none is followed.
                EntryType::GNULongLink => drop(self.extension(size)?),
                kind => return self.entry(header, kind, size, extended).map(Some),
            }
        }
        Err(self.hostile(Hostility::AmbiguousArchive(
            "an entry has too many extended headers",
        )))
    }

    /// Notes the name of the entry that follows.
    fn named(&self, extended: &mut Extended, name: Vec<u8>) -> Result<(), Error> {
        if extended.path.as_ref().is_some_and(|other| *other != name) {
            return Err(self.hostile(Hostility::AmbiguousArchive("an entry has two names")));
        }
        extended.path = Some(name);
        Ok(())
    }

    fn entry(
        &mut self,
        header: &Header,
        kind: EntryType,
        size: u64,
        extended: Extended,
    ) -> Result<Entry, Error> {
        let name = extended.path.unwrap_or_else(|| header.path_bytes().into_owned());
        let size = match extended.size {
            None => size,
            Some(true_size) if size == true_size || size == 0 => true_size,
            Some(true_size) if size == OCTAL_MAX && true_size > OCTAL_MAX => true_size,
            Some(_) => return Err(self.hostile(Hostility::AmbiguousArchive("an entry has two sizes"))),
        };
        let kind = match kind {
            EntryType::Regular if name.ends_with(b"/") => Kind::Directory,
            EntryType::Regular | EntryType::Continuous if extended.sparse => Kind::GnuSparse,
            EntryType::Regular | EntryType::Continuous => Kind::File,
            EntryType::Directory => Kind::Directory,
            EntryType::Link | EntryType::Symlink => Kind::Link,
            EntryType::Char | EntryType::Block | EntryType::Fifo => Kind::Special,
            EntryType::GNUSparse => Kind::GnuSparse,
            _ => Kind::Other,
        };
        if size > 0 && matches!(kind, Kind::Directory | Kind::Link | Kind::Special) {
            return Err(self.hostile(Hostility::AmbiguousArchive(
                "an entry that cannot have content has some",
            )));
        }
        self.body = size;
        self.padding = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
        Ok(Entry {
            path: self.normal(&name)?,
            kind,
            size,
        })
    }

    /// Brings a name into normal form.
    fn normal(&self, name: &[u8]) -> Result<String, Error> {
        let text = String::from_utf8_lossy(name);
        if name.contains(&0) {
            return Err(self.hostile(Hostility::AmbiguousArchive("a name contains a zero byte")));
        }
        if name.starts_with(b"/") {
            return Err(self.hostile(Hostility::AbsoluteName(text.into_owned())));
        }
        let mut path = String::new();
        for part in text.split('/').filter(|part| !matches!(*part, "" | ".")) {
            if part == ".." {
                return Err(self.hostile(Hostility::ParentName(text.into_owned())));
            }
            if !path.is_empty() {
                path.push('/');
            }
            path.push_str(part);
        }
        Ok(path)
    }

    /// Reads an extended header's content.
    fn extension(&mut self, size: u64) -> Result<Vec<u8>, Error> {
        if size > EXTENSION_MAX {
            return Err(Error::TooLarge {
                image: self.image.to_owned(),
                what: "extended tar header",
                size,
                limit: EXTENSION_MAX,
            });
        }
        let mut data = Vec::new();
        (&mut self.inner)
            .take(size)
            .read_to_end(&mut data)
            .map_err(|error| unreadable(self.image, error))?;
        if data.len() as u64 != size {
            return Err(self.malformed("ends in a header"));
        }
        self.charge(size)?;
        self.padding = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
        Ok(data)
    }

    /// Reads pax records: `LENGTH KEY=VALUE\n`, where the length counts the whole record.
    fn pax(&self, mut data: &[u8], extended: &mut Extended) -> Result<(), Error> {
        let broken = || self.malformed("has a broken extended header");
        while !data.is_empty() {
            // Some writers fill the block with zeros.
            if data.iter().all(|&byte| byte == 0) {
                break;
            }
            let space = data.iter().position(|&byte| byte == b' ').ok_or_else(broken)?;
            let length: usize = number(&data[..space])
                .and_then(|n| n.try_into().ok())
                .ok_or_else(broken)?;
            let record = data
                .get(space + 1..length)
                .and_then(|r| r.strip_suffix(b"\n"))
                .ok_or_else(broken)?;
            data = &data[length..];
            let equals = record.iter().position(|&byte| byte == b'=').ok_or_else(broken)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            match key {
                b"path" => self.named(extended, value.to_vec())?,
                b"size" => {
                    let size = number(value).ok_or_else(broken)?;
                    if extended.size.is_some_and(|other| other != size) {
                        return Err(self.hostile(Hostility::AmbiguousArchive("an entry has two sizes")));
                    }
                    extended.size = Some(size);
                }
                _ if key.starts_with(b"GNU.sparse.") => extended.sparse = true,
                _ => {}
            }
        }
        Ok(())
    }

    /// One block; none at the end of the archive.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, Error> {
        let Some(block) = self.read_block()? else {
            return Ok(None);
        };
        if block.iter().any(|&byte| byte != 0) {
            return Ok(Some(block));
        }
        // The end is two empty blocks. One alone, and readers disagree about what follows.
        match self.read_block()? {
            Some(second) if second.iter().any(|&byte| byte != 0) => {
                Err(self.hostile(Hostility::AmbiguousArchive("entries follow an empty block")))
            }
            _ => Ok(None),
        }
    }

    fn read_block(&mut self) -> Result<Option<[u8; BLOCK]>, Error> {
        self.charge(BLOCK as u64)?;
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.inner.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(self.malformed("ends in a header")),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(unreadable(self.image, error)),
            }
        }
        Ok(Some(block))
    }

    /// Passes over what is left of the current entry.
    fn skip(&mut self) -> Result<(), Error> {
        let left = self.body + self.padding;
        self.charge(left)?;
        let skipped = io::copy(&mut (&mut self.inner).take(left), &mut io::sink())
            .map_err(|error| unreadable(self.image, error))?;
        // An archive may end without the padding of its last entry, never inside of it.
        if skipped < self.body {
            return Err(self.malformed("ends in an entry"));
        }
        (self.body, self.padding) = (0, 0);
        Ok(())
    }

    /// Counts bytes that are read and are of no use: headers, padding and entries that nobody wants.
    fn charge(&mut self, bytes: u64) -> Result<(), Error> {
        let left = self.idle.checked_sub(bytes);
        self.idle = left.ok_or_else(|| self.hostile(Hostility::Bomb))?;
        Ok(())
    }

    fn malformed(&self, reason: &str) -> Error {
        Error::Malformed {
            image: self.image.to_owned(),
            reason: format!("an archive {reason}"),
        }
    }

    fn hostile(&self, class: Hostility) -> Error {
        Error::Hostile {
            image: self.image.to_owned(),
            class,
        }
    }
}

/// A decimal number, and nothing else.
fn number(text: &[u8]) -> Option<u64> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(text).ok().filter(|_| digits)?.parse().ok()
}

struct Body<'b, 'a, R> {
    archive: &'b mut Archive<'a, R>,
}

impl<R: Read> Read for Body<'_, '_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.archive.body)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let count = self.archive.inner.read(&mut buffer[..most])?;
        self.archive.body -= count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests;
