//! Where one machine stands: its names, its paths, its place in the network.
//!
//! Everything in which two machines of one description differ is here and nowhere else.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;

use uuid::Uuid;

/// One machine's own names and paths. All paths are absolute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// The domain's name: `cannery-<hash of coordinator>-<job id>-<attempt>` or so.
    pub name: String,
    /// The domain's UUID; the guest sees it in DMI, and its generation id is the same.
    pub uuid: Uuid,
    /// One line for people (`virsh desc`): project and job name.
    pub title: Option<String>,
    /// Whose machine it is, for the reaper.
    pub owner: Owner,
    /// The card's address.
    pub mac: Mac,
    /// Which network the card is on.
    pub network: NetworkAttachment,
    /// The job's own qcow2 layer.
    pub overlay: PathBuf,
    /// What lies under it, top first. QEMU opens these read-only and libvirt leaves owner and mode alone.
    pub backing: Vec<Backing>,
    /// Kernel of a direct kernel boot. libvirt gives such files to QEMU's user while the machine runs, so it must be a
    /// copy of the job's own ([`overlay::private_copy`](super::overlay::private_copy)), never the store's file.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk of a direct kernel boot; a copy like the kernel.
    pub initrd: Option<PathBuf>,
    /// UEFI variables, made by libvirt from the firmware's template; left behind for the caller to delete.
    pub nvram: PathBuf,
    /// Serial log; must exist (see [`serial::create`](super::serial::create)).
    pub serial_log: PathBuf,
    /// Raw image of the cloud-init seed, when the description has a seed disk.
    pub seed: Option<PathBuf>,
    /// Files for the guest's systemd, under `opt/io.systemd.credentials/` of fw_cfg. Files rather than values, because
    /// a value would stand in QEMU's command line for every user of the host to read.
    pub credentials: Vec<FwCfgEntry>,
}

/// Whose machine a domain is; kept in its `<metadata>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// Hash of the GitLab instance's URL.
    pub coordinator: String,
    /// GitLab's job id.
    pub job_id: u64,
    /// Which try of that job on this host.
    pub attempt: u32,
    /// The state folder that holds its record; a reaper touches only domains of its own folder.
    pub state_dir: PathBuf,
}

/// Which network a machine's card is on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkAttachment {
    /// A slot of our own network.
    Slot {
        /// libvirt's name of the network.
        network: String,
        /// The slot's tap device, by which the firewall knows it.
        tap: String,
    },
    /// A libvirt network of the operator's.
    Named(String),
}

impl NetworkAttachment {
    /// libvirt's name of the network.
    pub fn network(&self) -> &str {
        match self {
            NetworkAttachment::Slot { network, .. } => network,
            NetworkAttachment::Named(name) => name,
        }
    }
}

/// One layer under the overlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// Absolute path.
    pub path: PathBuf,
    /// Its format; never probed.
    pub format: Format,
}

/// Disk formats that a chain may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Plain bytes.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

impl Format {
    /// QEMU's and libvirt's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
}

/// One credential for the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FwCfgEntry {
    /// The credential's name, without the prefix.
    pub name: String,
    /// File with its content; libvirt lends it to QEMU's user while the machine runs, so 0600 will do.
    pub path: PathBuf,
}

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac([u8; 6]);

impl Mac {
    /// The address of the slot that has this IPv4 address: `52:54` (locally administered, unicast) and the four bytes
    /// of the address, so that one tells the other to whoever reads a packet dump.
    pub fn of_address(address: Ipv4Addr) -> Mac {
        let [a, b, c, d] = address.octets();
        Mac([0x52, 0x54, a, b, c, d])
    }

    /// An address for a machine on a foreign network: random, but the same for the same machine. Starts with QEMU's
    /// `52:54:00`, which operators' filters expect.
    pub fn of_machine(uuid: Uuid) -> Mac {
        let derived = Uuid::new_v5(&uuid, b"network card");
        let [a, b, c, ..] = *derived.as_bytes();
        Mac([0x52, 0x54, 0x00, a, b, c])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mac({self})")
    }
}

/// A text that is no MAC address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a MAC address")]
pub struct BadMac(String);

impl FromStr for Mac {
    type Err = BadMac;

    fn from_str(text: &str) -> Result<Mac, BadMac> {
        let bad = || BadMac(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            // A sign would pass from_str_radix.
            let part = parts
                .next()
                .filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))
                .ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        match parts.next() {
            None => Ok(Mac(bytes)),
            Some(_) => Err(bad()),
        }
    }
}

#[cfg(test)]
pub(in crate::machine) mod tests {
    use super::*;

    /// The placement of a job called `tag`.
    pub(in crate::machine) fn place(tag: &str) -> Placement {
        let folder = PathBuf::from("/var/lib/cannery/jobs").join(tag);
        let uuid = Uuid::new_v5(&Uuid::NAMESPACE_URL, tag.as_bytes());
        Placement {
            name: format!("cannery-{tag}"),
            uuid,
            title: None,
            owner: Owner {
                coordinator: "0a1b".to_owned(),
                job_id: 7,
                attempt: 1,
                state_dir: PathBuf::from("/var/lib/cannery"),
            },
            mac: Mac::of_machine(uuid),
            network: NetworkAttachment::Slot {
                network: "cannery".to_owned(),
                tap: "cannery0-3".to_owned(),
            },
            overlay: folder.join("overlay.qcow2"),
            backing: vec![Backing {
                path: PathBuf::from("/var/lib/cannery/store/disks/sha256-aa/disk.qcow2"),
                format: Format::Qcow2,
            }],
            kernel: None,
            initrd: None,
            nvram: folder.join("nvram.fd"),
            serial_log: folder.join("serial.log"),
            seed: None,
            credentials: vec![FwCfgEntry {
                name: "ssh.authorized_keys.root".to_owned(),
                path: folder.join("credentials/keys"),
            }],
        }
    }

    #[test]
    fn a_mac_is_written_and_read() {
        let mac = Mac::of_address(Ipv4Addr::new(10, 0, 255, 2));
        assert_eq!(mac.to_string(), "52:54:0a:00:ff:02");
        assert_eq!(mac.to_string().parse(), Ok(mac));
        for bad in [
            "",
            "52:54:00:00:00",
            "52:54:00:00:00:00:00",
            "52:54:00:00:00:0",
            "52:54:00:00:00:+1",
            "zz:54:00:00:00:00",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_machines_mac_is_its_own_and_stays() {
        let [one, two] = [1, 2].map(|n| Mac::of_machine(Uuid::from_u128(n)));
        assert_ne!(one, two);
        assert_eq!(one, Mac::of_machine(Uuid::from_u128(1)));
        assert!(one.to_string().starts_with("52:54:00:"));
    }
}
