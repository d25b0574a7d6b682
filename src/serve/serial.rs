//! The machine's serial log, as it grows.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::ws::{Message, WebSocket};

use super::session::Channel;
use super::terminal::end;
use crate::machine::serial;

/// What is shown of what was there before.
const FIRST: usize = 128 << 10;
/// What is read at a time afterwards; a guest that writes faster is shown in part.
const NEXT: usize = 256 << 10;
/// How often the file is looked at.
const LOOK: Duration = Duration::from_millis(300);

/// Serves a viewer until the session or the viewer ends.
pub(super) async fn serve(mut socket: WebSocket, mut channel: Channel) {
    let session = Arc::clone(&channel.session);
    let log = session.job.file("serial.log");
    let over = tokio::select! {
        biased;
        end = session.ended() => Some(end),
        () = follow(&log, &mut socket, &mut channel) => None,
    };
    if let Some(why) = over {
        end(socket, &why.to_string()).await;
    }
}

async fn follow(log: &Path, socket: &mut WebSocket, channel: &mut Channel) {
    let mut seen = length(log);
    let mut bytes = serial::last_bytes(log, FIRST).unwrap_or_default();
    loop {
        if !bytes.is_empty() {
            channel.sent(bytes.len());
            if socket
                .send(Message::Binary(Bytes::from(std::mem::take(&mut bytes))))
                .await
                .is_err()
            {
                return;
            }
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            // Nothing that comes is of interest but the end.
            message = socket.recv() => match message {
                Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                Some(Ok(_)) => continue,
            },
        }
        let now = length(log);
        let new = grown(seen, now).min(NEXT);
        seen = now;
        if new > 0 {
            bytes = serial::last_bytes(log, new).unwrap_or_default();
        }
    }
}

/// How many bytes are new. A file that is shorter than before was begun anew.
fn grown(seen: u64, now: u64) -> usize {
    let new = if now < seen { now } else { now - seen };
    usize::try_from(new).unwrap_or(usize::MAX)
}

fn length(log: &Path) -> u64 {
    std::fs::metadata(log).map_or(0, |about| about.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_new_is_what_was_added_or_all_of_a_file_begun_anew() {
        assert_eq!(grown(10, 10), 0);
        assert_eq!(grown(10, 15), 5);
        assert_eq!(grown(2 << 20, 7), 7);
    }
}
