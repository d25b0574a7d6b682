//! `cannery serve`: pages on which people see and enter the machines of jobs.
//!
//! ```text
//! browser ──TLS──▶ door ─▶ site ─▶ session ─▶ terminal ──SSH──▶ guest
//!                   │       │        │     └▶ serial   ──▶ serial.log
//!                 limit    api     ticket (a file in the job's folder)
//! ```
//!
//! | part | what it does |
//! |---|---|
//! | `door` | takes connections: TLS, deadlines, bounds on strangers |
//! | `site` | which request may have what: host, origin, ticket, cookie |
//! | `refused` | what those read who get nothing |
//! | `session` | who is in, until when; ends what a ticket opened when the ticket or the machine goes |
//! | `terminal`, `shell` | a shell in the guest over a WebSocket |
//! | `serial` | the serial log over another |
//! | `screen` | the SPICE proxy (`console`) with our tickets: over WebSockets, and at a port of its own for viewers |
//! | `lease` | who has a screen, for other processes of this host |
//! | `local` | the same for one viewer on this host, without the rest |
//! | `login`, `gitlab` | who somebody is, and whether they are a Developer of the job's project |
//! | `api` | sessions listed and ended, tickets minted, for programs |
//! | `audit`, `count` | what happened, for people and for Prometheus |
//!
//! It holds nothing that a job needs: jobs run the same while it is stopped, and what it knows is gone with it.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::console::{Certificate, Proxy};
use crate::outcome::Failure;
use crate::record::{JobKey, Jobs, Served};
use crate::secret::Secret;
use crate::settings::{ConsoleSettings, Settings};
use crate::ticket::{Grant, TicketId};

mod api;
mod audit;
mod count;
mod door;
mod gitlab;
mod lease;
mod limit;
mod local;
mod login;
mod refused;
mod screen;
mod serial;
mod session;
mod shell;
mod site;
mod terminal;

pub use local::{Local, local};

use audit::Audit;
use count::Counts;
use gitlab::GitLab;
use limit::{Connections, Guesses};
use screen::Passes;
use session::{End, Sessions};
use terminal::Screens;

/// How soon a session ends whose ticket or machine has gone.
const LOOK: Duration = Duration::from_millis(250);
/// A secret of the API that is shorter is guessed sooner than a ticket.
const SHORTEST_TOKEN: usize = 32;

/// What all requests share.
#[derive(Debug)]
struct House {
    settings: Settings,
    console: ConsoleSettings,
    jobs: Jobs,
    sessions: Arc<Sessions>,
    passes: Arc<Passes>,
    proxy: Arc<Proxy>,
    screens: Screens,
    guesses: Guesses,
    connections: Arc<Connections>,
    audit: Arc<Audit>,
    counts: Arc<Counts>,
    api_token: Option<Secret>,
    gitlab: Option<GitLab>,
}

impl House {
    /// What a console with these settings begins with.
    fn new(settings: Settings, console: ConsoleSettings) -> Result<Self, Failure> {
        let audit = Audit::open(console.audit_log.as_deref())
            .map_err(|e| Failure::system(format!("cannot write console.audit_log: {e}")))?;
        let (audit, counts) = (Arc::new(audit), Arc::new(Counts::default()));
        let jobs = Jobs::open(&settings.state_dir)?;
        let sessions = Arc::new(Sessions::new(
            console.max_sessions,
            Arc::clone(&audit),
            Arc::clone(&counts),
        ));
        let passes = Arc::new(Passes::default());
        let proxy = screen::proxy(
            jobs.clone(),
            Arc::clone(&sessions),
            Arc::clone(&passes),
            console.max_sessions,
        )
        .map_err(|e| Failure::system(format!("cannot start a thread: {e}")))?;
        sessions.end_at(&proxy);
        Ok(House {
            api_token: api_token(&console)?,
            gitlab: gitlab(&console)?,
            jobs,
            sessions,
            passes,
            proxy,
            screens: Screens::default(),
            guesses: Guesses::default(),
            connections: Arc::default(),
            settings,
            console,
            audit,
            counts,
        })
    }
}

/// Serves until `stop` ends. For each word of `reload` the certificate's files are read again. `ready` is told once the port is open.
///
/// # Errors
/// The settings have no console, or name files that cannot be used, or the port is taken.
pub async fn serve(
    settings: Settings,
    ready: impl FnOnce(std::net::SocketAddr),
    mut reload: mpsc::Receiver<()>,
    stop: impl Future<Output = ()>,
) -> Result<(), Failure> {
    let Some(console) = settings.console.clone() else {
        return Err(
            Failure::system("the settings have no console").hint("docs/consoles.md shows what it needs")
        );
    };
    let certificate = Certificate::load(&console.certificate, &console.key).map_err(|e| {
        Failure::system(e.to_string()).hint("console.certificate and console.key name PEM files")
    })?;
    let certificate = Arc::new(certificate);
    allow_descriptors();
    let state_dir = settings.state_dir.clone();
    let house = Arc::new(House::new(settings, console)?);
    let door = door::Door::open(Arc::clone(&house), Arc::clone(&certificate)).await?;
    let spice = door::Spice::open(&house, Arc::clone(&certificate)).await?;
    // Job logs name pages that are there.
    let _served = Served::begin(&state_dir)
        .map_err(|e| Failure::system(format!("cannot lock in {}: {e}", state_dir.display())))?;
    ready(door.address());
    let looking = async {
        loop {
            tokio::time::sleep(LOOK).await;
            house.sessions.look(Instant::now());
        }
    };
    let reloading = async {
        while reload.recv().await.is_some() {
            match certificate.reload() {
                Ok(()) => tracing::info!("the certificate was read again"),
                Err(e) => tracing::error!("the old certificate stays in use: {e}"),
            }
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = stop => {}
        () = door.serve() => {}
        () = spice.serve(&house) => {}
        () = looking => {}
        () = reloading => {}
    }
    house.sessions.end_all(End::Stopping);
    door.close().await;
    Ok(())
}

/// Notes in the console's audit log that somebody on this host has minted a ticket.
pub fn note_ticket(console: &ConsoleSettings, job: &JobKey, ticket: &TicketId, grant: &Grant) {
    Audit::beside(console.audit_log.as_deref()).note(&audit::Event::TicketMinted {
        job,
        ticket: ticket.short(),
        minted_by: &grant.by,
        mode: grant.mode,
        from: None,
    });
}

/// Each connection is a descriptor, and shells give their programs fewer than the system lets them have.
fn allow_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let all = Rlimit {
        current: maximum,
        maximum,
    };
    if let Err(e) = setrlimit(Resource::Nofile, all) {
        tracing::warn!("the number of open files stays limited: {e}");
    }
}

/// The GitLab that people sign in with, where there is one.
fn gitlab(console: &ConsoleSettings) -> Result<Option<GitLab>, Failure> {
    let gitlab = console
        .gitlab
        .clone()
        .map(|gitlab| GitLab::new(gitlab, &console.origin()));
    gitlab.transpose().map_err(|why| {
        Failure::system(why)
            .hint("Correct console.gitlab_secret_file or console.gitlab_ca_file in the settings")
    })
}

/// The API's secret, where the settings name a file that holds one.
fn api_token(console: &ConsoleSettings) -> Result<Option<Secret>, Failure> {
    let Some(path) = &console.api_token_file else {
        return Ok(None);
    };
    let text = std::fs::read_to_string(path).map_err(|e| {
        Failure::system(format!(
            "cannot read console.api_token_file {}: {e}",
            path.display()
        ))
    })?;
    let token = text.trim();
    if token.len() < SHORTEST_TOKEN || !token.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(Failure::system(format!(
            "console.api_token_file {} does not hold {SHORTEST_TOKEN} or more plain characters in one line",
            path.display()
        ))
        .hint("`openssl rand -hex 32` makes such a secret"));
    }
    Ok(Some(Secret::new(token)))
}

#[cfg(test)]
mod tests;
