//! `cannery bench console` in small: that it measures all that it says, and leaves nothing behind. How fast the proxy is, is for
//! release builds on quiet machines to show.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// For a process that was killed to be gone.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the figures begin with, in order; parts of some stand between them.
const FIGURES: [&str; 14] = [
    "pictures, against socat",
    "pictures over TLS, against socat with OpenSSL",
    "pictures without a proxy",
    "a session's four channels",
    "from a key to its picture",
    "a burst of 3 sessions",
    "a session of ten a second",
    "keys that were used twice, of 24",
    "memory of one of 6 idle sessions",
    "past the limit: viewers that were not told so",
    "past the limit: sessions inside that lost something",
    "a session beside 200 half-open connections",
    "a session beside 12 wrong tickets",
    "a session over TLS beside 9 slow handshakes",
];

fn bench(temporary: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cannery"));
    command
        .args([
            "bench", "console", "--format", "json", "--runs", "1", "--size", "1M",
        ])
        .args(["--sessions", "3", "--connections", "200"])
        .env("TMPDIR", temporary)
        .stdin(Stdio::null());
    command
}

fn is_empty(folder: &Path) -> bool {
    std::fs::read_dir(folder).unwrap().next().is_none()
}

#[test]
fn the_proxy_is_measured_and_nothing_that_must_not_happen_did() {
    let folder = tempfile::tempdir().unwrap();
    let output = bench(folder.path()).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let rows: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {said}"));
    let missed = rows.iter().any(|row| row["ok"] == false);
    assert_eq!(output.status.code(), Some(i32::from(missed)), "{said}");
    let mut wanted = FIGURES.iter().peekable();
    for row in &rows {
        let name = row["figure"].as_str().unwrap();
        let _ = wanted.next_if(|figure| name.starts_with(**figure));
        if row["goal"] == "none" {
            assert_eq!(
                (&row["unit"], &row["ours"]),
                (&"count".into(), &0.0.into()),
                "{row}"
            );
        } else if !name.starts_with("memory") {
            // Of so few sessions it may be less than a page.
            assert!(row["ours"].as_f64().unwrap() > 0.0, "{row}");
        }
        if name.starts_with("pictures, ") || name.starts_with("pictures over TLS") {
            let missing = row["goal"]
                .as_str()
                .unwrap()
                .ends_with("(socat is not installed)");
            assert_eq!(row["ratio"].is_null(), missing, "{row}");
        } else if name.contains(", against ") {
            assert!(row["ratio"].as_f64().unwrap() > 0.0, "{row}");
        }
    }
    assert_eq!(wanted.next(), None, "{rows:#?}");
    assert!(is_empty(folder.path()));
}

/// Another proxy, as far as a bench sees: whatever is sent goes to the machine.
const PEER: &str = r#"#!/bin/sh
exec socat "OPENSSL-LISTEN:${1##*:},bind=127.0.0.1,reuseaddr,fork,cert=$4,key=$5,verify=0" "TCP:$2"
"#;

#[test]
#[ignore = "needs socat"]
fn another_proxy_is_measured_in_the_same_ways() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("peer");
    std::fs::write(&program, PEER).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let scratch = folder.path().join("scratch");
    std::fs::create_dir(&scratch).unwrap();
    let output = bench(&scratch)
        .arg("--peer")
        .arg(format!("other={}", program.display()))
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let rows: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {said}"));
    let of_peer = |beginning: &str| {
        let found = rows.iter().find(|row| {
            let name = row["figure"].as_str().unwrap();
            name.starts_with(beginning) && name.ends_with(", against other")
        });
        found.unwrap_or_else(|| panic!("{beginning}: {rows:#?}"))
    };
    for beginning in [
        "pictures over TLS",
        "a session's four channels over TLS",
        "from a key to its picture over TLS",
        "a burst of 3 sessions over TLS",
        "a session of ten a second that follow over TLS",
        "a session over TLS beside 200 half-open connections",
        "a session over TLS beside 12 wrong tickets",
        "a session over TLS beside 9 slow handshakes",
    ] {
        let row = of_peer(beginning);
        assert!(row["ratio"].as_f64().unwrap() > 0.0, "{row}");
    }
    // The machine that is played has one key for all.
    assert_eq!(of_peer("keys that were used twice over TLS")["peer"], 23.0);
    assert!(of_peer("memory of one of 6 idle sessions")["peer"].is_number());
    assert!(is_empty(&scratch));
}

#[test]
fn an_interrupted_bench_leaves_no_files_and_no_proxy() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = bench(folder.path())
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let pid = Pid::from_child(&child);
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let begun = lines
        .by_ref()
        .find(|line| line.as_ref().unwrap().contains("Opening"));
    assert!(begun.is_some());
    let tasks = format!("/proc/{0}/task/{0}/children", pid.as_raw_nonzero());
    let started = std::fs::read_to_string(tasks).unwrap();
    assert!(started.split_whitespace().count() > 0);
    kill_process(pid, Signal::INT).unwrap();
    let last = lines.last().unwrap().unwrap();
    assert!(last.contains("interrupted"), "{last}");
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(is_empty(folder.path()));
    let end = Instant::now() + PATIENCE;
    for pid in started.split_whitespace() {
        // One that is killed and that nobody has waited for has no program any more.
        while let Ok(program) = std::fs::read_link(format!("/proc/{pid}/exe")) {
            assert!(Instant::now() < end, "{} still runs", program.display());
            thread::sleep(Duration::from_millis(10));
        }
    }
}
