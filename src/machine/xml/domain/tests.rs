use std::path::Path;
use std::process::Command;

use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::machine::description::tests::{arm, ordinary};
use crate::machine::description::{DiskBus, Graphics, NicModel};
use crate::machine::placement::tests::place;
use crate::machine::placement::{Backing, Format, FwCfgEntry, Mac, NetworkAttachment};

fn kernel_boot() -> (Description, Placement) {
    let description = Description {
        boot: Boot::Kernel {
            cmdline: "console=ttyS0 panic=-1".to_owned(),
        },
        seed_disk: true,
        ..ordinary()
    };
    let placement = Placement {
        kernel: Some(PathBuf::from("/job/vmlinuz")),
        initrd: Some(PathBuf::from("/job/initrd")),
        seed: Some(PathBuf::from("/job/seed.img")),
        title: Some("group/project & <job>".to_owned()),
        ..place("k")
    };
    (description, placement)
}

/// Every combination that a setting can choose.
fn variants() -> Vec<(Description, Placement)> {
    let mut all = vec![kernel_boot()];
    for description in [ordinary(), arm()] {
        for disk_bus in [DiskBus::Virtio, DiskBus::Scsi, DiskBus::Sata] {
            for nic_model in [None, Some(NicModel::Virtio), Some(NicModel::E1000e)] {
                for graphics in [Graphics::None, Graphics::Spice] {
                    let description = Description {
                        disk_bus,
                        nic_model,
                        graphics,
                        seed_disk: true,
                        ..description.clone()
                    };
                    let placement = Placement {
                        seed: Some(PathBuf::from("/job/seed.img")),
                        ..place("v")
                    };
                    if description.check().is_ok() {
                        all.push((description, placement));
                    }
                }
            }
        }
    }
    for cpu in [
        CpuMode::HostModel,
        CpuMode::HostPassthrough,
        CpuMode::Named("EPYC".to_owned()),
    ] {
        let description = Description {
            cpu,
            accelerator: Accelerator::Kvm,
            firmware: Firmware::Uefi { secure_boot: true },
            ..ordinary()
        };
        all.push((description, place("c")));
    }
    all
}

/// Replaces what may differ between two machines of one description.
fn anonymous(xml: &str, placement: &Placement) -> String {
    xml.replace(&placement.name, "NAME")
        .replace(&placement.uuid.to_string(), "UUID")
        .replace(&placement.mac.to_string(), "MAC")
        .replace(
            &placement.overlay.parent().unwrap().display().to_string(),
            "FOLDER",
        )
}

#[test]
fn two_renderings_differ_in_name_uuid_mac_and_paths_only() {
    let (one, two) = (place("one"), place("another-longer-tag"));
    let [a, b] = [&one, &two].map(|placement| render(&ordinary(), placement).unwrap());
    assert_ne!(a, b);
    assert_eq!(anonymous(&a, &one), anonymous(&b, &two));
    for text in [
        one.name.as_str(),
        &one.uuid.to_string(),
        &one.mac.to_string(),
        "/jobs/one/",
    ] {
        assert!(a.contains(text) && !b.contains(text), "{text}");
    }
}

#[test]
fn every_pci_device_has_its_address() {
    // What libvirt would otherwise place: all controllers but the root and the absent USB, disks, cards, channels …
    let bears_address = |node: &Node| match node.name.as_str() {
        "disk" | "interface" | "channel" | "memballoon" | "rng" | "panic" => true,
        "video" => node.first("model").and_then(|m| m.attribute("type")) != Some("none"),
        "controller" => !matches!(node.attribute("model"), Some("pcie-root" | "none")),
        _ => false,
    };
    for (description, placement) in variants() {
        let tree = Node::parse(&render(&description, &placement).unwrap()).unwrap();
        let devices = &tree.first("devices").unwrap().children;
        let mut taken = Vec::new();
        for device in devices.iter().filter(|device| bears_address(device)) {
            let address = device.first("address").unwrap_or_else(|| panic!("{device:?}"));
            if address.attribute("type") != Some("virtio-serial") {
                assert!(!taken.contains(address), "{address:?} is used twice");
                taken.push(address.clone());
            }
        }
        assert!(taken.len() > 10);
    }
}

#[test]
fn nothing_of_the_store_is_relabelled() {
    let layer = |n: u8, format| Backing {
        path: PathBuf::from(format!("/store/{n}")),
        format,
    };
    let placement = Placement {
        backing: vec![layer(1, Format::Qcow2), layer(2, Format::Raw)],
        ..place("b")
    };
    let tree = Node::parse(&render(&ordinary(), &placement).unwrap()).unwrap();
    let disk = tree.at(&["devices", "disk"]).unwrap();
    let mut chain = Vec::new();
    let mut here = disk.first("backingStore").unwrap();
    while let Some(source) = here.first("source") {
        let label = source.first("seclabel").unwrap();
        assert_eq!(label.attribute("model"), Some("dac"));
        assert_eq!(label.attribute("relabel"), Some("no"));
        let format = here.first("format").unwrap().attribute("type").unwrap();
        chain.push((source.attribute("file").unwrap(), format));
        here = here.first("backingStore").unwrap();
    }
    assert_eq!(chain, [("/store/1", "qcow2"), ("/store/2", "raw")]);
    // The chain is closed, so that libvirt does not look for more.
    assert_eq!(here, &node("backingStore"));
}

#[test]
fn the_owner_is_read_back() {
    let placement = place("o");
    let tree = Node::parse(&render(&ordinary(), &placement).unwrap()).unwrap();
    let metadata = tree.at(&["metadata", "cannery:machine"]).unwrap();
    assert_eq!(read_owner(metadata), Some(placement.owner));
    assert_eq!(read_owner(&node("cannery:machine").with("job", "x")), None);
    assert_eq!(read_owner(&node("other:thing")), None);
}

#[test]
fn halves_that_do_not_match_are_refused() {
    let (description, placement) = kernel_boot();
    let refused = [
        (ordinary(), placement.clone()),
        (description.clone(), place("x")),
        (
            Description {
                seed_disk: true,
                ..ordinary()
            },
            place("x"),
        ),
        (
            description,
            Placement {
                seed: None,
                ..placement
            },
        ),
    ];
    for (description, placement) in refused {
        let error = render(&description, &placement).unwrap_err();
        assert!(matches!(error, Error::Unplaced(_)), "{error}");
    }
}

#[test]
fn strangers_cannot_write_xml() {
    let (description, placement) = kernel_boot();
    let cmdline = "a=\"<>&'</cmdline><devices>".to_owned();
    let boot = Boot::Kernel {
        cmdline: cmdline.clone(),
    };
    let xml = render(
        &Description {
            boot,
            ..description.clone()
        },
        &placement,
    )
    .unwrap();
    let tree = Node::parse(&xml).unwrap();
    assert_eq!(tree.at(&["os", "cmdline"]).unwrap().text, cmdline);
    assert_eq!(tree.first("title").unwrap().text, "group/project & <job>");
    assert_eq!(tree.all("devices").count(), 1);

    let boot = Boot::Kernel {
        cmdline: "a\nb".to_owned(),
    };
    assert!(render(&Description { boot, ..description }, &placement).is_err());
    let relative = Placement {
        overlay: PathBuf::from("overlay"),
        ..place("x")
    };
    assert!(matches!(render(&ordinary(), &relative), Err(Error::Path(_))));
    for name in ["", "a/b", "a b", &"x".repeat(29)] {
        let entry = FwCfgEntry {
            name: name.to_owned(),
            path: PathBuf::from("/k"),
        };
        let placement = Placement {
            credentials: vec![entry],
            ..place("x")
        };
        assert!(
            matches!(render(&ordinary(), &placement), Err(Error::Credential(_))),
            "{name}"
        );
    }
}

#[test]
fn a_foreign_network_gets_no_tap_of_ours() {
    let placement = Placement {
        network: NetworkAttachment::Named("office".to_owned()),
        ..place("f")
    };
    let tree = Node::parse(&render(&ordinary(), &placement).unwrap()).unwrap();
    let card = tree.at(&["devices", "interface"]).unwrap();
    assert_eq!(card.first("target"), None);
    assert_eq!(card.first("source").unwrap().attribute("network"), Some("office"));
}

proptest! {
    #[test]
    fn any_text_stays_where_it_was_put(title in "\\PC{1,60}", name in "[^\\p{C}\\s]{1,30}") {
        let placement = Placement { title: Some(title.clone()), name: name.clone(), ..place("p") };
        let tree = Node::parse(&render(&ordinary(), &placement).unwrap()).unwrap();
        prop_assert_eq!(&tree.first("title").unwrap().text, title.trim());
        prop_assert_eq!(&tree.first("name").unwrap().text, &name);
        prop_assert_eq!(tree.children.len(), Node::parse(&render(&ordinary(), &Placement {
            title: Some("t".to_owned()), ..place("q") }).unwrap()).unwrap().children.len());
    }
}

/// The golden file is what a reviewer reads; whoever changes the rendering changes it too, by hand.
#[test]
fn the_arm_machine_is_the_one_on_file() {
    let placement = Placement {
        uuid: Uuid::from_u128(7),
        mac: Mac::of_machine(Uuid::from_u128(7)),
        ..place("arm")
    };
    let xml = render(&arm(), &placement).unwrap();
    assert_eq!(xml, include_str!("aarch64.xml"), "{xml}");
}

#[test]
#[ignore = "needs virt-xml-validate (libvirt-clients)"]
fn libvirts_schema_accepts_every_variant() {
    let folder = tempfile::tempdir().unwrap();
    for (n, (description, placement)) in variants().into_iter().enumerate() {
        let file = folder.path().join(format!("{n}.xml"));
        std::fs::write(&file, render(&description, &placement).unwrap()).unwrap();
        assert_valid(&file, "domain");
    }
}

pub(in crate::machine) fn assert_valid(file: &Path, schema: &str) {
    let output = Command::new("virt-xml-validate")
        .arg(file)
        .arg(schema)
        .output()
        .unwrap();
    let xml = std::fs::read_to_string(file).unwrap();
    assert!(
        output.status.success(),
        "{}\n{xml}",
        String::from_utf8_lossy(&output.stderr)
    );
}
