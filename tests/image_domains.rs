//! Machines that somebody keeps become images, and images such machines.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on panics"
)]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use cannery::kill::Point;
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
    let printed = desk.call(&[
        "image", "import", "--quiet", "--format", "json", "--name", &copy, "--dir", &folder, &image,
    ]);
    let printed: serde_json::Value = serde_json::from_slice(&printed.stdout).unwrap();
    assert_eq!(printed["name"], copy);
    let (_, xml) = virsh(&["dumpxml", "--inactive", &copy]);
    let file = format!("{folder}/{copy}.qcow2");
    assert_eq!(printed["disk"], file);
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

/// How a process that was killed shows.
const KILLED: i32 = 9;

/// Calls cannery, which is killed at a point.
#[track_caller]
fn killed(desk: &Desk, arguments: &[&str], point: Point, nth: usize) {
    use std::os::unix::process::ExitStatusExt as _;
    let output = Command::new(env!("CARGO_BIN_EXE_cannery"))
        .arg("--config")
        .arg(desk.at("cannery.toml"))
        .args(arguments)
        .env("CANNERY_KILL_AT", format!("{}:{nth}", point.name()))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.signal(), Some(KILLED), "{}: {said}", point.name());
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    names
}

/// An image with a kernel and its initial RAM disk, in a layout of the desk's.
fn image_with_a_kernel(desk: &Desk) -> String {
    let disk = desk.raw();
    let (kernel, initrd, image) = (desk.path("vmlinuz"), desk.path("initrd"), desk.layout("kernel"));
    for file in [&kernel, &initrd] {
        fs::write(file, "a file").unwrap();
    }
    desk.cannery(&[
        "image", "push", "--quiet", "--kernel", &kernel, "--initrd", &initrd, &disk, &image,
    ]);
    image
}

#[test]
#[ignore = "needs libvirt, and no guest"]
fn an_import_that_was_killed_is_finished_by_the_next_call() {
    let desk = Desk::new("");
    let image = image_with_a_kernel(&desk);
    let (folder, imports) = (desk.path("vms"), desk.at("state/imports"));
    fs::create_dir(&folder).unwrap();
    let id = std::process::id();
    let import = |name: &str| {
        let all = [
            "image", "import", "--quiet", "--name", name, "--dir", &folder, &image,
        ];
        all.map(str::to_owned)
    };
    let there = |name: &str| virsh(&["domstate", name]).0;
    for (number, (point, nth)) in [
        (Point::ImportNoted, 1),
        (Point::ImportNamed, 1),
        (Point::ImportNamed, 2),
        (Point::ImportNamed, 3),
        (Point::ImportDefined, 1),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("cannery-cut-{id}-{number}");
        let other = format!("cannery-other-{id}-{number}");
        let _machines = [Machine(name.clone()), Machine(other.clone())];
        let (ours, others) = (import(&name), import(&other));
        let (ours, others) = (
            ours.each_ref().map(String::as_str),
            others.each_ref().map(String::as_str),
        );
        let files = [".initrd", ".kernel", ".raw"].map(|ending| format!("{name}{ending}"));
        killed(&desk, &ours, point, nth);
        let named = if point == Point::ImportNoted { 0 } else { nth };
        match point {
            Point::ImportDefined => assert_eq!(names(folder.as_ref()), files),
            _ => assert_eq!(names(folder.as_ref()).len(), named),
        }
        // The reaper, which is killed in turn; the same import again; that of another machine.
        match number % 3 {
            _ if point == Point::ImportDefined => {
                desk.cannery(&["reap"]);
                assert!(there(&name));
                assert_eq!(names(folder.as_ref()), files);
            }
            0 => {
                if named > 1 {
                    killed(&desk, &["reap"], Point::ImportUndone, 1);
                }
                let said = desk.cannery(&["reap"]);
                assert!(said.contains(&name), "{said}");
                assert!(names(folder.as_ref()).is_empty());
            }
            1 => {
                desk.cannery(&ours);
                assert_eq!(names(folder.as_ref()), files);
            }
            _ => {
                desk.cannery(&others);
                assert!(there(&other) && !there(&name));
                assert!(names(folder.as_ref()).iter().all(|file| file.starts_with(&other)));
            }
        }
        assert!(names(&imports).is_empty(), "{}", point.name());
        for file in names(folder.as_ref()) {
            fs::remove_file(Path::new(&folder).join(file)).unwrap();
        }
    }
}

#[test]
#[ignore = "needs libvirt, and no guest"]
fn of_two_imports_of_a_name_one_defines_the_machine_and_the_other_harms_nothing() {
    let desk = Desk::new("");
    let image = image_with_a_kernel(&desk);
    let folder = desk.path("vms");
    fs::create_dir(&folder).unwrap();
    let name = format!("cannery-twice-{}", std::process::id());
    let (name, machine) = (name.as_str(), Machine(name.clone()));
    let import = [
        "image", "import", "--quiet", "--name", name, "--dir", &folder, &image,
    ];
    let done = std::thread::scope(|scope| {
        let calls = [(); 2].map(|()| scope.spawn(|| desk.call(&import)));
        calls.map(|call| call.join().unwrap())
    });
    assert_eq!(done.iter().filter(|call| call.status.success()).count(), 1);
    let whole = ["initrd", "kernel", "raw"].map(|ending| format!("{name}.{ending}"));
    assert_eq!(names(folder.as_ref()), whole);
    assert!(virsh(&["domstate", name]).0);
    drop(machine);
    for file in whole {
        fs::remove_file(Path::new(&folder).join(file)).unwrap();
    }

    // While one is under way.
    let lock = fs::File::create(desk.at(&format!("state/imports/{name}.lock"))).unwrap();
    lock.lock().unwrap();
    let said = desk.refusal(&import);
    assert!(said.contains("nother import of machine"), "{said}");

    // A kernel that somebody put there is neither replaced nor removed.
    drop(lock);
    let kernel = Path::new(&folder).join(format!("{name}.kernel"));
    fs::write(&kernel, "another's").unwrap();
    let said = desk.refusal(&import);
    assert!(said.contains("is there already"), "{said}");
    assert_eq!(fs::read(&kernel).unwrap(), b"another's");
    assert_eq!(names(folder.as_ref()).len(), 1);
}
