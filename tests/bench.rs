//! `cannery bench stages` on a real guest: that it measures all that it says, and leaves nothing behind. How long things take is
//! for release builds on quiet machines to show.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use support::host::Host;

/// What the figures of `bench stages` begin with, in order; where prepare's time went stands between them.
const FIGURES: [&str; 8] = [
    "config",
    "config, against ",
    "prepare, against the guest's own boot",
    "prepare, against ",
    "run of `true`, against ssh ",
    "run of `true`, against ",
    "cleanup, against virsh ",
    "cleanup, against ",
];

fn bench(host: &Host, image: &str) -> Command {
    let temporary = host.folder().join("temporary");
    std::fs::create_dir_all(&temporary).unwrap();
    let mut command = host.command(&[
        "bench", "stages", "--runs", "1", "--format", "json", "--image", image,
    ]);
    command.env("TMPDIR", temporary);
    command
}

fn nothing_is_left(host: &Host) {
    assert_eq!(host.leftovers(), Vec::<String>::new());
    let files: Vec<_> = std::fs::read_dir(host.folder().join("temporary"))
        .unwrap()
        .collect();
    assert!(files.is_empty(), "{files:?}");
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn the_stages_are_measured_and_nothing_is_left_also_when_that_is_interrupted() {
    let host = Host::new(&[], "[machine]\naccelerator = \"emulation\"\n");
    let image = host.images().add_tiny("tiny", "");

    let output = bench(&host, &image).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let rows: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {said}"));
    let missed = rows.iter().any(|row| row["ok"] == false);
    assert_eq!(output.status.code(), Some(i32::from(missed)), "{said}");
    assert_eq!(said.contains("missed: "), missed, "{said}");
    let mut wanted = FIGURES.iter().peekable();
    for row in &rows {
        let keys: Vec<&String> = row.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["figure", "unit", "ours", "peer", "ratio", "goal", "ok"]);
        assert!(row["ours"].as_f64().unwrap() > 0.0, "{row}");
        let name = row["figure"].as_str().unwrap();
        let _ = wanted.next_if(|figure| name.starts_with(**figure));
        if name.ends_with("sardinecake") {
            assert_eq!((&row["peer"], &row["ok"]), (&Value::Null, &Value::Bool(true)));
        } else if name.contains(", against ") {
            assert!(row["ratio"].as_f64().unwrap() > 0.0, "{row}");
        }
    }
    assert_eq!(wanted.next(), None, "{rows:#?}");
    nothing_is_left(&host);

    let mut child = bench(&host, &image)
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    // The job's machine runs, and is about to be started without us.
    let begun = lines
        .by_ref()
        .find(|line| line.as_ref().unwrap().starts_with("  prepare "));
    assert!(begun.is_some());
    assert_eq!(host.machines().len(), 1);
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    let last = lines.last().unwrap().unwrap();
    assert!(last.contains("interrupted"), "{last}");
    assert_eq!(child.wait().unwrap().code(), Some(1));
    nothing_is_left(&host);
}
