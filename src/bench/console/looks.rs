//! Viewers that take less than they should, at a real machine whose guest changes its screen's mode again and again: QEMU waits
//! then for what it has drawn to be taken, in the thread that its control connection needs.

use std::fmt;
use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};

use super::proxy::real_ticket;
use super::qemu::Qemu;
use super::stub::{hear, message};
use super::viewer::Mute;
use super::{Bench, VIEWER, lost};
use crate::bench::figure::{Figure, Goal, Peer};
use crate::console::wire::Wire;
use crate::outcome::Failure;

/// How long each looks: a guest on a busy host without KVM changes its mode several times in this.
const LOOK: Duration = Duration::from_secs(8);
/// Beyond what a viewer causes that takes all.
const GOAL: Goal = Goal::Beyond(Duration::from_millis(100));
/// Bytes of the largest message of a screen of this size, and some more.
const MOST: usize = 4 << 20;
/// What begins a display channel, and what acknowledges: message types of a viewer.
const DISPLAY_INIT: u16 = 101;
const ACK_SYNC: u16 = 1;
const ACK: u16 = 2;
/// The machine's message with a generation and a window.
const SET_ACK: u16 = 3;

/// How a viewer takes what comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Takes {
    /// It reads and acknowledges.
    All,
    /// It reads.
    Unacknowledged,
    /// Only a byte a second.
    Little,
    Nothing,
}

impl fmt::Display for Takes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Takes::All => "takes all",
            Takes::Unacknowledged => "acknowledges nothing",
            Takes::Little => "reads a byte a second",
            Takes::Nothing => "reads nothing",
        })
    }
}

impl Bench<'_> {
    /// A line for each way not to take what comes.
    pub(super) async fn looks(&mut self) -> Result<Vec<Figure>, Failure> {
        self.log
            .line("Measuring QEMU's control connection while its guest changes its screen.");
        let Some(qemu) = Qemu::switching(&self.plan.scratch).await? else {
            return Ok(Vec::new());
        };
        let well = self.look(&qemu, Takes::All).await?;
        let mut figures = Vec::new();
        for takes in [Takes::Unacknowledged, Takes::Little, Takes::Nothing] {
            let mut figure = Figure::new(
                format!("QEMU's slowest answer beside a viewer that {takes}, against one that takes all"),
                Peer::None,
                GOAL,
            );
            figure.peer_took(well);
            figure.took(self.look(&qemu, takes).await?);
            figures.push(figure);
        }
        Ok(figures)
    }

    /// QEMU's slowest answer meanwhile.
    async fn look(&mut self, qemu: &Qemu, takes: Takes) -> Result<Duration, Failure> {
        self.proxy.quiet().await?;
        let mut viewer = Mute::open(&self.plain, VIEWER, &real_ticket(&format!("{takes}")))
            .await
            .map_err(lost)?;
        let looking = timeout(LOOK, look(&mut viewer.display, takes));
        match qemu.slowest(looking).await? {
            // It looked as long as it was to.
            (slowest, Err(_)) => Ok(slowest),
            (slowest, Ok(Ok(()))) => Ok(slowest),
            (_, Ok(Err(error))) => Err(lost(error)),
        }
    }
}

/// Begins a screen's channel, and takes of it what is to be taken, without an end.
async fn look(display: &mut Wire, takes: Takes) -> io::Result<()> {
    display.write_all(&message(DISPLAY_INIT, &[0; 14])).await?;
    let mut body = vec![0; MOST];
    let (mut window, mut left) = (0, 0);
    loop {
        match takes {
            Takes::Nothing => std::future::pending().await,
            Takes::Little => {
                display.read_u8().await?;
                sleep(Duration::from_secs(1)).await;
            }
            Takes::Unacknowledged => drop(hear(display, &mut body).await?),
            Takes::All => {
                let (kind, _) = hear(display, &mut body).await?;
                if kind == SET_ACK
                    && let Some((generation, size)) = body.split_first_chunk::<4>()
                {
                    window = size.first_chunk().copied().map_or(0, u32::from_le_bytes);
                    left = window;
                    display.write_all(&message(ACK_SYNC, generation)).await?;
                } else if window > 0 {
                    left -= 1;
                    if left == 0 {
                        left = window;
                        display.write_all(&message(ACK, &[])).await?;
                    }
                }
            }
        }
    }
}
