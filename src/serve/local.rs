//! One viewer on this host, without pages: what `cannery console JOB` opens.

use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use tokio::net::TcpListener;

use super::LOOK;
use super::audit::Audit;
use super::screen::{self, Passes, Port};
use super::session::{End, Sessions};
use crate::console::{Limits, Security};
use crate::outcome::Failure;
use crate::record::{JobDir, Jobs};
use crate::report;
use crate::settings::Settings;
use crate::ticket::{self, Grant, Mode};

/// Whoever is shown the file starts a viewer within this.
const TO_BEGIN: SignedDuration = SignedDuration::from_mins(10);
/// Keys that are made ahead: for all channels of one viewer, and once more for when it comes back at once.
const KEYS: usize = 16;
/// When it is over, the machine's side has this long to close.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// A screen that is waited for.
#[derive(Debug)]
pub struct Local {
    /// The file that starts a viewer, in virt-viewer's format. It holds a ticket for one viewer at a time.
    pub file: String,
}

/// Opens a job's screen at a port of this host that only it reaches, for as long as `use_it` takes or the machine is there.
///
/// # Errors
/// The job has no machine, or the host no port left; or what `use_it` says.
pub async fn local<F>(
    settings: &Settings,
    job: &JobDir,
    mode: Mode,
    by: String,
    use_it: impl FnOnce(Local) -> F,
) -> Result<(), Failure>
where
    F: Future<Output = Result<(), Failure>>,
{
    let failed = |e: std::io::Error| Failure::system(format!("cannot open a port for the viewer: {e}"));
    if screen::screen(job).is_none() {
        return Err(Failure::system(format!("job {} has no machine yet", job.key())));
    }
    let log = settings.console.as_ref().and_then(|c| c.audit_log.as_deref());
    let sessions = Arc::new(Sessions::new(1, Arc::new(Audit::beside(log)), Arc::default()));
    let jobs = Jobs::look(&settings.state_dir);
    let limits = Limits {
        sessions: 1,
        keys: KEYS,
        ..Limits::default()
    };
    let passes = Arc::new(Passes::default());
    let proxy = screen::proxy_within(limits, jobs, Arc::clone(&sessions), passes).map_err(failed)?;
    sessions.end_at(&proxy);
    let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
        .await
        .map_err(failed)?;
    let port = Port::Plain(listener.local_addr().map_err(failed)?.port());
    let now = Timestamp::now();
    let expires = now.saturating_add(TO_BEGIN).unwrap_or(Timestamp::MAX);
    let (text, id) = ticket::mint(job, &Grant::new(mode, now, expires, 1, by))?;
    let name = job
        .read()?
        .map(|record| report::line(&record.job, 60))
        .unwrap_or_default();
    let file = screen::viewer_file("127.0.0.1", port, &name, &text, None);
    let looking = async {
        while ticket::holds(job, &id).unwrap_or(false) {
            tokio::time::sleep(LOOK).await;
            sessions.look(Instant::now());
        }
        // A ticket that is over goes with the viewer who came by it.
        if Timestamp::now() >= expires && ticket::is_live(job).unwrap_or(false) {
            return Ok(());
        }
        Err(Failure::system(format!(
            "job {} was removed, or its ticket taken away",
            job.key()
        )))
    };
    let result = tokio::select! {
        result = use_it(Local { file }) => result,
        over = looking => over,
        never = Arc::clone(&proxy).listen(listener, Security::Plain) => match never {},
    };
    sessions.end_all(End::Stopping);
    // Gone already where the job is.
    let _ = ticket::revoke(job, &id);
    let begin = Instant::now();
    while !proxy.sessions().is_empty() && begin.elapsed() < LAST_WORDS {
        tokio::time::sleep(LAST_WORDS / 50).await;
    }
    result
}
