//! A machine's domain XML, from its description and its placement.

use std::path::PathBuf;

use super::super::description::{self, Accelerator, Arch, Boot, CpuMode, Description, Firmware};
use super::super::placement::{Owner, Placement};
use super::devices::{self, path};
use super::{Node, OWNER_NAMESPACE, node};

/// Prefix of the fw_cfg names under which systemd (from 252 on) looks for credentials.
const CREDENTIAL_PREFIX: &str = "opt/io.systemd.credentials/";

/// Longest fw_cfg name that QEMU takes, in bytes.
const FW_CFG_NAME_MAX: usize = 55;

/// Why a machine cannot be written down.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The hardware does not fit together.
    #[error(transparent)]
    Description(#[from] description::Error),
    /// A text cannot stand in XML.
    #[error(transparent)]
    Xml(#[from] super::Error),
    /// A path that libvirt cannot take.
    #[error("the path {} cannot be given to libvirt, which takes absolute UTF-8 paths", .0.display())]
    Path(PathBuf),
    /// Description and placement disagree about a part.
    #[error("{0} has to be in both the machine's description and its placement, or in neither")]
    Unplaced(&'static str),
    /// A credential's name is unusable.
    #[error("{0:?} cannot be the name of a credential: ASCII letters, digits, '.', '-' and '_', at most {most} of them", most = FW_CFG_NAME_MAX - CREDENTIAL_PREFIX.len())]
    Credential(String),
}

/// Writes a machine as libvirt domain XML. Pure: the same two values give the same bytes.
///
/// What happens to the machine at its end, and why:
/// * power-off: the domain ends; to cannery a machine that is gone in mid-job is a lost machine;
/// * reboot: the domain ends as well. A guest that came back would have lost the script's process and answered
///   as if nothing had happened;
/// * crash: the domain stays, stopped, in state *crashed*, so that whoever looks next can tell a kernel panic
///   from a killed QEMU. Whoever finds it destroys it.
///
/// # Errors
/// An unfit description, a path or text that cannot stand in the document.
pub fn render(description: &Description, placement: &Placement) -> Result<String, Error> {
    description.check()?;
    let memory = || description.memory_mib.to_string();
    let domain = node_of(description)
        .child(node("name").text(&placement.name))
        .child(node("uuid").text(placement.uuid.to_string()))
        // A generation of its own for each machine: a resumed guest sees it change and reseeds its random numbers.
        .child(node("genid").text(placement.uuid.to_string()))
        .children(placement.title.as_ref().map(|title| node("title").text(title)))
        .child(node("metadata").child(owner(&placement.owner)?))
        .child(node("memory").with("unit", "MiB").text(memory()))
        .child(node("currentMemory").with("unit", "MiB").text(memory()))
        .child(
            node("vcpu")
                .with("placement", "static")
                .text(description.cpus.to_string()),
        )
        .children(credentials(placement)?)
        .child(operating_system(description, placement)?)
        .child(features(description))
        .child(cpu(description))
        .child(clock(description))
        .child(node("on_poweroff").text("destroy"))
        .child(node("on_reboot").text("destroy"))
        .child(node("on_crash").text("preserve"))
        .children(sleep(description))
        .child(devices::all(description, placement)?);
    Ok(domain.render()?)
}

/// The root, still empty.
pub(super) fn node_of(description: &Description) -> Node {
    node("domain").with("type", description.accelerator.domain_type())
}

/// Reads the owner back from what [`render`] put into `<metadata>`; `None` where the element is not ours or not whole.
pub fn read_owner(metadata: &Node) -> Option<Owner> {
    let of_ours = |name: &str| {
        let local = metadata.name.rsplit(':').next()?;
        (local == "machine").then(|| metadata.attribute(name))?
    };
    Some(Owner {
        coordinator: of_ours("coordinator")?.to_owned(),
        job_id: of_ours("job")?.parse().ok()?,
        attempt: of_ours("attempt")?.parse().ok()?,
        state_dir: PathBuf::from(of_ours("state")?),
    })
}

fn owner(owner: &Owner) -> Result<Node, Error> {
    Ok(node("cannery:machine")
        .with("xmlns:cannery", OWNER_NAMESPACE)
        .with("coordinator", &owner.coordinator)
        .with("job", owner.job_id.to_string())
        .with("attempt", owner.attempt.to_string())
        .with("state", path(&owner.state_dir)?))
}

fn credentials(placement: &Placement) -> Result<Option<Node>, Error> {
    if placement.credentials.is_empty() {
        return Ok(None);
    }
    let mut block = node("sysinfo").with("type", "fwcfg");
    for entry in &placement.credentials {
        let plain = !entry.name.is_empty()
            && entry
                .name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
        let name = format!("{CREDENTIAL_PREFIX}{}", entry.name);
        if !plain || name.len() > FW_CFG_NAME_MAX {
            return Err(Error::Credential(entry.name.clone()));
        }
        block = block.child(node("entry").with("name", name).with("file", path(&entry.path)?));
    }
    Ok(Some(block))
}

fn operating_system(description: &Description, placement: &Placement) -> Result<Node, Error> {
    let mut os = node("os");
    if let Firmware::Uefi { .. } = description.firmware {
        os = os.with("firmware", "efi");
    }
    os = os.child(
        node("type")
            .with("arch", description.arch.name())
            .with("machine", &description.machine_type)
            .text("hvm"),
    );
    if let Firmware::Uefi { secure_boot } = description.firmware {
        let wanted = if secure_boot { "yes" } else { "no" };
        let feature = |name: &str| node("feature").with("enabled", wanted).with("name", name);
        os = os
            .child(
                node("firmware")
                    .child(feature("enrolled-keys"))
                    .child(feature("secure-boot")),
            )
            // In the job's folder: under its own name libvirt would keep the variables for the next machine so called.
            .child(node("nvram").text(path(&placement.nvram)?));
    }
    match (&description.boot, &placement.kernel, &placement.initrd) {
        (Boot::Disk, None, None) => {}
        (Boot::Kernel { cmdline }, Some(kernel), initrd) => {
            os = os.child(node("kernel").text(path(kernel)?));
            if let Some(initrd) = initrd {
                os = os.child(node("initrd").text(path(initrd)?));
            }
            if !cmdline.is_empty() {
                os = os.child(node("cmdline").text(cmdline));
            }
        }
        _ => return Err(Error::Unplaced("the kernel")),
    }
    // No `<boot dev>`: the root disk carries its order itself.
    Ok(os)
}

pub(super) fn features(description: &Description) -> Node {
    // `<acpi/>` always: without it libvirt passes an option that newer QEMUs no longer know.
    let mut features = node("features").child(node("acpi"));
    if description.arch == Arch::X86_64 {
        features = features
            .child(node("apic"))
            // VMware's back door port; no guest of ours has a use for it.
            .child(node("vmport").with("state", "off"));
        if let Firmware::Uefi { secure_boot: true } = description.firmware {
            features = features.child(node("smm").with("state", "on"));
        }
    } else {
        features = features.child(node("gic").with("version", "3"));
    }
    features
}

pub(super) fn cpu(description: &Description) -> Node {
    let topology = node("topology")
        .with("sockets", "1")
        .with("dies", "1")
        .with("cores", description.cpus.to_string())
        .with("threads", "1");
    match &description.cpu {
        CpuMode::HostPassthrough => node("cpu")
            .with("mode", "host-passthrough")
            .with("check", "none")
            .with("migratable", "on")
            .child(topology),
        CpuMode::HostModel => node("cpu")
            .with("mode", "host-model")
            .with("check", "partial")
            .child(topology),
        CpuMode::Maximum => {
            let cpu = node("cpu")
                .with("mode", "maximum")
                .with("check", "none")
                .with("migratable", "on")
                .child(topology);
            let five_levels =
                description.arch == Arch::X86_64 && description.accelerator == Accelerator::Emulation;
            if five_levels {
                cpu.child(node("feature").with("policy", "disable").with("name", "la57"))
            } else {
                cpu
            }
        }
        CpuMode::Named(model) => node("cpu")
            .with("mode", "custom")
            .with("match", "exact")
            .with("check", "partial")
            .child(node("model").with("fallback", "forbid").text(model))
            .child(topology),
    }
}

/// Clock in UTC; the timers are the ones that lose the fewest ticks on a busy host.
pub(super) fn clock(description: &Description) -> Node {
    let clock = node("clock").with("offset", "utc");
    match description.arch {
        Arch::Aarch64 => clock,
        Arch::X86_64 => clock.children([
            node("timer").with("name", "rtc").with("tickpolicy", "catchup"),
            node("timer").with("name", "pit").with("tickpolicy", "delay"),
            node("timer").with("name", "hpet").with("present", "no"),
        ]),
    }
}

/// No suspend: a guest that went to sleep would look like a dead one. Only x86 has the switches.
fn sleep(description: &Description) -> Option<Node> {
    (description.arch == Arch::X86_64).then(|| {
        node("pm")
            .child(node("suspend-to-mem").with("enabled", "no"))
            .child(node("suspend-to-disk").with("enabled", "no"))
    })
}

#[cfg(test)]
pub(in crate::machine) mod tests;
