//! What keeps an image, and the removal of those that nothing keeps.
//!
//! The store knows pins and leases. What else keeps an image is gathered here: the records of jobs, which name the image that
//! they use from before their machine is made until they are gone, and every file that libvirt says a domain uses.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;

use jiff::Timestamp;

use crate::image::{self, Candidate, Digest, Freed, Going, Held, Policy, Store};
use crate::machine::Libvirt;
use crate::outcome::Failure;
use crate::record::{JobKey, Jobs};
use crate::settings::Settings;

/// Why an image stays.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Keeper {
    /// The operator pinned it by this name.
    Pin(String),
    /// A job uses it.
    Job(JobKey),
    /// A domain names one of its files.
    Domain(String),
    /// A process is just using it.
    Process(u32),
}

impl fmt::Display for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Keeper::Pin(name) => write!(f, "the pin {name}"),
            Keeper::Job(key) => write!(f, "the job {key}"),
            Keeper::Domain(name) => write!(f, "the libvirt domain {name}"),
            Keeper::Process(pid) => write!(f, "the process {pid}"),
        }
    }
}

/// The store, and who else has a say in what stays there.
#[derive(Debug)]
pub struct Images {
    store: Store,
    disks: PathBuf,
    jobs: Jobs,
    libvirt: Libvirt,
}

/// Who has a say besides the store itself, at one moment.
#[derive(Debug, Default)]
pub struct Users {
    jobs: BTreeMap<String, BTreeSet<JobKey>>,
    domains: BTreeMap<Digest, BTreeSet<String>>,
}

impl Users {
    /// All that keeps an image.
    pub fn keepers(&self, held: &Held) -> Vec<Keeper> {
        let pins = held.pins.iter().map(|name| Keeper::Pin(name.to_string()));
        let jobs = self.jobs.get(&held.digest.to_string()).into_iter().flatten();
        let domains = self.domains.get(&held.digest).into_iter().flatten();
        pins.chain(jobs.cloned().map(Keeper::Job))
            .chain(domains.cloned().map(Keeper::Domain))
            .chain(held.leases.iter().map(|pid| Keeper::Process(*pid)))
            .collect()
    }
}

impl Images {
    /// The images of these settings.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn open(settings: &Settings) -> Result<Self, Failure> {
        let dir = settings.state_dir.join("store");
        let store = Store::open_for(&dir, settings.images.partial_ttl)?;
        // Domains name files as they are once links are followed.
        let disks = dir.canonicalize().unwrap_or(dir).join("disks");
        Ok(Self {
            store,
            disks,
            jobs: Jobs::look(&settings.state_dir),
            libvirt: Libvirt::open(&settings.libvirt_uri)?,
        })
    }

    /// The store itself.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Who uses images now.
    ///
    /// # Errors
    /// libvirt cannot be asked: then nobody knows, and nothing may be removed.
    pub async fn users(&self) -> Result<Users, Failure> {
        let mut domains: BTreeMap<Digest, BTreeSet<String>> = BTreeMap::new();
        for (file, names) in self.libvirt.files_in_use().await? {
            let below = file.strip_prefix(&self.disks).ok();
            let folder = below.and_then(|below| below.components().next());
            let hex = folder.and_then(|folder| folder.as_os_str().to_str());
            if let Some(digest) = hex.and_then(|hex| format!("sha256:{hex}").parse().ok()) {
                domains.entry(digest).or_default().extend(names);
            }
        }
        Ok(Users {
            jobs: self.jobs_by_digest()?,
            domains,
        })
    }

    /// The jobs that have an image, by its digest. A job whose record cannot be read has its machine's domain to speak for it.
    fn jobs_by_digest(&self) -> Result<BTreeMap<String, BTreeSet<JobKey>>, Failure> {
        let mut jobs: BTreeMap<String, BTreeSet<JobKey>> = BTreeMap::new();
        for job in self.jobs.list()? {
            if let Ok(Some(record)) = job.read()
                && let Some(digest) = record.digest
            {
                jobs.entry(digest).or_default().insert(record.key);
            }
        }
        Ok(jobs)
    }

    /// What would go by this policy, in the order in which it would go.
    ///
    /// # Errors
    /// The store, a record or libvirt cannot be asked.
    pub async fn plan(&self, policy: &Policy) -> Result<Vec<Going>, Failure> {
        Ok(image::plan(&self.candidates().await?, policy, Timestamp::now()))
    }

    async fn candidates(&self) -> Result<Vec<Candidate>, Failure> {
        let users = self.users().await?;
        let held = self.store.inventory()?;
        Ok(held.iter().map(|held| candidate(held, &users)).collect())
    }

    /// Removes an image, unless something keeps it by now. Whether it is gone.
    ///
    /// # Errors
    /// The store or a record cannot be read or written.
    pub fn remove(&self, digest: &Digest) -> Result<bool, Failure> {
        let text = digest.to_string();
        // A job that had it by a lease has its name in a record before it lets the lease go. Domains are made for jobs.
        self.store
            .collect(digest, || Ok(self.jobs_by_digest()?.contains_key(&text)))
    }

    /// Removes what was used least recently until so many bytes are freed, and all together with `coming` bytes more take no
    /// more than `max_size`. Nothing goes if so many bytes cannot be freed; `max_size` is no hard limit, for which all goes that may
    /// go, unless what comes exceeds it alone. How many bytes were freed.
    ///
    /// # Errors
    /// As for [`Images::plan`] and [`Images::remove`].
    pub async fn make_room(&self, coming: u64, lacking: u64, max_size: Option<u64>) -> Result<u64, Failure> {
        let policy = Policy {
            free: lacking,
            max_size: max_size.and_then(|most| most.checked_sub(coming)),
            ..Policy::default()
        };
        let plan = self.plan(&policy).await?;
        let bytes = |going: &[Going]| going.iter().map(|going| going.bytes).sum::<u64>();
        if bytes(&plan) < lacking {
            return Ok(0);
        }
        Ok(bytes(&self.prune(&policy).await?))
    }

    /// Removes what is to go by this policy, and what only those images needed. What went, in order.
    ///
    /// # Errors
    /// As for [`Images::plan`] and [`Images::remove`].
    pub async fn prune(&self, policy: &Policy) -> Result<Vec<Going>, Failure> {
        let candidates = self.candidates().await?;
        let (mut gone, mut freed) = (Vec::new(), Freed::default());
        for going in image::plan(&candidates, policy, Timestamp::now()) {
            if self.remove(&going.digest)? {
                // What it shares with one that was to go and did not is not freed.
                let image = candidates.iter().find(|image| image.digest == going.digest);
                let bytes = image.map_or(0, |image| freed.with(image));
                let going = Going { bytes, ..going };
                tracing::info!(digest = %going.digest, bytes = going.bytes, "image removed: {}", going.reason);
                gone.push(going);
            }
        }
        self.store.tidy()?;
        Ok(gone)
    }
}

/// What goes by the settings alone: images that nobody has used for too long, and those beyond the budget.
pub fn standing_policy(settings: &Settings) -> Option<Policy> {
    let images = &settings.images;
    if images.prune_after.is_none() && images.max_size.is_none() {
        return None;
    }
    Some(Policy {
        older_than: images.prune_after,
        max_size: images.max_size,
        ..Policy::default()
    })
}

/// Those of an image's keepers that read its files now.
pub fn in_use(keepers: &[Keeper]) -> Vec<String> {
    let reads = |keeper: &&Keeper| !matches!(keeper, Keeper::Pin(_));
    keepers.iter().filter(reads).map(ToString::to_string).collect()
}

fn candidate(held: &Held, users: &Users) -> Candidate {
    let mut repositories: Vec<String> = held
        .names
        .iter()
        .filter_map(|name| name.reference.parse::<image::Reference>().ok())
        .map(|reference| reference.place())
        .collect();
    repositories.sort_unstable();
    repositories.dedup();
    Candidate {
        digest: held.digest,
        bytes: held.own,
        shared: held.shared.clone(),
        created: held.created,
        used: held.used,
        repositories,
        kept: !users.keepers(held).is_empty(),
    }
}
