//! Who may have an image that is here already.
//!
//! An image that was fetched with credentials is private. That another job brought it to this host is no reason to give it to
//! whoever names it: its registry is asked with the asking job's own credentials, and what it allows is remembered for a while.
//!
//! | known about the image | the job may have it |
//! |---|---|
//! | a registry gave it without credentials | yes |
//! | it came from the file, folder or web server that the job names | yes: the operator lists which those may be |
//! | it came from the repository that the job names, and the registry let this project's login have it a short while ago | yes |
//! | it came from the repository that the job names | if the registry says so now |
//! | it came from elsewhere | once all its bytes were seen to come from there, too: whoever only knows a digest has no right to the image |
//!
//! A grant is a file whose name is a hash over a secret of this host, the project, the repository, the login and the digest. It
//! holds no login and none can be guessed from it.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::files::{entries, read_record, remove, serialised};
use super::{Store, VERSION};
use crate::image::digest::{Digest, Hasher};
use crate::image::error::Error;
use crate::image::registry::credentials::Login;
use crate::kill::{self, Point};

/// Bytes of the secret that grants are hashed with.
const SECRET_BYTES: usize = 32;
const SECRET: &str = "secret";
/// Only who asked may see to whom something was granted.
const GRANTS_DIR_MODE: u32 = 0o700;
const GRANT_MODE: u32 = 0o600;

/// Grants are kept for at least so long, though they may count for less: runners whose settings differ share a store, and none is
/// to take the others' away.
const KEPT_FOR: Duration = Duration::from_secs(3600);

/// On whose behalf an image is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asker {
    /// Whoever may read the store anyway.
    Operator,
    /// A job, which gets what its own credentials give it.
    Job {
        /// Whose: the GitLab instance and the project's full path.
        project: String,
        /// For how long a registry's word is good.
        auth_ttl: Duration,
        /// For how long it is good while the registry cannot be reached.
        offline_ttl: Duration,
    },
}

/// What is known about an image and a place before anybody is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::image) enum Standing {
    /// Everybody may have it.
    Public,
    /// It came from there; only the registry can say who may have it.
    Private,
    /// It did not come from there.
    Elsewhere,
}

/// A file in `origins/HEX/`.
#[derive(Debug, Serialize, Deserialize)]
struct Origin {
    version: u32,
    place: String,
    public: bool,
    seen: Timestamp,
}

/// Who asks where, as a grant is about it.
#[derive(Debug, Clone, Copy)]
pub(in crate::image) struct Plea<'a> {
    pub(in crate::image) project: &'a str,
    /// The repository.
    pub(in crate::image) place: &'a str,
    pub(in crate::image) login: Option<&'a Login>,
    pub(in crate::image) digest: &'a Digest,
}

impl Store {
    /// How an image stands with a place.
    pub(in crate::image) fn standing(&self, digest: &Digest, place: &str) -> Result<Standing, Error> {
        let mut standing = Standing::Elsewhere;
        for entry in entries(&self.origins(digest))? {
            let Some(origin) = read_record::<Origin>(&entry.path())? else {
                continue;
            };
            if origin.public {
                return Ok(Standing::Public);
            }
            if origin.place == place {
                standing = Standing::Private;
            }
        }
        Ok(standing)
    }

    /// Notes that all bytes of an image were seen to come from a place.
    pub(in crate::image) fn note_origin(
        &self,
        digest: &Digest,
        place: &str,
        public: bool,
    ) -> Result<(), Error> {
        let path = self.origin(digest, place);
        let origin = Origin {
            version: VERSION,
            place: place.to_owned(),
            public,
            seen: Timestamp::now(),
        };
        self.write_small(&path, &serialised(&origin, &path)?)?;
        kill::point(Point::OriginKept);
        Ok(())
    }

    /// Notes whether a place gives an image to everybody, now that it was asked again. A place from which the image was never
    /// seen to come has no say.
    pub(in crate::image) fn renew_origin(
        &self,
        digest: &Digest,
        place: &str,
        public: bool,
    ) -> Result<(), Error> {
        match read_record::<Origin>(&self.origin(digest, place))? {
            Some(known) if known.public != public => self.note_origin(digest, place, public),
            _ => Ok(()),
        }
    }

    /// Remembers that a registry let somebody have an image.
    pub(in crate::image) fn grant(&self, plea: &Plea<'_>, keep: Duration) -> Result<(), Error> {
        let dir = self.grants();
        if !dir.is_dir() {
            super::files::make_dirs(dir.parent().unwrap_or(&self.dir), &crate::record::hidden)?;
            match DirBuilder::new().mode(GRANTS_DIR_MODE).create(&dir) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(Error::storage(dir)(error));
                }
                _ => {}
            }
        }
        self.sweep_grants(keep.max(KEPT_FOR))?;
        let path = dir.join(name(&self.secret()?, plea));
        self.write_small_in(&dir, &path, b"", GRANT_MODE)?;
        kill::point(Point::GrantKept);
        Ok(())
    }

    /// How long ago a registry let somebody have an image, as far as that is remembered.
    pub(in crate::image) fn granted(&self, plea: &Plea<'_>) -> Option<Duration> {
        // Who has no secret yet has granted nothing.
        let secret = fs::read(self.grants().join(SECRET)).ok()?;
        let modified = fs::metadata(self.grants().join(name(&secret, plea))).and_then(|data| data.modified());
        // One from the future was granted by a clock that was set back since: nobody knows when.
        SystemTime::now().duration_since(modified.ok()?).ok()
    }

    /// The secret that this user's grants are hashed with.
    fn secret(&self) -> Result<Vec<u8>, Error> {
        let dir = self.grants();
        let path = dir.join(SECRET);
        loop {
            match fs::read(&path) {
                Ok(secret) if secret.len() == SECRET_BYTES => return Ok(secret),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(Error::storage(path)(error)),
            }
            let mut secret = [0; SECRET_BYTES];
            openssl::rand::rand_bytes(&mut secret)
                .map_err(|error| Error::storage(&path)(io::Error::other(error)))?;
            // Of two that make one at once the later counts; the earlier's grant is asked for again.
            self.write_small_in(&dir, &path, &secret, GRANT_MODE)?;
        }
    }

    /// Removes grants that nobody would count any more.
    fn sweep_grants(&self, keep: Duration) -> Result<(), Error> {
        for entry in entries(&self.grants())? {
            let modified = entry.metadata().and_then(|data| data.modified());
            let old =
                modified.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age > keep));
            if old && entry.file_name() != SECRET {
                remove(&entry.path())?;
            }
        }
        Ok(())
    }

    fn origin(&self, digest: &Digest, place: &str) -> PathBuf {
        let name = format!("{}.json", Digest::of(place.as_bytes()).hex());
        self.origins(digest).join(name)
    }

    fn origins(&self, digest: &Digest) -> PathBuf {
        self.dir.join("origins").join(digest.hex())
    }

    /// Each user has grants of its own: the file mode says so, and root does not take another's word.
    fn grants(&self) -> PathBuf {
        self.dir
            .join("grants")
            .join(rustix::process::geteuid().as_raw().to_string())
    }
}

/// The file's name of a grant.
fn name(secret: &[u8], plea: &Plea<'_>) -> String {
    let mut hasher = Hasher::default();
    let digest = plea.digest.to_string();
    let (user, password) = plea
        .login
        .map_or(("", ""), |login| (login.user.as_str(), login.password.reveal()));
    let anonymous: &[u8] = if plea.login.is_none() { b"anonymous" } else { b"" };
    for part in [
        secret,
        plea.project.as_bytes(),
        plea.place.as_bytes(),
        digest.as_bytes(),
        anonymous,
        user.as_bytes(),
        password.as_bytes(),
    ] {
        // With its length, so that no two lists of parts run together into the same bytes.
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finish().hex()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;
    use crate::secret::Secret;

    fn login(user: &str, password: &str) -> Login {
        Login {
            user: user.to_owned(),
            password: Secret::new(password),
            origin: crate::image::Origin::JobGiven,
        }
    }

    #[test]
    fn a_grant_is_for_one_project_login_repository_and_image() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let (digest, other) = (Digest::of(b"vm"), Digest::of(b"other"));
        let (sesame, open) = (login("ci", "sesame"), login("ci", "open"));
        let plea = Plea {
            project: "https://gitlab.example.com grp/demo",
            place: "r.example.com/vm",
            login: Some(&sesame),
            digest: &digest,
        };
        assert_eq!(store.granted(&plea), None);
        store.grant(&plea, Duration::from_secs(60)).unwrap();
        assert!(store.granted(&plea).unwrap() < Duration::from_secs(10));
        let shifted = login("cis", "esame");
        for another in [
            Plea {
                project: "https://gitlab.example.com grp/demo2",
                ..plea
            },
            Plea {
                place: "r.example.com/vm2",
                ..plea
            },
            Plea {
                login: Some(&open),
                ..plea
            },
            Plea {
                login: Some(&shifted),
                ..plea
            },
            Plea { login: None, ..plea },
            Plea {
                digest: &other,
                ..plea
            },
        ] {
            assert_eq!(store.granted(&another), None, "{another:?}");
        }
    }

    #[test]
    fn grants_are_private_hold_nothing_and_go_with_age() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let (digest, sesame) = (Digest::of(b"vm"), login("ci", "sesame"));
        let plea = |project| Plea {
            project,
            place: "r.example.com/vm",
            login: Some(&sesame),
            digest: &digest,
        };
        store.grant(&plea("one"), Duration::from_secs(60)).unwrap();
        assert_eq!(store.grants().metadata().unwrap().mode() & 0o7777, 0o700);
        for entry in fs::read_dir(store.grants()).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().mode() & 0o7777, 0o600);
            if entry.file_name() != SECRET {
                assert_eq!(entry.metadata().unwrap().len(), 0);
            }
        }
        std::thread::sleep(Duration::from_millis(20));
        // Whose own grants count for less takes no others' away.
        store.grant(&plea("two"), Duration::ZERO).unwrap();
        assert!(store.granted(&plea("one")).is_some());
        store.sweep_grants(Duration::from_millis(10)).unwrap();
        assert_eq!(store.granted(&plea("one")), None, "swept");
        store.grant(&plea("one"), Duration::ZERO).unwrap();
        assert!(store.granted(&plea("one")).is_some(), "the secret stays");
    }

    #[test]
    fn an_image_is_private_until_some_place_gives_it_to_everybody() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let digest = Digest::of(b"vm");
        let standing = |place| store.standing(&digest, place).unwrap();
        assert_eq!(standing("r/a"), Standing::Elsewhere);
        store.note_origin(&digest, "r/a", false).unwrap();
        assert_eq!(
            (standing("r/a"), standing("r/b")),
            (Standing::Private, Standing::Elsewhere)
        );
        store.note_origin(&digest, "r/b", true).unwrap();
        assert_eq!(
            (standing("r/a"), standing("r/b")),
            (Standing::Public, Standing::Public)
        );
        // The repository was closed since, and one that never had the image changes nothing.
        store.renew_origin(&digest, "r/b", false).unwrap();
        store.renew_origin(&digest, "r/c", true).unwrap();
        assert_eq!(
            (standing("r/a"), standing("r/c")),
            (Standing::Private, Standing::Elsewhere)
        );
    }
}
