//! Logins for registries, from docker's and podman's files or given one by one.
//!
//! Source of the format: docker's `config.json` and containers' `auth.json` (`auths`, `credHelpers`,
//! `credsStore`).

use std::collections::BTreeMap;

use base64::Engine as _;
use serde::Deserialize;

use super::super::error::quoted;
use super::helper;
use super::token::IDENTITY_TOKEN_USER;
use crate::secret::Secret;

/// Largest file of logins, in bytes.
pub(super) const CONFIG_MAX: usize = 1024 * 1024;

/// Docker Hub's names: the first is the one that references carry.
pub(super) const DOCKER_HUB: [&str; 3] = ["docker.io", "index.docker.io", "registry-1.docker.io"];

/// Why logins cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CredentialsError {
    /// Not the JSON that docker writes. Whose fault: whoever gave it.
    #[error("the registry logins given by {} cannot be read: {reason}", .origin.giver())]
    Unreadable {
        /// Who gave it.
        origin: Origin,
        /// What is wrong, without any of the content.
        reason: String,
    },
    /// A job's logins name a program that would run on the host. Author.
    #[error(
        "the registry logins given by the job name the credential helper {}; only plain `auths` are allowed there",
        quoted(.helper)
    )]
    HelperInJob {
        /// The helper's name.
        helper: String,
    },
    /// A helper of the host's own file failed. Operator.
    #[error("the credential helper docker-credential-{helper} failed for {registry}: {reason}")]
    Helper {
        /// The helper's name.
        helper: String,
        /// For which registry.
        registry: String,
        /// What happened.
        reason: String,
    },
    /// The registry does not know the account, or not with this password. Operator or author.
    #[error("{registry} refuses the login of {} given by {}", quoted(.user), .origin.giver())]
    Refused {
        /// The registry.
        registry: String,
        /// The account's name.
        user: String,
        /// Who gave it.
        origin: Origin,
    },
    /// The login is an identity token, and the registry has no token service that would take it. Operator or author.
    #[error("the login for {registry} is an identity token, and it asks for user and password")]
    IdentityToken {
        /// For which registry.
        registry: String,
        /// Who gave it.
        origin: Origin,
    },
}

impl CredentialsError {
    /// Who gave what cannot be used, and can mend it.
    pub fn origin(&self) -> Origin {
        match self {
            Self::Unreadable { origin, .. }
            | Self::Refused { origin, .. }
            | Self::IdentityToken { origin, .. } => *origin,
            Self::HelperInJob { .. } => Origin::JobGiven,
            Self::Helper { .. } => Origin::Host,
        }
    }
}

/// Who gave a file of logins, which decides what it may do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Origin {
    /// The job (`DOCKER_AUTH_CONFIG` and the like): plain `auths` only, nothing is ever run.
    #[default]
    JobGiven,
    /// A file of the host: helpers named in it may be run.
    Host,
}

impl Origin {
    fn giver(self) -> &'static str {
        match self {
            Self::JobGiven => "the job",
            Self::Host => "the host",
        }
    }
}

/// An account at a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    /// The account's name.
    pub user: String,
    /// Its password or token; an identity token where the user is `<token>`, as docker's helpers write it.
    pub password: Secret,
    /// Who gave it.
    pub origin: Origin,
}

/// All logins that may be used for one image, best first.
#[derive(Debug, Clone, Default)]
pub struct Credentials {
    files: Vec<File>,
}

/// One file's worth of logins.
#[derive(Debug, Clone, Default)]
struct File {
    /// `host[:port][/path]` → login.
    auths: BTreeMap<String, Login>,
    /// `host[:port]` → helper.
    helpers: BTreeMap<String, String>,
    /// The helper for all others.
    store: Option<String>,
}

impl Credentials {
    /// No login: everything is asked for anonymously.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// One login for one registry (`host[:port]`, or `host[:port]/path` for a part of it).
    #[must_use]
    pub fn basic(registry: &str, user: impl Into<String>, password: Secret) -> Self {
        let login = Login::new(user, password, Origin::JobGiven);
        let auths = BTreeMap::from([(key(registry), login)]);
        Self {
            files: vec![File {
                auths,
                ..File::default()
            }],
        }
    }

    /// Reads docker's `config.json` or podman's `auth.json`.
    ///
    /// # Errors
    /// [`CredentialsError::Unreadable`]; [`CredentialsError::HelperInJob`] when a job's logins name a helper.
    pub fn from_docker_config(json: &str, origin: Origin) -> Result<Self, CredentialsError> {
        let unreadable = |reason: &str| CredentialsError::Unreadable {
            origin,
            reason: reason.to_owned(),
        };
        if json.len() > CONFIG_MAX {
            return Err(unreadable("they are larger than 1 MiB"));
        }
        // serde's message could repeat a piece of a password; the place alone is safe.
        let config: DockerConfig = serde_json::from_str(json).map_err(|error| {
            unreadable(&format!(
                "no valid JSON of docker's form at line {} column {}",
                error.line(),
                error.column()
            ))
        })?;
        let store = config.creds_store.filter(|name| !name.is_empty());
        let helpers: BTreeMap<String, String> = config
            .cred_helpers
            .into_iter()
            .filter(|(_, name)| !name.is_empty())
            .collect();
        if origin == Origin::JobGiven
            && let Some(helper) = store.as_ref().or(helpers.values().next())
        {
            return Err(CredentialsError::HelperInJob {
                helper: helper.clone(),
            });
        }
        for name in store.iter().chain(helpers.values()) {
            if !name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
            {
                return Err(unreadable(
                    "a credential helper's name has other characters than a program's",
                ));
            }
        }
        let mut auths = BTreeMap::new();
        for (server, auth) in config.auths {
            if let Some(login) = auth.login(origin).map_err(unreadable)? {
                auths.insert(key(&server), login);
            }
        }
        let helpers = helpers
            .into_iter()
            .map(|(server, helper)| (key(&server), helper))
            .collect();
        Ok(Self {
            files: vec![File {
                auths,
                helpers,
                store,
            }],
        })
    }

    /// These logins, and `others` for what these do not know.
    #[must_use]
    pub fn or(mut self, others: Self) -> Self {
        self.files.extend(others.files);
        self
    }

    /// The login for a repository: the first file that knows one, in it the longest path that fits.
    pub(in crate::image) async fn find(
        &self,
        registry: &str,
        repository: &str,
    ) -> Result<Option<Login>, CredentialsError> {
        for file in &self.files {
            if let Some(helper) = names(registry).find_map(|name| file.helpers.get(name)) {
                if let Some(login) = helper::ask(helper, registry).await? {
                    return Ok(Some(login));
                }
                continue;
            }
            if let Some(login) = file.login(registry, repository) {
                return Ok(Some(login.clone()));
            }
            if let Some(helper) = &file.store
                && let Some(login) = helper::ask(helper, registry).await?
            {
                return Ok(Some(login));
            }
        }
        Ok(None)
    }
}

impl File {
    fn login(&self, registry: &str, repository: &str) -> Option<&Login> {
        names(registry).find_map(|name| {
            let mut path = format!("{name}/{repository}");
            loop {
                if let Some(login) = self.auths.get(&path) {
                    return Some(login);
                }
                path.truncate(path.rfind('/')?);
            }
        })
    }
}

/// The names under which a registry's login may stand.
pub(super) fn names(registry: &str) -> impl Iterator<Item = &str> {
    let hub = DOCKER_HUB.contains(&registry);
    DOCKER_HUB
        .into_iter()
        .filter(move |_| hub)
        .chain(std::iter::once(registry).filter(move |_| !hub))
}

/// Brings a key of a file into the form `host[:port][/path]`.
///
/// Docker writes Docker Hub as `https://index.docker.io/v1/`; with a scheme the path is the API's, without
/// one it is podman's namespace.
pub(super) fn key(server: &str) -> String {
    let bare = server
        .strip_prefix("https://")
        .or_else(|| server.strip_prefix("http://"));
    match bare {
        Some(bare) => bare.split('/').next().unwrap_or_default().to_owned(),
        None => {
            let server = server.trim_end_matches('/');
            server
                .strip_suffix("/v1")
                .or_else(|| server.strip_suffix("/v2"))
                .unwrap_or(server)
                .to_owned()
        }
    }
}

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, DockerAuth>,
    #[serde(default, rename = "credHelpers")]
    cred_helpers: BTreeMap<String, String>,
    #[serde(rename = "credsStore")]
    creds_store: Option<String>,
}

#[derive(Deserialize)]
struct DockerAuth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

impl DockerAuth {
    /// None for the empty entry that docker leaves beside a helper.
    fn login(self, origin: Origin) -> Result<Option<Login>, &'static str> {
        if let Some(token) = self.identitytoken.filter(|token| !token.is_empty()) {
            return Ok(Some(Login::new(IDENTITY_TOKEN_USER, Secret::new(token), origin)));
        }
        if let Some(auth) = self.auth.filter(|auth| !auth.is_empty()) {
            let engine = base64::engine::general_purpose::STANDARD;
            let pair = engine
                .decode(auth.trim())
                .ok()
                .and_then(|bytes| String::from_utf8(bytes).ok())
                .ok_or("an `auth` is not the base64 of user:password")?;
            let (user, password) = pair
                .trim_end_matches('\0')
                .split_once(':')
                .ok_or("an `auth` is not the base64 of user:password")?;
            return Ok(Some(Login::new(user, Secret::new(password), origin)));
        }
        Ok(self
            .username
            .filter(|user| !user.is_empty())
            .zip(self.password)
            .map(|(user, password)| Login::new(user, Secret::new(password), origin)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// user:sesame and other:open
    const AUTHS: &str = r#"{"auths": {
        "https://index.docker.io/v1/": {"auth": "aHViOnNlc2FtZQ=="},
        "r.example.com:5000": {"auth": "dXNlcjpzZXNhbWU="},
        "r.example.com:5000/team/vm": {"username": "other", "password": "open"},
        "http://plain.example.com": {"auth": "dXNlcjpzZXNhbWU="},
        "token.example.com": {"auth": "", "identitytoken": "abc"},
        "empty.example.com": {}
    }}"#;

    async fn user(credentials: &Credentials, registry: &str, repository: &str) -> Option<String> {
        credentials
            .find(registry, repository)
            .await
            .unwrap()
            .map(|login| login.user)
    }

    #[tokio::test]
    async fn the_longest_path_that_fits_wins() {
        let credentials = Credentials::from_docker_config(AUTHS, Origin::JobGiven).unwrap();
        for (registry, repository, expected) in [
            ("r.example.com:5000", "team", Some("user")),
            ("r.example.com:5000", "team/vm", Some("other")),
            ("r.example.com:5000", "team/vm/debian", Some("other")),
            ("r.example.com:5000", "team/vms", Some("user")),
            ("r.example.com", "team/vm", None),
            ("docker.io", "library/debian", Some("hub")),
            ("plain.example.com", "vm", Some("user")),
            ("empty.example.com", "vm", None),
        ] {
            assert_eq!(
                user(&credentials, registry, repository).await.as_deref(),
                expected,
                "{registry}/{repository}"
            );
        }
        let login = credentials
            .find("token.example.com", "vm")
            .await
            .unwrap()
            .unwrap();
        assert!(login.is_identity_token() && login.password.reveal() == "abc");
    }

    #[tokio::test]
    async fn the_first_that_knows_a_login_is_asked() {
        let job = Credentials::basic("r.example.com:5000", "job", Secret::new("x"));
        let both = job.or(Credentials::from_docker_config(AUTHS, Origin::Host).unwrap());
        assert_eq!(
            user(&both, "r.example.com:5000", "team/vm").await.as_deref(),
            Some("job")
        );
        assert_eq!(user(&both, "docker.io", "me/vm").await.as_deref(), Some("hub"));
    }

    #[test]
    fn a_helper_named_by_a_job_is_refused() {
        for json in [
            r#"{"auths": {}, "credsStore": "evil"}"#,
            r#"{"credHelpers": {"r.example.com": "evil"}}"#,
        ] {
            let error = Credentials::from_docker_config(json, Origin::JobGiven).unwrap_err();
            assert!(matches!(error, CredentialsError::HelperInJob { .. }), "{error}");
            assert!(Credentials::from_docker_config(json, Origin::Host).is_ok());
        }
        for json in [
            r#"{"credsStore": "../../bin/sh"}"#,
            r#"{"credHelpers": {"r": "a b"}}"#,
        ] {
            assert!(
                Credentials::from_docker_config(json, Origin::Host).is_err(),
                "{json}"
            );
        }
        assert!(Credentials::from_docker_config(r#"{"credsStore": ""}"#, Origin::JobGiven).is_ok());
    }

    #[test]
    fn no_output_shows_a_secret() {
        let credentials = Credentials::from_docker_config(AUTHS, Origin::JobGiven).unwrap();
        let shown = format!("{credentials:?}");
        assert!(!shown.contains("sesame") && !shown.contains("open\""), "{shown}");
        let broken = r#"{"auths": {"r": {"auth": "dXNlcjpzZXNhbWU="}, "sesame"}}"#;
        let error = Credentials::from_docker_config(broken, Origin::JobGiven)
            .unwrap_err()
            .to_string();
        assert!(!error.contains("sesame") && error.contains("column"), "{error}");
        let error = Credentials::from_docker_config(r#"{"auths": {"r": {"auth": "sesame"}}}"#, Origin::Host)
            .unwrap_err()
            .to_string();
        assert!(
            !error.contains("sesame") && error.contains("by the host"),
            "{error}"
        );
    }
}
