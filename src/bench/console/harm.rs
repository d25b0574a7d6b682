//! What those who mean harm do to others: to a usual viewer's wait, and to the control connection of a machine.

use std::time::{Duration, Instant};

use super::abuse::{self, Abuse};
use super::proxy::real_ticket;
use super::qemu::Qemu;
use super::viewer::{Mute, Session, Way};
use super::{Bench, VIEWER, lost};
use crate::bench::figure::{Figure, Goal, Peer};
use crate::outcome::Failure;

/// For an answer of QEMU's control connection, whatever viewers do.
const CONTROL_GOAL: Goal = Goal::Under(Duration::from_millis(100));
/// Sessions that a viewer opens while others abuse the proxy: some, and no more than keys allow.
const BESIDE_LEAST: usize = 5;
const BESIDE_MOST: usize = 30;
/// For how long a viewer comes again that finds no place, and how often: longer than a place is held by who says nothing.
const COMES_AGAIN: Duration = Duration::from_secs(30);
const COME_AGAIN: Duration = Duration::from_millis(20);
/// How often a real machine is taken over: below what the proxy allows in a minute (`Limits::takeovers`).
const TAKEOVERS: usize = 3;

impl Bench<'_> {
    /// Each kind of harm, beside a proxy that has none: how long a usual viewer waits, and how long QEMU does.
    pub(super) async fn harm(&mut self) -> Result<Vec<Figure>, Failure> {
        let qemu = Qemu::start(&self.plan.scratch).await?;
        if qemu.is_none() {
            self.log
                .line("There is no qemu-system-x86_64 with SPICE: its control connection is not measured.");
        }
        let mut figures = Vec::new();
        for (what, way) in [
            (Abuse::HalfOpen(self.plan.connections), self.plain.clone()),
            (Abuse::BadTickets(self.plan.sessions * 4), self.plain.clone()),
            (Abuse::SlowTls(self.plan.sessions * 3), self.tls.clone()),
        ] {
            self.log.line(format!("Measuring a session beside {what}."));
            self.proxy.quiet().await?;
            // Somebody looks at the real machine all the time.
            let _inside = match qemu {
                Some(_) => Some(self.at_real().await?),
                None => None,
            };
            self.proxy.full().await?;
            let quiet = watched(qemu.as_ref(), self.some(&way)).await?;
            let beside = watched(qemu.as_ref(), self.beside(&way, what)).await?;
            let over = if way.tls.is_some() { " over TLS" } else { "" };
            let mut session = Figure::new(
                format!("a session{over} beside {what}, against a quiet proxy"),
                Peer::None,
                Goal::None,
            );
            quiet.1.into_iter().for_each(|took| session.peer_took(took));
            beside.1.into_iter().for_each(|took| session.took(took));
            let mut control = Figure::new(
                format!("QEMU's slowest answer beside {what}, against a quiet proxy"),
                Peer::None,
                CONTROL_GOAL,
            );
            if let (Some(quiet), Some(beside)) = (quiet.0, beside.0) {
                control.peer_took(quiet);
                control.took(beside);
            }
            figures.extend([session, control]);
        }
        if let Some(qemu) = qemu {
            figures.extend(self.mute(&qemu).await?);
            drop(qemu);
            figures.extend(self.looks().await?);
        }
        Ok(figures)
    }

    /// A viewer at the real machine, where nobody is.
    async fn at_real(&self) -> Result<Session, Failure> {
        Session::open(&self.plain, VIEWER, &real_ticket("inside"))
            .await
            .map_err(lost)
    }

    /// Sessions of a usual viewer.
    pub(super) async fn some(&mut self, way: &Way) -> Result<Vec<Duration>, Failure> {
        let mut took = Vec::new();
        for _ in 0..BESIDE_LEAST {
            took.push(self.timed(way).await?);
        }
        Ok(took)
    }

    /// The same while there is harm.
    pub(super) async fn beside(&mut self, way: &Way, what: Abuse) -> Result<Vec<Duration>, Failure> {
        let begun = abuse::begin(what, way)?;
        let mut took = Vec::new();
        while took.len() < BESIDE_LEAST || !(begun.is_done() || took.len() >= BESIDE_MOST) {
            took.push(self.timed_until_in(way).await?);
        }
        drop(begun.done().await?.map_err(lost)?);
        Ok(took)
    }

    /// The time until a viewer is in that comes again when it is refused: there may be no place at the door.
    async fn timed_until_in(&mut self, way: &Way) -> Result<Duration, Failure> {
        let begin = Instant::now();
        loop {
            match self.timed(way).await {
                Ok(_) => return Ok(begin.elapsed()),
                Err(refused) if begin.elapsed() > COMES_AGAIN => return Err(refused),
                Err(_) => tokio::time::sleep(COME_AGAIN).await,
            }
        }
    }

    /// What a viewer that never begins its screen does to a real machine, when the next viewer takes it over.
    async fn mute(&mut self, qemu: &Qemu) -> Result<[Figure; 2], Failure> {
        self.log
            .line("Measuring QEMU's control connection while viewers take its screen over.");
        let mut control = Figure::new(
            "QEMU's slowest answer while a mute viewer is taken over, against any viewer's coming",
            Peer::None,
            CONTROL_GOAL,
        );
        let mut session = Figure::new(
            "a session at a machine that a mute viewer has, against one that nobody has",
            Peer::None,
            Goal::None,
        );
        let way = self.plain.clone();
        for number in 0..TAKEOVERS {
            self.proxy.quiet().await?;
            let [alone, mute, next] =
                ["alone", "mute", "next"].map(|what| real_ticket(&format!("{what}-{number}")));
            let (answer, came) = qemu.slowest(timed(Session::open(&way, VIEWER, &alone))).await?;
            drop(came.1.map_err(lost)?);
            control.peer_took(answer);
            session.peer_took(came.0);
            self.proxy.quiet().await?;
            let _mute = Mute::open(&way, VIEWER, &mute).await.map_err(lost)?;
            let (answer, came) = qemu.slowest(timed(Session::open(&way, VIEWER, &next))).await?;
            drop(came.1.map_err(lost)?);
            control.took(answer);
            session.took(came.0);
        }
        Ok([control, session])
    }
}

/// How long it takes, and what comes of it.
pub(super) async fn timed<T>(work: impl Future<Output = T>) -> (Duration, T) {
    let begin = Instant::now();
    let done = work.await;
    (begin.elapsed(), done)
}

/// What comes of some work, and the slowest answer of a machine's control connection meanwhile.
pub(super) async fn watched<T>(
    qemu: Option<&Qemu>,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<(Option<Duration>, T), Failure> {
    match qemu {
        Some(qemu) => {
            let (slowest, done) = qemu.slowest(work).await?;
            Ok((Some(slowest), done?))
        }
        None => Ok((None, work.await?)),
    }
}
