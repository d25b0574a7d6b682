//! A disk on a web server, with the list of sums that publishers of cloud images put beside it.
//!
//! Without a sum from the reference or from `SHA256SUMS` or `SHA512SUMS` in the same folder nothing is taken. What the whole room
//! is built on is SHA-256; a file of which only the SHA-512 is published is read once more before, to learn it, unless it was here
//! before with the same SHA-512.

use std::sync::OnceLock;

use openssl::sha::Sha512;
use reqwest::header::CONTENT_LENGTH;
use reqwest::{Method, StatusCode};

use super::super::digest::{Digest, Hasher};
use super::super::error::Error;
use super::super::manifest::Descriptor;
use super::super::single;
use super::endpoint::{Ask, Endpoint};
use super::{Registries, Session};

/// Largest list of sums, in bytes. Debian's have some KiB, Ubuntu's some hundred.
const SUMS_MAX: u64 = 1 << 20;

/// The lists that are looked for, the better one first.
const LISTS: [(&str, usize); 2] = [("SHA256SUMS", 64), ("SHA512SUMS", 128)];

/// Where a disk is.
#[derive(Debug)]
pub(in crate::image) struct Address<'a> {
    /// The reference, for errors.
    pub(in crate::image) image: &'a str,
    pub(in crate::image) plain: bool,
    pub(in crate::image) host: &'a str,
    /// With its leading slash.
    pub(in crate::image) path: &'a str,
}

/// What a disk must hash to.
#[derive(Debug, PartialEq, Eq)]
enum Sum {
    Sha256(Digest),
    Sha512(Vec<u8>),
}

/// A conversation about one file.
#[derive(Debug)]
pub(in crate::image) struct WebFile {
    pub(in crate::image) session: Session,
    path: String,
    expected: Option<Digest>,
    /// Bytes that were here under this name: their SHA-512, and their digest.
    known: Option<(String, Digest)>,
    /// The address of the list that names it.
    list: OnceLock<String>,
    /// What was found by reading the file.
    learned: OnceLock<String>,
}

impl WebFile {
    /// Begins a conversation; nothing is said yet.
    pub(in crate::image) fn open(
        address: &Address<'_>,
        expected: Option<Digest>,
        registries: &Registries,
    ) -> Result<Self, Error> {
        let Address {
            image,
            plain,
            host,
            path,
        } = *address;
        if plain && !registries.is_plain_http(host) {
            return Err(Error::Unsupported {
                image: image.to_owned(),
                reason: format!(
                    "{host} would be spoken to without TLS and is not listed in images.plain_http"
                ),
            });
        }
        let endpoint = Endpoint::web(image, plain, host, path, registries)?;
        Ok(Self {
            session: Session::with(image, endpoint),
            path: path.to_owned(),
            expected,
            known: None,
            list: OnceLock::new(),
            learned: OnceLock::new(),
        })
    }

    /// The same, by somebody who has seen bytes with this SHA-512, in hexadecimal digits, and this digest.
    pub(in crate::image) fn knowing(self, known: Option<(String, Digest)>) -> Self {
        Self { known, ..self }
    }

    /// The SHA-512 of the file, in hexadecimal digits, where it had to be read for its digest and both are right.
    pub(in crate::image) fn learned(&self) -> Option<&str> {
        self.learned.get().map(String::as_str)
    }

    /// Damage in the words that fit: what its bytes should be, a list beside the file says, or whoever wrote the digest behind its
    /// address and nobody else, so that every other try would end likewise.
    pub(in crate::image) fn told(&self, error: Error) -> Error {
        match error {
            Error::Corrupt {
                image,
                blob: Some(blob),
                reason,
            } => match self.list.get() {
                Some(list) => Error::NotAsListed {
                    image,
                    list: list.clone(),
                    sum: blob.to_string(),
                    reason,
                },
                None => Error::NotAsPinned { image, reason },
            },
            other => other,
        }
    }

    /// The digest of the file's bytes, and the manifest of an image that is this file.
    pub(in crate::image) async fn root(&self) -> Result<(Digest, Vec<u8>), Error> {
        let size = self.size().await?;
        let digest = match self.expected {
            Some(digest) => digest,
            None => match self.published().await? {
                Sum::Sha256(digest) => digest,
                Sum::Sha512(sum) => self.digest_of(size, &sum).await?,
            },
        };
        Ok((digest, single::manifest(self.name(), &digest, size)))
    }

    fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or_default()
    }

    async fn size(&self) -> Result<u64, Error> {
        let endpoint = self.session.endpoint();
        let ask = Ask::new(Method::HEAD, endpoint.url("")?);
        let length = endpoint
            .persistently(ask.url.path(), async || {
                let answer = endpoint.ask(&ask).await?;
                if answer.response.status() != StatusCode::OK {
                    return Err(endpoint.no_image(&answer));
                }
                Ok(answer.response.headers().get(CONTENT_LENGTH).cloned())
            })
            .await?;
        let length = length.and_then(|value| value.to_str().ok()?.parse().ok());
        length.ok_or_else(|| Error::Unsupported {
            image: self.session.image().to_owned(),
            reason: "its server does not say how large it is".to_owned(),
        })
    }

    /// The sum in one of the lists beside the file.
    async fn published(&self) -> Result<Sum, Error> {
        let folder = self.path.rsplit_once('/').map_or("", |(folder, _)| folder);
        let mut silent = Vec::new();
        for (list, digits) in LISTS {
            let path = format!("{folder}/{list}");
            let Some(text) = self.small(&path).await? else {
                continue;
            };
            let address = self.session.endpoint().at(&path)?.to_string();
            if let Some(sum) = listed(&text, self.name(), digits) {
                self.list.get_or_init(|| address);
                return Ok(sum);
            }
            silent.push(address);
        }
        let reason = if silent.is_empty() {
            "there is neither SHA256SUMS nor SHA512SUMS beside it".to_owned()
        } else {
            format!("no line of {} is for it", silent.join(" and "))
        };
        Err(Error::NotListed {
            image: self.session.image().to_owned(),
            reason,
        })
    }

    /// A short document; none where there is none.
    async fn small(&self, path: &str) -> Result<Option<String>, Error> {
        let endpoint = self.session.endpoint();
        let ask = Ask::new(Method::GET, endpoint.at(path)?);
        endpoint
            .persistently(ask.url.path(), async || {
                let answer = endpoint.ask(&ask).await?;
                match answer.response.status() {
                    StatusCode::OK => {}
                    StatusCode::NOT_FOUND => return Ok(None),
                    _ => return Err(endpoint.no_image(&answer)),
                }
                let bytes = endpoint.whole(answer.response, "list of sums", SUMS_MAX).await?;
                Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
            })
            .await
    }

    /// The digest of bytes with this SHA-512.
    async fn digest_of(&self, size: u64, sum: &[u8]) -> Result<Digest, Error> {
        let digits = hex::encode(sum);
        match &self.known {
            Some((known, digest)) if *known == digits => Ok(*digest),
            _ => {
                let digest = self.learn(size, sum).await?;
                // Once for each conversation: the list is asked for once.
                self.learned.get_or_init(|| digits);
                Ok(digest)
            }
        }
    }

    /// Reads the file, and compares it with its SHA-512.
    async fn learn(&self, size: u64, sum: &[u8]) -> Result<Digest, Error> {
        let file = Descriptor {
            media_type: String::new(),
            digest: Digest::of(sum),
            size,
            annotations: std::collections::BTreeMap::new(),
        };
        let (mut sha256, mut sha512) = (Hasher::default(), Sha512::new());
        let mut range = self.session.range(&file, 0..size);
        while let Some(bytes) = range.next().await? {
            sha256.update(&bytes);
            sha512.update(&bytes);
        }
        let found = sha512.finish();
        if found[..] != *sum {
            return Err(Error::NotAsListed {
                image: self.session.image().to_owned(),
                list: self.list.get().cloned().unwrap_or_default(),
                sum: hex::encode(sum),
                reason: format!("has the SHA-512 {}", hex::encode(found)),
            });
        }
        Ok(sha256.finish())
    }
}

/// Finds a file in a list of sums, as coreutils writes it (`HEX  NAME`, `HEX *NAME`) or as BSD does (`SHA256 (NAME) = HEX`). A file
/// that stands there with two sums is in nobody's honest list.
fn listed(text: &str, name: &str, digits: usize) -> Option<Sum> {
    let mut sums = text.lines().filter_map(|line| {
        let line = line.trim_end();
        let (sum, file) = match line.split_once(" (") {
            Some((_, rest)) => {
                let (file, sum) = rest.rsplit_once(") = ")?;
                (sum, file)
            }
            None => {
                let (sum, file) = line.split_once(' ')?;
                (sum, file.strip_prefix([' ', '*'])?)
            }
        };
        let file = file.strip_prefix("./").unwrap_or(file);
        (file == name && sum.len() == digits).then(|| sum.to_ascii_lowercase())
    });
    let sum = sums.next()?;
    if sums.any(|other| other != sum) {
        return None;
    }
    if digits == 64 {
        Digest::from_hex(&sum).ok().map(Sum::Sha256)
    } else {
        hex::decode(&sum).ok().map(Sum::Sha512)
    }
}

/// What a list says about a file is as long as it should be, whatever else stands there.
#[cfg(any(test, fuzzing))]
pub(in crate::image) fn fuzz(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    for (_, digits) in LISTS {
        match listed(&text, "disk.img", digits) {
            Some(Sum::Sha256(_)) => assert_eq!(digits, 64),
            Some(Sum::Sha512(sum)) => assert_eq!((digits, sum.len()), (128, 64)),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_is_found_however_the_list_is_written() {
        let (one, two) = (Digest::of(b"one"), Digest::of(b"two"));
        let list = format!(
            "{}  other.img\n{} *disk.img\r\n{}  ./far.img\nSHA256 (bsd.img) = {}\n",
            two.hex(),
            one.hex(),
            one.hex().to_uppercase(),
            two.hex()
        );
        for (name, digest) in [
            ("disk.img", Some(one)),
            ("far.img", Some(one)),
            ("bsd.img", Some(two)),
            ("isk.img", None),
        ] {
            assert_eq!(listed(&list, name, 64), digest.map(Sum::Sha256), "{name}");
            assert_eq!(listed(&list, name, 128), None);
        }
        let long = "ab".repeat(64);
        assert_eq!(
            listed(&format!("{long}  disk.img"), "disk.img", 128),
            Some(Sum::Sha512(vec![0xab; 64]))
        );
    }

    #[test]
    fn a_list_that_contradicts_itself_says_nothing() {
        let list = format!(
            "{}  d\n{}  d\n",
            Digest::of(b"one").hex(),
            Digest::of(b"two").hex()
        );
        assert_eq!(listed(&list, "d", 64), None);
        let same = format!("{0}  d\n{0}  d\n", Digest::of(b"one").hex());
        assert!(listed(&same, "d", 64).is_some());
        for text in ["", "\n", "d", "zz  d", " d", "SHA256 (d", "SHA256 (d) = "] {
            assert_eq!(listed(text, "d", 64), None, "{text}");
        }
        assert_eq!(listed(&format!("{}  d", "z".repeat(64)), "d", 64), None);
    }
}
