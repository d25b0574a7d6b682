//! A registry on loopback that a bench has for itself.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::{Child, Command};

use super::cannot;
use crate::outcome::Failure;

/// Debian's package of the CNCF's distribution registry.
pub(super) const PROGRAM: &str = "docker-registry";
/// The account of one that wants a login: it guards nothing.
pub(super) const USER: &str = "bench";
pub(super) const PASSWORD: &str = "sesame";
/// What `htpasswd -Bbn` makes of it.
const HASH: &str = "$2y$05$R2GuqIQ8cXG1CE83prtDBumZUJ2Y73fH0pdXocHSFAXqP8BMcYZSu";
/// How long it may take to listen, and how often its log is looked at.
const START: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// It ends with this value; what it stored stays.
#[derive(Debug)]
pub(super) struct Registry {
    _child: Child,
    data: PathBuf,
    /// `127.0.0.1:PORT`
    pub(super) host: String,
}

impl Registry {
    /// Starts one with its files in `folder`. Port 0 is any that is free.
    pub(super) async fn start(folder: &Path, port: u16) -> Result<Self, Failure> {
        Self::start_with(folder, port, "").await
    }

    /// One that lets in nobody but [`USER`] with [`PASSWORD`], on any port that is free.
    pub(super) async fn start_private(folder: &Path) -> Result<Self, Failure> {
        let users = folder.join("users");
        std::fs::create_dir_all(folder).map_err(|e| cannot("make", folder, &e))?;
        std::fs::write(&users, format!("{USER}:{HASH}\n")).map_err(|e| cannot("write", &users, &e))?;
        let auth = format!(
            "auth: {{htpasswd: {{realm: bench, path: {}}}}}\n",
            users.display()
        );
        Self::start_with(folder, 0, &auth).await
    }

    async fn start_with(folder: &Path, port: u16, more: &str) -> Result<Self, Failure> {
        let data = folder.join("data");
        let (log, config) = (folder.join("log"), folder.join("config.yml"));
        let text = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"127.0.0.1:{port}\"}}\n{more}",
            data.display()
        );
        std::fs::create_dir_all(folder).map_err(|e| cannot("make", folder, &e))?;
        std::fs::write(&config, text).map_err(|e| cannot("write", &config, &e))?;
        let output = std::fs::File::create(&log).map_err(|e| cannot("write", &log, &e))?;
        let errors = output.try_clone().map_err(|e| cannot("write", &log, &e))?;
        let child = Command::new(PROGRAM)
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| {
                Failure::system(format!("cannot start {PROGRAM}: {e}"))
                    .hint("Install the package docker-registry")
            })?;
        let listening = async {
            loop {
                let text = std::fs::read_to_string(&log).unwrap_or_default();
                if let Some((_, rest)) = text.split_once("listening on ") {
                    return rest.split(['"', ',', '\n']).next().unwrap_or_default().to_owned();
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        let host = tokio::time::timeout(START, listening).await.map_err(|_| {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            let last = text.lines().last().unwrap_or("it says nothing");
            Failure::system(format!("{PROGRAM} does not listen on port {port}: {last}"))
        })?;
        Ok(Self {
            _child: child,
            data,
            host,
        })
    }

    /// Bytes of all that it holds, of which each blob is there once.
    pub(super) fn holds(&self) -> u64 {
        size(&self.data)
    }

    /// Has the system read all of it into memory: a pull is measured, and not the disk of this registry.
    pub(super) async fn warm(&self) -> Result<(), Failure> {
        let data = self.data.clone();
        let read = tokio::task::spawn_blocking(move || read(&data).map_err(|e| cannot("read", &data, &e)));
        read.await
            .map_err(|e| Failure::system(format!("the registry's files were not read: {e}")))?
    }
}

/// Reads all files below a folder, or one file, to their ends.
pub(super) fn read(path: &Path) -> io::Result<()> {
    if !path.is_dir() {
        return io::copy(&mut File::open(path)?, &mut io::sink()).map(drop);
    }
    std::fs::read_dir(path)?.try_for_each(|entry| read(&entry?.path()))
}

/// Bytes of all files below a folder.
fn size(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(data) if data.is_dir() => size(&entry.path()),
        Ok(data) => data.len(),
        Err(_) => 0,
    });
    sizes.sum()
}
