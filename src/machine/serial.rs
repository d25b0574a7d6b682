//! A machine's serial log.
//!
//! QEMU's first serial port goes through virtlogd into a file of the job's folder. virtlogd bounds what a guest can
//! write: at 2 MiB (`max_size` in virtlogd.conf) it renames the file to `.0`, that to `.1`, and so on, and keeps three
//! of them (`max_backups`), so a job has at most 8 MiB on disk whatever its guest does. Where the operator has set
//! `stdio_handler = "file"` in qemu.conf, QEMU writes the file itself and **nothing bounds it**.
//!
//! The file that the caller made keeps its owner when it is renamed; the one that virtlogd then begins is root's, 0600. A
//! caller that is not root therefore sees, of a guest that writes more than 2 MiB, the first part only.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::overlay::{self, own_file};

/// Mode of the log: virtlogd, which runs as root, writes it; the caller and its group read it.
const MODE: u32 = 0o640;

/// How many rotated files are looked for: virtlogd keeps three unless told otherwise.
const BACKUPS: u32 = 8;

/// Makes the empty log, so that it belongs to the caller: one that virtlogd made would be root's alone. Removes what
/// an earlier try left behind, rotated files included.
///
/// # Errors
/// The job's folder cannot be written.
pub fn create(log: &Path) -> Result<(), overlay::Error> {
    for n in 0..BACKUPS {
        // Most are not there; one that stays is only old text.
        let _ = std::fs::remove_file(rotated(log, n));
    }
    let file = own_file(log, MODE)?;
    // The mode again, since the process's mask may have taken from it.
    file.set_permissions(std::fs::Permissions::from_mode(MODE))
        .map_err(|source| overlay::Error::Write {
            path: log.to_owned(),
            source,
        })
}

/// The last lines of a log as text for people: at most `lines` lines out of the last `bytes` bytes, across rotated
/// files; escape sequences, control characters and what is no UTF-8 are taken out. A log that is not there is empty.
///
/// # Errors
/// The file is there and cannot be read.
pub fn tail(log: &Path, lines: usize, bytes: usize) -> io::Result<String> {
    let raw = last_bytes(log, bytes)?;
    // Cut in the middle of a line, unless we have it all.
    let cut = raw.len() == bytes;
    let text = plain(&String::from_utf8_lossy(&raw));
    let mut all: Vec<&str> = text.lines().map(str::trim_end).collect();
    if cut && all.len() > 1 {
        all.remove(0);
    }
    while all.last().is_some_and(|line| line.is_empty()) {
        all.pop();
    }
    let first = all.len().saturating_sub(lines);
    Ok(all[first..].join("\n"))
}

/// The last `bytes` bytes of the log and of the files that were rotated out of it, raw.
///
/// # Errors
/// The file is there and cannot be read.
pub fn last_bytes(log: &Path, bytes: usize) -> io::Result<Vec<u8>> {
    let files = std::iter::once(log.to_owned()).chain(backups(log));
    last_of(files, log, bytes)
}

/// The last bytes of these files, the newest of which comes first.
fn last_of(files: impl Iterator<Item = PathBuf>, log: &Path, bytes: usize) -> io::Result<Vec<u8>> {
    // From the newest backwards; whoever rotates in between makes us read a part twice or not at all, which a log for
    // people can bear.
    let mut parts: Vec<Vec<u8>> = Vec::new();
    let mut missing = bytes;
    let mut denied = None;
    for path in files {
        if missing == 0 {
            break;
        }
        let mut file = match File::open(&path) {
            Ok(file) => file,
            // Rotation removes and renames: a gap is an end.
            Err(error) if error.kind() == io::ErrorKind::NotFound && path != log => break,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            // What virtlogd began anew is root's alone; the file that we made has only moved.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                denied = denied.or(Some(error));
                continue;
            }
            Err(error) => return Err(error),
        };
        let wanted = u64::try_from(missing).unwrap_or(u64::MAX);
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(wanted)))?;
        let mut part = Vec::new();
        file.take(wanted).read_to_end(&mut part)?;
        missing -= part.len().min(missing);
        parts.push(part);
    }
    match denied {
        Some(error) if parts.is_empty() => Err(error),
        _ => {
            parts.reverse();
            Ok(parts.concat())
        }
    }
}

/// Reads a log as it grows: nothing twice, and nothing left out but what was rotated away twice between two readings.
#[derive(Debug)]
pub struct Follower {
    log: PathBuf,
    /// At the end of what was read; none where the log is not there yet.
    file: Option<File>,
}

impl Follower {
    /// Begins with the last `bytes` bytes that are there, which are returned, across rotated files. A log that is not there is
    /// empty.
    ///
    /// # Errors
    /// There are files, and none can be read.
    pub fn begin(log: &Path, bytes: usize) -> io::Result<(Self, Vec<u8>)> {
        let mut opened = there(log);
        let mut newest = Vec::new();
        if let Ok(Some(file)) = &mut opened {
            let wanted = u64::try_from(bytes).unwrap_or(u64::MAX);
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(wanted)))?;
            file.take(wanted).read_to_end(&mut newest)?;
        }
        let missing = bytes.saturating_sub(newest.len());
        // Older files that only root may read are as none.
        let mut all = last_of(backups(log), log, missing).unwrap_or_default();
        all.append(&mut newest);
        let file = match opened {
            Err(error) if all.is_empty() => return Err(error),
            opened => opened.unwrap_or_default(),
        };
        let log = log.to_owned();
        Ok((Self { log, file }, all))
    }

    /// What came since then, the oldest first; at most `bytes` bytes, the others the next time.
    ///
    /// # Errors
    /// The log goes on in a file that cannot be read.
    pub fn more(&mut self, bytes: usize) -> io::Result<Vec<u8>> {
        // Looked at first: what the old file gets before it is left is read below.
        let newest = there(&self.log);
        let mut new = Vec::new();
        self.read(bytes, &mut new)?;
        match newest {
            Ok(Some(newest)) if new.len() < bytes && self.is_left_for(&newest)? => {
                self.file = Some(newest);
                self.read(bytes - new.len(), &mut new)?;
            }
            Err(error) if new.is_empty() => return Err(error),
            _ => {}
        }
        Ok(new)
    }

    fn read(&mut self, bytes: usize, into: &mut Vec<u8>) -> io::Result<()> {
        let wanted = u64::try_from(bytes).unwrap_or(u64::MAX);
        match &mut self.file {
            Some(file) => file.take(wanted).read_to_end(into).map(drop),
            None => Ok(()),
        }
    }

    /// Whether the log goes on in this file, from its beginning.
    fn is_left_for(&mut self, newest: &File) -> io::Result<bool> {
        let Some(file) = &mut self.file else {
            return Ok(true);
        };
        let (old, new) = (file.metadata()?, newest.metadata()?);
        let same = (old.dev(), old.ino()) == (new.dev(), new.ino());
        // One that was cut begins anew, too.
        Ok(!same || new.len() < file.stream_position()?)
    }
}

/// A file that need not be there.
fn there(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some),
    }
}

/// Where the files may be that were rotated out of a log, the newest first.
fn backups(log: &Path) -> impl Iterator<Item = PathBuf> {
    (0..BACKUPS).map(|n| rotated(log, n))
}

fn rotated(log: &Path, n: u32) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(format!(".{n}"));
    PathBuf::from(name)
}

/// Takes out escape sequences and control characters; keeps line breaks and tabs. A carriage return inside a line is
/// a line break, since what a progress bar overwrote is worth keeping too.
fn plain(text: &str) -> String {
    #[derive(PartialEq)]
    enum At {
        Text,
        Escape,
        /// `ESC [`: ends with a byte from `@` to `~`.
        Control,
        /// `ESC ]` and its like: ends with BEL or `ESC \`.
        String,
        StringEscape,
    }
    let mut out = String::with_capacity(text.len());
    let mut at = At::Text;
    for c in text.chars() {
        at = match (at, c) {
            (At::Text, '\u{1b}') => At::Escape,
            (At::Text, '\u{9b}') => At::Control,
            (At::Text, '\n' | '\t') => {
                out.push(c);
                At::Text
            }
            (At::Text, '\r') => {
                out.push('\n');
                At::Text
            }
            (At::Text, c) if c.is_control() || c == '\u{fffd}' => At::Text,
            (At::Text, c) => {
                out.push(c);
                At::Text
            }
            (At::Escape, '[') => At::Control,
            (At::Escape, ']' | 'P' | 'X' | '^' | '_') => At::String,
            // `ESC ( B` and its like take one more character.
            (At::Escape, ' '..='/') => At::Escape,
            (At::Escape, _) => At::Text,
            (At::Control, '@'..='~') => At::Text,
            // A sequence that never ends must not swallow the lines after it.
            (At::Control | At::String, '\n') => {
                out.push('\n');
                At::Text
            }
            (At::Control, _) => At::Control,
            (At::String, '\u{7}') => At::Text,
            (At::String, '\u{1b}') => At::StringEscape,
            (At::String, _) => At::String,
            (At::StringEscape, '\\') => At::Text,
            (At::StringEscape, _) => At::String,
        };
    }
    // `\r\n` gave two breaks.
    let mut lines: Vec<&str> = Vec::new();
    for line in out.split('\n') {
        if !(line.is_empty() && lines.last().is_none_or(|last| last.is_empty())) {
            lines.push(line);
        }
    }
    lines
        .into_iter()
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use proptest::prelude::*;

    #[test]
    fn escape_sequences_go_and_text_stays() {
        let cases = [
            (
                "\u{1b}[0;32m  OK  \u{1b}[0m done\r\nnext\r\n",
                "  OK   done\nnext",
            ),
            ("\u{1b}c\u{1b}[2J\u{1b}[01;01HSeaBIOS", "SeaBIOS"),
            ("a\u{1b}]0;title\u{7}b\u{1b}]0;t\u{1b}\\c", "abc"),
            ("\u{1b}(Bx\u{8}y\0z", "xyz"),
            ("10%\r20%\r30%\n", "10%\n20%\n30%"),
            ("\u{1b}[999\nlost?", "lost?"),
            ("\u{1b}]endless\nstill here", "still here"),
            ("tab\tkept", "tab\tkept"),
            ("", ""),
        ];
        for (raw, text) in cases {
            assert_eq!(plain(raw), text, "{raw:?}");
        }
    }

    #[test]
    fn the_tail_goes_on_in_the_rotated_files() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("serial.log");
        assert_eq!(tail(&log, 5, 100).unwrap(), "");
        std::fs::write(rotated(&log, 1), "oldest\n").unwrap();
        std::fs::write(rotated(&log, 0), "one\ntwo\nthr").unwrap();
        std::fs::write(&log, "ee\nfour\n").unwrap();
        assert_eq!(tail(&log, 100, 1000).unwrap(), "oldest\none\ntwo\nthree\nfour");
        assert_eq!(tail(&log, 2, 1000).unwrap(), "three\nfour");
        // Nine bytes begin inside "three", and half a line is not shown.
        assert_eq!(tail(&log, 100, 9).unwrap(), "four");
        assert_eq!(last_bytes(&log, 9).unwrap(), b"ree\nfour\n"[..].to_vec());
    }

    #[test]
    fn who_follows_a_log_reads_all_of_it_once_through_rotation_and_a_new_beginning() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("serial.log");
        let append = |path: &Path, text: &str| {
            let mut file = File::options().append(true).create(true).open(path).unwrap();
            file.write_all(text.as_bytes()).unwrap();
        };
        let (mut early, nothing) = Follower::begin(&log, 100).unwrap();
        assert_eq!(nothing, b"");
        append(&rotated(&log, 0), "one ");
        append(&log, "two ");
        let (mut late, before) = Follower::begin(&log, 7).unwrap();
        assert_eq!(before, b"ne two ");
        assert_eq!(early.more(100).unwrap(), b"two ");
        assert_eq!(late.more(100).unwrap(), b"");

        // Rotated between two readings, with a rest in the old file.
        append(&log, "three ");
        std::fs::rename(&log, rotated(&log, 0)).unwrap();
        assert_eq!(early.more(100).unwrap(), b"three ");
        append(&rotated(&log, 0), "four ");
        append(&log, "five ");
        assert_eq!(early.more(100).unwrap(), b"four five ");
        // In pieces, each once.
        let pieces: Vec<u8> = std::iter::from_fn(|| Some(late.more(4).unwrap()).filter(|p| !p.is_empty()))
            .flatten()
            .collect();
        assert_eq!(pieces, b"three four five ");
        // Begun anew in place.
        std::fs::write(&log, "six").unwrap();
        assert_eq!(early.more(100).unwrap(), b"six");
        std::fs::remove_file(&log).unwrap();
        assert_eq!(early.more(100).unwrap(), b"");
    }

    #[test]
    fn a_new_log_is_the_callers_and_empty() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("serial.log");
        std::fs::write(&log, "old").unwrap();
        std::fs::write(rotated(&log, 0), "older").unwrap();
        create(&log).unwrap();
        assert_eq!(last_bytes(&log, 100).unwrap(), b"");
        assert_eq!(log.metadata().unwrap().permissions().mode() & 0o777, MODE);
    }

    proptest! {
        #[test]
        fn nothing_that_moves_a_cursor_comes_out(raw in proptest::collection::vec(any::<u8>(), 0..400)) {
            let text = plain(&String::from_utf8_lossy(&raw));
            prop_assert!(text.chars().all(|c| c == '\n' || c == '\t' || !c.is_control()));
        }
    }
}
