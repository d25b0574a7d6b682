//! Images made by hand: archives, manifests and OCI layout folders, honest ones and others.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

pub const OCI_TAR: &str = "application/vnd.oci.image.layer.v1.tar";
pub const OCI_TAR_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub const OCI_TAR_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// A tag in a layout's index.
const REF_NAME: &str = "org.opencontainers.image.ref.name";

pub fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// Data that no compression makes small, the same for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// A raw disk: a boot sector, some data, a hole.
pub fn raw_disk() -> Vec<u8> {
    let mut disk = noise(1, 300 * 1024);
    disk[510] = 0x55;
    disk[511] = 0xaa;
    disk.resize(2 << 20, 0);
    disk
}

/// The smallest qcow2: 64 KiB of empty disk in clusters of 512 bytes.
pub fn qcow2_disk() -> Vec<u8> {
    let mut file = vec![0; 512 * 4];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &9_u32.to_be_bytes());
    put(24, &65536_u64.to_be_bytes());
    put(36, &2_u32.to_be_bytes());
    put(40, &1536_u64.to_be_bytes());
    put(48, &512_u64.to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    put(512, &1024_u64.to_be_bytes());
    file
}

/// An archive in the making.
pub struct Tar(tar::Builder<Vec<u8>>);

impl Tar {
    pub fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    pub fn dir(self, name: &str) -> Self {
        self.entry(name, tar::EntryType::Directory, b"")
    }

    pub fn file(self, name: &str, bytes: &[u8]) -> Self {
        self.entry(name, tar::EntryType::Regular, bytes)
    }

    /// The name stands in the header as it is given, so that it can be a bad one.
    pub fn entry(mut self, name: &str, kind: tar::EntryType, bytes: &[u8]) -> Self {
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(0o444);
        header.set_uid(107);
        header.set_gid(107);
        header.set_size(bytes.len() as u64);
        header.set_cksum();
        self.0.append(&header, bytes).unwrap();
        self
    }

    pub fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

/// A frame of each MiB, as `pzstd` and cannery itself make them.
pub fn zstd_frames(bytes: &[u8]) -> Vec<u8> {
    bytes.chunks(1 << 20).flat_map(zstd).collect()
}

/// One image of a layout.
#[derive(Default)]
pub struct Image {
    /// Packed bytes and media type.
    pub layers: Vec<(Vec<u8>, String)>,
    pub labels: Vec<(String, String)>,
    pub architecture: Option<String>,
    /// Digests of unpacked layers; empty: the config says nothing.
    pub diff_ids: Vec<String>,
    /// Instead of an image config: the media type of an artifact's empty one.
    pub artifact: Option<String>,
    /// Annotations of layers, by their numbers.
    pub annotations: Vec<(usize, String, String)>,
}

impl Image {
    /// A containerDisk of one layer, packed as its type says.
    pub fn container_disk(archive: &[u8], media_type: &str) -> Self {
        let packed = match media_type {
            OCI_TAR_GZIP => gzip(archive),
            OCI_TAR_ZSTD => zstd_frames(archive),
            _ => archive.to_vec(),
        };
        Self {
            layers: vec![(packed, media_type.to_owned())],
            diff_ids: vec![sha256(archive)],
            ..Self::default()
        }
    }

    /// An artifact of one blob.
    pub fn plain(blob: Vec<u8>, media_type: &str) -> Self {
        Self {
            layers: vec![(blob, media_type.to_owned())],
            artifact: Some("application/vnd.oci.empty.v1+json".to_owned()),
            ..Self::default()
        }
    }

    /// Adds a layer with annotations.
    pub fn layer(mut self, bytes: Vec<u8>, media_type: &str, annotations: &[(&str, &str)]) -> Self {
        let number = self.layers.len();
        self.layers.push((bytes, media_type.to_owned()));
        let annotations = annotations
            .iter()
            .map(|(name, value)| (number, (*name).to_owned(), (*value).to_owned()));
        self.annotations.extend(annotations);
        self
    }

    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.labels.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn architecture(mut self, name: &str) -> Self {
        self.architecture = Some(name.to_owned());
        self
    }
}

/// An OCI layout folder.
pub struct Layout {
    pub dir: PathBuf,
}

impl Layout {
    pub fn new(dir: &Path) -> Self {
        std::fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
        std::fs::write(dir.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        let layout = Self { dir: dir.to_owned() };
        layout.write_index(&[]);
        layout
    }

    /// Adds an image under a tag; the digest of its manifest.
    pub fn add(&self, tag: &str, image: &Image) -> String {
        let descriptor = self.manifest(image);
        self.tag(tag, descriptor)
    }

    /// Adds several platforms' images under one tag, as an index; the digest of the index.
    pub fn add_index(&self, tag: &str, images: &[Image]) -> String {
        let manifests: Vec<Value> = images
            .iter()
            .map(|image| {
                let mut descriptor = self.manifest(image);
                let architecture = image.architecture.as_deref().unwrap_or("amd64");
                descriptor["platform"] = json!({"os": "linux", "architecture": architecture});
                descriptor
            })
            .collect();
        self.add_entries(tag, manifests)
    }

    /// Adds an index of descriptors; its digest.
    pub fn add_entries(&self, tag: &str, manifests: Vec<Value>) -> String {
        let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests});
        let descriptor = self.blob(&serde_json::to_vec(&index).unwrap(), OCI_INDEX);
        self.tag(tag, descriptor)
    }

    pub fn tag(&self, tag: &str, mut descriptor: Value) -> String {
        descriptor["annotations"] = json!({REF_NAME: tag});
        let digest = descriptor["digest"].as_str().unwrap().to_owned();
        let mut entries = self.index();
        entries.retain(|entry| entry["annotations"][REF_NAME] != tag);
        entries.push(descriptor);
        self.write_index(&entries);
        digest
    }

    /// Writes an image; the descriptor of its manifest.
    pub fn manifest(&self, image: &Image) -> Value {
        let config = match &image.artifact {
            Some(media_type) => self.blob(b"{}", media_type),
            None => {
                let labels: serde_json::Map<String, Value> = image
                    .labels
                    .iter()
                    .map(|(name, value)| (name.clone(), value.clone().into()))
                    .collect();
                let config = json!({
                    "os": "linux",
                    "architecture": image.architecture.as_deref().unwrap_or("amd64"),
                    "config": {"Labels": labels},
                    "rootfs": {"type": "layers", "diff_ids": image.diff_ids},
                });
                self.blob(&serde_json::to_vec(&config).unwrap(), OCI_CONFIG)
            }
        };
        let mut layers: Vec<Value> = image
            .layers
            .iter()
            .map(|(bytes, media_type)| self.blob(bytes, media_type))
            .collect();
        for (number, name, value) in &image.annotations {
            layers[*number]["annotations"][name] = json!(value);
        }
        let manifest = json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers
        });
        self.blob(&serde_json::to_vec(&manifest).unwrap(), OCI_MANIFEST)
    }

    /// Writes a blob; its descriptor.
    pub fn blob(&self, bytes: &[u8], media_type: &str) -> Value {
        let digest = sha256(bytes);
        std::fs::write(self.path(&digest), bytes).unwrap();
        json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    }

    pub fn path(&self, digest: &str) -> PathBuf {
        self.dir
            .join("blobs/sha256")
            .join(digest.trim_start_matches("sha256:"))
    }

    pub fn reference(&self, tag: &str) -> String {
        format!("oci:{}:{tag}", self.dir.display())
    }

    fn index(&self) -> Vec<Value> {
        let index: Value =
            serde_json::from_slice(&std::fs::read(self.dir.join("index.json")).unwrap()).unwrap();
        index["manifests"].as_array().unwrap().clone()
    }

    fn write_index(&self, manifests: &[Value]) {
        let index = json!({"schemaVersion": 2, "manifests": manifests});
        std::fs::write(self.dir.join("index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
    }
}
