//! A GitLab that knows runners, jobs, logs, artifacts and git repositories, and nothing else.
//!
//! Jobs are handed out in the order in which they were enqueued. The real runner speaks HTTP to it
//! ([`http`]), the runner double calls the [`Desk`] behind that directly.

mod git;
mod http;

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

pub use self::git::Repository;
use super::job::Job;
use super::log;

/// The token that a runner must show.
pub const RUNNER_TOKEN: &str = "glrt-test-token";

/// A coordinator on an address of this host; ends with the process.
#[derive(Debug)]
pub struct Coordinator {
    url: String,
    desk: Arc<Desk>,
    repositories: tempfile::TempDir,
}

impl Coordinator {
    /// Listens on loopback, on a port of the system's choice.
    pub fn start() -> Self {
        Self::listen(IpAddr::V4(Ipv4Addr::LOCALHOST), 0, "127.0.0.1")
    }

    /// Listens on this address and port (0: any) and calls itself `name`: an address or a host name that means this
    /// host wherever the URL is used, in guests too.
    pub fn listen(address: IpAddr, port: u16, name: &str) -> Self {
        let listener = std::net::TcpListener::bind(SocketAddr::new(address, port)).unwrap_or_else(|error| {
            panic!("the coordinator cannot listen on {address} port {port}: {error}")
        });
        let port = listener
            .local_addr()
            .expect("a listening socket has an address")
            .port();
        let desk = Arc::new(Desk::default());
        let repositories = tempfile::tempdir().expect("a folder for repositories");
        let router = http::router(Arc::clone(&desk), repositories.path().to_owned());
        listener
            .set_nonblocking(true)
            .expect("a socket can be non-blocking");
        thread::spawn(move || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime for the coordinator")
                .block_on(async move {
                    let listener =
                        tokio::net::TcpListener::from_std(listener).expect("the listener joins the runtime");
                    axum::serve(listener, router)
                        .await
                        .expect("the coordinator serves");
                });
        });
        Self {
            url: format!("http://{name}:{port}"),
            desk,
            repositories,
        }
    }

    /// What a runner's `url` is set to.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A new repository `path` (e.g. `grp/demo`) with these files (name, content) on branch `main`.
    pub fn repository(&self, path: &str, files: &[(&str, &str)]) -> Repository {
        Repository::make(self.repositories.path(), &self.url, path, files)
    }

    /// Puts a job into the queue.
    pub fn enqueue(&self, job: &Job) -> Handle {
        let mut table = self.desk.table();
        let id = job.wanted_id().unwrap_or(table.last_id + 1);
        table.last_id = table.last_id.max(id);
        let token = format!("job-token-{id}");
        let payload = job.payload(id, &token, &self.url);
        let replaced = table.jobs.insert(id, Entry::new(payload, &token));
        assert!(replaced.is_none(), "job {id} was enqueued before");
        table.queue.push_back(id);
        drop(table);
        Handle {
            desk: Arc::clone(&self.desk),
            id,
            token,
            name: job.name().to_owned(),
        }
    }

    /// All jobs that were enqueued, in the order of their numbers.
    pub fn jobs(&self) -> Vec<Handle> {
        let table = self.desk.table();
        let handle = |(id, entry): (&u64, &Entry)| Handle {
            desk: Arc::clone(&self.desk),
            id: *id,
            token: entry.token.clone(),
            name: entry.payload["job_info"]["name"]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
        };
        table.jobs.iter().map(handle).collect()
    }

    pub(super) fn desk(&self) -> Arc<Desk> {
        Arc::clone(&self.desk)
    }
}

/// How a job ended, in the words that the runner sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Whether it succeeded.
    pub success: bool,
    /// `script_failure`, `runner_system_failure`, `job_execution_timeout`, …; empty for a success.
    pub failure_reason: String,
    /// The script's exit code, where the runner knows it.
    pub exit_code: Option<i64>,
}

/// What GitLab wants to happen to a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// It may run.
    Run,
    /// Its script is to be stopped; `after_script` and uploads still run.
    CancelGracefully,
    /// Everything is to be stopped; only the clean-up runs.
    CancelAtOnce,
}

impl Wish {
    /// The value of the header `Job-Status`.
    pub(super) fn header(self) -> &'static str {
        match self {
            Self::Run => "running",
            Self::CancelGracefully => "canceling",
            Self::CancelAtOnce => "canceled",
        }
    }
}

/// A job that was enqueued.
#[derive(Debug, Clone)]
pub struct Handle {
    desk: Arc<Desk>,
    id: u64,
    token: String,
    name: String,
}

impl Handle {
    /// The job's number.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The job's token.
    pub fn token(&self) -> &str {
        &self.token
    }

    /// The job's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits until the job has ended; fails the test with the job's log if it does not.
    pub fn wait(&self, deadline: Duration) -> Outcome {
        self.wait_for(deadline, "to end", |entry| entry.outcome.clone())
    }

    /// Waits until this text stands in the job's log.
    pub fn wait_log(&self, text: &str, deadline: Duration) {
        self.wait_for(deadline, &format!("to print {text:?}"), |entry| {
            log::readable(&entry.log).contains(text).then_some(())
        });
    }

    /// How the job ended, if it has.
    pub fn outcome(&self) -> Option<Outcome> {
        self.desk.table().jobs[&self.id].outcome.clone()
    }

    /// How long it waited in the queue, and how long it took from then to its end; as far as it came.
    pub fn times(&self) -> (Option<Duration>, Option<Duration>) {
        let table = self.desk.table();
        let entry = &table.jobs[&self.id];
        let waited = entry.taken.map(|taken| taken - entry.enqueued);
        let took = entry.taken.zip(entry.ended).map(|(taken, ended)| ended - taken);
        (waited, took)
    }

    /// The log as people read it.
    pub fn log(&self) -> String {
        log::readable(&self.raw_log())
    }

    /// The log as the runner sent it.
    pub fn raw_log(&self) -> Vec<u8> {
        self.desk.table().jobs[&self.id].log.clone()
    }

    /// The archive that the job uploaded.
    pub fn artifacts(&self) -> Option<Vec<u8>> {
        self.desk.table().jobs[&self.id].artifacts.clone()
    }

    /// Cancels the job: gracefully as a click on "cancel" does, or at once as a second one does.
    pub fn cancel(&self, wish: Wish) {
        self.desk.entry(self.id, |entry| entry.wish = wish);
    }

    fn wait_for<T>(&self, deadline: Duration, what: &str, mut ready: impl FnMut(&Entry) -> Option<T>) -> T {
        let end = Instant::now() + deadline;
        let mut table = self.desk.table();
        loop {
            if let Some(value) = ready(&table.jobs[&self.id]) {
                return value;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let log = log::readable(&table.jobs[&self.id].log);
                // The lock must not be poisoned for the runner, which still has to clean up.
                drop(table);
                panic!(
                    "job {} was expected {what} within {deadline:?}; its log:\n{log}",
                    self.id
                );
            }
            table = self
                .desk
                .changed
                .wait_timeout(table, left)
                .expect("the desk's lock")
                .0;
        }
    }
}

/// All that the coordinator knows.
#[derive(Debug, Default)]
pub(super) struct Desk {
    table: Mutex<Table>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Table {
    last_id: u64,
    queue: VecDeque<u64>,
    jobs: BTreeMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    payload: Value,
    token: String,
    log: Vec<u8>,
    wish: Wish,
    outcome: Option<Outcome>,
    artifacts: Option<Vec<u8>>,
    enqueued: Instant,
    taken: Option<Instant>,
    ended: Option<Instant>,
}

impl Entry {
    fn new(payload: Value, token: &str) -> Self {
        Self {
            payload,
            token: token.to_owned(),
            log: Vec::new(),
            wish: Wish::Run,
            outcome: None,
            artifacts: None,
            enqueued: Instant::now(),
            taken: None,
            ended: None,
        }
    }
}

impl Desk {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("the desk's lock")
    }

    /// Changes a job and wakes up who waits for it; `None` where there is no such job.
    fn entry<T>(&self, id: u64, change: impl FnOnce(&mut Entry) -> T) -> Option<T> {
        let value = self.table().jobs.get_mut(&id).map(change);
        self.changed.notify_all();
        value
    }

    /// The next job of the queue.
    pub(super) fn take(&self) -> Option<Value> {
        let mut table = self.table();
        let id = table.queue.pop_front()?;
        let entry = table.jobs.get_mut(&id)?;
        entry.taken = Some(Instant::now());
        Some(entry.payload.clone())
    }

    /// Whether the token is this job's.
    pub(super) fn knows(&self, id: u64, token: &str) -> bool {
        self.table()
            .jobs
            .get(&id)
            .is_some_and(|entry| entry.token == token)
    }

    /// Adds to the log what stands at `start` there. Returns how long the log is now, as an error where the piece does
    /// not follow on.
    pub(super) fn append_log(&self, id: u64, start: usize, piece: &[u8]) -> Result<usize, usize> {
        self.entry(id, |entry| {
            if start != entry.log.len() {
                return Err(entry.log.len());
            }
            entry.log.extend_from_slice(piece);
            Ok(entry.log.len())
        })
        .unwrap_or(Err(0))
    }

    /// Adds to the end of the log.
    pub(super) fn log(&self, id: u64, piece: &[u8]) {
        self.entry(id, |entry| entry.log.extend_from_slice(piece));
    }

    pub(super) fn wish(&self, id: u64) -> Wish {
        self.table()
            .jobs
            .get(&id)
            .map_or(Wish::CancelAtOnce, |entry| entry.wish)
    }

    pub(super) fn finish(&self, id: u64, outcome: Outcome) {
        self.entry(id, |entry| {
            // The real runner repeats itself until it is heard.
            entry.ended.get_or_insert_with(Instant::now);
            entry.outcome = Some(outcome);
        });
    }

    pub(super) fn store_artifacts(&self, id: u64, archive: Vec<u8>) {
        self.entry(id, |entry| entry.artifacts = Some(archive));
    }

    pub(super) fn artifacts(&self, id: u64) -> Option<Vec<u8>> {
        self.table().jobs.get(&id)?.artifacts.clone()
    }
}
