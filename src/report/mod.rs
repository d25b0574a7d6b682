//! The job log, progress and the operator's log.
