//! The threads of blocking libraries, and the wait for them before the process ends.
//!
//! A process that returns from `main` runs the exit handlers of its C libraries, OpenSSL's among them, which take away what
//! a thread that is still closing its connection works with. So whoever starts such a thread starts it here, and the
//! command line waits for all of them before it returns.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// How often it is looked whether a thread has ended.
const POLL: Duration = Duration::from_millis(1);

static THREADS: Mutex<Vec<JoinHandle<()>>> = Mutex::new(Vec::new());

/// Starts a thread that ends by itself, once whatever it serves is dropped.
///
/// # Errors
/// What the system says where it has no thread left.
pub fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let handle = Builder::new().name(name.to_owned()).spawn(work)?;
    // A panic under the lock leaves a list that is still whole.
    let mut threads = THREADS.lock().unwrap_or_else(PoisonError::into_inner);
    threads.retain(|thread| !thread.is_finished());
    threads.push(handle);
    Ok(())
}

/// Waits until all of them have ended, `within` at most; false where one still runs, which hangs in its library.
pub fn wait(within: Duration) -> bool {
    let begin = Instant::now();
    loop {
        let next = {
            let mut threads = THREADS.lock().unwrap_or_else(PoisonError::into_inner);
            match threads.iter().position(JoinHandle::is_finished) {
                Some(at) => Some(threads.swap_remove(at)),
                None if threads.is_empty() => return true,
                None => None,
            }
        };
        match next {
            // A thread that panicked has ended, too. Joined, since its last destructors run after it is finished.
            Some(thread) => drop(thread.join()),
            None if begin.elapsed() >= within => return false,
            None => std::thread::sleep(POLL),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_thread_is_waited_for_and_one_that_hangs_is_not_for_ever() {
        let (end, ended) = mpsc::channel::<()>();
        spawn("test", move || assert!(ended.recv().is_err())).unwrap();
        assert!(!wait(Duration::from_millis(30)));
        drop(end);
        // Other tests of this process may have threads of their own; this one is gone.
        let begin = Instant::now();
        while THREADS
            .lock()
            .unwrap()
            .iter()
            .any(|t| t.thread().name() == Some("test"))
        {
            wait(Duration::from_millis(10));
            assert!(begin.elapsed() < Duration::from_secs(5));
        }
    }
}
