//! The wrapper around a script in the guest, as text.
//!
//! The wrapper is one line of POSIX `sh` that also busybox runs, without apostrophes, exclamation marks, line ends or doubled
//! backslashes: so one pair of apostrophes carries it through any login shell of the user, csh and fish included. Its standard input is a line
//! `NONCE TOKEN LENGTH` and then the script. What it does, and why:
//!
//! * The script goes into a new file that only its owner may read (it holds secrets) with an unguessable name, on a file system in memory where
//!   there is one: a job that has filled the disk can still run its after_script. It is no pipe, since shells read those byte by byte.
//!   `dd` writes it and tells how many bytes there were: one program less to start than `cat` and `wc`, which shows on slow guests.
//! * A script that did not arrive whole, since the connection ended or whoever sent it was killed, does not run.
//! * The script runs in a session of its own, so that its `kill 0` does not end the wrapper, with `CANNERY_RUN` in its
//!   environment, by which all its descendants are found, and with nothing to read.
//! * stdout and stderr are one pipe: that is the only way to keep their order. A relay (`cat`) brings it to sshd. The wrapper
//!   writes the exit code into the same pipe, behind all that the script has written.
//! * A helper that was brought into the guest is on the `PATH`, see [`super::helper`].
//! * When the connection has gone the relay reads on, so that children left in the background are not killed by a closed pipe.
//! * Nothing secret stands in a command line: the nonce comes over standard input.

use std::fmt;

/// The shell that runs a job's scripts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shell {
    /// GNU bash.
    Bash,
    /// Whatever the guest's `sh` is.
    Sh,
}

impl Shell {
    /// The program's name, found over the guest's `PATH`.
    pub fn program(self) -> &'static str {
        match self {
            Self::Bash => "bash",
            Self::Sh => "sh",
        }
    }
}

impl fmt::Display for Shell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.program())
    }
}

/// Names one run of a script, in the environment of all its processes. Letters, digits and hyphens only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunId(String);

impl RunId {
    /// A name that was never used before.
    pub fn new() -> Self {
        Self(uuid::Uuid::new_v4().to_string())
    }

    /// A name that was kept; none where the text is no such name.
    pub fn parse(text: &str) -> Option<Self> {
        uuid::Uuid::try_parse(text).ok().map(|id| Self(id.to_string()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for RunId {
    fn default() -> Self {
        Self::new()
    }
}

/// A folder in the guest for what cannery itself brings, as the guest's shell reads it; on the `PATH` of scripts where it exists.
pub const OWN_PROGRAMS: &str = "$HOME/.cannery/bin";

/// The environment variable that all processes of a run carry.
pub const RUN_VARIABLE: &str = "CANNERY_RUN";

/// The command to be given to sshd. It runs whatever script comes over its standard input, see [`preamble`].
pub fn wrapper(shell: Shell, run: &RunId) -> String {
    let run = run.as_str();
    let mark = "p() { printf \"\\036%s %s\\n\" \"$n\" \"$*\"; }";
    let store = "for d in /dev/shm /tmp /var/tmp \"$HOME\"; do [ -d \"$d\" ] && [ -w \"$d\" ] && break; done; \
         f=$d/.cannery-$t; \
         c=$( umask 077; set -C; LC_ALL=C exec dd bs=64k 2>&1 >\"$f\" ) || \
         { printf \"%s\\n\" \"$c\" >&2; p room; rm -f \"$f\"; exit 1; }";
    // The third line of what dd says begins with the number of bytes; where it has no such line, they are counted.
    let whole =
        "set -- $c; [ \"$7\" = \"$l\" ] || [ $(wc -c <\"$f\") -eq \"$l\" ] || { rm -f \"$f\"; exit 1; }";
    // Caught, not ignored: the script must find its signals as they are by default.
    let steadfast = "trap : HUP INT QUIT TERM";
    let relay = "{ trap \"\" HUP INT PIPE QUIT TERM; cat || exec cat >/dev/null; } 2>/dev/null";
    let text = format!(
        "read -r n t l || exit 1; {mark}; \
         [ -d \"{OWN_PROGRAMS}\" ] && export PATH=\"$PATH:{OWN_PROGRAMS}\"; \
         command -v {shell} >/dev/null 2>&1 || {{ p shell; exit 1; }}; \
         {store}; \
         {whole}; \
         s=setsid; command -v setsid >/dev/null 2>&1 || s=; \
         {steadfast}; \
         {{ {steadfast}; p start; \
         ( export {RUN_VARIABLE}={run}; exec $s {shell} \"$f\" </dev/null 2>&1 ); p exit $?; rm -f \"$f\"; }} \
         2>/dev/null | {relay}"
    );
    format!("exec /bin/sh -c '{text}'")
}

/// What stands before the script, of `length` bytes, on the wrapper's standard input.
pub fn preamble(nonce: &str, token: &str, length: usize) -> String {
    format!("{nonce} {token} {length}\n")
}

/// What the wrapper says in a marker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// What follows was written by the script.
    Start,
    /// The script has ended; a signal shows as 128 + its number, as shells have it.
    Exit(i32),
    /// The guest has no such shell.
    NoShell,
    /// The script could not be stored.
    NoRoom,
}

impl Word {
    /// Reads a marker's word; `None` for one that no wrapper writes.
    pub fn parse(word: &str) -> Option<Self> {
        match word {
            "start" => Some(Self::Start),
            "shell" => Some(Self::NoShell),
            "room" => Some(Self::NoRoom),
            _ => word.strip_prefix("exit ")?.parse().ok().map(Self::Exit),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::marker::{Piece, Scanner};
    use std::io::Write;
    use std::process::{Command, Stdio};

    const NONCE: &str = "00112233445566778899aabbccddeeff";

    /// Runs the wrapper under `login`, as sshd would, and returns output and words.
    fn run(login: &[&str], shell: Shell, script: &[u8]) -> (Vec<u8>, Vec<Word>) {
        run_part(login, shell, script, script.len())
    }

    /// The same where only so many bytes of the script arrive.
    fn run_part(login: &[&str], shell: Shell, script: &[u8], sent: usize) -> (Vec<u8>, Vec<Word>) {
        let mut child = Command::new(login[0])
            .args(&login[1..])
            .arg("-c")
            .arg(wrapper(shell, &RunId::new()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let token = RunId::new();
        stdin
            .write_all(preamble(NONCE, token.as_str(), script.len()).as_bytes())
            .unwrap();
        stdin.write_all(&script[..sent]).unwrap();
        drop(stdin);
        let output = child.wait_with_output().unwrap().stdout;
        let mut scanner = Scanner::new(NONCE);
        let (mut bytes, mut words) = (Vec::new(), Vec::new());
        for piece in scanner.feed(&output) {
            match piece {
                Piece::Bytes(b) => bytes.extend(b),
                Piece::Word(w) => words.push(Word::parse(&w).unwrap()),
            }
        }
        bytes.extend(scanner.finish());
        (bytes, words)
    }

    #[test]
    fn the_text_passes_any_login_shell() {
        for shell in [Shell::Bash, Shell::Sh] {
            let text = wrapper(shell, &RunId::new());
            let inner = text.strip_prefix("exec /bin/sh -c '").unwrap();
            let inner = inner.strip_suffix('\'').unwrap();
            assert!(
                !inner.contains(['\'', '!', '\n']) && !inner.contains("\\\\"),
                "{inner}"
            );
        }
    }

    #[test]
    fn output_code_and_bytes_come_through() {
        let script = b"printf 'a\\n'; printf b >&2; printf '\\377\\000c'; exit 9";
        for shell in [Shell::Bash, Shell::Sh] {
            let (output, words) = run(&["sh"], shell, script);
            assert_eq!(output, b"a\nb\xff\0c");
            assert_eq!(words, [Word::Start, Word::Exit(9)]);
        }
    }

    #[test]
    fn a_signal_is_a_code_as_in_shells_and_the_shells_own_remark_stays_out() {
        let (output, words) = run(&["sh"], Shell::Sh, b"kill -KILL $$");
        assert_eq!(
            (output.as_slice(), words.as_slice()),
            (&b""[..], &[Word::Start, Word::Exit(137)][..])
        );
    }

    #[test]
    fn a_script_that_ends_its_own_group_still_has_a_code() {
        let (_, words) = run(&["sh"], Shell::Bash, b"trap 'kill -TERM 0' EXIT; true");
        assert_eq!(words, [Word::Start, Word::Exit(143)]);
    }

    #[test]
    fn signals_are_as_by_default_for_the_script() {
        let (output, _) = run(&["sh"], Shell::Sh, b"grep '^SigIgn' /proc/self/status");
        let (plain, _) = (
            Command::new("grep")
                .args(["^SigIgn", "/proc/self/status"])
                .output()
                .unwrap()
                .stdout,
            (),
        );
        // The test harness itself ignores SIGPIPE and passes that on to both.
        let ignored = |text: &[u8]| {
            String::from_utf8_lossy(text)
                .split_whitespace()
                .nth(1)
                .map(str::to_owned)
        };
        let mask = u64::from_str_radix(&ignored(&output).unwrap(), 16).unwrap();
        let usual = u64::from_str_radix(&ignored(&plain).unwrap(), 16).unwrap();
        assert_eq!(mask & !usual, 0, "{mask:x} {usual:x}");
    }

    #[test]
    fn the_users_umask_stays_and_no_script_is_left_behind() {
        let (output, words) = run(&["sh"], Shell::Sh, b"umask; printf '%s' \"$0\"");
        let text = String::from_utf8(output).unwrap();
        let (umask, path) = text.split_once('\n').unwrap();
        assert_ne!(umask, "0077");
        assert_eq!(words, [Word::Start, Word::Exit(0)]);
        assert!(
            path.contains("/.cannery-") && !std::path::Path::new(path).exists(),
            "{path}"
        );
    }

    #[test]
    fn a_script_that_did_not_arrive_whole_does_not_run() {
        let script = b"echo ran\nrm -rf /builds/old\n";
        for sent in [0, 9, script.len() - 1] {
            assert_eq!(
                run_part(&["sh"], Shell::Sh, script, sent),
                (vec![], vec![]),
                "{sent}"
            );
        }
        assert_eq!(run_part(&["sh"], Shell::Sh, b"echo ran", 8).0, b"ran\n");
    }

    #[test]
    fn a_kept_name_of_a_run_comes_back_and_nothing_else_passes_for_one() {
        let run = RunId::new();
        assert_eq!(RunId::parse(run.as_str()), Some(run));
        assert_eq!(RunId::parse("x; rm -rf /"), None);
    }

    #[test]
    fn words_that_nobody_writes_are_none() {
        for word in ["", "exit", "exit x", "exit 3 4", "begin"] {
            assert_eq!(Word::parse(word), None, "{word}");
        }
    }
}
