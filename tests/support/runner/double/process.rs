//! One call of the driver: a process group of its own, output through pipes, SIGTERM and SIGKILL when it must stop.

use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

/// How often it is asked whether a process has ended or must stop.
const POLL: Duration = Duration::from_millis(20);

/// The longest piece of a line that is waited for before it is passed on, in bytes.
const LONGEST_PIECE: u64 = 64 * 1024;

/// Why a call was stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Halt {
    /// The user cancelled the job.
    Canceled,
    /// The job took longer than it may.
    TimedOut,
    /// The script took longer than `RUNNER_SCRIPT_TIMEOUT`.
    ScriptTimedOut,
    /// The runner is being stopped.
    Aborted,
}

impl fmt::Display for Halt {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Canceled => "canceled",
            Self::TimedOut => "execution took longer than the job's timeout",
            Self::ScriptTimedOut => "execution took longer than RUNNER_SCRIPT_TIMEOUT",
            Self::Aborted => "aborted: terminated",
        })
    }
}

/// How a call ended.
#[derive(Debug)]
pub(super) enum End {
    /// By itself, with this status.
    Exit(ExitStatus),
    /// It was stopped.
    Halted(Halt),
}

/// Where the bytes of one stream go.
pub(super) type Sink<'a> = &'a (dyn Fn(&[u8]) + Sync);

/// Runs a command to its end and to the end of its output: whoever inherits its stdout holds the call, as it does with
/// the real runner. `halt` says whether and why it must stop.
pub(super) fn call(
    command: &mut Command,
    grace: (Duration, Duration),
    halt: &dyn Fn() -> Option<Halt>,
    stdout: Sink<'_>,
    stderr: Sink<'_>,
) -> std::io::Result<End> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let out = child.stdout.take().expect("stdout is a pipe");
    let err = child.stderr.take().expect("stderr is a pipe");
    // The readers are no scoped threads: one that is held by a left-over process must not hold the runner for ever.
    let pieces = read_both(out, err);
    let group = Pid::from_child(&child);
    let mut stop = Stop::default();
    let mut open = true;
    let mut status = None;
    loop {
        match pieces.recv_timeout(POLL) {
            Ok((Stream::Stdout, piece)) => stdout(&piece),
            Ok((Stream::Stderr, piece)) => stderr(&piece),
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                open = false;
                thread::sleep(POLL);
            }
        }
        if status.is_none() {
            status = child.try_wait()?;
        }
        if let (Some(status), false) = (status, open) {
            return Ok(stop.halt.map_or(End::Exit(status), End::Halted));
        }
        if stop.gave_up(group, grace, halt) {
            reap(child);
            return Ok(End::Halted(stop.halt.unwrap_or(Halt::Aborted)));
        }
    }
}

/// How far the stopping of a process group has come.
#[derive(Debug, Default)]
struct Stop {
    halt: Option<Halt>,
    terminated: Option<Instant>,
    killed: Option<Instant>,
}

impl Stop {
    /// Takes the next step when it is due; true when there is none left.
    fn gave_up(&mut self, group: Pid, grace: (Duration, Duration), halt: &dyn Fn() -> Option<Halt>) -> bool {
        let now = Instant::now();
        match (self.terminated, self.killed) {
            (None, _) => {
                self.halt = halt();
                if self.halt.is_some() {
                    self.terminated = Some(now);
                    // The group may have ended in this moment.
                    let _ = kill_process_group(group, Signal::TERM);
                }
                false
            }
            (Some(since), None) if now > since + grace.0 => {
                self.killed = Some(now);
                let _ = kill_process_group(group, Signal::KILL);
                false
            }
            (Some(_), Some(since)) => now > since + grace.1,
            _ => false,
        }
    }
}

/// Waits for a process that did not end in time, so that no zombie stays.
fn reap(mut child: Child) {
    thread::spawn(move || child.wait());
}

#[derive(Debug, Clone, Copy)]
enum Stream {
    Stdout,
    Stderr,
}

fn read_both(
    out: impl Read + Send + 'static,
    err: impl Read + Send + 'static,
) -> Receiver<(Stream, Vec<u8>)> {
    // Bounded, so that a driver that prints faster than the log grows is held up and not stored.
    let (sender, receiver) = mpsc::sync_channel(16);
    let also = sender.clone();
    thread::spawn(move || pass_on(out, |piece| sender.send((Stream::Stdout, piece)).is_ok()));
    thread::spawn(move || pass_on(err, |piece| also.send((Stream::Stderr, piece)).is_ok()));
    receiver
}

fn pass_on(stream: impl Read, send: impl Fn(Vec<u8>) -> bool) {
    let mut stream = BufReader::new(stream);
    loop {
        let mut piece = Vec::new();
        let read = stream.by_ref().take(LONGEST_PIECE).read_until(b'\n', &mut piece);
        if !matches!(read, Ok(1..)) || !send(piece) {
            return;
        }
    }
}

/// The exit code, or minus one for death by a signal, as the runner sees it.
pub(super) fn code(status: ExitStatus) -> i32 {
    if status.signal().is_some() {
        -1
    } else {
        status.code().unwrap_or(-1)
    }
}
