//! The identity of bytes: `sha256:` and 64 hexadecimal digits.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::digest::common::hazmat::SerializableState;
use sha2::{Digest as _, Sha256};

/// The SHA-256 of a manifest, a config or a layer.
///
/// The registries' grammar allows other algorithms; the store is keyed by this one alone, so that two names
/// of the same bytes cannot lie side by side.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

/// A text that is no digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a digest is `sha256:` and 64 lower-case hexadecimal digits")]
pub struct NoDigest;

impl Digest {
    /// The digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The 64 hexadecimal digits alone: the name of a file in the store.
    #[must_use]
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }

    /// The 32 bytes.
    pub(super) fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// A digest that is written down as 32 bytes.
    pub(super) fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Reads what [`Digest::hex`] writes.
    pub(super) fn from_hex(text: &str) -> Result<Self, NoDigest> {
        let lower = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let mut bytes = [0; 32];
        if !lower || hex::decode_to_slice(text, &mut bytes).is_err() {
            return Err(NoDigest);
        }
        Ok(Self(bytes))
    }
}

impl FromStr for Digest {
    type Err = NoDigest;

    fn from_str(text: &str) -> Result<Self, NoDigest> {
        Self::from_hex(text.strip_prefix("sha256:").ok_or(NoDigest)?)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// A digest in the making, fed piece by piece. Written down, it is its state in hexadecimal digits.
#[derive(Clone, Default)]
pub(super) struct Hasher(Sha256);

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hasher")
    }
}

impl Hasher {
    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(super) fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

impl Serialize for Hasher {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(SerializableState::serialize(&self.0)))
    }
}

impl<'de> Deserialize<'de> for Hasher {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = hex::decode(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)?;
        let state = bytes.as_slice().try_into().map_err(serde::de::Error::custom)?;
        Sha256::deserialize(&state)
            .map(Self)
            .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn a_digest_reads_what_it_writes() {
        let digest = Digest::of(b"");
        assert_eq!(digest.to_string(), EMPTY);
        assert_eq!(EMPTY.parse::<Digest>().unwrap(), digest);
        assert_eq!(serde_json::to_string(&digest).unwrap(), format!("\"{EMPTY}\""));
        assert_eq!(
            serde_json::from_str::<Digest>(&format!("\"{EMPTY}\"")).unwrap(),
            digest
        );
    }

    #[test]
    fn pieces_and_the_whole_have_one_digest() {
        let mut hasher = Hasher::default();
        hasher.update(b"one can");
        hasher.update(b" per job");
        assert_eq!(hasher.finish(), Digest::of(b"one can per job"));
    }

    #[test]
    fn a_hasher_goes_on_where_it_was_stopped() {
        let bytes = [7; 1000];
        for at in [0, 1, 64, 100, 999] {
            let mut hasher = Hasher::default();
            hasher.update(&bytes[..at]);
            let written = serde_json::to_string(&hasher).unwrap();
            let mut resumed: Hasher = serde_json::from_str(&written).unwrap();
            resumed.update(&bytes[at..]);
            assert_eq!(resumed.finish(), Digest::of(&bytes));
        }
        for text in ["\"00\"", "\"x\"", "\"\"", "7"] {
            assert!(serde_json::from_str::<Hasher>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_no_digest_is_refused() {
        let hex = &EMPTY[7..];
        for text in [
            "",
            "sha256:",
            hex,
            &format!("sha512:{hex}"),
            &format!("sha256:{}", &hex[1..]),
            &format!("sha256:{hex}0"),
            &format!("sha256:{}", hex.to_uppercase()),
            &format!("sha256:../{}", &hex[3..]),
        ] {
            assert_eq!(text.parse::<Digest>(), Err(NoDigest), "{text}");
        }
    }
}
