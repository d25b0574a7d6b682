//! A machine's screen without a machine: it takes any ticket, counts its sessions, and echoes nothing.

// Each test binary uses a part of this.
#![allow(dead_code)]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cannery::console::Backend;
use cannery::console::backend::Opened;
use cannery::console::handshake;
use cannery::console::keys::Key;
use cannery::console::link::{Caps, Reply};
use cannery::console::wire::Wire;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

/// Bytes on their way between a proxy and this.
const PIPE: usize = 64 << 10;
/// Bytes of what is drawn.
const PICTURE: u32 = 60_000;

/// One that speaks as spice-server does, as far as a proxy can see; sessions are numbered from 1000.
pub fn screen() -> Arc<dyn Backend> {
    one(false)
}

/// The same, but it draws as much as is taken.
pub fn drawing_screen() -> Arc<dyn Backend> {
    one(true)
}

fn one(draws: bool) -> Arc<dyn Backend> {
    let sessions = Arc::new(AtomicU32::new(1000));
    // One key for all: nobody guards anything here.
    let key = *Key::generate().unwrap().public();
    Arc::new(Opened::new("stub", move || {
        let sessions = Arc::clone(&sessions);
        Box::pin(async move {
            let (near, far) = tokio::io::duplex(PIPE);
            tokio::spawn(async move { serve(far, key, &sessions, draws).await });
            Ok(Box::new(near) as Wire)
        })
    }))
}

async fn serve(mut wire: DuplexStream, key: [u8; 162], sessions: &AtomicU32, draws: bool) -> io::Result<()> {
    let hello = handshake::hello(&mut wire).await.map_err(io::Error::other)?;
    let caps = Caps {
        common: vec![0b1011],
        channel: vec![],
    };
    wire.write_all(&Reply { key, caps }.encode()).await?;
    wire.read_exact(&mut [0; 132]).await?;
    wire.write_u32_le(0).await?;
    if hello.kind == 1 {
        let session = sessions.fetch_add(1, Ordering::Relaxed);
        wire.write_all(&[103, 0, 32, 0, 0, 0]).await?;
        wire.write_u32_le(session).await?;
        wire.write_all(&[0; 28]).await?;
    }
    let (mut from, mut to) = tokio::io::split(wire);
    let listening = async { tokio::io::copy(&mut from, &mut tokio::io::sink()).await.map(drop) };
    if !(draws && hello.kind == 2) {
        return listening.await;
    }
    let drawing = async {
        let mut picture = vec![48, 1];
        picture.extend(PICTURE.to_le_bytes());
        picture.resize(picture.len() + PICTURE as usize, 0x5a);
        loop {
            to.write_all(&picture).await?;
            // As fast as a viewer on the same host reads, which does not.
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        ended = listening => ended,
        ended = drawing => ended,
    }
}
