//! Runs two jobs through all four stages as gitlab-runner would, and shows their logs as GitLab would.
//!
//! `make demo` prepares all that this needs and calls it: `demo CANNERY CONFIG IMAGE ADDRESS PORT`. The coordinator listens
//! on ADDRESS, where guests reach this host, so that jobs can clone a repository from it.

// An example may panic, and prints: it is a program.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use support::coordinator::{Coordinator, Handle, Outcome};
use support::job::Job;
use support::runner::{Driver, Runner};

/// How often the log is looked at.
const POLL: Duration = Duration::from_millis(100);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, cannery, config, image, address, port] = arguments.as_slice() else {
        println!("usage: demo CANNERY CONFIG IMAGE ADDRESS PORT");
        return ExitCode::from(2);
    };
    let address_number = address.parse().expect("ADDRESS is an IP address");
    let coordinator = Coordinator::listen(address_number, port.parse().expect("PORT is a number"), address);
    let repository = coordinator.repository(
        "grp/sardines",
        &[
            ("README.md", "Each job gets a can of its own.\n"),
            (
                "test.sh",
                "#!/bin/sh\necho 'testing …'\necho 'one of 42 tests failed' >&2\nexit 3\n",
            ),
        ],
    );
    let driver = Driver::new(Path::new(cannery), &["--config", config]);
    let running = Runner::Double.start(&coordinator, &driver, 1);

    let good = Job::new("look-around")
        .image(image)
        .clones(&repository)
        .variable("CANNERY_DISK", "1G")
        .script([
            "uname -srm",
            "nproc; free -m | head -n 2; df -h /",
            "cat README.md",
            "echo \"job $CI_JOB_ID of $CI_PROJECT_PATH on $(hostname) as $(id -un)\"",
        ])
        .after_script(["echo \"the script: $CI_JOB_STATUS\""]);
    let bad = Job::new("failing-test")
        .image(image)
        .clones(&repository)
        .script(["sh ./test.sh"])
        .after_script(["echo \"the script: $CI_JOB_STATUS\""]);

    let first = show(&coordinator.enqueue(&good));
    let second = show(&coordinator.enqueue(&bad));
    running.finish();

    let as_expected = first.success && second.exit_code == Some(3);
    if as_expected {
        println!("\nBoth jobs ended as they should: the first well, the second with its test's exit code 3.");
        ExitCode::SUCCESS
    } else {
        println!("\nThe jobs did not end as they should: first {first:?}, second {second:?}.");
        ExitCode::FAILURE
    }
}

/// Shows a job's log while it grows, until the job has ended.
fn show(job: &Handle) -> Outcome {
    println!("\n━━━ job {} “{}” ━━━", job.id(), job.name());
    let mut page = Page::default();
    loop {
        let outcome = job.outcome();
        page.show(&job.raw_log());
        if let Some(outcome) = outcome {
            let state = match (outcome.success, outcome.exit_code) {
                (true, _) => "success".to_owned(),
                (false, None) => outcome.failure_reason.clone(),
                (false, Some(code)) => format!("{}, exit code {code}", outcome.failure_reason),
            };
            println!("━━━ GitLab was told: {state} ━━━");
            return outcome;
        }
        thread::sleep(POLL);
    }
}

/// A job log as GitLab shows it: sections with the time that they took.
#[derive(Default)]
struct Page {
    shown: usize,
    begun: HashMap<String, u64>,
}

impl Page {
    /// Shows what has been added to the log, as far as its lines are complete.
    fn show(&mut self, log: &[u8]) {
        let new = &log[self.shown..];
        let Some(end) = new.iter().rposition(|&byte| byte == b'\n') else {
            return;
        };
        self.shown += end + 1;
        for line in String::from_utf8_lossy(&new[..end]).split('\n') {
            self.line(line);
        }
        // Whoever pipes this somewhere wants to see it grow, too.
        let _ = std::io::stdout().flush();
    }

    fn line(&mut self, line: &str) {
        let (mark, text) = line.split_once("\r\x1b[0K").unwrap_or(("", line));
        let fields: Vec<&str> = mark.split(':').collect();
        match fields.as_slice() {
            ["section_start", time, name] => {
                self.begun
                    .insert((*name).to_owned(), time.parse().unwrap_or_default());
                println!("▾ {}", colours(text));
            }
            ["section_end", time, name] => {
                let end: u64 = time.parse().unwrap_or_default();
                let seconds = end.saturating_sub(self.begun.remove(*name).unwrap_or(end));
                println!("  {:>60}", format!("{:02}:{:02}", seconds / 60, seconds % 60));
            }
            _ => println!("  {}", colours(line)),
        }
    }
}

/// Colours are for terminals.
fn colours(text: &str) -> String {
    if std::io::stdout().is_terminal() {
        return text.to_owned();
    }
    let mut plain = String::new();
    for (number, piece) in text.split('\x1b').enumerate() {
        let rest = piece.find(|character: char| character.is_ascii_alphabetic());
        plain.push_str(if number == 0 {
            piece
        } else {
            rest.map_or("", |end| &piece[end + 1..])
        });
    }
    plain
}
