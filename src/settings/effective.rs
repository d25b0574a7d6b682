//! The settings as the program uses them: every key has a value, and the values fit together.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::console::ConsoleSettings;
use super::file::{
    Accelerator, DiskBus, File, Firmware, GuestTable, HostPort, LimitsTable, MachineTable, Nic, PullPolicy,
    Services, Shell, Subnet,
};
use super::pattern::Pattern;
use super::registry::{PrivateRegistry, RegistryName, RegistryTable};
use super::{Error, Sources};
use crate::quantity::Size;
use crate::report::OperatorLog;
use crate::secret::Secret;

/// All settings of one call.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The file they were read from, or `(defaults)`.
    pub file: PathBuf,
    /// Where the host's images, jobs and slots are kept.
    pub state_dir: PathBuf,
    /// Where jobs are checked out, in the guest.
    pub builds_dir: String,
    /// Where local caches live, in the guest.
    pub cache_dir: String,
    /// The folder below the project's, in the guest, that a failed job's report is written into, if any.
    pub report_dir: Option<String>,
    /// What to do with a job that asks for `services:`.
    pub services: Services,
    /// Where the operator's log goes.
    pub log: Option<OperatorLog>,
    /// libvirt's connection URI.
    pub libvirt_uri: String,
    /// How many machines may exist at once.
    pub max_machines: u32,
    /// How long a job waits for one to end when all are in use.
    pub wait: Duration,
    /// Which images may be used, and how they are fetched.
    pub images: ImageSettings,
    /// The network that machines are on.
    pub network: Network,
    /// How long jobs that are over are remembered; zero for not at all.
    pub history_keep: Duration,
    /// How many bytes that may take; zero for not at all.
    pub history_size: u64,
    /// Viewers that `cannery console` starts, the best first.
    pub viewers: Vec<String>,
    /// The console, where there is one.
    pub console: Option<ConsoleSettings>,
    /// For how long a machine stays whose job's script failed; zero for not at all.
    pub hold_on_failure: Duration,
    /// The most that a job may ask for instead.
    pub hold_max: Duration,
    machine: MachineTable,
    guest: GuestTable,
    limits: LimitsTable,
    per_image: Vec<(Pattern, MachineTable, GuestTable)>,
    rules: Vec<(Pattern, ImageRules)>,
}

/// What an image must be to be used at all, as far as one table says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageRules {
    /// It must be named by its digest.
    pub require_digest: Option<bool>,
    /// PEM files of public keys, one of which must have signed it; an empty list asks for no signature.
    pub signed_by: Option<Vec<PathBuf>>,
}

/// `[images]`, with defaults.
#[derive(Debug, Clone)]
pub struct ImageSettings {
    /// The image of a job that names none.
    pub default: Option<String>,
    /// Which images a job may name; without it only the default image, those that a table names, and the
    /// GitLab instance's own registry.
    pub allow: Option<Vec<Pattern>>,
    /// When the registry is asked.
    pub pull_policy: Vec<PullPolicy>,
    /// What a job's `image:pull_policy` may be.
    pub allowed_pull_policies: Vec<PullPolicy>,
    /// OCI layout folders that `oci:DIR:TAG` may name.
    pub layouts: Vec<PathBuf>,
    /// Folders below which `file:///PATH` may name disks.
    pub files: Vec<PathBuf>,
    /// Registries that are spoken to without TLS.
    pub plain_http: Vec<String>,
    /// PEM files with certificate authorities to trust beside the system's.
    pub ca_files: Vec<PathBuf>,
    /// Registries that may send us to addresses that are not public, and networks where any registry may.
    pub private_registries: Vec<PrivateRegistry>,
    /// What is special about single registries.
    pub registries: BTreeMap<RegistryName, RegistryTable>,
    /// For which images the host's own credentials are used.
    pub host_credentials: Vec<Pattern>,
    /// Docker or podman auth files that hold them; those that do not exist are passed over.
    pub auth_files: Vec<PathBuf>,
    /// The largest disk that an image may have, in bytes.
    pub max_disk: u64,
    /// How much room all images may take, in bytes, if there is a limit.
    pub max_size: Option<u64>,
    /// What must stay free on the store's file system, in bytes.
    pub keep_free: u64,
    /// How long an image is kept that nobody uses, if not for ever.
    pub prune_after: Option<Duration>,
    /// For how long a registry's word is good that a job may have a private image.
    pub auth_ttl: Duration,
    /// For how long it is good while the registry cannot be reached.
    pub offline_ttl: Duration,
    /// How long what a pull has brought that was cut off is kept for the next one.
    pub partial_ttl: Duration,
    /// Images that are fetched before a job asks for them.
    pub prewarm: Vec<String>,
    /// What every image must be to be used at all, unless a table for it says otherwise.
    pub rules: ImageRules,
}

/// Which network machines are on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// cannery's own, with slots and a firewall.
    Own(OwnNetwork),
    /// A libvirt network that the operator made.
    Libvirt(String),
}

/// `[network]` for cannery's own network, with defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnNetwork {
    /// Its name, and its bridge's.
    pub name: String,
    /// Its addresses.
    pub subnet: Subnet,
    /// How many machines it has room for.
    pub slots: u32,
    /// Ports of the host that guests may reach.
    pub host_ports: Vec<HostPort>,
}

/// The hardware for one image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineSettings {
    /// Virtual CPUs; none means what the image asks for, else [`MachineSettings::DEFAULT_CPUS`].
    pub cpus: Option<u32>,
    /// Memory; none means what the image asks for, else [`MachineSettings::DEFAULT_MEMORY`].
    pub memory: Option<Size>,
    /// The least size of the disk, if any.
    pub disk: Option<Size>,
    /// The CPU that the guest sees, if it was chosen.
    pub cpu: Option<String>,
    /// The firmware; none means what the image asks for, else the architecture's usual one.
    pub firmware: Option<Firmware>,
    /// What the disk is attached to; none means what the image asks for, else virtio.
    pub disk_bus: Option<DiskBus>,
    /// The network card; none means what the image asks for, else virtio.
    pub nic: Option<Nic>,
    /// A versioned machine type, if it was chosen.
    pub machine_type: Option<String>,
    /// Whether hardware virtualisation is used.
    pub accelerator: Accelerator,
    /// The most that a job, or an image, may ask for.
    pub max_cpus: u32,
    /// The most memory that a job, or an image, may ask for.
    pub max_memory: Size,
    /// The most disk that a job may ask for.
    pub max_disk: Size,
}

/// How guests of one image are entered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestSettings {
    /// Whom jobs run as; none means what the image says, else `root`.
    pub user: Option<String>,
    /// Whom a job's `image:docker:user` may name beside that.
    pub allow_users: Vec<String>,
    /// The shell that runs the job's scripts.
    pub shell: Shell,
    /// The port of the guest's sshd.
    pub port: u16,
    /// A private key that the image's own user accepts.
    pub key_file: Option<PathBuf>,
    /// A password that the image's own user accepts.
    pub password: Option<Secret>,
    /// A `gitlab-runner` binary on the host, for guests whose image has none.
    pub helper: Option<PathBuf>,
    /// How long a guest may take until it can be entered.
    pub boot_timeout: Duration,
    /// How long a guest may be silent before it counts as lost.
    pub lost_after: Duration,
    /// How long a cancelled script may take to end by itself.
    pub cancel_grace: Duration,
}

impl MachineSettings {
    /// What a guest gets when neither the settings nor the image say.
    pub const DEFAULT_MEMORY: Size = Size::gib(2);
    /// CPUs of a guest when the settings do not say.
    pub const DEFAULT_CPUS: u32 = 2;
}

/// Slots of the own network when the settings do not say: more than fit on most hosts, and few enough to list.
const DEFAULT_SLOTS: u32 = 32;
/// A guest under emulation on a busy host needs minutes to boot; a healthy one under KVM seconds.
const DEFAULT_BOOT_TIMEOUT: Duration = Duration::from_secs(300);
/// Longer than any pause of a loaded guest or a suspended host that a job should survive.
const DEFAULT_LOST_AFTER: Duration = Duration::from_secs(60);
/// What well-behaved programs need to clean up after SIGTERM.
const DEFAULT_CANCEL_GRACE: Duration = Duration::from_secs(10);
/// A cleanup that is under way frees a place within seconds.
const DEFAULT_WAIT: Duration = Duration::from_secs(60);
/// Long enough for the question that comes after a week-end.
const DEFAULT_HISTORY_KEEP: Duration = Duration::from_secs(7 * 86_400);
/// Some thousand jobs with all that is kept of their serial logs.
const DEFAULT_HISTORY_SIZE: Size = Size::mib(200);
/// No image that people run in CI comes near; what does is a mistake or an attack.
const DEFAULT_MAX_DISK: Size = Size::gib(2048);
/// The overlays of running jobs often lie on the same file system, and a machine whose disk cannot grow stands still.
const DEFAULT_KEEP_FREE: Size = Size::mib(512);
/// Short enough for a member who was removed, long enough for the jobs of one pipeline.
const DEFAULT_AUTH_TTL: Duration = Duration::from_secs(600);
/// Over a long weekend.
const DEFAULT_PARTIAL_TTL: Duration = Duration::from_secs(7 * 24 * 3600);

/// Where docker and podman keep logins.
fn usual_auth_files(sources: &Sources) -> Vec<PathBuf> {
    if let Some(named) = &sources.registry_auth_file {
        return vec![named.clone()];
    }
    let under_home = |path: &str| sources.home.as_ref().map(|home| home.join(path));
    let docker = sources.docker_config.clone().or_else(|| under_home(".docker"));
    docker
        .map(|folder| folder.join("config.json"))
        .into_iter()
        .chain(under_home(".config/containers/auth.json"))
        .collect()
}

impl Settings {
    /// Fills in the defaults and checks what no single key can tell.
    pub fn resolve(file: File, path: &Path, sources: &Sources) -> Result<Settings, Error> {
        let wrong = |message: String| Error::Inconsistent {
            path: path.to_owned(),
            message,
        };
        let libvirt_uri = file.libvirt.uri.unwrap_or_else(|| "qemu:///system".to_owned());
        let state_dir = match (
            file.state_dir,
            libvirt_uri.ends_with(":///session"),
            &sources.data_home,
        ) {
            (Some(dir), _, _) => dir,
            (None, true, Some(data)) => data.join("cannery"),
            (None, true, None) => return Err(wrong("state_dir must be set where HOME is not".to_owned())),
            (None, false, _) => PathBuf::from("/var/lib/cannery"),
        };
        if !state_dir.is_absolute() {
            return Err(wrong(format!(
                "state_dir \"{}\" is not an absolute path",
                state_dir.display()
            )));
        }
        let builds_dir = file.builds_dir.unwrap_or_else(|| "/builds".to_owned());
        let cache_dir = file.cache_dir.unwrap_or_else(|| "/cache".to_owned());
        for (key, dir) in [("builds_dir", &builds_dir), ("cache_dir", &cache_dir)] {
            if !dir.starts_with('/') || dir.contains(['\n', '\0']) {
                return Err(wrong(format!(
                    "{key} \"{dir}\" is not an absolute path in the guest"
                )));
            }
        }
        if let Some(dir) = &file.report_dir {
            let plain = |part: &str| !matches!(part, "" | "." | "..");
            if !dir.split('/').all(plain) || dir.contains(char::is_control) {
                return Err(wrong(format!(
                    "report_dir \"{}\" is not a path below a project's folder, such as \".cannery\"",
                    dir.escape_debug()
                )));
            }
        }
        if file.network.slots == Some(0) || file.host.max_machines == Some(0) {
            return Err(wrong(
                "network.slots and host.max_machines must be at least 1".to_owned(),
            ));
        }
        let network = match (file.network.libvirt_network, &file.network.name) {
            (Some(_), Some(_)) => {
                return Err(wrong(
                    "network.libvirt_network and network.name exclude each other".to_owned(),
                ));
            }
            (Some(name), None) => Network::Libvirt(name),
            (None, name) => {
                let subnet = file.network.subnet.unwrap_or(Subnet {
                    network: [192, 168, 177, 0].into(),
                    prefix: 24,
                });
                // The network's own address, the host's and the broadcast address are not for guests.
                let room = (1u32 << (32 - subnet.prefix)) - 3;
                let slots = file.network.slots.unwrap_or(DEFAULT_SLOTS.min(room));
                if slots > room {
                    return Err(wrong(format!(
                        "network.slots = {slots} does not fit into {subnet}, which has {room}"
                    )));
                }
                let name = name.clone().unwrap_or_else(|| "cannery".to_owned());
                let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
                let starts_well = name.starts_with(|c: char| c.is_ascii_alphabetic());
                if !starts_well || name.len() > MAX_NETWORK_NAME || !name.bytes().all(plain) {
                    return Err(wrong(format!(
                        "network.name \"{name}\" must be a letter and up to {} letters, digits or underscores, since devices are named after it",
                        MAX_NETWORK_NAME - 1
                    )));
                }
                Network::Own(OwnNetwork {
                    name,
                    subnet,
                    slots,
                    host_ports: file.network.host_ports,
                })
            }
        };
        let slots = match &network {
            Network::Own(own) => own.slots,
            Network::Libvirt(_) => DEFAULT_SLOTS,
        };
        let max_machines = file.host.max_machines.unwrap_or(slots);
        if matches!(network, Network::Own(_)) && max_machines > slots {
            return Err(wrong(format!(
                "host.max_machines = {max_machines} is more than network.slots = {slots}, and every machine needs one"
            )));
        }
        let pull_policy: Vec<PullPolicy> = file
            .images
            .pull_policy
            .map_or_else(|| vec![PullPolicy::IfNotPresent], Vec::from);
        if pull_policy.is_empty() {
            return Err(wrong("images.pull_policy names no policy".to_owned()));
        }
        let hold_on_failure = file.hold.on_failure.map_or(Duration::ZERO, |s| s.0);
        let hold_max = file.hold.max.map_or(hold_on_failure, |s| s.0);
        if hold_on_failure > hold_max {
            return Err(wrong("hold.on_failure is longer than hold.max".to_owned()));
        }
        if hold_max > MOST_HOLD {
            return Err(wrong(format!(
                "hold.max is longer than {} days",
                MOST_HOLD.as_secs() / 86_400
            )));
        }
        let auth_ttl = file.images.auth_ttl.map_or(DEFAULT_AUTH_TTL, |s| s.0);
        for (name, table) in &file.registry {
            if table.client_cert.is_some() != table.client_key.is_some() {
                return Err(wrong(format!(
                    "registry.\"{}\": client_cert and client_key belong together",
                    name.0
                )));
            }
        }
        let auth_files = if file.images.auth_files.is_empty() {
            usual_auth_files(sources)
        } else {
            file.images.auth_files
        };
        let rules: Vec<(Pattern, ImageRules)> = file
            .image
            .0
            .iter()
            .map(|(pattern, table)| {
                let rules = ImageRules {
                    require_digest: table.require_digest,
                    signed_by: table.signed_by.clone(),
                };
                (pattern.clone(), rules)
            })
            .collect();
        let general = ImageRules {
            require_digest: file.images.require_digest,
            signed_by: file.images.signed_by,
        };
        let keys = rules.iter().map(|(_, rules)| rules).chain([&general]);
        for key in keys.filter_map(|rules| rules.signed_by.as_ref()).flatten() {
            if !key.is_absolute() {
                let key = key.display();
                return Err(wrong(format!(
                    "signed_by names \"{key}\", which is not an absolute path"
                )));
            }
        }
        let settings = Settings {
            rules,
            file: path.to_owned(),
            state_dir,
            builds_dir,
            cache_dir,
            report_dir: file.report_dir,
            services: file.services.unwrap_or_default(),
            log: file.log_file.map(|file_name| OperatorLog {
                file: file_name,
                filter: file.log_filter.unwrap_or_else(|| "info".to_owned()),
            }),
            libvirt_uri,
            max_machines,
            wait: file.host.wait.map_or(DEFAULT_WAIT, |s| s.0),
            images: ImageSettings {
                default: file.images.default,
                allow: file.images.allow,
                allowed_pull_policies: file
                    .images
                    .allowed_pull_policies
                    .unwrap_or_else(|| pull_policy.clone()),
                pull_policy,
                layouts: file.images.layouts,
                files: file.images.files,
                plain_http: file.images.plain_http,
                ca_files: file.images.ca_files,
                private_registries: file.images.private_registries,
                registries: file.registry,
                host_credentials: file.images.host_credentials,
                auth_files,
                max_disk: file.images.max_disk.unwrap_or(DEFAULT_MAX_DISK).bytes(),
                max_size: file.images.max_size.map(Size::bytes),
                keep_free: file.images.keep_free.unwrap_or(DEFAULT_KEEP_FREE).bytes(),
                prune_after: file
                    .images
                    .prune_after
                    .map(|s| s.0)
                    .filter(|after| !after.is_zero()),
                auth_ttl,
                offline_ttl: file.images.offline_ttl.map_or(auth_ttl, |s| s.0),
                partial_ttl: file.images.partial_ttl.map_or(DEFAULT_PARTIAL_TTL, |s| s.0),
                prewarm: file.images.prewarm,
                rules: general,
            },
            network,
            history_keep: file.history.keep.map_or(DEFAULT_HISTORY_KEEP, |s| s.0),
            hold_on_failure,
            hold_max,
            history_size: file.history.max_size.unwrap_or(DEFAULT_HISTORY_SIZE).bytes(),
            viewers: file.console.programs(),
            console: file.console.resolve().map_err(wrong)?,
            machine: file.machine,
            guest: file.guest,
            limits: file.limits,
            per_image: file
                .image
                .0
                .into_iter()
                .map(|(p, t)| (p, t.machine, t.guest))
                .collect(),
        };
        for name in std::iter::once("").chain(settings.per_image.iter().map(|(p, ..)| p.as_str())) {
            let machine = settings.machine(name);
            let table = if name.is_empty() {
                "machine".to_owned()
            } else {
                format!("image.\"{name}\".machine")
            };
            if let Some(cpus) = machine.cpus.filter(|cpus| !(1..=MAX_CPUS).contains(cpus)) {
                return Err(wrong(format!(
                    "{table}.cpus = {cpus} is not between 1 and {MAX_CPUS}"
                )));
            }
            if machine.memory.is_some_and(|m| m < MIN_MEMORY) {
                return Err(wrong(format!(
                    "{table}.memory is less than {MIN_MEMORY}, too little to boot anything"
                )));
            }
        }
        Ok(settings)
    }

    /// Is there a table for this image?
    pub fn names_image(&self, image: &str) -> bool {
        self.per_image.iter().any(|(pattern, ..)| pattern.fits(image))
    }

    /// What an image must be to be used at all. `names` are all by which patterns may mean it: a digest or a tag that a job
    /// writes behind the name must not take the image out of its rules.
    pub fn rules(&self, names: &[&str]) -> ImageRules {
        let fits = |pattern: &Pattern| {
            names
                .iter()
                .any(|name| pattern.fits(name) || pattern.as_str() == *name)
        };
        let tables = self.rules.iter().filter(|(pattern, _)| fits(pattern));
        tables.fold(self.images.rules.clone(), |base, (_, over)| ImageRules {
            require_digest: over.require_digest.or(base.require_digest),
            signed_by: over.signed_by.clone().or(base.signed_by),
        })
    }

    /// The hardware for an image, by its full name.
    pub fn machine(&self, image: &str) -> MachineSettings {
        let table = self
            .layers(image)
            .fold(self.machine.clone(), |base, (over, _)| base.with(over));
        MachineSettings {
            cpus: table.cpus,
            memory: table.memory,
            disk: table.disk,
            cpu: table.cpu,
            firmware: table.firmware,
            disk_bus: table.disk_bus,
            nic: table.nic,
            machine_type: table.machine_type,
            accelerator: table.accelerator.unwrap_or_default(),
            max_cpus: self
                .limits
                .cpus
                .or(table.cpus)
                .unwrap_or(MachineSettings::DEFAULT_CPUS),
            max_memory: self
                .limits
                .memory
                .or(table.memory)
                .unwrap_or(MachineSettings::DEFAULT_MEMORY),
            max_disk: self.limits.disk.or(table.disk).unwrap_or(Size::from_bytes(0)),
        }
    }

    /// How guests of an image are entered, by the image's full name.
    pub fn guest(&self, image: &str) -> GuestSettings {
        let table = self
            .layers(image)
            .fold(self.guest.clone(), |base, (_, over)| base.with(over));
        GuestSettings {
            user: table.user,
            allow_users: table.allow_users.unwrap_or_default(),
            shell: table.shell.unwrap_or_default(),
            port: table.port.unwrap_or(22),
            key_file: table.key_file,
            password: table.password,
            helper: table.helper,
            boot_timeout: table.boot_timeout.map_or(DEFAULT_BOOT_TIMEOUT, |s| s.0),
            lost_after: table.lost_after.map_or(DEFAULT_LOST_AFTER, |s| s.0),
            cancel_grace: table.cancel_grace.map_or(DEFAULT_CANCEL_GRACE, |s| s.0),
        }
    }

    /// The tables that fit an image, the shortest pattern first.
    fn layers<'a>(&'a self, image: &'a str) -> impl Iterator<Item = (&'a MachineTable, &'a GuestTable)> {
        self.per_image
            .iter()
            .filter(move |(pattern, ..)| pattern.fits(image) || pattern.as_str() == image)
            .map(|(_, machine, guest)| (machine, guest))
    }
}

/// No look at a machine takes longer; what does is a machine that was forgotten.
const MOST_HOLD: Duration = Duration::from_secs(30 * 86_400);
/// Linux allows 15 characters, of which a slot's number and its dash need up to six.
const MAX_NETWORK_NAME: usize = 12;
/// No libvirt machine type has more by default.
const MAX_CPUS: u32 = 255;
/// Less does not hold a kernel and an sshd.
const MIN_MEMORY: Size = Size::mib(64);
