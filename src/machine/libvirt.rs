//! libvirt, through one thread.
//!
//! The binding's calls block, its objects panic in `Drop` and some enums on values from a newer libvirt. So one thread
//! owns the connection and every object that comes from it; callers send it closures and await plain values:
//!
//! ```text
//! Libvirt (cloneable) ──closure──▶ thread: Connect, Domain, Network ──▶ libvirtd
//!         ◀── value or Error ──────┘
//! ```
//!
//! * A panic of the binding is caught, becomes [`Error::Panicked`], and the connection is opened anew.
//! * A call on a dead connection (libvirtd was restarted) is tried once more on a new one.
//! * A call that passes its deadline is given up by the caller; the thread that sits in it is left to itself and the
//!   next call gets a new one, so that one hung machine does not hold up the others.
//! * Nothing is registered for events; callers poll.

mod kept;
mod link;
mod machines;
mod networks;
mod offer;
mod screen;
mod used;

pub use kept::Kept;
pub use machines::Known;
pub use networks::NetworkState;
pub use offer::{Offer, Versions};

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use link::Link;
use tokio::sync::oneshot;
use virt::connect::Connect;
use virt::error::{ErrorDomain, ErrorNumber};

/// Deadline of a question. libvirtd answers in milliseconds; on a host that swaps it can take seconds.
pub const QUERY_DEADLINE: Duration = Duration::from_secs(20);
/// Deadline of a start. Half a second as a rule; but where libvirt cannot keep what it found out about QEMU (such as
/// when /dev/kvm has the wrong owner) it asks QEMU anew each time, which was seen to take 104 s.
pub const START_DEADLINE: Duration = Duration::from_secs(180);
/// Deadline of an end. libvirt sends SIGTERM, waits 10 s, sends SIGKILL and waits up to 30 s for a QEMU that hangs in
/// the kernel.
pub const END_DEADLINE: Duration = Duration::from_secs(60);
/// Deadline of making or removing a network; it starts a dnsmasq and loads firewall rules.
pub const NETWORK_DEADLINE: Duration = Duration::from_secs(60);

/// Why libvirt did not do it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection: the daemon is down, or the address is wrong.
    #[error("libvirt at {uri} cannot be reached: {reason}")]
    Unreachable {
        /// Where.
        uri: String,
        /// libvirt's words.
        reason: String,
    },
    /// The daemon is there and does not want us.
    #[error("libvirt at {uri} does not let this user in: {reason}")]
    Denied {
        /// Where.
        uri: String,
        /// libvirt's words.
        reason: String,
    },
    /// It took too long.
    #[error("libvirt did not {what} within {} s", deadline.as_secs())]
    Late {
        /// What was asked, as a verb phrase.
        what: String,
        /// How long the caller waited.
        deadline: Duration,
    },
    /// libvirt said no.
    #[error("libvirt could not {what}: {reason}")]
    Refused {
        /// What was asked, as a verb phrase.
        what: String,
        /// libvirt's words.
        reason: String,
    },
    /// libvirt does not know the machine: it has ended, or never was.
    #[error("libvirt knows no machine {0}")]
    NoMachine(String),
    /// The machine has no graphics.
    #[error("machine {0} has no screen")]
    NoScreen(String),
    /// The binding panicked.
    #[error("the libvirt binding failed while it was to {0}")]
    Panicked(String),
    /// libvirt's answer makes no sense to us.
    #[error("libvirt's answer cannot be read: {0}")]
    Answer(String),
}

/// A handle on one libvirt; clones share the thread.
#[derive(Clone)]
pub struct Libvirt {
    uri: Arc<str>,
    link: Arc<Mutex<Link>>,
}

impl std::fmt::Debug for Libvirt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Libvirt")
            .field("uri", &self.uri)
            .finish_non_exhaustive()
    }
}

impl Libvirt {
    /// Starts the thread. The connection itself is made by the first call, whose error says if it cannot be.
    ///
    /// `uri` is libvirt's, as `qemu:///system` or `qemu+unix:///system?socket=/run/x.sock`.
    ///
    /// # Errors
    /// [`Error::Unreachable`] where the host lets us start no thread.
    pub fn open(uri: &str) -> Result<Libvirt, Error> {
        Ok(Libvirt {
            uri: uri.into(),
            link: Arc::new(Mutex::new(Link::start(uri)?)),
        })
    }

    /// Runs `job` on the thread. `what` is a verb phrase for error messages ("start machine x"). `job` may be run twice,
    /// where the first connection turns out dead.
    async fn call<T, F>(&self, what: String, deadline: Duration, job: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnMut(&Connect) -> Result<T, virt::error::Error> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let (uri, asked) = (Arc::clone(&self.uri), what.clone());
        let mut job = job;
        let request: link::Request = Box::new(move |line| {
            // The caller may have given up while we stood in the queue; then the deed must not be done behind its back.
            if !reply.is_closed() {
                // A caller that gave up in the meantime wants no answer.
                let _ = reply.send(line.run(&uri, &asked, &mut job));
            }
        });
        let generation = self.link().send(request, &self.uri)?;
        match tokio::time::timeout(deadline, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(Error::Panicked(what)),
            Err(_) => {
                self.link().abandon(generation, &self.uri)?;
                Err(Error::Late { what, deadline })
            }
        }
    }

    fn link(&self) -> std::sync::MutexGuard<'_, Link> {
        // A panic under this lock leaves a link that is still whole.
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether an error is of that number, whatever part of libvirt it comes from.
fn is(error: &virt::error::Error, number: ErrorNumber) -> bool {
    error.code().is(number)
}

/// Whether an error says that the connection is gone rather than that the call is wrong.
fn connection_lost(error: &virt::error::Error) -> bool {
    let transport = error.domain().is(ErrorDomain::Rpc) || error.domain().is(ErrorDomain::Remote);
    let broken = [
        ErrorNumber::InternalError,
        ErrorNumber::SystemError,
        ErrorNumber::Rpc,
    ];
    is(error, ErrorNumber::InvalidConn) || (transport && broken.iter().any(|number| is(error, *number)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn test_driver() -> Libvirt {
        Libvirt::open("test:///default").unwrap()
    }

    async fn ask(libvirt: &Libvirt) -> String {
        let driver = libvirt.call("answer".to_owned(), QUERY_DEADLINE, |connection| {
            connection.driver_type()
        });
        driver.await.unwrap()
    }

    #[tokio::test]
    async fn a_panic_is_an_error_and_the_next_call_is_answered() {
        let libvirt = test_driver();
        let error = libvirt
            .call(
                "do it".to_owned(),
                QUERY_DEADLINE,
                |_| -> Result<(), virt::error::Error> { panic!("as the binding's Drop does") },
            )
            .await
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "the libvirt binding failed while it was to do it"
        );
        assert_eq!(ask(&libvirt).await, "TEST");
    }

    #[tokio::test]
    async fn a_hung_call_is_given_up_and_holds_nobody_up() {
        let libvirt = test_driver();
        let (release, hang) = std::sync::mpsc::channel::<()>();
        let short = Duration::from_millis(100);
        let error = libvirt
            .call("hang".to_owned(), short, move |_| {
                let _ = hang.recv();
                Ok(())
            })
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Late { .. }), "{error}");
        let start = Instant::now();
        assert_eq!(ask(&libvirt).await, "TEST");
        assert!(start.elapsed() < Duration::from_secs(5));
        drop(release);
    }

    #[tokio::test]
    async fn what_a_caller_gave_up_in_the_queue_is_not_done_behind_its_back() {
        let libvirt = test_driver();
        let (release, hang) = std::sync::mpsc::channel::<()>();
        let (told, done) = std::sync::mpsc::channel::<()>();
        let slow = libvirt.call("wait".to_owned(), QUERY_DEADLINE, move |_| {
            let _ = hang.recv();
            Ok(())
        });
        let queued = libvirt.call("tell".to_owned(), Duration::from_millis(100), move |_| {
            let _ = told.send(());
            Ok(())
        });
        let both = async {
            let late = queued.await;
            release.send(()).unwrap();
            late
        };
        let (slow, late) = tokio::join!(slow, both);
        slow.unwrap();
        assert!(matches!(late, Err(Error::Late { .. })));
        assert_eq!(ask(&libvirt).await, "TEST");
        // The sender went away with the closure, unused.
        assert!(done.recv_timeout(Duration::from_secs(5)).is_err());
    }
}
