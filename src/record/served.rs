//! Whether `cannery serve` runs with a state folder: it holds a lock there, which the kernel drops when its process dies.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::open_lock;

/// Held for as long as pages are served.
#[derive(Debug)]
pub struct Served {
    _lock: File,
}

fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("serve.lock")
}

impl Served {
    /// From now on, for whoever asks. Several processes may serve at once.
    ///
    /// # Errors
    /// The lock's file cannot be made or locked.
    pub fn begin(state_dir: &Path) -> io::Result<Self> {
        let lock = open_lock(&path(state_dir))?;
        lock.lock_shared()?;
        Ok(Self { _lock: lock })
    }
}

/// Does a process of this host serve pages with this state folder? Where that cannot be said, it is taken to.
pub fn is_served(state_dir: &Path) -> bool {
    match File::open(path(state_dir)) {
        Err(e) => e.kind() != io::ErrorKind::NotFound,
        Ok(lock) => lock.try_lock().is_err(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_served_as_long_as_one_process_does() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path();
        assert!(!is_served(state));
        let both = [(); 2].map(|()| Served::begin(state).unwrap());
        assert!(is_served(state));
        let [one, other] = both;
        drop(one);
        assert!(is_served(state));
        drop(other);
        assert!(!is_served(state), "its file stays");
    }
}
