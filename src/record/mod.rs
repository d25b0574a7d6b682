//! What is on disk about jobs: versioned plain types, atomic writes, locks.
