//! Public keys of those whose signatures count.

use std::path::{Path, PathBuf};

use openssl::hash::MessageDigest;
use openssl::pkey::{Id, PKey, Public};
use openssl::sign::Verifier;

use super::super::digest::Digest;
use super::super::error::Error;

/// Largest key file, in bytes. A PEM of RSA with 16384 bits has less than 3000.
const FILE_MAX: u64 = 64 * 1024;

/// Least size of an RSA key, in bits: what NIST SP 800-131A still allows.
const RSA_MIN: u32 = 2048;

/// A public key: ECDSA or RSA (PKCS #1 v1.5) over SHA-256, or Ed25519; what `cosign` makes and takes.
#[derive(Debug)]
pub(super) struct Key {
    key: PKey<Public>,
    /// Where it was read from.
    pub(super) file: PathBuf,
    /// Identifies the key, not the file it is in: SHA-256 of its DER form.
    pub(super) fingerprint: Digest,
}

impl Key {
    pub(super) fn read(path: &Path) -> Result<Self, Error> {
        let wrong = |reason: &str| Error::KeyFile {
            path: path.to_owned(),
            reason: reason.to_owned(),
        };
        let length = std::fs::metadata(path)
            .map_err(|error| wrong(&error.to_string()))?
            .len();
        if length > FILE_MAX {
            return Err(wrong("it is larger than 64 KiB"));
        }
        let pem = std::fs::read(path).map_err(|error| wrong(&error.to_string()))?;
        Self::parse(&pem, path).map_err(wrong)
    }

    /// Reads the PEM of a file. The error is a reason.
    pub(super) fn parse(pem: &[u8], file: &Path) -> Result<Self, &'static str> {
        const NO_KEY: &str =
            "it holds no public key in PEM (`cosign public-key` or `openssl pkey -pubout` writes one)";
        let key = PKey::public_key_from_pem(pem).map_err(|_| NO_KEY)?;
        match key.id() {
            Id::EC | Id::ED25519 => {}
            Id::RSA if key.bits() >= RSA_MIN => {}
            Id::RSA => return Err("its RSA key has less than 2048 bits"),
            _ => return Err("its key is none of ECDSA, RSA and Ed25519"),
        }
        let fingerprint = Digest::of(&key.public_key_to_der().map_err(|_| NO_KEY)?);
        Ok(Self {
            key,
            file: file.to_owned(),
            fingerprint,
        })
    }

    /// Did this key sign the message?
    pub(super) fn signed(&self, message: &[u8], signature: &[u8]) -> bool {
        let verify = || {
            let mut verifier = if self.key.id() == Id::ED25519 {
                Verifier::new_without_digest(&self.key)?
            } else {
                Verifier::new(MessageDigest::sha256(), &self.key)?
            };
            verifier.verify_oneshot(signature, message)
        };
        // An error is a signature of another form: not this key's.
        verify().unwrap_or(false)
    }
}
