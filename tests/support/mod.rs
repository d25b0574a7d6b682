//! What integration tests are made of: a GitLab coordinator, a runner (the real one or a double), and guests.
//!
//! A test reads like prose: start a [`coordinator::Coordinator`], start a [`runner::Runner`] with a
//! [`runner::Driver`], enqueue a [`job::Job`], wait for its outcome and read its log.

// Every test binary takes the parts that it needs.
#![allow(dead_code, unreachable_pub)]
// A test's support may panic: that is how a test fails.
#![allow(clippy::unwrap_used, clippy::expect_used)]

pub mod call;
pub mod coordinator;
pub mod guests;
pub mod host;
pub mod job;
pub mod log;
pub mod runner;

/// The environment variable's value, where it is set and not empty.
///
/// Tests are the outermost layer, as the command line is of the program: they may read the environment.
#[allow(clippy::disallowed_methods)]
pub fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}
