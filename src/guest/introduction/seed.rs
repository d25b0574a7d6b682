//! The introduction as a disk for cloud-init (data source NoCloud).

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions, format_volume};
use serde_json::{Value, json};

use super::Introduction;

/// By this label cloud-init finds the disk.
const LABEL: [u8; 11] = *b"CIDATA     ";
/// Room for a few files of a kilobyte; FAT has its own minimum.
const SIZE: u64 = 1 << 20;

/// The seed disk could not be written.
#[derive(Debug, thiserror::Error)]
#[error("the seed disk {path} cannot be written: {source}", path = path.display())]
pub struct SeedError {
    /// The disk's file.
    pub path: PathBuf,
    /// What the system said.
    pub source: io::Error,
}

impl Introduction {
    /// Writes the seed disk, a FAT file system of one mebibyte, to a file that must not exist yet. It holds the guest's host key: only its owner may
    /// read it.
    pub fn write_seed(&self, path: &Path) -> Result<(), SeedError> {
        self.try_write(path).map_err(|source| SeedError {
            path: path.to_owned(),
            source,
        })
    }

    fn try_write(&self, path: &Path) -> io::Result<()> {
        let mut disk = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        disk.set_len(SIZE)?;
        format_volume(&mut disk, FormatVolumeOptions::new().volume_label(LABEL))?;
        let volume = FileSystem::new(&mut disk, FsOptions::new())?;
        for (name, text) in [
            ("meta-data", self.meta_data().to_string()),
            // The first line is how cloud-init knows what the rest is; JSON is YAML.
            ("user-data", format!("#cloud-config\n{}\n", self.user_data())),
        ] {
            let mut file = volume.root_dir().create_file(name)?;
            file.write_all(text.as_bytes())?;
            file.flush()?;
        }
        volume.unmount()?;
        disk.sync_all()
    }

    fn meta_data(&self) -> Value {
        json!({
            // cloud-init does its work once for each instance: the machine-id is new for each job.
            "instance-id": self.machine_id,
            "local-hostname": self.hostname,
        })
    }

    fn user_data(&self) -> Value {
        let key = self.user_key.to_string();
        let mut data = json!({
            // With this one given, no other kind is made: an RSA key takes an emulated guest eight seconds.
            "ssh_keys": {
                "ed25519_private": self.host_key.private().reveal(),
                "ed25519_public": self.host_key.public().to_string(),
            },
            "users": [
                "default",
                // An account that is there already keeps its password, whatever it is.
                { "name": self.user, "ssh_authorized_keys": [key], "lock_passwd": false },
            ],
        });
        if self.user == "root" {
            // Otherwise root's key would only print a line that asks for another user.
            data["disable_root"] = Value::Bool(false);
        }
        data
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{MACHINE_ID, introduction};
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_disk_can_be_read_as_cloud_init_does() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("seed");
        let introduction = introduction("ci");
        introduction.write_seed(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let volume = FileSystem::new(
            OpenOptions::new().read(true).write(true).open(&path).unwrap(),
            FsOptions::new(),
        )
        .unwrap();
        assert_eq!(volume.volume_label(), "CIDATA");
        assert_eq!(
            volume.read_volume_label_from_root_dir().unwrap().unwrap(),
            "CIDATA"
        );
        let read = |name: &str| {
            let mut text = String::new();
            let mut file = volume.root_dir().open_file(name).unwrap();
            file.read_to_string(&mut text).unwrap();
            text
        };
        let meta: Value = serde_json::from_str(&read("meta-data")).unwrap();
        assert_eq!(
            meta,
            json!({"instance-id": MACHINE_ID, "local-hostname": "job-1"})
        );
        let user = read("user-data");
        let user: Value = serde_json::from_str(user.strip_prefix("#cloud-config\n").unwrap()).unwrap();
        assert_eq!(user["users"][1]["name"], "ci");
        assert_eq!(
            user["users"][1]["ssh_authorized_keys"][0],
            introduction.user_key.to_string()
        );
        assert_eq!(user.get("disable_root"), None);
    }

    #[test]
    fn root_may_log_in() {
        assert_eq!(introduction("root").user_data()["disable_root"], false);
    }

    #[test]
    fn an_existing_file_is_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("seed");
        std::fs::write(&path, "mine").unwrap();
        let error = introduction("root").write_seed(&path).unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    }
}
