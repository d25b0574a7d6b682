//! Runs ten jobs that do nothing, one after the other, and prints how long the stages and the phases of prepare took.
//!
//! `make bench` prepares all that this needs and calls it: `bench CANNERY CONFIG IMAGE ADDRESS PORT`.

// An example may panic, and prints: it is a program.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use support::coordinator::Coordinator;
use support::job::Job;
use support::runner::{Driver, Runner};

/// How many jobs are measured, after one that fills the image cache.
const JOBS: usize = 10;

/// The longest that one of them may take.
const JOB_TIMEOUT: Duration = Duration::from_secs(300);

/// What is known about one stage or phase, in seconds.
struct Figure {
    name: String,
    seconds: Vec<f64>,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, cannery, config, image, ..] = arguments.as_slice() else {
        println!("usage: bench CANNERY CONFIG IMAGE ADDRESS PORT");
        return ExitCode::from(2);
    };
    let coordinator = Coordinator::start();
    let driver = Driver::new(Path::new(cannery), &["--config", config]);
    let running = Runner::Double.start(&coordinator, &driver, 1);
    let job = Job::new("nothing").image(image).script(["true"]);
    coordinator.enqueue(&job).wait(JOB_TIMEOUT);
    let warm_up = driver.calls.lock().expect("the calls' lock").len();

    let mut phases = Vec::new();
    for number in 1..=JOBS {
        let handle = coordinator.enqueue(&job);
        let outcome = handle.wait(JOB_TIMEOUT);
        assert!(outcome.success, "job {number} failed:\n{}", handle.log());
        let log = handle.log();
        let ready = log.lines().find_map(|line| line.trim().strip_prefix("Ready: "));
        for (name, seconds) in ready.into_iter().flat_map(phases_of) {
            add(&mut phases, &format!("prepare: {name}"), seconds);
        }
    }
    running.finish();

    let mut stages = Vec::new();
    for (name, duration) in driver.calls.lock().expect("the calls' lock").iter().skip(warm_up) {
        add(&mut stages, name, duration.as_secs_f64());
    }
    println!(
        "{:<28} {:>9} {:>9} {:>9}   (seconds, {JOBS} jobs)",
        "stage", "least", "median", "most"
    );
    for figure in stages.iter_mut().chain(&mut phases) {
        figure.seconds.sort_by(f64::total_cmp);
        let (first, last) = (figure.seconds[0], figure.seconds[figure.seconds.len() - 1]);
        let median = figure.seconds[figure.seconds.len() / 2];
        println!("{:<28} {first:>9.3} {median:>9.3} {last:>9.3}", figure.name);
    }
    ExitCode::SUCCESS
}

fn add(figures: &mut Vec<Figure>, name: &str, seconds: f64) {
    match figures.iter_mut().find(|figure| figure.name == name) {
        Some(figure) => figure.seconds.push(seconds),
        None => figures.push(Figure {
            name: name.to_owned(),
            seconds: vec![seconds],
        }),
    }
}

/// `image 0.01 s · boot 4.3 s` → (image, 0.01), (boot, 4.3)
fn phases_of(line: &str) -> Vec<(String, f64)> {
    let phases = line.split(" · ");
    phases
        .filter_map(|phase| {
            let (name, seconds) = phase.strip_suffix(" s")?.rsplit_once(' ')?;
            Some((name.to_owned(), seconds.parse().ok()?))
        })
        .collect()
}
