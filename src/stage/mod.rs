//! The four calls of gitlab-runner's custom executor.
