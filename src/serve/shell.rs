//! The terminal: a shell in the guest as the job's user, in the project's folder, with the job's variables.

use std::time::Duration;

use crate::guest::shell::OWN_PROGRAMS;
use crate::guest::ssh::{Connection, Keyboard, Patience, Running, Window};
use crate::job::Variables;
use crate::outcome::Failure;
use crate::record::{JobDir, VARIABLES};
use crate::settings::Settings;
use crate::start;

/// A guest that runs scripts answers within this, also where its processor is emulated and busy.
const LOGIN: Duration = Duration::from_secs(30);
/// A small file is written in the guest within this.
const HANDING_OVER: Duration = Duration::from_secs(20);

/// Stores what it reads where only the user may read it, in memory where there is such a place, and says where. Its text passes any
/// login shell, as that of [`crate::guest::shell`] does.
const STORE: &str = "exec /bin/sh -c 'umask 077; for d in /dev/shm /tmp /var/tmp \"$HOME\"; do \
     [ -d \"$d\" ] && [ -w \"$d\" ] && break; done; f=$(mktemp \"$d/.cannery-XXXXXX\") && cat >\"$f\" && printf %s \"$f\"'";

/// A shell that runs. Dropping it hangs up.
pub(super) struct Shell {
    pub(super) running: Running,
    pub(super) keyboard: Keyboard,
    /// The way to it.
    _connection: Connection,
}

/// Enters the guest of a job.
pub(super) async fn open(settings: &Settings, job: &JobDir, window: Window) -> Result<Shell, Failure> {
    let record = job.read()?;
    let Some((record, guest)) = record.and_then(|r| r.guest.clone().map(|g| (r, g))) else {
        return Err(Failure::system("the machine is not ready yet"));
    };
    let way = settings.guest(&record.image.unwrap_or_default());
    let target = start::target(job, &guest, &way)?;
    let patience = Patience {
        login: LOGIN,
        silence: way.lost_after,
    };
    let connection = Connection::open(target, patience, |_| ()).await?;
    let path = job.file(VARIABLES);
    let variables = Variables::load(&path)
        .map_err(|e| Failure::system(format!("cannot read {}: {e}", path.display())))?;
    // On no command line, which other users of the guest could read.
    let stored = connection
        .start(STORE, variables.exports())
        .collect(HANDING_OVER)
        .await?;
    let (running, keyboard) = connection.terminal(command(&stored.stdout, &guest.shell), window);
    Ok(Shell {
        running,
        keyboard,
        _connection: connection,
    })
}

/// What runs on the terminal: a shell, which first takes the variables from the file that the guest has named. A guest that names
/// something odd gets a shell without them.
fn command(stored: &str, shell: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'/' | b'.' | b'-' | b'_');
    let variables = if stored.starts_with('/') && stored.bytes().all(plain) {
        format!(". {stored}; rm -f {stored}; ")
    } else {
        String::new()
    };
    let shell = if shell == "sh" { "sh" } else { "bash" };
    format!(
        "exec /bin/sh -c '{variables}\
         [ -d \"{OWN_PROGRAMS}\" ] && export PATH=\"$PATH:{OWN_PROGRAMS}\"; \
         cd \"$CI_PROJECT_DIR\" 2>/dev/null || cd; exec {shell}'"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shell_takes_the_variables_removes_them_and_begins_in_the_project() {
        let folder = tempfile::tempdir().unwrap();
        let project = folder.path().join("project");
        std::fs::create_dir(&project).unwrap();
        let file = folder.path().join("v");
        let path = file.to_str().unwrap();
        std::fs::write(
            &file,
            format!(
                "export CI_PROJECT_DIR='{}'\nexport WORD='a b'\n",
                project.display()
            ),
        )
        .unwrap();
        let command = command(path, "sh");
        let mut child = std::process::Command::new("sh")
            .args(["-c", &command])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"pwd; echo \"$WORD\"\n").unwrap();
        let output = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        assert_eq!(
            output,
            format!("{}\na b\n", project.canonicalize().unwrap().display())
        );
        assert!(!file.exists());
    }

    #[test]
    fn nothing_that_a_guest_says_becomes_a_command() {
        for odd in ["", "x", "/tmp/$(reboot)", "/tmp/x; reboot", "/tmp/'", "/tmp/a\nb"] {
            let command = command(odd, "bash");
            assert!(
                !command.contains("rm -f") && !command.contains("reboot"),
                "{odd}: {command}"
            );
        }
        assert!(command("/tmp/x", "bash").ends_with("exec bash'"));
    }

    #[test]
    fn the_text_passes_any_login_shell() {
        for text in [STORE, &command("/dev/shm/.cannery-Ab1", "bash")] {
            let inner = text.strip_prefix("exec /bin/sh -c '").unwrap();
            let inner = inner.strip_suffix('\'').unwrap();
            assert!(
                !inner.contains(['\'', '!', '\n']) && !inner.contains("\\\\"),
                "{inner}"
            );
        }
    }
}
