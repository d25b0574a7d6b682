//! Hardware virtualisation or emulation: decided by what was seen, not by what seems to be there.
//!
//! `/dev/kvm` and libvirt's word do not mean that KVM works: on some nested hosts a guest's kernel hangs for ever right
//! after its first instructions. So KVM is used where it was *seen* to boot a guest on this very combination of kernel,
//! QEMU and KVM module. Where nothing was seen yet, the caller tries it once with a short deadline and tells
//! [`remember`] how it went.

use std::fmt;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::description::Accelerator;
use crate::record::write_atomic;

/// KVM's device.
const DEVICE: &str = "/dev/kvm";
/// KVM's vendor modules, which is where hosts differ.
const MODULES: [&str; 3] = ["kvm_intel", "kvm_amd", "kvm_pvm"];
/// Name of the memory in the state folder.
const MEMORY: &str = "accelerator.json";
/// Version of its form; another one counts as nothing seen.
const VERSION: u32 = 1;

/// What the operator wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// KVM where it works.
    Auto,
    /// KVM; the operator knows that it works.
    Kvm,
    /// Emulation.
    Emulation,
}

/// What is the case on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// KVM's device file.
    pub device: Device,
    /// Whether libvirt offers KVM for the architecture ([`Libvirt::offer`](super::Libvirt::offer)).
    pub offered: bool,
    /// What was seen on this combination.
    pub seen: Option<Seen>,
}

/// State of `/dev/kvm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// There, and a group may use it.
    Usable,
    /// Not there.
    Missing,
    /// There for root alone. QEMU, which runs as a user of its own, could not open it; besides, libvirt then asks QEMU
    /// for its abilities anew at every start, which takes minutes instead of half a second.
    RootOnly,
}

/// What came of a guest under KVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Seen {
    /// It booted.
    Booted,
    /// It was started and never answered, while emulation would have.
    Hung,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Use this.
    Use(Accelerator, Because),
    /// Start under KVM with a short deadline; remember how it went; where it hung, start again under emulation.
    Trial,
}

/// Why, for the operator's eyes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Because {
    /// The settings say so.
    Settings,
    /// There is no device.
    NoDevice,
    /// QEMU's user cannot open the device.
    RootOnly,
    /// libvirt does not offer KVM.
    NotOffered,
    /// A guest was seen to boot.
    Booted,
    /// A guest was seen to hang.
    Hung,
}

impl fmt::Display for Because {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Because::Settings => "the settings say so",
            Because::NoDevice => "this host has no /dev/kvm",
            Because::RootOnly => "/dev/kvm is for root alone; it should be root:kvm with mode 0660",
            Because::NotOffered => "libvirt does not offer KVM for this architecture",
            Because::Booted => "a guest was seen to boot under KVM",
            Because::Hung => "a guest was seen to hang under KVM",
        })
    }
}

/// Decides. Pure.
pub fn decide(policy: Policy, facts: &Facts) -> Decision {
    let emulate = |because| Decision::Use(Accelerator::Emulation, because);
    match (policy, facts.device, facts.offered, facts.seen) {
        (Policy::Emulation, ..) => emulate(Because::Settings),
        (Policy::Kvm, ..) => Decision::Use(Accelerator::Kvm, Because::Settings),
        (Policy::Auto, Device::Missing, ..) => emulate(Because::NoDevice),
        (Policy::Auto, Device::RootOnly, ..) => emulate(Because::RootOnly),
        (Policy::Auto, Device::Usable, false, _) => emulate(Because::NotOffered),
        (Policy::Auto, Device::Usable, true, Some(Seen::Hung)) => emulate(Because::Hung),
        (Policy::Auto, Device::Usable, true, Some(Seen::Booted)) => {
            Decision::Use(Accelerator::Kvm, Because::Booted)
        }
        (Policy::Auto, Device::Usable, true, None) => Decision::Trial,
    }
}

/// Looks at `/dev/kvm`.
pub fn device() -> Device {
    match std::fs::metadata(DEVICE) {
        Ok(about) if about.file_type().is_char_device() => judge_mode(about.mode()),
        _ => Device::Missing,
    }
}

/// QEMU's user is in the device's group or is anybody; both need read and write.
fn judge_mode(mode: u32) -> Device {
    if mode & 0o060 == 0o060 || mode & 0o006 == 0o006 {
        Device::Usable
    } else {
        Device::RootOnly
    }
}

/// The combination on which something was seen. A new kernel, QEMU or module is another one; a mere restart is not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Combination {
    /// Kernel release.
    pub kernel: String,
    /// QEMU's version, from [`Libvirt::version`](super::Libvirt::version).
    pub qemu: String,
    /// KVM's vendor module, if one can be told.
    pub module: Option<String>,
}

impl Combination {
    /// This host's, with the QEMU of that version.
    pub fn of_host(qemu: &str) -> Combination {
        let loaded = |name: &&&str| Path::new("/sys/module").join(name).exists();
        Combination {
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            qemu: qemu.to_owned(),
            module: MODULES.iter().find(loaded).map(|name| (*name).to_owned()),
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Memory {
    version: u32,
    on: Combination,
    seen: Seen,
}

/// The memory cannot be used; the operator's.
#[derive(Debug, thiserror::Error)]
#[error("{} cannot be used: {source}", path.display())]
pub struct Error {
    path: PathBuf,
    source: io::Error,
}

/// What was seen on this combination, if anything. A memory that is damaged or of another combination counts as none.
///
/// # Errors
/// The file is there and cannot be read.
pub fn recall(state_dir: &Path, on: &Combination) -> Result<Option<Seen>, Error> {
    let path = state_dir.join(MEMORY);
    match std::fs::read(&path) {
        Ok(text) => Ok(serde_json::from_slice::<Memory>(&text)
            .ok()
            .filter(|memory| memory.version == VERSION && memory.on == *on)
            .map(|memory| memory.seen)),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error { path, source }),
    }
}

/// Keeps what was seen, in place of whatever was kept before.
///
/// # Errors
/// The state folder cannot be written.
pub fn remember(state_dir: &Path, on: &Combination, seen: Seen) -> Result<(), Error> {
    let path = state_dir.join(MEMORY);
    let memory = Memory {
        version: VERSION,
        on: on.clone(),
        seen,
    };
    let written = serde_json::to_vec_pretty(&memory)
        .map_err(io::Error::from)
        .and_then(|text| write_atomic(&path, &text, 0o644));
    written.map_err(|source| Error { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvm_is_used_only_where_a_guest_booted_or_the_operator_says_so() {
        let mut kvm = Vec::new();
        for policy in [Policy::Auto, Policy::Kvm, Policy::Emulation] {
            for device in [Device::Usable, Device::Missing, Device::RootOnly] {
                for offered in [true, false] {
                    for seen in [None, Some(Seen::Booted), Some(Seen::Hung)] {
                        let facts = Facts {
                            device,
                            offered,
                            seen,
                        };
                        if let Decision::Use(Accelerator::Kvm, _) = decide(policy, &facts) {
                            kvm.push((policy, facts));
                        }
                    }
                }
            }
        }
        let booted = Facts {
            device: Device::Usable,
            offered: true,
            seen: Some(Seen::Booted),
        };
        let (auto, other): (Vec<_>, Vec<_>) =
            kvm.into_iter().partition(|(policy, _)| *policy == Policy::Auto);
        assert_eq!(auto, [(Policy::Auto, booted)]);
        assert!(other.iter().all(|(policy, _)| *policy == Policy::Kvm));
    }

    #[test]
    fn the_unknown_is_tried_and_only_there() {
        let facts = |device, offered, seen| Facts {
            device,
            offered,
            seen,
        };
        let auto = |facts| decide(Policy::Auto, &facts);
        assert_eq!(auto(facts(Device::Usable, true, None)), Decision::Trial);
        for (device, offered, seen, because) in [
            (Device::Missing, true, None, Because::NoDevice),
            (Device::RootOnly, true, Some(Seen::Booted), Because::RootOnly),
            (Device::Usable, false, None, Because::NotOffered),
            (Device::Usable, true, Some(Seen::Hung), Because::Hung),
        ] {
            let decision = Decision::Use(Accelerator::Emulation, because);
            assert_eq!(auto(facts(device, offered, seen)), decision);
        }
    }

    #[test]
    fn a_mode_tells_who_may_use_the_device() {
        for (mode, device) in [
            (0o20660, Device::Usable),
            (0o20666, Device::Usable),
            (0o20600, Device::RootOnly),
            (0o20640, Device::RootOnly),
        ] {
            assert_eq!(judge_mode(mode), device, "{mode:o}");
        }
    }

    #[test]
    fn what_was_seen_holds_for_its_combination_only() {
        let folder = tempfile::tempdir().unwrap();
        let here = Combination::of_host("7.2.22");
        assert!(!here.kernel.is_empty());
        assert_eq!(recall(folder.path(), &here).unwrap(), None);
        remember(folder.path(), &here, Seen::Hung).unwrap();
        assert_eq!(recall(folder.path(), &here).unwrap(), Some(Seen::Hung));
        remember(folder.path(), &here, Seen::Booted).unwrap();
        assert_eq!(recall(folder.path(), &here).unwrap(), Some(Seen::Booted));

        assert_eq!(
            recall(folder.path(), &Combination::of_host("8.0.0")).unwrap(),
            None
        );
        std::fs::write(folder.path().join(MEMORY), "{\"version\":1,").unwrap();
        assert_eq!(recall(folder.path(), &here).unwrap(), None);
        let error = remember(&folder.path().join("none"), &here, Seen::Hung).unwrap_err();
        assert!(
            error.to_string().contains("accelerator.json cannot be used"),
            "{error}"
        );
    }
}
