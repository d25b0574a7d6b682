use std::future::Future;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::{choose, whoami};
use crate::cli::{Context, interruption, print};
use crate::machine::{Keys, Libvirt, serial};
use crate::outcome::Failure;
use crate::record::{JobDir, Machine};
use crate::serve::{Local, local};
use crate::settings::Settings;
use crate::ticket::Mode;

/// Bytes of the serial log that are shown of what was there before.
const SERIAL: usize = 64 << 10;
/// How often the serial log is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// What is to be done with one machine.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub(super) struct Arguments {
    /// The job, as `vm list` shows it, or its number where only one job has it
    #[arg(value_name = "JOB", required = true)]
    job: Option<String>,
    /// Let the viewer see, but not type
    #[arg(long, conflicts_with_all = ["screenshot", "send_key", "serial"])]
    view_only: bool,
    /// Start no viewer: print the file that starts one, and wait for it until Ctrl-C
    #[arg(long, conflicts_with_all = ["screenshot", "send_key", "serial"])]
    print: bool,
    /// Only write a picture of the screen, as PNG
    #[arg(long, value_name = "FILE", conflicts_with_all = ["send_key", "serial"])]
    screenshot: Option<PathBuf>,
    /// Only press keys together, such as ctrl-alt-del
    #[arg(long, value_name = "KEYS", conflicts_with = "serial")]
    send_key: Option<Keys>,
    /// Only show the serial log, as it grows, until Ctrl-C
    #[arg(long)]
    serial: bool,
}

pub(super) async fn run(
    context: &Context,
    settings: &Settings,
    arguments: &Arguments,
) -> Result<(), Failure> {
    let job = choose(settings, arguments.job.as_deref().unwrap_or_default())?;
    if arguments.serial {
        return until(interruption()?, follow(&job)).await;
    }
    let machine = job.read()?.and_then(|record| record.machine);
    let machine = machine.ok_or_else(|| Failure::system(format!("job {} has no machine yet", job.key())))?;
    if let Some(path) = &arguments.screenshot {
        let picture = Libvirt::open(&machine.uri)?.screenshot(&machine.name).await?;
        return std::fs::write(path, picture)
            .map_err(|e| Failure::system(format!("cannot write {}: {e}", path.display())));
    }
    if let Some(keys) = &arguments.send_key {
        return Ok(Libvirt::open(&machine.uri)?.send_key(&machine.name, keys).await?);
    }
    let mode = if arguments.view_only {
        Mode::ViewOnly
    } else {
        Mode::Full
    };
    let by = whoami(context);
    let printing = arguments.print;
    let interrupted = interruption()?;
    // It ends within, so that the ticket is taken away again.
    local(settings, &job, mode, by, async |local| {
        let viewing = async {
            if printing {
                print(&local.file);
                return std::future::pending().await;
            }
            view(settings, &machine, mode, &local).await
        };
        until(interrupted, viewing).await
    })
    .await
}

/// Ctrl-C is how it ends, not a failure.
async fn until(
    interrupted: impl Future<Output = ()>,
    work: impl Future<Output = Result<(), Failure>>,
) -> Result<(), Failure> {
    tokio::select! {
        result = work => result,
        () = interrupted => Ok(()),
    }
}

/// Starts the first viewer that there is, and waits until it is closed.
async fn view(settings: &Settings, machine: &Machine, mode: Mode, local: &Local) -> Result<(), Failure> {
    for program in &settings.viewers {
        let mut command = Command::new(program);
        // virt-viewer knows no such files, and asks libvirt itself; nothing would keep it from typing.
        let asks_libvirt = program.rsplit('/').next() == Some("virt-viewer");
        match (asks_libvirt, mode) {
            (true, Mode::ViewOnly) => continue,
            (true, Mode::Full) => {
                command.args(["--connect", &machine.uri, "--attach", &machine.name]);
                command.stdin(Stdio::null());
            }
            // Neither a file nor the command line holds the ticket.
            (false, _) => {
                command.arg("-").stdin(Stdio::piped());
            }
        }
        let mut viewer = match command.kill_on_drop(true).spawn() {
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            started => started.map_err(|e| Failure::system(format!("cannot start {program}: {e}")))?,
        };
        if let Some(mut stdin) = viewer.stdin.take() {
            // One that ends before it has read says why itself.
            let _ = stdin.write_all(local.file.as_bytes()).await;
        }
        let status = viewer
            .wait()
            .await
            .map_err(|e| Failure::system(format!("cannot wait for {program}: {e}")))?;
        return if status.success() {
            Ok(())
        } else {
            Err(Failure::system(format!("{program} failed: {status}"))
                .hint("It needs a desktop; `--print` prints the file that starts it elsewhere"))
        };
    }
    Err(Failure::system(format!(
        "none of these viewers is installed: {}",
        settings.viewers.join(", ")
    ))
    .hint("On Debian they are in the package virt-viewer; `--print` needs none"))
}

/// Prints the serial log as it grows, until the job is removed.
async fn follow(job: &JobDir) -> Result<(), Failure> {
    let log = job.file("serial.log");
    let failed = |e: std::io::Error| Failure::system(format!("cannot read {}: {e}", log.display()));
    let (mut follower, mut bytes) = serial::Follower::begin(&log, SERIAL).map_err(failed)?;
    loop {
        // As it is for a terminal, but nothing in it commands the terminal.
        let text = shown(&mut bytes);
        if !text.is_empty() {
            print(&text);
        }
        if !job.path().exists() {
            return Ok(());
        }
        tokio::time::sleep(LOOK).await;
        bytes.append(&mut follower.more(SERIAL).map_err(failed)?);
    }
}

/// What a machine wrote, safe for a terminal: a guest's sequences must not command the admin's. What a character at the end lacks may
/// still come, so that its beginning stays.
fn shown(bytes: &mut Vec<u8>) -> String {
    let cut = bytes.utf8_chunks().last().map_or(0, |chunk| {
        let unfinished = std::str::from_utf8(chunk.invalid()).is_err_and(|e| e.error_len().is_none());
        if unfinished { chunk.invalid().len() } else { 0 }
    });
    let rest = bytes.split_off(bytes.len() - cut);
    let text = String::from_utf8_lossy(&std::mem::replace(bytes, rest)).into_owned();
    text.chars()
        .filter(|c| matches!(c, '\n' | '\t') || !c.is_control())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_does_not_command_the_admins_terminal() {
        let mut bytes = b"a\x1b[2Jb\r\n\x07\xffc\td".to_vec();
        assert_eq!(shown(&mut bytes), "a[2Jb\n\u{fffd}c\td");
        assert_eq!(bytes, b"");
    }

    #[test]
    fn a_character_that_comes_in_two_pieces_is_shown_when_it_is_whole() {
        let whole = "ab\u{20ac}".as_bytes();
        for at in 0..=whole.len() {
            let mut bytes = whole[..at].to_vec();
            let first = shown(&mut bytes);
            bytes.extend(&whole[at..]);
            assert_eq!(first + &shown(&mut bytes), "ab\u{20ac}", "{at}");
            assert_eq!(bytes, b"");
        }
    }
}
