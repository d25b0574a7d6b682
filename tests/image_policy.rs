//! The operator's rules for images, on layout folders and on a real registry; signatures made here with OpenSSL, and by
//! cosign itself, which `COSIGN_BIN` names.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on panics"
)]
#![allow(clippy::print_stderr, reason = "which peer was tried is worth a line")]

#[path = "support/image_fixture.rs"]
#[allow(dead_code, reason = "each suite uses its part of the fixture")]
mod image_fixture;
#[path = "support/registry_fixture.rs"]
#[allow(dead_code, reason = "each suite uses its part of the fixture")]
mod registry_fixture;

use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine as _;
use cannery::image::{
    Asker, Credentials, Digest, Disk, Error, Limits, PullPolicy, Registries, Request, Requirements,
    Signature, Silent, Store,
};
use image_fixture::{Image, Layout, OCI_TAR_GZIP, Tar, raw_disk};
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::sign::Signer;
use registry_fixture::Registry;
use serde_json::{Value, json};

const PAYLOAD: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// Somebody who signs.
struct Signatory {
    key: PKey<Private>,
    public: PathBuf,
}

impl Signatory {
    fn new(dir: &Path, name: &str) -> Self {
        let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
        let key = PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap();
        let public = dir.join(format!("{name}.pub"));
        std::fs::write(&public, key.public_key_to_pem().unwrap()).unwrap();
        Self { key, public }
    }

    /// The manifest of a signature, in the layout.
    fn signature(&self, layout: &Layout, digest: &str, repository: &str) -> Value {
        let payload = serde_json::to_vec(&json!({
            "critical": {
                "identity": {"docker-reference": repository},
                "image": {"docker-manifest-digest": digest},
                "type": "cosign container image signature",
            },
            "optional": null,
        }))
        .unwrap();
        let mut signer = Signer::new(MessageDigest::sha256(), &self.key).unwrap();
        let signature = signer.sign_oneshot_to_vec(&payload).unwrap();
        let mut layer = layout.blob(&payload, PAYLOAD);
        let text = base64::engine::general_purpose::STANDARD.encode(signature);
        layer["annotations"] = json!({"dev.cosignproject.cosign/signature": text});
        let config = layout.blob(b"{}", "application/vnd.oci.image.config.v1+json");
        let manifest =
            json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer]});
        layout.blob(&serde_json::to_vec(&manifest).unwrap(), MANIFEST)
    }

    /// Signs by the tag scheme.
    fn sign(&self, layout: &Layout, digest: &str, repository: &str) {
        let signature = self.signature(layout, digest, repository);
        layout.tag(&format!("{}.sig", digest.replace(':', "-")), signature);
    }

    /// Signs by a referrer, listed under the tag that stands in for the question.
    fn refer(&self, layout: &Layout, digest: &str, repository: &str) {
        let signature = self.signature(layout, digest, repository);
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [signature]});
        let index = layout.blob(&serde_json::to_vec(&index).unwrap(), INDEX);
        layout.tag(&digest.replace(':', "-"), index);
    }
}

fn request(reference: &str, pull: PullPolicy, policy: &Requirements) -> Request {
    Request {
        reference: reference.parse().unwrap(),
        architecture: "x86_64".to_owned(),
        policies: vec![pull],
        credentials: Credentials::none(),
        registries: Registries::without_tls([reference.split('/').next().unwrap()]),
        requirements: policy.clone(),
        asker: Asker::Operator,
        limits: Limits {
            max_disk: 64 << 20,
            keep_free: 0,
        },
    }
}

struct Bench {
    dir: tempfile::TempDir,
    layout: Layout,
    store: Store,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(&dir.path().join("layout"));
        let store = Store::open(&dir.path().join("store")).unwrap();
        Self { dir, layout, store }
    }

    fn provide(&self, reference: &str, pull: PullPolicy, policy: &Requirements) -> Result<Disk, Error> {
        let request = request(reference, pull, policy);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(self.store.provide(&request, &Silent))
    }

    /// What is said of the signatures.
    fn look(&self, reference: &str, policy: &Requirements) -> Vec<Signature> {
        let request = request(reference, PullPolicy::Always, policy);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime
            .block_on(self.store.look(&request, &Silent))
            .unwrap()
            .signatures
    }

    fn disks(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("store/disks"))
            .unwrap()
            .count()
    }
}

fn image() -> Image {
    let archive = Tar::new().dir("disk/").file("disk/disk.img", &raw_disk());
    Image::container_disk(&archive.bytes(), OCI_TAR_GZIP)
}

fn signed_by(signatories: &[&Signatory]) -> Requirements {
    Requirements {
        require_digest: false,
        signed_by: signatories.iter().map(|one| one.public.clone()).collect(),
    }
}

/// The rule and the reason of a refusal.
#[track_caller]
fn refused(result: Result<Disk, Error>) -> (&'static str, String) {
    match result {
        Err(Error::AgainstRule { rule, reason, .. }) => (rule, reason),
        other => panic!("{other:?}"),
    }
}

/// Registries tidy up, and anybody who may push can leave something broken beside an image.
#[test]
fn a_referrer_that_is_gone_keeps_no_other_from_counting() {
    let bench = Bench::new();
    let ours = Signatory::new(bench.dir.path(), "ours");
    let digest = bench.layout.add("vm", &image());
    let vm = bench.layout.reference("vm");
    let gone = json!({"mediaType": MANIFEST, "digest": format!("sha256:{}", "7".repeat(64)), "size": 500});
    let refer = |manifests: serde_json::Value| {
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests});
        let index = bench.layout.blob(&serde_json::to_vec(&index).unwrap(), INDEX);
        bench.layout.tag(&digest.replace(':', "-"), index);
    };
    refer(json!([gone]));
    let seen = bench.look(&vm, &Requirements::default());
    assert_eq!(seen[0].refused.as_deref(), Some("it cannot be read"));
    let policy = signed_by(&[&ours]);
    let (_, reason) = refused(bench.provide(&vm, PullPolicy::Always, &policy));
    assert_eq!(reason, "its signature is not by a key of that rule");
    refer(json!([gone, ours.signature(&bench.layout, &digest, "")]));
    assert!(bench.provide(&vm, PullPolicy::Always, &policy).is_ok());
}

#[test]
fn only_what_is_signed_is_fetched_and_it_starts_without_its_signature_later() {
    use PullPolicy::{Always, IfNotPresent, Never};
    let bench = Bench::new();
    let (ours, other) = (
        Signatory::new(bench.dir.path(), "ours"),
        Signatory::new(bench.dir.path(), "other"),
    );
    let digest = bench.layout.add("vm", &image());
    let vm = bench.layout.reference("vm");
    let policy = signed_by(&[&ours]);

    let (rule, reason) = refused(bench.provide(&vm, Always, &policy));
    assert_eq!((rule, reason.as_str()), ("signed_by", "it has no signature"));
    other.sign(&bench.layout, &digest, "");
    let (_, reason) = refused(bench.provide(&vm, Always, &policy));
    assert_eq!(reason, "its signature is not by a key of that rule");
    assert_eq!(
        bench.disks(),
        0,
        "nothing is fetched for an image that is refused"
    );

    ours.sign(&bench.layout, &digest, "");
    assert!(!bench.provide(&vm, Always, &policy).unwrap().from_cache);

    // The signature is gone, and what was found stays.
    let tag = format!("{}.sig", digest.replace(':', "-"));
    bench
        .layout
        .tag(&tag, json!({"mediaType": MANIFEST, "digest": digest, "size": 1}));
    for pull in [Always, IfNotPresent, Never] {
        assert!(bench.provide(&vm, pull, &policy).unwrap().from_cache, "{pull:?}");
    }
    // Another key is another question.
    let strict = signed_by(&[&other]);
    for pull in [Always, IfNotPresent] {
        assert!(bench.provide(&vm, pull, &strict).is_err(), "{pull:?}");
    }
    let (_, reason) = refused(bench.provide(&vm, Never, &strict));
    assert!(reason.contains("was not checked on this host yet"), "{reason}");
    assert!(
        bench
            .provide(&vm, Never, &signed_by(&[&other, &ours]))
            .unwrap()
            .from_cache
    );
}

#[test]
fn an_image_without_rules_earns_nothing_for_one_with_rules() {
    let bench = Bench::new();
    let ours = Signatory::new(bench.dir.path(), "ours");
    let digest = bench.layout.add("vm", &image());
    let vm = bench.layout.reference("vm");
    bench
        .provide(&vm, PullPolicy::Always, &Requirements::default())
        .unwrap();
    let (_, reason) = refused(bench.provide(&vm, PullPolicy::IfNotPresent, &signed_by(&[&ours])));
    assert_eq!(reason, "it has no signature");
    ours.refer(&bench.layout, &digest, "");
    let disk = bench
        .provide(&vm, PullPolicy::IfNotPresent, &signed_by(&[&ours]))
        .unwrap();
    assert!(
        disk.from_cache,
        "the disk is here; only its signature was asked for"
    );
}

#[test]
fn whoever_looks_at_an_image_sees_what_each_of_its_signatures_is_worth() {
    let bench = Bench::new();
    let (ours, other) = (
        Signatory::new(bench.dir.path(), "ours"),
        Signatory::new(bench.dir.path(), "other"),
    );
    let images = [image(), image().architecture("arm64")];
    let index = bench.layout.add_index("vm", &images);
    let vm = bench.layout.reference("vm");
    let policy = signed_by(&[&ours]);
    assert_eq!(bench.look(&vm, &policy), []);

    other.sign(&bench.layout, &index, "");
    ours.refer(&bench.layout, &index, "r.example.com/vm");
    let found = bench.look(&vm, &policy);
    let of = index.parse().unwrap();
    let foreign = Signature {
        of,
        key: None,
        repository: None,
        refused: None,
    };
    let good = Signature {
        key: Some(ours.public.clone()),
        repository: Some("r.example.com/vm".to_owned()),
        ..foreign.clone()
    };
    assert_eq!(found, [foreign.clone(), good]);
    // Without a rule nobody's counts, and all are told.
    let found = bench.look(&vm, &Requirements::default());
    assert_eq!(found, [foreign.clone(), foreign.clone()]);

    // Ours, of another image; and one that is none.
    let manifest = ours.signature(&bench.layout, &Digest::of(b"another").to_string(), "");
    let tag = format!("{}.sig", index.replace(':', "-"));
    bench.layout.tag(&tag, manifest);
    let found = bench.look(&vm, &policy);
    assert_eq!(found[0].key.as_ref(), Some(&ours.public));
    assert_eq!(
        found[0].refused.as_deref(),
        Some("its signature is one of another image")
    );
    let layer = bench.layout.blob(b"{}", PAYLOAD);
    let manifest = json!({"schemaVersion": 2, "config": layer, "layers": [layer]});
    let manifest = bench
        .layout
        .blob(&serde_json::to_vec(&manifest).unwrap(), MANIFEST);
    bench.layout.tag(&tag, manifest);
    assert_eq!(
        bench.look(&vm, &policy)[0].refused.as_deref(),
        Some("it cannot be read")
    );
}

#[test]
fn the_signature_of_an_index_covers_what_it_leads_to() {
    let bench = Bench::new();
    let ours = Signatory::new(bench.dir.path(), "ours");
    let index = bench
        .layout
        .add_index("vm", &[image(), image().architecture("arm64")]);
    ours.sign(&bench.layout, &index, "");
    let vm = bench.layout.reference("vm");
    bench
        .provide(&vm, PullPolicy::Always, &signed_by(&[&ours]))
        .unwrap();
}

#[test]
fn a_signature_is_bounded_as_everything_else() {
    let bench = Bench::new();
    let ours = Signatory::new(bench.dir.path(), "ours");
    let digest = bench.layout.add("vm", &image());
    let vm = bench.layout.reference("vm");
    let tag = format!("{}.sig", digest.replace(':', "-"));
    // A payload beyond any bound, and a hundred thousand of them.
    let mut layer = bench.layout.blob(&vec![b' '; 1 << 20], PAYLOAD);
    layer["annotations"] = json!({"dev.cosignproject.cosign/signature": "AAAA"});
    let config = bench
        .layout
        .blob(b"{}", "application/vnd.oci.image.config.v1+json");
    for count in [1, 100_000] {
        let layers = vec![layer.clone(); count];
        let manifest = json!({"schemaVersion": 2, "config": config, "layers": layers});
        let descriptor = bench
            .layout
            .blob(&serde_json::to_vec(&manifest).unwrap(), MANIFEST);
        bench.layout.tag(&tag, descriptor);
        assert!(
            bench
                .provide(&vm, PullPolicy::Always, &signed_by(&[&ours]))
                .is_err(),
            "{count}"
        );
    }
}

/// Copies everything in a layout to a repository.
fn push(registry: &Registry, layout: &Layout, tags: &[&str], repository: &str) {
    for tag in tags {
        registry.push(&layout.reference(tag), &format!("{repository}:{tag}"));
    }
}

#[test]
#[ignore = "needs docker-registry"]
fn signatures_of_a_registry_count_for_their_repository() {
    use PullPolicy::{Always, IfNotPresent};
    let bench = Bench::new();
    let mut registry = Registry::open();
    let ours = Signatory::new(bench.dir.path(), "ours");
    let policy = signed_by(&[&ours]);
    let digest = bench.layout.add("1", &image());
    let bare = digest.replace(':', "-");
    let name = |repository: &str| format!("{}/{repository}", registry.host);
    let (tagged, referred, moved) = (name("vm/tagged"), name("vm/referred"), name("vm/moved"));

    ours.sign(&bench.layout, &digest, &tagged);
    ours.refer(&bench.layout, &digest, &referred);
    push(
        &registry,
        &bench.layout,
        &["1", &format!("{bare}.sig")],
        "vm/tagged",
    );
    push(&registry, &bench.layout, &["1", &bare], "vm/referred");
    push(
        &registry,
        &bench.layout,
        &["1", &format!("{bare}.sig")],
        "vm/moved",
    );

    let (_, reason) = refused(bench.provide(&format!("{moved}:1"), Always, &policy));
    assert_eq!(reason, format!("it is signed as `{tagged}`"));
    bench.provide(&format!("{tagged}:1"), Always, &policy).unwrap();
    // The same digest, seen signed under another name.
    assert!(
        bench
            .provide(&format!("{moved}@{digest}"), IfNotPresent, &policy)
            .is_err()
    );
    registry.stop();
    let cached = bench
        .provide(&format!("{tagged}:1"), IfNotPresent, &policy)
        .unwrap();
    assert!(cached.from_cache);
    let registry = Registry::open();
    let referred = format!("{}/vm/referred", registry.host);
    ours.refer(&bench.layout, &digest, &referred);
    push(&registry, &bench.layout, &["1", &bare], "vm/referred");
    bench.provide(&format!("{referred}:1"), Always, &policy).unwrap();

    let pinned = Requirements {
        require_digest: true,
        ..policy
    };
    let (rule, _) = refused(bench.provide(&format!("{referred}:1"), Always, &pinned));
    assert_eq!(rule, "require_digest");
    bench
        .provide(&format!("{referred}@{digest}"), Always, &pinned)
        .unwrap();
}

#[test]
#[ignore = "needs docker-registry, and COSIGN_BIN"]
#[allow(
    clippy::disallowed_methods,
    reason = "tests are told by the environment where peers are"
)]
fn what_cosign_signs_counts() {
    let cosign = std::env::var_os("COSIGN_BIN").expect("COSIGN_BIN names cosign");
    let bench = Bench::new();
    let registry = Registry::open();
    let digest = bench.layout.add("1", &image());
    let run = |arguments: &[&str], experimental: &str| {
        let output = Command::new(&cosign)
            .args(arguments)
            .env("COSIGN_PASSWORD", "")
            .env("COSIGN_EXPERIMENTAL", experimental)
            .current_dir(bench.dir.path())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    run(&["generate-key-pair"], "0");
    let policy = Requirements {
        require_digest: false,
        signed_by: vec![bench.dir.path().join("cosign.pub")],
    };
    let common = [
        "sign",
        "--key",
        "cosign.key",
        "--tlog-upload=false",
        "--yes",
        "--allow-http-registry",
    ];
    for (repository, further) in [
        ("vm/tag", &[][..]),
        ("vm/referrer", &["--registry-referrers-mode=oci-1-1"]),
        (
            "vm/bundle",
            &["--new-bundle-format", "--use-signing-config=false"],
        ),
    ] {
        let fresh = Bench::new();
        push(&registry, &bench.layout, &["1"], repository);
        let name = format!("{}/{repository}", registry.host);
        let (_, reason) = refused(fresh.provide(&format!("{name}:1"), PullPolicy::Always, &policy));
        assert_eq!(reason, "it has no signature", "{repository}");
        run(
            &[&common[..], further, &[&format!("{name}@{digest}")]].concat(),
            "1",
        );
        fresh
            .provide(&format!("{name}:1"), PullPolicy::Always, &policy)
            .unwrap();
        eprintln!("{repository}: signed by cosign, and accepted");
    }
}
