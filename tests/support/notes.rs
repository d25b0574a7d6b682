//! When the runner called the driver, and when it told a call to end: by a driver that notes it, whoever the runner is.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use super::guests::checkout;
use super::host::{Host, cannery};
use super::runner::Driver;

/// What `tests/support/noting-driver` has noted.
#[derive(Debug)]
pub struct Notes(PathBuf);

/// One event of one call.
#[derive(Debug, Clone)]
pub struct Note {
    /// When.
    pub at: SystemTime,
    /// `began`, `told` (to end, by SIGTERM) or `ended:CODE`.
    pub what: String,
    /// The job's number.
    pub job: u64,
    /// `config`, `prepare`, `cleanup`, or the name of the script that runs.
    pub stage: String,
}

impl Notes {
    /// cannery as a runner's driver, and the notes about it.
    pub fn driver(host: &Host) -> (Driver, Self) {
        let file = host.folder().join("notes");
        let text = |path: &std::path::Path| path.to_str().expect("a path of text").to_owned();
        let arguments = [
            text(&file),
            text(cannery()),
            "--config".to_owned(),
            text(&host.settings()),
        ];
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let driver = Driver::new(&checkout().join("tests/support/noting-driver"), &arguments);
        (driver, Self(file))
    }

    /// All that was noted so far.
    pub fn all(&self) -> Vec<Note> {
        let text = fs::read_to_string(&self.0).unwrap_or_default();
        text.lines().map(read).collect()
    }

    /// What was noted about a stage of a job.
    pub fn of(&self, job: u64, stage: &str) -> Vec<Note> {
        let mut all = self.all();
        all.retain(|note| note.job == job && note.stage == stage);
        all
    }

    /// How often the stage of a job was called.
    pub fn calls(&self, job: u64, stage: &str) -> usize {
        self.of(job, stage)
            .iter()
            .filter(|note| note.what == "began")
            .count()
    }
}

fn read(line: &str) -> Note {
    let mut words = line.split(' ');
    let mut next = || words.next().expect("four words");
    let seconds: f64 = next().parse().expect("seconds since the epoch");
    Note {
        at: SystemTime::UNIX_EPOCH + Duration::from_secs_f64(seconds),
        what: next().to_owned(),
        job: next().parse().expect("a job's number"),
        stage: next().to_owned(),
    }
}
