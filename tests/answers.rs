//! What commands that change something tell programs. libvirt's own test driver stands in for the daemon.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on panics"
)]

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use cannery::record::{Caller, JobDir, JobKey, Jobs, Record};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

/// A host with a state folder and settings.
struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let host = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        let settings = format!(
            "state_dir = \"{}\"\n[libvirt]\nuri = \"test:///default\"\n",
            host.state().display()
        );
        fs::write(host.dir.path().join("cannery.toml"), settings).unwrap();
        host
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// What a call prints as JSON, and whether it ended well.
    fn says(&self, arguments: &[&str]) -> (Value, bool) {
        let output = Command::new(env!("CARGO_BIN_EXE_cannery"))
            .arg("--config")
            .arg(self.dir.path().join("cannery.toml"))
            .args(arguments)
            .args(["--format", "json"])
            .output()
            .unwrap();
        let json = serde_json::from_slice(&output.stdout);
        (
            json.unwrap_or_else(|e| panic!("{arguments:?}: {e}: {output:?}")),
            output.status.success(),
        )
    }

    /// A job that is here, whose runner lives; its time is over in so many hours.
    fn job(&self, id: u64, hours: i64) -> JobDir {
        let now = Timestamp::now();
        let key = JobKey::new("https://gitlab.example.com", id, 0);
        let session = self.dir.path().join(format!("response-{id}.json"));
        fs::write(&session, "{}").unwrap();
        let deadline = now.saturating_add(SignedDuration::from_hours(hours)).unwrap();
        let record = Record::new(key, session, Caller::of_this_call(), now, deadline);
        Jobs::open(&self.state()).unwrap().create(record).unwrap()
    }
}

#[test]
fn programs_are_told_which_machines_stay_and_go() {
    let host = Host::new();
    let keys = [1, 2].map(|id| host.job(id, 1).key().to_string());
    let (held, well) = host.says(&["vm", "hold", "1", "--for", "2h"]);
    assert!(well);
    let (listed, _) = host.says(&["vm", "list"]);
    let row = listed
        .as_array()
        .unwrap()
        .iter()
        .find(|row| row["job"] == 1)
        .unwrap();
    assert_eq!(held, json!({"key": keys[0], "held_until": row["held_until"]}));
    let (released, well) = host.says(&["vm", "release", "1"]);
    assert!(well);
    assert_eq!(released, json!({"key": keys[0], "removed": false}));
    let (gone, well) = host.says(&["vm", "rm", "2", "1"]);
    assert!(well);
    assert_eq!(gone, json!([{"key": keys[1]}, {"key": keys[0]}]));
    assert_eq!(host.says(&["vm", "list"]).0, json!([]));
    assert_eq!(host.says(&["vm", "rm", "1"]), (json!([]), false));
}

#[test]
fn programs_are_told_what_is_reaped() {
    let host = Host::new();
    host.job(1, 1);
    let over = host.job(2, -2);
    let row = |removed: bool| {
        json!([{
            "kind": "job",
            "key": over.key().to_string(),
            "reason": "its time-out has passed by an hour",
            "removed": removed,
        }])
    };
    assert_eq!(host.says(&["reap", "--dry-run"]), (row(false), true));
    assert_eq!(host.says(&["reap"]), (row(true), true));
    assert_eq!(host.says(&["reap"]), (json!([]), true));
}
