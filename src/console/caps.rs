//! What servers can do, as they said it themselves.
//!
//! A viewer is shown capabilities before it sends its ticket, when it is not known yet which machine it wants. So it is
//! shown those of a server that is like the wanted one, and every channel that is opened tells them anew.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::backend::{self, Backend};
use super::channel::Kind;
use super::link::{Caps, Common, Hello};

/// After a server did not say it, the time in which it is not asked again: a machine that hangs must not slow the viewers
/// of others.
const ASK_AGAIN: Duration = Duration::from_secs(10);

/// For an answer. A viewer waits meanwhile, and can do without.
const ASK_TIME: Duration = Duration::from_secs(2);

/// Most entries; there are ten kinds, and few versions of a server on a host.
const ENTRIES_MAX: usize = 1000;

#[derive(Debug)]
enum Entry {
    Known(Caps),
    Silent(Instant),
}

/// What is known about servers, by their likeness and the kind of channel.
#[derive(Debug, Default)]
pub(super) struct Mirror {
    known: Mutex<HashMap<(String, Kind), Entry>>,
}

impl Mirror {
    /// What a viewer is shown for this kind of channel. Where nothing is known it is what this proxy itself needs.
    pub(super) async fn shown(&self, model: Option<&dyn Backend>, kind: Kind) -> Caps {
        let Some(model) = model else {
            return ours(Caps::default());
        };
        match self.look(model.likeness(), kind) {
            Some(caps) => return ours(caps),
            None if self.asked_lately(model.likeness(), kind) => return ours(Caps::default()),
            None => {}
        }
        let hello = Hello {
            session: 0,
            kind: kind.number(),
            id: 0,
            caps: ours(Caps::default()),
        };
        let answer = tokio::time::timeout(ASK_TIME, backend::probe(model, &hello)).await;
        match answer {
            Ok(Ok(caps)) => {
                self.learn(model.likeness(), kind, caps.clone());
                ours(caps)
            }
            Ok(Err(_)) | Err(_) => {
                self.put(model.likeness(), kind, Entry::Silent(Instant::now()));
                ours(Caps::default())
            }
        }
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

    fn look(&self, likeness: &str, kind: Kind) -> Option<Caps> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        match known.get(&(likeness.to_owned(), kind)) {
            Some(Entry::Known(caps)) => Some(caps.clone()),
            Some(Entry::Silent(_)) | None => None,
        }
    }

    fn asked_lately(&self, likeness: &str, kind: Kind) -> bool {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        matches!(known.get(&(likeness.to_owned(), kind)), Some(Entry::Silent(since)) if since.elapsed() < ASK_AGAIN)
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
}
