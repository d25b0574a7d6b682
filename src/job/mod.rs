//! What was asked, by whom, and what they may have.
