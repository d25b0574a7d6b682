//! Who runs the jobs: the real gitlab-runner, or a double that keeps its side of the contract.
//!
//! The same scenario goes through both. The double is there for machines on which no runner is installed; what it does
//! was compared with the real one, test by test.

pub mod double;
mod real;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::coordinator::Coordinator;

/// The environment variable that names the real runner's binary.
pub const REAL_RUNNER: &str = "GITLAB_RUNNER_BIN";

/// Which runner plays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Runner {
    /// The double of this test suite.
    Double,
    /// The binary at this path.
    Real(PathBuf),
}

impl Runner {
    /// The real runner where `GITLAB_RUNNER_BIN` names one, else the double.
    pub fn from_environment() -> Self {
        super::environment(REAL_RUNNER).map_or(Self::Double, |path| Self::Real(PathBuf::from(path)))
    }

    /// The real runner; fails the test where `GITLAB_RUNNER_BIN` is not set.
    pub fn real() -> Self {
        match Self::from_environment() {
            Self::Double => panic!("set {REAL_RUNNER} to the path of a gitlab-runner binary"),
            real @ Self::Real(_) => real,
        }
    }

    /// Starts to take jobs from the coordinator, up to `concurrent` at a time.
    pub fn start(&self, coordinator: &Coordinator, driver: &Driver, concurrent: usize) -> Running {
        Running(match self {
            Self::Double => Either::Double(double::Double::start(coordinator, driver, concurrent)),
            Self::Real(binary) => Either::Real(real::Real::start(binary, coordinator, driver, concurrent)),
        })
    }
}

/// A custom executor's driver, and the runner's settings for it.
#[derive(Debug, Clone)]
pub struct Driver {
    /// The program; the stage follows its arguments.
    pub program: PathBuf,
    /// What stands before the stage, in every `*_args`.
    pub arguments: Vec<String>,
    /// Set for the runner itself, and so for every call of the driver.
    pub environment: Vec<(String, String)>,
    /// `builds_dir`, where the driver does not tell.
    pub builds_dir: Option<String>,
    /// `cache_dir`, where the driver does not tell.
    pub cache_dir: Option<String>,
    /// The shell that scripts are made for, where the driver does not tell.
    pub shell: String,
    /// `graceful_kill_timeout`: from SIGTERM to SIGKILL. In whole seconds.
    pub graceful_kill: Duration,
    /// `force_kill_timeout`: from SIGKILL to giving up. In whole seconds.
    pub force_kill: Duration,
    /// Where the real runner keeps caches; the double has none.
    pub cache: Option<Cache>,
    /// `output_limit`: how much of a job's output is kept, in KiB.
    pub output_limit: usize,
    /// Every call of the driver and how long it took: `config`, `run prepare_script`, …; only the double tells.
    pub calls: Arc<Mutex<Vec<(String, Duration)>>>,
}

impl Driver {
    /// This program, called as `PROGRAM ARGUMENTS… STAGE`.
    pub fn new(program: &Path, arguments: &[&str]) -> Self {
        Self {
            program: program.to_owned(),
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
            environment: Vec::new(),
            builds_dir: None,
            cache_dir: None,
            shell: "bash".to_owned(),
            graceful_kill: Duration::from_secs(10),
            force_kill: Duration::from_secs(5),
            cache: None,
            output_limit: 4096,
            calls: Arc::default(),
        }
    }
}

/// A bucket of an S3-compatible server.
#[derive(Debug, Clone)]
pub struct Cache {
    /// The server, as `ADDRESS:PORT`, without TLS.
    pub server: String,
    /// The bucket's name.
    pub bucket: String,
}

/// A runner at work. Dropping it aborts what it does, and waits for that.
#[derive(Debug)]
pub struct Running(Either);

#[derive(Debug)]
enum Either {
    Double(double::Double),
    Real(real::Real),
}

impl Running {
    /// Takes no more jobs, and returns when the present ones have ended.
    pub fn finish(self) {
        match self.0 {
            Either::Double(double) => double.finish(),
            Either::Real(real) => real.finish(),
        }
    }
}
