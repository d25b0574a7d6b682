//! The thread and its queue.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use virt::connect::Connect;
use virt::error::ErrorNumber;

use super::{Error, connection_lost, is};

/// How long a connection that died is tried again: a libvirtd that is restarted is back in about a second where no
/// socket activation holds the door, later on a busy host.
const REOPEN_FOR: Duration = Duration::from_secs(10);
/// Pause between two tries.
const REOPEN_PAUSE: Duration = Duration::from_millis(200);

/// Something for the thread to do with its line.
pub(super) type Request = Box<dyn FnOnce(&mut Line) + Send>;

/// The way to the thread that is in use.
pub(super) struct Link {
    requests: mpsc::Sender<Request>,
    generation: u64,
}

impl Link {
    /// Starts a thread.
    pub(super) fn start(uri: &str) -> Result<Link, Error> {
        Ok(Link {
            requests: spawn(uri)?,
            generation: 0,
        })
    }

    /// Queues a request; returns which thread has it.
    pub(super) fn send(&mut self, request: Request, uri: &str) -> Result<u64, Error> {
        if let Err(mpsc::SendError(request)) = self.requests.send(request) {
            // The thread is gone, which only a panic outside of a call could do.
            self.requests = spawn(uri)?;
            self.generation += 1;
            // A thread that was just started has its receiver.
            let _ = self.requests.send(request);
        }
        Ok(self.generation)
    }

    /// Leaves the thread of that generation to itself, unless someone already has. What is still in its queue is
    /// dropped by the callers' own deadlines.
    pub(super) fn abandon(&mut self, generation: u64, uri: &str) -> Result<(), Error> {
        if self.generation == generation {
            self.requests = spawn(uri)?;
            self.generation += 1;
        }
        Ok(())
    }
}

fn spawn(uri: &str) -> Result<mpsc::Sender<Request>, Error> {
    let (sender, receiver) = mpsc::channel::<Request>();
    crate::threads::spawn("libvirt", move || {
        let mut line = Line { connection: None };
        while let Ok(request) = receiver.recv() {
            request(&mut line);
        }
        line.hang_up();
    })
    .map_err(|error| Error::Unreachable {
        uri: uri.to_owned(),
        reason: format!("no thread could be started: {error}"),
    })?;
    Ok(sender)
}

/// The connection, on the thread that owns it.
pub(super) struct Line {
    connection: Option<Connect>,
}

impl Line {
    /// Runs a job on the connection, which is opened where it is not yet and opened again where it turns out dead.
    pub(super) fn run<T>(
        &mut self,
        uri: &str,
        what: &str,
        job: &mut dyn FnMut(&Connect) -> Result<T, virt::error::Error>,
    ) -> Result<T, Error> {
        let fresh = self.connection.is_none();
        let first = match self.attempt(uri, what, job)? {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        // An error on a connection that was just made is no sign of its age.
        if fresh || !(connection_lost(&first) || self.is_dead()) {
            return Err(refusal(what, &first));
        }
        tracing::info!(%uri, "libvirt's connection is gone; opening a new one");
        self.hang_up();
        self.reopen(uri)?;
        self.attempt(uri, what, job)?
            .map_err(|error| refusal(what, &error))
    }

    /// One try; the inner error is libvirt's.
    fn attempt<T>(
        &mut self,
        uri: &str,
        what: &str,
        job: &mut dyn FnMut(&Connect) -> Result<T, virt::error::Error>,
    ) -> Result<Result<T, virt::error::Error>, Error> {
        if self.connection.is_none() {
            self.connection = Some(open(uri)?);
        }
        let Some(connection) = &self.connection else {
            return Err(Error::Panicked(what.to_owned()));
        };
        let result = catch_unwind(AssertUnwindSafe(|| job(connection)));
        result.map_err(|_| {
            self.hang_up();
            Error::Panicked(what.to_owned())
        })
    }

    fn is_dead(&self) -> bool {
        let alive = self.connection.as_ref().is_some_and(|connection| {
            catch_unwind(AssertUnwindSafe(|| connection.is_alive().unwrap_or(false))).unwrap_or(false)
        });
        !alive
    }

    fn reopen(&mut self, uri: &str) -> Result<(), Error> {
        let start = Instant::now();
        loop {
            match open(uri) {
                Ok(connection) => {
                    self.connection = Some(connection);
                    return Ok(());
                }
                Err(error) if start.elapsed() >= REOPEN_FOR => return Err(error),
                Err(_) => std::thread::sleep(REOPEN_PAUSE),
            }
        }
    }

    /// Closes the connection; its `Drop` may panic.
    fn hang_up(&mut self) {
        if let Some(connection) = self.connection.take() {
            // Nothing is left to do for a connection that cannot even be closed.
            let _ = catch_unwind(AssertUnwindSafe(move || drop(connection)));
        }
    }
}

fn open(uri: &str) -> Result<Connect, Error> {
    // The first call of all, since it loads the library: a thread that is asked nothing has no need of it.
    let opened = catch_unwind(AssertUnwindSafe(|| {
        // libvirt would print every error on stderr, which is the job's log.
        virt::error::clear_error_callback();
        Connect::open(Some(uri))
    }))
    .map_err(|_| Error::Panicked("connect".to_owned()))?;
    opened.map_err(|error| {
        let denied = [
            ErrorNumber::AuthFailed,
            ErrorNumber::AuthCancelled,
            ErrorNumber::AuthUnavailable,
            ErrorNumber::AccessDenied,
            ErrorNumber::OperationDenied,
        ];
        // A socket that this user may not open is reported by its errno's text alone.
        let by_text = error.message().contains("Permission denied");
        let (uri, reason) = (uri.to_owned(), sentence(error.message()));
        if by_text || denied.iter().any(|number| is(&error, *number)) {
            Error::Denied { uri, reason }
        } else {
            Error::Unreachable { uri, reason }
        }
    })
}

fn refusal(what: &str, error: &virt::error::Error) -> Error {
    Error::Refused {
        what: what.to_owned(),
        reason: sentence(error.message()),
    }
}

/// libvirt's message on one line.
fn sentence(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}
