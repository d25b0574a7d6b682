//! Which libvirt and which hypervisor answered last: remembered, so that gitlab-runner is told without asking them before
//! each job.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::libvirt::Versions;
use crate::record::write_atomic;

/// Name of the memory in the state folder.
const MEMORY: &str = "versions.json";
/// Version of its form; another one counts as nothing remembered.
const VERSION: u32 = 1;
/// Where packages put libvirt's daemons and QEMU, on this architecture: one that was replaced may be of another version.
const PROGRAMS: [&str; 4] = [
    "/usr/sbin/libvirtd",
    "/usr/sbin/virtqemud",
    "/usr/libexec/qemu-kvm",
    QEMU,
];
#[cfg(target_arch = "aarch64")]
const QEMU: &str = "/usr/bin/qemu-system-aarch64";
#[cfg(not(target_arch = "aarch64"))]
const QEMU: &str = "/usr/bin/qemu-system-x86_64";

#[derive(Debug, Serialize, Deserialize)]
struct Memory {
    version: u32,
    uri: String,
    programs: Vec<Stamp>,
    versions: Versions,
}

/// A program's file as it was installed.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    path: PathBuf,
    inode: u64,
    modified: i64,
}

/// The memory cannot be written; the operator's.
#[derive(Debug, thiserror::Error)]
#[error("{} cannot be written: {source}", path.display())]
pub struct Error {
    path: PathBuf,
    source: io::Error,
}

/// What was told at this libvirt, unless its programs were replaced since. A memory that cannot be read counts as none.
pub fn recall(state_dir: &Path, uri: &str) -> Option<Versions> {
    recall_with(state_dir, uri, &PROGRAMS.map(Path::new))
}

/// Keeps what was told, in place of whatever was kept before; what is kept already is left alone.
///
/// # Errors
/// The state folder cannot be written.
pub fn remember(state_dir: &Path, uri: &str, versions: &Versions) -> Result<(), Error> {
    remember_with(state_dir, uri, versions, &PROGRAMS.map(Path::new))
}

fn recall_with(state_dir: &Path, uri: &str, programs: &[&Path]) -> Option<Versions> {
    let text = std::fs::read(state_dir.join(MEMORY)).ok()?;
    let memory: Memory = serde_json::from_slice(&text).ok()?;
    let fits = memory.version == VERSION && memory.uri == uri && memory.programs == stamps(programs);
    fits.then_some(memory.versions)
}

fn remember_with(state_dir: &Path, uri: &str, versions: &Versions, programs: &[&Path]) -> Result<(), Error> {
    if recall_with(state_dir, uri, programs).as_ref() == Some(versions) {
        return Ok(());
    }
    let path = state_dir.join(MEMORY);
    let memory = Memory {
        version: VERSION,
        uri: uri.to_owned(),
        programs: stamps(programs),
        versions: versions.clone(),
    };
    let written = serde_json::to_vec_pretty(&memory)
        .map_err(io::Error::from)
        .and_then(|text| write_atomic(&path, &text, 0o664));
    written.map_err(|source| Error { path, source })
}

fn stamps(programs: &[&Path]) -> Vec<Stamp> {
    let stamp = |path: &&Path| {
        let about = std::fs::metadata(path).ok()?;
        Some(Stamp {
            path: path.to_path_buf(),
            inode: about.ino(),
            modified: about.mtime(),
        })
    };
    programs.iter().filter_map(stamp).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_told_holds_for_its_libvirt_and_its_programs() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("libvirtd");
        std::fs::write(&program, "old").unwrap();
        let programs = [program.as_path(), Path::new("/nowhere/qemu")];
        let told = Versions {
            libvirt: "9.0.0".into(),
            hypervisor: "QEMU".into(),
            hypervisor_version: "7.2.22".into(),
        };
        let state = folder.path();
        let recall = |uri| recall_with(state, uri, &programs);
        assert_eq!(recall("qemu:///system"), None);
        remember_with(state, "qemu:///system", &told, &programs).unwrap();
        assert_eq!(recall("qemu:///system").as_ref(), Some(&told));
        assert_eq!(recall("qemu:///session"), None);

        // A package replaces the file by another one.
        std::fs::write(state.join("new"), "new").unwrap();
        std::fs::rename(state.join("new"), &program).unwrap();
        assert_eq!(recall("qemu:///system"), None);
        remember_with(state, "qemu:///system", &told, &programs).unwrap();
        assert!(recall("qemu:///system").is_some());

        std::fs::write(state.join(MEMORY), "{\"version\":1,").unwrap();
        assert_eq!(recall("qemu:///system"), None);
        let error = remember_with(&state.join("none"), "x", &told, &programs).unwrap_err();
        assert!(
            error.to_string().contains("versions.json cannot be written"),
            "{error}"
        );
    }
}
