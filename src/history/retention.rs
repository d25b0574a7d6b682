//! Which entries of the history go: the oldest first.

use std::time::{Duration, SystemTime};

use crate::record::JobKey;

/// How much is remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// For how long; zero remembers nothing.
    pub keep: Duration,
    /// In how many bytes, all together; zero remembers nothing.
    pub bytes: u64,
}

impl Bounds {
    /// Is nothing to be remembered?
    pub fn keep_nothing(&self) -> bool {
        self.keep.is_zero() || self.bytes == 0
    }
}

/// One entry, weighed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// The job.
    pub key: JobKey,
    /// When the entry was written.
    pub written: SystemTime,
    /// How much room it takes.
    pub bytes: u64,
}

/// The entries that must go, the oldest first.
pub fn surplus(mut entries: Vec<Kept>, bounds: &Bounds, now: SystemTime) -> Vec<JobKey> {
    // Keys decide between two of one moment, so that all who look agree.
    entries.sort_by(|a, b| (b.written, &b.key).cmp(&(a.written, &a.key)));
    let mut room = bounds.bytes;
    let mut full = bounds.keep_nothing();
    let stays = |entry: &Kept| {
        // One from a clock that was ahead has no age yet.
        let age = now.duration_since(entry.written).unwrap_or_default();
        match room.checked_sub(entry.bytes) {
            Some(rest) if !full && age <= bounds.keep => {
                room = rest;
                true
            }
            // Older ones do not slip in behind one that is too large.
            _ => {
                full = true;
                false
            }
        }
    };
    let stay = entries.iter().map(stays).filter(|stays| *stays).count();
    let mut go: Vec<JobKey> = entries.split_off(stay).into_iter().map(|e| e.key).collect();
    go.reverse();
    go
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kept(id: u64, age: u64, bytes: u64, now: SystemTime) -> Kept {
        Kept {
            key: JobKey::new("https://gitlab.example.com", id, 1),
            written: now - Duration::from_secs(age),
            bytes,
        }
    }

    fn ids(keys: Vec<JobKey>) -> Vec<u64> {
        keys.into_iter().map(|key| key.id).collect()
    }

    #[test]
    fn what_is_too_old_or_too_much_goes_the_oldest_first() {
        let now = SystemTime::now();
        let bounds = |keep, bytes| Bounds {
            keep: Duration::from_secs(keep),
            bytes,
        };
        let all = || {
            vec![
                kept(1, 100, 10, now),
                kept(2, 50, 10, now),
                kept(3, 75, 10, now),
                kept(4, 0, 10, now),
            ]
        };
        for (bounds, gone) in [
            (bounds(100, 40), vec![]),
            (bounds(99, 40), vec![1]),
            (bounds(60, 40), vec![1, 3]),
            (bounds(100, 39), vec![1]),
            (bounds(100, 20), vec![1, 3]),
            (bounds(100, 9), vec![1, 3, 2, 4]),
            (bounds(0, 40), vec![1, 3, 2, 4]),
            (bounds(100, 0), vec![1, 3, 2, 4]),
        ] {
            assert_eq!(ids(surplus(all(), &bounds, now)), gone, "{bounds:?}");
        }
    }

    #[test]
    fn an_entry_of_a_clock_that_was_ahead_stays() {
        let now = SystemTime::now();
        let mut ahead = kept(1, 0, 1, now);
        ahead.written = now + Duration::from_secs(1000);
        let bounds = Bounds {
            keep: Duration::from_secs(1),
            bytes: 1,
        };
        assert_eq!(surplus(vec![ahead], &bounds, now), []);
    }

    proptest! {
        #[test]
        fn what_stays_fits_and_is_newer_than_what_goes(
            entries in proptest::collection::vec((0u64..200, 1u64..50), 0..30), keep in 1u64..150, bytes in 1u64..600,
        ) {
            let now = SystemTime::now();
            let all: Vec<Kept> = (0..).zip(entries).map(|(id, (age, bytes))| kept(id, age, bytes, now)).collect();
            let bounds = Bounds { keep: Duration::from_secs(keep), bytes };
            let gone = surplus(all.clone(), &bounds, now);
            let (went, stay): (Vec<&Kept>, Vec<&Kept>) = all.iter().partition(|e| gone.contains(&e.key));
            prop_assert!(stay.iter().map(|e| e.bytes).sum::<u64>() <= bytes);
            prop_assert!(stay.iter().all(|e| now.duration_since(e.written).unwrap() <= bounds.keep));
            let youngest_gone = went.iter().map(|e| e.written).max();
            prop_assert!(stay.iter().all(|e| youngest_gone.is_none_or(|at| e.written >= at)));
            // Nothing goes without need: with the youngest that went there would be too much, or it is too old.
            if let Some(first) = went.iter().max_by_key(|e| (e.written, &e.key)) {
                let with_it = stay.iter().map(|e| e.bytes).sum::<u64>() + first.bytes;
                let too_old = now.duration_since(first.written).unwrap() > bounds.keep;
                prop_assert!(too_old || with_it > bytes);
            }
        }
    }
}
