//! A guest that answers becomes one that scripts can run in: folders, shell, disk.

use std::time::Duration;

use crate::guest::helper;
use crate::guest::ssh::Connection;
use crate::outcome::Failure;
use crate::report::plain;

/// What scripts will need.
#[derive(Debug, Clone, Copy)]
pub(super) struct Needs<'a> {
    /// What the guest is to be called.
    pub hostname: &'a str,
    /// Folders that the user must be able to write to.
    pub folders: [&'a str; 2],
    /// The shell that runs scripts.
    pub shell: &'a str,
    /// Must the `gitlab-runner` binary be there, for caches and artifacts?
    pub helper: bool,
}

/// What was found.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Folders that could not be made writable.
    pub unwritable: Vec<String>,
    /// Is the shell there?
    pub shell: bool,
    /// What there is of the helper, where it was asked for.
    pub helper: Option<helper::Found>,
}

/// A few milliseconds' work; a guest under emulation that still boots beside it may take its time.
const DEADLINE: Duration = Duration::from_secs(60);

/// The command, for any POSIX shell. Values go in quoted; answers come out one a line.
fn command(needs: &Needs<'_>) -> String {
    let quote = |text: &str| format!("'{}'", text.replace('\'', r"'\''"));
    let mut script = String::new();
    for folder in needs.folders {
        // Not root? Then sudo may help, where it asks for nothing.
        script.push_str(&format!(
            "d={}; mkdir -p \"$d\" 2>/dev/null; [ -w \"$d\" ] || \
             sudo -n sh -c 'mkdir -p \"$1\" && chown \"$2\" \"$1\"' - \"$d\" \"$(id -un)\" 2>/dev/null; \
             [ -d \"$d\" ] && [ -w \"$d\" ] || echo \"unwritable $d\"; ",
            quote(folder)
        ));
    }
    // systemd before 254 does not read its name from the introduction. A name is no reason to fail.
    script.push_str(&format!(
        "h={}; [ \"$(cat /proc/sys/kernel/hostname)\" = \"$h\" ] || \
         {{ [ -w /proc/sys/kernel/hostname ] && echo \"$h\" >/proc/sys/kernel/hostname; }} 2>/dev/null || \
         sudo -n sh -c 'echo \"$1\" >/proc/sys/kernel/hostname' - \"$h\" 2>/dev/null; ",
        quote(needs.hostname)
    ));
    script.push_str(&format!(
        "command -v {} >/dev/null || echo noshell; ",
        needs.shell
    ));
    if needs.helper {
        script.push_str(&helper::question());
    }
    script.push_str("echo settled");
    script
}

/// Reads the command's answers; `None` where it did not come to its end.
fn read(answers: &str) -> Option<Found> {
    let mut found = Found {
        unwritable: Vec::new(),
        shell: true,
        helper: None,
    };
    for line in answers.lines() {
        match line.split_once(' ').unwrap_or((line, "")) {
            ("settled", "") => return Some(found),
            ("noshell", "") => found.shell = false,
            ("unwritable", folder) => found.unwritable.push(folder.to_owned()),
            // Other lines are a login shell's greeting.
            _ => found.helper = helper::read_answer(line).or(found.helper),
        }
    }
    None
}

/// Makes a guest ready for scripts, or says what its image lacks.
pub(super) async fn settle(connection: &Connection, needs: &Needs<'_>) -> Result<Found, Failure> {
    let output = connection.sh(&command(needs), DEADLINE).await?;
    let found = read(&output.stdout).ok_or_else(|| {
        let said = plain(&format!("{} {}", output.stdout, output.stderr), 300);
        Failure::system(format!("the guest does not run commands; it said: {said}"))
            .hint("The image needs a POSIX shell, and a login shell that lets its user run commands")
    })?;
    if !found.shell {
        return Err(Failure::author(format!("the image has no {}", needs.shell)).hint(
            "Use an image that has it, or ask the runner's operator to set guest.shell = \"sh\" for this one",
        ));
    }
    if let Some(folder) = found.unwritable.first() {
        return Err(Failure::system(format!("the guest's user cannot write to {folder}"))
            .hint("Set guest.user to root, give the image's user sudo without a password, or set builds_dir and cache_dir"));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_command_makes_folders_and_finds_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let builds = dir.path().join("it's a folder").display().to_string();
        let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        let needs = Needs {
            hostname: hostname.trim(),
            folders: [&builds, "/proc/nowhere"],
            shell: "no-such-shell",
            helper: false,
        };
        let output = Command::new("sh")
            .arg("-c")
            .arg(command(&needs))
            .output()
            .unwrap();
        let found = read(&String::from_utf8(output.stdout).unwrap()).unwrap();
        assert!(std::path::Path::new(&builds).is_dir());
        assert_eq!(
            found,
            Found {
                unwritable: vec!["/proc/nowhere".into()],
                shell: false,
                helper: None
            }
        );
    }

    #[test]
    fn a_greeting_is_no_answer_and_an_end_that_is_missing_is_noticed() {
        assert_eq!(
            read("Welcome!\nhelper-missing\nsettled\n"),
            Some(Found {
                unwritable: vec![],
                shell: true,
                helper: Some(helper::Found::Missing)
            })
        );
        assert_eq!(read("This account is not available.\n"), None);
    }
}
