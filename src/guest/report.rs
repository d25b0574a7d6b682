//! Files that the guest gets about itself, for its job to keep.

use std::time::Duration;

use super::ssh::{self, Connection};

/// How long one file may take: two megabytes at half a megabyte a second, which is slow even for an emulated guest.
const LONGEST: Duration = Duration::from_secs(5);

/// Why they could not be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The guest did not take one.
    #[error("{0}")]
    NotTaken(String),
    /// The connection did not hold.
    #[error(transparent)]
    Ssh(#[from] ssh::Error),
}

/// Writes files into a folder of the guest, which is made where it is missing, as the user that scripts run as.
///
/// # Errors
/// The folder cannot be made or written; the guest is lost, or too slow.
pub async fn write(
    connection: &Connection,
    folder: &str,
    files: Vec<(&'static str, Vec<u8>)>,
) -> Result<(), Error> {
    for (name, content) in files {
        let said = connection
            .start(command(folder, name), content)
            .collect(LONGEST)
            .await?;
        if said.code != Some(0) {
            let words = said.stderr.trim();
            return Err(Error::NotTaken(match words {
                "" => format!("writing {name} failed without a word"),
                words => words.to_owned(),
            }));
        }
    }
    Ok(())
}

/// What writes a file from its standard input. Any login shell reads it as one word after another. Pure.
fn command(folder: &str, name: &str) -> String {
    let text = "mkdir -p -- \"$1\" && cat > \"$1/$2\"";
    format!(
        "exec /bin/sh -c {} sh {} {}",
        quoted(text),
        quoted(folder),
        quoted(name)
    )
}

/// A word that a shell takes as it is.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_file_gets_where_it_belongs_whatever_the_folder_is_called() {
        let place = tempfile::tempdir().unwrap();
        for name in ["plain", "with blank", "it's", "$(touch owned)", "-n", "a\"b\\"] {
            let folder = place.path().join(name).join(".cannery");
            for content in [&b"first"[..], b"\0\xff"] {
                let mut child = Command::new("/bin/sh")
                    .arg("-c")
                    .arg(command(folder.to_str().unwrap(), "screen.png"))
                    .stdin(Stdio::piped())
                    .current_dir(place.path())
                    .spawn()
                    .unwrap();
                child.stdin.take().unwrap().write_all(content).unwrap();
                assert!(child.wait().unwrap().success(), "{name}");
                assert_eq!(std::fs::read(folder.join("screen.png")).unwrap(), content);
            }
        }
        assert!(!place.path().join("owned").exists());
    }
}
