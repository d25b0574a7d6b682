//! Machines that somebody keeps become images, and images such machines.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on panics"
)]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};

use support::desk::Desk;

const URI: &str = "qemu:///system";

fn virsh(arguments: &[&str]) -> (bool, String) {
    let output = Command::new("virsh")
        .args(["-q", "-c", URI])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

/// A machine that goes when the test does.
struct Machine(String);

impl Machine {
    fn define(desk: &Desk, name: &str, xml: &str) -> Self {
        fs::write(desk.at("machine.xml"), xml).unwrap();
        let machine = Self(name.to_owned());
        let (done, said) = virsh(&["define", &desk.path("machine.xml")]);
        assert!(done, "{said}");
        machine
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        virsh(&["destroy", &self.0]);
        virsh(&["undefine", "--nvram", &self.0]);
    }
}

fn description(name: &str, disks: &[(&str, &str, &str)]) -> String {
    let disks: String = disks
        .iter()
        .map(|(file, format, target)| {
            format!(
                "<disk type='file' device='disk'><driver name='qemu' type='{format}'/><source file='{file}'/><target dev='{target}' bus='virtio'/></disk>"
            )
        })
        .collect();
    format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>96</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features><devices>{disks}</devices></domain>"
    )
}

#[test]
#[ignore = "needs libvirt and qemu-img, and no guest"]
fn a_machine_becomes_an_image_and_the_image_a_machine() {
    let desk = Desk::new("");
    let disk = desk.raw();
    let base = desk.qcow2("base.qcow2", &["-c"]);
    let id = std::process::id();
    let (name, copy) = (format!("cannery-kept-{id}"), format!("cannery-copy-{id}"));
    // Two layers above the base, each with something of its own.
    for (layer, under, command) in [
        ("mid.qcow2", "base.qcow2", "write -P 7 5M 64k"),
        ("top.qcow2", "mid.qcow2", "write -z 0 64k"),
    ] {
        desk.tool(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", under, layer],
        );
        desk.tool("qemu-io", &["-f", "qcow2", "-c", command, layer]);
    }
    let top = desk.path("top.qcow2");
    let machine = Machine::define(&desk, &name, &description(&name, &[(&top, "qcow2", "vda")]));
    let image = desk.layout("kept");
    desk.cannery(&[
        "image",
        "export",
        "--quiet",
        "--format",
        "containerdisk",
        &name,
        &image,
    ]);
    let back = desk.path("back.raw");
    desk.cannery(&["image", "convert", "--quiet", &image, &back]);
    desk.same((&back, "raw"), (&top, "qcow2"));
    let said = desk.tool("qemu-img", &["info", "-f", "qcow2", &base]);
    assert!(said.contains("base.qcow2"), "the chain is left alone");

    // The image as a machine of its own, with the memory that the first one had.
    let folder = desk.path("vms");
    fs::create_dir(&folder).unwrap();
    let copied = Machine(copy.clone());
    let printed = desk.cannery(&[
        "image", "import", "--quiet", "--name", &copy, "--dir", &folder, &image,
    ]);
    assert_eq!(printed, copy);
    let (_, xml) = virsh(&["dumpxml", "--inactive", &copy]);
    let file = format!("{folder}/{copy}.qcow2");
    assert!(
        xml.contains(&file) && xml.contains("<memory unit='KiB'>98304</memory>"),
        "{xml}"
    );
    assert!(
        !xml.contains("urn:cannery"),
        "it is nobody's but its owner's: {xml}"
    );
    desk.same((&file, "qcow2"), (&top, "qcow2"));
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o077, 0);
    let (_, state) = virsh(&["domstate", &copy]);
    assert_eq!(state.trim(), "shut off");
    let said = desk.refusal(&["image", "import", "--name", &copy, "--dir", &folder, &image]);
    assert!(said.contains("already"), "{said}");

    // One that runs is not read.
    let (done, said) = virsh(&["start", &name]);
    assert!(done, "{said}");
    let said = desk.refusal(&["image", "export", &name, &image]);
    assert!(said.contains("is running") && said.contains("virsh"), "{said}");
    drop((machine, copied));
    assert!(fs::exists(&disk).unwrap());
}

#[test]
#[ignore = "needs libvirt and qemu-img, and no guest"]
fn a_machine_whose_disk_cannot_be_taken_is_refused_with_what_to_do() {
    let desk = Desk::new("");
    desk.raw();
    let plain = desk.qcow2("plain.qcow2", &[]);
    let name = format!("cannery-odd-{}", std::process::id());
    let image = desk.layout("odd");
    let said = desk.refusal(&["image", "export", &name, &image]);
    assert!(
        said.contains("knows no machine") && said.contains("list --all"),
        "{said}"
    );
    let raw = desk.path("disk.raw");
    let machine = Machine::define(
        &desk,
        &name,
        &description(&name, &[(&plain, "qcow2", "vda"), (&raw, "raw", "vdb")]),
    );
    let said = desk.refusal(&["image", "export", &name, &image]);
    assert!(said.contains("vda, vdb") && said.contains("--disk"), "{said}");
    desk.cannery(&[
        "image", "export", "--quiet", "--format", "qcow2", "--disk", "vdb", &name, &image,
    ]);
    drop(machine);

    // A guest that wrote a header of its own into its raw disk gets no file of the host.
    fs::copy(&plain, &raw).unwrap();
    let machine = Machine::define(&desk, &name, &description(&name, &[(&raw, "raw", "vda")]));
    let said = desk.refusal(&["image", "export", &name, &image]);
    assert!(said.contains("should be raw"), "{said}");
    drop(machine);

    // What lies under a disk must be plain to see, too.
    for (backing, part) in [
        (
            "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}}",
            "only QEMU understands",
        ),
        ("nbd://127.0.0.1:1/x", "only QEMU understands"),
    ] {
        let layer = desk.path("layer.qcow2");
        desk.tool(
            "qemu-img",
            &[
                "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", backing, &layer, "1M",
            ],
        );
        let machine = Machine::define(&desk, &name, &description(&name, &[(&layer, "qcow2", "vda")]));
        let said = desk.refusal(&["image", "export", &name, &image]);
        assert!(said.contains(part), "{said}");
        drop(machine);
    }
}
