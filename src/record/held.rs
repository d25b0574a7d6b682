//! A machine that stays though its job is over, for somebody to look at it.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Record, State};

/// Until when a machine stays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// When it may be removed.
    pub until: Timestamp,
    /// Who wants it to stay.
    pub by: Holder,
}

/// Who wants a machine to stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Holder {
    /// The settings or the job's variable, since its script failed.
    Failure,
    /// An operator, however the job ends.
    Operator,
}

impl Record {
    /// Until when the machine stays, if it is to stay now.
    pub fn held_until(&self, now: Timestamp) -> Option<Timestamp> {
        self.held
            .as_ref()
            .map(|held| held.until)
            .filter(|until| *until > now)
    }

    /// Is the job over, and its machine still wanted?
    pub fn is_held(&self, now: Timestamp) -> bool {
        self.state == State::Held && self.held_until(now).is_some()
    }
}
