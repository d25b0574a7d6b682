//! Another proxy, between the same viewers and the same machines, over TLS: that is what all of them speak.
//!
//! Whoever wants it measured names a program, which becomes the proxy with the addresses that it is given.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use super::abuse::Abuse;
use super::harm::{timed, watched};
use super::proxy::{memory, real_ticket};
use super::qemu::Qemu;
use super::tunnel::free;
use super::viewer::{Mute, Session, Way};
use super::{Bench, CERTIFICATE, CONNECTS, KEY, PICTURE, PRESSES, VIEWER, bytes_of, lost, share};
use crate::bench::figure::{Figure, Goal, Peer};
use crate::outcome::Failure;

/// How long it may take to listen, with whatever else it starts, and how often it is tried.
const START: Duration = Duration::from_secs(30);
const TRY_EVERY: Duration = Duration::from_millis(50);
/// For it to be rid of viewers that are gone. It cannot be asked.
const REST: Duration = Duration::from_millis(500);

/// It ends with this value.
pub(super) struct Rival {
    child: Child,
    name: String,
    way: Way,
    /// Where it looks for the real machine's screen.
    screen: SocketAddr,
}

impl Rival {
    /// Starts `program LISTEN MACHINE SCREEN CERTIFICATE KEY`, and waits until it listens.
    pub(super) async fn start(
        name: &str,
        program: &Path,
        folder: &Path,
        machine: SocketAddr,
    ) -> Result<Self, Failure> {
        let (listen, screen) = (free().await?, free().await?);
        let mut child = Command::new(program)
            .args([listen, machine, screen].map(|address| address.to_string()))
            .args([CERTIFICATE, KEY].map(|file| folder.join(file)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| Failure::system(format!("cannot start {}: {e}", program.display())))?;
        let listening = async {
            while TcpStream::connect(listen).await.is_err() {
                tokio::time::sleep(TRY_EVERY).await;
            }
        };
        tokio::select! {
            _ = child.wait() => Err(Failure::system(format!("{} ended as soon as it was started", program.display()))),
            listening = tokio::time::timeout(START, listening) => match listening {
                Ok(()) => Ok(Self { child, name: name.to_owned(), way: Way::tls(listen)?, screen }),
                Err(_) => Err(Failure::system(format!("{} does not listen at {listen}", program.display()))),
            },
        }
    }
}

impl Bench<'_> {
    /// What is measured of it, in turns with the same of ours.
    pub(super) async fn rival(&mut self, rival: &Rival) -> Result<Vec<Figure>, Failure> {
        let name = rival.name.clone();
        self.log.line(format!("Measuring {name}."));
        // First, for the same reason as ours.
        let mut figures = vec![self.idle_beside(rival).await?];
        figures.extend(self.rounds_beside(rival).await?);
        figures.extend(self.bursts_beside(rival).await?);
        figures.extend(self.harm_beside(rival).await?);
        Ok(figures)
    }

    async fn idle_beside(&mut self, rival: &Rival) -> Result<Figure, Failure> {
        let count = self.plan.sessions * 2;
        let name = format!(
            "memory of one of {count} idle sessions over TLS, against {}",
            rival.name
        );
        let mut figure = Figure::of_bytes(name, Peer::None, Goal::None);
        self.proxy.quiet().await?;
        let before = self.proxy.memory();
        let ours = self.many(&self.tls.clone(), count).await?;
        self.proxy.full().await?;
        if let Some(each) = share(before, self.proxy.memory(), count) {
            figure.counted(each);
        }
        drop(ours);
        let before = memory(&rival.child);
        let theirs = self.many(&rival.way, count).await?;
        if let Some(each) = share(before, memory(&rival.child), count) {
            figure.peer_counted(each);
        }
        drop(theirs);
        self.rest().await?;
        Ok(figure)
    }

    async fn rounds_beside(&mut self, rival: &Rival) -> Result<[Figure; 3], Failure> {
        let against = |what: &str| format!("{what} over TLS, against {}", rival.name);
        let mut pictures = Figure::of_throughput(against("pictures"), Peer::None, Goal::None);
        let mut connect = Figure::new(against("a session's four channels"), Peer::None, Goal::None);
        let mut key = Figure::new(against("from a key to its picture"), Peer::None, Goal::None);
        let count = u32::try_from((self.plan.size / bytes_of(PICTURE)).max(1)).unwrap_or(u32::MAX);
        let size = u64::from(count) * bytes_of(PICTURE);
        let (tls, theirs) = (self.tls.clone(), rival.way.clone());
        for round in 0..=self.plan.runs {
            let counts = round > 0;
            let took = (self.fetch(&tls, count).await?, self.fetch(&theirs, count).await?);
            if counts {
                pictures.carried(size, took.0);
                pictures.peer_carried(size, took.1);
            }
            self.rest().await?;
            for _ in 0..CONNECTS {
                let took = (self.timed(&theirs).await?, self.timed(&tls).await?);
                if counts {
                    connect.peer_took(took.0);
                    connect.took(took.1);
                }
            }
            let (mut other, mut ours) = (self.session(&theirs).await?, self.session(&tls).await?);
            self.proxy.full().await?;
            for _ in 0..PRESSES {
                let took = (
                    other.press().await.map_err(lost)?,
                    ours.press().await.map_err(lost)?,
                );
                if counts {
                    key.peer_took(took.0);
                    key.took(took.1);
                }
            }
        }
        Ok([pictures, connect, key])
    }

    async fn bursts_beside(&mut self, rival: &Rival) -> Result<[Figure; 4], Failure> {
        self.rest().await?;
        let ours = self.burst_over(&self.tls.clone()).await?;
        self.rest().await?;
        let theirs = self.burst_over(&rival.way).await?;
        let count = self.plan.sessions;
        let against = |what: &str| format!("{what} over TLS, against {}", rival.name);
        let mut all = Figure::new(
            against(&format!("a burst of {count} sessions")),
            Peer::None,
            Goal::None,
        );
        all.took(ours.all);
        all.peer_took(theirs.all);
        let mut refused = Figure::of_count(
            against("sessions of the burst that were refused"),
            ours.refused,
            Goal::Zero,
        );
        refused.peer_counted(u64::try_from(theirs.refused).unwrap_or(u64::MAX));
        let mut steady = Figure::new(
            against("a session of ten a second that follow"),
            Peer::None,
            Goal::None,
        );
        ours.steady.iter().for_each(|took| steady.took(*took));
        theirs.steady.iter().for_each(|took| steady.peer_took(*took));
        let mut twice = Figure::of_count(against("keys that were used twice"), ours.twice(), Goal::Zero);
        twice.peer_counted(u64::try_from(theirs.twice()).unwrap_or(u64::MAX));
        Ok([all, refused, steady, twice])
    }

    async fn harm_beside(&mut self, rival: &Rival) -> Result<Vec<Figure>, Failure> {
        let (ours, theirs) = (self.tls.clone(), rival.way.clone());
        let mut figures = Vec::new();
        for what in [
            Abuse::HalfOpen(self.plan.connections),
            Abuse::BadTickets(self.plan.sessions * 4),
            Abuse::SlowTls(self.plan.sessions * 3),
        ] {
            self.log.line(format!("Measuring {} beside {what}.", rival.name));
            let mut figure = Figure::new(
                format!("a session over TLS beside {what}, against {}", rival.name),
                Peer::None,
                Goal::None,
            );
            self.rest().await?;
            for took in self.beside(&ours, what).await? {
                figure.took(took);
            }
            self.rest().await?;
            // That ours stands it is measured; another may not.
            match self.beside(&theirs, what).await {
                Ok(times) => times.into_iter().for_each(|took| figure.peer_took(took)),
                Err(why) => self
                    .log
                    .line(format!("{} failed beside {what}: {why}", rival.name)),
            }
            figures.push(figure);
        }
        figures.extend(self.mute_beside(rival).await?);
        Ok(figures)
    }

    /// A mute viewer that is taken over, once: it may take half a minute.
    async fn mute_beside(&mut self, rival: &Rival) -> Result<Option<Figure>, Failure> {
        let folder = &self.plan.scratch;
        let (Some(here), Some(there)) = (
            Qemu::start(folder).await?,
            Qemu::start_at(folder, rival.screen).await?,
        ) else {
            return Ok(None);
        };
        let mut figure = Figure::new(
            format!(
                "QEMU's slowest answer while a mute viewer is taken over, against {}",
                rival.name
            ),
            Peer::None,
            Goal::None,
        );
        self.rest().await?;
        for (way, qemu, ours) in [(&self.tls, here, true), (&rival.way, there, false)] {
            let [mute, next] = ["mute", "next"].map(|what| real_ticket(&format!("{what}-beside")));
            let _mute = Mute::open(way, VIEWER, &mute).await.map_err(lost)?;
            // Whether it gets in is another matter.
            let coming = async { Ok(timed(Session::open(way, VIEWER, &next)).await.0) };
            match watched(Some(&qemu), coming).await? {
                (Some(slowest), _) if ours => figure.took(slowest),
                (Some(slowest), _) => figure.peer_took(slowest),
                (None, _) => {}
            }
        }
        Ok(Some(figure))
    }

    /// Both have nobody, and nothing to do.
    async fn rest(&mut self) -> Result<(), Failure> {
        tokio::time::sleep(REST).await;
        self.proxy.quiet().await
    }
}
