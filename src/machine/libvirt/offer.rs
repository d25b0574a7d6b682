//! What the host's hypervisor can do.

use serde::{Deserialize, Serialize};
use virt::error::ErrorNumber;

use super::super::description::{Accelerator, Arch};
use super::super::xml::Node;
use super::{Error, Libvirt, QUERY_DEADLINE, is};

/// Who answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// libvirt daemon's version, `9.0.0`.
    pub libvirt: String,
    /// Hypervisor's name, `QEMU`.
    pub hypervisor: String,
    /// Hypervisor's version, `7.2.22`.
    pub hypervisor_version: String,
}

/// What a machine of one architecture and accelerator can be on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// Newest machine type of ours, versioned.
    pub machine_type: String,
    /// Most virtual CPUs.
    pub max_cpus: u32,
    /// Whether there is UEFI firmware.
    pub uefi: bool,
    /// Whether there is UEFI firmware with Secure Boot.
    pub secure_boot: bool,
}

impl Libvirt {
    /// Versions of libvirt and of the hypervisor behind it.
    ///
    /// # Errors
    /// Where libvirt cannot be asked.
    pub async fn version(&self) -> Result<Versions, Error> {
        self.call("tell its version".to_owned(), QUERY_DEADLINE, |connection| {
            Ok(Versions {
                libvirt: dotted(connection.lib_version()?),
                hypervisor: connection.driver_type()?,
                hypervisor_version: dotted(connection.hyp_version()?),
            })
        })
        .await
    }

    /// What the host offers for that architecture and accelerator; `None` where it cannot do it at all (no QEMU of
    /// that architecture, no KVM).
    ///
    /// # Errors
    /// Where libvirt cannot be asked or its answer not be read.
    pub async fn offer(&self, arch: Arch, accelerator: Accelerator) -> Result<Option<Offer>, Error> {
        let answer = self
            .call(
                "tell what it can do".to_owned(),
                QUERY_DEADLINE,
                move |connection| {
                    let capabilities = connection.domain_capabilities(
                        None,
                        Some(arch.name()),
                        Some(arch.machine_alias()),
                        Some(accelerator.domain_type()),
                        0,
                    );
                    let none = [
                        ErrorNumber::InvalidArg,
                        ErrorNumber::ConfigUnsupported,
                        ErrorNumber::NoSupport,
                    ];
                    match capabilities {
                        Err(error) if none.iter().any(|number| is(&error, *number)) => Ok(None),
                        result => result.map(Some),
                    }
                },
            )
            .await?;
        answer.as_deref().map(parse).transpose()
    }
}

/// libvirt packs a version into one number: a million for the first part, a thousand for the second.
fn dotted(packed: u32) -> String {
    format!(
        "{}.{}.{}",
        packed / 1_000_000,
        packed / 1_000 % 1_000,
        packed % 1_000
    )
}

fn parse(capabilities: &str) -> Result<Offer, Error> {
    let tree = Node::parse(capabilities).map_err(|error| Error::Answer(error.to_string()))?;
    let missing = |what: &str| Error::Answer(format!("its capabilities name no {what}"));
    let values = |path: &[&str], name: &str| -> Vec<String> {
        tree.at(path)
            .into_iter()
            .flat_map(|node| node.all("enum"))
            .filter(|list| list.attribute("name") == Some(name))
            .flat_map(|list| list.all("value"))
            .map(|value| value.text.clone())
            .collect()
    };
    let uefi = values(&["os"], "firmware").iter().any(|value| value == "efi");
    Ok(Offer {
        machine_type: tree
            .first("machine")
            .map(|machine| machine.text.clone())
            .filter(|name| !name.is_empty())
            .ok_or_else(|| missing("machine type"))?,
        max_cpus: tree
            .first("vcpu")
            .and_then(|vcpu| vcpu.attribute("max"))
            .and_then(|max| max.parse().ok())
            .ok_or_else(|| missing("number of CPUs"))?,
        uefi,
        secure_boot: uefi
            && values(&["os", "loader"], "secure")
                .iter()
                .any(|value| value == "yes"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPABILITIES: &str =
        "<domainCapabilities><path>/usr/bin/qemu-system-x86_64</path><domain>qemu</domain>
        <machine>pc-q35-7.2</machine><arch>x86_64</arch><vcpu max='288'/>
        <os supported='yes'><enum name='firmware'><value>efi</value></enum>
        <loader supported='yes'><value>/usr/share/OVMF/OVMF_CODE.fd</value>
        <enum name='secure'><value>yes</value><value>no</value></enum></loader></os></domainCapabilities>";

    #[test]
    fn capabilities_are_read() {
        let offer = parse(CAPABILITIES).unwrap();
        assert_eq!(offer.machine_type, "pc-q35-7.2");
        assert_eq!(offer.max_cpus, 288);
        assert!(offer.uefi && offer.secure_boot);
    }

    #[test]
    fn missing_firmware_is_seen() {
        let offer = parse(&CAPABILITIES.replace("<value>efi</value>", "")).unwrap();
        assert!(!offer.uefi && !offer.secure_boot);
        assert!(parse(&CAPABILITIES.replace("<machine>pc-q35-7.2</machine>", "")).is_err());
    }

    #[test]
    fn versions_are_unpacked() {
        assert_eq!(dotted(9_000_000), "9.0.0");
        assert_eq!(dotted(7_002_022), "7.2.22");
    }
}
