//! What servers can do, as they said it themselves.
//!
//! A viewer is shown capabilities before it sends its ticket, when it is not known yet which machine it wants. So it is
//! shown those of a server that is like the wanted one, and every channel that is opened tells them anew.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Mutex as Turn;
use tokio::time::timeout;

use super::backend::{self, Backend};
use super::channel::Kind;
use super::link::{Caps, Common, Hello};

/// After a server did not say it, the time in which it is not asked again: a machine that hangs must not slow the viewers
/// of others.
const ASK_AGAIN: Duration = Duration::from_secs(10);

/// For an answer, and for one's turn to ask. A viewer waits meanwhile, and can do without.
const ASK_TIME: Duration = Duration::from_secs(2);

/// For so long a model's likeness stands for it: finding one is work, which would be done for everyone who knocks, and
/// machines of a host are alike.
const MODEL_TIME: Duration = Duration::from_secs(10);

/// Most entries; there are ten kinds, and few versions of a server on a host.
const ENTRIES_MAX: usize = 1000;

#[derive(Clone, Debug)]
enum Entry {
    Known(Caps),
    Silent(Instant),
}

/// What is known about servers, by their likeness and the kind of channel.
#[derive(Debug, Default)]
pub(super) struct Mirror {
    known: Mutex<HashMap<(String, Kind), Entry>>,
    /// The likeness of the last model, and since when.
    last: Mutex<Option<(String, Instant)>>,
    /// Servers are asked one after the other: whoever comes meanwhile wants the same answer, and a machine that is asked by
    /// hundreds at once, none of whom has shown a ticket, would have no time for anything else.
    turn: Turn<()>,
}

impl Mirror {
    /// What a viewer is shown for this kind of channel. Where nothing is known it is what this proxy itself needs.
    pub(super) async fn shown(
        &self,
        model: impl FnOnce() -> Option<Arc<dyn Backend>> + Send,
        kind: Kind,
    ) -> Caps {
        if let Some(likeness) = self.last_model()
            && let Some(Entry::Known(caps)) = self.look(&likeness, kind)
        {
            return ours(caps);
        }
        let Some(model) = model() else {
            return ours(Caps::default());
        };
        *self.last() = Some((model.likeness().to_owned(), Instant::now()));
        ours(self.asked(model.as_ref(), kind).await.unwrap_or_default())
    }

    /// What this server can do, by asking it where that is not known yet.
    async fn asked(&self, model: &dyn Backend, kind: Kind) -> Option<Caps> {
        let _turn = timeout(ASK_TIME, self.turn.lock()).await.ok()?;
        match self.look(model.likeness(), kind) {
            Some(Entry::Known(caps)) => return Some(caps),
            Some(Entry::Silent(since)) if since.elapsed() < ASK_AGAIN => return None,
            Some(Entry::Silent(_)) | None => {}
        }
        let hello = Hello {
            session: 0,
            kind: kind.number(),
            id: 0,
            caps: ours(Caps::default()),
        };
        let caps = match timeout(ASK_TIME, backend::probe(model, &hello)).await {
            Ok(Ok(caps)) => Some(caps),
            Ok(Err(_)) | Err(_) => None,
        };
        let entry = caps
            .clone()
            .map_or_else(|| Entry::Silent(Instant::now()), Entry::Known);
        self.put(model.likeness(), kind, entry);
        caps
    }

    /// Notes what a server said.
    pub(super) fn learn(&self, likeness: &str, kind: Kind, caps: Caps) {
        self.put(likeness, kind, Entry::Known(caps));
    }

    fn put(&self, likeness: &str, kind: Kind, entry: Entry) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= ENTRIES_MAX {
            known.clear();
        }
        known.insert((likeness.to_owned(), kind), entry);
    }

    fn look(&self, likeness: &str, kind: Kind) -> Option<Entry> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(&(likeness.to_owned(), kind)).cloned()
    }

    fn last(&self) -> MutexGuard<'_, Option<(String, Instant)>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn last_model(&self) -> Option<String> {
        self.last()
            .as_ref()
            .filter(|(_, since)| since.elapsed() < MODEL_TIME)
            .map(|(likeness, _)| likeness.clone())
    }
}

/// The same capabilities, but the handshake is ours: tickets under a key, and no SASL.
fn ours(mut caps: Caps) -> Caps {
    if caps.common.is_empty() {
        caps.set(Common::MiniHeader, true);
    }
    caps.set(Common::AuthSelection, true);
    caps.set(Common::AuthTicket, true);
    caps.set(Common::AuthSasl, false);
    caps
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::future::BoxFuture;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::super::link::{self, Reply};
    use super::super::wire::Wire;
    use super::*;

    #[test]
    fn a_viewer_sees_the_servers_capabilities_and_our_handshake() {
        let server = Caps {
            common: vec![0b1110, 7],
            channel: vec![0x1052],
        };
        let shown = ours(server);
        assert_eq!(shown.common, [0b1011, 7]);
        assert_eq!(shown.channel, [0x1052]);
        // One that has no short headers is not made to have them.
        assert_eq!(
            ours(Caps {
                common: vec![1],
                channel: vec![]
            })
            .common,
            [0b0011]
        );
        assert_eq!(ours(Caps::default()).common, [0b1011]);
    }

    /// A server that counts how often it is asked, and how many ask at once.
    #[derive(Debug, Default)]
    struct Counting {
        asked: AtomicUsize,
        now: AtomicUsize,
        most: AtomicUsize,
        answers: bool,
    }

    impl Backend for Counting {
        fn likeness(&self) -> &str {
            "counting"
        }

        fn connect(&self) -> BoxFuture<'_, io::Result<Wire>> {
            Box::pin(async {
                self.asked.fetch_add(1, Ordering::Relaxed);
                let now = self.now.fetch_add(1, Ordering::Relaxed) + 1;
                self.most.fetch_max(now, Ordering::Relaxed);
                tokio::task::yield_now().await;
                self.now.fetch_sub(1, Ordering::Relaxed);
                if !self.answers {
                    return Err(io::ErrorKind::ConnectionRefused.into());
                }
                let (near, mut far) = tokio::io::duplex(4096);
                let reply = Reply {
                    key: [0; link::KEY],
                    caps: Caps {
                        common: vec![0b1011],
                        channel: vec![7],
                    },
                };
                far.write_all(&reply.encode()).await?;
                // Open until it is read: the far end lives in the task.
                tokio::spawn(async move { drop(far.read_to_end(&mut Vec::new()).await) });
                Ok(Box::new(near) as Wire)
            })
        }
    }

    async fn many_look(mirror: &Mirror, server: &Arc<Counting>) -> Vec<Caps> {
        let kinds = [Kind::Main, Kind::Cursor];
        let looks = (0..20).map(|number| {
            let server: Arc<dyn Backend> = server.clone();
            mirror.shown(move || Some(server), kinds[number % 2])
        });
        futures_util::future::join_all(looks).await
    }

    #[tokio::test]
    async fn a_server_is_asked_once_for_a_kind_and_by_one_at_a_time_however_many_knock() {
        let server = Arc::new(Counting {
            answers: true,
            ..Counting::default()
        });
        let mirror = Mirror::default();
        let shown = many_look(&mirror, &server).await;
        assert!(shown.iter().all(|caps| caps.channel == [7]), "{shown:?}");
        let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
        assert_eq!((count(&server.asked), count(&server.most)), (2, 1));
        // Nor is its owner asked for a model where one was named lately.
        let shown = mirror.shown(|| panic!("nobody needs a model"), Kind::Main).await;
        assert_eq!(shown.channel, [7]);
        // But for what is not known.
        assert_eq!(mirror.shown(|| None, Kind::Inputs).await.channel, [0; 0]);
    }

    #[tokio::test]
    async fn a_server_that_does_not_answer_is_left_alone_for_a_while() {
        let server = Arc::new(Counting::default());
        let mirror = Mirror::default();
        let shown = many_look(&mirror, &server).await;
        assert!(shown.iter().all(|caps| caps.common == [0b1011]), "{shown:?}");
        assert_eq!(server.asked.load(Ordering::Relaxed), 2);
    }
}
