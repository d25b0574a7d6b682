//! What a guest ran out of while a script ran: told to its author after the script has failed.
//!
//! A full disk and the kernel's out-of-memory killer are the script's own failure, and its exit code says neither.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::AsyncWrite;

use super::ssh::Connection;

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shortage {
    /// The processes that the kernel killed for lack of memory while the script ran, by name; an unknown name is empty.
    pub killed: Vec<String>,
    /// Where the file systems are mounted that have no room left.
    pub full: Vec<String>,
}

/// Two commands' work; an emulated guest that swaps may take its time, and the author waits for the result.
const DEADLINE: Duration = Duration::from_secs(10);
/// The clocks of the guest's kernel and of this host are read at different moments.
const CLOCK_SLACK: Duration = Duration::from_secs(2);
/// A file system with less room than this many KiB is full: tools fail before the last byte.
const FULL: u64 = 256;
/// Names in the kernel's log are at most 15 bytes long (`TASK_COMM_LEN`).
const LONGEST_NAME: usize = 15;

/// Asks the guest what it ran out of in the time that the script took. Nothing is found where it cannot be asked.
pub async fn ask(connection: &Connection, took: Duration, folder: &str) -> Shortage {
    let folder = folder.replace('\'', r"'\''");
    // Which commands a guest has, and whether it lets its user read the kernel's log, is up to its image.
    let text = format!(
        "cat /proc/uptime; grep '^oom_kill ' /proc/vmstat; \
         {{ dmesg || sudo -n dmesg; }} 2>/dev/null | grep 'Killed process' | tail -n 20; \
         df -P -k / /tmp /dev/shm '{folder}' 2>/dev/null | sed 's/^/df /'; \
         df -P -i / /tmp /dev/shm '{folder}' 2>/dev/null | sed 's/^/df -i /'"
    );
    match connection.sh(&text, DEADLINE).await {
        Ok(output) => read(&output.stdout, took),
        Err(e) => {
            tracing::debug!("the guest does not tell what it ran out of: {e}");
            Shortage::default()
        }
    }
}

/// Reads the guest's answer. Its words come from the job and end in the job log, so that only names and paths of usual characters are taken.
fn read(answer: &str, took: Duration) -> Shortage {
    let mut found = Shortage::default();
    let mut uptime = None;
    let mut kills = 0;
    let mut logged = false;
    for line in answer.lines() {
        if uptime.is_none() {
            uptime = line.split(' ').next().and_then(|s| s.parse::<f64>().ok());
        } else if let Some(count) = line.strip_prefix("oom_kill ") {
            kills = count.trim().parse().unwrap_or(0_u64);
        } else if let Some(rest) = line.strip_prefix("df -i ") {
            found.note_full(rest, 1);
        } else if let Some(rest) = line.strip_prefix("df ") {
            found.note_full(rest, FULL);
        } else if let (Some(up), Some((at, name))) = (uptime, kernel_line(line)) {
            logged = true;
            if up - at <= (took + CLOCK_SLACK).as_secs_f64() {
                found.killed.push(name.to_owned());
            }
        }
    }
    // A guest that hides its kernel's log still counts.
    if !logged && kills > 0 {
        found.killed.push(String::new());
    }
    found
}

impl Shortage {
    /// Reads a line of `df -P` (POSIX): file system, size, used, available, share, mount point.
    fn note_full(&mut self, line: &str, least: u64) {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let numbers = (
            fields.next().map(str::parse::<u64>),
            fields.nth(1).map(str::parse::<u64>),
        );
        let (Some(Ok(size)), Some(Ok(available))) = numbers else {
            return;
        };
        let Some(place) = fields.nth(1).filter(|p| is_plain(p)) else {
            return;
        };
        // Some file systems count no files: their size is 0.
        if size > least && available < least && !self.full.iter().any(|p| p == place) {
            self.full.push(place.to_owned());
        }
    }
}

/// `[   12.345678] Out of memory: Killed process 123 (name) …`: when, in seconds since power-on, and whom.
fn kernel_line(line: &str) -> Option<(f64, &str)> {
    let (_, rest) = line.split_once("Killed process ")?;
    let at = line.strip_prefix('[')?.split_once(']')?.0.trim().parse().ok()?;
    let name = rest.split_once('(')?.1.split_once(')')?.0;
    Some((
        at,
        if is_plain(name) && name.len() <= LONGEST_NAME {
            name
        } else {
            ""
        },
    ))
}

fn is_plain(text: &str) -> bool {
    text.bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"/._-+".contains(&b))
}

/// Listens to a script's output on its way for the words of a program that finds no room.
#[derive(Debug)]
pub struct Listening<W> {
    inner: W,
    /// How much of the words stood at the end of what has passed.
    matched: usize,
    heard: bool,
}

/// What `strerror(ENOSPC)` says, in the C locale and in English ones.
const NO_ROOM: &[u8] = b"No space left on device";

impl<W> Listening<W> {
    /// Listens to what goes to `inner`.
    pub fn new(inner: W) -> Self {
        Listening {
            inner,
            matched: 0,
            heard: false,
        }
    }

    /// Did a program say that it finds no room?
    pub fn heard_no_room(&self) -> bool {
        self.heard
    }

    fn listen(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            // The words' first letter occurs in them once: after a mismatch only that one can begin anew.
            self.matched = match byte {
                b if b == NO_ROOM[self.matched] => self.matched + 1,
                b if b == NO_ROOM[0] => 1,
                _ => 0,
            };
            if self.matched == NO_ROOM.len() {
                self.heard = true;
                return;
            }
        }
    }
}

impl<W: AsyncWrite + Unpin> AsyncWrite for Listening<W> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(context, bytes);
        if let Poll::Ready(Ok(count)) = written
            && !self.heard
        {
            self.listen(&bytes[..count]);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    const ANSWER: &str = "\
100.00 150.00
oom_kill 2
[   12.345678] Out of memory: Killed process 7 (early) total-vm:1kB
[   98.500000] Memory cgroup out of memory: Killed process 42 (cc1plus) total-vm:2kB
df Filesystem 1024-blocks Used Available Capacity Mounted on
df /dev/vda 500000 499990 10 100% /
df tmpfs 100000 0 100000 0% /tmp
df /dev/vda 500000 499990 10 100% /
df -i Filesystem Inodes IUsed IFree IUse% Mounted on
df -i /dev/vda 32768 100 32668 1% /
df -i tmpfs 9000 9000 0 100% /tmp
df -i btrfs 0 0 0 - /builds
";

    #[test]
    fn only_what_happened_while_the_script_ran_is_told() {
        let found = read(ANSWER, Duration::from_secs(5));
        assert_eq!(found.killed, ["cc1plus"]);
        assert_eq!(found.full, ["/", "/tmp"]);
        assert_eq!(read(ANSWER, Duration::from_secs(90)).killed, ["early", "cc1plus"]);
    }

    #[test]
    fn a_guest_that_hides_its_log_still_counts_and_one_without_trouble_says_nothing() {
        assert_eq!(read("9.0 1.0\noom_kill 1\n", Duration::ZERO).killed, [""]);
        for quiet in [
            "",
            "9.0 1.0\noom_kill 0\n",
            "df x\n",
            "9.0 1.0\ndf a b c d e f\ndf -i\n",
        ] {
            assert_eq!(
                read(quiet, Duration::from_secs(9)),
                Shortage::default(),
                "{quiet:?}"
            );
        }
    }

    #[test]
    fn names_of_unusual_characters_are_not_passed_on() {
        let answer = "9.0 1\n[ 8.5] Killed process 1 (\u{1b}[31mevil) x\n[ 8.5] Killed process 1 (a b) x\n";
        assert_eq!(read(answer, Duration::from_secs(9)).killed, ["", ""]);
        assert_eq!(
            read("9 1\ndf x 500000 1 0 1% /\u{1b}[2J\n", Duration::ZERO).full,
            [""; 0]
        );
    }

    #[tokio::test]
    async fn the_words_are_heard_in_pieces_of_any_size_and_nothing_else_is() {
        let text = b"cp: write error: NNo No space left on device\n";
        for size in 1..text.len() {
            let mut out = Listening::new(Vec::new());
            for piece in text.chunks(size) {
                out.write_all(piece).await.unwrap();
            }
            assert!(out.heard_no_room(), "{size}");
            assert_eq!(out.inner, text);
        }
        let mut out = Listening::new(Vec::new());
        out.write_all(b"No space left on devic, No space lef")
            .await
            .unwrap();
        assert!(!out.heard_no_room());
    }
}
