//! A command on a terminal: what is typed, and how large the window is.

use std::sync::Arc;

use tokio::sync::mpsc::{Receiver, Sender};

use super::wake::Wake;

/// What a browser's terminal understands.
pub(super) const TYPE: &str = "xterm-256color";
/// The sides of a window that programs can bear.
const SIDES: std::ops::RangeInclusive<u16> = 1..=1000;

/// How large a terminal's window is, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    columns: u16,
    rows: u16,
}

impl Window {
    /// A window of this size, or of the nearest that programs can bear.
    pub fn new(columns: u16, rows: u16) -> Self {
        let fit = |side: u16| side.clamp(*SIDES.start(), *SIDES.end());
        Self {
            columns: fit(columns),
            rows: fit(rows),
        }
    }

    /// Characters of a line.
    pub fn columns(self) -> u32 {
        self.columns.into()
    }

    /// Lines.
    pub fn rows(self) -> u32 {
        self.rows.into()
    }
}

impl Default for Window {
    /// The size that terminals have had since there were any.
    fn default() -> Self {
        Self::new(80, 24)
    }
}

/// What comes from whoever sits at the terminal, in its order.
#[derive(Debug)]
pub(super) enum Stroke {
    Keys(Vec<u8>),
    Resize(Window),
}

/// The keyboard of a terminal.
#[derive(Debug)]
pub struct Keyboard {
    pub(super) strokes: Sender<Stroke>,
    pub(super) wake: Arc<Wake>,
}

impl Keyboard {
    /// Types. Waits while the guest does not take what was typed before; what is typed after the command has ended is lost.
    pub async fn type_in(&self, keys: Vec<u8>) {
        self.stroke(Stroke::Keys(keys)).await;
    }

    /// Gives the window another size.
    pub async fn resize(&self, window: Window) {
        self.stroke(Stroke::Resize(window)).await;
    }

    async fn stroke(&self, stroke: Stroke) {
        // Nobody takes it once the command has ended, which its reader learns.
        let _ = self.strokes.send(stroke).await;
        self.wake.ring();
    }
}

/// The thread's side of a terminal.
#[derive(Debug)]
pub(super) struct Desk {
    pub(super) window: Window,
    strokes: Receiver<Stroke>,
    /// Taken and not yet sent whole, and how many bytes of it were.
    now: Option<(Stroke, usize)>,
}

impl Desk {
    pub(super) fn new(window: Window, strokes: Receiver<Stroke>) -> Self {
        Self {
            window,
            strokes,
            now: None,
        }
    }

    /// What is to be sent next. The same again until it was [`Desk::sent`], since libssh2 wants the very same call after one that
    /// would have blocked.
    pub(super) fn next(&mut self) -> Option<Next<'_>> {
        if self.now.is_none() {
            self.now = self.strokes.try_recv().ok().map(|stroke| (stroke, 0));
        }
        self.now.as_ref().map(|(stroke, sent)| match stroke {
            Stroke::Keys(keys) => Next::Keys(keys.get(*sent..).unwrap_or_default()),
            Stroke::Resize(window) => Next::Resize(*window),
        })
    }

    /// So many bytes of it are on their way; of a size, any number.
    pub(super) fn sent(&mut self, count: usize) {
        if let Some((stroke, sent)) = &mut self.now {
            *sent += count;
            let whole = match stroke {
                Stroke::Keys(keys) => *sent >= keys.len(),
                Stroke::Resize(_) => true,
            };
            if whole {
                self.now = None;
            }
        }
    }
}

/// One call of libssh2's.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next<'a> {
    Keys(&'a [u8]),
    Resize(Window),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strokes_are_sent_whole_and_in_their_order() {
        let (strokes, taken) = tokio::sync::mpsc::channel(8);
        let mut desk = Desk::new(Window::default(), taken);
        assert_eq!(desk.next(), None);
        strokes.try_send(Stroke::Keys(b"abc".to_vec())).unwrap();
        strokes.try_send(Stroke::Resize(Window::new(100, 30))).unwrap();
        strokes.try_send(Stroke::Keys(b"d".to_vec())).unwrap();
        assert_eq!(desk.next(), Some(Next::Keys(b"abc")));
        assert_eq!(desk.next(), Some(Next::Keys(b"abc")));
        desk.sent(2);
        assert_eq!(desk.next(), Some(Next::Keys(b"c")));
        desk.sent(1);
        assert_eq!(desk.next(), Some(Next::Resize(Window::new(100, 30))));
        desk.sent(0);
        assert_eq!(desk.next(), Some(Next::Keys(b"d")));
        desk.sent(1);
        drop(strokes);
        assert_eq!(desk.next(), None);
    }

    #[test]
    fn a_window_has_a_size_that_programs_can_bear() {
        assert_eq!(Window::new(0, 65_535), Window::new(1, 1000));
    }
}
