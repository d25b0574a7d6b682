//! What runs inside the machine: introduction, readiness, shell, exit status.
