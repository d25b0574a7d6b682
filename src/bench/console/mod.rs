//! `cannery bench console`: what the SPICE proxy costs, and what it stands, against `socat` and against no proxy at all.
//!
//! ```text
//! viewer ──▶ proxy (a process of its own) ──▶ stub (a machine's screen that answers at once)
//!    ├─────▶ tunnel (socat) ────────────────▶   │
//!    └──────────────────────────────────────▶   │
//! abuse ──▶ proxy ──▶ qemu (a real one, which runs no guest, or one that changes its screen all the time)
//! ```
//!
//! With another proxy named, viewers and abuse go through that one, too.
//!
//! All of it happens on loopback and in one folder, with viewers, machines and harm of the bench's own.

mod abuse;
mod aside;
mod harm;
mod looks;
mod proxy;
mod qemu;
mod rival;
mod stub;
mod tunnel;
mod viewer;

use std::collections::HashSet;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use openssl::asn1::Asn1Time;
use openssl::ec::{EcGroup, EcKey};
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::PKey;
use openssl::x509::{X509, X509NameBuilder};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::task::JoinSet;

pub use proxy::serve;

use super::figure::{Figure, Goal, Peer};
use super::scratch::{cannot, in_folder};
use crate::console::Kind;
use crate::console::link::{self, Code};
use crate::outcome::Failure;
use crate::report::{JobLog, bytes};
use proxy::{Process, ticket};
use rival::Rival;
use stub::{PICTURE, Stub};
use tunnel::Tunnels;
use viewer::{Session, Way, greet, hello};

/// Of socat's throughput, and of its throughput with OpenSSL.
const PLAIN_GOAL: Goal = Goal::Share(0.9);
const TLS_GOAL: Goal = Goal::Share(0.8);
/// Beyond what a session without a proxy takes.
const CONNECT_GOAL: Goal = Goal::Beyond(Duration::from_millis(10));
/// Beyond what a key takes without a proxy.
const KEY_GOAL: Goal = Goal::Beyond(Duration::from_millis(1));
/// For a burst of sessions that begin at once.
const BURST_GOAL: Goal = Goal::Under(Duration::from_secs(1));
/// For those that follow, one by one: as many as come must be served.
const STEADY_GOAL: Goal = Goal::Under(STEADY_EVERY);
/// Why nothing is known about the tunnels.
const NOT_INSTALLED: &str = "socat is not installed";

/// Files of the folder.
const MACHINE: &str = "machine";
const CERTIFICATE: &str = "certificate.pem";
const KEY: &str = "key.pem";

/// Where the viewers of a real machine come from: an address of loopback that nobody abuses.
const VIEWER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
/// Channels of a session.
const CHANNELS: usize = 4;
/// Sessions that are opened by each side in a round, one after the other.
const CONNECTS: usize = 8;
/// Keys that are pressed on each side in a round.
const PRESSES: usize = 100;
/// After the burst, sessions come at this distance, for three seconds.
const STEADY_EVERY: Duration = Duration::from_millis(100);
const STEADY: usize = 30;
/// Connections without a ticket that the proxy takes (`Limits::waiting`), and some more.
const PLACES: usize = 540;
/// Who tries to come in when all places are taken.
const LATE: usize = 20;
/// Descriptors of this process beside those of sessions: attackers, sockets of the runtime.
const DESCRIPTORS: u64 = 2000;

/// What is to be measured.
#[derive(Debug)]
pub struct Plan {
    /// cannery itself.
    pub cannery: PathBuf,
    /// How many rounds count.
    pub runs: usize,
    /// Bytes of one transfer.
    pub size: u64,
    /// Sessions of the burst; twice as many are idle at once.
    pub sessions: usize,
    /// Connections that say nothing.
    pub connections: usize,
    /// Another proxy: its name, and the program that starts it.
    pub peer: Option<(String, PathBuf)>,
    /// A folder for all that is made; it must not be there yet.
    pub scratch: PathBuf,
}

/// Measures, and says on `log` how far it is. Whatever comes between, such as the end of `interrupted`, nothing is left behind.
///
/// # Errors
/// What failed, or that it was interrupted.
pub async fn measure(
    plan: &Plan,
    log: &JobLog,
    interrupted: impl Future<Output = ()>,
) -> Result<Vec<Figure>, Failure> {
    in_folder(&plan.scratch, interrupted, run(plan, log)).await
}

async fn run(plan: &Plan, log: &JobLog) -> Result<Vec<Figure>, Failure> {
    allow_descriptors(plan)?;
    certificate(&plan.scratch)?;
    let stub = Stub::start(&plan.scratch.join(MACHINE)).await?;
    let tunnels = Tunnels::start(&plan.scratch).await?;
    let keys = plan.sessions * (CHANNELS + 2);
    log.line(format!("Waiting for the proxy to make {keys} keys."));
    let mut proxy = Process::start(&plan.cannery, &plan.scratch, keys).await?;
    proxy.quiet().await?;
    let rival = match &plan.peer {
        Some((name, program)) => Some(Rival::start(name, program, &plan.scratch, stub.address).await?),
        None => None,
    };
    let mut bench = Bench {
        plan,
        log,
        direct: Way::plain(stub.address),
        plain: Way::plain(proxy.ports.plain),
        tls: Way::tls(proxy.ports.tls)?,
        tunnels,
        proxy,
        tickets: 0,
    };
    // First, since memory that was used before would hide what sessions take.
    let memory = bench.idle().await?;
    let mut figures = bench.rounds().await?;
    figures.extend(bench.burst().await?);
    figures.push(memory);
    figures.extend(bench.past_the_limit().await?);
    figures.extend(bench.harm().await?);
    if let Some(rival) = &rival {
        figures.extend(bench.rival(rival).await?);
    }
    Ok(figures)
}

struct Bench<'a> {
    plan: &'a Plan,
    log: &'a JobLog,
    direct: Way,
    plain: Way,
    tls: Way,
    tunnels: Option<Tunnels>,
    proxy: Process,
    /// How many were used.
    tickets: usize,
}

impl Bench<'_> {
    /// A session at a machine that nobody else looks at.
    async fn session(&mut self, way: &Way) -> Result<Session, Failure> {
        self.tickets += 1;
        Session::open(way, address(self.tickets), &ticket(self.tickets))
            .await
            .map_err(lost)
    }

    /// The memory of sessions in which nothing happens.
    async fn idle(&mut self) -> Result<Figure, Failure> {
        let count = self.plan.sessions * 2;
        self.log.line(format!("Opening {count} sessions."));
        let before = self.proxy.memory();
        let sessions = self.many(&self.plain.clone(), count).await?;
        self.proxy.full().await?;
        let state = self.proxy.state().await?;
        if state.sessions != count {
            return Err(Failure::system(format!(
                "the proxy has {} sessions instead of {count}",
                state.sessions
            )));
        }
        let mut figure = Figure::of_bytes(
            format!("memory of one of {count} idle sessions"),
            Peer::None,
            Goal::None,
        );
        if let Some(each) = share(before, self.proxy.memory(), count) {
            figure.counted(each);
        }
        drop(sessions);
        self.proxy.quiet().await?;
        Ok(figure)
    }

    /// Sessions that are opened one after the other.
    async fn many(&mut self, way: &Way, count: usize) -> Result<Vec<Session>, Failure> {
        let mut sessions = Vec::with_capacity(count);
        for _ in 0..count {
            sessions.push(self.session(way).await?);
        }
        Ok(sessions)
    }

    /// What is compared, in turns.
    async fn rounds(&mut self) -> Result<Vec<Figure>, Failure> {
        let peer = || match &self.tunnels {
            Some(_) => Peer::None,
            None => Peer::Missing(NOT_INSTALLED),
        };
        let mut plain = Figure::of_throughput("pictures, against socat", peer(), PLAIN_GOAL);
        let mut tls =
            Figure::of_throughput("pictures over TLS, against socat with OpenSSL", peer(), TLS_GOAL);
        let mut bare = Figure::of_throughput("pictures without a proxy", Peer::None, Goal::None);
        let mut connect = Figure::new(
            "a session's four channels, against none between",
            Peer::None,
            CONNECT_GOAL,
        );
        let mut key = Figure::new(
            "from a key to its picture, against none between",
            Peer::None,
            KEY_GOAL,
        );
        let pictures = u32::try_from((self.plan.size / bytes_of(PICTURE)).max(1)).unwrap_or(u32::MAX);
        let size = u64::from(pictures) * bytes_of(PICTURE);
        let ways = self.tunnels.as_ref().map(|tunnels| (tunnels.plain, tunnels.tls));
        for round in 0..=self.plan.runs {
            match round {
                0 => self.log.line("The first round does not count."),
                n => self.log.line(format!("Round {n} of {}.", self.plan.runs)),
            }
            let counts = round > 0;
            let took = self.fetch(&self.direct.clone(), pictures).await?;
            if counts {
                bare.carried(size, took);
            }
            for (figure, ours, theirs) in [
                (
                    &mut plain,
                    self.plain.clone(),
                    ways.map(|(plain, _)| Ok(Way::plain(plain))),
                ),
                (&mut tls, self.tls.clone(), ways.map(|(_, tls)| Way::tls(tls))),
            ] {
                let took = self.fetch(&ours, pictures).await?;
                if counts {
                    figure.carried(size, took);
                }
                if let Some(theirs) = theirs {
                    let took = self.fetch(&theirs?, pictures).await?;
                    if counts {
                        figure.peer_carried(size, took);
                    }
                }
            }
            self.connects(&mut connect, counts).await?;
            self.presses(&mut key, counts).await?;
        }
        let slowest = |figure: &Figure| figure.quantile(format!("{}: 99 of 100 within", figure.name), 0.99);
        let (connect_slowest, key_slowest) = (slowest(&connect), slowest(&key));
        Ok(vec![plain, tls, bare, connect, connect_slowest, key, key_slowest])
    }

    async fn fetch(&mut self, way: &Way, pictures: u32) -> Result<Duration, Failure> {
        let mut session = self.session(way).await?;
        session.fetch(pictures).await.map_err(lost)
    }

    async fn connects(&mut self, figure: &mut Figure, counts: bool) -> Result<(), Failure> {
        // Whoever makes keys takes time of the processor.
        self.proxy.quiet().await?;
        for _ in 0..CONNECTS {
            let direct = self.timed(&self.direct.clone()).await?;
            let ours = self.timed(&self.plain.clone()).await?;
            if counts {
                figure.took(ours);
                figure.peer_took(direct);
            }
        }
        Ok(())
    }

    async fn timed(&mut self, way: &Way) -> Result<Duration, Failure> {
        let begin = Instant::now();
        self.session(way).await?;
        Ok(begin.elapsed())
    }

    async fn presses(&mut self, figure: &mut Figure, counts: bool) -> Result<(), Failure> {
        let mut direct = self.session(&self.direct.clone()).await?;
        let mut ours = self.session(&self.plain.clone()).await?;
        self.proxy.full().await?;
        for _ in 0..PRESSES {
            let (theirs, took) = (
                direct.press().await.map_err(lost)?,
                ours.press().await.map_err(lost)?,
            );
            if counts {
                figure.took(took);
                figure.peer_took(theirs);
            }
        }
        Ok(())
    }

    /// Many at once, then one after the other.
    async fn burst(&mut self) -> Result<Vec<Figure>, Failure> {
        let count = self.plan.sessions;
        self.proxy.quiet().await?;
        self.log
            .line(format!("A burst of {count} sessions, and then ten a second."));
        let mut all = Figure::new(format!("a burst of {count} sessions"), Peer::None, BURST_GOAL);
        let mut steady = Figure::new("a session of ten a second that follow", Peer::None, STEADY_GOAL);
        let burst = self.burst_over(&self.plain.clone()).await?;
        let refused = Figure::of_count(
            format!("sessions of the burst that were refused, of {count}"),
            burst.refused,
            Goal::Zero,
        );
        all.took(burst.all);
        burst.steady.iter().for_each(|took| steady.took(*took));
        let twice = Figure::of_count(
            format!("keys that were used twice, of {}", burst.keys.len()),
            burst.twice(),
            Goal::Zero,
        );
        self.proxy.quiet().await?;
        // Without a goal: a handshake costs viewers as much as the proxy, and all share these processors.
        let secured = self.burst_over(&self.tls.clone()).await?;
        let mut over_tls = Figure::new(
            format!("a burst of {count} sessions over TLS"),
            Peer::None,
            Goal::None,
        );
        over_tls.took(secured.all);
        let refused_tls = Figure::of_count(
            format!("sessions of the burst over TLS that were refused, of {count}"),
            secured.refused,
            Goal::Zero,
        );
        Ok(vec![all, refused, steady, twice, over_tls, refused_tls])
    }

    async fn burst_over(&mut self, way: &Way) -> Result<Burst, Failure> {
        let count = self.plan.sessions;
        let mut keys = Vec::new();
        let mut open = Vec::new();
        let mut refused = 0;
        let mut coming = JoinSet::new();
        let begin = Instant::now();
        for _ in 0..count {
            self.tickets += 1;
            let (way, number) = (way.clone(), self.tickets);
            coming.spawn(async move { Session::open(&way, address(number), &ticket(number)).await });
        }
        while let Some(opened) = coming.join_next().await {
            match opened.map_err(|e| lost(io::Error::other(e)))? {
                Ok(session) => {
                    keys.extend(&session.keys);
                    open.push(session);
                }
                Err(_) => refused += 1,
            }
        }
        let all = begin.elapsed();
        let mut steady = Vec::new();
        let mut clock = tokio::time::interval(STEADY_EVERY);
        for _ in 0..STEADY.min(count) {
            clock.tick().await;
            let begin = Instant::now();
            let session = self.session(way).await?;
            steady.push(begin.elapsed());
            keys.extend(&session.keys);
            open.push(session);
        }
        Ok(Burst {
            all,
            refused,
            steady,
            keys,
        })
    }

    /// All places are taken: who comes then, and who is there already.
    async fn past_the_limit(&mut self) -> Result<Vec<Figure>, Failure> {
        self.proxy.quiet().await?;
        self.log.line("Taking all places at the proxy's door.");
        let mut inside = self.session(&self.plain.clone()).await?;
        self.proxy.full().await?;
        let held = abuse::fill(self.plain.to, PLACES).await.map_err(lost)?;
        let mut untold = 0;
        for _ in 0..LATE {
            let mut wire = self.plain.connect(VIEWER).await.map_err(lost)?;
            let told = greet(&mut wire, &hello(0, Kind::Main)).await;
            untold += usize::from(!matches!(told, Ok(Err(Code::Error))));
        }
        let pictures = u32::try_from(self.plan.size / bytes_of(PICTURE)).unwrap_or(u32::MAX);
        // It fails with the first picture that is missing.
        let lost_something = usize::from(inside.fetch(pictures).await.is_err());
        drop(held);
        Ok(vec![
            Figure::of_count(
                format!("past the limit: viewers that were not told so, of {LATE}"),
                untold,
                Goal::Zero,
            ),
            Figure::of_count(
                format!(
                    "past the limit: sessions inside that lost something of {}",
                    bytes(self.plan.size)
                ),
                lost_something,
                Goal::Zero,
            ),
        ])
    }
}

/// Many viewers, each with an address of its own.
fn address(number: usize) -> Ipv4Addr {
    Ipv4Addr::new(127, 0, 1, u8::try_from(number % 250).unwrap_or_default() + 1)
}

/// What came of a burst.
struct Burst {
    /// From the first session's beginning until all were open.
    all: Duration,
    /// How many were not opened.
    refused: usize,
    /// How long each took that followed.
    steady: Vec<Duration>,
    /// The keys that all of them were shown.
    keys: Vec<[u8; link::KEY]>,
}

impl Burst {
    /// How many keys were shown before.
    fn twice(&self) -> usize {
        let different: HashSet<_> = self.keys.iter().collect();
        self.keys.len() - different.len()
    }
}

/// What each of `count` added to a process's memory.
fn share(before: Option<u64>, after: Option<u64>, count: usize) -> Option<u64> {
    let count = u64::try_from(count).ok()?;
    after?.saturating_sub(before?).checked_div(count)
}

/// As many descriptors as idle sessions need: four sockets on either side of the proxy. Programs that are started inherit it.
fn allow_descriptors(plan: &Plan) -> Result<(), Failure> {
    let sessions = u64::try_from(plan.sessions * 2 * CHANNELS * 2).unwrap_or(u64::MAX);
    let needed = sessions.saturating_add(DESCRIPTORS);
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= needed) {
        return Ok(());
    }
    if limit.maximum.is_some_and(|most| most < needed) {
        return Err(
            Failure::system(format!("the bench needs {needed} file descriptors"))
                .hint(format!("Allow them: ulimit -n {needed}")),
        );
    }
    let wanted = Rlimit {
        current: Some(needed),
        ..limit
    };
    setrlimit(Resource::Nofile, wanted)
        .map_err(|e| Failure::system(format!("cannot allow {needed} file descriptors: {e}")))
}

/// A certificate for this run, and its key.
fn certificate(folder: &Path) -> Result<(), Failure> {
    let (certificate, key) =
        make_certificate().map_err(|e| Failure::system(format!("cannot make a certificate: {e}")))?;
    for (name, content) in [(CERTIFICATE, certificate), (KEY, key)] {
        let path = folder.join(name);
        std::fs::write(&path, content).map_err(|e| cannot("write", &path, &e))?;
    }
    Ok(())
}

fn make_certificate() -> Result<(Vec<u8>, Vec<u8>), ErrorStack> {
    let curve = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
    let key = PKey::from_ec_key(EcKey::generate(&curve)?)?;
    let mut name = X509NameBuilder::new()?;
    name.append_entry_by_text("CN", "localhost")?;
    let name = name.build();
    let mut certificate = X509::builder()?;
    certificate.set_version(2)?;
    certificate.set_subject_name(&name)?;
    certificate.set_issuer_name(&name)?;
    certificate.set_pubkey(&key)?;
    certificate.set_not_before(&*Asn1Time::days_from_now(0)?)?;
    certificate.set_not_after(&*Asn1Time::days_from_now(1)?)?;
    certificate.sign(&key, MessageDigest::sha256())?;
    Ok((certificate.build().to_pem()?, key.private_key_to_pem_pkcs8()?))
}

fn bytes_of(size: usize) -> u64 {
    u64::try_from(size).unwrap_or(u64::MAX)
}

fn lost(error: io::Error) -> Failure {
    Failure::system(format!("a connection of the bench failed: {error}"))
}
