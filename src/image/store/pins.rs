//! Images that the operator wants kept.

use std::path::PathBuf;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::files::{entries, read_record, remove, serialised};
use super::{Store, VERSION};
use crate::image::digest::Digest;
use crate::image::error::{Error, quoted};
use crate::kill::{self, Point};

/// Longest name of a pin, in characters.
const NAME_MAX: usize = 64;

/// What a pin is called: why an image is kept.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PinName(String);

/// A text that is no name of a pin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} is no name of a pin: it is 1 to 64 letters, digits, dots, dashes and underscores", quoted(.0))]
pub struct InvalidPinName(String);

impl FromStr for PinName {
    type Err = InvalidPinName;

    fn from_str(text: &str) -> Result<Self, InvalidPinName> {
        let fine = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        if text.is_empty() || text.len() > NAME_MAX || !text.bytes().all(fine) {
            return Err(InvalidPinName(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl std::fmt::Display for PinName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

/// A file in `pins/`: `HEX@NAME.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Pin {
    version: u32,
    digest: Digest,
    name: String,
    since: Timestamp,
}

impl Store {
    /// Keeps an image until it is unpinned.
    ///
    /// # Errors
    /// [`Error::NotHere`] when the image is not here, or just being removed; [`Error::Storage`].
    pub fn pin(&self, digest: &Digest, name: &PinName) -> Result<(), Error> {
        // Nobody removes it before the pin is there to be seen.
        let Some(_lease) = self.lease(digest)? else {
            return Err(Error::NotHere { digest: *digest });
        };
        let path = self.pin_path(digest, name);
        let pin = Pin {
            version: VERSION,
            digest: *digest,
            name: name.0.clone(),
            since: Timestamp::now(),
        };
        self.write_durably(&path, &serialised(&pin, &path)?)?;
        kill::point(Point::PinKept);
        Ok(())
    }

    /// Takes one pin away, or all; which there were.
    ///
    /// # Errors
    /// [`Error::Storage`].
    pub fn unpin(&self, digest: &Digest, name: Option<&PinName>) -> Result<Vec<PinName>, Error> {
        let mut gone = Vec::new();
        for found in self.pins(digest)? {
            if name.is_none_or(|name| *name == found) {
                remove(&self.pin_path(digest, &found))?;
                kill::point(Point::PinRemoved);
                gone.push(found);
            }
        }
        Ok(gone)
    }

    /// The pins of an image, in order.
    ///
    /// # Errors
    /// [`Error::Storage`].
    pub fn pins(&self, digest: &Digest) -> Result<Vec<PinName>, Error> {
        let mut names = Vec::new();
        for entry in entries(&self.dir.join("pins"))? {
            let file = entry.file_name();
            let pinned = file.to_str().and_then(|name| {
                let (hex, name) = name.strip_suffix(".json")?.split_once('@')?;
                (hex == digest.hex()).then(|| name.parse::<PinName>().ok())?
            });
            // A damaged pin keeps its image as well: its name says enough.
            names.extend(pinned);
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Since when an image has been pinned by that name.
    ///
    /// # Errors
    /// [`Error::Storage`].
    pub fn pinned_since(&self, digest: &Digest, name: &PinName) -> Result<Option<Timestamp>, Error> {
        let pin: Option<Pin> = read_record(&self.pin_path(digest, name))?;
        Ok(pin.map(|pin| pin.since))
    }

    fn pin_path(&self, digest: &Digest, name: &PinName) -> PathBuf {
        self.dir
            .join("pins")
            .join(format!("{}@{name}.json", digest.hex()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_is_for_an_image_that_is_here_and_has_a_plain_name() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let digest = Digest::of(b"vm");
        let (release, team): (PinName, PinName) = ("release".parse().unwrap(), "team-a".parse().unwrap());
        assert!(matches!(store.pin(&digest, &release), Err(Error::NotHere { .. })));
        std::fs::create_dir(store.disk_dir(&digest)).unwrap();
        for name in [&team, &release, &release] {
            store.pin(&digest, name).unwrap();
        }
        assert_eq!(store.pins(&digest).unwrap(), [release.clone(), team.clone()]);
        assert!(store.pinned_since(&digest, &team).unwrap().is_some());
        assert_eq!(store.pins(&Digest::of(b"other")).unwrap(), []);
        assert_eq!(store.unpin(&digest, Some(&team)).unwrap(), [team]);
        assert_eq!(store.unpin(&digest, None).unwrap(), [release]);
        assert_eq!(store.unpin(&digest, None).unwrap(), []);
        for bad in ["", "a b", "../x", "a/b", &"x".repeat(65)] {
            assert!(bad.parse::<PinName>().is_err(), "{bad}");
        }
    }
}
