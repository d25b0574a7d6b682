//! The `gitlab-runner` binary that a job's scripts call in the guest to move caches and artifacts.
//!
//! gitlab-runner's scripts look for it on the `PATH`, and pass with a warning where there is none, so that artifacts are lost
//! without a failure. An image may bring it; where it does not, [`bring`] copies one from this host.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::shell::OWN_PROGRAMS;
use super::ssh::{self, Connection};

/// A binary of 100 MB passes in less at half a megabyte a second, which is slow even for an emulated guest.
const LONGEST_COPY: Duration = Duration::from_secs(240);
/// What a Go binary of 100 MB needs to tell its version in an emulated guest that is busy otherwise.
const LONGEST_ANSWER: Duration = Duration::from_secs(60);
/// The first bytes of a program, by elf(5): up to the machine that it is for.
const ELF_BEGINS: usize = 20;

/// Why no helper can be brought into a guest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file on this host cannot be read.
    #[error("the helper {path} cannot be read: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is no program for this kind of guest.
    #[error("the helper {path} is {what}, and the guest needs a program for {wanted}")]
    NoProgram {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        what: String,
        /// The guest's architecture.
        wanted: &'static str,
    },
    /// The guest did not take it.
    #[error("the guest has no place for it: {0}")]
    NoPlace(String),
    /// The connection did not hold.
    #[error(transparent)]
    Ssh(#[from] ssh::Error),
}

/// A helper on this host, seen to be a program for this host's architecture, which is the guests' too.
#[derive(Debug)]
pub struct Helper {
    file: File,
    /// How large it is, in bytes.
    pub size: u64,
}

impl Helper {
    /// Opens a helper.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let unreadable = |source| Error::Unreadable {
            path: path.to_owned(),
            source,
        };
        let mut file = File::open(path).map_err(unreadable)?;
        let about = file.metadata().map_err(unreadable)?;
        if !about.is_file() {
            return Err(unreadable(io::Error::other("it is no file")));
        }
        let mut begins = Vec::new();
        file.by_ref()
            .take(ELF_BEGINS as u64)
            .read_to_end(&mut begins)
            .map_err(unreadable)?;
        file.rewind().map_err(unreadable)?;
        let wanted = std::env::consts::ARCH;
        match architecture(&begins) {
            Some(found) if found == wanted => Ok(Self {
                file,
                size: about.len(),
            }),
            found => Err(Error::NoProgram {
                path: path.to_owned(),
                what: found.map_or("no Linux program".to_owned(), |a| format!("a program for {a}")),
                wanted,
            }),
        }
    }
}

/// For which architecture a program with these first bytes is; none where it is no ELF program.
fn architecture(begins: &[u8]) -> Option<&'static str> {
    let machine = begins.get(18..ELF_BEGINS)?;
    if !begins.starts_with(b"\x7fELF") {
        return None;
    }
    let machine = <[u8; 2]>::try_from(machine).ok()?;
    // Byte 5 says in which order numbers stand.
    let number = if begins.get(5) == Some(&2) {
        u16::from_be_bytes(machine)
    } else {
        u16::from_le_bytes(machine)
    };
    Some(match number {
        0x3e => "x86_64",
        0xb7 => "aarch64",
        0x03 => "x86",
        0x28 => "arm",
        0xf3 => "riscv64",
        0x16 => "s390x",
        0x15 => "powerpc64",
        _ => "another architecture",
    })
}

/// What a guest has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// No such program on the `PATH` that scripts have.
    Missing,
    /// One that does not run, with what was said about it.
    Broken(String),
    /// One of this version.
    Version(String),
}

/// A text of POSIX `sh` that prints one line about the helper, for [`read_answer`].
pub fn question() -> String {
    format!(
        "( PATH=$PATH:{OWN_PROGRAMS}; if command -v gitlab-runner >/dev/null; then \
         v=$(gitlab-runner --version 2>&1 </dev/null); \
         case $v in *Version:*) echo \"helper $(echo \"$v\" | sed -n 's/^Version: *//p')\" ;; \
         *) echo \"helper-broken $(echo \"$v\" | head -n 1)\" ;; esac; else echo helper-missing; fi ); "
    )
}

/// Reads a line of [`question`]'s answer; none where it is another line.
pub fn read_answer(line: &str) -> Option<Found> {
    match line.split_once(' ').unwrap_or((line, "")) {
        ("helper-missing", "") => Some(Found::Missing),
        ("helper-broken", why) => Some(Found::Broken(why.trim().to_owned())),
        ("helper", version) if !version.trim().is_empty() => Some(Found::Version(version.trim().to_owned())),
        _ => None,
    }
}

/// Copies the helper into the guest, piece by piece, and asks it who it is.
///
/// It goes to `/usr/local/bin` where that is on the `PATH` and may be written to, by `sudo` too; else into a folder of the user's own
/// that the wrapper around scripts puts on their `PATH`.
pub async fn bring(connection: &Connection, helper: Helper) -> Result<Found, Error> {
    let output = connection
        .start(copy(), helper.file)
        .collect(LONGEST_COPY)
        .await?;
    if output.code != Some(0) {
        let said = format!("{} {}", output.stdout.trim(), output.stderr.trim());
        return Err(Error::NoPlace(said.trim().to_owned()));
    }
    let answer = connection.sh(&question(), LONGEST_ANSWER).await?;
    Ok(answer
        .stdout
        .lines()
        .find_map(read_answer)
        .unwrap_or_else(|| Found::Broken(answer.stderr.trim().to_owned())))
}

/// The command that takes the helper from its standard input; in the words that [`super::shell::wrapper`] may use, for the same reasons.
fn copy() -> String {
    let text = format!(
        "umask 022; d=/usr/local/bin; s=; \
         case :$PATH: in \
         *:$d:*) mkdir -p $d 2>/dev/null; [ -w $d ] || s=\"sudo -n\"; $s test -w $d 2>/dev/null || d= ;; \
         *) d= ;; \
         esac; \
         if [ -z \"$d\" ]; then s=; d={OWN_PROGRAMS}; mkdir -p \"$d\" || exit 1; fi; \
         t=$d/.gitlab-runner.new; \
         if [ \"$s\" ]; then sudo -n sh -c \"umask 022; cat >$t && chmod 0755 $t && mv -f $t $d/gitlab-runner\"; \
         else cat >\"$t\" && chmod 0755 \"$t\" && mv -f \"$t\" \"$d/gitlab-runner\"; fi || \
         {{ $s rm -f \"$t\"; exit 1; }}"
    );
    format!("exec /bin/sh -c '{text}'")
}

/// Is the guest's helper older than the runner that writes the scripts? Only major and minor numbers count: scripts of the
/// same release fit. None where a version is not one that people release.
pub fn is_older(helper: &str, runner: &str) -> Option<bool> {
    let numbers = |version: &str| -> Option<(u32, u32)> {
        let mut parts = version.split('.');
        Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    };
    Some(numbers(helper)? < numbers(runner)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::process::{Command, Stdio};

    use super::*;

    fn elf(order: u8, machine: [u8; 2]) -> Vec<u8> {
        let mut bytes = b"\x7fELF\x02".to_vec();
        bytes.push(order);
        bytes.resize(18, 0);
        bytes.extend(machine);
        bytes
    }

    #[test]
    fn a_programs_architecture_stands_in_its_header() {
        for (bytes, expected) in [
            (elf(1, [0x3e, 0]), Some("x86_64")),
            (elf(1, [0xb7, 0]), Some("aarch64")),
            (elf(2, [0, 0x16]), Some("s390x")),
            (elf(1, [0xff, 0xff]), Some("another architecture")),
            (b"#!/bin/sh\nexec true".to_vec(), None),
            (b"#!/bin/sh\nexec true and so on".to_vec(), None),
            (elf(1, [0x3e, 0])[..19].to_vec(), None),
            (Vec::new(), None),
        ] {
            assert_eq!(architecture(&bytes), expected, "{bytes:?}");
        }
    }

    #[test]
    fn only_a_program_for_these_guests_is_a_helper() {
        let own = std::env::current_exe().unwrap();
        assert!(Helper::open(&own).unwrap().size > 0);
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("script");
        std::fs::write(&script, "#!/bin/sh\n").unwrap();
        for (path, says) in [
            (script, "no Linux program"),
            (dir.path().to_owned(), "it is no file"),
            (dir.path().join("none"), "No such file"),
        ] {
            let error = Helper::open(&path).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn older_by_a_minor_release_is_older_and_what_is_no_release_is_not_judged() {
        for (helper, runner, older) in [
            ("17.9.3", "19.3.0", Some(true)),
            ("19.2.1", "19.3.0", Some(true)),
            ("19.3.0", "19.3.1", Some(false)),
            ("19.10.0", "19.9.0", Some(false)),
            ("20.0.0~pre.12", "19.3.0", Some(false)),
            ("development version", "19.3.0", None),
            ("19.3.0", "", None),
        ] {
            assert_eq!(is_older(helper, runner), older, "{helper} {runner}");
        }
    }

    /// A shell with this home and `PATH`, as sshd starts one.
    fn guest(home: &Path, path: &str) -> Command {
        let mut command = Command::new("sh");
        command.env_clear().env("HOME", home).env("PATH", path);
        command
    }

    #[test]
    fn a_helper_goes_to_a_folder_of_its_own_and_is_found_there() {
        let home = tempfile::tempdir().unwrap();
        let ask = || {
            let mut shell = guest(home.path(), "/usr/bin:/bin");
            let output = shell.arg("-c").arg(question()).output().unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            text.lines().find_map(read_answer).unwrap()
        };
        assert_eq!(ask(), Found::Missing);
        for (program, expected) in [
            (
                "#!/bin/sh\nprintf 'Version:      19.3.0\\nGit revision: 1\\n'\n",
                Found::Version("19.3.0".to_owned()),
            ),
            (
                "#!/bin/sh\necho 'cannot execute' >&2; exit 126\n",
                Found::Broken("cannot execute".to_owned()),
            ),
        ] {
            let mut shell = guest(home.path(), "/usr/bin:/bin");
            let mut child = shell.arg("-c").arg(copy()).stdin(Stdio::piped()).spawn().unwrap();
            io::Write::write_all(child.stdin.as_mut().unwrap(), program.as_bytes()).unwrap();
            assert!(child.wait().unwrap().success());
            assert_eq!(ask(), expected);
        }
        let brought = home.path().join(".cannery/bin/gitlab-runner");
        let mode = std::fs::metadata(brought).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
    }

    #[test]
    fn the_command_passes_any_login_shell() {
        let command = copy();
        let inner = command.strip_prefix("exec /bin/sh -c '").unwrap();
        let inner = inner.strip_suffix('\'').unwrap();
        assert!(
            !inner.contains(['\'', '!', '\n']) && !inner.contains("\\\\"),
            "{inner}"
        );
    }
}
