//! Makes the guest's root file system fill its disk.

use std::time::Duration;

use super::ssh::{self, Connection};

/// Growing is a matter of a second; an emulated guest with a large ext4 takes longer.
const LONGEST: Duration = Duration::from_secs(120);

/// The text's exit code for "not possible here", with the reason on standard output.
const NOT_POSSIBLE: i32 = 3;

/// Why the root file system could not be grown.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This guest's layout or tools do not allow it.
    #[error("the guest's root file system cannot be grown: {0}")]
    NotPossible(String),
    /// A tool in the guest has failed.
    #[error("growing the guest's root file system failed: {0}")]
    Failed(String),
    /// The guest could not be told.
    #[error(transparent)]
    Ssh(#[from] ssh::Error),
}

/// Grows the partition that holds the root file system, if it is on one, and then the file system. Does nothing where it
/// fills the disk already. Needs root, or `sudo` without a password.
pub async fn grow(connection: &Connection) -> Result<(), Error> {
    let output = connection.root_sh(TEXT, LONGEST).await?;
    match output.code {
        Some(0) => Ok(()),
        Some(NOT_POSSIBLE) => Err(Error::NotPossible(output.stdout.trim().to_owned())),
        _ => {
            let said = format!("{}\n{}", output.stdout.trim(), output.stderr.trim());
            Err(Error::Failed(said.trim().to_owned()))
        }
    }
}

/// POSIX `sh`. Sizes are in sectors of 512 bytes, as everywhere in sysfs.
const TEXT: &str = r#"
cannot() {
    echo "$*"
    exit 3
}
has() { command -v "$1" >/dev/null 2>&1; }
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
number=
while read -r _ _ device _ point rest; do
    [ "$point" = / ] || continue
    # Any number of optional fields, a hyphen, then type and source (proc(5)).
    rest=${rest#*- }
    number=$device
    type=${rest%% *}
    rest=${rest#* }
    source=${rest%% *}
done </proc/self/mountinfo
[ "$number" ] || cannot "the kernel does not say where it is"
case $type in
ext2 | ext3 | ext4) tool=resize2fs ;;
xfs) tool=xfs_growfs ;;
btrfs) tool=btrfs ;;
*) cannot "it is of type $type" ;;
esac
has $tool || cannot "$tool is not installed"
# btrfs has a device number that belongs to no device.
case $number in
0:*) place=$(readlink -f "/sys/class/block/$(basename "$(readlink -f "$source")")") ;;
*) place=$(readlink -f "/sys/dev/block/$number") ;;
esac
[ -r "$place/size" ] || cannot "it is on no block device"
name=${place##*/}
[ -d "$place/dm" ] && cannot "it is on LVM or another mapped device"
if [ -r "$place/partition" ]; then
    read -r partition <"$place/partition"
    read -r start <"$place/start"
    read -r size <"$place/size"
    disk=${place%/*}
    read -r whole <"$disk/size"
    for other in "$disk"/*/start; do
        read -r begins <"$other"
        [ "$begins" -gt "$start" ] && cannot "partition $partition is not the last one on the disk"
    done
    disk=/dev/${disk##*/}
    # GPT keeps 33 sectors at the end, and tools align to 2048.
    if [ $((whole - start - size)) -gt 4096 ]; then
        if has growpart; then
            growpart "$disk" "$partition" </dev/null >&2 || exit 1
        elif has sfdisk; then
            # A GPT's second table still stands where the disk ended before; a DOS label has none to move.
            sfdisk --relocate gpt-bak-std "$disk" </dev/null >/dev/null 2>&1
            echo ", +" | sfdisk --no-reread --force -N "$partition" "$disk" >&2 || exit 1
            has partx || cannot "partx is not installed"
            partx -u -n "$partition" "$disk" </dev/null >&2 || exit 1
        else
            cannot "neither growpart nor sfdisk is installed"
        fi
    fi
fi
case $tool in
resize2fs) resize2fs "/dev/$name" </dev/null >&2 ;;
xfs_growfs) xfs_growfs / </dev/null >&2 ;;
btrfs) btrfs filesystem resize max / </dev/null >&2 ;;
esac
"#;
