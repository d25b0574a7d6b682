//! WebSockets, as the third way for viewers to come: each is one channel, and what its messages hold is the stream of bytes that
//! other viewers send over TCP.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Sink, SinkExt, Stream, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::proxy::Proxy;

/// Bytes between the proxy and a WebSocket, each way: a full screen's worth is several of these.
const UNDER_WAY: usize = 256 << 10;
/// For what was said last to reach a browser.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// Most bytes of a message to a browser.
const PIECE: usize = 64 << 10;

impl Proxy {
    /// Serves one WebSocket until it ends, whatever library made it: `incoming` are the contents of its binary messages, up to the
    /// one that closes it, and each item of `outgoing` is to become one. When the proxy is done with the channel it closes
    /// `outgoing`. Viewers ask for the sub-protocol `binary`; whom to let open a WebSocket at all is the caller's to decide.
    pub async fn serve_websocket(
        self: Arc<Self>,
        incoming: impl Stream<Item = Bytes> + Send,
        outgoing: impl Sink<Bytes> + Send,
        from: SocketAddr,
    ) {
        let (near, far) = tokio::io::duplex(UNDER_WAY);
        // Not cut off in the middle: it sees the end of its stream, and closes what it has at the machine.
        let serving = tokio::spawn(async move { self.serve(near, from).await });
        let ended = async {
            // However it ended.
            let _ = serving.await;
            tokio::time::sleep(LAST_WORDS).await;
        };
        let (mut from_proxy, mut to_proxy) = tokio::io::split(far);
        tokio::pin!(incoming, outgoing);
        let out = async {
            let mut piece = vec![0; PIECE];
            while let Ok(count @ 1..) = from_proxy.read(&mut piece).await {
                let bytes = Bytes::copy_from_slice(piece.get(..count).unwrap_or_default());
                if outgoing.send(bytes).await.is_err() {
                    return;
                }
            }
            // Whether the browser hears it makes no difference.
            let _ = outgoing.close().await;
        };
        let back = async {
            while let Some(bytes) = incoming.next().await {
                if to_proxy.write_all(&bytes).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = out => {}
            () = back => {}
            () = ended => {}
        }
    }
}
