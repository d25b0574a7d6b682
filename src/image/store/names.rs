//! Which digest a name had when it was last asked for.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::files::{entries, read_record, serialised};
use super::{Store, VERSION};
use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::reference::Reference;
use crate::kill::{self, Point};

/// Deepest folder below `refs/` that is looked into: a repository has at most 255 characters, every second a slash.
const DEPTH_MAX: usize = 140;

/// A name, and what it means on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    /// The reference, written out.
    pub reference: String,
    /// For which machines: `x86_64` or `aarch64`.
    pub architecture: String,
    /// The image that it leads to, whether that is here or not.
    pub digest: Digest,
    /// When a registry last said so, or the operator.
    pub asked: Timestamp,
}

/// A file in `refs/`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Ref {
    version: u32,
    reference: String,
    digest: Digest,
    asked: Timestamp,
}

impl Store {
    /// The digest that a name had when it was last asked for, whether its disk is here or not.
    ///
    /// # Errors
    /// [`Error::Storage`] when what is written down cannot be read.
    pub fn reference(&self, reference: &Reference, architecture: &str) -> Result<Option<Digest>, Error> {
        let written: Option<Ref> = read_record(&self.name_path(reference, architecture))?;
        let same = |found: &Ref| found.version == VERSION && found.reference == reference.to_string();
        Ok(written.filter(same).map(|found| found.digest))
    }

    /// Gives a name to a digest: what a registry said, or what the operator wants it to mean here.
    ///
    /// # Errors
    /// [`Error::Storage`] when it cannot be written.
    pub fn remember(&self, reference: &Reference, architecture: &str, digest: &Digest) -> Result<(), Error> {
        let path = self.name_path(reference, architecture);
        let written = Ref {
            version: VERSION,
            reference: reference.to_string(),
            digest: *digest,
            asked: Timestamp::now(),
        };
        self.write_small(&path, &serialised(&written, &path)?)?;
        kill::point(Point::ReferenceKept);
        Ok(())
    }

    /// Forgets a name; whether there was one.
    ///
    /// # Errors
    /// [`Error::Storage`] when it cannot be removed.
    pub fn forget(&self, reference: &Reference, architecture: &str) -> Result<bool, Error> {
        let path = self.name_path(reference, architecture);
        match fs::remove_file(&path) {
            Ok(()) => {
                kill::point(Point::ReferenceForgotten);
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Error::storage(path)(error)),
        }
    }

    /// All names, in order.
    ///
    /// # Errors
    /// [`Error::Storage`] when the store cannot be read.
    pub fn names(&self) -> Result<Vec<Name>, Error> {
        let mut names: Vec<Name> = self.name_files()?.into_iter().map(|(_, name)| name).collect();
        names.sort_by(|a, b| (&a.reference, &a.architecture).cmp(&(&b.reference, &b.architecture)));
        Ok(names)
    }

    /// Forgets all names that lead to images that `keep` does not want.
    pub(super) fn forget_names(&self, keep: impl Fn(&Digest) -> bool) -> Result<(), Error> {
        for (path, name) in self.name_files()? {
            if !keep(&name.digest) {
                super::files::remove(&path)?;
                kill::point(Point::ReferenceForgotten);
            }
        }
        Ok(())
    }

    fn name_files(&self) -> Result<Vec<(PathBuf, Name)>, Error> {
        let mut found = Vec::new();
        let mut folders = vec![(self.dir.join("refs"), 0)];
        while let Some((folder, depth)) = folders.pop() {
            for entry in entries(&folder)? {
                let path = entry.path();
                let kind = entry.file_type().map_err(Error::storage(&path))?;
                if kind.is_dir() && depth < DEPTH_MAX {
                    folders.push((path, depth + 1));
                } else if kind.is_file()
                    && let Some(architecture) = architecture_of(&path)
                    && let Some(written) = read_record::<Ref>(&path)?
                    && written.version == VERSION
                {
                    let name = Name {
                        reference: written.reference,
                        architecture,
                        digest: written.digest,
                        asked: written.asked,
                    };
                    found.push((path, name));
                }
            }
        }
        Ok(found)
    }

    fn name_path(&self, reference: &Reference, architecture: &str) -> PathBuf {
        self.dir.join("refs").join(ref_path(reference, architecture))
    }
}

/// The machine that a file of `refs/` is for: `NAME@ARCHITECTURE.json`.
fn architecture_of(path: &Path) -> Option<String> {
    let stem = path.file_name()?.to_str()?.strip_suffix(".json")?;
    Some(stem.rsplit_once('@')?.1.to_owned())
}

/// Where a name's digest is written down, below `refs/`.
///
/// No part of a repository begins with an underscore, so names and repositories cannot meet.
fn ref_path(reference: &Reference, architecture: &str) -> PathBuf {
    match reference {
        Reference::Registry {
            registry, repository, ..
        } => Path::new(registry)
            .join(repository)
            .join("_")
            .join(format!("{}@{architecture}.json", reference.version())),
        Reference::Layout { .. } | Reference::File { .. } | Reference::Web { .. } => {
            let folder = match reference {
                Reference::Layout { .. } => "_layouts",
                _ => "_files",
            };
            let name = Digest::of(reference.to_string().as_bytes()).hex();
            Path::new(folder).join(format!("{name}@{architecture}.json"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_kept_listed_and_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let (one, two) = (Digest::of(b"one"), Digest::of(b"two"));
        let pinned = format!("r.example.com/vm@{two}");
        let references: Vec<Reference> = ["r.example.com:5000/a/vm:1", "oci:/srv/vms:1", &pinned]
            .map(|text| text.parse().unwrap())
            .into();
        for (reference, digest) in references.iter().zip([one, two, two]) {
            assert_eq!(store.reference(reference, "x86_64").unwrap(), None);
            store.remember(reference, "x86_64", &digest).unwrap();
            assert_eq!(store.reference(reference, "x86_64").unwrap(), Some(digest));
            assert_eq!(store.reference(reference, "aarch64").unwrap(), None);
        }
        let names = |store: &Store| -> Vec<(String, Digest)> {
            let names = store.names().unwrap();
            names
                .into_iter()
                .map(|name| (name.reference, name.digest))
                .collect()
        };
        assert_eq!(
            names(&store),
            [
                ("oci:/srv/vms:1".to_owned(), two),
                ("r.example.com/vm@".to_owned() + &two.to_string(), two),
                ("r.example.com:5000/a/vm:1".to_owned(), one),
            ]
        );
        assert!(store.forget(&references[1], "x86_64").unwrap());
        assert!(!store.forget(&references[1], "x86_64").unwrap());
        store.forget_names(|digest| *digest == one).unwrap();
        assert_eq!(names(&store), [("r.example.com:5000/a/vm:1".to_owned(), one)]);
    }
}
