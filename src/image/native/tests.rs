//! Whole images, through a layout folder: what a store provides is what was pushed.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use serde_json::json;

use super::*;
use crate::image::destination::Destination;
use crate::image::manifest::{self, Descriptor, Document, Manifest, OCI_IMAGE_MEDIA_TYPE};
use crate::image::registry::Registries;
use crate::image::registry::credentials::Credentials;
use crate::image::view::Guest;
use crate::image::{
    Asker, Digest, Disk, Error, Limits, PullPolicy, Reference, Request, Requirements, Silent, Store,
};

/// A folder with a layout, a store, and files to push.
struct Bench {
    dir: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
}

fn descriptor(blob: &Descriptor) -> serde_json::Value {
    json!({"mediaType": blob.media_type, "digest": blob.digest.to_string(), "size": blob.size})
}

impl Bench {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Self {
            dir: tempfile::tempdir().unwrap(),
            runtime: runtime.unwrap(),
        }
    }

    fn reference(&self, tag: &str) -> Reference {
        let text = format!("oci:{}:{tag}", self.dir.path().join("layout").display());
        text.parse().unwrap()
    }

    fn push(&self, tag: &str, files: [Option<&[u8]>; 3], base: Known) -> Manifest {
        let files = files.map(|bytes| bytes.map(|bytes| Box::new(bytes.to_vec()) as Box<dyn Guest + Send>));
        self.runtime.block_on(async {
            let (reference, credentials) = (self.reference(tag), Credentials::none());
            let destination = Destination::open(&reference, &credentials, &Registries::default())
                .await
                .unwrap();
            let order = Order {
                files,
                base,
                base_repository: None,
                level: 1,
                scratch: self.dir.path().to_owned(),
                meter: Arc::default(),
            };
            let written = push(order, &destination).await.unwrap();
            let config =
                json!({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}});
            let config = Bytes::from(config.to_string());
            let blob = Descriptor {
                media_type: manifest::IMAGE_CONFIG_MEDIA_TYPE.to_owned(),
                digest: Digest::of(&config),
                size: config.len() as u64,
                annotations: std::collections::BTreeMap::new(),
            };
            destination.upload(&blob.digest, config).await.unwrap();
            let layers: Vec<_> = written.layers.iter().map(descriptor).collect();
            let document = json!({
                "schemaVersion": 2, "mediaType": OCI_IMAGE_MEDIA_TYPE, "artifactType": ARTIFACT_TYPE,
                "config": descriptor(&blob), "layers": layers,
                "annotations": {CONTENT: written.content.to_string()},
            });
            let bytes = Bytes::from(document.to_string());
            destination
                .put_manifest(tag, OCI_IMAGE_MEDIA_TYPE, bytes.clone())
                .await
                .unwrap();
            match manifest::parse(&bytes).unwrap() {
                Document::Image(manifest) => manifest,
                Document::Index(_) => panic!("an image"),
            }
        })
    }

    fn blob(&self, digest: &Digest) -> PathBuf {
        self.dir.path().join("layout/blobs/sha256").join(digest.hex())
    }

    fn base(&self, manifest: &Manifest) -> Known {
        let mut base = base::Base::new(manifest).unwrap();
        for segment in base.segments().to_vec() {
            base.next(&std::fs::read(self.blob(&segment.digest)).unwrap())
                .unwrap();
        }
        base.finish().unwrap()
    }

    fn pull(&self, store: &Path, tag: &str) -> Result<Disk, Error> {
        let request = Request {
            reference: self.reference(tag),
            architecture: "x86_64".to_owned(),
            policies: vec![PullPolicy::Always],
            credentials: Credentials::none(),
            registries: Registries::default(),
            limits: Limits {
                max_disk: 1 << 30,
                keep_free: 0,
            },
            asker: Asker::Operator,
            requirements: Requirements::default(),
        };
        let store = Store::open(&self.dir.path().join(store)).unwrap();
        self.runtime.block_on(store.provide(&request, &Silent))
    }
}

fn disk() -> Vec<u8> {
    let mut state = 11_u64;
    let mut disk = vec![0; 40 << 20];
    for start in [0, 9 << 20, (40 << 20) - (2 << 20)] {
        for byte in disk.iter_mut().skip(start).take(2 << 20) {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            *byte = (state >> 59).to_le_bytes()[0];
        }
    }
    disk
}

#[test]
fn a_store_provides_what_was_pushed() {
    let bench = Bench::new();
    let disk = disk();
    bench.push("vm", [Some(&disk), None, None], Known::default());
    let pulled = bench.pull(Path::new("store"), "vm").unwrap();
    assert!(std::fs::read(&pulled.path).unwrap() == disk);
    assert_eq!(
        pulled.image_format.map(|format| format.to_string()).as_deref(),
        Some("native")
    );
    assert!(pulled.path.with_file_name(CHUNKS).exists());
}

#[test]
fn a_new_version_is_whole_without_the_old_one() {
    let bench = Bench::new();
    let mut disk = disk();
    let old = bench.push("vm", [Some(&disk), None, None], Known::default());
    disk[10 << 20..(10 << 20) + 5000].fill(0xee);
    let new = bench.push("new", [Some(&disk), None, None], bench.base(&old));
    let packs = |manifest: &Manifest| -> Vec<Digest> {
        let packs = manifest
            .layers
            .iter()
            .filter(|layer| layer.media_type == PACK_TYPE);
        packs.map(|pack| pack.digest).collect()
    };
    assert_eq!(
        packs(&new)[..1],
        packs(&old)[..],
        "the old pack is the new image's, too"
    );
    let pulled = bench.pull(Path::new("store"), "new").unwrap();
    assert!(std::fs::read(&pulled.path).unwrap() == disk);
}

#[test]
fn an_initial_ram_disk_without_a_kernel_is_refused() {
    let bench = Bench::new();
    let disk = disk();
    bench.push("vm", [Some(&disk), None, Some(&[7; 5000])], Known::default());
    let error = bench.pull(Path::new("store"), "vm").unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("has an initial RAM disk and no kernel"),
        "{error}"
    );
    let kernel = [7; 5000];
    bench.push(
        "vm",
        [Some(&disk), Some(&kernel), Some(&kernel)],
        Known::default(),
    );
    bench.pull(Path::new("store"), "vm").unwrap();
}

#[test]
fn an_index_that_lies_is_refused_before_what_it_names_is_fetched() {
    let bench = Bench::new();
    let disk = disk();
    let manifest = bench.push("vm", [Some(&disk), None, None], Known::default());
    let path = bench.dir.path().join("layout/index.json");
    let index: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let digest: Digest = index["manifests"][0]["digest"].as_str().unwrap().parse().unwrap();
    let honest = std::fs::read_to_string(bench.blob(&digest)).unwrap();
    let content = manifest.annotations[CONTENT].clone();
    for (what, lie) in [
        (
            "promises",
            honest.replace(&content, &Digest::of(b"else").to_string()),
        ),
        (
            "no digest in the annotation",
            honest.replace(CONTENT, "io.cannery.contents"),
        ),
        (
            "none of its layers",
            honest.replace(PACK_TYPE, "application/x-else"),
        ),
    ] {
        bench.runtime.block_on(async {
            let (reference, credentials) = (bench.reference("lie"), Credentials::none());
            let destination = Destination::open(&reference, &credentials, &Registries::default())
                .await
                .unwrap();
            destination
                .put_manifest("lie", OCI_IMAGE_MEDIA_TYPE, Bytes::from(lie))
                .await
                .unwrap();
        });
        let error = bench.pull(Path::new("lies"), "lie").unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{error}");
        assert!(error.to_string().contains(what), "{error}");
        assert_eq!(
            std::fs::read_dir(bench.dir.path().join("lies/disks"))
                .unwrap()
                .count(),
            0
        );
    }
}
