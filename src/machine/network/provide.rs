//! Making our network what its plan says, once.

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::super::libvirt::{self, Libvirt, NetworkState};
use super::super::xml::{self, Node};
use super::plan::{BadPlan, Shape};
use super::routes::{self, Conflict};
use super::{Difference, NetworkPlan, firewall};
use crate::kill::{self, Point};
use crate::record::{open_lock, open_state};

/// How long another process may take to make the network; it takes two seconds.
const LOCK_DEADLINE: Duration = Duration::from_secs(90);
/// Pause between two looks at the lock.
const LOCK_PAUSE: Duration = Duration::from_millis(100);

/// Pause before a network is started once more: interfaces come and go within milliseconds.
const START_PAUSE: Duration = Duration::from_millis(200);

/// The kernel's IPv4 routes.
const ROUTES: &str = "/proc/net/route";

/// Why there is no network. All are the operator's but [`Error::Libvirt`]'s weather.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The plan itself is wrong.
    #[error(transparent)]
    Plan(#[from] BadPlan),
    /// libvirt has a network of that name that is another one.
    #[error(
        "libvirt's network {name} is not the one in the settings: {}; `cannery network down` and `cannery network up`, run as root while no job runs, replace it",
        differences.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    )]
    Different {
        /// Its name.
        name: String,
        /// In what.
        differences: Vec<Difference>,
    },
    /// The subnet is in use on this host.
    #[error(
        "the subnet {subnet}/{prefix} of network {name} cannot be used: this host has a route to {}/{} on {}; choose another in the settings",
        conflict.destination, conflict.prefix, conflict.interface
    )]
    Conflict {
        /// Network.
        name: String,
        /// Its subnet.
        subnet: std::net::Ipv4Addr,
        /// The subnet's prefix.
        prefix: u8,
        /// What is in the way.
        conflict: Conflict,
    },
    /// The firewall is not in place.
    #[error(transparent)]
    Firewall(#[from] firewall::Error),
    /// libvirt did not do it.
    #[error(transparent)]
    Libvirt(#[from] libvirt::Error),
    /// A text of ours or libvirt's is no XML.
    #[error(transparent)]
    Xml(#[from] xml::Error),
    /// Another process makes the network and does not come to an end.
    #[error("another process has been making network {name} for {} s", LOCK_DEADLINE.as_secs())]
    Locked {
        /// Its name.
        name: String,
    },
    /// The lock cannot be used.
    #[error("{} cannot be used: {source}", path.display())]
    Lock {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Provided {
    /// The network was not running and now is.
    pub started: bool,
    /// The firewall's rules were not in place and now are.
    pub firewall_loaded: bool,
}

/// Sees to it that the planned network runs, behind its firewall. One that is as planned is not touched; one that is
/// missing is defined and started; one that differs is an error, since to change it would harm the jobs on it.
///
/// The network is persistent but not started with the host: its firewall does not outlive a boot, so the first caller
/// after one loads the firewall and only then starts the network.
///
/// # Errors
/// See [`Error`].
pub async fn provide(libvirt: &Libvirt, plan: &NetworkPlan, state_dir: &Path) -> Result<Provided, Error> {
    plan.check()?;
    let runs = |there: Option<NetworkState>| there.is_some_and(|network| network.active);
    if runs(present(libvirt, plan).await?) {
        let firewall_loaded = firewall::provide(plan, state_dir).await?;
        return Ok(Provided {
            started: false,
            firewall_loaded,
        });
    }
    let _held = lock(plan, state_dir).await?;
    let firewall_loaded = firewall::provide(plan, state_dir).await?;
    // Looked at once more, since another process may have made it before we had the lock.
    let there = present(libvirt, plan).await?;
    let defined = there.is_some();
    let started = !runs(there);
    if started {
        free(plan)?;
        if !defined {
            libvirt
                .define_network(&plan.name, xml::network::render(plan)?)
                .await?;
            kill::point(Point::NetworkDefined);
        }
        if let Err(error) = libvirt.start_network(&plan.name).await {
            // dnsmasq gives up where another interface of the host disappears while it looks at all of them.
            tracing::warn!("the network is started once more: {error}");
            tokio::time::sleep(START_PAUSE).await;
            libvirt.start_network(&plan.name).await?;
        }
        kill::point(Point::NetworkStarted);
    }
    Ok(Provided {
        started,
        firewall_loaded,
    })
}

/// Takes the network down, and its firewall after it. Not for while jobs run.
///
/// # Errors
/// See [`Error`].
pub async fn remove(libvirt: &Libvirt, plan: &NetworkPlan, state_dir: &Path) -> Result<(), Error> {
    plan.check()?;
    let _held = lock(plan, state_dir).await?;
    libvirt.remove_network(&plan.name).await?;
    Ok(firewall::remove(plan, state_dir).await?)
}

/// The network as libvirt has it, if it is as planned.
async fn present(libvirt: &Libvirt, plan: &NetworkPlan) -> Result<Option<NetworkState>, Error> {
    let Some(network) = libvirt.network(&plan.name).await? else {
        return Ok(None);
    };
    let wanted = Shape::of(&xml::network::network(plan));
    let differences = wanted.differences(&Shape::of(&Node::parse(&network.xml)?));
    if differences.is_empty() {
        return Ok(Some(network));
    }
    Err(Error::Different {
        name: plan.name.clone(),
        differences,
    })
}

fn free(plan: &NetworkPlan) -> Result<(), Error> {
    // A kernel without IPv4 has no such file, and no conflict either.
    let table = std::fs::read_to_string(ROUTES).unwrap_or_default();
    match routes::conflict(plan, &table) {
        None => Ok(()),
        Some(conflict) => Err(Error::Conflict {
            name: plan.name.clone(),
            subnet: plan.subnet,
            prefix: plan.prefix,
            conflict,
        }),
    }
}

/// Holds off other processes; the kernel lets go when the file is closed. The file stays: a lock file that is deleted
/// no longer locks.
async fn lock(plan: &NetworkPlan, state_dir: &Path) -> Result<File, Error> {
    let path = firewall::note_path(plan, state_dir).with_extension("lock");
    let failed = |source: io::Error| Error::Lock {
        path: path.clone(),
        source,
    };
    let made = open_state(state_dir)
        .map_err(io::Error::other)
        .and_then(|()| match path.parent() {
            Some(folder) => firewall::make_folder(folder),
            None => Ok(()),
        });
    let file = match made.and_then(|()| open_lock(&path)) {
        // Root has never been here, and so the firewall, which only root can load, is not there either.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Err(firewall::Error::NotLoaded(plan.name.clone()).into());
        }
        opened => opened.map_err(failed)?,
    };
    let start = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
            Err(TryLockError::WouldBlock) if start.elapsed() > LOCK_DEADLINE => {
                return Err(Error::Locked {
                    name: plan.name.clone(),
                });
            }
            Err(TryLockError::WouldBlock) => tokio::time::sleep(LOCK_PAUSE).await,
        }
    }
}
