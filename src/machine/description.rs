//! The hardware that a guest can see, all of it.
//!
//! A [`Description`] together with a [`Placement`](super::placement::Placement) is rendered to domain XML by
//! [`xml::domain`](super::xml::domain). Nothing a guest can observe is left for libvirt to choose, because a guest that
//! is resumed later must find the very same machine; and nothing in it names a job, a path or a host resource, so
//! that the description can be part of a frozen state's key (it is serde-serialisable for that).

use serde::{Deserialize, Serialize};

/// Machine type names that follow the newest version. They are refused, since what they mean changes with a QEMU
/// update.
const ALIASES: [&str; 4] = ["q35", "pc", "virt", "ubuntu"];

/// Most virtual CPUs that a description may ask for; QEMU's own limit for q35 without an IOMMU.
const MAX_CPUS: u32 = 255;

/// Least memory in MiB: below it no firmware starts.
const MIN_MEMORY_MIB: u64 = 32;

/// A guest's hardware.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Description {
    /// Instruction set.
    pub arch: Arch,
    /// Versioned machine type, as [`Libvirt::offer`](super::libvirt::Libvirt::offer) reports it.
    pub machine_type: String,
    /// Hardware virtualisation or emulation.
    pub accelerator: Accelerator,
    /// Virtual CPUs, one socket.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// CPU model.
    pub cpu: CpuMode,
    /// Firmware.
    pub firmware: Firmware,
    /// What the root disk (and a seed disk) hang on.
    pub disk_bus: DiskBus,
    /// Network card; `None` for a machine without a network.
    pub nic_model: Option<NicModel>,
    /// What the firmware starts.
    pub boot: Boot,
    /// Whether a second, read-only disk with a cloud-init seed is there.
    pub seed_disk: bool,
    /// Whether there is a screen.
    pub graphics: Graphics,
}

/// Instruction set of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arch {
    /// 64-bit x86, machine q35.
    X86_64,
    /// 64-bit ARM, machine virt.
    Aarch64,
}

impl Arch {
    /// libvirt's and QEMU's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Arch::X86_64 => "x86_64",
            Arch::Aarch64 => "aarch64",
        }
    }

    /// The alias under which the newest machine type of ours is asked for.
    pub fn machine_alias(self) -> &'static str {
        match self {
            Arch::X86_64 => "q35",
            Arch::Aarch64 => "virt",
        }
    }
}

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accelerator {
    /// The host's CPU, through KVM.
    Kvm,
    /// QEMU's translator.
    Emulation,
}

impl Accelerator {
    /// libvirt's domain type.
    pub fn domain_type(self) -> &'static str {
        match self {
            Accelerator::Kvm => "kvm",
            Accelerator::Emulation => "qemu",
        }
    }
}

/// CPU model that a guest sees.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CpuMode {
    /// The host's own CPU; only with KVM.
    HostPassthrough,
    /// The named model nearest to the host's CPU, which libvirt expands at start.
    HostModel,
    /// Everything the accelerator can do. For emulation the sensible default: distributions built for x86-64-v2 or
    /// -v3 do not start on QEMU's own default model. Five-level paging is left out, since some guests' boot loaders
    /// hang on it under emulation.
    Maximum,
    /// One of libvirt's named models.
    Named(String),
}

/// Firmware of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Firmware {
    /// SeaBIOS; x86 only.
    Bios,
    /// OVMF or AAVMF, as libvirt's firmware selection finds it.
    Uefi {
        /// Whether Secure Boot is on, with the vendors' keys enrolled.
        secure_boot: bool,
    },
}

/// What a disk hangs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskBus {
    /// virtio-blk.
    Virtio,
    /// AHCI, for guests without virtio drivers; x86 only.
    Sata,
    /// virtio-scsi.
    Scsi,
}

/// Network card model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NicModel {
    /// virtio-net.
    Virtio,
    /// Intel 82574L, for guests without virtio drivers.
    E1000e,
}

impl NicModel {
    /// libvirt's name of it.
    pub fn name(self) -> &'static str {
        match self {
            NicModel::Virtio => "virtio",
            NicModel::E1000e => "e1000e",
        }
    }
}

/// What the firmware starts.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Boot {
    /// The root disk.
    Disk,
    /// A kernel that QEMU loads; its files stand in the placement.
    Kernel {
        /// Kernel command line.
        cmdline: String,
    },
}

/// Whether a machine has a screen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Graphics {
    /// No video card at all.
    None,
    /// A video card with a SPICE server that listens nowhere; only libvirt can hand out a connection to it.
    Spice,
}

/// Why a description cannot be a machine.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Two parts exclude each other.
    #[error("{0}")]
    Unfit(&'static str),
    /// A number is out of bounds.
    #[error("a machine cannot have {what} = {value}; it must be from {least} to {most}")]
    OutOfBounds {
        /// `cpus` or `memory`.
        what: &'static str,
        /// What was asked for.
        value: u64,
        /// Least.
        least: u64,
        /// Most.
        most: u64,
    },
    /// The machine type is an alias or of another family.
    #[error("machine type {0:?} is not a versioned {1} machine, such as the host reports")]
    MachineType(String, &'static str),
    /// The CPU model's name is no name.
    #[error("CPU model {0:?} has characters that no model's name has")]
    CpuName(String),
}

impl Description {
    /// Checks that the parts fit together.
    ///
    /// # Errors
    /// What does not fit, in one sentence. All of these are the operator's to mend (or the author's, where the job may
    /// choose the value).
    pub fn check(&self) -> Result<(), Error> {
        self.check_numbers()?;
        self.check_names()?;
        let unfit = match (self.arch, self.firmware) {
            (Arch::Aarch64, Firmware::Bios) => {
                Some("an aarch64 machine has no BIOS; its firmware must be uefi")
            }
            (Arch::Aarch64, Firmware::Uefi { secure_boot: true }) => Some(
                "an aarch64 machine cannot have Secure Boot: QEMU has no protected firmware memory for it",
            ),
            _ if self.arch == Arch::Aarch64 && self.disk_bus == DiskBus::Sata => {
                Some("an aarch64 machine has no SATA controller; its disk bus must be virtio or scsi")
            }
            _ if self.cpu == CpuMode::HostPassthrough && self.accelerator == Accelerator::Emulation => {
                Some("cpu mode host-passthrough needs KVM, and this machine is emulated")
            }
            _ => None,
        };
        unfit.map_or(Ok(()), |why| Err(Error::Unfit(why)))
    }

    fn check_numbers(&self) -> Result<(), Error> {
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(Error::OutOfBounds {
                what: "cpus",
                value: self.cpus.into(),
                least: 1,
                most: MAX_CPUS.into(),
            });
        }
        // The upper bound only keeps libvirt's arithmetic in KiB safe; the operator's maximum is far below it.
        let most = u64::MAX >> 24;
        if !(MIN_MEMORY_MIB..=most).contains(&self.memory_mib) {
            return Err(Error::OutOfBounds {
                what: "memory (MiB)",
                value: self.memory_mib,
                least: MIN_MEMORY_MIB,
                most,
            });
        }
        Ok(())
    }

    fn check_names(&self) -> Result<(), Error> {
        let family = self.arch.machine_alias();
        let plain = |name: &str| {
            !name.is_empty()
                && name
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
        };
        let versioned = plain(&self.machine_type)
            && !ALIASES.contains(&self.machine_type.as_str())
            && self.machine_type.contains(family);
        if !versioned {
            return Err(Error::MachineType(self.machine_type.clone(), family));
        }
        match &self.cpu {
            CpuMode::Named(name) if !plain(name) => Err(Error::CpuName(name.clone())),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
pub(in crate::machine) mod tests {
    use super::*;

    /// An ordinary x86 machine.
    pub(in crate::machine) fn ordinary() -> Description {
        Description {
            arch: Arch::X86_64,
            machine_type: "pc-q35-7.2".to_owned(),
            accelerator: Accelerator::Emulation,
            cpus: 2,
            memory_mib: 512,
            cpu: CpuMode::Maximum,
            firmware: Firmware::Bios,
            disk_bus: DiskBus::Virtio,
            nic_model: Some(NicModel::Virtio),
            boot: Boot::Disk,
            seed_disk: false,
            graphics: Graphics::Spice,
        }
    }

    /// An ordinary ARM machine.
    pub(in crate::machine) fn arm() -> Description {
        Description {
            arch: Arch::Aarch64,
            machine_type: "virt-7.2".to_owned(),
            firmware: Firmware::Uefi { secure_boot: false },
            ..ordinary()
        }
    }

    #[test]
    fn ordinary_machines_fit() {
        assert_eq!(ordinary().check(), Ok(()));
        assert_eq!(arm().check(), Ok(()));
    }

    #[test]
    fn misfits_are_refused_each_with_its_reason() {
        let cases: [(&str, Description); 9] = [
            (
                "no BIOS",
                Description {
                    firmware: Firmware::Bios,
                    ..arm()
                },
            ),
            (
                "Secure Boot",
                Description {
                    firmware: Firmware::Uefi { secure_boot: true },
                    ..arm()
                },
            ),
            (
                "no SATA",
                Description {
                    disk_bus: DiskBus::Sata,
                    ..arm()
                },
            ),
            (
                "needs KVM",
                Description {
                    cpu: CpuMode::HostPassthrough,
                    ..ordinary()
                },
            ),
            (
                "cpus = 0",
                Description {
                    cpus: 0,
                    ..ordinary()
                },
            ),
            (
                "memory (MiB) = 1;",
                Description {
                    memory_mib: 1,
                    ..ordinary()
                },
            ),
            (
                "\"q35\" is not a versioned",
                Description {
                    machine_type: "q35".to_owned(),
                    ..ordinary()
                },
            ),
            (
                "\"pc-i440fx-7.2\"",
                Description {
                    machine_type: "pc-i440fx-7.2".to_owned(),
                    ..ordinary()
                },
            ),
            (
                "CPU model",
                Description {
                    cpu: CpuMode::Named("a'b".to_owned()),
                    ..ordinary()
                },
            ),
        ];
        for (part, description) in cases {
            let error = description.check().unwrap_err().to_string();
            assert!(error.contains(part), "{error} does not say {part}");
        }
    }
}
