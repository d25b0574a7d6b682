//! What a guest is told about itself, as one value, and the carriers that bring it in at boot.
//!
//! * [`credentials`](Introduction::credentials): systemd's credentials (systemd ≥ 252), to be handed over by fw_cfg. Never by SMBIOS: what stands there stands
//!   in QEMU's command line too, for everyone on the host to see.
//! * [`write_seed`](Introduction::write_seed): a disk that cloud-init reads (data source NoCloud).
//!
//! Both can be given to the same guest: they say the same.

mod credentials;
mod seed;

pub use credentials::Credential;
pub use seed::SeedError;

use super::keys::{KeyPair, PublicKey};

/// Longest name of an account that Linux systems agree upon (`useradd`).
const LONGEST_USER: usize = 32;
/// Longest label of a host name (RFC 1123, 2.1).
const LONGEST_HOSTNAME: usize = 63;

/// Why something cannot be told to a guest.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IntroductionError {
    /// No account can have this name.
    #[error(
        "{0:?} cannot be a user's name: use letters, digits, '-', '_' and '.', beginning with a letter or '_'"
    )]
    User(String),
    /// No machine can have this name.
    #[error("{0:?} cannot be a host name: use letters, digits and '-', at most 63")]
    Hostname(String),
    /// A machine-id is 32 lowercase hexadecimal digits (machine-id(5)).
    #[error("{0:?} is no machine-id: that is 32 hexadecimal digits, not all zero")]
    MachineId(String),
}

/// What a guest is told about itself.
#[derive(Debug, Clone)]
pub struct Introduction {
    user: String,
    user_key: PublicKey,
    host_key: KeyPair,
    hostname: String,
    machine_id: String,
}

impl Introduction {
    /// Takes together what a guest is told. All texts are checked, since they end up in files of other languages.
    ///
    /// `user` is the account that the job runs as; its home is `/root` or `/home/USER`.
    pub fn new(
        user: &str,
        user_key: PublicKey,
        host_key: KeyPair,
        hostname: &str,
        machine_id: &str,
    ) -> Result<Self, IntroductionError> {
        if !is_user(user) {
            return Err(IntroductionError::User(user.to_owned()));
        }
        if !is_hostname(hostname) {
            return Err(IntroductionError::Hostname(hostname.to_owned()));
        }
        let hexadecimal = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if machine_id.len() != 32
            || !machine_id.bytes().all(hexadecimal)
            || machine_id.bytes().all(|b| b == b'0')
        {
            return Err(IntroductionError::MachineId(machine_id.to_owned()));
        }
        Ok(Self {
            user: user.to_owned(),
            user_key,
            host_key,
            hostname: hostname.to_owned(),
            machine_id: machine_id.to_owned(),
        })
    }
}

fn is_user(name: &str) -> bool {
    let mut bytes = name.bytes();
    name.len() <= LONGEST_USER
        && bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && bytes.all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

fn is_hostname(name: &str) -> bool {
    (1..=LONGEST_HOSTNAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) const MACHINE_ID: &str = "0123456789abcdef0123456789abcdef";

    pub(super) fn introduction(user: &str) -> Introduction {
        let key = KeyPair::generate().unwrap();
        let user_key = KeyPair::generate().unwrap().public().clone();
        Introduction::new(user, user_key, key, "job-1", MACHINE_ID).unwrap()
    }

    #[test]
    fn names_that_could_mean_more_are_refused() {
        let key = KeyPair::generate().unwrap();
        let new = |user: &str, host: &str, id: &str| {
            Introduction::new(user, key.public().clone(), key.clone(), host, id).map(|_| ())
        };
        assert_eq!(new("root", "job-1", MACHINE_ID), Ok(()));
        for user in ["", "../root", "a b", "a\nb", "-a", "a:b", "1a", &"a".repeat(33)] {
            assert!(
                matches!(new(user, "h", MACHINE_ID), Err(IntroductionError::User(_))),
                "{user}"
            );
        }
        for host in ["", "a.b", "-a", "a-", "a b", "a\n", &"a".repeat(64)] {
            assert!(
                matches!(new("u", host, MACHINE_ID), Err(IntroductionError::Hostname(_))),
                "{host}"
            );
        }
        for id in ["", "0123", &"0".repeat(32), &"A".repeat(32), &"g".repeat(32)] {
            assert!(
                matches!(new("u", "h", id), Err(IntroductionError::MachineId(_))),
                "{id}"
            );
        }
    }
}
