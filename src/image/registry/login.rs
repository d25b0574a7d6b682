//! Logs in to a registry and out of it: asks the registry, and keeps the login in docker's or podman's file.
//!
//! The file belongs to those programs, too: what we do not know in it stays, and where it names a credential helper for the
//! registry, that keeps the password.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use reqwest::header::ACCEPT;
use reqwest::{Method, StatusCode};
use serde_json::{Map, Value, json};

use super::super::error::Error;
use super::super::progress::{Progress, told_of_silence};
use super::credentials::{CONFIG_MAX, Login, Origin, key, names};
use super::endpoint::{Ask, Endpoint, Purpose};
use super::helper;
use super::trust::Registries;
use crate::secret::Secret;

/// Asks a registry whether it knows this account.
///
/// A registry that lets everybody in says yes to all.
///
/// # Errors
/// [`Error::LoginRefused`]; [`Error::Unreachable`].
pub async fn verify_login(
    registry: &str,
    user: &str,
    password: &Secret,
    registries: &Registries,
    progress: &dyn Progress,
) -> Result<(), Error> {
    let login = Login::new(user, password.clone(), Origin::Host);
    if knows(registry, login, registries, progress).await? {
        return Ok(());
    }
    Err(Error::LoginRefused {
        registry: registry.to_owned(),
        user: user.to_owned(),
    })
}

/// Does a registry know this account, with this password?
pub(in crate::image) async fn knows(
    registry: &str,
    login: Login,
    registries: &Registries,
    progress: &dyn Progress,
) -> Result<bool, Error> {
    let endpoint = Endpoint::new(
        registry,
        registry,
        "",
        Some(login),
        registries,
        Purpose::Read,
        false,
    )?;
    let ask = Ask::new(Method::GET, endpoint.root_url()?).with(ACCEPT, "*/*");
    let asked = endpoint.persistently(ask.url.path(), async || {
        let answer = endpoint.ask(&ask).await?;
        match answer.response.status() {
            status if status.is_success() => Ok(()),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(endpoint.denied().into()),
            status => Err(endpoint.refused(status, answer.response.headers(), "it")),
        }
    });
    match told_of_silence(progress, || endpoint.unanswered(), asked).await {
        Ok(()) => Ok(true),
        Err(Error::Denied { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Who keeps a login.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Keeper {
    /// The file itself.
    File,
    /// The credential helper with this name, which the file names.
    Helper(String),
}

/// Docker's `config.json` or podman's `auth.json`.
#[derive(Debug)]
pub struct AuthFile {
    path: PathBuf,
}

impl AuthFile {
    /// The file with this path, which need not exist.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// Keeps a login, in place of an older one for the same registry.
    ///
    /// # Errors
    /// The file cannot be read or written, or its helper fails.
    pub async fn keep(&self, registry: &str, user: &str, password: &Secret) -> Result<Keeper, Error> {
        let _held = self.lock()?;
        let mut config = self.read()?;
        let helper = helper_of(&config, registry).map(str::to_owned);
        let entry = match &helper {
            Some(helper) => {
                helper::store(helper, registry, user, password).await?;
                // Docker leaves this beside a helper, so that it is seen which registries there are.
                json!({})
            }
            None => {
                let pair = format!("{user}:{}", password.reveal());
                json!({"auth": base64::engine::general_purpose::STANDARD.encode(pair)})
            }
        };
        take_out(&mut config, registry);
        let auths = config.entry("auths").or_insert_with(|| json!({}));
        let auths = auths
            .as_object_mut()
            .ok_or_else(|| self.unusable("its `auths` is no object"))?;
        auths.insert(helper::server(registry).to_owned(), entry);
        self.write(&config)?;
        Ok(helper.map_or(Keeper::File, Keeper::Helper))
    }

    /// Forgets the login for a registry; false when there was none.
    ///
    /// # Errors
    /// The file cannot be read or written, or its helper fails.
    pub async fn forget(&self, registry: &str) -> Result<bool, Error> {
        if !self.path.exists() {
            return Ok(false);
        }
        let _held = self.lock()?;
        let mut config = self.read()?;
        let mut forgotten = take_out(&mut config, registry);
        if let Some(helper) = helper_of(&config, registry) {
            forgotten |= helper::erase(helper, registry).await?;
        }
        if forgotten {
            self.write(&config)?;
        }
        Ok(forgotten)
    }

    fn unusable(&self, reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        Error::storage(&self.path)(io::Error::other(reason))
    }

    /// Where the file is once links are followed: a link is the user's and stays one.
    fn real(&self) -> PathBuf {
        fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone())
    }

    /// Keeps other processes of ours out until the value is dropped.
    fn lock(&self) -> Result<File, Error> {
        let real = self.real();
        let folder = real.parent().unwrap_or(Path::new("/"));
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(Error::storage(folder))?;
        let folder_file = File::open(folder).map_err(Error::storage(folder))?;
        folder_file.lock().map_err(Error::storage(folder))?;
        Ok(folder_file)
    }

    fn read(&self) -> Result<Map<String, Value>, Error> {
        let mut text = Vec::new();
        match File::open(&self.path) {
            Ok(file) => file
                .take(CONFIG_MAX as u64 + 1)
                .read_to_end(&mut text)
                .map_err(Error::storage(&self.path))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Map::new()),
            Err(error) => return Err(Error::storage(&self.path)(error)),
        };
        if text.len() > CONFIG_MAX {
            return Err(self.unusable("it is larger than 1 MiB"));
        }
        if text.trim_ascii().is_empty() {
            return Ok(Map::new());
        }
        // serde's message could repeat a piece of a password; the place alone is safe.
        serde_json::from_slice(&text).map_err(|error| {
            self.unusable(format!(
                "it is no JSON object (line {} column {})",
                error.line(),
                error.column()
            ))
        })
    }

    fn write(&self, config: &Map<String, Value>) -> Result<(), Error> {
        let real = self.real();
        let scratch = real.with_extension(format!("{}.tmp", uuid::Uuid::new_v4().simple()));
        // Whoever may read it now may read it afterwards: a group shares logins by it.
        let before = fs::metadata(&real).ok();
        let written = || {
            let mut text = serde_json::to_vec_pretty(config)?;
            text.push(b'\n');
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&scratch)?;
            if let Some(before) = &before {
                // First the owner, whose change takes special bits away. Who may not give files away keeps their own.
                drop(std::os::unix::fs::fchown(
                    &file,
                    Some(before.uid()),
                    Some(before.gid()),
                ));
                let mine = file.metadata()?;
                let mode = if mine.gid() == before.gid() { 0o777 } else { 0o700 };
                file.set_permissions(fs::Permissions::from_mode(before.mode() & mode))?;
            }
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&scratch, &real)
        };
        written().map_err(|error| {
            // It may not have come into being.
            drop(fs::remove_file(&scratch));
            Error::storage(&real)(error)
        })
    }
}

/// The helper that a file names for a registry.
fn helper_of<'a>(config: &'a Map<String, Value>, registry: &str) -> Option<&'a str> {
    let own = config
        .get("credHelpers")
        .and_then(Value::as_object)
        .and_then(|helpers| {
            let server = helpers
                .keys()
                .find(|server| names(registry).any(|name| key(server) == name))?;
            helpers[server].as_str()
        });
    own.or_else(|| config.get("credsStore").and_then(Value::as_str))
        .filter(|name| !name.is_empty())
}

/// Takes a registry's own entries out, however they are spelled. Those for parts of it stay.
fn take_out(config: &mut Map<String, Value>, registry: &str) -> bool {
    let Some(auths) = config.get_mut("auths").and_then(Value::as_object_mut) else {
        return false;
    };
    let before = auths.len();
    auths.retain(|server, _| names(registry).all(|name| key(server) != name));
    auths.len() < before
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::super::credentials::Credentials;
    use super::*;

    async fn found(path: &Path, registry: &str) -> Option<(String, String)> {
        let text = fs::read_to_string(path).unwrap();
        let credentials = Credentials::from_docker_config(&text, Origin::Host).unwrap();
        let login = credentials.find(registry, "team/vm").await.unwrap()?;
        Some((login.user, login.password.reveal().to_owned()))
    }

    #[tokio::test]
    async fn what_is_kept_is_found_and_what_is_forgotten_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/auth.json");
        let file = AuthFile::new(&path);
        assert!(!file.forget("r.example:5000").await.unwrap());
        for (registry, user) in [
            ("r.example:5000", "one"),
            ("docker.io", "hub"),
            ("r.example:5000", "two"),
        ] {
            let keeper = file.keep(registry, user, &Secret::new("a:b")).await.unwrap();
            assert_eq!(keeper, Keeper::File);
        }
        let login = |user: &str| Some((user.to_owned(), "a:b".to_owned()));
        assert_eq!(found(&path, "r.example:5000").await, login("two"));
        assert_eq!(found(&path, "docker.io").await, login("hub"));
        assert!(
            fs::read_to_string(&path)
                .unwrap()
                .contains("https://index.docker.io/v1/")
        );
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        // A group that shares it may still read it.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(file.forget("docker.io").await.unwrap());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert!(!file.forget("docker.io").await.unwrap());
        assert_eq!(found(&path, "docker.io").await, None);
        assert_eq!(found(&path, "r.example:5000").await, login("two"));
        // Nothing else is left in the folder.
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn what_others_wrote_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("real.json");
        let text = r#"{"auths": {"https://r.example/v2/": {"auth": "b2xkOm9sZA=="}, "r.example/team": {"auth": "dGVhbTp0ZWFt"}}, "HttpHeaders": {"X": "y"}, "credHelpers": {"other": "pass"}}"#;
        fs::write(&path, text).unwrap();
        let link = dir.path().join("link.json");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let file = AuthFile::new(&link);
        file.keep("r.example", "new", &Secret::new("x")).await.unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        let config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(config["HttpHeaders"]["X"], "y");
        assert_eq!(config["credHelpers"]["other"], "pass");
        assert!(config["auths"].get("https://r.example/v2/").is_none());
        assert_eq!(config["auths"]["r.example/team"]["auth"], "dGVhbTp0ZWFt");
        for broken in ["[]", "{", r#"{"auths": []}"#] {
            fs::write(&path, broken).unwrap();
            assert!(
                file.keep("r.example", "new", &Secret::new("x")).await.is_err(),
                "{broken}"
            );
            assert_eq!(fs::read_to_string(&path).unwrap(), broken);
        }
    }

    #[test]
    fn a_registrys_own_helper_is_preferred() {
        let config = json!({"credHelpers": {"r.example": "own", "https://index.docker.io/v1/": "hub"}, "credsStore": "all"});
        let config = config.as_object().unwrap();
        assert_eq!(helper_of(config, "r.example"), Some("own"));
        assert_eq!(helper_of(config, "docker.io"), Some("hub"));
        assert_eq!(helper_of(config, "other.example"), Some("all"));
        assert_eq!(helper_of(&Map::new(), "r.example"), None);
    }
}
