//! Programs that we start end with us.
//!
//! A process that is killed cannot end its children, and one that lives on would work on files that the next call removes.
//! So the kernel is asked to do it.

use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};
use tokio::process::Command;

/// Has the kernel kill the program once the thread that starts it is gone, which is the process's main thread.
#[allow(unsafe_code, reason = "the only way to run code between fork and exec")]
pub fn end_with_us(command: &mut Command) {
    let us = getpid();
    let ask = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // Killed since the fork: then nobody tells.
        if getppid() == Some(us) {
            Ok(())
        } else {
            Err(std::io::ErrorKind::NotFound.into())
        }
    };
    // SAFETY: between fork and exec only async-signal-safe functions may be called. These are three system calls, and an
    // error without allocation.
    unsafe {
        command.pre_exec(ask);
    }
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_program_ends_with_the_thread_that_started_it() {
        let pid = std::thread::spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let mut command = Command::new("sleep");
                command.arg("1000").stdin(Stdio::null());
                end_with_us(&mut command);
                command.spawn().unwrap().id().unwrap()
            })
        });
        let pid = pid.join().unwrap();
        let begin = Instant::now();
        let stat = format!("/proc/{pid}/stat");
        // Nobody waits for it any more, so that it may stay as a zombie.
        while std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
            assert!(begin.elapsed() < Duration::from_secs(10), "{pid} lives on");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
