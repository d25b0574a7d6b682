//! A program that is called and timed.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use tokio::process::Command;

use crate::outcome::Failure;
use crate::report::plain;

/// How often a program's memory is looked at. The kernel keeps the highest value itself; only the last moment can be missed.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Nothing that is measured takes longer.
const DEADLINE: Duration = Duration::from_secs(3600);
/// Characters of a failed program's words that are passed on.
const MOST_WORDS: usize = 1000;

/// A program with the arguments and variables that all calls of it share.
#[derive(Debug, Clone)]
pub struct Tool {
    /// The program: a path, or a name that is looked up in `PATH`.
    pub program: PathBuf,
    /// What stands before the arguments of each call.
    pub arguments: Vec<OsString>,
    /// Variables beside those of this process.
    pub variables: Vec<(&'static str, OsString)>,
}

/// What a call cost.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cost {
    pub(super) time: Duration,
    /// The most memory that the program itself had at a time, in bytes.
    pub(super) memory: u64,
}

impl Tool {
    /// A program that needs nothing else.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            arguments: Vec::new(),
            variables: Vec::new(),
        }
    }

    /// Is it there?
    pub(super) fn is_there(&self) -> bool {
        let path = std::process::Command::new("sh")
            .args(["-c", "command -v \"$0\""])
            .arg(&self.program)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        path.is_ok_and(|status| status.success())
    }

    /// Runs it to its end. Dropping the future kills it.
    pub(super) async fn call<A: AsRef<std::ffi::OsStr>>(
        &self,
        folder: &Path,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Cost, Failure> {
        let name = self.program.display();
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .args(arguments)
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        // What an earlier call has left in memory is not to be written at this one's expense.
        rustix::fs::sync();
        let begin = Instant::now();
        let child = command
            .spawn()
            .map_err(|e| Failure::system(format!("cannot start {name}: {e}")))?;
        let status = child.id().map(|id| PathBuf::from(format!("/proc/{id}/status")));
        let mut memory = 0;
        let mut tick = tokio::time::interval(LOOK_EVERY);
        let ended = tokio::time::timeout(DEADLINE, child.wait_with_output());
        tokio::pin!(ended);
        let output: Output = loop {
            tokio::select! {
                output = &mut ended => break output
                    .map_err(|_| Failure::system(format!("{name} did not end within an hour")))?
                    .map_err(|e| Failure::system(format!("cannot wait for {name}: {e}")))?,
                _ = tick.tick() => memory = memory.max(status.as_deref().and_then(highest_memory).unwrap_or_default()),
            }
        };
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr);
            let words = plain(words.trim(), MOST_WORDS);
            return Err(Failure::system(format!("{name} failed: {words}")));
        }
        Ok(Cost {
            time: begin.elapsed(),
            memory,
        })
    }
}

/// `VmHWM` of a process (proc(5)), in bytes.
fn highest_memory(status: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(status).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_call_is_timed_and_its_memory_seen() {
        let cost = Tool::new("sh")
            .call(Path::new("/"), ["-c", "sleep 0.1"])
            .await
            .unwrap();
        assert!(cost.time >= Duration::from_millis(100));
        assert!((1 << 16..1 << 30).contains(&cost.memory), "{}", cost.memory);
    }

    #[tokio::test]
    async fn a_failure_says_what_the_program_said() {
        let failed = Tool::new("sh")
            .call(Path::new("/"), ["-c", "echo no such tag >&2; exit 3"])
            .await;
        assert_eq!(failed.unwrap_err().message, "sh failed: no such tag");
        assert!(Tool::new("sh").is_there() && !Tool::new("no-such-program").is_there());
    }
}
