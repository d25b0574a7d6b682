//! The keys under which viewers send their tickets, made ahead.
//!
//! The protocol wants RSA with 1024 bits and OAEP. Such a key takes some ten milliseconds to make, which threads do, so
//! that a burst of viewers does not wait and the runtime never does; and it is used for one ticket only, by its type:
//! [`Key::open`] consumes it. So nobody who watches how long decryptions take learns about a key that is ever used again.
//!
//! There are two such threads, and both give way to what else the host has to do: its jobs. One makes keys ahead, and gives
//! way so far that a viewer does not notice what replaces the four keys that it was given. The other works only while few
//! are ready, and gives way less.
//!
//! An eighth of the keys is kept for viewers that have a session already. However many strangers ask for keys, who are given
//! one before they show a ticket, a session's later channels find one.

use std::io;
use std::thread::JoinHandle;

use openssl::error::ErrorStack;
use openssl::pkey::{PKey, Private};
use openssl::rsa::{Padding, Rsa};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Mutex, mpsc};

use super::link::{KEY, SEALED};
use crate::secret::Secret;

/// Bits of a key, which the protocol fixes.
const BITS: u32 = 1024;

/// By how much the thread that makes keys ahead gives way (nice(2), which on Linux is about one thread): on a busy
/// processor it gets about a tenth of what others get.
const GIVES_WAY: i32 = 10;
/// The same for the thread that makes them while few are ready: about a third of what others get.
const URGENT_GIVES_WAY: i32 = 5;

/// Few are ready below this part of those that should be.
const FEW: usize = 4;
/// This part of them is kept for viewers that have a session.
const KEPT: usize = 8;

/// The name of the thread that gives way.
const PATIENT: &str = "console keys";
const URGENT: &str = "urgent keys";

/// Who asks for a key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Asks {
    /// Somebody who has shown nothing yet.
    Stranger,
    /// Somebody who names a session that is there, for one more of its channels.
    Member,
}

/// A key for one ticket.
pub struct Key {
    private: Rsa<Private>,
    public: [u8; KEY],
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(…)")
    }
}

impl Key {
    /// Makes one; this takes some ten milliseconds of computing.
    ///
    /// # Errors
    /// OpenSSL's, for example where it only allows longer keys.
    pub fn generate() -> Result<Self, ErrorStack> {
        loop {
            let private = Rsa::generate(BITS)?;
            let der = PKey::from_rsa(private.clone())?.public_key_to_der()?;
            // With this length and the usual exponent all keys have 162 bytes.
            if let Ok(public) = der.try_into() {
                return Ok(Key { private, public });
            }
        }
    }

    /// The public half, as SubjectPublicKeyInfo.
    pub fn public(&self) -> &[u8; KEY] {
        &self.public
    }

    /// The ticket that was sent under this key, up to its zero byte. `None` when it is not under this key or no text.
    ///
    /// spice-html5 writes the number without the zero bytes that it may begin with, and fills up at the end: of 256 tickets
    /// one comes shifted. So what ends in a zero byte and makes no sense is read that way, too.
    pub fn open(self, sealed: &[u8; SEALED]) -> Option<Secret> {
        let decrypt = |sealed: &[u8; SEALED]| {
            let mut plain = [0; SEALED];
            let length = self
                .private
                .private_decrypt(sealed, &mut plain, Padding::PKCS1_OAEP);
            let text = plain.get(..length.ok()?)?.split(|byte| *byte == 0).next()?;
            std::str::from_utf8(text).ok().map(Secret::new)
        };
        decrypt(sealed).or_else(|| {
            let mut shifted = *sealed;
            shifted.rotate_right(1);
            (shifted[0] == 0).then(|| decrypt(&shifted)).flatten()
        })
    }
}

/// A ticket under a server's public key, as a viewer sends it.
///
/// # Errors
/// OpenSSL's: the key is none, or the ticket is longer than it can take.
pub fn seal(ticket: &Secret, public: &[u8; KEY]) -> Result<[u8; SEALED], ErrorStack> {
    let key = Rsa::public_key_from_der(public)?;
    let mut plain = ticket.reveal().as_bytes().to_vec();
    plain.push(0);
    let mut sealed = vec![0; usize::try_from(key.size()).unwrap_or(SEALED)];
    key.public_encrypt(&plain, &mut sealed, Padding::PKCS1_OAEP)?;
    // A key of another length is none of this protocol; there is no error of OpenSSL's for that.
    sealed.try_into().map_err(|_| ErrorStack::get())
}

/// Keys that are ready.
#[derive(Debug)]
pub struct Keys {
    /// For all.
    ready: Mutex<mpsc::Receiver<Key>>,
    /// For members, when there are no others.
    kept: Mutex<mpsc::Receiver<Key>>,
    few: usize,
    /// Who makes keys ahead.
    patient: Option<JoinHandle<()>>,
    /// Who makes keys when there are few. It sleeps until it is woken.
    urgent: Option<JoinHandle<()>>,
}

impl Keys {
    /// Starts the threads that keep `ahead` keys ready, at least two. They end when this is dropped,
    /// which waits for the keys that they are just making.
    ///
    /// # Errors
    /// Where there is no thread to be had, or OpenSSL makes no key of this kind.
    pub fn start(ahead: usize) -> io::Result<Self> {
        let keep = (ahead / KEPT).max(1);
        let (keeps, kept) = mpsc::channel(keep);
        let (gives, ready) = mpsc::channel(ahead.saturating_sub(keep).max(1));
        // The first is made here: whoever cannot make one is told so at once, and not by viewers that wait.
        let first = Key::generate().map_err(io::Error::other)?;
        drop(gives.try_send(first));
        let few = (ahead / FEW).max(1);
        // Dropped on an error, this ends whichever thread there is.
        let mut keys = Keys {
            ready: Mutex::new(ready),
            kept: Mutex::new(kept),
            few,
            patient: None,
            urgent: None,
        };
        let thread = |name: &str| std::thread::Builder::new().name(name.to_owned());
        let maker = Maker { gives, keeps };
        let other = maker.clone();
        keys.patient = Some(thread(PATIENT).spawn(move || {
            // Where that is refused, it takes its full share.
            let _ = rustix::process::nice(GIVES_WAY);
            while other.make() {}
        })?);
        keys.urgent = Some(thread(URGENT).spawn(move || {
            let _ = rustix::process::nice(URGENT_GIVES_WAY);
            while !maker.gives.is_closed() {
                if maker.are_few(few) {
                    if !maker.make() {
                        return;
                    }
                } else {
                    std::thread::park();
                }
            }
        })?);
        Ok(keys)
    }

    /// The next key, as soon as there is one; never the same twice. `None` when no more are made.
    pub async fn take(&self, who: Asks) -> Option<Key> {
        if who == Asks::Stranger {
            let mut ready = self.ready.lock().await;
            if ready.len() <= self.few {
                self.wake();
            }
            return ready.recv().await;
        }
        // Somebody who holds it waits for one himself.
        if let Ok(mut ready) = self.ready.try_lock()
            && let Ok(key) = ready.try_recv()
        {
            if ready.len() <= self.few {
                self.wake();
            }
            return Some(key);
        }
        self.wake();
        self.kept.lock().await.recv().await
    }

    /// Has the urgent thread look at how many are ready. It does so once more if it is just going to sleep.
    fn wake(&self) {
        if let Some(urgent) = &self.urgent {
            urgent.thread().unpark();
        }
    }

    /// How many are ready now.
    pub fn ready(&self) -> usize {
        [&self.ready, &self.kept]
            .into_iter()
            .map(|keys| keys.try_lock().map_or(0, |keys| keys.len()))
            .sum()
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        self.ready.get_mut().close();
        self.kept.get_mut().close();
        self.wake();
        for maker in [self.patient.take(), self.urgent.take()].into_iter().flatten() {
            // A process that ends while it is at work takes OpenSSL's memory from under it.
            let _: std::thread::Result<()> = maker.join();
        }
    }
}

/// Where keys go that were made.
#[derive(Clone)]
struct Maker {
    gives: mpsc::Sender<Key>,
    keeps: mpsc::Sender<Key>,
}

impl Maker {
    /// Makes one more, for members first; false when nobody wants any more, or none can be made.
    fn make(&self) -> bool {
        let Ok(key) = Key::generate() else {
            return false;
        };
        match self.keeps.try_send(key) {
            Ok(()) => true,
            Err(TrySendError::Full(key)) => self.gives.blocking_send(key).is_ok(),
            Err(TrySendError::Closed(_)) => false,
        }
    }

    fn are_few(&self, few: usize) -> bool {
        self.keeps.capacity() > 0 || self.gives.max_capacity() - self.gives.capacity() < few
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_goes_through_and_one_under_another_key_does_not() {
        let (one, other) = (Key::generate().unwrap(), Key::generate().unwrap());
        assert_ne!(one.public(), other.public());
        let ticket = Secret::new("a".repeat(60));
        let sealed = seal(&ticket, one.public()).unwrap();
        assert_eq!(one.open(&sealed), Some(ticket));
        assert_eq!(other.open(&sealed), None);
    }

    #[test]
    fn a_ticket_that_comes_without_its_leading_zero_is_read() {
        let key = Key::generate().unwrap();
        let ticket = Secret::new("from a page");
        // Each is another one, by the padding.
        let seals = std::iter::repeat_with(|| seal(&ticket, key.public()).unwrap());
        let mut sealed = seals.take(100_000).find(|sealed| sealed[0] == 0).unwrap();
        sealed.rotate_left(1);
        assert_eq!(key.open(&sealed), Some(ticket));
        let other = Key::generate().unwrap();
        assert_eq!(other.open(&sealed), None);
    }

    #[test]
    fn what_follows_the_zero_byte_of_a_ticket_is_not_read() {
        let key = Key::generate().unwrap();
        let sealed = seal(&Secret::new("secret\0trailing"), key.public()).unwrap();
        assert_eq!(key.open(&sealed), Some(Secret::new("secret")));
    }

    #[test]
    fn no_key_is_given_twice_though_more_are_taken_than_were_ready() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let keys = Keys::start(3).unwrap();
        let mut seen = std::collections::HashSet::new();
        for number in 0..12 {
            let who = [Asks::Stranger, Asks::Member][number % 2];
            let key = runtime.block_on(keys.take(who)).unwrap();
            assert!(seen.insert(*key.public()));
        }
    }

    #[test]
    fn members_are_given_keys_though_strangers_take_all_that_they_can() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let keys = Keys::start(16).unwrap();
        runtime.block_on(async {
            while keys.ready() < 16 {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
            // They ask for more than are made in a while, and are first in line.
            let strangers = futures_util::future::join_all((0..1000).map(|_| keys.take(Asks::Stranger)));
            let members = async {
                let mut taken = 0;
                for _ in 0..8 {
                    taken += usize::from(keys.take(Asks::Member).await.is_some());
                }
                taken
            };
            tokio::select! {
                biased;
                _ = strangers => panic!("a thousand keys were made before eight were given"),
                taken = members => assert_eq!(taken, 8),
            }
        });
    }

    /// The threads of this process with their niceness (proc(5), field 19 of stat).
    fn threads() -> Vec<(String, i32)> {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        tasks
            // One may end meanwhile.
            .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("stat")).ok())
            .map(|stat| {
                let (name, rest) = stat.split_once('(').unwrap().1.rsplit_once(") ").unwrap();
                (name.to_owned(), rest.split(' ').nth(16).unwrap().parse().unwrap())
            })
            .collect()
    }

    #[test]
    fn whoever_makes_keys_ahead_gives_way_and_nobody_is_left_at_the_end() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let ours = rustix::process::getpriority_process(None).unwrap();
        let keys = Keys::start(2).unwrap();
        // It gives way before it makes its first, and this many come from it as well.
        while !threads()
            .iter()
            .any(|(name, nice)| name == PATIENT && *nice == (ours + GIVES_WAY).min(19))
        {
            runtime.block_on(keys.take(Asks::Stranger)).unwrap();
        }
        // One that is waited for in vain would wait here for ever.
        drop(keys);
    }
}
