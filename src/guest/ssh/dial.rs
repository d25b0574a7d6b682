//! Knocks at a booting guest until an SSH server says who it is.
//!
//! A knock that got no answer is not waited for: the kernel would repeat it after 1, 3, 7 s, while the guest may come up in
//! between. So a new one joins it soon, and the first server that speaks wins. In front of a port that is open but
//! silent (user-mode networking accepts for a guest that is not there yet) new knocks come ever more slowly, since
//! servers count connections that never log in.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, RecvFlags, SocketFlags, SocketType, sockopt};

use super::wake::Wake;
use super::{Error, Progress};

/// After a refusal the next knock comes this soon: what a user waits beyond the guest's own boot.
const KNOCK_AGAIN: Duration = Duration::from_millis(50);
/// An unanswered knock is joined by another one after this: well below the kernel's own second.
const JOIN_UNANSWERED: Duration = Duration::from_millis(250);
/// An open but silent port gets a second knock after this; each further one takes twice as long.
const JOIN_SILENT: Duration = Duration::from_millis(1000);
/// Most knocks at the same time: below sshd's MaxStartups, whose default is 10.
const MOST_KNOCKS: usize = 6;

struct Knock {
    socket: OwnedFd,
    open: bool,
}

/// What the ladder has seen; grows only.
pub(super) struct Ladder<'a> {
    pub(super) reached: Progress,
    pub(super) last: String,
    pub(super) report: &'a dyn Fn(Progress),
}

impl Ladder<'_> {
    pub(super) fn reach(&mut self, progress: Progress) {
        if progress > self.reached {
            self.reached = progress;
            (self.report)(progress);
        }
    }

    pub(super) fn failed(&mut self, why: impl ToString) {
        self.last = why.to_string();
    }
}

/// Connects; the server's banner is ready to be read from the stream. `None` when `until` has passed.
pub(super) fn dial(
    address: SocketAddr,
    until: Instant,
    wake: &Wake,
    ladder: &mut Ladder<'_>,
) -> Result<Option<TcpStream>, Error> {
    let mut knocks: Vec<Knock> = Vec::new();
    let mut next = Instant::now();
    let mut silent_pause = JOIN_SILENT;
    loop {
        if wake.stopped() {
            return Err(Error::Stopped);
        }
        let now = Instant::now();
        if now >= until {
            return Ok(None);
        }
        if now >= next {
            if knocks.len() == MOST_KNOCKS {
                knocks.remove(0);
            }
            match knock(address) {
                Ok(knock) => {
                    knocks.push(knock);
                    next = now + JOIN_UNANSWERED;
                }
                Err(e) => {
                    note(e, ladder);
                    next = now + KNOCK_AGAIN;
                }
            }
            if knocks.iter().any(|k| k.open) {
                next = next.max(now + silent_pause);
                silent_pause *= 2;
            }
        }
        wait(&knocks, wake, next.min(until))?;
        wake.calm();
        let mut index = 0;
        while let Some(knock) = knocks.get_mut(index) {
            match answer(knock) {
                Answer::None => index += 1,
                Answer::Open => {
                    ladder.reach(Progress::Tcp);
                    ladder.failed("the port is open, but silent");
                    next = Instant::now() + silent_pause;
                    index += 1;
                }
                Answer::Banner => {
                    ladder.reach(Progress::Tcp);
                    ladder.reach(Progress::Banner);
                    return Ok(Some(TcpStream::from(knocks.swap_remove(index).socket)));
                }
                Answer::Failed(e) => {
                    note(e, ladder);
                    knocks.remove(index);
                    next = next.min(Instant::now() + KNOCK_AGAIN);
                }
            }
        }
    }
}

fn note(e: Errno, ladder: &mut Ladder<'_>) {
    if e == Errno::CONNREFUSED {
        ladder.reach(Progress::Address);
    }
    ladder.failed(std::io::Error::from(e));
}

fn knock(address: SocketAddr) -> Result<Knock, Errno> {
    let family = if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let socket = net::socket_with(
        family,
        SocketType::STREAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )?;
    // Small packets go back and forth during a login: waiting to fill them would only cost time.
    sockopt::set_tcp_nodelay(&socket, true)?;
    match net::connect(&socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(Knock { socket, open: false }),
        Err(e) => Err(e),
    }
}

enum Answer {
    None,
    Open,
    Banner,
    Failed(Errno),
}

fn answer(knock: &mut Knock) -> Answer {
    match sockopt::socket_error(&knock.socket) {
        Ok(Ok(())) => {}
        Ok(Err(e)) | Err(e) => return Answer::Failed(e),
    }
    let mut byte = [0; 1];
    match net::recv(&knock.socket, &mut byte[..], RecvFlags::PEEK) {
        Ok((0, _)) => Answer::Failed(Errno::CONNRESET),
        Ok(_) => Answer::Banner,
        Err(Errno::AGAIN) if knock.open => Answer::None,
        Err(Errno::AGAIN) if net::getpeername(&knock.socket).is_ok() => {
            knock.open = true;
            Answer::Open
        }
        Err(Errno::AGAIN | Errno::NOTCONN | Errno::INTR) => Answer::None,
        Err(e) => Answer::Failed(e),
    }
}

fn wait(knocks: &[Knock], wake: &Wake, until: Instant) -> Result<(), Error> {
    let mut waiting: Vec<PollFd<'_>> = knocks
        .iter()
        .map(|k| {
            let what = if k.open { PollFlags::IN } else { PollFlags::OUT };
            PollFd::from_borrowed_fd(k.socket.as_fd(), what)
        })
        .collect();
    waiting.push(PollFd::from_borrowed_fd(wake.fd(), PollFlags::IN));
    poll_until(&mut waiting, until)
}

/// `poll` with a moment rather than a duration; a signal ends it early, as any event does.
pub(super) fn poll_until(fds: &mut [PollFd<'_>], until: Instant) -> Result<(), Error> {
    let left = until.saturating_duration_since(Instant::now());
    let left = Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    };
    match poll(fds, Some(&left)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(e) => Err(Error::Host {
            doing: "wait for the network",
            reason: e.to_string(),
        }),
    }
}
