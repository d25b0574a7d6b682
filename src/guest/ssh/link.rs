//! Key exchange and login over one socket.

use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use ssh2::{BlockDirections, ErrorCode, MethodType, Session};

use super::dial::poll_until;
use super::wake::Wake;
use super::{Agreed, Auth, Error, HostKeyPolicy, Target};
use crate::guest::keys::PublicKey;

// What libssh2 calls its results (libssh2.h); the binding has no names for them.
const EAGAIN: i32 = -37;
const FILE: i32 = -16;
const METHOD_NONE: i32 = -17;
const AUTHENTICATION_FAILED: i32 = -18;
const PUBLICKEY_UNVERIFIED: i32 = -19;

/// One key exchange and login may take this long, on a guest whose processor is emulated and busy; then a fresh
/// connection is tried.
const LONGEST_LOGIN: Duration = Duration::from_secs(30);

/// Curve25519 first: in an emulated guest it halves the time of a login. The two last names are no exchanges: they
/// ask for the extensions that libssh2 drops from a list that does not name them.
const KEY_EXCHANGES: &str = "curve25519-sha256,curve25519-sha256@libssh.org,ecdh-sha2-nistp256,ecdh-sha2-nistp384,\
     ecdh-sha2-nistp521,diffie-hellman-group-exchange-sha256,diffie-hellman-group16-sha512,\
     diffie-hellman-group14-sha256,ext-info-c,kex-strict-c-v00@openssh.com";
/// ChaCha first, as OpenSSH has it: processors that are emulated have no AES instructions worth the name.
const CIPHERS: &str =
    "chacha20-poly1305@openssh.com,aes128-gcm@openssh.com,aes256-gcm@openssh.com,aes128-ctr,aes256-ctr";
const HOST_KEYS: &str =
    "ssh-ed25519,ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521,rsa-sha2-512,rsa-sha2-256";

/// A socket with a session on it.
pub(super) struct Link {
    pub(super) session: Session,
    /// The session owns the socket; this is a second descriptor of it, to poll.
    socket: TcpStream,
}

/// Why one attempt to log in has failed.
pub(super) enum Setback {
    /// Worth another connection.
    Passing(String),
    /// The server is not yet the one that it should become; if it never does, this is why.
    Awaited(Error),
    /// The server refused all that was offered.
    Denied,
    /// Nothing will help.
    Final(Error),
}

impl From<Error> for Setback {
    fn from(e: Error) -> Self {
        Self::Final(e)
    }
}

impl Link {
    /// Exchanges keys. The server's host key is returned, and has been checked.
    pub(super) fn exchange(
        stream: TcpStream,
        policy: &HostKeyPolicy,
        until: Instant,
        wake: &Wake,
    ) -> Result<(Self, PublicKey), Setback> {
        let passing = |e: ssh2::Error| Setback::Passing(e.message().to_owned());
        let socket = stream.try_clone().map_err(|e| Error::Host {
            doing: "duplicate a socket",
            reason: e.to_string(),
        })?;
        let mut session = Session::new().map_err(passing)?;
        session.set_compress(false);
        let host_keys = match policy {
            HostKeyPolicy::Expect(key) | HostKeyPolicy::Await(key) => match key.algorithm() {
                // One and the same key signs with either hash.
                "ssh-rsa" => "rsa-sha2-512,rsa-sha2-256",
                other => other,
            },
            HostKeyPolicy::Any => HOST_KEYS,
        };
        for (method, preference) in [
            (MethodType::Kex, KEY_EXCHANGES),
            (MethodType::HostKey, host_keys),
            (MethodType::CryptCs, CIPHERS),
            (MethodType::CryptSc, CIPHERS),
        ] {
            session.method_pref(method, preference).map_err(passing)?;
        }
        session.set_tcp_stream(stream);
        session.set_blocking(false);
        let link = Self { session, socket };
        let until = until.min(Instant::now() + LONGEST_LOGIN);
        link.drive(until, wake, |session| session.clone().handshake())?;
        let seen = link
            .session
            .host_key()
            .and_then(|(blob, _)| PublicKey::from_blob(blob).ok())
            .ok_or_else(|| Setback::Passing("the server showed no host key".into()))?;
        match policy {
            HostKeyPolicy::Expect(expected) if *expected != seen => Err(Setback::Final(Error::HostKey {
                seen,
                expected: expected.clone(),
            })),
            HostKeyPolicy::Await(expected) if *expected != seen => Err(Setback::Awaited(Error::HostKey {
                seen,
                expected: expected.clone(),
            })),
            _ => Ok((link, seen)),
        }
    }

    /// The methods that came out of the key exchange.
    pub(super) fn agreed(&self) -> Agreed {
        let name = |method| self.session.methods(method).unwrap_or_default().to_owned();
        Agreed {
            key_exchange: name(MethodType::Kex),
            host_key: name(MethodType::HostKey),
            cipher: name(MethodType::CryptCs),
            mac: name(MethodType::MacCs),
        }
    }

    /// Logs in with the first of `ways` that the server takes, and returns its index.
    pub(super) fn login(
        &self,
        target: &Target,
        ways: &[Way],
        until: Instant,
        wake: &Wake,
    ) -> Result<usize, Setback> {
        let until = until.min(Instant::now() + LONGEST_LOGIN);
        for (index, way) in ways.iter().enumerate() {
            let result = match way {
                Way::Key { name, pem } => self
                    .drive_raw(until, wake, |session| {
                        session.userauth_pubkey_memory(&target.user, None, pem, None)
                    })
                    .map_err(|stop| match stop {
                        Stop::Ssh(e) if e.code() == ErrorCode::Session(FILE) => {
                            Stop::Error(Error::KeyUnusable {
                                name: name.clone(),
                                reason: e.message().to_owned(),
                            })
                        }
                        other => other,
                    }),
                Way::Password(password) => self.login_with_password(&target.user, password, until, wake),
            };
            match result {
                Ok(()) => return Ok(index),
                Err(Stop::Ssh(e)) if is_denial(&e) => {}
                Err(stop) => return Err(stop.into()),
            }
        }
        Err(Setback::Denied)
    }

    fn login_with_password(
        &self,
        user: &str,
        password: &str,
        until: Instant,
        wake: &Wake,
    ) -> Result<(), Stop> {
        match self.drive_raw(until, wake, |s| s.userauth_password(user, password)) {
            Err(Stop::Ssh(e)) if is_denial(&e) => {
                let mut prompter = Answers(password);
                self.drive_raw(until, wake, |s| {
                    s.userauth_keyboard_interactive(user, &mut prompter)
                })
            }
            other => other,
        }
    }

    /// Repeats a step of libssh2's until it no longer would block.
    fn drive<T>(
        &self,
        until: Instant,
        wake: &Wake,
        step: impl FnMut(&Session) -> Result<T, ssh2::Error>,
    ) -> Result<T, Setback> {
        self.drive_raw(until, wake, step).map_err(Setback::from)
    }

    fn drive_raw<T>(
        &self,
        until: Instant,
        wake: &Wake,
        mut step: impl FnMut(&Session) -> Result<T, ssh2::Error>,
    ) -> Result<T, Stop> {
        loop {
            match step(&self.session) {
                Ok(value) => return Ok(value),
                Err(e) if would_block(&e) => {}
                Err(e) => return Err(Stop::Ssh(e)),
            }
            if wake.stopped() {
                return Err(Stop::Error(Error::Stopped));
            }
            if Instant::now() >= until {
                return Err(Stop::Late);
            }
            self.wait(self.wants(), wake, until).map_err(Stop::Error)?;
            wake.calm();
        }
    }

    /// What libssh2 waits for after a call that would block.
    pub(super) fn wants(&self) -> PollFlags {
        match self.session.block_directions() {
            BlockDirections::Outbound => PollFlags::OUT,
            BlockDirections::Both => PollFlags::IN | PollFlags::OUT,
            BlockDirections::Inbound | BlockDirections::None => PollFlags::IN,
        }
    }

    /// Waits for the socket or a ring; tells whether the server has sent something.
    pub(super) fn wait(&self, what: PollFlags, wake: &Wake, until: Instant) -> Result<bool, Error> {
        let mut fds = [
            PollFd::from_borrowed_fd(wake.fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.socket.as_fd(), what),
        ];
        // An idle socket is left out: `poll` would report its end again and again, which nobody reads then.
        let count = if what.is_empty() { 1 } else { 2 };
        poll_until(&mut fds[..count], until)?;
        Ok(fds[1].revents().intersects(PollFlags::IN))
    }
}

/// A way to log in with its key read.
pub(super) enum Way {
    Key { name: String, pem: String },
    Password(String),
}

impl Way {
    pub(super) fn read(auth: &Auth) -> Result<Self, Error> {
        match auth {
            Auth::Key(key) => Ok(Self::Key {
                name: "of the job".into(),
                pem: key.private().reveal().to_owned(),
            }),
            Auth::KeyFile(path) => {
                let name = path.display().to_string();
                match std::fs::read_to_string(path) {
                    Ok(pem) => Ok(Self::Key { name, pem }),
                    Err(e) => Err(Error::KeyUnusable {
                        name,
                        reason: e.to_string(),
                    }),
                }
            }
            Auth::Password(secret) => Ok(Self::Password(secret.reveal().to_owned())),
        }
    }

    pub(super) fn describe(&self) -> String {
        match self {
            Self::Key { name, .. } if name == "of the job" => "the job's key".into(),
            Self::Key { name, .. } => format!("key {name}"),
            Self::Password(_) => "a password".into(),
        }
    }
}

enum Stop {
    Ssh(ssh2::Error),
    Late,
    Error(Error),
}

impl From<Stop> for Setback {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Ssh(e) => Self::Passing(e.message().to_owned()),
            Stop::Late => Self::Passing("the SSH server took too long to answer".into()),
            Stop::Error(e) => Self::Final(e),
        }
    }
}

/// Answers every question of a server with the password: that is what those that ask want.
struct Answers<'a>(&'a str);

impl ssh2::KeyboardInteractivePrompt for Answers<'_> {
    fn prompt<'b>(&mut self, _: &str, _: &str, prompts: &[ssh2::Prompt<'b>]) -> Vec<String> {
        prompts.iter().map(|_| self.0.to_owned()).collect()
    }
}

pub(super) fn would_block(e: &ssh2::Error) -> bool {
    e.code() == ErrorCode::Session(EAGAIN)
}

fn is_denial(e: &ssh2::Error) -> bool {
    [AUTHENTICATION_FAILED, PUBLICKEY_UNVERIFIED, METHOD_NONE]
        .into_iter()
        .any(|code| e.code() == ErrorCode::Session(code))
}
