//! Which process will call again, recognised beyond doubt after it died or the host was rebooted.

use std::fs;

use rustix::process::{Pid, getppid, test_kill_process};
use serde::{Deserialize, Serialize};

/// A process: its number alone is used again sooner or later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    /// The kernel's random name for this run of the host.
    pub boot_id: String,
    /// The process's number.
    pub pid: u32,
    /// When it started, in clock ticks since the host did.
    pub started: u64,
}

impl Caller {
    /// The process that started this one's process group: gitlab-runner gives each call a group of its
    /// own, so that wrappers between the two (a shell, sudo) do not count.
    pub fn of_this_call() -> Self {
        let own = std::process::id();
        // 0 where the group's leader is outside of this container, and nobody here knows it.
        let leader = stat(own).map_or(0, |stat| stat.group);
        let above = if leader == own { None } else { stat(leader) };
        let runner = above.map(|leader| leader.parent).filter(|parent| *parent != 0);
        Caller::of(runner.or_else(parent).unwrap_or(1))
    }

    /// This process.
    pub fn this() -> Self {
        Caller::of(std::process::id())
    }

    fn of(pid: u32) -> Self {
        Caller {
            boot_id: boot_id(),
            pid,
            started: stat(pid).map_or(0, |s| s.started),
        }
    }

    /// Is it still there?
    pub fn is_alive(&self) -> bool {
        let same = |s: Stat| s.started == self.started && !s.zombie;
        // One that is hidden from this user counts as the same.
        self.boot_id == boot_id() && stat(self.pid).map_or_else(|| exists(self.pid), same)
    }

    /// Was the host rebooted since?
    pub fn was_before_this_boot(&self) -> bool {
        self.boot_id != boot_id()
    }
}

/// Is there a process of this number? The kernel says so of hidden ones, too (`hidepid`, proc(5)).
pub(super) fn exists(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| test_kill_process(pid) != Err(rustix::io::Errno::SRCH))
}

/// The parent of this process; none where it is outside of this container.
fn parent() -> Option<u32> {
    Some(getppid()?.as_raw_nonzero().get().unsigned_abs())
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|s| s.trim().to_owned())
        .unwrap_or_default()
}

struct Stat {
    zombie: bool,
    parent: u32,
    group: u32,
    started: u64,
}

fn stat(pid: u32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Reads the line of `/proc/PID/stat` (proc(5)): the name in parentheses may itself hold blanks and parentheses.
fn parse_stat(line: &str) -> Option<Stat> {
    let mut fields = line[line.rfind(')')? + 1..].split_ascii_whitespace();
    let zombie = matches!(fields.next()?, "Z" | "X");
    let parent = fields.next()?.parse().ok()?;
    let group = fields.next()?.parse().ok()?;
    // The start time is field 22; state was field 3, parent 4, group 5.
    let started = fields.nth(16)?.parse().ok()?;
    Some(Stat {
        zombie,
        parent,
        group,
        started,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_cannot_confuse_the_parser() {
        let line = "42 (a) b) R 7 (x) S 17 43 42 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 987654 0 0";
        // The name is `a) b) R 7 (x`: everything up to the last parenthesis.
        let stat = parse_stat(line).unwrap();
        let read = (stat.parent, stat.group, stat.started, stat.zombie);
        assert_eq!(read, (17, 43, 987_654, false));
        assert!(parse_stat("").is_none());
        assert!(parse_stat("1 (x) R").is_none());
    }

    #[test]
    fn this_process_lives_and_one_of_another_boot_or_start_does_not() {
        let me = Caller::this();
        assert!(me.is_alive());
        assert!(
            !Caller {
                boot_id: "other".into(),
                ..me.clone()
            }
            .is_alive()
        );
        assert!(
            !Caller {
                started: me.started + 1,
                ..me
            }
            .is_alive()
        );
    }

    #[test]
    fn a_child_that_ended_is_dead_even_before_it_is_waited_for() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let caller = Caller::of(child.id());
        assert!(caller.is_alive());
        child.kill().unwrap();
        while caller.is_alive() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(exists(caller.pid), "a zombie still has its number");
        child.wait().unwrap();
        assert!(!caller.is_alive() && !exists(caller.pid));
    }
}
