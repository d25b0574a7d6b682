//! `cannery.toml` and the defaults, as one checked value.
//!
//! The first file that exists is read, and only that one: `--config`, `$CANNERY_CONFIG`,
//! `~/.config/cannery/cannery.toml`, `/etc/cannery/cannery.toml`. The format is TOML 1.1; [`file`] lists the keys.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

pub mod console;
mod effective;
pub mod file;
mod pattern;
pub mod registry;

pub use console::{Access, ConsoleSettings, GitLabSettings};
pub use effective::{
    GuestSettings, ImageRules, ImageSettings, MachineSettings, Network, OwnNetwork, Settings,
};
pub use pattern::Pattern;

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file that was named, or the one that exists, cannot be read.
    #[error("cannot read the settings file {path}: {source}.")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The text is no TOML, or a key or a value is wrong.
    #[error("{path}:{line}:{column}: {message}.")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The column, from 1.
        column: usize,
        /// What is wrong.
        message: String,
    },
    /// Each value is right, and together they are not.
    #[error("{path}: {message}.")]
    Inconsistent {
        /// The file.
        path: PathBuf,
        /// Which keys, and why.
        message: String,
    },
}

/// Where the settings may come from; the environment's part is read by [`crate::cli`].
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// `--config FILE`
    pub argument: Option<PathBuf>,
    /// `$CANNERY_CONFIG`
    pub variable: Option<PathBuf>,
    /// `$XDG_CONFIG_HOME`, else `$HOME/.config`
    pub config_home: Option<PathBuf>,
    /// `$XDG_DATA_HOME`, else `$HOME/.local/share`
    pub data_home: Option<PathBuf>,
    /// `$HOME`
    pub home: Option<PathBuf>,
    /// `$REGISTRY_AUTH_FILE`, where podman and skopeo have their logins
    pub registry_auth_file: Option<PathBuf>,
    /// `$DOCKER_CONFIG`, the folder in which docker has them
    pub docker_config: Option<PathBuf>,
}

/// The operator's file for the whole host.
pub const SYSTEM_FILE: &str = "/etc/cannery/cannery.toml";

impl Sources {
    /// The file to read: one that was named, else the first that exists, else none.
    pub fn file(&self) -> Option<PathBuf> {
        let named = self.argument.clone().or_else(|| self.variable.clone());
        named.or_else(|| {
            let own = self
                .config_home
                .as_ref()
                .map(|d| d.join("cannery").join("cannery.toml"));
            own.into_iter()
                .chain([PathBuf::from(SYSTEM_FILE)])
                .find(|p| p.exists())
        })
    }

    /// Reads and checks the settings.
    pub fn load(&self) -> Result<Settings, Error> {
        let (path, table) = match self.file() {
            None => (PathBuf::from("(defaults)"), file::File::default()),
            Some(path) => {
                let text = std::fs::read_to_string(&path).map_err(|source| Error::Unreadable {
                    path: path.clone(),
                    source,
                })?;
                let table = parse(&text, &path)?;
                (path, table)
            }
        };
        Settings::resolve(table, &path, self)
    }
}

/// Parses the text of a settings file; `path` is only named in errors.
pub fn parse(text: &str, path: &Path) -> Result<file::File, Error> {
    toml::from_str(text).map_err(|e: toml::de::Error| {
        let at = e.span().map_or(0, |s| s.start).min(text.len());
        let before = &text.as_bytes()[..at];
        let line = 1 + before.iter().filter(|b| **b == b'\n').count();
        let column = 1 + before.iter().rev().take_while(|b| **b != b'\n').count();
        let message = e
            .message()
            .lines()
            .collect::<Vec<_>>()
            .join(" ")
            .replace('`', "\"");
        Error::Invalid {
            path: path.to_owned(),
            line,
            column,
            message: message.trim_end_matches('.').to_owned(),
        }
    })
}

/// The environment's variables that [`Sources`] is made of, looked up by `get`.
pub fn sources(argument: Option<PathBuf>, get: impl Fn(&str) -> Option<std::ffi::OsString>) -> Sources {
    let path = |name: &str| {
        get(name)
            .filter(|v| v.as_os_str() != OsStr::new(""))
            .map(PathBuf::from)
    };
    let home = path("HOME");
    let under = |variable, default| path(variable).or_else(|| home.as_ref().map(|h| h.join(default)));
    Sources {
        argument,
        variable: path("CANNERY_CONFIG"),
        config_home: under("XDG_CONFIG_HOME", ".config"),
        data_home: under("XDG_DATA_HOME", ".local/share"),
        home,
        registry_auth_file: path("REGISTRY_AUTH_FILE"),
        docker_config: path("DOCKER_CONFIG"),
    }
}

#[cfg(test)]
mod tests;
