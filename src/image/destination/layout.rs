//! Writes an OCI layout folder (OCI image specification, `image-layout.md`).
//!
//! Blobs get their names, which are their digests, when they are whole. The index is replaced whole, too, while a lock on the
//! folder keeps other writers of ours out.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::super::digest::Digest;
use super::super::error::Error;
use super::super::layout::REF_NAME;
use super::super::manifest::OCI_IMAGE_INDEX_MEDIA_TYPE;
use crate::record::{Unnamed, folder_of};

/// What says that a folder is a layout.
const MARKER: &str = "oci-layout";

/// What else a layout has; one of another program may lack the marker.
const PARTS: [&str; 2] = ["blobs", "index.json"];

/// Who may use a layout's files is for the umask to say.
const MODE: u32 = 0o666;

/// A layout folder that is written to.
#[derive(Debug, Clone)]
pub(in crate::image) struct LayoutWriter {
    dir: PathBuf,
}

impl LayoutWriter {
    /// Opens a layout, and makes a folder one that is empty or does not exist. `image` is its name for the error.
    pub(super) fn open(dir: &Path, image: &str) -> Result<Self, Error> {
        fs::create_dir_all(dir).map_err(Error::storage(dir))?;
        let marker = dir.join(MARKER);
        if !marker.exists() {
            let names = fs::read_dir(dir).map_err(Error::storage(dir))?;
            for entry in names {
                let name = entry.map_err(Error::storage(dir))?.file_name();
                // One that another process has just made, or is making, is one.
                if !PARTS.iter().any(|part| name == *part) && name != MARKER && !is_scratch(&name) {
                    return Err(Error::Unsupported {
                        image: image.to_owned(),
                        reason: "the folder is neither empty nor an OCI layout".to_owned(),
                    });
                }
            }
            put(&marker, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        }
        let writer = Self { dir: dir.to_owned() };
        let blobs = writer.blobs();
        fs::create_dir_all(&blobs).map_err(Error::storage(&blobs))?;
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
        blocking(&self.dir, move || put(&path, &bytes)).await
    }

    pub(super) async fn blob(&self) -> Result<Blob, Error> {
        let blobs = self.blobs();
        let at = blobs.clone();
        let file = blocking(&self.dir, move || {
            Unnamed::begin(&at, MODE).map_err(Error::storage(&at))
        })
        .await?;
        Ok(Blob {
            blobs,
            file: Some(file),
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
            let through = path.with_extension(SCRATCH);
            let replaced = whole(&path, &index).and_then(|file| file.replace(&path, &through));
            replaced.map_err(Error::storage(&path))
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
    file: Option<Unnamed>,
}

impl Blob {
    pub(super) async fn write(&mut self, bytes: Bytes) -> Result<(), Error> {
        self.with_file(move |file| file.file().write_all(&bytes)).await
    }

    pub(super) async fn finish(mut self, digest: &Digest) -> Result<(), Error> {
        let target = self.blobs.join(digest.hex());
        self.with_file(move |file| name(file, &target)).await
    }

    async fn with_file(
        &mut self,
        work: impl FnOnce(&Unnamed) -> io::Result<()> + Send + 'static,
    ) -> Result<(), Error> {
        let at = self.blobs.clone();
        let Some(file) = self.file.take() else {
            return Err(Error::storage(at)(io::ErrorKind::Interrupted.into()));
        };
        self.file = Some(
            blocking(&self.blobs, move || {
                work(&file).map_err(Error::storage(at))?;
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

/// How a file's name ends that is only there to be renamed.
const SCRATCH: &str = "tmp";

/// Is it the name of a file on its way, where a file system lets none be without?
fn is_scratch(name: &OsStr) -> bool {
    Path::new(name)
        .extension()
        .is_some_and(|ending| ending == SCRATCH)
}

/// Puts a file in its place whole; one that is there already says the same.
fn put(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let named = whole(path, bytes).and_then(|file| name(&file, path));
    named.map_err(Error::storage(path))
}

/// A file with these bytes, which is to have its name beside `path`.
fn whole(path: &Path, bytes: &[u8]) -> io::Result<Unnamed> {
    let file = Unnamed::begin(folder_of(path), MODE)?;
    file.file().write_all(bytes)?;
    Ok(file)
}

/// Gives a file its name. One of that name and another length is damaged, and makes room for it.
fn name(file: &Unnamed, path: &Path) -> io::Result<()> {
    let length = || Ok::<_, io::Error>((file.file().metadata()?.len(), fs::metadata(path)?.len()));
    match file.name(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => match length()? {
            (ours, theirs) if ours == theirs => Ok(()),
            _ => file.replace(path, &path.with_extension(SCRATCH)),
        },
        named => named,
    }
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
        let writer = LayoutWriter::open(dir.path(), "vm").unwrap();
        let put = async |name: &str, bytes: &'static str| {
            let writer = LayoutWriter::open(dir.path(), "vm").unwrap();
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
        let writer = LayoutWriter::open(dir.path(), "vm").unwrap();
        let files = || fs::read_dir(dir.path().join("blobs/sha256")).unwrap().count();
        let mut blob = writer.blob().await.unwrap();
        blob.write(Bytes::from_static(b"one")).await.unwrap();
        let digest = Digest::of(b"onetwo");
        assert_eq!(writer.has_blob(&digest).unwrap(), None);
        blob.write(Bytes::from_static(b"two")).await.unwrap();
        blob.finish(&digest).await.unwrap();
        assert_eq!((writer.has_blob(&digest).unwrap(), files()), (Some(6), 1));
        // One that is damaged is mended, and one that is whole is there already.
        let path = writer.path(&digest);
        for bytes in ["one", "onetwo"] {
            fs::write(&path, bytes).unwrap();
            let mut again = writer.blob().await.unwrap();
            again.write(Bytes::from_static(b"onetwo")).await.unwrap();
            again.finish(&digest).await.unwrap();
            assert_eq!((fs::read(&path).unwrap(), files()), (b"onetwo".to_vec(), 1));
        }
        // What ends us while a blob is written leaves nothing: it has no name yet.
        let mut dropped = writer.blob().await.unwrap();
        dropped.write(Bytes::from_static(b"x")).await.unwrap();
        assert_eq!(files(), 1);
        drop(dropped);
        assert_eq!(files(), 1);
    }

    #[test]
    fn a_folder_becomes_a_layout_if_nothing_else_is_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["new/deep", "empty", "killed/blobs/sha256"] {
            fs::create_dir_all(at(name)).unwrap();
        }
        fs::remove_dir(at("new/deep")).unwrap();
        for name in ["new/deep", "empty", "killed", "killed"] {
            LayoutWriter::open(&at(name), "vm").unwrap();
            assert!(at(name).join("oci-layout").exists() && at(name).join("blobs/sha256").exists());
        }
        fs::create_dir(at("home")).unwrap();
        fs::write(at("home/letter"), "dear").unwrap();
        let error = LayoutWriter::open(&at("home"), "vm").unwrap_err().to_string();
        assert!(error.contains("neither empty nor"), "{error}");
        assert_eq!(fs::read_dir(at("home")).unwrap().count(), 1);
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
