//! The shape of `cannery.toml`: every key that there is, and nothing else.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::Deserialize;

use super::console::ConsoleTable;
use super::pattern::Pattern;
use super::registry::{PrivateRegistry, RegistryName, RegistryTable};
use crate::quantity::{Size, Span};
use crate::secret::Secret;

/// The whole file. Unknown keys are refused, with their place.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct File {
    /// Where the host's images, jobs and slots are kept.
    pub state_dir: Option<PathBuf>,
    /// Where jobs are checked out, in the guest.
    pub builds_dir: Option<String>,
    /// Where local caches live, in the guest.
    pub cache_dir: Option<String>,
    /// The folder below the project's that a failed job's report is written into.
    pub report_dir: Option<String>,
    /// What to do with a job that asks for `services:`.
    pub services: Option<Services>,
    /// Where the operator's log goes, as JSON lines.
    pub log_file: Option<PathBuf>,
    /// What is logged there.
    pub log_filter: Option<String>,
    /// How libvirt is reached.
    pub libvirt: LibvirtTable,
    /// What may run on this host at once.
    pub host: HostTable,
    /// Which images may be used, and how they are fetched.
    pub images: ImagesTable,
    /// The hardware that a machine gets.
    pub machine: MachineTable,
    /// What a job's variables may ask for.
    pub limits: LimitsTable,
    /// The network that machines are on.
    pub network: NetworkTable,
    /// How a guest is entered.
    pub guest: GuestTable,
    /// What is remembered of jobs that are over.
    pub history: HistoryTable,
    /// The console: how people see and enter machines.
    pub console: ConsoleTable,
    /// For how long machines stay for a look at what failed.
    pub hold: HoldTable,
    /// What is special about single registries, by `host[:port]`.
    pub registry: BTreeMap<RegistryName, RegistryTable>,
    /// Exceptions for images, by pattern; of several that fit, the longest pattern wins, key by key.
    pub image: ImageTables,
}

/// `services`: a virtual machine has none beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Services {
    /// The job fails with a sentence that says so.
    #[default]
    Refuse,
    /// The job runs without them, and its log says so.
    Ignore,
}

/// `[libvirt]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LibvirtTable {
    /// The connection URI.
    pub uri: Option<String>,
}

/// `[host]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HostTable {
    /// How many machines may exist at once.
    pub max_machines: Option<u32>,
    /// How long a job waits for one to end when all are in use.
    pub wait: Option<Span>,
}

/// `[history]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HistoryTable {
    /// For how long a job is remembered after it was removed.
    pub keep: Option<Span>,
    /// How much room all of them may take.
    pub max_size: Option<Size>,
}

/// `[hold]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HoldTable {
    /// For how long a machine stays whose job's script failed; zero for not at all.
    pub on_failure: Option<Span>,
    /// The most that `CANNERY_HOLD` may ask for.
    pub max: Option<Span>,
}

/// One value or a list of them.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    /// `key = "value"`
    One(T),
    /// `key = ["value", "value"]`
    Many(Vec<T>),
}

impl<T> From<OneOrMany<T>> for Vec<T> {
    fn from(v: OneOrMany<T>) -> Self {
        match v {
            OneOrMany::One(one) => vec![one],
            OneOrMany::Many(many) => many,
        }
    }
}

/// `[images]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ImagesTable {
    /// The image of a job that names none.
    pub default: Option<String>,
    /// Which images a job may name.
    pub allow: Option<Vec<Pattern>>,
    /// When the registry is asked.
    pub pull_policy: Option<OneOrMany<PullPolicy>>,
    /// What a job's `image:pull_policy` may be.
    pub allowed_pull_policies: Option<Vec<PullPolicy>>,
    /// OCI layout folders that `oci:DIR:TAG` may name.
    pub layouts: Vec<PathBuf>,
    /// Folders below which `file:///PATH` may name disks.
    pub files: Vec<PathBuf>,
    /// Registries (`host[:port]`) that are spoken to without TLS.
    pub plain_http: Vec<String>,
    /// PEM files with certificate authorities to trust beside the system's.
    pub ca_files: Vec<PathBuf>,
    /// Registries that may send us to addresses that are not public, and networks where any registry may.
    pub private_registries: Vec<PrivateRegistry>,
    /// For which images the host's own credentials are used.
    pub host_credentials: Vec<Pattern>,
    /// Docker or podman auth files that hold them.
    pub auth_files: Vec<PathBuf>,
    /// The largest disk that an image may have.
    pub max_disk: Option<Size>,
    /// How much room all images may take.
    pub max_size: Option<Size>,
    /// What must stay free on the store's file system.
    pub keep_free: Option<Size>,
    /// How long an image is kept that nobody uses.
    pub prune_after: Option<Span>,
    /// For how long a registry's word is good that a job may have a private image.
    pub auth_ttl: Option<Span>,
    /// For how long it is good while the registry cannot be reached.
    pub offline_ttl: Option<Span>,
    /// How long a pull that was cut off is kept to go on from.
    pub partial_ttl: Option<Span>,
    /// Images that `cannery image prewarm` fetches.
    pub prewarm: Vec<String>,
    /// An image must be named by its digest.
    pub require_digest: Option<bool>,
    /// PEM files of public keys, one of which must have signed an image.
    pub signed_by: Option<Vec<PathBuf>>,
}

/// GitLab's three words for when the registry is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PullPolicy {
    /// Ask every time; what is there already is not fetched again.
    Always,
    /// Ask only for what is not in the store.
    IfNotPresent,
    /// Never ask.
    Never,
}

/// `[machine]`, and `machine` in an image's table.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MachineTable {
    /// Virtual CPUs.
    pub cpus: Option<u32>,
    /// Memory.
    pub memory: Option<Size>,
    /// The least size of the disk; a larger image keeps its own.
    pub disk: Option<Size>,
    /// The CPU that the guest sees: `host-model`, `host-passthrough`, `maximum`, or a model's name.
    pub cpu: Option<String>,
    /// How the guest is started.
    pub firmware: Option<Firmware>,
    /// What the disk is attached to.
    pub disk_bus: Option<DiskBus>,
    /// The network card.
    pub nic: Option<Nic>,
    /// A versioned machine type, as `virsh capabilities` lists them.
    pub machine_type: Option<String>,
    /// Whether hardware virtualisation is used.
    pub accelerator: Option<Accelerator>,
}

/// `firmware`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Firmware {
    /// SeaBIOS.
    Bios,
    /// OVMF or AAVMF.
    Uefi,
}

/// `disk_bus`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskBus {
    /// virtio-blk: `/dev/vda`.
    Virtio,
    /// virtio-scsi: `/dev/sda`.
    Scsi,
    /// AHCI: `/dev/sda`, for guests without virtio drivers.
    Sata,
}

/// `nic`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Nic {
    /// virtio-net.
    Virtio,
    /// Intel 82574L, for guests without virtio drivers.
    E1000e,
}

/// `accelerator`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accelerator {
    /// KVM where it was seen to boot a guest on this host, emulation elsewhere.
    #[default]
    Auto,
    /// KVM, without asking.
    Kvm,
    /// Emulation (TCG), without asking.
    Emulation,
}

/// `[limits]`: the most that `CANNERY_CPUS`, `CANNERY_MEMORY` and `CANNERY_DISK` may ask for.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsTable {
    /// Virtual CPUs.
    pub cpus: Option<u32>,
    /// Memory.
    pub memory: Option<Size>,
    /// Disk.
    pub disk: Option<Size>,
}

/// `[network]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkTable {
    /// A libvirt network of the operator's own, instead of cannery's.
    pub libvirt_network: Option<String>,
    /// The name of cannery's network, and of its bridge.
    pub name: Option<String>,
    /// The network's addresses.
    pub subnet: Option<Subnet>,
    /// How many machines it has room for.
    pub slots: Option<u32>,
    /// Ports of the host that guests may reach, such as `"tcp/8080"`.
    pub host_ports: Vec<HostPort>,
}

/// An IPv4 network, written `192.168.177.0/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnet {
    /// The network's first address.
    pub network: Ipv4Addr,
    /// How many bits of it are fixed.
    pub prefix: u8,
}

impl std::fmt::Display for Subnet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

impl<'de> Deserialize<'de> for Subnet {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        let parse = || {
            let (network, prefix) = text.split_once('/')?;
            let network: Ipv4Addr = network.parse().ok()?;
            let prefix: u8 = prefix.parse().ok()?;
            let host_bits = 32u32.checked_sub(prefix.into())?;
            let aligned = u32::from(network).trailing_zeros() >= host_bits;
            ((16..=29).contains(&prefix) && aligned).then_some(Subnet { network, prefix })
        };
        parse().ok_or_else(|| {
            serde::de::Error::custom(format!(
                "\"{text}\" is not a network; write for example \"192.168.177.0/24\" (/16 to /29, host bits zero)"
            ))
        })
    }
}

/// A port of the host that guests may reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostPort {
    /// UDP rather than TCP.
    pub udp: bool,
    /// The port.
    pub port: u16,
}

impl<'de> Deserialize<'de> for HostPort {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        let parse = || {
            let (protocol, port) = text.split_once('/')?;
            let udp = match protocol {
                "tcp" => false,
                "udp" => true,
                _ => return None,
            };
            Some(HostPort {
                udp,
                port: port.parse().ok().filter(|p| *p > 0)?,
            })
        };
        parse().ok_or_else(|| {
            serde::de::Error::custom(format!(
                "\"{text}\" is not a port; write for example \"tcp/8080\""
            ))
        })
    }
}

/// `[guest]`, and `guest` in an image's table.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuestTable {
    /// Whom jobs run as.
    pub user: Option<String>,
    /// Whom a job's `image:docker:user` may name beside that.
    pub allow_users: Option<Vec<String>>,
    /// The shell that runs the job's scripts.
    pub shell: Option<Shell>,
    /// The port of the guest's sshd.
    pub port: Option<u16>,
    /// A private key that the image's own user accepts, where no key can be brought in.
    pub key_file: Option<PathBuf>,
    /// A password that the image's own user accepts, where no key can be brought in.
    pub password: Option<Secret>,
    /// A `gitlab-runner` binary on the host, for guests whose image has none.
    pub helper: Option<PathBuf>,
    /// How long a guest may take until it can be entered.
    pub boot_timeout: Option<Span>,
    /// How long a guest may be silent before it counts as lost.
    pub lost_after: Option<Span>,
    /// How long a cancelled script may take to end by itself.
    pub cancel_grace: Option<Span>,
}

/// `shell`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shell {
    /// GNU bash.
    #[default]
    Bash,
    /// The POSIX shell.
    Sh,
}

impl Shell {
    /// The shell's name, as gitlab-runner and the guest's `PATH` know it.
    pub fn as_str(self) -> &'static str {
        match self {
            Shell::Bash => "bash",
            Shell::Sh => "sh",
        }
    }
}

/// `[image."PATTERN"]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ImageTable {
    /// Hardware for these images.
    pub machine: MachineTable,
    /// How guests of these images are entered.
    pub guest: GuestTable,
    /// They must be named by their digest.
    pub require_digest: Option<bool>,
    /// PEM files of public keys, one of which must have signed them; an empty list asks for no signature.
    pub signed_by: Option<Vec<PathBuf>>,
}

/// The `[image."PATTERN"]` tables, the shortest pattern first.
#[derive(Debug, Clone, Default)]
pub struct ImageTables(pub Vec<(Pattern, ImageTable)>);

impl<'de> Deserialize<'de> for ImageTables {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Tables;
        impl<'de> serde::de::Visitor<'de> for Tables {
            type Value = ImageTables;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("tables named by patterns, such as [image.\"registry.example.com/**\"]")
            }
            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<ImageTables, A::Error> {
                let mut tables = Vec::new();
                while let Some(entry) = map.next_entry::<Pattern, ImageTable>()? {
                    tables.push(entry);
                }
                tables.sort_by(|(a, _), (b, _)| a.by_length(b));
                Ok(ImageTables(tables))
            }
        }
        d.deserialize_map(Tables)
    }
}

/// Takes each key that `over` sets, else keeps the one of `base`.
macro_rules! overlay {
    ($base:ident, $over:ident; $($key:ident),+) => {
        Self { $($key: $over.$key.clone().or($base.$key)),+ }
    };
}

impl MachineTable {
    /// This table with the keys of a more exact one on top.
    pub fn with(self, over: &Self) -> Self {
        overlay!(self, over; cpus, memory, disk, cpu, firmware, disk_bus, nic, machine_type, accelerator)
    }
}

impl GuestTable {
    /// This table with the keys of a more exact one on top.
    pub fn with(self, over: &Self) -> Self {
        overlay!(self, over; user, allow_users, shell, port, key_file, password, helper, boot_timeout, lost_after, cancel_grace)
    }
}
