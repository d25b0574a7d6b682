//! Writes an OCI layout folder (OCI image specification, `image-layout.md`).
//!
//! Blobs appear under their digests whole, by a rename. The index is replaced whole, too, while a lock on the folder keeps
//! other writers of ours out.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::super::digest::Digest;
use super::super::error::Error;
use super::super::layout::REF_NAME;
use super::super::manifest::OCI_IMAGE_INDEX_MEDIA_TYPE;

/// A layout folder that is written to.
#[derive(Debug, Clone)]
pub(in crate::image) struct LayoutWriter {
    dir: PathBuf,
}

impl LayoutWriter {
    /// Opens a folder, and makes it a layout if it is empty or does not exist.
    pub(super) fn open(dir: &Path) -> Result<Self, Error> {
        let writer = Self { dir: dir.to_owned() };
        let blobs = writer.blobs();
        fs::create_dir_all(&blobs).map_err(Error::storage(&blobs))?;
        let marker = dir.join("oci-layout");
        if !marker.exists() {
            replace(&marker, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        }
        Ok(writer)
    }

    fn blobs(&self) -> PathBuf {
        self.dir.join("blobs").join("sha256")
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.blobs().join(digest.hex())
    }

    pub(super) fn has_blob(&self, digest: &Digest) -> Result<Option<u64>, Error> {
        let path = self.path(digest);
        match fs::metadata(&path) {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::storage(path)(error)),
        }
    }

    pub(super) async fn put_blob(&self, digest: &Digest, bytes: Bytes) -> Result<(), Error> {
        let path = self.path(digest);
        blocking(&self.dir, move || replace(&path, &bytes)).await
    }

    pub(super) async fn blob(&self) -> Result<Blob, Error> {
        let blobs = self.blobs();
        let path = scratch(&blobs.join("blob"));
        let at = path.clone();
        let file = blocking(&self.dir, move || {
            File::create_new(&at).map_err(Error::storage(&at))
        })
        .await?;
        Ok(Blob {
            blobs,
            file: Some(file),
            scratch: Scratch(path),
        })
    }

    pub(super) async fn put_manifest(
        &self,
        name: &str,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<Digest, Error> {
        let digest = Digest::of(&bytes);
        let size = bytes.len();
        self.put_blob(&digest, bytes).await?;
        if name.parse::<Digest>().is_ok() {
            return Ok(digest);
        }
        let (dir, name, media_type) = (self.dir.clone(), name.to_owned(), media_type.to_owned());
        blocking(&self.dir, move || {
            let entry = json!({
                "mediaType": media_type, "digest": digest.to_string(), "size": size,
                "annotations": {REF_NAME: name},
            });
            let folder = File::open(&dir).map_err(Error::storage(&dir))?;
            folder.lock().map_err(Error::storage(&dir))?;
            let path = dir.join("index.json");
            let old = match fs::read(&path) {
                Ok(old) => Some(old),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(Error::storage(path)(error)),
            };
            let index = with_entry(old.as_deref(), &name, entry)
                .map_err(|error| Error::storage(&path)(io::Error::other(error)))?;
            replace(&path, &index)
        })
        .await?;
        Ok(digest)
    }
}

/// A layout's index with one more entry, which takes its tag over from all others.
fn with_entry(old: Option<&[u8]>, tag: &str, entry: Value) -> Result<Vec<u8>, &'static str> {
    const NO_INDEX: &str = "it is no image index";
    let mut index: Map<String, Value> = match old {
        Some(old) => serde_json::from_slice(old).map_err(|_| NO_INDEX)?,
        None => Map::from_iter([
            ("schemaVersion".to_owned(), json!(2)),
            ("mediaType".to_owned(), json!(OCI_IMAGE_INDEX_MEDIA_TYPE)),
        ]),
    };
    let entries = index
        .entry("manifests")
        .or_insert_with(|| json!([]))
        .as_array_mut()
        .ok_or(NO_INDEX)?;
    entries.retain(|entry| entry["annotations"][REF_NAME] != tag);
    entries.push(entry);
    serde_json::to_vec(&index).map_err(|_| NO_INDEX)
}

/// A blob in the making.
#[derive(Debug)]
pub(in crate::image) struct Blob {
    blobs: PathBuf,
    /// Absent only while a thread writes to it.
    file: Option<File>,
    scratch: Scratch,
}

/// A file that goes with this value.
#[derive(Debug)]
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // Renamed already is as good.
        drop(fs::remove_file(&self.0));
    }
}

impl Blob {
    pub(super) async fn write(&mut self, bytes: Bytes) -> Result<(), Error> {
        self.with_file(move |file| file.write_all(&bytes)).await
    }

    pub(super) async fn finish(mut self, digest: &Digest) -> Result<(), Error> {
        self.with_file(|file| file.sync_all()).await?;
        let target = self.blobs.join(digest.hex());
        let (from, blobs) = (self.scratch.0.clone(), self.blobs.clone());
        blocking(&self.blobs, move || {
            fs::rename(&from, &target).map_err(Error::storage(&target))?;
            sync(&blobs)
        })
        .await
    }

    async fn with_file(
        &mut self,
        work: impl FnOnce(&mut File) -> io::Result<()> + Send + 'static,
    ) -> Result<(), Error> {
        let path = self.scratch.0.clone();
        let Some(mut file) = self.file.take() else {
            return Err(Error::storage(path)(io::ErrorKind::Interrupted.into()));
        };
        let at = path.clone();
        self.file = Some(
            blocking(&path, move || {
                work(&mut file).map_err(Error::storage(at))?;
                Ok(file)
            })
            .await?,
        );
        Ok(())
    }
}

/// Runs file work on a thread of its own.
async fn blocking<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(panic) => match panic.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => Err(Error::storage(path)(io::Error::other(error))),
        },
    }
}

/// A name beside `path` that nobody else has.
fn scratch(path: &Path) -> PathBuf {
    path.with_extension(format!("{}.tmp", uuid::Uuid::new_v4().simple()))
}

/// Puts a file in its place whole.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let scratch = Scratch(scratch(path));
    let written = || {
        let mut file = File::create_new(&scratch.0)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&scratch.0, path)
    };
    written().map_err(Error::storage(path))?;
    path.parent().map_or(Ok(()), sync)
}

/// Makes a rename last.
fn sync(dir: &Path) -> Result<(), Error> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(Error::storage(dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tags(dir: &Path) -> Vec<(String, String)> {
        let index: Value = serde_json::from_slice(&fs::read(dir.join("index.json")).unwrap()).unwrap();
        let entries = index["manifests"].as_array().unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        entries
            .iter()
            .map(|entry| (text(&entry["annotations"][REF_NAME]), text(&entry["digest"])))
            .collect()
    }

    #[tokio::test]
    async fn a_tag_moves_and_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let writer = LayoutWriter::open(dir.path()).unwrap();
        let put = async |name: &str, bytes: &'static str| {
            let writer = LayoutWriter::open(dir.path()).unwrap();
            writer
                .put_manifest(name, "m", Bytes::from_static(bytes.as_bytes()))
                .await
                .unwrap()
        };
        let (a, _, c) = (put("1", "a").await, put("2", "b").await, put("1", "c").await);
        let b = Digest::of(b"b");
        assert_eq!(
            tags(dir.path()),
            [("2".to_owned(), b.to_string()), ("1".to_owned(), c.to_string())]
        );
        // The old manifest stays, and one that is named by its digest gets no tag.
        assert_eq!(writer.has_blob(&a).unwrap(), Some(1));
        let child = Digest::of(b"child");
        assert_eq!(put(&child.to_string(), "child").await, child);
        assert_eq!(tags(dir.path()).len(), 2);
        assert_eq!(writer.has_blob(&Digest::of(b"nothing")).unwrap(), None);
    }

    #[tokio::test]
    async fn a_blob_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let writer = LayoutWriter::open(dir.path()).unwrap();
        let files = || fs::read_dir(dir.path().join("blobs/sha256")).unwrap().count();
        let mut blob = writer.blob().await.unwrap();
        blob.write(Bytes::from_static(b"one")).await.unwrap();
        let digest = Digest::of(b"onetwo");
        assert_eq!(writer.has_blob(&digest).unwrap(), None);
        blob.write(Bytes::from_static(b"two")).await.unwrap();
        blob.finish(&digest).await.unwrap();
        assert_eq!((writer.has_blob(&digest).unwrap(), files()), (Some(6), 1));
        let mut dropped = writer.blob().await.unwrap();
        dropped.write(Bytes::from_static(b"x")).await.unwrap();
        drop(dropped);
        assert_eq!(files(), 1);
    }

    #[test]
    fn what_is_no_index_is_not_overwritten() {
        for old in ["[]", "{", r#"{"manifests": {}}"#] {
            assert!(with_entry(Some(old.as_bytes()), "1", json!({})).is_err(), "{old}");
        }
        let kept = with_entry(Some(br#"{"schemaVersion": 2, "x": 1}"#), "1", json!({})).unwrap();
        assert!(String::from_utf8(kept).unwrap().contains(r#""x":1"#));
    }
}
