//! Images and machines that somebody keeps: an image of a machine's disk, and a machine of an image's.

use std::iter;
use std::path::{Path, PathBuf};

use super::imports::{self, Turn, there_already};
use crate::image::{Boot, Disk, DiskFormat, Draft, Progress};
use crate::job::Granted;
use crate::kill::{self, Point};
use crate::machine::description::Accelerator;
use crate::machine::libvirt::{self, Kept};
use crate::machine::placement::Format;
use crate::machine::xml::Node;
use crate::machine::xml::kept::{self, KeptDisk, Portrait};
use crate::machine::{Libvirt, accelerator, overlay};
use crate::outcome::Failure;
use crate::quantity::Size;
use crate::record::Unnamed;
use crate::report::plain;
use crate::settings::{MachineSettings, Settings, file};
use crate::start::{Hardware, host_arch};

/// Where libvirt's own tools put the disks of its system machines.
const SYSTEM_IMAGES: &str = "/var/lib/libvirt/images";

/// Who may read a kernel: its owner, and whom libvirt lends it to.
const KERNEL_MODE: u32 = 0o400;

/// The disk of a machine that is shut off, with what its description wishes. `target` names the disk where there are several.
///
/// # Errors
/// There is no such machine, it is not shut off, or its disk cannot be taken; each with what to do.
pub async fn draft(settings: &Settings, machine: &str, target: Option<&str>) -> Result<Draft, Failure> {
    let libvirt = Libvirt::open(&settings.libvirt_uri)?;
    let shown = plain(machine, 60);
    let uri = &settings.libvirt_uri;
    let xml = match libvirt.kept(machine).await? {
        Kept::Off(xml) => xml,
        Kept::Missing => {
            return Err(Failure::system(format!("libvirt knows no machine {shown}"))
                .hint(format!("`virsh -c {uri} list --all` shows those that there are")));
        }
        Kept::Running => {
            return Err(Failure::system(format!(
                "machine {shown} is running: its disk would change while it is read"
            ))
            .hint(format!("Shut it down first: virsh -c {uri} shutdown {shown}")));
        }
        Kept::Saved => {
            return Err(Failure::system(format!(
                "machine {shown} was put aside with its memory: its disk is in the middle of something"
            ))
            .hint("Start it again and shut it down"));
        }
    };
    let unreadable = |e: crate::machine::xml::Error| Failure::system(e.to_string());
    let portrait = kept::read(&Node::parse(&xml).map_err(unreadable)?);
    let disk = choose(&portrait, &shown, target)?;
    let format = match disk.format {
        Some(Format::Qcow2) => DiskFormat::Qcow2,
        Some(Format::Raw) => DiskFormat::Raw,
        None => {
            return Err(Failure::system(format!(
                "the disk {} of machine {shown} is neither qcow2 nor raw",
                plain(&disk.target, 20)
            ))
            .hint("`qemu-img convert -O qcow2 DISK NEW.qcow2` makes a qcow2 of it, for the machine to use"));
        }
    };
    let mut draft = Draft::of_chain(&disk.file, format, &portrait.arch, settings.images.max_disk)?;
    if let Some(memory) = portrait.memory {
        draft.label("io.cannery.memory", &memory.to_string())?;
    }
    draft.label("io.cannery.firmware", if portrait.uefi { "uefi" } else { "bios" })?;
    if let Some(kernel) = portrait.kernel {
        draft.boot(Boot {
            kernel: kernel.kernel,
            initrd: kernel.initrd,
            cmdline: kernel.cmdline,
        })?;
    }
    Ok(draft)
}

/// The one disk that is meant. Pure.
fn choose<'a>(portrait: &'a Portrait, machine: &str, target: Option<&str>) -> Result<&'a KeptDisk, Failure> {
    let names = || {
        let files = portrait.disks.iter().map(|disk| &disk.target);
        let names: Vec<String> = files
            .chain(&portrait.others)
            .map(|name| plain(name, 20))
            .collect();
        names.join(", ")
    };
    let found = match target {
        Some(target) => portrait.disks.iter().find(|disk| disk.target == target),
        None if portrait.disks.len() + portrait.others.len() > 1 => {
            return Err(
                Failure::system(format!("machine {machine} has more than one disk: {}", names()))
                    .hint("An image has one: choose it with --disk"),
            );
        }
        None => portrait.disks.first(),
    };
    found.ok_or_else(|| {
        let failure = match target {
            Some(target) => format!(
                "machine {machine} has no disk {} that is a file",
                plain(target, 20)
            ),
            None => format!("machine {machine} has no disk that is a file"),
        };
        match names() {
            names if names.is_empty() => Failure::system(failure),
            names => Failure::system(failure).hint(format!("It has {names}; only files can be taken")),
        }
    })
}

/// A machine that is to be made of an image.
#[derive(Debug, Clone, Copy)]
pub struct Import<'a> {
    /// The image.
    pub disk: &'a Disk,
    /// The machine's name, which its disk gets, too.
    pub name: &'a str,
    /// The folder for its disk; none for libvirt's own.
    pub dir: Option<&'a Path>,
    /// The libvirt network of its card.
    pub network: &'a str,
}

/// Defines a machine with a copy of an image's disk; its file. It is not started.
///
/// # Errors
/// The name is taken, the disk cannot be written, or libvirt refuses; then nothing is left behind. Where libvirt does not answer in
/// time, or the process is killed, the next import or reaper finishes it.
pub async fn import(
    settings: &Settings,
    import: &Import<'_>,
    progress: &dyn Progress,
) -> Result<PathBuf, Failure> {
    let Import { disk, name, .. } = *import;
    check_name(name)?;
    let turn = imports::begin(settings, name).await?;
    let libvirt = Libvirt::open(&settings.libvirt_uri)?;
    if libvirt.kept(name).await? != Kept::Missing {
        return Err(Failure::system(format!("there is a machine {name} already"))
            .hint("Choose another name with --name"));
    }
    let dir = match import.dir {
        Some(dir) => std::path::absolute(dir)
            .map_err(|e| Failure::system(format!("{} cannot be used: {e}", dir.display())))?,
        None if settings.libvirt_uri.ends_with("/system") => SYSTEM_IMAGES.into(),
        None => {
            return Err(
                Failure::system("it is not known where disks of machines are kept here")
                    .hint("Name the folder with --dir"),
            );
        }
    };
    let description = {
        let machine = settings.machine(&disk.reference);
        let hardware = Hardware {
            libvirt: &libvirt,
            granted: &Granted {
                cpus: machine
                    .cpus
                    .or(disk
                        .hints
                        .cpus
                        .map(|wished| wished.min(machine.max_cpus.max(MachineSettings::DEFAULT_CPUS))))
                    .unwrap_or(MachineSettings::DEFAULT_CPUS),
                memory: memory(&machine, disk),
                disk: Size::from_bytes(disk.virtual_size),
            },
            settings: &machine,
            disk,
        };
        hardware
            .describe(accelerator_of(&libvirt, &machine).await?)
            .await?
    };
    let (format, ending) = match disk.format {
        DiskFormat::Raw => (Format::Raw, "raw"),
        DiskFormat::Qcow2 => (Format::Qcow2, "qcow2"),
    };
    let file = |ending: &str| dir.join(format!("{name}.{ending}"));
    let target = file(ending);
    let (kernel, initrd) = (file("kernel"), file("initrd"));
    let boot = disk.boot.as_ref();
    let place = kept::Place {
        name,
        disk: &target,
        format,
        kernel: boot.map(|boot| (kernel.as_path(), boot.initrd.as_ref().map(|_| initrd.as_path()))),
        network: import.network,
    };
    let xml = kept::render(&description, &place)?;
    for path in [&target, &kernel, &initrd] {
        if path.symlink_metadata().is_ok() {
            return Err(there_already(path));
        }
    }
    // None of them has a name before all are whole.
    let mut files = Vec::new();
    if let Some(boot) = boot {
        for (from, to) in iter::once((&boot.kernel, &kernel)).chain(boot.initrd.as_ref().zip(Some(&initrd))) {
            files.push((to.clone(), private(from, to, &dir)?));
        }
    }
    let draft = Draft::of_disk(disk, description.arch.name())?;
    let whole = crate::image::make(&draft, disk.format, &dir, progress).await?;
    files.push((target.clone(), whole));
    if let Err(failure) = turn.name(&settings.libvirt_uri, &files) {
        undo(&turn);
        return Err(failure);
    }
    if let Err(error) = libvirt.define(name, xml).await
        && !defined_all_the_same(&libvirt, name, &target).await?
    {
        // One that libvirt is still at may come yet: then its files are needed, and whoever comes later sees which it is.
        if !matches!(error, libvirt::Error::Late { .. }) {
            undo(&turn);
        }
        return Err(error.into());
    }
    kill::point(Point::ImportDefined);
    // The machine is there; a note that stays is removed by the next call.
    if let Err(failure) = turn.forget() {
        tracing::warn!("{failure}");
    }
    Ok(target)
}

/// A copy of a kernel or initial RAM disk that is to get the name `to`.
fn private(from: &Path, to: &Path, dir: &Path) -> Result<Unnamed, Failure> {
    let file = Unnamed::begin(dir, KERNEL_MODE)
        .map_err(|e| Failure::system(format!("{} cannot be written: {e}", to.display())))?;
    overlay::copy_into(from, file.file(), to)?;
    Ok(file)
}

/// Removes what an import made. What cannot be removed stays noted, for the next call.
fn undo(turn: &Turn) {
    if let Err(failure) = turn.undo() {
        tracing::warn!("{failure}");
    }
}

/// An answer may be lost or late though the machine was defined: is it there, with this disk? Then its files are not to be removed.
async fn defined_all_the_same(libvirt: &Libvirt, name: &str, disk: &Path) -> Result<bool, Failure> {
    Ok(match libvirt.kept(name).await? {
        Kept::Missing => false,
        // Somebody was quick to start it.
        Kept::Running | Kept::Saved => true,
        Kept::Off(xml) => {
            let node = Node::parse(&xml).map_err(|e| Failure::system(e.to_string()))?;
            kept::read(&node).disks.iter().any(|kept| kept.file == disk)
        }
    })
}

/// A name that can be a file's, too.
fn check_name(name: &str) -> Result<(), Failure> {
    let plain_name = !name.is_empty()
        && name.len() <= 100
        && !name.starts_with(['-', '.'])
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-+".contains(&b));
    if plain_name {
        return Ok(());
    }
    Err(Failure::system(format!(
        "{:?} cannot be the name of a machine and its disk",
        plain(name, 60)
    ))
    .hint("Give it one of letters, digits, dots, dashes and underscores with --name"))
}

/// What the settings say, else what the image wishes within their bound.
fn memory(machine: &MachineSettings, disk: &Disk) -> Size {
    let wished = disk.hints.memory.map(Size::from_bytes);
    machine
        .memory
        .or(wished.map(|wished| wished.min(machine.max_memory.max(MachineSettings::DEFAULT_MEMORY))))
        .unwrap_or(MachineSettings::DEFAULT_MEMORY)
}

/// KVM wherever this host has it, unless the settings say otherwise: whoever keeps a machine can change it.
async fn accelerator_of(libvirt: &Libvirt, machine: &MachineSettings) -> Result<Accelerator, Failure> {
    let there = accelerator::device() != accelerator::Device::Missing
        && libvirt.offer(host_arch()?, Accelerator::Kvm).await?.is_some();
    Ok(match machine.accelerator {
        file::Accelerator::Kvm => Accelerator::Kvm,
        file::Accelerator::Auto if there => Accelerator::Kvm,
        file::Accelerator::Auto | file::Accelerator::Emulation => Accelerator::Emulation,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn portrait(files: &[&str], others: &[&str]) -> Portrait {
        let disk = |target: &&str| KeptDisk {
            target: (*target).to_owned(),
            file: "/x".into(),
            format: Some(Format::Raw),
        };
        Portrait {
            arch: "x86_64".to_owned(),
            memory: None,
            uefi: false,
            disks: files.iter().map(disk).collect(),
            others: others.iter().map(|name| (*name).to_owned()).collect(),
            kernel: None,
        }
    }

    #[test]
    fn a_disk_is_taken_only_where_it_is_clear_which() {
        let one = portrait(&["vda"], &[]);
        assert_eq!(choose(&one, "m", None).unwrap().target, "vda");
        let mixed = portrait(&["vda"], &["vdb"]);
        assert_eq!(choose(&mixed, "m", Some("vda")).unwrap().target, "vda");
        for (portrait, target, part) in [
            (&mixed, None, "more than one disk: vda, vdb"),
            (&mixed, Some("vdb"), "no disk vdb that is a file"),
            (&portrait(&[], &["vdc"]), None, "no disk that is a file"),
            (&portrait(&[], &[]), None, "no disk that is a file"),
        ] {
            let error = choose(portrait, "m", target).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_machines_name_cannot_lead_elsewhere() {
        for good in ["debian-12", "a.b_c+1"] {
            check_name(good).unwrap();
        }
        for bad in ["", "../x", ".hidden", "-n", "a b", "a/b", "ä"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
