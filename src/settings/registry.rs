//! The tables about registries.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::{self, Deserializer};

use super::pattern::Pattern;

/// `[registry."HOST[:PORT]"]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RegistryTable {
    /// Registries that have its images under the same names; asked in this order before itself.
    pub mirrors: Vec<RegistryName>,
    /// Speak to it without TLS.
    pub plain_http: bool,
    /// A PEM file of certificate authorities to trust for it.
    pub ca_file: Option<PathBuf>,
    /// A PEM file with the certificate that we show it.
    pub client_cert: Option<PathBuf>,
    /// A PEM file with that certificate's key.
    pub client_key: Option<PathBuf>,
}

/// A registry as references name it: `host[:port]`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct RegistryName(pub String);

impl<'de> Deserialize<'de> for RegistryName {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._:[]".contains(&b);
        if text.is_empty() || !text.bytes().all(plain) {
            return Err(de::Error::custom(format!(
                "\"{text}\" is not a registry: write host or host:port"
            )));
        }
        Ok(Self(text))
    }
}

/// An entry of `images.private_registries`: a pattern for `host[:port]`, or a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrivateRegistry(String);

impl fmt::Display for PrivateRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for PrivateRegistry {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        match text.split_once('/') {
            Some((address, prefix)) => {
                let most = match address.parse() {
                    Ok(IpAddr::V4(_)) => 32,
                    Ok(IpAddr::V6(_)) => 128,
                    Err(_) => {
                        return Err(de::Error::custom(format!(
                            "\"{text}\" is neither host[:port] nor a network such as 10.0.0.0/8"
                        )));
                    }
                };
                if !prefix.parse::<u8>().is_ok_and(|prefix| prefix <= most) {
                    return Err(de::Error::custom(format!(
                        "\"{text}\": a network of this kind has a prefix of 0 to {most}"
                    )));
                }
            }
            None => drop(text.parse::<Pattern>().map_err(de::Error::custom)?),
        }
        Ok(Self(text))
    }
}
