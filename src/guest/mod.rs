//! What runs inside the machine: introduction, readiness, shell, script, exit status.
//!
//! ```text
//! keys ─▶ introduction ─▶ (boot) ─▶ ready ─▶ script ─▶ exit code
//!                                     │        └ cancel
//!                                     └ grow, helper
//! ```
//!
//! | concern | modules |
//! |---|---|
//! | who is who | [`keys`], [`introduction`] |
//! | the way in | [`ssh`], [`ready`] |
//! | a script | [`shell`] (the wrapper's text), [`marker`] (its words in the stream), [`script`], [`cancel`] |
//! | what it ran out of | [`shortage`] |
//! | caches and artifacts | [`helper`] |
//! | what its job keeps of it | [`report`] |
//! | the file system fills the disk | [`grow`] |

pub mod cancel;
pub mod grow;
pub mod helper;
pub mod introduction;
pub mod keys;
pub mod marker;
pub mod ready;
pub mod report;
pub mod script;
pub mod shell;
pub mod shortage;
pub mod ssh;
