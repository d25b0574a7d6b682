//! What an image may say about itself, in its config's labels. All of it was written by a stranger, none of
//! it is more than a wish, and the operator's limits stand above it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::error::Error;

pub(super) const KERNEL: &str = "io.cannery.kernel";
pub(super) const INITRD: &str = "io.cannery.initrd";
pub(super) const CMDLINE: &str = "io.cannery.cmdline";
pub(super) const MEMORY: &str = "io.cannery.memory";
pub(super) const FIRMWARE: &str = "io.cannery.firmware";
pub(super) const USER: &str = "io.cannery.user";

/// Longest kernel command line, in bytes: x86's COMMAND_LINE_SIZE.
const CMDLINE_MAX: usize = 2048;

/// Least and most memory that a guest may ask for, in bytes: 16 MiB, which boots nothing, and 16 TiB, which
/// no host has.
const MEMORY_RANGE: std::ops::RangeInclusive<u64> = (16 << 20)..=(16 << 40);

/// Least and most virtual processors: what QEMU's machines can have.
const CPUS_RANGE: std::ops::RangeInclusive<u32> = 1..=1024;

/// What the firmware of a machine should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    /// SeaBIOS.
    Bios,
    /// OVMF or AAVMF.
    Uefi,
}

/// What the disk should be attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskBus {
    /// virtio-blk.
    Virtio,
    /// virtio-scsi.
    Scsi,
    /// AHCI.
    Sata,
}

/// What the network card should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Nic {
    /// virtio-net.
    Virtio,
    /// Intel's 82574L.
    E1000e,
}

/// Wishes of the image for its machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hints {
    /// `io.cannery.memory`: bytes.
    pub memory: Option<u64>,
    /// Virtual processors, where the image's own format names them.
    #[serde(default)]
    pub cpus: Option<u32>,
    /// `io.cannery.firmware`.
    pub firmware: Option<Firmware>,
    /// What the disk was attached to, where the image's own format says so.
    #[serde(default)]
    pub disk_bus: Option<DiskBus>,
    /// Which network card the guest had, where the image's own format says so.
    #[serde(default)]
    pub nic: Option<Nic>,
    /// `io.cannery.user`: the account that jobs run as.
    pub user: Option<String>,
}

impl Hints {
    /// Does a label's value make sense? If not, what is wrong with it, as the rest of a sentence.
    ///
    /// # Errors
    /// The rest of that sentence.
    pub fn check(label: &str, value: &str) -> Result<(), &'static str> {
        // Without a kernel some labels make no sense at all.
        let labels = [(KERNEL, "boot/vmlinuz"), (label, value)];
        let labels = labels.map(|(name, value)| (name.to_owned(), value.to_owned()));
        match read(&labels.into(), "") {
            Err(Error::Label { reason, .. }) => Err(reason),
            _ => Ok(()),
        }
    }

    /// These, and the other's where these are silent.
    pub(super) fn or(self, other: Self) -> Self {
        Self {
            memory: self.memory.or(other.memory),
            cpus: self.cpus.or(other.cpus),
            firmware: self.firmware.or(other.firmware),
            disk_bus: self.disk_bus.or(other.disk_bus),
            nic: self.nic.or(other.nic),
            user: self.user.or(other.user),
        }
    }

    /// Without numbers that no machine has. Another program's description of a machine is not refused for them, as a label of ours
    /// would be: it was not written for us.
    pub(super) fn bounded(mut self) -> Self {
        self.memory = self.memory.filter(|bytes| MEMORY_RANGE.contains(bytes));
        self.cpus = self.cpus.filter(|count| CPUS_RANGE.contains(count));
        self
    }
}

/// Files of the image that the host boots from, by their paths in its layers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct BootFiles {
    pub(super) kernel: Option<String>,
    pub(super) initrd: Option<String>,
    pub(super) cmdline: Option<String>,
}

/// Reads the labels; unknown ones, also of our own prefix, are passed over.
pub(super) fn read(labels: &BTreeMap<String, String>, image: &str) -> Result<(Hints, BootFiles), Error> {
    let label = |name: &'static str, read: fn(&str) -> Option<String>, reason: &'static str| {
        let wrong = || Error::Label {
            image: image.to_owned(),
            label: name,
            reason,
        };
        labels
            .get(name)
            .map(|value| read(value).ok_or_else(wrong))
            .transpose()
    };
    let wrong = |label, reason| Error::Label {
        image: image.to_owned(),
        label,
        reason,
    };
    let memory = match labels.get(MEMORY) {
        Some(value) => Some(size(value).ok_or_else(|| {
            wrong(
                MEMORY,
                "is not a size from 16M to 16T (a number with K, M, G or T behind it)",
            )
        })?),
        None => None,
    };
    let firmware = match labels.get(FIRMWARE).map(String::as_str) {
        Some("bios") => Some(Firmware::Bios),
        Some("uefi") => Some(Firmware::Uefi),
        Some(_) => return Err(wrong(FIRMWARE, "is neither bios nor uefi")),
        None => None,
    };
    let user = label(
        USER,
        account,
        "is not the name of an account (1 to 32 letters, digits, `_`, `-`, `.`)",
    )?;
    let kernel = label(KERNEL, boot_path, "is not the path of a file under boot/")?;
    let initrd = label(INITRD, boot_path, "is not the path of a file under boot/")?;
    let cmdline = label(
        CMDLINE,
        cmdline,
        "is longer than 2048 bytes or not printable ASCII",
    )?;
    if kernel.is_none() {
        if initrd.is_some() {
            return Err(wrong(INITRD, "stands without io.cannery.kernel"));
        }
        if cmdline.is_some() {
            return Err(wrong(CMDLINE, "stands without io.cannery.kernel"));
        }
    }
    if kernel.is_some() && kernel == initrd {
        return Err(wrong(INITRD, "is the same file as io.cannery.kernel"));
    }
    Ok((
        Hints {
            memory,
            firmware,
            user,
            ..Hints::default()
        },
        BootFiles {
            kernel,
            initrd,
            cmdline,
        },
    ))
}

fn size(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let shift = match &text[digits..] {
        "" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        "T" | "TiB" => 40,
        _ => return None,
    };
    let number: u64 = text[..digits].parse().ok()?;
    number
        .checked_mul(1 << shift)
        .filter(|bytes| MEMORY_RANGE.contains(bytes))
}

pub(super) fn account(text: &str) -> Option<String> {
    let good = (1..=32).contains(&text.len())
        && !text.starts_with(['-', '.'])
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b));
    good.then(|| text.to_owned())
}

/// A kernel's command line: printable ASCII, not too long.
pub(super) fn cmdline(text: &str) -> Option<String> {
    let good = text.len() <= CMDLINE_MAX && text.bytes().all(|b| (b' '..=b'~').contains(&b));
    good.then(|| text.to_owned())
}

/// A path in normal form, so that it can be compared with an archive's.
fn boot_path(text: &str) -> Option<String> {
    let path = text.strip_prefix('/').unwrap_or(text);
    let good = path.len() <= 255
        && path.starts_with("boot/")
        && path.bytes().all(|b| (b'!'..=b'~').contains(&b))
        && path.split('/').all(|part| !matches!(part, "" | "." | ".."));
    good.then(|| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_one(name: &str, value: &str) -> Result<(Hints, BootFiles), Error> {
        let mut labels = BTreeMap::from([(name.to_owned(), value.to_owned())]);
        if [INITRD, CMDLINE].contains(&name) {
            labels.insert(KERNEL.to_owned(), "boot/vmlinuz".to_owned());
        }
        read(&labels, "vm")
    }

    #[test]
    fn good_labels_become_hints() {
        assert_eq!(read_one(MEMORY, "512M").unwrap().0.memory, Some(512 << 20));
        assert_eq!(read_one(MEMORY, "2GiB").unwrap().0.memory, Some(2 << 30));
        assert_eq!(read_one(MEMORY, "16777216").unwrap().0.memory, Some(16 << 20));
        assert_eq!(
            read_one(FIRMWARE, "uefi").unwrap().0.firmware,
            Some(Firmware::Uefi)
        );
        assert_eq!(
            read_one(USER, "gitlab-runner").unwrap().0.user.as_deref(),
            Some("gitlab-runner")
        );
        assert_eq!(
            read_one(KERNEL, "/boot/vmlinuz").unwrap().1.kernel.as_deref(),
            Some("boot/vmlinuz")
        );
        assert_eq!(
            read_one(INITRD, "boot/a/initrd").unwrap().1.initrd.as_deref(),
            Some("boot/a/initrd")
        );
        assert_eq!(
            read_one(CMDLINE, "root=/dev/vda ro")
                .unwrap()
                .1
                .cmdline
                .as_deref(),
            Some("root=/dev/vda ro")
        );
        assert_eq!(
            read_one("io.cannery.new", "\n").unwrap(),
            (Hints::default(), BootFiles::default())
        );
    }

    #[test]
    fn strange_labels_are_refused() {
        let long = "x".repeat(CMDLINE_MAX + 1);
        for (name, value) in [
            (MEMORY, ""),
            (MEMORY, "-1"),
            (MEMORY, "1K"),
            (MEMORY, "512 M"),
            (MEMORY, "99999999999999999999"),
            (MEMORY, "18446744073709551615T"),
            (FIRMWARE, "BIOS"),
            (FIRMWARE, "/etc/passwd"),
            (USER, ""),
            (USER, "-oProxyCommand=x"),
            (USER, "a b"),
            (USER, "root\n"),
            (KERNEL, "vmlinuz"),
            (KERNEL, "boot/../etc/passwd"),
            (KERNEL, "boot//x"),
            (KERNEL, "boot/"),
            (INITRD, "boot/vmlinuz"),
            (CMDLINE, "a\nb"),
            (CMDLINE, "a\0"),
            (CMDLINE, &long),
        ] {
            let error = read_one(name, value).expect_err(value).to_string();
            assert!(error.contains(name) && !error.contains('\n'), "{error}");
            let reason = Hints::check(name, value).expect_err(value);
            assert!(error.ends_with(reason), "{error}");
        }
        for name in [INITRD, CMDLINE] {
            let alone = BTreeMap::from([(name.to_owned(), "boot/x".to_owned())]);
            assert!(read(&alone, "vm").is_err(), "{name}");
        }
    }
}
