//! An image before it is written: its disk, its boot files, and what is said of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{chain, container_disk};
use crate::image::error::Error;
use crate::image::hints::{self, Firmware, Hints};
use crate::image::inspect::{self, DiskFormat};
use crate::image::platform::Platform;
use crate::image::store::{Boot, Disk, Lease};
use crate::image::view::Guest;

/// A disk on its way to become an image.
#[derive(Debug, Clone)]
pub struct Draft {
    pub(super) disk: PathBuf,
    pub(super) format: DiskFormat,
    pub(super) virtual_size: u64,
    /// Do other files lie under it?
    pub(super) flattened: bool,
    pub(super) boot: Option<Boot>,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) hints: Hints,
    /// What the image said of its machine, as far as there are no labels for it.
    said: Hints,
    /// Keeps an image of the store there until it is read.
    _lease: Option<Lease>,
    /// The kernel's name of the architecture: `x86_64`.
    pub(super) machine: String,
    /// As images write it: `amd64`.
    pub(super) architecture: String,
}

impl Draft {
    /// Of a disk in the store, with its wishes. `machine` is its architecture by the kernel's name.
    ///
    /// # Errors
    /// [`Error::WrongPlatform`] for an architecture that no machine here can have.
    pub fn of_disk(disk: &Disk, machine: &str) -> Result<Self, Error> {
        let mut draft = Self::bare(&disk.path, disk.format, disk.virtual_size, machine)?;
        draft.boot.clone_from(&disk.boot);
        draft._lease.clone_from(&disk.lease);
        let hints = &disk.hints;
        draft.said = hints.clone();
        let memory = hints.memory.map(|bytes| bytes.to_string());
        let firmware = hints.firmware.map(|firmware| match firmware {
            Firmware::Bios => "bios".to_owned(),
            Firmware::Uefi => "uefi".to_owned(),
        });
        for (label, value) in [
            (hints::MEMORY, memory),
            (hints::FIRMWARE, firmware),
            (hints::USER, hints.user.clone()),
        ] {
            draft.labels.extend(value.map(|value| (label.to_owned(), value)));
        }
        draft.settle()?;
        Ok(draft)
    }

    /// Of a file that somebody names. Its header is checked as strictly as that of a fetched one; `limit` is the largest
    /// virtual size, in bytes.
    ///
    /// # Errors
    /// What the check finds, or [`Error::Storage`] where the file cannot be read.
    pub fn of_file(path: &Path, machine: &str, limit: u64) -> Result<Self, Error> {
        let seen = inspect::disk(path, limit, &path.display().to_string())?;
        Self::bare(path, seen.format, seen.virtual_size, machine)
    }

    /// Of the topmost file of a chain that belongs to somebody on this host; what lies under it is taken in. `format` is what
    /// its owner says that it is. Every file's header is checked.
    ///
    /// # Errors
    /// What a check finds, [`Error::Unsupported`] for a chain that cannot be followed, or [`Error::Storage`].
    pub fn of_chain(path: &Path, format: DiskFormat, machine: &str, limit: u64) -> Result<Self, Error> {
        let guest = chain::open(path, format, limit)?;
        let (_, below) = inspect::layer(path, limit, &path.display().to_string())?;
        let mut draft = Self::bare(path, format, guest.size(), machine)?;
        draft.flattened = below.is_some();
        Ok(draft)
    }

    fn bare(path: &Path, format: DiskFormat, virtual_size: u64, machine: &str) -> Result<Self, Error> {
        let image = path.display().to_string();
        let platform = Platform::of_machine(machine).ok_or_else(|| Error::WrongPlatform {
            image,
            wanted: machine.to_owned(),
            found: "x86_64 and aarch64 only".to_owned(),
        })?;
        Ok(Self {
            disk: path.to_owned(),
            format,
            virtual_size,
            flattened: false,
            boot: None,
            labels: BTreeMap::new(),
            hints: Hints::default(),
            said: Hints::default(),
            _lease: None,
            machine: machine.to_owned(),
            architecture: platform.written().trim_start_matches("linux/").to_owned(),
        })
    }

    /// With this label; what begins with `io.cannery.` must make sense.
    ///
    /// # Errors
    /// [`Error::Label`].
    pub fn label(&mut self, name: &str, value: &str) -> Result<(), Error> {
        let mut changed = self.clone();
        changed.labels.insert(name.to_owned(), value.to_owned());
        changed.settle()?;
        *self = changed;
        Ok(())
    }

    /// With these files to start from, and their command line.
    ///
    /// # Errors
    /// [`Error::Label`] for a command line that cannot be one.
    pub fn boot(&mut self, boot: Boot) -> Result<(), Error> {
        let mut changed = self.clone();
        changed.boot = Some(boot);
        changed.settle()?;
        *self = changed;
        Ok(())
    }

    /// The files that it starts from, if that is no boot loader's work.
    #[must_use]
    pub fn boot_files(&self) -> Option<&Boot> {
        self.boot.as_ref()
    }

    /// What a guest sees of the disk.
    pub(super) fn guest(&self) -> Result<Box<dyn Guest + Send>, Error> {
        // How large it may be was asked when the draft was made.
        chain::open(&self.disk, self.format, u64::MAX)
    }

    /// Makes labels and files say the same, and reads the wishes out of them.
    fn settle(&mut self) -> Result<(), Error> {
        for label in [hints::KERNEL, hints::INITRD] {
            self.labels.remove(label);
        }
        match &self.boot {
            Some(boot) => {
                let mut put = |label: &str, value: &str| {
                    self.labels.insert(label.to_owned(), value.to_owned());
                };
                put(hints::KERNEL, container_disk::KERNEL);
                if boot.initrd.is_some() {
                    put(hints::INITRD, container_disk::INITRD);
                }
                if let Some(cmdline) = &boot.cmdline {
                    put(hints::CMDLINE, cmdline);
                }
            }
            None => {
                self.labels.remove(hints::CMDLINE);
            }
        }
        let (wishes, _) = hints::read(&self.labels, &self.disk.display().to_string())?;
        // One spelling, so that an image that is read and written again is the same one.
        if let Some(memory) = wishes.memory {
            self.labels.insert(hints::MEMORY.to_owned(), spelt(memory));
        }
        self.hints = wishes.or(self.said.clone());
        Ok(())
    }
}

/// A size in the largest unit that gives a whole number.
fn spelt(bytes: u64) -> String {
    for (shift, unit) in [(30, "G"), (20, "M"), (10, "K")] {
        if bytes.trailing_zeros() >= shift {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    bytes.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::digest::Digest;
    use crate::image::hints::{DiskBus, Nic};
    use crate::image::store::Store;

    fn draft(dir: &Path) -> Draft {
        let path = dir.join("disk.raw");
        std::fs::write(&path, vec![0; 4096]).unwrap();
        Draft::of_file(&path, "x86_64", 1 << 20).unwrap()
    }

    #[test]
    fn labels_and_files_say_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let mut draft = draft(dir.path());
        assert_eq!(draft.architecture, "amd64");
        draft.label("io.cannery.memory", "512M").unwrap();
        assert_eq!(draft.hints.memory, Some(512 << 20));
        let boot = Boot {
            kernel: "/k".into(),
            initrd: None,
            cmdline: Some("quiet".to_owned()),
        };
        draft.boot(boot).unwrap();
        assert_eq!(draft.labels["io.cannery.kernel"], "boot/vmlinuz");
        assert_eq!(draft.labels["io.cannery.cmdline"], "quiet");
        assert!(!draft.labels.contains_key("io.cannery.initrd"));
    }

    #[test]
    fn an_image_of_the_store_stays_there_and_keeps_its_wishes_until_it_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let digest = Digest::of(b"vm");
        std::fs::create_dir(dir.path().join("disks").join(digest.hex())).unwrap();
        let hints = Hints {
            memory: Some(1 << 30),
            cpus: Some(8),
            disk_bus: Some(DiskBus::Sata),
            nic: Some(Nic::E1000e),
            ..Hints::default()
        };
        let disk = Disk {
            reference: "vm".to_owned(),
            digest,
            path: "/disk.raw".into(),
            format: DiskFormat::Raw,
            image_format: None,
            virtual_size: 512,
            boot: None,
            hints: hints.clone(),
            fetched_bytes: 0,
            from_cache: true,
            lease: store.lease(&digest).unwrap(),
        };
        let mut draft = Draft::of_disk(&disk, "x86_64").unwrap();
        drop(disk);
        assert_eq!(store.leased_by(&digest), [std::process::id()]);
        assert_eq!(draft.hints, hints);
        draft.label("io.cannery.memory", "512M").unwrap();
        assert_eq!((draft.hints.memory, draft.hints.cpus), (Some(512 << 20), Some(8)));
        drop(draft);
        assert!(store.leased_by(&digest).is_empty());
    }

    #[test]
    fn a_size_has_one_spelling() {
        for (bytes, text) in [
            (1 << 30, "1G"),
            (1536 << 20, "1536M"),
            (1 << 10, "1K"),
            (1025, "1025"),
        ] {
            assert_eq!(spelt(bytes), text);
        }
    }

    #[test]
    fn a_label_that_makes_no_sense_is_refused_before_anything_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let mut draft = draft(dir.path());
        let error = draft.label("io.cannery.memory", "lots").unwrap_err().to_string();
        assert!(error.contains("io.cannery.memory"), "{error}");
        // A path is not for people to choose: the files are put where the labels say.
        draft.label("io.cannery.kernel", "boot/x").unwrap();
        assert!(!draft.labels.contains_key("io.cannery.kernel"));
    }

    #[test]
    fn a_file_that_no_guest_should_see_is_no_draft() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.vmdk");
        std::fs::write(&path, [b"KDMV".as_slice(), &[0; 508]].concat()).unwrap();
        let error = Draft::of_file(&path, "x86_64", 1 << 20).unwrap_err();
        assert!(matches!(error, Error::Hostile { .. }), "{error}");
    }
}
