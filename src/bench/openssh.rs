//! The OpenSSH client, held to the very methods that our own connection uses: what a login and a script cost without us.

use std::fs::File;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use super::executor::timed;
use crate::guest::keys::PublicKey;
use crate::guest::ssh::Agreed;
use crate::outcome::Failure;

/// A way into a guest.
#[derive(Debug)]
pub(super) struct OpenSsh {
    arguments: Vec<String>,
}

/// Who is at the other end, and how each side proves who it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry<'a> {
    pub(super) address: SocketAddr,
    pub(super) user: &'a str,
    pub(super) host_key: &'a PublicKey,
    /// The file of the private key.
    pub(super) identity: &'a Path,
    /// What our own connection has agreed on with the guest.
    pub(super) agreed: &'a Agreed,
}

impl OpenSsh {
    /// Writes down in `scratch` which host key is the guest's, so that the client looks it up as we do.
    pub(super) fn new(entry: &Entry<'_>, scratch: &Path) -> Result<OpenSsh, Failure> {
        let known = scratch.join("known_hosts");
        std::fs::write(&known, known_host(entry.address, entry.host_key))
            .map_err(|e| Failure::system(format!("cannot write {}: {e}", known.display())))?;
        Ok(OpenSsh {
            arguments: arguments(entry, &known),
        })
    }

    /// A fresh connection, and a script that the guest's `sh` reads from it.
    pub(super) async fn script(&self, script: &Path) -> Result<Duration, Failure> {
        let input = File::open(script)
            .map_err(|e| Failure::system(format!("cannot read {}: {e}", script.display())))?;
        self.command(&["sh", "-s"], input.into()).await
    }

    /// A fresh connection, and a command that does nothing.
    pub(super) async fn login(&self) -> Result<Duration, Failure> {
        self.command(&["true"], Stdio::null()).await
    }

    async fn command(&self, words: &[&str], input: Stdio) -> Result<Duration, Failure> {
        let mut command = Command::new("ssh");
        command.args(&self.arguments).args(words).process_group(0);
        let (took, _) = timed(&mut command, input, "the OpenSSH client").await?;
        Ok(took)
    }
}

/// The client's arguments up to the command: no settings of the user's, no other connection's help, no other method.
fn arguments(entry: &Entry<'_>, known: &Path) -> Vec<String> {
    let Agreed {
        key_exchange,
        host_key,
        cipher,
        mac,
    } = entry.agreed;
    let mut options = vec![
        "BatchMode=yes".to_owned(),
        "LogLevel=ERROR".to_owned(),
        "ControlMaster=no".to_owned(),
        "ControlPath=none".to_owned(),
        "Compression=no".to_owned(),
        "StrictHostKeyChecking=yes".to_owned(),
        "UpdateHostKeys=no".to_owned(),
        "CheckHostIP=no".to_owned(),
        "GlobalKnownHostsFile=none".to_owned(),
        format!("UserKnownHostsFile={}", known.display()),
        "IdentitiesOnly=yes".to_owned(),
        "IdentityAgent=none".to_owned(),
        "PreferredAuthentications=publickey".to_owned(),
        format!("KexAlgorithms={key_exchange}"),
        format!("HostKeyAlgorithms={host_key}"),
        format!("Ciphers={cipher}"),
    ];
    // The others prove integrity themselves, and then the name is of no account.
    if cipher.ends_with("-ctr") || cipher.ends_with("-cbc") {
        options.push(format!("MACs={mac}"));
    }
    let mut arguments = vec!["-F".to_owned(), "none".to_owned(), "-T".to_owned()];
    for option in options {
        arguments.extend(["-o".to_owned(), option]);
    }
    arguments.extend([
        "-i".to_owned(),
        entry.identity.display().to_string(),
        "-p".to_owned(),
        entry.address.port().to_string(),
        format!("{}@{}", entry.user, entry.address.ip()),
    ]);
    arguments
}

/// A line of `known_hosts` (sshd(8)): a port other than 22 goes with the address in brackets.
fn known_host(address: SocketAddr, key: &PublicKey) -> String {
    match address.port() {
        22 => format!("{} {key}\n", address.ip()),
        port => format!("[{}]:{port} {key}\n", address.ip()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::keys::KeyPair;

    fn arguments_with(cipher: &str) -> Vec<String> {
        let key = KeyPair::generate().unwrap();
        let agreed = Agreed {
            key_exchange: "curve25519-sha256".into(),
            host_key: "ssh-ed25519".into(),
            cipher: cipher.into(),
            mac: "hmac-sha2-256".into(),
        };
        let entry = Entry {
            address: "192.0.2.1:22".parse().unwrap(),
            user: "ci",
            host_key: key.public(),
            identity: Path::new("/keys/user"),
            agreed: &agreed,
        };
        arguments(&entry, Path::new("/scratch/known"))
    }

    #[test]
    fn the_client_has_no_choice_of_methods() {
        let all = arguments_with("aes128-ctr");
        for option in [
            "KexAlgorithms=curve25519-sha256",
            "HostKeyAlgorithms=ssh-ed25519",
            "Ciphers=aes128-ctr",
            "MACs=hmac-sha2-256",
            "ControlMaster=no",
        ] {
            assert!(all.iter().any(|a| a == option), "{option}");
        }
        assert_eq!(all.last().unwrap(), "ci@192.0.2.1");
        let all = arguments_with("chacha20-poly1305@openssh.com");
        assert!(!all.iter().any(|a| a.starts_with("MACs=")));
    }

    #[test]
    fn a_known_host_on_another_port_is_in_brackets() {
        let key = KeyPair::generate().unwrap();
        let key = key.public();
        assert_eq!(
            known_host("192.0.2.1:22".parse().unwrap(), key),
            format!("192.0.2.1 {key}\n")
        );
        assert_eq!(
            known_host("192.0.2.1:2222".parse().unwrap(), key),
            format!("[192.0.2.1]:2222 {key}\n")
        );
    }
}
