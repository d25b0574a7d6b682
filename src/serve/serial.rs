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
/// What is read at a time afterwards; a guest that writes faster is shown later.
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
    // A log that cannot be read is as one that has nothing.
    let Ok((mut follower, mut bytes)) = serial::Follower::begin(log, FIRST) else {
        while !matches!(socket.recv().await, Some(Ok(Message::Close(_)) | Err(_)) | None) {}
        return;
    };
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
        bytes = follower.more(NEXT).unwrap_or_default();
    }
}
