//! Whether an image's bytes are still those that were put here.

use std::fs::{self, File};

use super::{RecordedFile, Store, listed, sum};
use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::reference::Reference;

const NO_RECORD: &str = "its image.json cannot be read";

/// How an image was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// All bytes are as they were put here.
    Whole,
    /// They are not, or some are missing.
    Damaged {
        /// Which file, and how.
        reason: String,
    },
    /// It came before sums were recorded.
    Unknown,
}

impl Store {
    /// Reads an image's files and compares them with what was recorded when they came. What is found damaged is given to nobody
    /// from then on. None when it is not here, or just being removed.
    ///
    /// Reads as fast as the machine can; the caller sees to it that nobody suffers.
    ///
    /// # Errors
    /// [`Error::Storage`] when a file cannot be read for another reason than that it is missing or its medium damaged.
    pub fn verify(&self, digest: &Digest) -> Result<Option<Verdict>, Error> {
        let Some(_lease) = self.lease(digest)? else {
            return Ok(None);
        };
        let verdict = self.judge(digest)?;
        match verdict {
            Verdict::Damaged { ref reason } => self.is_no_more_whole(digest, reason)?,
            // Now that all of it was seen to be here, it is good for use again.
            Verdict::Whole => {
                if self.is_doubtful(digest)? {
                    self.settle(digest)?;
                }
                self.is_whole(digest)?;
            }
            Verdict::Unknown => {}
        }
        Ok(Some(verdict))
    }

    /// Why an image that is here is given to nobody: it was found damaged before, or a file is missing or has another length. Its
    /// bytes are not read. None when nothing is seen, or the image is not here.
    ///
    /// # Errors
    /// [`Error::Storage`].
    pub fn damage(&self, digest: &Digest) -> Result<Option<String>, Error> {
        if !self.disk_dir(digest).is_dir() {
            return Ok(None);
        }
        if let Ok(reason) = fs::read_to_string(self.damaged_path(digest)) {
            // Older versions noted none.
            let noted = !reason.is_empty();
            return Ok(Some(if noted {
                reason
            } else {
                "it was found damaged".to_owned()
            }));
        }
        let Some(record) = self.record(digest)? else {
            return Ok(Some(NO_RECORD.to_owned()));
        };
        for file in &record.files {
            if let Err(reason) = self.opened(digest, file)? {
                return Ok(Some(reason));
            }
        }
        Ok(None)
    }

    fn judge(&self, digest: &Digest) -> Result<Verdict, Error> {
        let damaged = |reason: String| Ok(Verdict::Damaged { reason });
        let Some(record) = self.record(digest)? else {
            return damaged(NO_RECORD.to_owned());
        };
        let mut verdict = Verdict::Whole;
        for file in &record.files {
            match self.judge_file(digest, file)? {
                Verdict::Whole => {}
                Verdict::Unknown => verdict = Verdict::Unknown,
                damaged => return Ok(damaged),
            }
        }
        Ok(verdict)
    }

    /// A file of an image, if it is there and has its length; else what is wrong.
    fn opened(&self, digest: &Digest, file: &RecordedFile) -> Result<Result<File, String>, Error> {
        let path = self.disk_dir(digest).join(&file.name);
        let name = &file.name;
        let opened = match File::open(&path) {
            Ok(opened) => opened,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Err(format!("{name} is missing")));
            }
            Err(error) => return Err(Error::storage(path)(error)),
        };
        let length = opened.metadata().map_err(Error::storage(&path))?.len();
        Ok(if length == file.length {
            Ok(opened)
        } else {
            Err(format!("{name} has {length} bytes instead of {}", file.length))
        })
    }

    fn judge_file(&self, digest: &Digest, file: &RecordedFile) -> Result<Verdict, Error> {
        let path = self.disk_dir(digest).join(&file.name);
        let damaged = |reason: String| Ok(Verdict::Damaged { reason });
        let name = &file.name;
        let opened = match self.opened(digest, file)? {
            Ok(opened) => opened,
            Err(reason) => return damaged(reason),
        };
        let same = match file.sum {
            Some(expected) => sum::is_of_file(&expected, &opened),
            None if file.listed => {
                let sums = File::open(self.disk_dir(digest).join(listed::NAME));
                sums.and_then(|sums| listed::holds(&opened, &sums))
            }
            None => return Ok(Verdict::Unknown),
        };
        match same {
            Ok(true) => Ok(Verdict::Whole),
            Ok(false) => damaged(format!("{name} has other bytes than those that came")),
            // What the medium cannot give back is damage, too.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {
                damaged(format!("{name} cannot be read: {error}"))
            }
            Err(error) => Err(Error::storage(path)(error)),
        }
    }

    /// Where an image came from, so that it can be fetched again: by its digest, where the place has names for those.
    ///
    /// # Errors
    /// [`Error::Storage`].
    pub fn source_of(&self, digest: &Digest) -> Result<Option<Reference>, Error> {
        let reference = self
            .record(digest)?
            .and_then(|record| record.reference.parse().ok());
        Ok(reference.map(|reference| match reference {
            Reference::Registry {
                registry,
                repository,
                tag,
                ..
            } => Reference::Registry {
                registry,
                repository,
                tag,
                digest: Some(*digest),
            },
            other => other,
        }))
    }

    /// Was it found damaged, and not mended since?
    pub(super) fn is_damaged(&self, digest: &Digest) -> bool {
        self.damaged_path(digest).exists()
    }

    /// It is given to nobody until it was fetched again.
    pub(super) fn is_no_more_whole(&self, digest: &Digest, reason: &str) -> Result<(), Error> {
        self.write_durably(&self.damaged_path(digest), reason.as_bytes())
    }

    /// It has just been put here, whole.
    pub(super) fn is_whole(&self, digest: &Digest) -> Result<(), Error> {
        match fs::remove_file(self.damaged_path(digest)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::storage(self.damaged_path(digest))(error))
            }
            _ => Ok(()),
        }
    }

    fn damaged_path(&self, digest: &Digest) -> std::path::PathBuf {
        self.dir.join("damaged").join(digest.hex())
    }
}
