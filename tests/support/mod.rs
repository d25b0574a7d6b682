//! What integration tests are made of: a GitLab coordinator, a runner (the real one or a double), and guests.
//!
//! A test reads like prose: start a [`coordinator::Coordinator`], start a [`runner::Runner`] with a
//! [`runner::Driver`], enqueue a [`job::Job`], wait for its outcome and read its log.

// Every test binary takes the parts that it needs.
#![allow(dead_code, unreachable_pub)]
// A test's support may panic, which is how a test fails, and print for whoever reads why.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

use std::time::{Duration, Instant};

pub mod coordinator;
pub mod guests;
pub mod job;
pub mod log;
pub mod runner;

// The demo shares what is above and knows the program by its arguments; what is below is told by cargo where it is.
#[cfg(test)]
pub mod chromium;
#[cfg(test)]
pub mod console;
#[cfg(test)]
pub mod desk;
#[cfg(test)]
pub mod desktop;
#[cfg(test)]
pub mod gitlab;
#[cfg(test)]
pub mod host;
#[cfg(test)]
#[path = "https_fixture.rs"]
pub mod https;
#[cfg(test)]
pub mod kills;
#[cfg(test)]
pub mod libvirtd;
#[cfg(test)]
pub mod lines;
#[cfg(test)]
pub mod notes;
#[cfg(test)]
pub mod picture;
#[cfg(test)]
pub mod s3;
#[cfg(test)]
pub mod scene;
#[cfg(test)]
pub mod stages;
#[cfg(test)]
pub mod table;

/// Lets other users into a folder of the test, to files that they may read.
pub fn everybody_may_pass(folder: &std::path::Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// Waits until this is so; fails the test with what was awaited if it takes longer.
#[track_caller]
pub fn until(what: &str, within: Duration, mut so: impl FnMut() -> bool) {
    let end = Instant::now() + within;
    while !so() {
        assert!(Instant::now() < end, "waited {within:?} until {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The environment variable's value, where it is set and not empty.
///
/// Tests are the outermost layer, as the command line is of the program: they may read the environment.
#[allow(clippy::disallowed_methods)]
pub fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}
