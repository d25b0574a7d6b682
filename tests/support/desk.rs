//! A place to write images at: a folder, settings and a state folder of the test's own, and disks of every kind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Bytes of every test disk, as its guest sees it.
pub const SIZE: usize = 48 << 20;

/// What one test writes with.
#[derive(Debug)]
pub struct Desk {
    folder: tempfile::TempDir,
}

impl Desk {
    /// `settings` are further lines of `cannery.toml`, from the table `[images]` on.
    pub fn new(settings: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        super::everybody_may_pass(folder.path());
        let text = format!(
            "state_dir = \"{0}/state\"\n[machine]\naccelerator = \"emulation\"\n[images]\nauth_files = [\"{0}/auth.json\"]\n{settings}\n",
            folder.path().display()
        );
        fs::write(folder.path().join("cannery.toml"), text).unwrap();
        Self { folder }
    }

    /// A file of the test's folder.
    pub fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Its name, as a command takes it.
    pub fn path(&self, name: &str) -> String {
        self.at(name).to_str().unwrap().to_owned()
    }

    /// An image in a layout folder of the test's.
    pub fn layout(&self, tag: &str) -> String {
        format!("oci:{}:{tag}", self.path("layout"))
    }

    /// Calls cannery, whatever comes of it.
    pub fn call(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_cannery"))
            .arg("--config")
            .arg(self.at("cannery.toml"))
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// Calls cannery, which must succeed; the last line that it prints.
    #[track_caller]
    pub fn cannery(&self, arguments: &[&str]) -> String {
        let output = self.call(arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {error}");
        let text = String::from_utf8(output.stdout).unwrap();
        text.trim_end().lines().last().unwrap_or_default().to_owned()
    }

    /// Calls cannery, which must refuse; the sentence.
    #[track_caller]
    pub fn refusal(&self, arguments: &[&str]) -> String {
        let output = self.call(arguments);
        assert!(!output.status.success(), "{arguments:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// Runs another tool in the test's folder.
    #[track_caller]
    pub fn tool(&self, program: &str, arguments: &[&str]) -> String {
        tool_in(self.folder.path(), program, arguments)
    }

    /// Makes `disk.raw`: bytes that pack well, bytes that do not, and holes, also at its end.
    pub fn raw(&self) -> String {
        let mut disk = vec![0_u8; SIZE];
        let mut state = 11_u64;
        for (start, length, mask) in [
            (0, 200_000, 0xff),
            (1 << 20, 3 << 20, 0x03),
            ((20 << 20) + 512, 70_000, 0xff),
            (SIZE - (9 << 20), 100_000, 0x0f),
        ] {
            for byte in &mut disk[start..start + length] {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = state.to_be_bytes()[0] & mask;
            }
        }
        fs::write(self.at("packed.raw"), &disk).unwrap();
        // Holes where there are zeros, as disks have them.
        self.tool("cp", &["--sparse=always", "packed.raw", "disk.raw"]);
        fs::remove_file(self.at("packed.raw")).unwrap();
        self.path("disk.raw")
    }

    /// Makes a qcow2 of `disk.raw` with `qemu-img convert` and these options.
    pub fn qcow2(&self, name: &str, options: &[&str]) -> String {
        let mut arguments = vec!["convert", "-q", "-f", "raw", "-O", "qcow2"];
        arguments.extend(options);
        arguments.extend(["disk.raw", name]);
        self.tool("qemu-img", &arguments);
        self.path(name)
    }

    /// Does a guest see the same on both? QEMU says.
    #[track_caller]
    pub fn same(&self, one: (&str, &str), other: (&str, &str)) {
        let arguments = ["compare", "-q", "-f", one.1, "-F", other.1, one.0, other.0];
        self.tool("qemu-img", &arguments);
    }
}

/// Runs a tool, which must succeed; what it prints.
#[track_caller]
pub fn tool_in(folder: &Path, program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}
