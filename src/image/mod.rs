//! From a reference to a verified disk in the store.
