//! A terminal over a WebSocket, and over the shoulder of whoever has it.
//!
//! Binary messages are bytes: keys one way, what the shell prints the other. Text messages are JSON: `{"columns":…,"rows":…}` from
//! the browser, `{"note":…}` or `{"end":…}` to it. A viewer who may only see gets no shell: it is shown the terminal that was opened
//! last by somebody who may type, of those that are open, and nothing that it sends is read. How large that is it is told with
//! `{"size":{"columns":…,"rows":…}}`: programs draw for that size.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::ws::{CloseFrame, Message, WebSocket};
use serde::Deserialize;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::watch;

use super::session::{Channel, End};
use super::shell;
use crate::guest::ssh::{Event, Window};
use crate::record::JobKey;
use crate::settings::Settings;

/// What somebody who comes later sees of what was printed before: some screens full.
const REMEMBERED: usize = 64 << 10;
/// Pieces of output that a viewer may be behind before it is shown the remembered end instead.
const BEHIND: usize = 256;
/// How often a viewer looks whether there is a terminal to see, or a newer one.
const LOOK: Duration = Duration::from_millis(300);
/// The first message says how large the window is; a browser sends it at once.
const FIRST_WORD: Duration = Duration::from_secs(5);
/// For the reason of an end to be said.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Makes a terminal forget what it shows, and how (ECMA-48's RIS).
const RESET: &[u8] = b"\x1bc";
/// The WebSocket's own code for "goes away" (RFC 6455, 7.4.1).
const GOING_AWAY: u16 = 1001;

/// A size, as browsers send it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
struct Size {
    columns: u16,
    rows: u16,
}

impl From<Size> for Window {
    fn from(size: Size) -> Self {
        Window::new(size.columns, size.rows)
    }
}

/// What a terminal prints, for whoever may only see.
#[derive(Debug)]
struct Screen {
    recent: Mutex<VecDeque<u8>>,
    now: broadcast::Sender<Bytes>,
    size: watch::Sender<Window>,
}

impl Screen {
    fn new(window: Window) -> Self {
        Self {
            size: watch::Sender::new(window),
            recent: Mutex::default(),
            now: broadcast::Sender::new(BEHIND),
        }
    }

    fn print(&self, bytes: &Bytes) {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.extend(bytes);
        let over = recent.len().saturating_sub(REMEMBERED);
        recent.drain(..over);
        // That nobody looks is as a rule so.
        let _ = self.now.send(bytes.clone());
    }

    /// What was printed lately, and what will be, with nothing between them missing or twice.
    fn look(&self) -> (Bytes, broadcast::Receiver<Bytes>) {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        (recent.iter().copied().collect(), self.now.subscribe())
    }
}

/// The terminals that are open, by machine, the newest last.
#[derive(Debug, Default)]
pub(super) struct Screens(Mutex<HashMap<JobKey, Vec<Weak<Screen>>>>);

impl Screens {
    fn open(&self, job: &JobKey, window: Window) -> Arc<Screen> {
        let screen = Arc::new(Screen::new(window));
        let mut screens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        screens.retain(|_, of_job| {
            of_job.retain(|screen| screen.strong_count() > 0);
            !of_job.is_empty()
        });
        screens
            .entry(job.clone())
            .or_default()
            .push(Arc::downgrade(&screen));
        screen
    }

    /// The newest that is open.
    fn find(&self, job: &JobKey) -> Option<Arc<Screen>> {
        let screens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        screens.get(job)?.iter().rev().find_map(Weak::upgrade)
    }

    /// Is it this one?
    fn is_newest(&self, job: &JobKey, screen: &Weak<Screen>) -> bool {
        self.find(job)
            .is_some_and(|newest| Arc::as_ptr(&newest) == screen.as_ptr())
    }
}

fn sized(window: Window) -> Message {
    let size = serde_json::json!({ "columns": window.columns(), "rows": window.rows() });
    Message::text(serde_json::json!({ "size": size }).to_string())
}

fn note(kind: &str, text: &str) -> Message {
    Message::text(serde_json::json!({ kind: text }).to_string())
}

/// Says why there is no more, and closes. Whoever does not listen is cut off.
pub(super) async fn end(mut socket: WebSocket, why: &str) {
    let close = Message::Close(Some(CloseFrame {
        code: GOING_AWAY,
        reason: "".into(),
    }));
    let words = async {
        socket.send(note("end", why)).await?;
        socket.send(close).await
    };
    // Whether anybody hears it makes no difference.
    let _ = tokio::time::timeout(LAST_WORDS, words).await;
}

/// Serves a viewer who may type, until the shell, the session or the viewer ends.
pub(super) async fn serve(
    settings: &Settings,
    screens: &Screens,
    mut socket: WebSocket,
    mut channel: Channel,
) {
    let session = Arc::clone(&channel.session);
    let why = tokio::select! {
        biased;
        end = session.ended() => Some(end.to_string()),
        why = talk(settings, screens, &mut socket, &mut channel) => why,
    };
    if let Some(why) = why {
        end(socket, &why).await;
    }
}

/// The sentence with which it ends; none when the viewer has gone.
async fn talk(
    settings: &Settings,
    screens: &Screens,
    socket: &mut WebSocket,
    channel: &mut Channel,
) -> Option<String> {
    let window = match tokio::time::timeout(FIRST_WORD, socket.recv()).await {
        Ok(Some(Ok(Message::Text(text)))) => size(&text).unwrap_or_default(),
        Ok(Some(Ok(_))) | Err(_) => Window::default(),
        Ok(None | Some(Err(_))) => return None,
    };
    let job = channel.session.job.clone();
    let mut shell = match shell::open(settings, &job, window).await {
        Ok(shell) => shell,
        Err(failure) => return Some(failure.message),
    };
    let screen = screens.open(job.key(), window);
    loop {
        tokio::select! {
            event = shell.running.next() => match event {
                Event::Output(bytes) | Event::Diagnostics(bytes) => {
                    let bytes = Bytes::from(bytes);
                    screen.print(&bytes);
                    channel.sent(bytes.len());
                    socket.send(Message::Binary(bytes)).await.ok()?;
                }
                Event::Ended(_) => return Some("the shell has ended".to_owned()),
                Event::Failed(e) => return Some(e.to_string()),
            },
            message = socket.recv() => match message?.ok()? {
                Message::Binary(keys) => {
                    channel.received(keys.len());
                    shell.keyboard.type_in(keys.to_vec()).await;
                }
                Message::Text(text) => if let Some(window) = size(&text) {
                    screen.size.send_replace(window);
                    shell.keyboard.resize(window).await;
                },
                Message::Close(_) => return None,
                Message::Ping(_) | Message::Pong(_) => {}
            },
        }
    }
}

fn size(text: &str) -> Option<Window> {
    serde_json::from_str::<Size>(text).ok().map(Window::from)
}

/// Serves a viewer who may only see.
pub(super) async fn show(screens: &Screens, mut socket: WebSocket, mut channel: Channel) {
    let session = Arc::clone(&channel.session);
    let why = tokio::select! {
        biased;
        end = session.ended() => Some(end),
        why = watch(screens, &mut socket, &mut channel) => why,
    };
    if let Some(why) = why {
        end(socket, &why.to_string()).await;
    }
}

async fn watch(screens: &Screens, socket: &mut WebSocket, channel: &mut Channel) -> Option<End> {
    let job = channel.session.job.key().clone();
    let mut said = false;
    loop {
        let Some(screen) = screens.find(&job) else {
            if !said {
                let text = "You may only see. As soon as somebody has a terminal here, it is shown.";
                socket.send(note("note", text)).await.ok()?;
                said = true;
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                gone = gone(socket) => return gone,
            }
            continue;
        };
        said = false;
        let (recent, mut now) = screen.look();
        let mut size = screen.size.subscribe();
        // Whoever types may leave though somebody looks on.
        let this = Arc::downgrade(&screen);
        drop(screen);
        let window = *size.borrow_and_update();
        socket.send(note("note", "")).await.ok()?;
        socket.send(sized(window)).await.ok()?;
        channel.sent(recent.len());
        let recent = Bytes::from([RESET, &recent].concat());
        socket.send(Message::Binary(recent)).await.ok()?;
        let mut look = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                _ = look.tick() => if !screens.is_newest(&job, &this) { break },
                Ok(()) = size.changed() => {
                    let window = *size.borrow_and_update();
                    socket.send(sized(window)).await.ok()?;
                }
                printed = now.recv() => match printed {
                    Ok(bytes) => {
                        channel.sent(bytes.len());
                        socket.send(Message::Binary(bytes)).await.ok()?;
                    }
                    // From what is remembered, then.
                    Err(RecvError::Lagged(_) | RecvError::Closed) => break,
                },
                gone = gone(socket) => return gone,
            }
        }
    }
}

/// Waits until the viewer goes; what it sends before is not looked at.
async fn gone(socket: &mut WebSocket) -> Option<End> {
    while let Some(Ok(message)) = socket.recv().await {
        if matches!(message, Message::Close(_)) {
            break;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn who_comes_later_sees_the_end_of_what_was_printed_and_what_follows() {
        let screens = Screens::default();
        let job = "aaaa1111-7-1".parse().unwrap();
        assert!(screens.find(&job).is_none());
        let screen = screens.open(&job, Window::default());
        screen.print(&Bytes::from(vec![b'a'; REMEMBERED]));
        screen.print(&Bytes::from_static(b"end"));
        let (recent, mut now) = screens.find(&job).unwrap().look();
        assert_eq!(recent.len(), REMEMBERED);
        assert!(recent.ends_with(b"aend"));
        screen.print(&Bytes::from_static(b"!"));
        assert_eq!(now.try_recv().unwrap(), b"!"[..]);
        drop(screen);
        assert!(screens.find(&job).is_none());
    }

    #[test]
    fn the_newest_terminal_is_shown_and_when_it_closes_an_older_one_that_is_open() {
        let screens = Screens::default();
        let job = "aaaa1111-7-1".parse().unwrap();
        let [first, second, third] =
            [80, 100, 120].map(|columns| screens.open(&job, Window::new(columns, 30)));
        let columns = || screens.find(&job).map(|screen| screen.size.borrow().columns());
        assert_eq!(columns(), Some(120));
        let seen = Arc::downgrade(&third);
        assert!(screens.is_newest(&job, &seen));
        drop(second);
        drop(third);
        assert!(!screens.is_newest(&job, &seen));
        first.size.send_replace(Window::new(90, 30));
        assert_eq!(columns(), Some(90));
        drop(first);
        assert_eq!(columns(), None);
    }

    #[test]
    fn a_size_is_two_numbers_and_nothing_else_is_one() {
        assert_eq!(size(r#"{"columns":132,"rows":50}"#), Some(Window::new(132, 50)));
        for text in ["", "{}", r#"{"columns":-1,"rows":5}"#, "ls"] {
            assert_eq!(size(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn whatever_a_browser_says_is_a_size_that_programs_can_bear_or_none(
            columns in any::<u16>(), rows in any::<u16>(), odd in ".*",
        ) {
            let text = serde_json::json!({"columns": columns, "rows": rows}).to_string();
            prop_assert_eq!(size(&text), Some(Window::new(columns, rows)));
            prop_assert_eq!(size(&odd), None);
            // No part of it is one.
            prop_assert!((0..text.len()).all(|end| size(&text[..end]).is_none()));
        }
    }
}
