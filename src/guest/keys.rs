//! The keys of one job: one that logs in, one that proves who the guest is.
//!
//! Both are ed25519. The numbers come from OpenSSL, the text forms are those of OpenSSH.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use openssl::pkey::PKey;
use ssh_key::private::{Ed25519Keypair, KeypairData};

use crate::kill::{self, Point};
use crate::secret::Secret;

const USER_KEY_FILE: &str = "user_key";
const HOST_KEY_FILE: &str = "host_key";

/// Why keys could not be made, kept or read.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// OpenSSL could not make a key.
    #[error("no SSH key could be made: {0}")]
    Generate(String),
    /// A key's text is not an OpenSSH key.
    #[error("this is not an OpenSSH {0} key")]
    Malformed(&'static str),
    /// A key file could not be read or written.
    #[error("key file {path}: {source}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A public key as SSH names it: an algorithm and the bytes that go over the wire.
///
/// Its text form (`Display`, `FromStr`) is one line of an `authorized_keys` file without a comment.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey {
    algorithm: String,
    blob: Vec<u8>,
}

impl PublicKey {
    /// Takes a key as it comes over the wire: a length, the algorithm's name, the numbers (RFC 4253, 6.6).
    pub fn from_blob(blob: &[u8]) -> Result<Self, KeyError> {
        let malformed = KeyError::Malformed("public");
        let Some((length, rest)) = blob.split_first_chunk::<4>() else {
            return Err(malformed);
        };
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        match rest.get(..length).map(std::str::from_utf8) {
            Some(Ok(name)) if !name.is_empty() && name.bytes().all(|b| b.is_ascii_graphic()) => Ok(Self {
                algorithm: name.to_owned(),
                blob: blob.to_vec(),
            }),
            _ => Err(malformed),
        }
    }

    /// The algorithm's name, such as `ssh-ed25519`.
    pub fn algorithm(&self) -> &str {
        &self.algorithm
    }

    /// The key as it goes over the wire.
    pub fn blob(&self) -> &[u8] {
        &self.blob
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.algorithm, BASE64.encode(&self.blob))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(line: &str) -> Result<Self, KeyError> {
        let mut words = line.split_ascii_whitespace();
        let (Some(algorithm), Some(encoded)) = (words.next(), words.next()) else {
            return Err(KeyError::Malformed("public"));
        };
        let blob = BASE64
            .decode(encoded)
            .map_err(|_| KeyError::Malformed("public"))?;
        let key = Self::from_blob(&blob)?;
        if key.algorithm == algorithm {
            Ok(key)
        } else {
            Err(KeyError::Malformed("public"))
        }
    }
}

/// A private key with its public half. `Debug` shows the public one only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyPair {
    private: Secret,
    public: PublicKey,
}

impl KeyPair {
    /// Makes a new ed25519 key.
    pub fn generate() -> Result<Self, KeyError> {
        let failed = |e: openssl::error::ErrorStack| KeyError::Generate(e.to_string());
        let key = PKey::generate_ed25519().map_err(failed)?;
        let seed = key.raw_private_key().map_err(failed)?;
        let seed: [u8; 32] = seed
            .as_slice()
            .try_into()
            .map_err(|_| KeyError::Generate("an ed25519 key has 32 bytes".into()))?;
        let public = key.raw_public_key().map_err(failed)?;
        let mut both = [0; 64];
        both[..32].copy_from_slice(&seed);
        both[32..].copy_from_slice(
            public
                .get(..32)
                .ok_or_else(|| KeyError::Generate("an ed25519 key has 32 bytes".into()))?,
        );
        let of_ssh = |e: ssh_key::Error| KeyError::Generate(e.to_string());
        let pair = Ed25519Keypair::from_bytes(&both).map_err(of_ssh)?;
        let key = ssh_key::PrivateKey::new(KeypairData::from(pair), "cannery").map_err(of_ssh)?;
        let pem = key.to_openssh(ssh_key::LineEnding::LF).map_err(of_ssh)?;
        Self::from_openssh(&pem)
    }

    /// Reads a private key in OpenSSH's own text form, without a passphrase.
    pub fn from_openssh(pem: &str) -> Result<Self, KeyError> {
        let malformed = |_| KeyError::Malformed("private");
        let key = ssh_key::PrivateKey::from_openssh(pem).map_err(malformed)?;
        if key.is_encrypted() {
            return Err(KeyError::Malformed("unencrypted private"));
        }
        let blob = key.public_key().to_bytes().map_err(malformed)?;
        Ok(Self {
            private: Secret::new(pem),
            public: PublicKey::from_blob(&blob)?,
        })
    }

    /// The private half, as OpenSSH writes it (`-----BEGIN OPENSSH PRIVATE KEY-----`).
    pub fn private(&self) -> &Secret {
        &self.private
    }

    /// The public half.
    pub fn public(&self) -> &PublicKey {
        &self.public
    }
}

/// What one job needs: the key that it logs in with, and the guest's own host key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobKeys {
    /// Logs in to the guest.
    pub user: KeyPair,
    /// Is the guest's identity, brought in before its first connection.
    pub host: KeyPair,
}

impl JobKeys {
    /// Makes both.
    pub fn generate() -> Result<Self, KeyError> {
        Ok(Self {
            user: KeyPair::generate()?,
            host: KeyPair::generate()?,
        })
    }

    /// Keeps both in `folder`, readable by their owner only, and on disk when this returns.
    pub fn save(&self, folder: &Path) -> Result<(), KeyError> {
        write_private(&Self::user_key_file(folder), &self.user)?;
        kill::point(Point::UserKeyWritten);
        write_private(&folder.join(HOST_KEY_FILE), &self.host)
    }

    /// Where [`JobKeys::save`] keeps the private key that logs in.
    pub fn user_key_file(folder: &Path) -> PathBuf {
        folder.join(USER_KEY_FILE)
    }

    /// Reads what [`JobKeys::save`] has kept.
    pub fn load(folder: &Path) -> Result<Self, KeyError> {
        Ok(Self {
            user: read_private(&Self::user_key_file(folder))?,
            host: read_private(&folder.join(HOST_KEY_FILE))?,
        })
    }
}

fn write_private(path: &Path, key: &KeyPair) -> Result<(), KeyError> {
    let at = |source| KeyError::File {
        path: path.to_owned(),
        source,
    };
    // A new file each time: the mode of one that is already there would stay as it is.
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(at(e)),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(at)?;
    file.write_all(key.private.reveal().as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(at)
}

fn read_private(path: &Path) -> Result<KeyPair, KeyError> {
    let text = fs::read_to_string(path).map_err(|source| KeyError::File {
        path: path.to_owned(),
        source,
    })?;
    KeyPair::from_openssh(&text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn keys_come_back_from_disk_and_nobody_else_may_read_them() {
        let folder = tempfile::tempdir().unwrap();
        let keys = JobKeys::generate().unwrap();
        keys.save(folder.path()).unwrap();
        keys.save(folder.path()).unwrap();
        assert_eq!(JobKeys::load(folder.path()).unwrap(), keys);
        assert_ne!(keys.user, keys.host);
        for name in [USER_KEY_FILE, HOST_KEY_FILE] {
            let mode = fs::metadata(folder.path().join(name)).unwrap().permissions();
            assert_eq!(mode.mode() & 0o777, 0o600);
        }
    }

    #[test]
    fn a_missing_key_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = JobKeys::load(folder.path()).unwrap_err().to_string();
        assert!(error.contains("user_key"), "{error}");
    }

    #[test]
    fn public_keys_survive_their_text_form() {
        let key = KeyPair::generate().unwrap();
        let line = format!("{} some comment", key.public());
        assert_eq!(line.parse::<PublicKey>().unwrap(), *key.public());
        assert_eq!(key.public().algorithm(), "ssh-ed25519");
    }

    #[test]
    fn what_is_no_public_key_is_refused() {
        for line in [
            "",
            "ssh-ed25519",
            "ssh-ed25519 !!!",
            "ssh-ed25519 AAAA",
            "ssh-rsa AAAAC3NzaC1lZDI1NTE5AAAA",
        ] {
            assert!(line.parse::<PublicKey>().is_err(), "{line}");
        }
        assert!(PublicKey::from_blob(&[0xff; 20]).is_err());
    }

    #[test]
    fn debug_keeps_the_private_half() {
        let key = KeyPair::generate().unwrap();
        let shown = format!("{key:?}");
        assert!(
            !shown.contains("PRIVATE") && shown.contains("ssh-ed25519"),
            "{shown}"
        );
    }
}
