//! Runs one script in the guest, from its text to its exit code.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt};

use super::cancel;
use super::marker::{Piece, Scanner};
use super::ready::machine_ends;
use super::shell::{self, RunId, Shell, Word};
use super::ssh::{self, Connection, Event, Running};
use crate::kill::{self, Point};

/// How much of what comes before the script's own output is kept to explain a failed start.
const MOST_REMARKS: usize = 2 << 10;
/// After all processes of a cancelled run are gone, its exit code may take this long to arrive.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// A guest that reboots ends its SSH server first: so long it may take until the machine itself is seen to end.
const END_OF_MACHINE: Duration = Duration::from_secs(5);

/// How a script ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// By itself, with this code; 128 + n when signal n killed it.
    Exited(i32),
    /// By our order.
    Cancelled,
}

/// Why nobody knows how a script ended, or why it did not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image has no such shell.
    #[error("the guest has no shell named {0}")]
    NoShell(Shell),
    /// The guest has no place for the script.
    #[error("the guest has no room for the script{}", remarks(.0))]
    NoRoom(String),
    /// The wrapper did not start: a login shell that lets nobody in, no `/bin/sh`.
    #[error("the guest did not start the script{}", remarks(.0))]
    NotStarted(String),
    /// The script's guardian in the guest was killed, so that its exit code is unknown.
    #[error(
        "the script's output ended without an exit code: something in the guest has killed the processes that watch over it"
    )]
    Cut,
    /// The machine has ended or stopped meanwhile.
    #[error("{0}")]
    Machine(String),
    /// The script was to be cancelled, and parts of it may still run.
    #[error(transparent)]
    Cancel(#[from] cancel::Error),
    /// The connection did not hold.
    #[error(transparent)]
    Ssh(#[from] ssh::Error),
    /// The job log takes no more.
    #[error("the script's output cannot be passed on: {0}")]
    Output(io::Error),
}

fn remarks(text: &str) -> String {
    match text.trim() {
        "" => String::new(),
        text => format!("; it said: {text}"),
    }
}

/// What can happen to a script from outside.
#[derive(Debug)]
pub struct Control<C, A> {
    /// Ends when the script shall be cancelled.
    pub cancel: C,
    /// How long a cancelled script may take after TERM, until KILL.
    pub grace: Duration,
    /// Asked once a second; says in a sentence why the machine no longer can answer.
    pub alive: A,
}

/// Runs `script` (any bytes, megabytes too) with `shell` and writes what it prints to `output`, in its order and byte by byte.
///
/// Returns as soon as the script itself has ended; what it left in the background lives on, and what that prints is
/// discarded. All processes of the run carry `run` in their environment.
pub async fn run_script<C, A, F>(
    connection: &Connection,
    shell: Shell,
    run: &RunId,
    script: &[u8],
    output: &mut (dyn AsyncWrite + Send + Unpin),
    control: Control<C, A>,
) -> Result<Ending, Error>
where
    C: Future<Output = ()>,
    A: Fn() -> F,
    F: Future<Output = Result<(), String>>,
{
    let nonce = uuid::Uuid::new_v4().simple().to_string();
    let token = uuid::Uuid::new_v4().simple().to_string();
    let mut input = shell::preamble(&nonce, &token, script.len()).into_bytes();
    input.extend_from_slice(script);
    let transcript = Transcript::new(shell, &nonce);
    let running = connection.start(shell::wrapper(shell, run), input);
    let mut follow = pin!(follow(running, transcript, output));
    let both = async {
        tokio::select! {
            biased;
            () = control.cancel => {}
            ending = &mut follow => return ending.map(Ending::Exited),
        }
        kill::point(Point::CancelBegun);
        let mut cancelling = pin!(cancel::cancel(connection, run, control.grace));
        let mut over = false;
        let cancelled = loop {
            tokio::select! {
                result = &mut cancelling => break result,
                // How it ends says nothing about the script any more; but what it still prints is passed on.
                _ = &mut follow, if !over => over = true,
            }
        };
        cancelled?;
        kill::point(Point::ScriptCancelled);
        if !over {
            // All that could write is gone: only what is under way is still to come, and not worth more than a moment.
            let _ = tokio::time::timeout(LAST_WORDS, follow).await;
        }
        Ok(Ending::Cancelled)
    };
    let alive = &control.alive;
    let ending = ssh::unless(both, machine_ends(alive))
        .await
        .map_err(Error::Machine)?;
    match ending {
        Err(Error::Ssh(ssh::Error::Lost(_))) => {
            match tokio::time::timeout(END_OF_MACHINE, machine_ends(alive)).await {
                Ok(why) => Err(Error::Machine(why)),
                Err(_) => ending,
            }
        }
        other => other,
    }
}

/// Passes on what the script prints until it has ended.
async fn follow(
    mut running: Running,
    mut transcript: Transcript,
    output: &mut (dyn AsyncWrite + Send + Unpin),
) -> Result<i32, Error> {
    loop {
        let bytes = match running.next().await {
            Event::Output(bytes) => bytes,
            Event::Diagnostics(bytes) => {
                transcript.remark(&bytes);
                continue;
            }
            Event::Failed(e) => return Err(e.into()),
            Event::Ended(_) => {
                let (rest, why) = transcript.cut_off();
                output.write_all(&rest).await.map_err(Error::Output)?;
                output.flush().await.map_err(Error::Output)?;
                return Err(why);
            }
        };
        let (bytes, end) = transcript.take(&bytes);
        if !bytes.is_empty() {
            output.write_all(&bytes).await.map_err(Error::Output)?;
        }
        // A line is shown when it was printed, not when the next one comes.
        output.flush().await.map_err(Error::Output)?;
        if let Some(end) = end {
            return end;
        }
    }
}

/// Sorts the stream into remarks of the login shell, output of the script, and the wrapper's words.
struct Transcript {
    scanner: Scanner,
    shell: Shell,
    started: bool,
    remarks: Vec<u8>,
}

impl Transcript {
    fn new(shell: Shell, nonce: &str) -> Self {
        Self {
            scanner: Scanner::new(nonce),
            shell,
            started: false,
            remarks: Vec::new(),
        }
    }

    /// The script's bytes, and the end where it was reached. What follows it was written by others.
    fn take(&mut self, bytes: &[u8]) -> (Vec<u8>, Option<Result<i32, Error>>) {
        let mut output = Vec::new();
        for piece in self.scanner.feed(bytes) {
            match piece {
                Piece::Bytes(bytes) if self.started => output.extend(bytes),
                Piece::Bytes(bytes) => self.remark(&bytes),
                Piece::Word(word) => match Word::parse(&word) {
                    Some(Word::Start) => {
                        self.started = true;
                        kill::point(Point::ScriptStarted);
                    }
                    Some(Word::Exit(code)) => {
                        kill::point(Point::ScriptEnded);
                        return (output, Some(Ok(code)));
                    }
                    Some(Word::NoShell) => return (output, Some(Err(Error::NoShell(self.shell)))),
                    Some(Word::NoRoom) => {
                        return (output, Some(Err(Error::NoRoom(self.remarks()))));
                    }
                    None => {}
                },
            }
        }
        (output, None)
    }

    fn remark(&mut self, bytes: &[u8]) {
        let room = MOST_REMARKS.saturating_sub(self.remarks.len());
        self.remarks.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    fn remarks(&self) -> String {
        String::from_utf8_lossy(&self.remarks).into_owned()
    }

    /// The stream has ended and no code came.
    fn cut_off(self) -> (Vec<u8>, Error) {
        if self.started {
            (self.scanner.finish(), Error::Cut)
        } else {
            let remarks = self.remarks();
            (Vec::new(), Error::NotStarted(remarks))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONCE: &str = "00112233445566778899aabbccddeeff";

    fn mark(word: &str) -> Vec<u8> {
        format!("\x1e{NONCE} {word}\n").into_bytes()
    }

    #[test]
    fn what_login_shells_say_is_no_output_and_what_others_say_afterwards_neither() {
        let mut transcript = Transcript::new(Shell::Bash, NONCE);
        let stream = [
            b"Welcome!\n".to_vec(),
            mark("start"),
            b"output".to_vec(),
            mark("exit 4"),
            b"from the background".to_vec(),
        ]
        .concat();
        let (output, end) = transcript.take(&stream);
        assert_eq!(output, b"output");
        assert!(matches!(end, Some(Ok(4))));
    }

    #[test]
    fn a_login_shell_that_refuses_is_quoted() {
        let mut transcript = Transcript::new(Shell::Bash, NONCE);
        transcript.take(b"This account is currently not available.\n");
        let (output, error) = transcript.cut_off();
        assert!(output.is_empty());
        assert_eq!(
            error.to_string(),
            "the guest did not start the script; it said: This account is currently not available."
        );
    }

    #[test]
    fn a_stream_without_a_code_is_no_exit_code_and_its_last_bytes_are_output() {
        let mut transcript = Transcript::new(Shell::Sh, NONCE);
        transcript.take(&mark("start"));
        let (output, end) = transcript.take(b"half a mark\x1e0011");
        assert_eq!(output, b"half a mark");
        assert!(end.is_none());
        let (rest, error) = transcript.cut_off();
        assert_eq!(rest, b"\x1e0011");
        assert!(matches!(error, Error::Cut));
    }

    #[test]
    fn a_guest_without_the_shell_or_without_room_says_so() {
        let end = Transcript::new(Shell::Bash, NONCE).take(&mark("shell")).1;
        assert!(matches!(end, Some(Err(Error::NoShell(Shell::Bash)))));
        let mut transcript = Transcript::new(Shell::Sh, NONCE);
        transcript.remark(b"cat: write error: No space left on device\n");
        let Some(Err(error)) = transcript.take(&mark("room")).1 else {
            panic!("no end");
        };
        assert!(error.to_string().ends_with("No space left on device"), "{error}");
    }
}
