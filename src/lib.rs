//! cannery runs every GitLab CI job in a virtual machine of its own.
//!
//! gitlab-runner calls the binary as a *custom executor* in four stages. Data goes one way:
//!
//! ```text
//! gitlab-runner ──config/prepare/run/cleanup──▶ cli ─▶ stage
//!    job       what was asked, who asked, what may they have
//!    image     reference ▶ digest ▶ verified disk in the store
//!    host      may it start now? capacity, slot
//!    machine   description ▶ XML ▶ libvirt domain on an overlay
//!    start     a running machine and a way to introduce it
//!    guest     introduction ▶ ready ▶ shell ▶ script ▶ exit status
//!    outcome   exit code for the runner, one sentence for the user
//! viewer ──SPICE──▶ console ──▶ machine
//! ```
//!
//! | concern | modules |
//! |---|---|
//! | what was asked | [`job`], [`settings`] |
//! | what it runs on | [`image`], [`host`], [`machine`], [`guest`] |
//! | who looks at it | [`console`] |
//! | what is remembered | [`record`], [`history`] |
//! | who may see a machine, and how | [`ticket`], [`serve`] |
//! | whose threads are waited for, and whose programs end with us | [`threads`], [`children`] |
//! | where tests have it killed | [`kill`] |
//! | choreography | [`start`], [`stage`], [`reap`] |
//! | what people see | [`cli`], [`report`], [`outcome`] |
//! | how fast it is | [`bench`] |
//!
//! `job`, `image`, `host`, `machine`, `guest` and `console` do not import each other: they hand on values.
//! `record` is a leaf of plain types that all may use. Only [`cli`] reads the process's environment,
//! and only [`cli`] and [`report`] print.

pub mod bench;
pub mod children;
pub mod cli;
pub mod console;
pub mod guest;
pub mod history;
pub mod host;
pub mod image;
pub mod job;
pub mod kill;
pub mod machine;
pub mod outcome;
pub mod quantity;
pub mod reap;
pub mod record;
pub mod report;
pub mod secret;
pub mod serve;
pub mod settings;
pub mod stage;
pub mod start;
pub mod threads;
pub mod ticket;
