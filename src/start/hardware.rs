//! From settings, image and host to the description of a machine. Pure.

use crate::image::{self, Disk};
use crate::job::Granted;
use crate::machine::Libvirt;
use crate::machine::description::{
    self, Accelerator, Arch, Boot, CpuMode, Description, DiskBus, Firmware, Graphics, NicModel,
};
use crate::outcome::Failure;
use crate::settings::{MachineSettings, file};

/// What decides a machine's hardware.
#[derive(Debug, Clone, Copy)]
pub struct Hardware<'a> {
    /// What the host can do.
    pub libvirt: &'a Libvirt,
    /// The operator's settings for the image.
    pub settings: &'a MachineSettings,
    /// What the job was granted.
    pub granted: &'a Granted,
    /// The image.
    pub disk: &'a Disk,
}

/// This host's architecture.
///
/// # Errors
/// On one that cannery has no description for.
pub fn host_arch() -> Result<Arch, Failure> {
    match std::env::consts::ARCH {
        "x86_64" => Ok(Arch::X86_64),
        "aarch64" => Ok(Arch::Aarch64),
        other => Err(
            Failure::system(format!("cannery has no machine for hosts of the kind {other}"))
                .hint("Use an x86-64 or an ARM host"),
        ),
    }
}

/// The command line of a kernel whose image brings none: the disk's only file system, and a log on the serial port.
fn default_cmdline(arch: Arch) -> &'static str {
    match arch {
        Arch::X86_64 => "root=/dev/vda rw console=ttyS0",
        Arch::Aarch64 => "root=/dev/vda rw console=ttyAMA0",
    }
}

impl Hardware<'_> {
    /// Describes the machine, with the newest machine type of this host unless the settings name one.
    pub async fn describe(&self, accelerator: Accelerator) -> Result<Description, Failure> {
        let arch = host_arch()?;
        let offer = self.libvirt.offer(arch, accelerator).await?;
        let offer = offer.ok_or_else(|| {
            Failure::system(format!("libvirt on this host offers no {} machines of the type {}", arch.name(), accelerator.domain_type()))
                .hint("Install QEMU for this architecture; for KVM, see whether /dev/kvm is there and its group is kvm")
        })?;
        describe(self, arch, &offer.machine_type, accelerator)
    }
}

/// The description, from facts alone.
///
/// What does not fit together is the operator's to mend: all that a job or an image may choose was checked before.
fn describe(
    wanted: &Hardware<'_>,
    arch: Arch,
    newest: &str,
    accelerator: Accelerator,
) -> Result<Description, Failure> {
    let Hardware {
        settings,
        granted,
        disk,
        ..
    } = *wanted;
    let firmware = match (settings.firmware, disk.hints.firmware, arch) {
        (Some(file::Firmware::Uefi), ..)
        | (None, Some(image::Firmware::Uefi), _)
        | (None, None, Arch::Aarch64) => Firmware::Uefi { secure_boot: false },
        _ => Firmware::Bios,
    };
    let cpu = match settings.cpu.as_deref() {
        None if accelerator == Accelerator::Kvm => CpuMode::HostModel,
        None | Some("maximum") => CpuMode::Maximum,
        Some("host-model") => CpuMode::HostModel,
        Some("host-passthrough") => CpuMode::HostPassthrough,
        Some(name) => CpuMode::Named(name.to_owned()),
    };
    let boot = match &disk.boot {
        None => Boot::Disk,
        Some(boot) => Boot::Kernel {
            cmdline: boot
                .cmdline
                .clone()
                .unwrap_or_else(|| default_cmdline(arch).to_owned()),
        },
    };
    let description = Description {
        arch,
        machine_type: settings.machine_type.clone().unwrap_or_else(|| newest.to_owned()),
        accelerator,
        cpus: granted.cpus,
        memory_mib: granted.memory.to_mib(),
        cpu,
        firmware,
        disk_bus: disk_bus(settings, disk, arch),
        nic_model: Some(nic(settings, disk)),
        boot,
        seed_disk: true,
        graphics: Graphics::Spice,
    };
    description.check().map_err(|e: description::Error| {
        Failure::system(format!("the machine cannot be described: {e}"))
            .hint("Correct the machine table in the settings")
    })?;
    Ok(description)
}

/// The operator's word before the image's; of an image nothing is taken that its machine cannot have.
fn disk_bus(settings: &MachineSettings, disk: &Disk, arch: Arch) -> DiskBus {
    match (settings.disk_bus, disk.hints.disk_bus) {
        (Some(file::DiskBus::Virtio), _) | (None, None | Some(image::DiskBus::Virtio)) => DiskBus::Virtio,
        (Some(file::DiskBus::Scsi), _) | (None, Some(image::DiskBus::Scsi)) => DiskBus::Scsi,
        (Some(file::DiskBus::Sata), _) => DiskBus::Sata,
        (None, Some(image::DiskBus::Sata)) if arch == Arch::X86_64 => DiskBus::Sata,
        (None, Some(image::DiskBus::Sata)) => DiskBus::Virtio,
    }
}

fn nic(settings: &MachineSettings, disk: &Disk) -> NicModel {
    match (settings.nic, disk.hints.nic) {
        (Some(file::Nic::E1000e), _) | (None, Some(image::Nic::E1000e)) => NicModel::E1000e,
        _ => NicModel::Virtio,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::image::{Digest, DiskFormat, Hints};
    use crate::settings::{self, Settings, Sources};

    fn settings(text: &str) -> MachineSettings {
        let path = Path::new("/etc/cannery/cannery.toml");
        let settings = Settings::resolve(settings::parse(text, path).unwrap(), path, &Sources::default());
        settings.unwrap().machine("r/vm:1")
    }

    #[test]
    fn an_image_chooses_only_where_the_operator_has_not() {
        let disk = |disk_bus, nic| Disk {
            reference: "r/vm:1".to_owned(),
            digest: Digest::of(b""),
            path: "/disk".into(),
            format: DiskFormat::Raw,
            image_format: None,
            lease: None,
            virtual_size: 1 << 20,
            boot: None,
            hints: Hints {
                disk_bus,
                nic,
                ..Hints::default()
            },
            fetched_bytes: 0,
            from_cache: true,
        };
        let silent = disk(None, None);
        let old = disk(Some(image::DiskBus::Sata), Some(image::Nic::E1000e));
        let open = settings("");
        let fixed = settings("[machine]\ndisk_bus = \"scsi\"\nnic = \"virtio\"");
        for (settings, disk, arch, hardware) in [
            (&open, &silent, Arch::X86_64, (DiskBus::Virtio, NicModel::Virtio)),
            (&open, &old, Arch::X86_64, (DiskBus::Sata, NicModel::E1000e)),
            (&open, &old, Arch::Aarch64, (DiskBus::Virtio, NicModel::E1000e)),
            (&fixed, &old, Arch::X86_64, (DiskBus::Scsi, NicModel::Virtio)),
            (&fixed, &silent, Arch::X86_64, (DiskBus::Scsi, NicModel::Virtio)),
        ] {
            assert_eq!((disk_bus(settings, disk, arch), nic(settings, disk)), hardware);
        }
    }
}
