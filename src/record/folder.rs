//! Folders and lock files that root and the members of one group share.
//!
//! Whoever calls cannery cleans up after whoever called before, so every folder of the state is writable for its group, hands
//! that group on to what is made in it, and lets others pass: QEMU runs as a user of its own and must reach the disks.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{Gid, chown};

use super::Error;
use super::files::{hidden, make_finished};

/// The group whose members share the state folder with root, where the host has it.
pub const GROUP: &str = "cannery";
/// The mode of a folder of the state: others may pass but not list.
pub const DIR_MODE: u32 = 0o2771;
const LOCK_MODE: u32 = 0o664;
/// Where the host's own groups are named (group(5)). A group of a directory service is for the operator to set.
const GROUPS: &str = "/etc/group";

/// Makes the state folder where it is missing; one made by root belongs to the group `cannery` if there is one. A folder that
/// is there already stays as its operator wants it.
pub fn open_state(state_dir: &Path) -> Result<(), Error> {
    let failed = |source| Error::Io {
        action: "create the folder",
        path: state_dir.to_owned(),
        source,
    };
    if state_dir.is_dir() {
        return Ok(());
    }
    if let Some(parent) = state_dir.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    let group = if rustix::process::geteuid().is_root() {
        fs::read_to_string(GROUPS)
            .ok()
            .and_then(|groups| group_id(&groups, GROUP))
    } else {
        None
    };
    make(state_dir, group).map_err(failed)
}

/// Makes a folder of the state, and those above it, where they are missing.
pub fn make_shared(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    if let Some(parent) = dir.parent() {
        make_shared(parent)?;
    }
    make(dir, None)
}

fn make(dir: &Path, group: Option<u32>) -> io::Result<()> {
    make_finished(dir, &hidden(dir), |dir| {
        if let Some(group) = group {
            chown(dir, None, Some(Gid::from_raw(group)))?;
        }
        // After the group, whose change takes the set-group-ID bit away.
        fs::set_permissions(dir, Permissions::from_mode(DIR_MODE))
    })
}

/// Opens a file whose only use is to be locked, and makes it where it is missing. Another user's will do, since locking
/// needs no writing.
pub fn open_lock(path: &Path) -> io::Result<File> {
    loop {
        match File::open(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            opened => return opened,
        }
        match OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(LOCK_MODE)
            .open(path)
        {
            // Another process was quicker.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Ok(file) => {
                file.set_permissions(Permissions::from_mode(LOCK_MODE))?;
                return Ok(file);
            }
            failed => return failed,
        }
    }
}

/// The number of a group in the text of `/etc/group`.
fn group_id(groups: &str, name: &str) -> Option<u32> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name))
            .then(|| fields.nth(1)?.parse().ok())
            .flatten()
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_group_is_found_by_its_whole_name() {
        let groups = "root:x:0:\ncannery-test:x:7:a\n# cannery:x:8:\nlibvirt:x:107:a,b\ncannery:x:995:ci\n";
        assert_eq!(group_id(groups, "cannery"), Some(995));
        assert_eq!(group_id(groups, "libvirt"), Some(107));
        assert_eq!(group_id(groups, "cann"), None);
        assert_eq!(group_id("cannery:x\ncannery", "cannery"), None);
    }

    #[test]
    fn folders_are_the_groups_and_hand_it_on_and_one_that_is_there_stays_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("var/lib/state");
        open_state(&state).unwrap();
        let deep = state.join("slots/net");
        make_shared(&deep).unwrap();
        for dir in [&state, &state.join("slots"), &deep] {
            let mode = dir.metadata().unwrap().mode() & 0o7777;
            assert_eq!(mode, DIR_MODE, "{}", dir.display());
        }
        let private = folder.path().join("private");
        fs::create_dir(&private).unwrap();
        fs::set_permissions(&private, Permissions::from_mode(0o750)).unwrap();
        open_state(&private).unwrap();
        assert_eq!(private.metadata().unwrap().mode() & 0o7777, 0o750);
    }

    #[test]
    fn a_lock_file_that_may_only_be_read_locks_as_well() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let first = open_lock(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o444)).unwrap();
        first.try_lock().unwrap();
        let second = open_lock(&path).unwrap();
        assert!(second.try_lock().is_err());
        drop(first);
        second.try_lock().unwrap();
    }
}
