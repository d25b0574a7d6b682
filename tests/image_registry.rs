//! Images from a real registry: Debian's docker-registry on loopback, filled by skopeo.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on panics"
)]
#![allow(clippy::print_stdout, reason = "a child tells its parent what it saw")]

#[path = "support/image_fixture.rs"]
#[allow(dead_code, reason = "each suite uses its part of the fixture")]
mod image_fixture;
#[path = "support/registry_fixture.rs"]
#[allow(dead_code, reason = "each suite uses its part of the fixture")]
mod registry_fixture;

use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use cannery::image::{
    Credentials, CredentialsError, Digest, Disk, Error, Event, Limits, Origin, Progress, PullPolicy,
    Registries, Request, Requirements, Silent, Store,
};
use cannery::secret::Secret;
use image_fixture::{Image, Layout, OCI_TAR, OCI_TAR_GZIP, OCI_TAR_ZSTD, Tar, noise, raw_disk, sha256, zstd};
use registry_fixture::{PASSWORD, Registry, USER};

fn request(reference: &str, policies: &[PullPolicy]) -> Request {
    Request {
        reference: reference.parse().unwrap(),
        architecture: "x86_64".to_owned(),
        policies: policies.to_vec(),
        credentials: Credentials::none(),
        registries: Registries::without_tls([reference.split('/').next().unwrap()]),
        requirements: Requirements::default(),
        limits: Limits {
            max_disk: 1 << 30,
            keep_free: 0,
        },
        asker: cannery::image::Asker::Operator,
    }
}

fn provide(store: &Store, request: &Request, progress: &dyn Progress) -> Result<Disk, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(store.provide(request, progress))
}

fn always(store: &Store, reference: &str) -> Result<Disk, Error> {
    provide(store, &request(reference, &[PullPolicy::Always]), &Silent)
}

fn container_disk(disk: &[u8]) -> Image {
    Image::container_disk(
        &Tar::new().dir("disk/").file("disk/disk.img", disk).bytes(),
        OCI_TAR_GZIP,
    )
}

struct Bench {
    dir: tempfile::TempDir,
    layout: Layout,
    registry: Registry,
    store: Store,
}

impl Bench {
    fn new(registry: Registry) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(&dir.path().join("layout"));
        let store = Store::open(&dir.path().join("store")).unwrap();
        Self {
            dir,
            layout,
            registry,
            store,
        }
    }

    /// Puts an image into the registry; its reference.
    fn push(&self, image: &Image) -> String {
        self.layout.add("vm", image);
        self.registry.push(&self.layout.reference("vm"), "team/vm:1");
        format!("{}/team/vm:1", self.registry.host)
    }

    fn partial(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("store/partial"))
            .unwrap()
            .count()
    }
}

#[derive(Default)]
struct Heard(Mutex<Vec<String>>);

impl Progress for Heard {
    fn event(&self, event: Event<'_>) {
        let text = match event {
            Event::Fetching { done, total } => format!("Fetching {done}/{total}"),
            Event::Unpacking { .. } => "Unpacking".to_owned(),
            Event::Waiting { .. } => "Waiting".to_owned(),
            Event::Resolved { .. } => "Resolved".to_owned(),
            Event::Cached { .. } => "Cached".to_owned(),
            Event::Verified { .. } => "Verified".to_owned(),
            Event::PolicyFailed { error } => format!("PolicyFailed: {error}"),
            other => format!("{other:?}"),
        };
        self.0.lock().unwrap().push(text);
    }
}

#[test]
#[ignore = "needs docker-registry and skopeo"]
fn an_image_comes_once_and_stays() {
    let mut bench = Bench::new(Registry::open());
    let image = container_disk(&raw_disk());
    let layer = sha256(&image.layers[0].0);
    let reference = bench.push(&image);
    let heard = Heard::default();
    let disk = provide(&bench.store, &request(&reference, &[PullPolicy::Always]), &heard).unwrap();
    assert!(std::fs::read(&disk.path).unwrap() == raw_disk());
    assert_eq!(disk.fetched_bytes, image.layers[0].0.len() as u64);
    let size = image.layers[0].0.len();
    let heard = heard.0.into_inner().unwrap();
    assert_eq!(heard.first().unwrap(), "Resolved");
    assert_eq!(heard.last().unwrap(), "Verified");
    assert!(heard.contains(&format!("Fetching {size}/{size}")), "{heard:?}");
    assert!(always(&bench.store, &reference).unwrap().from_cache);
    assert_eq!(bench.registry.downloads(&layer), 1);
    // Neither a digest nor the other policies need the registry now.
    bench.registry.stop();
    let pinned = format!("{}/team/vm@{}", bench.registry.host, disk.digest);
    assert!(always(&bench.store, &pinned).unwrap().from_cache);
    for policy in [PullPolicy::IfNotPresent, PullPolicy::Never] {
        assert!(
            provide(&bench.store, &request(&reference, &[policy]), &Silent)
                .unwrap()
                .from_cache
        );
    }
    let start = Instant::now();
    let error = always(&bench.store, &reference).unwrap_err();
    assert!(
        matches!(error, Error::Unreachable { .. }) && error.to_string().contains("refused"),
        "{error}"
    );
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    let heard = Heard::default();
    let both = request(&reference, &[PullPolicy::Always, PullPolicy::IfNotPresent]);
    assert!(provide(&bench.store, &both, &heard).unwrap().from_cache);
    assert!(
        heard
            .0
            .into_inner()
            .unwrap()
            .iter()
            .any(|text| text.contains("cannot be reached"))
    );
}

#[test]
#[ignore = "needs docker-registry and skopeo"]
fn a_digest_is_enough_and_needs_no_network_twice() {
    let mut bench = Bench::new(Registry::open());
    let digest = bench.layout.add("vm", &container_disk(&raw_disk()));
    bench.registry.push(&bench.layout.reference("vm"), "team/vm:1");
    let pinned = format!("{}/team/vm@{digest}", bench.registry.host);
    assert_eq!(always(&bench.store, &pinned).unwrap().digest.to_string(), digest);
    bench.registry.stop();
    assert!(always(&bench.store, &pinned).unwrap().from_cache);
}

#[test]
#[ignore = "needs docker-registry and skopeo"]
fn an_index_is_followed_and_docker_manifests_are_read() {
    let bench = Bench::new(Registry::open());
    let image = |seed: u64, architecture: &str| {
        let archive = Tar::new().file("disk/disk.img", &noise(seed, 8192)).bytes();
        Image::container_disk(&archive, OCI_TAR_ZSTD).architecture(architecture)
    };
    let index = bench
        .layout
        .add_index("vm", &[image(1, "arm64"), image(2, "amd64")]);
    bench.registry.push(&bench.layout.reference("vm"), "vm:multi");
    let disk = always(&bench.store, &format!("{}/vm:multi", bench.registry.host)).unwrap();
    assert!(std::fs::read(&disk.path).unwrap() == noise(2, 8192));
    assert_ne!(disk.digest.to_string(), index);
    let pinned = always(&bench.store, &format!("{}/vm@{index}", bench.registry.host)).unwrap();
    assert_eq!((pinned.digest, pinned.from_cache), (disk.digest, true));
    bench.layout.add("docker", &container_disk(&raw_disk()));
    let status = Command::new("skopeo")
        .args([
            "copy",
            "--quiet",
            "--dest-tls-verify=false",
            "--format=v2s2",
            &bench.layout.reference("docker"),
        ])
        .arg(format!("docker://{}/vm:docker", bench.registry.host))
        .status()
        .unwrap();
    assert!(status.success());
    let disk = always(&bench.store, &format!("{}/vm:docker", bench.registry.host)).unwrap();
    assert!(std::fs::read(&disk.path).unwrap() == raw_disk());
}

#[test]
#[ignore = "needs docker-registry and skopeo"]
fn passwords_are_asked_for_and_given() {
    let bench = Bench::new(Registry::with_password());
    let reference = bench.push(&container_disk(&raw_disk()));
    let error = always(&bench.store, &reference).unwrap_err();
    assert!(matches!(error, Error::Denied { user: None, .. }), "{error}");
    assert!(error.to_string().ends_with("without credentials"), "{error}");
    let with = |credentials: Credentials, policies: &[PullPolicy]| {
        let mut request = request(&reference, policies);
        request.credentials = credentials;
        provide(&bench.store, &request, &Silent)
    };
    let wrong = || Credentials::basic(&bench.registry.host, USER, Secret::new("open"));
    let error = with(wrong(), &[PullPolicy::Always]).unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("refuses the login of `ci` given by the job"),
        "{error}"
    );
    assert!(!format!("{error:?}").contains("open"));
    let config = format!(
        r#"{{"auths": {{"{}/team": {{"username": "{USER}", "password": "{PASSWORD}"}}}}}}"#,
        bench.registry.host
    );
    let right = Credentials::from_docker_config(&config, Origin::JobGiven).unwrap();
    assert!(!with(right, &[PullPolicy::Always]).unwrap().from_cache);
    // A denial ends it: no other policy hands out the cached disk.
    let error = with(wrong(), &[PullPolicy::Always, PullPolicy::IfNotPresent]).unwrap_err();
    let refused = matches!(error, Error::Credentials(CredentialsError::Refused { .. }));
    assert!(refused, "{error}");
}

#[test]
#[ignore = "needs docker-registry, skopeo and openssl"]
fn a_certificate_must_be_trusted() {
    let bench = Bench::new(Registry::with_tls());
    let reference = bench.push(&container_disk(&raw_disk()));
    let mut request = request(&reference, &[PullPolicy::Always]);
    request.registries.plain_http.clear();
    let error = provide(&bench.store, &request, &Silent).unwrap_err();
    assert!(
        matches!(error, Error::Unreachable { .. }) && error.to_string().contains("certificate"),
        "{error}"
    );
    for wrong in ["/dev/null", "/nowhere.pem"] {
        request.registries.ca_files = vec![wrong.into()];
        let error = provide(&bench.store, &request, &Silent).unwrap_err();
        assert!(
            matches!(error, Error::CaFile { .. }) && error.to_string().contains(wrong),
            "{error}"
        );
    }
    request.registries.ca_files = vec![bench.registry.certificate()];
    assert!(provide(&bench.store, &request, &Silent).is_ok());
}

#[test]
#[ignore = "needs docker-registry and skopeo"]
fn what_the_registry_does_not_have_does_not_exist() {
    let bench = Bench::new(Registry::open());
    let reference = bench.push(&container_disk(&raw_disk()));
    for name in [
        "team/vm:2".to_owned(),
        "other:1".to_owned(),
        format!("team/vm@{}", Digest::of(b"x")),
    ] {
        let error = always(&bench.store, &format!("{}/{name}", bench.registry.host)).unwrap_err();
        assert!(matches!(error, Error::NotFound { .. }), "{error}");
    }
    assert!(always(&bench.store, &reference).is_ok());
}

#[test]
#[ignore = "needs docker-registry and skopeo"]
fn a_damaged_registry_is_noticed_and_leaves_nothing() {
    let bench = Bench::new(Registry::open());
    let image = container_disk(&raw_disk());
    let layer = sha256(&image.layers[0].0);
    let reference = bench.push(&image);
    let file = bench.registry.blob(&layer);
    let whole = std::fs::read(&file).unwrap();
    let mut damaged = whole.clone();
    damaged[150_000] ^= 1;
    std::fs::write(&file, damaged).unwrap();
    let error = always(&bench.store, &reference).unwrap_err();
    assert!(
        matches!(error, Error::Corrupt { .. }) && error.to_string().contains(&layer),
        "{error}"
    );
    std::fs::remove_file(&file).unwrap();
    let error = always(&bench.store, &reference).unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    assert_eq!((bench.partial(), bench.store.list().unwrap().len()), (0, 0));
    std::fs::write(&file, whole).unwrap();
    assert!(always(&bench.store, &reference).is_ok());
}

#[test]
#[ignore = "needs docker-registry, skopeo and root for a small tmpfs"]
fn a_full_disk_is_named_and_others_keep_theirs() {
    struct Mount(tempfile::TempDir);
    impl Drop for Mount {
        fn drop(&mut self) {
            assert!(
                Command::new("umount")
                    .arg(self.0.path())
                    .status()
                    .unwrap()
                    .success()
            );
        }
    }
    let bench = Bench::new(Registry::open());
    let small = bench.push(&container_disk(&raw_disk()));
    let mount = Mount(tempfile::tempdir().unwrap());
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"])
        .arg(mount.0.path())
        .status()
        .unwrap();
    assert!(mounted.success(), "mounting a tmpfs needs root");
    let store = Store::open(&mount.0.path().join("store")).unwrap();
    let kept = always(&store, &small).unwrap();
    for (image, what) in [
        // Packed bytes that alone do not fit are refused before one of them comes; a sparse disk only when it
        // is full.
        (container_disk(&noise(1, 12 << 20)), "known before"),
        (
            Image::plain(noise(2, 12 << 20), "application/octet-stream"),
            "found out",
        ),
        (
            Image::plain(zstd(&[7; 64 << 20]), "application/zstd"),
            "found out",
        ),
    ] {
        let reference = bench.push(&image);
        let error = always(&store, &reference).unwrap_err();
        assert!(matches!(error, Error::DiskFull { .. }), "{what}: {error}");
        assert_eq!(
            std::fs::read_dir(mount.0.path().join("store/partial"))
                .unwrap()
                .count(),
            0,
            "{what}"
        );
        assert_eq!(
            store.find(&kept.digest).unwrap().map(|disk| disk.path),
            Some(kept.path.clone()),
            "{what}"
        );
    }
    assert!(std::fs::read(&kept.path).unwrap() == raw_disk());
}

/// The variable by which the tests below tell a child what to do: a store's folder and a reference.
const CHILD: &str = "IMAGE_TEST_CHILD";

/// Starts this program again as a process of its own that pulls one image.
fn child(store: &Path, reference: &str) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "a_process_of_its_own_pulls",
            "--include-ignored",
            "--nocapture",
        ])
        .env(CHILD, format!("{}|{reference}", store.display()))
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
#[ignore = "needs docker-registry and skopeo; the tests of kills and of two processes start it, too"]
fn a_process_of_its_own_pulls() {
    let given = std::env::var_os(CHILD).map(|value| value.into_string().unwrap());
    // By itself it pulls what a parent would have it pull.
    let bench = given.is_none().then(|| Bench::new(Registry::open()));
    let (store, reference) = match (&given, &bench) {
        (Some(given), _) => given
            .split_once('|')
            .map(|(s, r)| (s.to_owned(), r.to_owned()))
            .unwrap(),
        (None, Some(bench)) => {
            let archive = Tar::new().file("disk/disk.img", &noise(5, 200 << 20)).bytes();
            let image = Image::container_disk(&archive, OCI_TAR_ZSTD);
            drop(archive);
            (
                bench.dir.path().join("store2").display().to_string(),
                bench.push(&image),
            )
        }
        (None, None) => unreachable!(),
    };
    let heard = Heard::default();
    let store = Store::open(Path::new(&store)).unwrap();
    let disk = provide(&store, &request(&reference, &[PullPolicy::Always]), &heard).unwrap();
    let waited = heard.0.into_inner().unwrap().iter().any(|text| text == "Waiting");
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap()
        .trim()
        .to_owned();
    println!(
        "fetched={} cached={} waited={waited} peak={peak}",
        disk.fetched_bytes, disk.from_cache
    );
}

#[test]
#[ignore = "needs docker-registry and skopeo"]
fn two_processes_share_one_download() {
    let bench = Bench::new(Registry::open());
    let image = container_disk(&noise(6, 48 << 20));
    let (layer, length) = (sha256(&image.layers[0].0), image.layers[0].0.len());
    let reference = bench.push(&image);
    let store = bench.dir.path().join("shared");
    let children = [
        child(&store, &reference),
        child(&store, &reference),
        child(&store, &reference),
    ];
    let outputs: Vec<String> = children
        .into_iter()
        .map(|child| {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success());
            String::from_utf8(output.stdout).unwrap()
        })
        .collect();
    assert_eq!(
        outputs
            .iter()
            .filter(|text| text.contains("cached=false"))
            .count(),
        1,
        "{outputs:?}"
    );
    assert_eq!(
        outputs.iter().filter(|text| text.contains("waited=true")).count(),
        2,
        "{outputs:?}"
    );
    assert_eq!(bench.registry.sent(&layer), length as u64);
}

#[test]
#[ignore = "needs docker-registry and skopeo"]
fn memory_does_not_grow_with_the_image() {
    let bench = Bench::new(Registry::open());
    let peaks = [64, 512].map(|mib| {
        let reference = bench.push(&container_disk(&noise(7, mib << 20)));
        let store = bench.dir.path().join(format!("store-{mib}"));
        let output = child(&store, &reference).wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let peak = text
            .split_once("peak=")
            .and_then(|(_, peak)| peak.split_whitespace().next()?.parse::<u64>().ok());
        assert!(text.contains("cached=false"), "{text}");
        peak.unwrap()
    });
    let [small, large] = peaks;
    println!("{peaks:?} kB");
    // How far ahead of the unpacking it fetches, by up to 32 MiB, is a matter of which of the two is quicker on this machine. An
    // image that is 448 MiB larger must not cost more than that.
    assert!(large < small + (40 << 10) && large < (128 << 10), "{peaks:?} kB");
}

#[test]
#[ignore = "needs docker-registry and skopeo"]
fn a_pull_that_is_killed_at_any_time_leaves_a_right_store() {
    const KILLS: u32 = 30;
    let bench = Bench::new(Registry::open());
    let disk = noise(8, 32 << 20);
    let archive = Tar::new().file("disk/disk.img", &disk).bytes();
    let reference = bench.push(&Image::container_disk(&archive, OCI_TAR));
    let store = bench.dir.path().join("shared");
    let start = Instant::now();
    assert!(
        child(&bench.dir.path().join("clean"), &reference)
            .wait()
            .unwrap()
            .success()
    );
    let clean = start.elapsed();
    let (mut killed, mut finished) = (0, 0);
    for point in 0..KILLS {
        let mut child = child(&store, &reference);
        // From the start of the process to a little past its usual end.
        std::thread::sleep(clean * point / (KILLS - 4));
        child.kill().unwrap();
        if child.wait().unwrap().success() {
            finished += 1
        } else {
            killed += 1
        }
        // Whatever is visible is whole.
        if let Ok(entries) = std::fs::read_dir(store.join("disks")) {
            for entry in entries {
                let dir = entry.unwrap().path();
                assert!(
                    std::fs::read(dir.join("disk.raw")).unwrap() == disk,
                    "point {point}"
                );
                // The next one is to be a pull again.
                std::fs::remove_dir_all(dir).unwrap();
            }
        }
    }
    assert!(killed >= KILLS / 2, "{killed} killed, {finished} finished");
    let store = Store::open(&store).unwrap();
    assert_eq!(
        std::fs::read_dir(bench.dir.path().join("shared/partial"))
            .unwrap()
            .count(),
        0
    );
    let provided = always(&store, &reference).unwrap();
    assert!(std::fs::read(&provided.path).unwrap() == disk);
}

#[test]
#[ignore = "needs docker-registry and skopeo"]
fn a_cancelled_pull_cleans_up() {
    let bench = Bench::new(Registry::open());
    let reference = bench.push(&container_disk(&noise(9, 48 << 20)));
    let request = request(&reference, &[PullPolicy::Always]);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let result = runtime.block_on(async {
        tokio::time::timeout(Duration::from_millis(150), bench.store.provide(&request, &Silent)).await
    });
    assert!(result.is_err(), "it was faster than the cancel");
    // Waits for the thread that was unpacking.
    drop(runtime);
    assert_eq!((bench.partial(), bench.store.list().unwrap().len()), (0, 0));
    assert!(provide(&bench.store, &request, &Silent).is_ok());
}
