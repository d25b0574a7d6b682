//! The asynchronous handle of a connection.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};

use super::dial::{Ladder, dial};
use super::input::Input;
use super::link::{Link, Setback, Way};
use super::serve::{Event, Request, serve};
use super::terminal::{Desk, Keyboard, Window};
use super::wake::Wake;
use super::{Agreed, Error, Patience, Progress, Target};
use crate::guest::keys::PublicKey;

/// After a failed key exchange or a lost connection the next attempt comes this soon.
const RETRY: Duration = Duration::from_millis(100);
/// When a server that shows another host key than it should soon is asked again: often enough not to lengthen a boot, seldom
/// enough to leave room for something else in the guest's log.
const ASK_HOST_KEY: Duration = Duration::from_millis(500);
/// When a server that denies us is asked again, counted from the first denial: the account or its key may still be on
/// its way into a booting guest. Few attempts, since servers lock out addresses that fail often.
const ASK_AGAIN: [Duration; 4] = [
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::from_secs(6),
    Duration::from_secs(10),
];
/// Chunks of output under way between thread and reader: with 64 KiB each, half a megabyte.
const CHUNKS_UNDER_WAY: usize = 8;
/// Strokes under way between a browser and the thread: a person types no faster, and who pastes waits.
const STROKES_UNDER_WAY: usize = 16;
/// Most output of a small command that is kept.
const MOST_OUTPUT: usize = 256 << 10;

/// What is known after a login.
#[derive(Debug, Clone)]
pub struct Login {
    /// Which of [`Target::auth`] the server took: hand that one on, and the next login needs no other attempt.
    pub auth: usize,
    /// The host key that the server has shown.
    pub host_key: PublicKey,
    /// The methods that both sides have agreed on.
    pub agreed: Agreed,
    /// From the first knock to an open port.
    pub tcp: Duration,
    /// From the first knock to the server's name.
    pub banner: Duration,
    /// From the first knock to the login.
    pub login: Duration,
}

/// A connection that is logged in, on a thread of its own. Dropping it ends it.
#[derive(Debug)]
pub struct Connection {
    target: Target,
    login: Login,
    patience: Patience,
    requests: mpsc::Sender<Request>,
    wake: Arc<Wake>,
}

/// What a small command has said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its exit code; none when a signal ended it.
    pub code: Option<i32>,
    /// The beginning of its standard output, as text; at most 256 KiB.
    pub stdout: String,
    /// The beginning of its standard error, as text; at most 256 KiB.
    pub stderr: String,
}

/// A command under way. Dropping it closes its channel.
#[derive(Debug)]
pub struct Running {
    events: tokio::sync::mpsc::Receiver<Event>,
    wake: Arc<Wake>,
}

impl Connection {
    /// Knocks, exchanges keys and logs in, again and again until it succeeds, [`Patience::login`] has passed or nothing can
    /// help. `progress` hears each step once. Dropping the future gives up.
    pub async fn open(
        target: Target,
        patience: Patience,
        mut progress: impl FnMut(Progress),
    ) -> Result<Self, Error> {
        let wake = Arc::new(Wake::new()?);
        // Ends the thread also when this future is dropped half-way.
        let guard = StopOnDrop(Some(Arc::clone(&wake)));
        let (requests, inbox) = mpsc::channel();
        let (ready, opened) = oneshot::channel();
        let (steps, mut seen) = watch::channel(Progress::Started);
        let thread = Thread {
            target: target.clone(),
            patience,
            wake: Arc::clone(&wake),
        };
        crate::threads::spawn("ssh", move || thread.run(&inbox, ready, &steps)).map_err(|e| Error::Host {
            doing: "start a thread",
            reason: e.to_string(),
        })?;
        // The library takes a moment to be ready, which a guest takes to answer the first knock.
        ssh2::init();
        let mut opened = std::pin::pin!(opened);
        let login = loop {
            tokio::select! {
                biased;
                Ok(()) = seen.changed() => progress(*seen.borrow_and_update()),
                result = &mut opened => break result.unwrap_or(Err(Error::Stopped))?,
            }
        };
        guard.disarm();
        Ok(Self {
            target,
            login,
            patience,
            requests,
            wake,
        })
    }

    /// What is known since the login.
    pub fn login(&self) -> &Login {
        &self.login
    }

    /// A second connection to the same guest, with what this one has learned.
    pub async fn again(&self) -> Result<Self, Error> {
        let mut target = self.target.clone();
        target.auth = self
            .target
            .auth
            .get(self.login.auth)
            .cloned()
            .into_iter()
            .collect();
        target.host_key = super::HostKeyPolicy::Expect(self.login.host_key.clone());
        Self::open(target, self.patience, |_| {}).await
    }

    /// The guest's SSH server.
    pub fn address(&self) -> std::net::SocketAddr {
        self.target.address
    }

    /// The account that we are logged in to.
    pub fn user(&self) -> &str {
        &self.target.user
    }

    /// Starts a command with all of its input.
    pub fn start(&self, command: impl Into<String>, input: impl Into<Input>) -> Running {
        self.request(command.into(), input.into(), None)
    }

    /// Starts a command on a terminal of this size. All that it prints is [`Event::Output`].
    pub fn terminal(&self, command: impl Into<String>, window: Window) -> (Running, Keyboard) {
        let (strokes, taken) = tokio::sync::mpsc::channel(STROKES_UNDER_WAY);
        let desk = Desk::new(window, taken);
        let running = self.request(command.into(), Vec::new().into(), Some(desk));
        let wake = Arc::clone(&self.wake);
        (running, Keyboard { strokes, wake })
    }

    fn request(&self, command: String, input: Input, desk: Option<Desk>) -> Running {
        let (sender, events) = tokio::sync::mpsc::channel(CHUNKS_UNDER_WAY);
        // Should the thread have ended, `events` is closed, which reads as a lost connection.
        let _ = self.requests.send(Request {
            command,
            input,
            desk,
            events: sender,
        });
        self.wake.ring();
        Running {
            events,
            wake: Arc::clone(&self.wake),
        }
    }

    /// Runs a small command by the user's login shell and waits for its end, `within` at most.
    pub async fn exec(&self, command: &str, within: Duration) -> Result<Output, Error> {
        self.start(command, Vec::new()).collect(within).await
    }

    /// Runs a text of POSIX `sh`, given over standard input: no quoting, any login shell. Its commands must not read from standard input.
    pub async fn sh(&self, text: &str, within: Duration) -> Result<Output, Error> {
        self.start("exec /bin/sh -s", text.as_bytes().to_vec())
            .collect(within)
            .await
    }

    /// The same as root: directly, or by a `sudo` that asks for no password.
    pub async fn root_sh(&self, text: &str, within: Duration) -> Result<Output, Error> {
        let command = match self.target.user.as_str() {
            "root" => "exec /bin/sh -s",
            _ => "exec sudo -n /bin/sh -s",
        };
        self.start(command, text.as_bytes().to_vec())
            .collect(within)
            .await
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.wake.stop();
    }
}

impl Running {
    /// The next event; the last one is `Ended` or `Failed`. Cancel-safe.
    pub async fn next(&mut self) -> Event {
        let event = self.events.recv().await;
        if self.wake.waits_for_room.swap(false, Ordering::SeqCst) {
            self.wake.ring();
        }
        event.unwrap_or_else(|| Event::Failed(Error::Lost("the connection has ended".into())))
    }

    /// Waits for its end, `within` at most, and keeps the beginning of what it says.
    pub async fn collect(mut self, within: Duration) -> Result<Output, Error> {
        let all = async {
            let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
            loop {
                match self.next().await {
                    Event::Output(bytes) => keep(&mut stdout, &bytes),
                    Event::Diagnostics(bytes) => keep(&mut stderr, &bytes),
                    Event::Failed(e) => return Err(e),
                    Event::Ended(code) => {
                        return Ok(Output {
                            code,
                            stdout: String::from_utf8_lossy(&stdout).into_owned(),
                            stderr: String::from_utf8_lossy(&stderr).into_owned(),
                        });
                    }
                }
            }
        };
        tokio::time::timeout(within, all)
            .await
            .unwrap_or(Err(Error::TooSlow(within)))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.events.close();
        self.wake.ring();
    }
}

fn keep(kept: &mut Vec<u8>, bytes: &[u8]) {
    let room = MOST_OUTPUT.saturating_sub(kept.len());
    kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
}

struct StopOnDrop(Option<Arc<Wake>>);

impl StopOnDrop {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        if let Some(wake) = &self.0 {
            wake.stop();
        }
    }
}

struct Thread {
    target: Target,
    patience: Patience,
    wake: Arc<Wake>,
}

impl Thread {
    fn run(
        &self,
        requests: &mpsc::Receiver<Request>,
        ready: oneshot::Sender<Result<Login, Error>>,
        steps: &watch::Sender<Progress>,
    ) {
        match self.log_in(steps) {
            Ok((link, login)) => {
                if ready.send(Ok(login)).is_ok() {
                    serve(&link, requests, self.patience.silence, &self.wake);
                }
                // Says good-bye where that takes no time; the server notices the closed socket anyway.
                let _ = link.session.disconnect(None, "", None);
            }
            Err(e) => {
                // A receiver that has gone wants no answer.
                let _ = ready.send(Err(e));
            }
        }
    }

    fn log_in(&self, steps: &watch::Sender<Progress>) -> Result<(Link, Login), Error> {
        let ways = self
            .target
            .auth
            .iter()
            .map(Way::read)
            .collect::<Result<Vec<_>, _>>()?;
        let start = Instant::now();
        let until = start + self.patience.login;
        let times = std::cell::Cell::new((None, None));
        let report = |progress| {
            let (tcp, banner) = times.get();
            match progress {
                Progress::Tcp => times.set((Some(start.elapsed()), banner)),
                Progress::Banner => times.set((tcp, Some(start.elapsed()))),
                _ => {}
            }
            steps.send_replace(progress);
        };
        let mut ladder = Ladder {
            reached: Progress::Started,
            last: "no answer".into(),
            report: &report,
        };
        let mut denials = Denials::default();
        let mut awaited = None;
        while let Some(stream) = dial(self.target.address, until, &self.wake, &mut ladder)? {
            match self.one_login(stream, &ways, until, &mut ladder) {
                Ok((link, auth, host_key)) => {
                    ladder.reach(Progress::Login);
                    let (tcp, banner) = times.get();
                    let login = start.elapsed();
                    let login = Login {
                        auth,
                        host_key,
                        agreed: link.agreed(),
                        tcp: tcp.unwrap_or(login),
                        banner: banner.unwrap_or(login),
                        login,
                    };
                    return Ok((link, login));
                }
                Err(Setback::Final(e)) => return Err(e),
                Err(Setback::Awaited(why)) => {
                    ladder.failed(why.to_string());
                    awaited = Some(why);
                    self.pause(until.min(Instant::now() + ASK_HOST_KEY))?;
                }
                Err(Setback::Passing(why)) => {
                    // One that the end of our patience has cut off tells less than the one before it.
                    if awaited.is_none() || Instant::now() < until {
                        ladder.failed(why);
                        awaited = None;
                    }
                    self.pause(Instant::now() + RETRY)?;
                }
                Err(Setback::Denied) => {
                    ladder.failed("the server refused the login");
                    match denials.next(Instant::now()) {
                        Some(next) => self.pause(next.min(until))?,
                        None => {
                            let offered: Vec<_> = ways.iter().map(Way::describe).collect();
                            return Err(Error::Denied {
                                user: self.target.user.clone(),
                                offered: offered.join(", "),
                            });
                        }
                    }
                }
            }
        }
        Err(awaited.unwrap_or(Error::TimedOut {
            address: self.target.address,
            waited: self.patience.login,
            reached: ladder.reached,
            last: ladder.last,
        }))
    }

    fn one_login(
        &self,
        stream: std::net::TcpStream,
        ways: &[Way],
        until: Instant,
        ladder: &mut Ladder<'_>,
    ) -> Result<(Link, usize, PublicKey), Setback> {
        let (link, host_key) = Link::exchange(stream, &self.target.host_key, until, &self.wake)?;
        ladder.reach(Progress::KeyExchange);
        let auth = link.login(&self.target, ways, until, &self.wake)?;
        Ok((link, auth, host_key))
    }

    fn pause(&self, until: Instant) -> Result<(), Error> {
        while Instant::now() < until {
            if self.wake.stopped() {
                return Err(Error::Stopped);
            }
            let mut fds = [rustix::event::PollFd::from_borrowed_fd(
                self.wake.fd(),
                rustix::event::PollFlags::IN,
            )];
            super::dial::poll_until(&mut fds, until)?;
            self.wake.calm();
        }
        Ok(())
    }
}

/// When to ask a server again that has denied us.
#[derive(Default)]
struct Denials {
    first: Option<Instant>,
    count: usize,
}

impl Denials {
    /// The moment of the next attempt, or `None` when it has been asked often enough.
    fn next(&mut self, now: Instant) -> Option<Instant> {
        let first = *self.first.get_or_insert(now);
        let next = ASK_AGAIN.get(self.count).map(|after| first + *after);
        self.count += 1;
        next
    }
}

/// Runs `work`, unless `watch` ends first.
pub(crate) async fn unless<T, E>(
    work: impl Future<Output = T>,
    watch: impl Future<Output = E>,
) -> Result<T, E> {
    tokio::select! {
        biased;
        value = work => Ok(value),
        end = watch => Err(end),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_denying_server_is_asked_five_times_in_ten_seconds() {
        let start = Instant::now();
        let mut denials = Denials::default();
        let mut now = start;
        let mut times = vec![Duration::ZERO];
        while let Some(next) = denials.next(now) {
            now = next;
            times.push(now - start);
        }
        assert_eq!(
            times.iter().map(Duration::as_secs).collect::<Vec<_>>(),
            [0, 1, 3, 6, 10]
        );
    }

    #[test]
    fn kept_output_is_bounded() {
        let mut kept = vec![0; MOST_OUTPUT - 1];
        keep(&mut kept, &[1, 2, 3]);
        assert_eq!(kept.len(), MOST_OUTPUT);
    }
}
