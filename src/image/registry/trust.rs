//! How the operator wants registries spoken to, and to which addresses a registry may send us.
//!
//! A registry names two kinds of addresses that we then talk to: where tokens are (its realm) and where its storage is
//! (redirects, upload locations). Whoever runs a registry could so have this host ask services that only it can reach. So
//! what a registry names must be public, unless the operator has listed the registry as private. What counts is the
//! address that is connected to, not the name: a name that means another address tomorrow passes no check of today.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use globset::{GlobBuilder, GlobMatcher};
use reqwest::Url;
use reqwest::dns::{Name, Resolve, Resolving};

use super::credentials::DOCKER_HUB;

/// How registries are spoken to. The default is TLS, the system's certificate authorities, no mirrors, and public
/// addresses only for what a registry names.
#[derive(Debug, Clone, Default)]
pub struct Registries {
    /// Registries (`host[:port]`) that are spoken to without TLS.
    pub plain_http: Vec<String>,
    /// PEM files of certificate authorities that are trusted for all registries, beside the system's.
    pub ca_files: Vec<PathBuf>,
    /// Registries that may name addresses that are not public, and networks that any registry may name.
    pub private: Vec<Private>,
    /// What is special about single registries, by `host[:port]`.
    pub each: BTreeMap<String, RegistryOptions>,
}

/// What is special about one registry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RegistryOptions {
    /// Registries (`host[:port]`) that have its images under the same names; asked in this order before itself.
    pub mirrors: Vec<String>,
    /// Speak to it without TLS.
    pub plain_http: bool,
    /// A PEM file of certificate authorities that are trusted for this registry.
    pub ca_file: Option<PathBuf>,
    /// A PEM file with the certificate that we show it, and those that lead to its authority.
    pub client_cert: Option<PathBuf>,
    /// A PEM file with that certificate's private key.
    pub client_key: Option<PathBuf>,
}

impl Registries {
    /// These registries are spoken to without TLS; all else is the default.
    #[must_use]
    pub fn without_tls(registries: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            plain_http: registries.into_iter().map(Into::into).collect(),
            ..Self::default()
        }
    }

    pub(super) fn options(&self, registry: &str) -> RegistryOptions {
        self.each.get(registry).cloned().unwrap_or_default()
    }

    pub(super) fn is_plain_http(&self, registry: &str) -> bool {
        self.plain_http.iter().any(|listed| listed == registry) || self.options(registry).plain_http
    }

    /// Whom may this registry name?
    pub(super) fn reach(&self, registry: &str, host: &str) -> Reach {
        let listed = self
            .private
            .iter()
            .any(|private| matches!(private, Private::Hosts { glob, .. } if glob.is_match(registry)));
        let networks = self.private.iter().filter_map(|private| match private {
            Private::Network { address, prefix } => Some((*address, *prefix)),
            Private::Hosts { .. } => None,
        });
        Reach {
            listed,
            // Who is spoken to without TLS is on a network that the operator knows.
            near: self.is_plain_http(registry),
            host: host.to_ascii_lowercase(),
            networks: networks.collect(),
        }
    }
}

/// An entry of the list of private registries.
#[derive(Debug, Clone)]
pub enum Private {
    /// Registries by name: a glob over `host[:port]`.
    Hosts {
        /// As it was written.
        text: String,
        /// The same, ready to compare.
        glob: GlobMatcher,
    },
    /// A network that any registry may name addresses of.
    Network {
        /// Any address of it.
        address: IpAddr,
        /// How many leading bits count.
        prefix: u8,
    },
}

impl FromStr for Private {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some((address, prefix)) = text.split_once('/') {
            let address: IpAddr = address
                .parse()
                .map_err(|_| format!("\"{text}\" is neither a network such as 10.0.0.0/8 nor host[:port]"))?;
            let most = if address.is_ipv4() { 32 } else { 128 };
            let prefix = prefix
                .parse()
                .ok()
                .filter(|prefix| *prefix <= most)
                .ok_or_else(|| format!("\"{text}\": a network of this kind has a prefix of 0 to {most}"))?;
            return Ok(Self::Network { address, prefix });
        }
        let glob = GlobBuilder::new(text)
            .literal_separator(true)
            .build()
            .map_err(|error| format!("\"{text}\" is not a pattern: {}", error.kind()))?;
        Ok(Self::Hosts {
            text: text.to_owned(),
            glob: glob.compile_matcher(),
        })
    }
}

/// What an address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// Anybody's on the internet.
    Public,
    /// Of a private network (RFC 1918, RFC 4193, carrier-grade NAT and other networks that are not routed).
    Private,
    /// This host itself.
    Loopback,
    /// What only this host's own link has: link-local addresses, the clouds' metadata services, multicast, and what is no
    /// address of anybody.
    Link,
}

/// Metadata services of clouds that are at addresses of other classes.
const METADATA: [IpAddr; 4] = [
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
];

/// Sorts an address (IANA's special-purpose address registries).
pub(super) fn class(address: IpAddr) -> Class {
    if METADATA.contains(&address) {
        return Class::Link;
    }
    match address {
        IpAddr::V4(v4) => class4(v4),
        IpAddr::V6(v6) => class6(v6),
    }
}

fn class4(address: Ipv4Addr) -> Class {
    let [a, b, c, _] = address.octets();
    match (a, b, c) {
        // What is sent to the unspecified address arrives here, too.
        (0 | 127, ..) => Class::Loopback,
        (224..=255, ..) | (169, 254, _) => Class::Link,
        (10, ..)
        | (172, 16..=31, _)
        | (192, 168, _)
        // Carrier-grade NAT.
        | (100, 64..=127, _)
        // Protocol assignments, documentation, benchmarks, the old 6to4 relay.
        | (192, 0, 0 | 2)
        | (192, 88, 99)
        | (198, 18 | 19, _)
        | (198, 51, 100)
        | (203, 0, 113) => Class::Private,
        _ => Class::Public,
    }
}

fn class6(address: Ipv6Addr) -> Class {
    let segments = address.segments();
    let embedded = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        class4(Ipv4Addr::new(a, b, c, d))
    };
    match segments {
        // ::, ::1 and the other remains of IPv4-compatible addresses.
        [0, 0, 0, 0, 0, 0, 0, _] => Class::Loopback,
        [0, 0, 0, 0, 0, 0xffff | 0, high, low] => embedded(high, low),
        // NAT64, also with a prefix of the network's own, and 6to4: what counts is the address inside.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => embedded(high, low),
        [0x64, 0xff9b, 1, ..] => Class::Private,
        [0x2002, high, low, ..] => embedded(high, low),
        [first, ..] if first & 0xffc0 == 0xfe80 || first & 0xff00 == 0xff00 => Class::Link,
        // Unique local, and site-local of old.
        [first, ..] if first & 0xfe00 == 0xfc00 || first & 0xffc0 == 0xfec0 => Class::Private,
        [0x2001, 0xdb8, ..] | [0x2001, 0, ..] | [0x100, 0, 0, 0, ..] => Class::Private,
        // Only this eighth is routed.
        [first, ..] if first & 0xe000 == 0x2000 => Class::Public,
        _ => Class::Private,
    }
}

/// The addresses that one registry may name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Reach {
    /// The registry is listed: it may name all.
    listed: bool,
    /// It is spoken to without TLS: it may name all but what only means a link or a cloud's metadata service.
    near: bool,
    /// The registry's own host, without a port.
    host: String,
    networks: Vec<(IpAddr, u8)>,
}

/// A registry named an address that it may not name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "it sends us to {host} at {address}, {}, and is not listed in images.private_registries",
    what(*.address)
)]
pub(super) struct OutOfReach {
    host: String,
    address: IpAddr,
}

fn what(address: IpAddr) -> &'static str {
    match class(address) {
        Class::Loopback | Class::Link => "an address that means this host or its own link",
        Class::Private | Class::Public => "a private address",
    }
}

impl Reach {
    /// May we connect to this address, that the host has?
    ///
    /// A registry's own name, on another port, may also have a private address: an on-premises registry and its token service
    /// are often one host, and whoever names the registry can reach that host already. It may not be this host.
    fn admits(&self, host: &str, address: IpAddr) -> bool {
        self.listed
            || match class(address) {
                Class::Public => true,
                Class::Private | Class::Loopback if self.near => true,
                Class::Private if host.eq_ignore_ascii_case(&self.host) => true,
                Class::Private | Class::Loopback | Class::Link => self
                    .networks
                    .iter()
                    .any(|(network, prefix)| contains(*network, *prefix, address)),
            }
    }

    /// Checks an address that stands in a URL as such: no name is looked up for it.
    pub(super) fn check_literal(&self, url: &Url) -> Result<(), OutOfReach> {
        // Whatever way an address was spelled, a URL has it in its usual form.
        let host = url.host_str().unwrap_or_default();
        let Ok(address) = host.trim_matches(['[', ']']).parse() else {
            return Ok(());
        };
        if self.admits(host, address) {
            return Ok(());
        }
        Err(OutOfReach {
            host: host.to_owned(),
            address,
        })
    }

    /// Of the addresses of a name, those that may be connected to.
    fn choose(&self, host: &str, found: Vec<SocketAddr>) -> Result<Vec<SocketAddr>, OutOfReach> {
        let (good, bad): (Vec<_>, Vec<_>) = found
            .into_iter()
            .partition(|address| self.admits(host, address.ip()));
        match bad.first() {
            Some(bad) if good.is_empty() => Err(OutOfReach {
                host: host.to_owned(),
                address: bad.ip(),
            }),
            _ => Ok(good),
        }
    }
}

fn contains(network: IpAddr, prefix: u8, address: IpAddr) -> bool {
    let (bits, network, address) = match (network, address) {
        (IpAddr::V4(network), IpAddr::V4(address)) => {
            (32, u128::from(u32::from(network)), u128::from(u32::from(address)))
        }
        (IpAddr::V6(network), IpAddr::V6(address)) => (128, u128::from(network), u128::from(address)),
        _ => return false,
    };
    let host_bits = bits - u32::from(prefix).min(bits);
    network.checked_shr(host_bits).unwrap_or(0) == address.checked_shr(host_bits).unwrap_or(0)
}

/// Looks names up for connections to what a registry named.
pub(super) struct GuardedResolver {
    pub(super) reach: Reach,
    /// Hosts that the operator has us go through: their own addresses are no registry's choice.
    proxies: Vec<String>,
}

/// The proxies that the HTTP client takes from the environment.
fn proxies() -> Vec<String> {
    let matcher = hyper_util::client::proxy::matcher::Matcher::from_env();
    ["http://registry.invalid/", "https://registry.invalid/"]
        .iter()
        .filter_map(|address| {
            let proxy = matcher.intercept(&address.parse().ok()?)?;
            proxy.uri().host().map(str::to_owned)
        })
        .collect()
}

impl fmt::Debug for GuardedResolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuardedResolver").finish_non_exhaustive()
    }
}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let reach = self.reach.clone();
        let is_proxy = self.proxies.iter().any(|proxy| proxy == name.as_str());
        Box::pin(async move {
            let host = name.as_str().to_owned();
            let found: Vec<SocketAddr> = tokio::net::lookup_host((host.as_str(), 0)).await?.collect();
            let chosen = if is_proxy {
                found
            } else {
                reach.choose(&host, found)?
            };
            Ok(Box::new(chosen.into_iter()) as reqwest::dns::Addrs)
        })
    }
}

/// Shares a resolver with a client.
pub(super) fn guarded(reach: &Reach) -> Arc<GuardedResolver> {
    Arc::new(GuardedResolver {
        reach: reach.clone(),
        proxies: proxies(),
    })
}

/// Where a registry really answers: Docker Hub's API is at another name than its images'.
pub(super) fn api_host(registry: &str) -> &str {
    if DOCKER_HUB.contains(&registry) {
        DOCKER_HUB[2]
    } else {
        registry
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_sorted() {
        for (text, expected) in [
            ("8.8.8.8", Class::Public),
            ("172.15.255.255", Class::Public),
            ("172.32.0.1", Class::Public),
            ("100.63.255.255", Class::Public),
            ("100.128.0.1", Class::Public),
            ("192.169.0.1", Class::Public),
            ("223.255.255.255", Class::Public),
            ("2606:4700::1", Class::Public),
            ("64:ff9b::8.8.8.8", Class::Public),
            ("::ffff:8.8.8.8", Class::Public),
            ("10.0.0.1", Class::Private),
            ("172.16.0.1", Class::Private),
            ("172.31.255.255", Class::Private),
            ("192.168.1.1", Class::Private),
            ("100.64.0.1", Class::Private),
            ("100.127.255.255", Class::Private),
            ("198.18.0.1", Class::Private),
            ("::ffff:10.0.0.1", Class::Private),
            ("::10.0.0.1", Class::Private),
            ("64:ff9b::192.168.0.1", Class::Private),
            ("64:ff9b:1::1", Class::Private),
            ("2002:a00:1::1", Class::Private),
            ("fd12:3456::1", Class::Private),
            ("fc00::1", Class::Private),
            ("fec0::1", Class::Private),
            ("2001:db8::1", Class::Private),
            ("4000::1", Class::Private),
            ("127.0.0.1", Class::Loopback),
            ("127.255.0.1", Class::Loopback),
            ("0.0.0.0", Class::Loopback),
            ("0.1.2.3", Class::Loopback),
            ("169.254.169.254", Class::Link),
            ("100.100.100.200", Class::Link),
            ("192.0.0.192", Class::Link),
            ("168.63.129.16", Class::Link),
            ("224.0.0.1", Class::Link),
            ("255.255.255.255", Class::Link),
            ("::", Class::Loopback),
            ("::1", Class::Loopback),
            ("::ffff:127.0.0.1", Class::Loopback),
            ("::ffff:169.254.169.254", Class::Link),
            ("64:ff9b::127.0.0.1", Class::Loopback),
            ("2002:7f00:1::1", Class::Loopback),
            ("fe80::1", Class::Link),
            ("fd00:ec2::254", Class::Link),
            ("ff02::1", Class::Link),
        ] {
            assert_eq!(class(text.parse().unwrap()), expected, "{text}");
        }
    }

    fn registries(private: &[&str]) -> Registries {
        Registries {
            plain_http: vec!["plain.corp:5000".to_owned()],
            private: private.iter().map(|text| text.parse().unwrap()).collect(),
            ..Registries::default()
        }
    }

    #[test]
    fn a_registry_reaches_what_its_listing_allows() {
        let listed = ["*.corp.example", "r.example:5000", "10.1.0.0/16", "127.0.0.1/32"];
        for (registry, host, address, expected) in [
            ("hub.example", "auth.example", "8.8.8.8", true),
            ("hub.example", "auth.example", "10.0.0.1", false),
            ("hub.example", "auth.example", "10.1.255.9", true),
            ("hub.example", "auth.example", "127.0.0.1", true),
            ("hub.example", "auth.example", "127.0.0.2", false),
            // Its own name may be private, but not this host.
            ("hub.example", "hub.example", "192.168.0.9", true),
            ("hub.example", "HUB.example", "192.168.0.9", true),
            ("hub.example", "hub.example", "169.254.169.254", false),
            ("hub.example", "hub.example", "::1", false),
            ("r.corp.example", "auth.example", "127.0.0.9", true),
            ("r.corp.example:5000", "auth.example", "192.168.0.9", false),
            ("r.example:5000", "auth.example", "192.168.0.9", true),
            ("r.example", "auth.example", "192.168.0.9", false),
            ("plain.corp:5000", "auth.example", "192.168.0.9", true),
            ("plain.corp:5000", "plain.corp", "127.0.0.1", true),
            ("plain.corp:5000", "auth.example", "::ffff:169.254.169.254", false),
            ("plain.corp:5000", "plain.corp", "fe80::1", false),
            ("plain.corp:5000", "auth.example", "100.100.100.200", false),
            ("r.corp.example", "auth.example", "169.254.169.254", true),
        ] {
            let own = registry.split(':').next().unwrap();
            let reach = registries(&listed).reach(registry, own);
            assert_eq!(
                reach.admits(host, address.parse().unwrap()),
                expected,
                "{registry} {host} {address}"
            );
        }
        let reach = registries(&[]).reach("hub.example", "hub.example");
        for (url, expected) in [
            ("https://127.0.0.1/t", false),
            ("https://[::1]:8080/t", false),
            ("https://2130706433/t", false),
            ("https://0x7f.1/t", false),
            ("https://[::ffff:169.254.169.254]/", false),
            ("https://1.1.1.1/", true),
        ] {
            let url: Url = url.parse().unwrap();
            assert_eq!(reach.check_literal(&url).is_ok(), expected, "{url}");
        }
    }

    #[test]
    fn of_a_names_addresses_the_allowed_ones_are_left() {
        let reach = registries(&[]).reach("hub.example", "hub.example");
        let addresses = |texts: &[&str]| -> Vec<SocketAddr> {
            texts
                .iter()
                .map(|text| SocketAddr::new(text.parse().unwrap(), 0))
                .collect()
        };
        let mixed = addresses(&["10.0.0.1", "8.8.8.8"]);
        assert_eq!(reach.choose("x", mixed).unwrap(), addresses(&["8.8.8.8"]));
        let error = reach
            .choose("x.example", addresses(&["169.254.169.254"]))
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "it sends us to x.example at 169.254.169.254, an address that means this host or its own link, and is not listed in images.private_registries"
        );
    }

    #[test]
    fn an_entry_is_a_network_or_a_pattern() {
        for good in [
            "10.0.0.0/8",
            "fd00::/8",
            "0.0.0.0/0",
            "r.example",
            "*.example:5000",
            "[::1]:5000",
        ] {
            assert!(good.parse::<Private>().is_ok(), "{good}");
        }
        for bad in ["10.0.0.0/33", "r.example/team", "::/129", "a[", "10.0.0.0/x"] {
            assert!(bad.parse::<Private>().is_err(), "{bad}");
        }
        let all: Vec<bool> = ["0.0.0.0/0", "::/0"]
            .iter()
            .map(|text| registries(&[text]).reach("a", "a"))
            .map(|reach| reach.admits("b", "127.0.0.1".parse().unwrap()))
            .collect();
        assert_eq!(all, [true, false]);
    }
}
