//! May it start now, and on which slot?
//!
//! A lease is a file `slots/NETWORK/INDEX` that holds the job's key, made whole or not at all. How many
//! there are is the measure of how full the host is; whoever wants one more holds `slots/lock` while it counts.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::kill::{self, Point};
use crate::record::{JobKey, UNFINISHED, make_shared, open_lock, write_atomic};

/// Why no place can be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Every place is taken.
    #[error("all {most} machines that this host may run are in use.")]
    Full {
        /// How many there may be.
        most: u32,
    },
    /// The network has no slot left.
    #[error("all {slots} slots of the network {network} are in use.")]
    NoSlot {
        /// How many it has.
        slots: u32,
        /// Its name.
        network: String,
    },
    /// The folder cannot be read or written.
    #[error("cannot {action} {path}: {source}.")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// How much the host may hold.
#[derive(Debug, Clone, Copy)]
pub struct Capacity<'a> {
    /// Machines at once, over all networks.
    pub machines: u32,
    /// The network that this machine is to be on.
    pub network: &'a str,
    /// How many that network has room for.
    pub slots: u32,
}

/// A place that is taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// On which network.
    pub network: String,
    /// Which slot there, from 0.
    pub index: u32,
    /// By which job; none where the file is no lease.
    pub job: Option<JobKey>,
    path: PathBuf,
}

/// The folder of leases.
#[derive(Debug, Clone)]
pub struct Slots {
    dir: PathBuf,
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { action, path, source }
}

impl Slots {
    /// Opens the folder in a state folder, and makes it where it is missing.
    pub fn open(state_dir: &Path) -> Result<Self, Error> {
        let dir = state_dir.join("slots");
        make_shared(&dir).map_err(failed("create the folder", &dir))?;
        Ok(Slots { dir })
    }

    /// Leases the lowest free slot to a job, if the host may hold one machine more.
    pub fn admit(&self, capacity: &Capacity<'_>, job: &JobKey) -> Result<u32, Error> {
        let _lock = self.lock()?;
        let leases = self.leases()?;
        if let Some(own) = leases
            .iter()
            .find(|l| l.job.as_ref() == Some(job) && l.network == capacity.network)
        {
            return Ok(own.index);
        }
        if leases.len() >= capacity.machines as usize {
            return Err(Error::Full {
                most: capacity.machines,
            });
        }
        let taken = |index: &u32| {
            leases
                .iter()
                .any(|l| l.network == capacity.network && l.index == *index)
        };
        let index = (0..capacity.slots)
            .find(|i| !taken(i))
            .ok_or_else(|| Error::NoSlot {
                slots: capacity.slots,
                network: capacity.network.to_owned(),
            })?;
        let folder = self.dir.join(capacity.network);
        make_shared(&folder).map_err(failed("create the folder", &folder))?;
        let path = folder.join(index.to_string());
        write_atomic(&path, format!("{job}\n").as_bytes(), 0o664).map_err(failed("write", &path))?;
        kill::point(Point::SlotLeased);
        Ok(index)
    }

    /// All leases that there are.
    pub fn leases(&self) -> Result<Vec<Lease>, Error> {
        let mut leases = Vec::new();
        for network in fs::read_dir(&self.dir).map_err(failed("list", &self.dir))? {
            let network = network.map_err(failed("list", &self.dir))?;
            let folder = network.path();
            if !folder.is_dir() {
                continue;
            }
            for slot in fs::read_dir(&folder).map_err(failed("list", &folder))? {
                let path = slot.map_err(failed("list", &folder))?.path();
                let index = path
                    .file_name()
                    .and_then(|n| n.to_str())
                    .and_then(|n| n.parse().ok());
                let (Some(index), Some(network)) = (index, network.file_name().to_str().map(str::to_owned))
                else {
                    continue;
                };
                match fs::read_to_string(&path) {
                    Ok(text) => leases.push(Lease {
                        network,
                        index,
                        job: text.trim().parse().ok(),
                        path,
                    }),
                    // Freed since the folder was listed.
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    Err(e) => return Err(failed("read", &path)(e)),
                }
            }
        }
        Ok(leases)
    }

    /// Frees what a job leases; nothing is fine too.
    pub fn release(&self, job: &JobKey) -> Result<(), Error> {
        for lease in self.leases()?.into_iter().filter(|l| l.job.as_ref() == Some(job)) {
            self.free(&lease)?;
        }
        Ok(())
    }

    /// Frees one lease. One that is gone, or is another's by now, is left alone: then the answer is false.
    pub fn free(&self, lease: &Lease) -> Result<bool, Error> {
        let _lock = self.lock()?;
        let holder = match fs::read_to_string(&lease.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            text => text
                .map_err(failed("read", &lease.path))?
                .trim()
                .parse::<JobKey>()
                .ok(),
        };
        if holder != lease.job {
            return Ok(false);
        }
        fs::remove_file(&lease.path).map_err(failed("remove", &lease.path))?;
        kill::point(Point::SlotReleased);
        Ok(true)
    }

    /// Removes leases that were being written when their writers were killed.
    pub fn sweep(&self) -> Result<(), Error> {
        // Leases are written under the lock: what is unfinished now stays so.
        let _lock = self.lock()?;
        for network in fs::read_dir(&self.dir).map_err(failed("list", &self.dir))? {
            let folder = network.map_err(failed("list", &self.dir))?.path();
            if !folder.is_dir() {
                continue;
            }
            for file in fs::read_dir(&folder).map_err(failed("list", &folder))? {
                let file = file.map_err(failed("list", &folder))?;
                if file.file_name().to_string_lossy().ends_with(UNFINISHED) {
                    fs::remove_file(file.path()).map_err(failed("remove", &file.path()))?;
                    kill::point(Point::RemainSwept);
                }
            }
        }
        Ok(())
    }

    fn lock(&self) -> Result<File, Error> {
        let path = self.dir.join("lock");
        let file = open_lock(&path).map_err(failed("open", &path))?;
        // Whoever holds it counts a few files: it is free within milliseconds, and the kernel frees a dead one's.
        file.lock().map_err(failed("lock", &path))?;
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: Capacity<'_> = Capacity {
        machines: 2,
        network: "net",
        slots: 8,
    };

    fn key(id: u64) -> JobKey {
        JobKey::new("https://gitlab.example.com", id, 1)
    }

    #[test]
    fn places_are_given_lowest_first_and_again_when_they_are_free() {
        let state = tempfile::tempdir().unwrap();
        let slots = Slots::open(state.path()).unwrap();
        assert_eq!(slots.admit(&TWO, &key(1)).unwrap(), 0);
        assert_eq!(slots.admit(&TWO, &key(2)).unwrap(), 1);
        assert_eq!(
            slots.admit(&TWO, &key(1)).unwrap(),
            0,
            "a job that asks again keeps its place"
        );
        assert!(matches!(slots.admit(&TWO, &key(3)), Err(Error::Full { most: 2 })));
        slots.release(&key(1)).unwrap();
        slots.release(&key(1)).unwrap();
        assert_eq!(slots.admit(&TWO, &key(3)).unwrap(), 0);
    }

    #[test]
    fn the_host_counts_over_all_networks_and_a_network_for_itself() {
        let state = tempfile::tempdir().unwrap();
        let slots = Slots::open(state.path()).unwrap();
        let small = Capacity {
            machines: 9,
            network: "small",
            slots: 1,
        };
        assert_eq!(slots.admit(&small, &key(1)).unwrap(), 0);
        assert!(matches!(
            slots.admit(&small, &key(2)),
            Err(Error::NoSlot { slots: 1, .. })
        ));
        assert_eq!(slots.admit(&TWO, &key(2)).unwrap(), 0);
        assert!(matches!(slots.admit(&TWO, &key(3)), Err(Error::Full { .. })));
    }

    #[test]
    fn a_late_release_does_not_take_anothers_place() {
        let state = tempfile::tempdir().unwrap();
        let slots = Slots::open(state.path()).unwrap();
        slots.admit(&TWO, &key(1)).unwrap();
        let stale = slots.leases().unwrap().remove(0);
        slots.free(&stale).unwrap();
        slots.admit(&TWO, &key(2)).unwrap();
        slots.free(&stale).unwrap();
        assert_eq!(slots.leases().unwrap()[0].job, Some(key(2)));
    }

    #[test]
    fn a_lease_that_was_never_finished_is_swept_and_no_other() {
        let state = tempfile::tempdir().unwrap();
        let slots = Slots::open(state.path()).unwrap();
        slots.admit(&TWO, &key(1)).unwrap();
        let unfinished = state.path().join("slots/net/1.4711.new");
        fs::write(&unfinished, "").unwrap();
        slots.sweep().unwrap();
        assert!(!unfinished.exists());
        assert_eq!(slots.leases().unwrap()[0].job, Some(key(1)));
    }

    #[test]
    fn no_place_is_given_twice_however_many_ask_at_once() {
        let state = tempfile::tempdir().unwrap();
        let slots = Slots::open(state.path()).unwrap();
        let room = Capacity {
            machines: 16,
            network: "net",
            slots: 16,
        };
        let threads: Vec<_> = (0..16)
            .map(|id| {
                let slots = slots.clone();
                std::thread::spawn(move || slots.admit(&room, &key(id)).unwrap())
            })
            .collect();
        let mut given: Vec<u32> = threads.into_iter().map(|t| t.join().unwrap()).collect();
        given.sort_unstable();
        assert_eq!(given, (0..16).collect::<Vec<_>>());
    }
}
