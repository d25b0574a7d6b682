//! A private image in the cache is for those whom its registry lets have it: Debian's docker-registry with passwords on loopback,
//! and jobs with and without a login.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on panics"
)]
#![allow(clippy::print_stdout, reason = "a measurement is shown")]

#[path = "support/image_fixture.rs"]
#[allow(dead_code, reason = "each suite uses its part of the fixture")]
mod image_fixture;
#[path = "support/registry_fixture.rs"]
#[allow(dead_code, reason = "each suite uses its part of the fixture")]
mod registry_fixture;

use std::sync::Mutex;
use std::time::{Duration, Instant};

use cannery::image::{
    Asker, Credentials, CredentialsError, Disk, Error, Event, Limits, Origin, Progress, PullPolicy,
    Registries, Request, Requirements, Store,
};
use cannery::secret::Secret;
use image_fixture::{Image, Layout, OCI_TAR_GZIP, Tar, raw_disk};
use registry_fixture::{PASSWORD, Registry, USER};

const TTL: Duration = Duration::from_secs(600);

/// The image that is asked for.
fn image() -> Image {
    let archive = Tar::new().dir("disk/").file("disk/disk.img", &raw_disk()).bytes();
    Image::container_disk(&archive, OCI_TAR_GZIP)
}

struct Bench {
    dir: tempfile::TempDir,
    layout: Layout,
    registry: Registry,
    store: Store,
}

/// A job that asks.
struct Job {
    project: &'static str,
    credentials: Credentials,
    policies: Vec<PullPolicy>,
    auth_ttl: Duration,
    offline_ttl: Duration,
}

impl Job {
    fn of(project: &'static str, credentials: Credentials) -> Self {
        Self {
            project,
            credentials,
            policies: vec![PullPolicy::IfNotPresent],
            auth_ttl: TTL,
            offline_ttl: TTL,
        }
    }

    fn policy(mut self, policy: PullPolicy) -> Self {
        self.policies = vec![policy];
        self
    }

    fn ttl(mut self, auth: Duration, offline: Duration) -> Self {
        (self.auth_ttl, self.offline_ttl) = (auth, offline);
        self
    }
}

#[derive(Default)]
struct Offline(Mutex<Vec<String>>);

impl Progress for Offline {
    fn event(&self, event: Event<'_>) {
        if let Event::Offline { error, .. } = event {
            self.0.lock().unwrap().push(error.to_string());
        }
    }
}

impl Bench {
    fn new(registry: Registry) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self {
            layout: Layout::new(&dir.path().join("layout")),
            store: Store::open(&dir.path().join("store")).unwrap(),
            registry,
            dir,
        }
    }

    fn push(&self, name: &str) -> String {
        self.layout.add("vm", &image());
        self.registry.push(&self.layout.reference("vm"), name);
        format!("{}/{name}", self.registry.host)
    }

    fn login(&self, password: &str) -> Credentials {
        Credentials::basic(&self.registry.host, USER, Secret::new(password))
    }

    fn ask(&self, reference: &str, job: &Job) -> Result<Disk, Error> {
        self.ask_and_hear(reference, job, &Offline::default())
    }

    fn ask_and_hear(&self, reference: &str, job: &Job, progress: &Offline) -> Result<Disk, Error> {
        ask(&self.store, reference, job, progress)
    }
}

fn ask(store: &Store, reference: &str, job: &Job, progress: &Offline) -> Result<Disk, Error> {
    let request = Request {
        reference: reference.parse().unwrap(),
        architecture: "x86_64".to_owned(),
        policies: job.policies.clone(),
        credentials: job.credentials.clone(),
        registries: Registries::without_tls([reference.split('/').next().unwrap()]),
        limits: Limits {
            max_disk: 1 << 30,
            keep_free: 0,
        },
        asker: Asker::Job {
            project: job.project.to_owned(),
            auth_ttl: job.auth_ttl,
            offline_ttl: job.offline_ttl,
        },
        requirements: Requirements::default(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(store.provide(&request, progress))
}

#[test]
#[ignore = "needs docker-registry and skopeo"]
fn a_private_image_in_the_cache_is_given_only_to_a_job_whose_registry_allows_it() {
    let mut bench = Bench::new(Registry::with_password());
    let name = bench.push("team/vm:1");
    let member = Job::of("grp/one", bench.login(PASSWORD));
    let first = bench.ask(&name, &member).unwrap();
    assert!(!first.from_cache);
    let pinned = format!("{}@{}", name.trim_end_matches(":1"), first.digest);

    // Neither by the tag nor by the digest, whatever the policy.
    for reference in [&name, &pinned] {
        for credentials in [Credentials::none(), bench.login("wrong")] {
            for policy in [PullPolicy::IfNotPresent, PullPolicy::Always] {
                let stranger = Job::of("grp/two", credentials.clone()).policy(policy);
                let error = bench.ask(reference, &stranger).unwrap_err();
                assert!(
                    matches!(
                        error,
                        Error::Denied { user: None, .. }
                            | Error::Credentials(CredentialsError::Refused { .. })
                    ),
                    "{reference} {policy:?}: {error}"
                );
            }
            let stranger = Job::of("grp/two", credentials).policy(PullPolicy::Never);
            let error = bench.ask(reference, &stranger).unwrap_err();
            let expected = matches!(error, Error::NotGranted { .. } | Error::NotCached { .. });
            assert!(expected, "{reference}: {error}");
        }
    }

    // The grant of the first needs no network; another project of the same login is asked for once.
    let before = bench.registry.requests();
    let begin = Instant::now();
    assert!(bench.ask(&name, &member).unwrap().from_cache);
    let took = begin.elapsed();
    println!(
        "a cached private image with a remembered grant: {:.1} ms",
        took.as_secs_f64() * 1e3
    );
    assert_eq!(bench.registry.requests(), before);
    let colleague = Job::of("grp/three", bench.login(PASSWORD));
    assert!(bench.ask(&name, &colleague).unwrap().from_cache);
    let asked = bench.registry.requests();
    assert!(asked > before);
    assert!(bench.ask(&name, &colleague).unwrap().from_cache);
    assert_eq!(bench.registry.requests(), asked);
    // A grant that is too old is asked for again.
    let late = Job::of("grp/three", bench.login(PASSWORD)).ttl(Duration::ZERO, Duration::ZERO);
    assert!(bench.ask(&name, &late).unwrap().from_cache);
    assert!(bench.registry.requests() > asked);

    // `never` takes what is remembered, or what the operator's own login stands for.
    assert!(
        bench
            .ask(
                &name,
                &Job::of("grp/one", bench.login(PASSWORD)).policy(PullPolicy::Never)
            )
            .is_ok()
    );
    let config = format!(
        "{{\"auths\": {{\"{}\": {{\"username\": \"{USER}\", \"password\": \"{PASSWORD}\"}}}}}}",
        bench.registry.host
    );
    let lent = Credentials::from_docker_config(&config, Origin::Host).unwrap();
    assert!(
        bench
            .ask(&name, &Job::of("grp/four", lent).policy(PullPolicy::Never))
            .is_ok()
    );

    // The registry is gone: what is remembered counts for as long as the operator says, and nothing else does.
    bench.registry.stop();
    let heard = Offline::default();
    let recent = Job::of("grp/one", bench.login(PASSWORD)).ttl(Duration::ZERO, TTL);
    assert!(bench.ask_and_hear(&name, &recent, &heard).unwrap().from_cache);
    assert_eq!(heard.0.lock().unwrap().len(), 1, "one line in the log");
    for refused in [
        Job::of("grp/one", bench.login(PASSWORD)).ttl(Duration::ZERO, Duration::ZERO),
        Job::of("grp/new", bench.login(PASSWORD)),
        Job::of("grp/one", Credentials::none()),
    ] {
        let error = bench.ask(&name, &refused).unwrap_err();
        assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    }
}

#[test]
#[ignore = "needs docker-registry and skopeo"]
fn what_a_registry_gives_to_everybody_needs_no_grant() {
    let mut bench = Bench::new(Registry::open());
    let name = bench.push("team/vm:1");
    let anybody = Job::of("grp/one", Credentials::none());
    assert!(!bench.ask(&name, &anybody).unwrap().from_cache);
    bench.registry.stop();
    for credentials in [Credentials::none(), bench.login("any")] {
        assert!(
            bench
                .ask(&name, &Job::of("grp/two", credentials))
                .unwrap()
                .from_cache
        );
    }
}

#[test]
#[ignore = "needs docker-registry and skopeo"]
fn who_only_knows_the_digest_of_a_private_image_gets_it_from_nowhere_else() {
    let bench = Bench::new(Registry::with_password());
    let name = bench.push("team/vm:1");
    let disk = bench
        .ask(&name, &Job::of("grp/one", bench.login(PASSWORD)))
        .unwrap();

    // Another registry has the manifest, and not the bytes: whoever runs it knows the digest alone.
    let evil = Registry::open();
    evil.push(&bench.layout.reference("vm"), "evil/vm:1");
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(bench.layout.path(&disk.digest.to_string())).unwrap()).unwrap();
    let layer = manifest["layers"][0]["digest"].as_str().unwrap().to_owned();
    let honest = std::fs::read(evil.blob(&layer)).unwrap();
    std::fs::write(evil.blob(&layer), vec![0; honest.len()]).unwrap();
    let by_tag = format!("{}/evil/vm:1", evil.host);
    let by_digest = format!("{}/evil/vm@{}", evil.host, disk.digest);
    // An image of its own of the same layer.
    bench
        .layout
        .add("twin", &image().label("io.cannery.memory", "1G"));
    evil.push(&bench.layout.reference("twin"), "evil/twin:1");
    std::fs::write(evil.blob(&layer), vec![0; honest.len()]).unwrap();
    let twin = format!("{}/evil/twin:1", evil.host);
    for reference in [&by_tag, &by_digest, &twin] {
        let error = bench
            .ask(reference, &Job::of("grp/evil", Credentials::none()))
            .unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{reference}: {error}");
    }
    // Nor by a file that the operator lets jobs name, or a web server, behind which that digest is written.
    let other = bench.dir.path().join("other.img");
    std::fs::write(&other, [raw_disk(), raw_disk()].concat()).unwrap();
    let sum = format!("#sha256={}", disk.digest.hex());
    for reference in [
        format!("file://{}{sum}", other.display()),
        format!("http://127.0.0.1:9/disk.img{sum}"),
    ] {
        for policy in [PullPolicy::Never, PullPolicy::IfNotPresent, PullPolicy::Always] {
            let evil = Job::of("grp/evil", Credentials::none()).policy(policy);
            let error = bench.ask(&reference, &evil).unwrap_err();
            // It is not looked for where nobody may be asked; else what is there is not it, or cannot be reached.
            assert_eq!(
                matches!(error, Error::NotCached { .. }),
                policy == PullPolicy::Never,
                "{reference} {policy:?}: {error}"
            );
        }
    }
    // What is in such a file is everybody's who may name it, and nobody else's.
    let own = format!("file://{}", other.display());
    let [_, disk_of_file] = [false, true].map(|cached| {
        let disk = bench
            .ask(&own, &Job::of("grp/evil", Credentials::none()))
            .unwrap();
        assert_eq!(disk.from_cache, cached);
        disk
    });
    let elsewhere = format!("{}/evil/vm@{}", evil.host, disk_of_file.digest);
    let error = bench
        .ask(&elsewhere, &Job::of("grp/evil", Credentials::none()))
        .unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
    // Once it really has them, they are no secret of the first's: nothing is fetched twice for keeps, and everybody may have it.
    std::fs::write(evil.blob(&layer), honest).unwrap();
    let proved = bench
        .ask(&by_tag, &Job::of("grp/evil", Credentials::none()))
        .unwrap();
    assert!(proved.from_cache && proved.digest == disk.digest);
    let downloads = evil.downloads(&layer);
    assert!(
        bench
            .ask(&by_tag, &Job::of("grp/evil", Credentials::none()))
            .unwrap()
            .from_cache
    );
    assert_eq!(evil.downloads(&layer), downloads);
}

/// What the child is to ask, and where it dies: store, reference and point, a line each.
#[cfg(debug_assertions)]
const CHILD: &str = "CANNERY_TEST_ASK";

/// A job whose prepare is killed; started by the test below.
#[cfg(debug_assertions)]
#[test]
#[ignore = "needs docker-registry, and the test that starts it"]
fn a_job_that_is_killed_while_it_asks() {
    let Some(asked) = std::env::var_os(CHILD) else {
        return;
    };
    let asked = asked.into_string().unwrap();
    let [store, reference, point] = asked.lines().collect::<Vec<_>>().try_into().unwrap();
    let host = reference.split('/').next().unwrap();
    cannery::kill::arm(point, cannery::kill::Manner::Kill).unwrap();
    let credentials = Credentials::basic(host, USER, Secret::new(PASSWORD));
    let store = Store::open(std::path::Path::new(store)).unwrap();
    drop(ask(
        &store,
        reference,
        &Job::of("grp/one", credentials),
        &Offline::default(),
    ));
}

#[cfg(debug_assertions)]
#[test]
#[ignore = "needs docker-registry and skopeo"]
fn a_kill_while_access_is_noted_gives_nothing_away_and_is_made_good_by_the_next() {
    use std::os::unix::process::ExitStatusExt as _;

    for point in ["origin-kept", "grant-kept", "blob-begun:4", "blob-begun:5"] {
        let bench = Bench::new(Registry::with_password());
        let name = bench.push("team/vm:1");
        let store = bench.dir.path().join("store");
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "a_job_that_is_killed_while_it_asks"])
            .env(CHILD, format!("{}\n{name}\n{point}", store.display()))
            .output()
            .unwrap()
            .status;
        assert_eq!(status.signal(), Some(9), "{point}: {status:?}");
        let stranger = Job::of("grp/two", Credentials::none());
        let error = bench.ask(&name, &stranger).unwrap_err();
        assert!(matches!(error, Error::Denied { .. }), "{point}: {error}");
        bench
            .ask(&name, &Job::of("grp/one", bench.login(PASSWORD)))
            .unwrap();
        drop(Store::open(&store).unwrap());
        assert_eq!(
            std::fs::read_dir(store.join("partial")).unwrap().count(),
            0,
            "{point}"
        );
    }
}
