//! The job that a name on the command line means.

use std::collections::BTreeSet;

use crate::record::JobKey;

/// Why a name means no job.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::cli) enum Unclear {
    /// There is none.
    #[error("no job \"{0}\" is here or remembered")]
    None(String),
    /// There are several.
    #[error("job \"{0}\" is ambiguous: it may be {1}")]
    Several(String, String),
}

/// How many of several jobs an error names.
const MOST_NAMED: usize = 8;

/// Finds a job by its key, by its machine's name, by its key without the try's number, by its number, or by the beginning of
/// its key. Of several tries of one job the last one is meant.
pub(in crate::cli) fn choose(keys: &[JobKey], name: &str) -> Result<JobKey, Unclear> {
    let ways: [&dyn Fn(&JobKey) -> bool; 4] = [
        &|key| key.to_string() == name || key.machine_name() == name,
        &|key| format!("{}-{}", key.coordinator, key.id) == name,
        &|key| key.id.to_string() == name,
        &|key| key.to_string().starts_with(name),
    ];
    for fits in ways {
        let found: Vec<&JobKey> = keys.iter().filter(|key| fits(key)).collect();
        let jobs: BTreeSet<(&str, u64)> = found
            .iter()
            .map(|key| (key.coordinator.as_str(), key.id))
            .collect();
        match (found.iter().max_by_key(|key| key.attempt), jobs.len()) {
            (None, _) => {}
            (Some(last), 1) => return Ok((*last).clone()),
            (Some(_), several) => {
                let mut names: Vec<String> = jobs
                    .iter()
                    .take(MOST_NAMED)
                    .map(|(coordinator, id)| format!("{coordinator}-{id}"))
                    .collect();
                if several > names.len() {
                    names.push("others".to_owned());
                }
                return Err(Unclear::Several(shown(name), names.join(", ")));
            }
        }
    }
    Err(Unclear::None(shown(name)))
}

fn shown(name: &str) -> String {
    crate::report::line(name, 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_found_by_key_number_and_beginning_and_its_last_try_is_meant() {
        let keys: Vec<JobKey> = [
            "aaaa1111-7-1",
            "aaaa1111-7-2",
            "aaaa1111-7-10",
            "aaaa1111-70-1",
            "bbbb2222-70-3",
            "bbbb2222-12345678-1",
            "12345678-5-1",
        ]
        .map(|key| key.parse().unwrap())
        .to_vec();
        let choose = |name: &str| choose(&keys, name).map(|key| key.to_string());
        for (name, expected) in [
            ("aaaa1111-7-1", "aaaa1111-7-1"),
            ("cannery-aaaa1111-7-2", "aaaa1111-7-2"),
            ("aaaa1111-7", "aaaa1111-7-10"),
            ("7", "aaaa1111-7-10"),
            ("bb", "bbbb2222-70-3"),
            ("bbbb2222-7", "bbbb2222-70-3"),
            ("bbbb2222-1", "bbbb2222-12345678-1"),
            // A number before the beginning of a key.
            ("12345678", "bbbb2222-12345678-1"),
            ("1234567", "12345678-5-1"),
        ] {
            let found = choose(name);
            if name == "bb" {
                assert_eq!(
                    found,
                    Err(Unclear::Several(
                        "bb".into(),
                        "bbbb2222-70, bbbb2222-12345678".into()
                    ))
                );
            } else {
                assert_eq!(found.as_deref(), Ok(expected), "{name}");
            }
        }
        let several = choose("70").unwrap_err();
        assert_eq!(
            several.to_string(),
            "job \"70\" is ambiguous: it may be aaaa1111-70, bbbb2222-70"
        );
        assert_eq!(
            choose("aaaa"),
            Err(Unclear::Several("aaaa".into(), "aaaa1111-7, aaaa1111-70".into()))
        );
        for name in ["8", "cccc", "-7", "x\u{1b}[2J\ny"] {
            let error = choose(name).unwrap_err();
            assert!(matches!(error, Unclear::None(_)), "{name}: {error}");
            assert!(!error.to_string().contains(char::is_control));
        }
        assert!(super::choose(&[], "").is_err());
    }
}
