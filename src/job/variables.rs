//! The variables of a job, for whoever enters its guest beside its scripts.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::Environment;
use crate::record;

/// What gitlab-runner writes before the name of a job's variable.
const PREFIX: &[u8] = b"CUSTOM_ENV_";
/// Variables hold tokens and passwords.
const MODE: u32 = 0o600;
/// Names that shells keep for themselves: to set one ends some of them.
const OF_SHELLS: [&str; 8] = [
    "BASHOPTS",
    "BASH_VERSINFO",
    "EUID",
    "IFS",
    "PPID",
    "PS4",
    "SHELLOPTS",
    "UID",
];

/// Names and values, of any bytes but zero.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Variables(Vec<(String, Vec<u8>)>);

impl std::fmt::Debug for Variables {
    /// Names only: the values hold the job's secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.0.iter().map(|(name, _)| name))
            .finish()
    }
}

impl Variables {
    /// The job's variables in the environment of a call. Those whose names no shell knows are left out.
    pub fn of(environment: &Environment) -> Self {
        let mut variables: Vec<(String, Vec<u8>)> = Vec::new();
        for (name, value) in &environment.0 {
            if let Some(name) = name_of(name) {
                variables.retain(|(before, _)| *before != name);
                variables.push((name, value.as_bytes().to_vec()));
            }
        }
        Self(variables)
    }

    /// Writes them into a file that only its owner may read.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let mut text = Vec::new();
        for (name, value) in &self.0 {
            text.extend_from_slice(name.as_bytes());
            text.push(b'=');
            text.extend_from_slice(value);
            text.push(0);
        }
        record::write_atomic(path, &text, MODE)
    }

    /// What was written; nothing where there is no such file.
    ///
    /// # Errors
    /// It is there and cannot be read.
    pub fn load(path: &Path) -> io::Result<Self> {
        let text = match std::fs::read(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            text => text?,
        };
        let variable = |line: &[u8]| {
            let at = line.iter().position(|b| *b == b'=')?;
            let name = String::from_utf8(line[..at].to_vec()).ok()?;
            Some((name, line[at + 1..].to_vec()))
        };
        Ok(Self(text.split(|b| *b == 0).filter_map(variable).collect()))
    }

    /// The lines by which a POSIX shell gets them.
    pub fn exports(&self) -> Vec<u8> {
        let mut text = Vec::new();
        for (name, value) in &self.0 {
            text.extend_from_slice(format!("export {name}='").as_bytes());
            for byte in value {
                match byte {
                    b'\'' => text.extend_from_slice(b"'\\''"),
                    byte => text.push(*byte),
                }
            }
            text.extend_from_slice(b"'\n");
        }
        text
    }
}

fn name_of(variable: &OsString) -> Option<String> {
    let name = variable.as_bytes().strip_prefix(PREFIX)?;
    let name = std::str::from_utf8(name).ok()?;
    let mut letters = name.bytes();
    let first = letters.next()?;
    let fine = (first.is_ascii_alphabetic() || first == b'_')
        && letters.all(|b| b.is_ascii_alphanumeric() || b == b'_')
        && !OF_SHELLS.contains(&name);
    fine.then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::ffi::OsStringExt;

    fn environment(pairs: &[(&str, &[u8])]) -> Environment {
        pairs
            .iter()
            .map(|(name, value)| (OsString::from(name), OsString::from_vec(value.to_vec())))
            .collect()
    }

    #[test]
    fn only_the_jobs_own_variables_are_taken_and_the_last_of_a_name() {
        let variables = Variables::of(&environment(&[
            ("PATH", b"/bin"),
            ("CUSTOM_ENV_A", b"1"),
            ("CUSTOM_ENV_A", b"2"),
            ("CUSTOM_ENV_a b", b"x"),
            ("CUSTOM_ENV_1", b"x"),
            ("CUSTOM_ENV_", b"x"),
            ("CUSTOM_ENV_UID", b"0"),
            ("CUSTOM_ENV__B2", b"y"),
        ]));
        assert_eq!(variables.exports(), b"export A='2'\nexport _B2='y'\n");
        assert_eq!(format!("{variables:?}"), "[\"A\", \"_B2\"]");
    }

    proptest! {
        #[test]
        fn any_value_comes_through_the_file_and_the_shell(value in proptest::collection::vec(1..=255u8, 0..60)) {
            let variables = Variables::of(&environment(&[("CUSTOM_ENV_V", &value), ("CUSTOM_ENV_W", b"w")]));
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("environment");
            variables.save(&file).unwrap();
            prop_assert_eq!(Variables::load(&file).unwrap(), variables.clone());
            let mut script = variables.exports();
            script.extend_from_slice(b"printf '%s' \"$V$W\"\n");
            std::fs::write(folder.path().join("script"), &script).unwrap();
            let output = std::process::Command::new("sh").arg(folder.path().join("script")).output().unwrap();
            prop_assert_eq!(output.stdout, [value.as_slice(), b"w"].concat());
        }
    }
}
