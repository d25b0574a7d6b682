//! Images from and for the tools that others use: skopeo, buildah, sardinecake's `sarde`, and a registry between them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on panics"
)]

#[path = "support/registry_fixture.rs"]
#[allow(dead_code, reason = "each suite uses its part of the fixture")]
mod registry_fixture;
mod support;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use registry_fixture::Registry;
use sha2::{Digest as _, Sha256};
use support::desk::Desk;
use support::{guests, table};

/// The formats that are written for others, each with what it takes to write it.
const FORMATS: [(&str, &[&str]); 5] = [
    ("native", &["--format", "native"]),
    ("containerdisk", &["--format", "containerdisk"]),
    (
        "containerdisk (zstd)",
        &["--format", "containerdisk", "--compression", "zstd"],
    ),
    ("sardinecake", &["--format", "sardinecake"]),
    ("qcow2", &["--format", "qcow2"]),
];

fn desk(registry: &Registry) -> Desk {
    Desk::new(&format!("plain_http = [\"{}\"]", registry.host))
}

fn push(desk: &Desk, more: &[&str], source: &str, target: &str) -> String {
    let mut arguments = vec!["image", "push", "--quiet"];
    arguments.extend(more);
    arguments.extend([source, target]);
    desk.cannery(&arguments)
}

/// The image as a raw file, compared with the disk that it was made of.
fn check(desk: &Desk, image: &str, disk: &str) {
    let back = desk.path("back.raw");
    desk.cannery(&["image", "convert", "--quiet", image, &back]);
    desk.same((&back, "raw"), (disk, "raw"));
    fs::remove_file(&back).unwrap();
}

#[test]
#[ignore = "needs docker-registry and skopeo"]
fn skopeo_copies_every_format_there_and_back_and_no_digest_changes() {
    let registry = Registry::open();
    let desk = desk(&registry);
    let disk = desk.raw();
    let mut rows = Vec::new();
    for (number, (format, more)) in FORMATS.iter().enumerate() {
        let [first, last] = ["first", "last"].map(|name| format!("{}/{name}/vm:{number}", registry.host));
        let digest = push(&desk, more, &disk, &first);
        let layout = format!("oci:{}:{number}", desk.path("copied"));
        let from = format!("docker://{first}");
        desk.tool(
            "skopeo",
            &["copy", "-q", "--src-tls-verify=false", &from, &layout],
        );
        check(&desk, &layout, &disk);
        let to = format!("docker://{last}");
        desk.tool("skopeo", &["copy", "-q", "--dest-tls-verify=false", &layout, &to]);
        check(&desk, &last, &disk);
        for place in [&layout, &to] {
            let manifest = desk.tool("skopeo", &["inspect", "--tls-verify=false", "--raw", place]);
            let found = format!("sha256:{}", hex::encode(Sha256::digest(manifest.as_bytes())));
            assert_eq!(found, digest, "{format} at {place}");
        }
        rows.push(vec![
            (*format).to_owned(),
            digest[..19].to_owned(),
            "same digest, same disk".to_owned(),
        ]);
    }
    table::show(
        "What skopeo copies from a registry to a layout and back",
        &["format", "digest", "after both copies"],
        &rows,
    );
}

#[test]
#[ignore = "needs docker-registry and buildah"]
fn a_container_disk_by_buildah_is_read() {
    let registry = Registry::open();
    let desk = desk(&registry);
    let disk = desk.raw();
    let qcow2 = desk.qcow2("disk.qcow2", &["-c"]);
    let (root, run) = (desk.path("storage"), desk.path("run"));
    let buildah = |arguments: &[&str]| {
        let mut all = vec!["--storage-driver", "vfs", "--root", &root, "--runroot", &run];
        all.extend(arguments);
        desk.tool("buildah", &all).trim().to_owned()
    };
    let container = buildah(&["from", "scratch"]);
    buildah(&[
        "copy", "--quiet", "--chown", "107:107", &container, &qcow2, "/disk/",
    ]);
    buildah(&["config", "--label", "io.cannery.memory=1G", &container]);
    for (number, format) in ["oci", "docker"].iter().enumerate() {
        let image = format!("{}/built/vm:{number}", registry.host);
        let to = format!("docker://{image}");
        buildah(&[
            "commit",
            "-q",
            "--format",
            format,
            "--tls-verify=false",
            &container,
            &to,
        ]);
        check(&desk, &image, &disk);
    }
}

/// sardinecake's program, where `contrib/bench/sardinecake install` put it.
fn sarde() -> PathBuf {
    let program = guests::checkout().join(".cache/peers/sardinecake/bin/sarde");
    assert!(
        program.exists(),
        "contrib/bench/sardinecake install puts it there"
    );
    program
}

/// A call of it in the test's folder.
#[track_caller]
fn call_sarde(desk: &Desk, arguments: &[&str]) {
    let output = Command::new(sarde())
        .args(arguments)
        .env("HOME", desk.path("home"))
        .current_dir(desk.at(""))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Without TLS, for skopeo, which `sarde` calls.
fn allow_plain(desk: &Desk, registry: &Registry) {
    let text = format!(
        "[[registry]]\nlocation = \"{}\"\ninsecure = true\n",
        registry.host
    );
    let folder = desk.at("home/.config/containers");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("registries.conf"), text).unwrap();
}

/// A machine that goes when the test does.
struct Defined(String);

impl Drop for Defined {
    fn drop(&mut self) {
        let _ = Command::new("virsh")
            .args(["-q", "-c", "qemu:///system", "undefine", &self.0])
            .stderr(Stdio::null())
            .status();
    }
}

#[test]
#[ignore = "needs docker-registry, sarde (contrib/bench/sardinecake install), libvirt and no guest"]
fn sarde_imports_what_cannery_writes() {
    let registry = Registry::open();
    let desk = desk(&registry);
    allow_plain(&desk, &registry);
    let disk = desk.raw();
    let image = format!("{}/cake/vm:1", registry.host);
    push(
        &desk,
        &["--format", "sardinecake", "--memory", "320M"],
        &disk,
        &image,
    );
    let name = format!("cannery-peer-{}", std::process::id());
    let machine = Defined(name.clone());
    let folder = desk.path("vms");
    call_sarde(
        &desk,
        &[
            "--connect",
            "qemu:///system",
            "pull",
            "-q",
            "-s",
            &image,
            "-d",
            "oci",
            "-n",
            &name,
            "-o",
            &folder,
            "local:1",
        ],
    );
    desk.same((&format!("{folder}/disk.qcow2"), "qcow2"), (&disk, "raw"));
    let xml = desk.tool("virsh", &["-c", "qemu:///system", "dumpxml", &name]);
    assert!(xml.contains(&format!("{folder}/disk.qcow2")), "{xml}");
    assert!(xml.contains("<memory unit='KiB'>327680</memory>"), "{xml}");
    drop(machine);
}

#[test]
#[ignore = "needs docker-registry, sarde (contrib/bench/sardinecake install) and skopeo"]
fn cannery_reads_what_sarde_exports_and_pushes() {
    let registry = Registry::open();
    let desk = desk(&registry);
    allow_plain(&desk, &registry);
    let disk = desk.raw();
    let qcow2 = desk.qcow2("disk.qcow2", &[]);
    let xml = format!(
        "<domain type='qemu'><name>cake</name><memory unit='MiB'>320</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type></os><devices>\
         <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{qcow2}'/><target dev='vda' bus='virtio'/></disk>\
         </devices></domain>"
    );
    fs::write(desk.at("cake.xml"), xml).unwrap();
    for (number, size) in ["1GiB", "700kB"].iter().enumerate() {
        let image = format!("{}/cake/vm:{number}", registry.host);
        let local = format!("local:{number}");
        call_sarde(
            &desk,
            &[
                "export",
                "-q",
                "--chunksize",
                size,
                "--libvirtconfig",
                "cake.xml",
                "-d",
                "oci",
                "cake",
                &local,
            ],
        );
        call_sarde(&desk, &["push", "-q", "-d", "oci", "-t", &image, &local]);
        check(&desk, &image, &disk);
    }
}

/// A disk of a machine: its file in the test's folder, that file's format, and what it is in.
type Drive<'a> = (&'a str, &'a str, &'a str);

/// Defines a machine with these disks.
fn defined(desk: &Desk, name: &str, drives: &[Drive<'_>]) -> Defined {
    let mut disks = String::new();
    for (number, (file, format, device)) in drives.iter().enumerate() {
        let file = desk.path(file);
        let letter = char::from(b'a' + u8::try_from(number).unwrap());
        disks += &format!(
            "<disk type='file' device='{device}'><driver name='qemu' type='{format}'/><source file='{file}'/><target dev='sd{letter}' bus='sata'/></disk>"
        );
    }
    let xml = format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>320</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type></os><devices>{disks}</devices></domain>"
    );
    fs::write(desk.at("machine.xml"), xml).unwrap();
    let machine = Defined(name.to_owned());
    desk.tool("virsh", &["-q", "-c", "qemu:///system", "define", "machine.xml"]);
    machine
}

/// Lays a qcow2 over another file, with some bytes of its own.
fn overlay(desk: &Desk, below: (&str, &str), name: &str, writes: &[&str]) {
    let (file, format) = below;
    desk.tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-F", format, "-b", file, name],
    );
    for command in writes {
        desk.tool("qemu-io", &["-f", "qcow2", "-c", command, name]);
    }
}

#[test]
#[ignore = "needs docker-registry, sarde (contrib/bench/sardinecake install), skopeo, libvirt and no guest"]
fn cannery_reads_the_chains_that_sarde_exports() {
    let registry = Registry::open();
    let desk = desk(&registry);
    allow_plain(&desk, &registry);
    desk.raw();
    desk.qcow2("base.qcow2", &["-c"]);
    let (seven, nine) = ("write -P 7 5M 64k", "write -P 9 30M 3M");
    overlay(&desk, ("base.qcow2", "qcow2"), "mid.qcow2", &[seven]);
    overlay(
        &desk,
        ("mid.qcow2", "qcow2"),
        "top.qcow2",
        &["write -z 1M 1M", nine],
    );
    overlay(&desk, ("disk.raw", "raw"), "on-raw.qcow2", &[seven]);
    desk.qcow2("b\u{e4}se.qcow2", &[]);
    overlay(&desk, ("b\u{e4}se.qcow2", "qcow2"), "\u{fc}ber.qcow2", &[seven]);
    desk.qcow2("\u{57fa}.qcow2", &[]);
    overlay(&desk, ("\u{57fa}.qcow2", "qcow2"), "\u{4e0a}.qcow2", &[nine]);
    overlay(&desk, ("base.qcow2", "qcow2"), "other.qcow2", &[nine]);
    fs::write(desk.at("cd.iso"), vec![1; 1 << 20]).unwrap();
    let disk = |file| (file, "qcow2", "disk");
    let mut rows = Vec::new();
    for (number, (what, drives, refusal)) in [
        ("two files", vec![disk("mid.qcow2")], None),
        ("three files", vec![disk("top.qcow2")], None),
        ("a qcow2 on a raw disk", vec![disk("on-raw.qcow2")], None),
        ("names in Latin-1", vec![disk("\u{fc}ber.qcow2")], None),
        ("names that gzip cannot carry", vec![disk("\u{4e0a}.qcow2")], None),
        (
            "a CD in the machine",
            vec![disk("mid.qcow2"), ("cd.iso", "raw", "cdrom")],
            None,
        ),
        (
            "two disks on one base",
            vec![disk("mid.qcow2"), disk("other.qcow2")],
            Some("both lie on `base.qcow2`, and a machine has one disk"),
        ),
        (
            "two disks",
            vec![disk("on-raw.qcow2"), disk("base.qcow2")],
            Some("a machine has one disk, and it has 2: `on-raw.qcow2`, `base.qcow2`"),
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("cannery-peer-{}-{number}", std::process::id());
        let machine = defined(&desk, &name, &drives);
        let (image, local) = (
            format!("{}/cake/vm:{number}", registry.host),
            format!("local:{number}"),
        );
        let export = ["export", "-q", "--chunksize", "700kB", "-d", "oci", &name, &local];
        call_sarde(&desk, &[&["--connect", "qemu:///system"][..], &export].concat());
        call_sarde(&desk, &["push", "-q", "-d", "oci", "-t", &image, &local]);
        drop(machine);
        let back = desk.path("back.raw");
        let convert = ["image", "convert", "--quiet", &image, &back];
        let outcome = match refusal {
            None => {
                desk.cannery(&convert);
                desk.same((&back, "raw"), (&desk.path(drives[0].0), "qcow2"));
                fs::remove_file(&back).unwrap();
                "the same disk".to_owned()
            }
            Some(part) => {
                let error = desk.refusal(&convert);
                assert!(error.contains(part), "{what}: {error}");
                format!("refused: {part}")
            }
        };
        rows.push(vec![what.to_owned(), outcome]);
    }
    table::show(
        "What cannery makes of machines that sarde exported",
        &["machine", "image"],
        &rows,
    );
}
