//! What is left behind, and what to do about it.
