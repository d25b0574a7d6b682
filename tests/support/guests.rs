//! The guests that tests and the demo start; built once, by the scripts under `contrib/guests`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The tiny guest: a few seconds to SSH, in 256 MiB.
#[derive(Debug, Clone)]
pub struct Tiny {
    /// For direct kernel boot.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initrd: PathBuf,
    /// Its command line, without a final newline.
    pub cmdline: String,
    /// The root file system on a whole disk, for direct kernel boot.
    pub root: PathBuf,
    /// The same system behind boot loaders.
    pub disk: PathBuf,
}

/// Builds the tiny guest unless it is there already.
pub fn tiny() -> Tiny {
    let folder = build("contrib/guests/tiny/build");
    Tiny {
        kernel: folder.join("vmlinuz"),
        initrd: folder.join("initrd"),
        cmdline: std::fs::read_to_string(folder.join("cmdline")).expect("the tiny guest has a command line"),
        root: folder.join("root.qcow2"),
        disk: folder.join("disk.qcow2"),
    }
}

/// Builds the Debian guest unless it is there already; returns its disk, which boots with BIOS and UEFI.
pub fn debian() -> PathBuf {
    build("contrib/guests/debian/build").join("disk.qcow2")
}

/// An OCI layout folder; the images in it are named `oci:FOLDER:TAG`.
#[derive(Debug, Clone)]
pub struct Layout {
    folder: PathBuf,
}

impl Layout {
    /// A layout in this folder, which need not exist.
    pub fn at(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
        }
    }

    /// Adds the tiny guest for direct kernel boot; `extra` goes onto its kernel command line.
    /// Returns the reference.
    pub fn add_tiny(&self, tag: &str, extra: &str) -> String {
        let tiny = tiny();
        let cmdline = format!("{} {extra}", tiny.cmdline);
        self.add(
            tag,
            &tiny.root,
            &[
                "--kernel",
                text(&tiny.kernel),
                "--initrd",
                text(&tiny.initrd),
                "--cmdline",
                cmdline.trim_end(),
                "--memory",
                "256M",
                "--user",
                "root",
            ],
        )
    }

    /// Adds a disk with these options of `contrib/guests/oci-layout`. Returns the reference.
    pub fn add(&self, tag: &str, disk: &Path, options: &[&str]) -> String {
        let status = Command::new(checkout().join("contrib/guests/oci-layout"))
            .args(options)
            .arg(&self.folder)
            .arg(tag)
            .arg(disk)
            .stdout(Stdio::null())
            .status()
            .expect("contrib/guests/oci-layout can be started");
        assert!(status.success(), "contrib/guests/oci-layout could not add {tag}");
        format!("oci:{}:{tag}", self.folder.display())
    }

    /// Where the layout is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

fn build(script: &str) -> PathBuf {
    let output = Command::new(checkout().join(script))
        .stderr(Stdio::inherit())
        .output()
        .unwrap_or_else(|error| panic!("{script} cannot be started: {error}"));
    assert!(
        output.status.success(),
        "{script} failed; what it said stands above"
    );
    let stdout = String::from_utf8(output.stdout).expect("the folder's name is text");
    PathBuf::from(stdout.lines().last().expect("the last line names the folder"))
}

/// The folder of the checkout.
pub fn checkout() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("the checkout's path is text")
}
