//! `[console]`: how people see and enter the machines of jobs.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::quantity::Span;

/// Who gets into a machine of which they know the address.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// Who has a ticket, or signs in where that is possible.
    #[default]
    Ticket,
    /// Also whoever reads the job log: it has a ticket, except where the job's ref is protected.
    Link,
}

/// `[console]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConsoleTable {
    /// The address of the console's pages, as browsers know it. With it the console is on.
    pub url: Option<String>,
    /// Who gets in.
    pub access: Access,
    /// Where `cannery serve` listens.
    pub listen: Option<SocketAddr>,
    /// The certificate's file: PEM, with those between it and its authority.
    pub certificate: Option<PathBuf>,
    /// The file of its private key, PEM.
    pub key: Option<PathBuf>,
    /// For how long a ticket may be redeemed.
    pub ticket_ttl: Option<Span>,
    /// How many sessions a ticket may have open at once.
    pub viewers: Option<u32>,
    /// How many sessions there may be at once, of all machines.
    pub max_sessions: Option<u32>,
    /// The folder with the terminal's program for browsers.
    pub assets: Option<PathBuf>,
    /// Where `cannery serve` takes SPICE viewers.
    pub spice_listen: Option<SocketAddr>,
    /// PEM file with the certificate's authority, for viewers' files.
    pub authority_file: Option<PathBuf>,
    /// The folder of spice-html5.
    pub spice_html5: Option<PathBuf>,
    /// Viewers that `cannery console` starts, the best first.
    pub programs: Option<Vec<String>>,
    /// The file with the secret that opens the API.
    pub api_token_file: Option<PathBuf>,
    /// The file that the audit log is appended to.
    pub audit_log: Option<PathBuf>,
    /// The GitLab that people sign in with.
    pub gitlab_url: Option<String>,
    /// The application's ID there.
    pub gitlab_application: Option<String>,
    /// The file with the application's secret, where it is a confidential one.
    pub gitlab_secret_file: Option<PathBuf>,
    /// PEM file with certificate authorities to trust for it beside the system's.
    pub gitlab_ca_file: Option<PathBuf>,
}

/// `[console]` with defaults, where it is on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsoleSettings {
    /// The host that browsers ask for, and the port where it is not 443: what stands in their `Host` header.
    pub authority: String,
    /// Who gets in.
    pub access: Access,
    /// Where `cannery serve` listens.
    pub listen: SocketAddr,
    /// The certificate's file.
    pub certificate: PathBuf,
    /// The file of its private key.
    pub key: PathBuf,
    /// For how long a ticket may be redeemed, where whoever mints it says nothing else.
    pub ticket_ttl: Duration,
    /// How many sessions a ticket may have open at once, where whoever mints it says nothing else.
    pub viewers: u32,
    /// How many sessions there may be at once.
    pub max_sessions: usize,
    /// The folder with the terminal's program for browsers.
    pub assets: PathBuf,
    /// Where `cannery serve` takes SPICE viewers, if it does.
    pub spice_listen: Option<SocketAddr>,
    /// PEM file with the certificate's authority, for viewers' files, where viewers do not know it.
    pub authority_file: Option<PathBuf>,
    /// The folder of spice-html5.
    pub spice_html5: PathBuf,
    /// The file with the secret that opens the API, if it is to be open.
    pub api_token_file: Option<PathBuf>,
    /// The file that the audit log is appended to, if there is to be one.
    pub audit_log: Option<PathBuf>,
    /// The GitLab that people sign in with, if they may.
    pub gitlab: Option<GitLabSettings>,
}

/// `gitlab_…` of `[console]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GitLabSettings {
    /// Its address, without a slash at the end. Jobs' coordinators are compared with it.
    pub url: String,
    /// The application's ID there.
    pub application: String,
    /// The file with the application's secret.
    pub secret_file: Option<PathBuf>,
    /// PEM file with certificate authorities to trust for it beside the system's.
    pub ca_file: Option<PathBuf>,
}

/// The port that browsers take for themselves, and any other program less easily.
const DEFAULT_LISTEN: ([u8; 4], u16) = ([0, 0, 0, 0], 8443);
/// Long enough to be handed to somebody who is called first, short enough to be worthless in an old chat.
const DEFAULT_TICKET_TTL: Duration = Duration::from_secs(3600);
/// One person, with two windows.
const DEFAULT_VIEWERS: u32 = 2;
/// Each is a connection or two to a guest; more people than a host has jobs.
const DEFAULT_MAX_SESSIONS: u32 = 100;
/// Where `contrib/console-assets` puts what it fetches.
const DEFAULT_ASSETS: &str = "/usr/local/share/cannery/console";

/// Where Debian's package has it.
const DEFAULT_SPICE_HTML5: &str = "/usr/share/spice-html5";
/// remote-viewer takes all that there is; virt-viewer asks libvirt itself.
const DEFAULT_PROGRAMS: [&str; 2] = ["remote-viewer", "virt-viewer"];

impl ConsoleSettings {
    /// The host of the pages, without a port.
    pub fn host(&self) -> &str {
        match self.authority.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => host,
            _ => &self.authority,
        }
    }

    /// The address of a job's page, for its job log. It holds no secret.
    pub fn page(&self, job: &crate::record::JobKey) -> String {
        format!("{}/jobs/{job}", self.origin())
    }

    /// What browsers call the pages' origin.
    pub fn origin(&self) -> String {
        format!("https://{}", self.authority)
    }
}

impl ConsoleTable {
    /// Viewers that are started on this host, the best first; also where there are no pages.
    pub(super) fn programs(&self) -> Vec<String> {
        let usual = || DEFAULT_PROGRAMS.map(str::to_owned).to_vec();
        self.programs.clone().unwrap_or_else(usual)
    }

    /// Fills in the defaults; nothing where the console is off.
    pub(super) fn resolve(self) -> Result<Option<ConsoleSettings>, String> {
        let Some(url) = self.url else { return Ok(None) };
        let authority = authority(&url).ok_or_else(|| {
            format!(
                "console.url \"{url}\" is not an address of pages; write for example \"https://ci-host.example.com:8443\", with no path"
            )
        })?;
        let (Some(certificate), Some(key)) = (self.certificate, self.key) else {
            return Err(
                "console.url needs console.certificate and console.key: the pages are served with TLS only"
                    .to_owned(),
            );
        };
        let gitlab = match (self.gitlab_url, self.gitlab_application) {
            (Some(url), Some(application)) if url.starts_with("https://") => Some(GitLabSettings {
                url: url.trim_end_matches('/').to_owned(),
                application,
                secret_file: self.gitlab_secret_file,
                ca_file: self.gitlab_ca_file,
            }),
            (None, None) => None,
            _ => {
                return Err("console.gitlab_url, which begins with https://, and console.gitlab_application belong together".to_owned());
            }
        };
        let (viewers, max_sessions) = (
            self.viewers.unwrap_or(DEFAULT_VIEWERS),
            self.max_sessions.unwrap_or(DEFAULT_MAX_SESSIONS),
        );
        if viewers == 0 || max_sessions == 0 {
            return Err("console.viewers and console.max_sessions must be at least 1".to_owned());
        }
        Ok(Some(ConsoleSettings {
            authority,
            access: self.access,
            listen: self.listen.unwrap_or_else(|| DEFAULT_LISTEN.into()),
            certificate,
            key,
            ticket_ttl: self.ticket_ttl.map_or(DEFAULT_TICKET_TTL, |span| span.0),
            viewers,
            max_sessions: usize::try_from(max_sessions).unwrap_or(usize::MAX),
            assets: self.assets.unwrap_or_else(|| DEFAULT_ASSETS.into()),
            spice_listen: self.spice_listen,
            authority_file: self.authority_file,
            spice_html5: self.spice_html5.unwrap_or_else(|| DEFAULT_SPICE_HTML5.into()),
            api_token_file: self.api_token_file,
            audit_log: self.audit_log,
            gitlab,
        }))
    }
}

/// Host and port of an address that has nothing else, as browsers write them.
fn authority(url: &str) -> Option<String> {
    let rest = url.strip_prefix("https://")?;
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = match rest.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (rest, None),
    };
    let name = |host: &str| {
        !host.is_empty()
            && host
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'.' || b == b'-')
    };
    let six = |host: &str| {
        let inner = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        inner.is_some_and(|inner| inner.parse::<std::net::Ipv6Addr>().is_ok())
    };
    let host = host.to_ascii_lowercase();
    if !name(&host) && !six(&host) {
        return None;
    }
    match port.map(str::parse::<u16>) {
        None | Some(Ok(443)) => Some(host),
        Some(Ok(port)) if port > 0 => Some(format!("{host}:{port}")),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_taken_as_browsers_write_it() {
        for (url, expected) in [
            ("https://ci.example.com:8443", Some("ci.example.com:8443")),
            ("https://CI.example.com/", Some("ci.example.com")),
            ("https://ci.example.com:443", Some("ci.example.com")),
            ("https://[::1]:8443/", Some("[::1]:8443")),
            ("https://[::1]", Some("[::1]")),
            ("http://ci.example.com", None),
            ("https://ci.example.com/console", None),
            ("https://user@ci.example.com", None),
            ("https://", None),
            ("https://ci.example.com:0", None),
            ("https://ci.example.com:x", None),
            ("https://::1", None),
        ] {
            assert_eq!(authority(url).as_deref(), expected, "{url}");
        }
    }

    #[test]
    fn the_console_is_off_without_an_address_and_needs_a_certificate_with_one() {
        let table = |text: &str| toml::from_str::<ConsoleTable>(text).unwrap().resolve();
        assert_eq!(table("listen = \"127.0.0.1:1\""), Ok(None));
        let url = "url = \"https://ci.example.com\"\n";
        assert!(table(url).unwrap_err().contains("console.certificate"));
        let whole = format!("{url}certificate = \"/c\"\nkey = \"/k\"\n");
        let settings = table(&whole).unwrap().unwrap();
        assert_eq!(settings.host(), "ci.example.com");
        let key = "aaaa1111-7-1".parse().unwrap();
        assert_eq!(settings.page(&key), "https://ci.example.com/jobs/aaaa1111-7-1");
        assert_eq!(settings.gitlab, None);
        assert_eq!(settings.access, Access::Ticket);
        let link = table(&format!("{whole}access = \"link\"")).unwrap().unwrap();
        assert_eq!(link.access, Access::Link);
        for wrong in [
            "viewers = 0",
            "gitlab_url = \"https://gitlab.example.com\"",
            "gitlab_url = \"http://gitlab.example.com\"\ngitlab_application = \"a\"",
        ] {
            assert!(table(&format!("{whole}{wrong}")).is_err(), "{wrong}");
        }
    }
}
