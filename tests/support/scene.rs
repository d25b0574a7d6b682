//! A GitLab, a host with cannery, and a runner between them; and a reaper that never rests.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::coordinator::{Coordinator, Handle, Outcome};
use super::host::Host;
use super::job::Job;
use super::runner::{Driver, Runner, Running};
use super::table;

/// A job on an emulated guest, on a busy machine, behind other jobs.
pub const SOON: Duration = Duration::from_secs(240);
/// What is cleaned up after the outcome was told.
pub const CLEAN: Duration = Duration::from_secs(20);
/// Between two calls of the reaper.
const REAP: Duration = Duration::from_secs(1);

/// A port for each server: guests may reach only ports that the settings name beforehand.
pub fn port() -> u16 {
    let listener = TcpListener::bind(("0.0.0.0", 0)).unwrap();
    listener.local_addr().unwrap().port()
}

/// Jobs go in at [`Scene::coordinator`], and run on [`Scene::host`]. At its end it prints how the jobs ended, and fails the test
/// if `cannery reap`, called every second, has found anything to do.
#[derive(Debug)]
pub struct Scene {
    running: Option<Running>,
    reaper: Option<Reaper>,
    /// GitLab.
    pub coordinator: Coordinator,
    /// The host.
    pub host: Arc<Host>,
}

impl Scene {
    /// A scene with the real runner where there is one; guests reach the coordinator at `port`.
    pub fn new(host: Host, port: u16, concurrent: usize) -> Self {
        let driver = host.driver();
        Self::with(Arc::new(host), &driver, port, concurrent)
    }

    /// The same with a driver that a test has prepared, on a host that scenes may share.
    pub fn with(host: Arc<Host>, driver: &Driver, port: u16, concurrent: usize) -> Self {
        let coordinator = Coordinator::listen(host.address(), port, &host.address().to_string());
        Self {
            running: Some(Runner::from_environment().start(&coordinator, driver, concurrent)),
            reaper: Some(Reaper::start(Arc::clone(&host))),
            coordinator,
            host,
        }
    }

    /// Runs a job to its end.
    pub fn run(&self, job: &Job) -> (Handle, Outcome) {
        let handle = self.coordinator.enqueue(job);
        let outcome = handle.wait(SOON);
        (handle, outcome)
    }

    /// Fails the test unless all that jobs had is gone soon.
    #[track_caller]
    pub fn is_clean_soon(&self) {
        let end = Instant::now() + CLEAN;
        while !self.host.leftovers().is_empty() && Instant::now() < end {
            thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(self.host.leftovers(), Vec::<String>::new());
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // The reaper first: what a runner leaves that is aborted here is for the reaper to take.
        let Some(reaper) = self.reaper.take() else { return };
        let (calls, removed) = reaper.stop();
        drop(self.running.take());
        let rows: Vec<Vec<String>> = self.coordinator.jobs().iter().map(row).collect();
        table::show(
            &format!(
                "{}; `cannery reap` was called {calls} times meanwhile",
                thread_name()
            ),
            &["job", "outcome", "reason", "code", "waited", "took"],
            &rows,
        );
        if !thread::panicking() {
            assert!(
                removed.is_empty(),
                "the reaper took from the living: {removed:#?}"
            );
        }
    }
}

/// The name of the test that runs.
fn thread_name() -> String {
    thread::current().name().unwrap_or("a test").replace('_', " ")
}

fn row(handle: &Handle) -> Vec<String> {
    let outcome = handle.outcome();
    let word = match &outcome {
        None => "not told",
        Some(outcome) if outcome.success => "success",
        Some(_) => "failed",
    };
    let seconds =
        |time: Option<Duration>| time.map_or(String::new(), |t| format!("{:.1} s", t.as_secs_f64()));
    let (waited, took) = handle.times();
    vec![
        format!("{} {}", handle.id(), handle.name()),
        word.to_owned(),
        outcome
            .as_ref()
            .map_or(String::new(), |o| o.failure_reason.clone()),
        outcome
            .and_then(|o| o.exit_code)
            .map_or(String::new(), |code| code.to_string()),
        seconds(waited),
        seconds(took),
    ]
}

/// A thread that calls `cannery reap` every second.
#[derive(Debug)]
struct Reaper {
    enough: Arc<AtomicBool>,
    thread: JoinHandle<(usize, Vec<String>)>,
}

impl Reaper {
    fn start(host: Arc<Host>) -> Self {
        let enough = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&enough);
        let thread = thread::spawn(move || {
            let (mut calls, mut said) = (0, Vec::new());
            while !told.load(Ordering::Relaxed) {
                let output = host.cannery(&["reap"]);
                let words = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
                // What the runner's own cleanup is removing is seen and left to it.
                let harmless = |line: &str| line == "Nothing to remove." || line.starts_with("left ");
                said.extend(words.lines().filter(|line| !harmless(line)).map(str::to_owned));
                if !output.status.success() {
                    said.push(format!("{}", output.status));
                }
                calls += 1;
                thread::sleep(REAP);
            }
            (calls, said)
        });
        Self { enough, thread }
    }

    /// How often it was called, and what it said but that there was nothing for it to do.
    fn stop(self) -> (usize, Vec<String>) {
        self.enough.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .unwrap_or((0, vec!["the reaper's thread has panicked".to_owned()]))
    }
}
