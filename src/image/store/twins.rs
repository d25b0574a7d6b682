//! Images whose bytes are here already under another digest: a new version of which only the labels have changed, or a second name
//! of the same disk.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::sum::Sum;
use super::{INITRD, KERNEL, Store, Verdict, disk_name};
use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::format::{Format, Selected};

/// What the names of linked files begin with, so that they are none of those that layers are unpacked to.
const PREFIX: &str = "twin.";

/// The files of such an image, linked into a folder.
#[derive(Debug)]
pub(in crate::image) struct Twin {
    /// What the image came as.
    pub(in crate::image) format: Format,
    /// Its files, in the folder.
    pub(in crate::image) files: Selected,
    /// Their sums.
    pub(in crate::image) sums: Vec<(PathBuf, Sum)>,
}

impl Store {
    /// Links the files of an image that was made of the same layers into `dir`, after all their bytes were seen to be those that
    /// came. `may_have` says of which images the asker may have the bytes. One whose files the system does not let this user link,
    /// since they are another's, is none.
    ///
    /// # Errors
    /// [`Error::Storage`] when the store cannot be read, or a link cannot be made.
    pub(in crate::image) fn twin(
        &self,
        made_of: &Digest,
        may_have: impl Fn(&Digest) -> Result<bool, Error>,
        dir: &Path,
    ) -> Result<Option<Twin>, Error> {
        for disk in self.list()? {
            let Some(record) = self.record(&disk.digest)? else {
                continue;
            };
            if record.made_of != Some(*made_of) || !may_have(&disk.digest)? {
                continue;
            }
            // It may be removed at any moment; once it is leased, it is not.
            let Some(_lease) = self.lease(&disk.digest)? else {
                continue;
            };
            let sums: Option<Vec<_>> = record
                .files
                .iter()
                .map(|file| Some((file.name.as_str(), file.sum?)))
                .collect();
            let (Some(sums), Some(format)) = (sums, record.image_format) else {
                continue;
            };
            // Links share their bytes: damage would be shared, too, and be called whole.
            if self.verify(&disk.digest)? != Some(Verdict::Whole) {
                continue;
            }
            let Some(linked) = link(&self.disk_dir(&disk.digest), sums, dir)? else {
                continue;
            };
            let of = |name: &str| {
                let link = dir.join(format!("{PREFIX}{name}"));
                linked.iter().any(|(path, _)| *path == link).then_some(link)
            };
            let Some(disk) = of(disk_name(record.format)) else {
                continue;
            };
            return Ok(Some(Twin {
                format,
                files: Selected {
                    disk,
                    kernel: of(KERNEL),
                    initrd: of(INITRD),
                },
                sums: linked,
            }));
        }
        Ok(None)
    }
}

/// Links files of an image into `dir`; none, and none of them, where one cannot have another name.
fn link(image: &Path, sums: Vec<(&str, Sum)>, dir: &Path) -> Result<Option<Vec<(PathBuf, Sum)>>, Error> {
    let mut linked = Vec::new();
    for (name, sum) in sums {
        let link = dir.join(format!("{PREFIX}{name}"));
        // From a call that was killed.
        super::remove(&link)?;
        match fs::hard_link(image.join(name), &link) {
            Ok(()) => linked.push((link, sum)),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::PermissionDenied | io::ErrorKind::TooManyLinks
                ) =>
            {
                tracing::debug!(%error, "the same disk is fetched again");
                for (link, _) in linked {
                    super::remove(&link)?;
                }
                return Ok(None);
            }
            Err(error) => return Err(Error::storage(&link)(error)),
        }
    }
    Ok(Some(linked))
}
