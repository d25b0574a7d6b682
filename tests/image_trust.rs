//! Whom a registry may send us to, and who sees which login.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

#[path = "support/https_fixture.rs"]
#[allow(dead_code, reason = "each suite uses its part of the fixture")]
mod https_fixture;
#[path = "support/image_fixture.rs"]
#[allow(dead_code, reason = "each suite uses its part of the fixture")]
mod image_fixture;

use std::collections::HashMap;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cannery::image::{
    Asker, Credentials, Disk, Error, Limits, Origin, PullPolicy, Registries, RegistryOptions, Request,
    Requirements, Silent, Store,
};
use cannery::outcome::{Failure, Fault};
use cannery::secret::Secret;
use https_fixture::{Answer, Authority, Seen, Server, Speech};
use image_fixture::{Image, Layout, OCI_TAR_GZIP, Tar, noise};
use serde_json::{Value, json};

/// An image as a registry serves it: content by digest, and the manifest as tag `1`.
#[derive(Clone)]
struct Content {
    by_name: Arc<HashMap<String, Vec<u8>>>,
    disk: Arc<Vec<u8>>,
}

impl Content {
    fn new(seed: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(&dir.path().join("layout"));
        let disk = noise(seed, 256 << 10);
        let archive = Tar::new().file("disk/disk.img", &disk).bytes();
        let digest = layout.add("vm", &Image::container_disk(&archive, OCI_TAR_GZIP));
        let mut by_name: HashMap<String, Vec<u8>> = std::fs::read_dir(layout.dir.join("blobs/sha256"))
            .unwrap()
            .map(|entry| {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_str().unwrap();
                (format!("sha256:{name}"), std::fs::read(&path).unwrap())
            })
            .collect();
        by_name.insert("1".to_owned(), by_name[&digest].clone());
        Self {
            by_name: Arc::new(by_name),
            disk: Arc::new(disk),
        }
    }

    fn answer(&self, seen: &Seen) -> Answer {
        let name = seen.path.rsplit('/').next().unwrap();
        match self.by_name.get(name) {
            Some(bytes) => Answer::ok(bytes.clone()),
            None => Answer::status(404),
        }
    }

    /// Is it the layer that is asked for?
    fn is_layer(&self, seen: &Seen) -> bool {
        seen.path.contains("/blobs/") && self.answer(seen).2.len() > 100_000
    }
}

struct Puller {
    dir: tempfile::TempDir,
    registries: Registries,
    credentials: Credentials,
}

impl Puller {
    /// Trusts the authority, and lists nobody.
    fn new(authority: &Authority) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            registries: Registries {
                ca_files: vec![authority.file("ca.pem")],
                ..Registries::default()
            },
            credentials: Credentials::none(),
        }
    }

    /// Each pull has a store of its own: nothing is there already.
    fn pull(&self, host: &str) -> Result<Disk, Error> {
        let store = tempfile::tempdir_in(self.dir.path()).unwrap().keep();
        let request = Request {
            requirements: Requirements::default(),
            reference: format!("{host}/vm:1").parse().unwrap(),
            architecture: "x86_64".to_owned(),
            policies: vec![PullPolicy::Always],
            credentials: self.credentials.clone(),
            registries: self.registries.clone(),
            limits: Limits {
                max_disk: 64 << 20,
                keep_free: 0,
            },
            asker: Asker::Operator,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(Store::open(&store).unwrap().provide(&request, &Silent))
    }

    fn pull_well(&self, host: &str, content: &Content) {
        let disk = self.pull(host).unwrap();
        assert!(std::fs::read(disk.path).unwrap() == *content.disk);
    }
}

fn login(host: &str, user: &str) -> Credentials {
    Credentials::basic(host, user, Secret::new("sesame"))
}

/// base64 of `USER:sesame`
fn basic(user: &str) -> String {
    use base64::Engine as _;
    format!(
        "Basic {}",
        base64::engine::general_purpose::STANDARD.encode(format!("{user}:sesame"))
    )
}

/// Answers like a token service whose tokens are `token-N`.
fn token_service(speech: Speech<'_>, expires_in: u32) -> Server {
    let count = AtomicU32::new(0);
    Server::start(speech, move |_| {
        let number = count.fetch_add(1, Ordering::Relaxed) + 1;
        Answer::ok(format!(
            r#"{{"token": "token-{number}", "expires_in": {expires_in}}}"#
        ))
    })
}

/// A registry that wants a token from this realm.
fn registry_with_realm(speech: Speech<'_>, content: &Content, realm: String) -> Server {
    let content = content.clone();
    Server::start(speech, move |seen| match seen.authorization() {
        Some(text) if text.starts_with("Bearer token-") => content.answer(seen),
        _ => {
            let challenge = format!(r#"Bearer realm="{realm}",service="here""#);
            Answer::status(401).with("www-authenticate", challenge)
        }
    })
}

#[test]
fn a_realm_on_this_host_is_refused_unless_the_registry_is_listed() {
    let authority = Authority::new();
    let content = Content::new(1);
    let tokens = token_service(Speech::Tls(&authority), 300);
    let port = tokens.port;
    for realm_host in [
        format!("127.0.0.1:{port}"),
        // A name that means this host, and other spellings of its address.
        format!("localhost:{port}"),
        format!("2130706433:{port}"),
        format!("0x7f.1:{port}"),
        format!("[::ffff:127.0.0.1]:{port}"),
        "[::1]:9".to_owned(),
        "0.0.0.0:9".to_owned(),
        "169.254.169.254".to_owned(),
        "100.100.100.200".to_owned(),
        "10.1.2.3".to_owned(),
        "192.168.1.1".to_owned(),
        "100.64.0.1".to_owned(),
        "[fd00::1]".to_owned(),
        "[fe80::1]".to_owned(),
        "224.0.0.1".to_owned(),
    ] {
        let realm = format!("https://{realm_host}/token");
        let registry = registry_with_realm(Speech::Tls(&authority), &content, realm);
        let mut puller = Puller::new(&authority);
        puller.credentials = login(&registry.host(), "ci");
        let error = puller.pull(&registry.host()).unwrap_err();
        assert!(
            matches!(error, Error::Unreachable { .. })
                && error.to_string().contains("images.private_registries"),
            "{realm_host}: {error}"
        );
    }
    assert!(tokens.seen().is_empty(), "{:?}", tokens.seen());
    // Listed by name or by network, it may.
    let listings: [(&str, &[&str]); 4] = [
        ("127.0.0.1", &["127.0.0.1:*"]),
        ("localhost", &["127.0.0.1:*"]),
        ("127.0.0.1", &["127.0.0.0/8"]),
        ("localhost", &["127.0.0.0/8", "::1/128"]),
    ];
    for (realm_host, listed) in listings {
        let realm = format!("https://{realm_host}:{port}/token");
        let registry = registry_with_realm(Speech::Tls(&authority), &content, realm);
        let mut puller = Puller::new(&authority);
        puller.credentials = login(&registry.host(), "ci");
        puller.registries.private = listed.iter().map(|text| text.parse().unwrap()).collect();
        puller.pull_well(&registry.host(), &content);
    }
    for seen in tokens.seen() {
        assert_eq!(seen.authorization(), Some(basic("ci").as_str()));
        assert_eq!(seen.path, "/token?service=here&scope=repository%3Avm%3Apull");
    }
}

#[test]
fn a_token_service_that_is_the_registry_itself_needs_no_listing() {
    let authority = Authority::new();
    let content = Content::new(2);
    // The port is known only when it listens.
    let port = Arc::new(AtomicU32::new(0));
    let (own, served) = (Arc::clone(&port), content.clone());
    let registry = Server::start(Speech::Tls(&authority), move |seen| {
        if seen.path.starts_with("/token") {
            return Answer::ok(r#"{"access_token": "t"}"#);
        }
        match seen.authorization() {
            Some("Bearer t") => served.answer(seen),
            _ => {
                let port = own.load(Ordering::Relaxed);
                let challenge = format!(r#"Bearer realm="https://127.0.0.1:{port}/token""#);
                Answer::status(401).with("www-authenticate", challenge)
            }
        }
    });
    port.store(registry.port.into(), Ordering::Relaxed);
    Puller::new(&authority).pull_well(&registry.host(), &content);
}

#[test]
fn a_redirect_is_followed_only_where_it_may_lead_and_without_credentials() {
    let authority = Authority::new();
    let content = Content::new(3);
    let served = content.clone();
    let storage = Server::start(Speech::Tls(&authority), move |seen| served.answer(seen));
    let plain = Server::start(Speech::Plain, |_| Answer::ok("x"));
    let (storage_port, plain_port) = (storage.port, plain.port);
    let redirecting = |to: String| {
        let served = content.clone();
        Server::start(Speech::Tls(&authority), move |seen| match seen.authorization() {
            None => Answer::status(401).with("www-authenticate", "Basic realm=\"x\""),
            Some(_) if served.is_layer(seen) => {
                Answer::redirect(to.replace("NAME", seen.path.rsplit('/').next().unwrap()))
            }
            Some(_) => served.answer(seen),
        })
    };
    for (to, reason) in [
        (
            format!("https://127.0.0.1:{storage_port}/NAME"),
            "private_registries",
        ),
        (
            format!("https://localhost:{storage_port}/NAME"),
            "private_registries",
        ),
        ("https://169.254.169.254/NAME".to_owned(), "private_registries"),
        (format!("http://127.0.0.1:{plain_port}/NAME"), "without TLS"),
        ("http://example.com/NAME".to_owned(), "without TLS"),
        ("file:///etc/passwd".to_owned(), "without TLS"),
        ("/again/vm/blobs/NAME".to_owned(), "in circles"),
    ] {
        let registry = redirecting(to.clone());
        let mut puller = Puller::new(&authority);
        puller.credentials = login(&registry.host(), "ci");
        let error = puller.pull(&registry.host()).unwrap_err();
        assert!(error.to_string().contains(reason), "{to}: {error}");
    }
    assert!(storage.seen().is_empty() && plain.seen().is_empty());
    let registry = redirecting(format!("https://localhost:{storage_port}/NAME"));
    let mut puller = Puller::new(&authority);
    puller.credentials = login(&registry.host(), "ci");
    puller.registries.private = vec![registry.host().parse().unwrap()];
    puller.pull_well(&registry.host(), &content);
    let seen = storage.seen();
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].authorization(), None, "the storage saw a credential");
}

#[test]
fn a_registry_without_tls_leads_to_its_network_and_not_to_the_clouds_metadata() {
    let content = Content::new(7);
    let served = content.clone();
    let near = Server::start(Speech::Plain, move |seen| served.answer(seen));
    let tokens = token_service(Speech::Plain, 300);
    // By a redirect, and by a realm.
    let redirecting = |host: &str| {
        let (served, host) = (content.clone(), host.to_owned());
        Server::start(Speech::Plain, move |seen| match served.is_layer(seen) {
            true => Answer::redirect(format!("http://{host}{}", seen.path)),
            false => served.answer(seen),
        })
    };
    let with_realm =
        |host: &str| registry_with_realm(Speech::Plain, &content, format!("http://{host}/token"));
    let pull = |registry: &Server| {
        let mut puller = Puller::new(&Authority::new());
        puller.registries = Registries::without_tls([registry.host()]);
        puller.credentials = login(&registry.host(), "ci");
        let pulled = puller.pull(&registry.host());
        pulled.map(|disk| std::fs::read(disk.path).unwrap())
    };
    for registry in [redirecting(&near.host()), with_realm(&tokens.host())] {
        assert!(pull(&registry).unwrap() == *content.disk);
    }
    for host in [
        "169.254.169.254",
        "[fe80::1]",
        "[::ffff:169.254.169.254]",
        "100.100.100.200",
    ] {
        for registry in [redirecting(host), with_realm(host)] {
            let error = pull(&registry).unwrap_err().to_string();
            assert!(error.contains("images.private_registries"), "{host}: {error}");
        }
    }
}

#[test]
fn credentials_do_not_come_back_with_a_redirect() {
    let authority = Authority::new();
    let content = Content::new(4);
    let port = Arc::new(AtomicU32::new(0));
    let own = Arc::clone(&port);
    // Storage that sends us back to the registry, to an address of its own choice.
    let storage = Server::start(Speech::Tls(&authority), move |_| {
        Answer::redirect(format!(
            "https://127.0.0.1:{}/v2/other/blobs/secret",
            own.load(Ordering::Relaxed)
        ))
    });
    let (served, storage_host) = (content.clone(), storage.host());
    let registry = Server::start(Speech::Tls(&authority), move |seen| {
        match (seen.authorization(), served.is_layer(seen)) {
            (None, _) => Answer::status(401).with("www-authenticate", "Basic"),
            (_, true) => Answer::redirect(format!("https://{storage_host}/layer")),
            _ => served.answer(seen),
        }
    });
    port.store(registry.port.into(), Ordering::Relaxed);
    let mut puller = Puller::new(&authority);
    puller.credentials = login(&registry.host(), "ci");
    puller.registries.private = vec!["127.0.0.0/8".parse().unwrap()];
    assert!(puller.pull(&registry.host()).is_err());
    let back: Vec<Seen> = registry
        .seen()
        .into_iter()
        .filter(|seen| seen.path.contains("/other/"))
        .collect();
    assert!(!back.is_empty());
    assert!(back.iter().all(|seen| seen.authorization().is_none()), "{back:?}");
}

/// A registry that answers a login, asked alone and for an image, with these.
fn registry_with_login(by_token: bool, to_login: u16, of_image: u16) -> Server {
    let port = Arc::new(AtomicU32::new(0));
    let own = Arc::clone(&port);
    let server = Server::start(Speech::Plain, move |seen| {
        let given = seen.authorization();
        let known = if by_token { "Bearer t" } else { "Basic" };
        if given.is_some() && seen.path.starts_with("/token") {
            return Answer(to_login, Vec::new(), br#"{"token": "t"}"#.to_vec());
        }
        if !given.is_some_and(|given| given.starts_with(known)) {
            let challenge = match by_token {
                true => format!(
                    r#"Bearer realm="http://127.0.0.1:{}/token""#,
                    own.load(Ordering::Relaxed)
                ),
                false => "Basic".to_owned(),
            };
            return Answer::status(401).with("www-authenticate", challenge);
        }
        Answer::status(match to_login {
            200 if seen.path != "/v2/" => of_image,
            status => status,
        })
    });
    port.store(server.port.into(), Ordering::Relaxed);
    server
}

#[test]
fn a_refused_login_is_for_whoever_gave_it_and_a_denied_image_for_whoever_named_it() {
    const HOST: Option<Origin> = Some(Origin::Host);
    const JOB: Option<Origin> = Some(Origin::JobGiven);
    let refused_host = [
        "refuses the login of `ci` given by the host",
        "`cannery login 127.0.0.1:",
    ];
    let refused_job = ["refuses the login of `ci` given by the job", "DOCKER_AUTH_CONFIG"];
    let denied_host = ["to the host's user `ci`", "Is the name right?"];
    let denied_job = ["to the user `ci`", "DOCKER_AUTH_CONFIG"];
    let nobody = ["without credentials", "DOCKER_AUTH_CONFIG"];
    let absent = ["does not exist", "Is the name right"];
    // Whose login it is, how it is shown, what comes of it alone and with an image; the fault.
    for (origin, by_token, to_login, of_image, fault, words) in [
        (HOST, false, 401, 401, Fault::System, refused_host),
        (HOST, true, 401, 401, Fault::System, refused_host),
        // As AWS does when a token has expired.
        (HOST, false, 403, 403, Fault::System, refused_host),
        (HOST, false, 200, 403, Fault::Author, denied_host),
        // A token without a right, as many registries give it also for what is not there.
        (HOST, true, 200, 401, Fault::Author, denied_host),
        (HOST, true, 200, 404, Fault::Author, absent),
        (JOB, false, 401, 401, Fault::Author, refused_job),
        (JOB, true, 401, 401, Fault::Author, refused_job),
        (JOB, false, 200, 403, Fault::Author, denied_job),
        (JOB, true, 200, 401, Fault::Author, denied_job),
        (None, false, 401, 401, Fault::Author, nobody),
    ] {
        let registry = registry_with_login(by_token, to_login, of_image);
        let host = registry.host();
        let logins = json!({"auths": {host.as_str(): {"username": "ci", "password": "sesame"}}});
        let puller = Puller {
            dir: tempfile::tempdir().unwrap(),
            registries: Registries::without_tls([&host]),
            credentials: origin.map_or_else(Credentials::none, |origin| {
                Credentials::from_docker_config(&logins.to_string(), origin).unwrap()
            }),
        };
        let failure = Failure::from(puller.pull(&host).unwrap_err());
        let row = format!("{origin:?} {by_token} {to_login} {of_image}: {failure}");
        assert_eq!(failure.fault, fault, "{row}");
        for word in words {
            assert!(failure.to_string().contains(word), "{word}: {row}");
        }
        assert!(!failure.to_string().contains("sesame"), "{row}");
    }
}

#[test]
fn a_mirror_is_asked_first_with_its_own_login() {
    let authority = Authority::new();
    let content = Content::new(5);
    let wanting = |content: Content| {
        move |seen: &Seen| match seen.authorization() {
            None => Answer::status(401).with("www-authenticate", "Basic"),
            Some(_) => content.answer(seen),
        }
    };
    let origin = Server::start(Speech::Tls(&authority), wanting(content.clone()));
    let good = Server::start(Speech::Tls(&authority), wanting(content.clone()));
    let empty = Server::start(Speech::Tls(&authority), |_| Answer::status(404));
    let dead = TcpPort::closed();
    // Has the manifest and not the layer.
    let served = content.clone();
    let broken = Server::start(Speech::Tls(&authority), move |seen| {
        if served.is_layer(seen) {
            return Answer::status(404);
        }
        served.answer(seen)
    });
    let pull = |mirrors: &[String]| {
        let mut puller = Puller::new(&authority);
        puller.credentials = login(&origin.host(), "origin").or(login(&good.host(), "mirror"));
        let options = RegistryOptions {
            mirrors: mirrors.to_vec(),
            ..RegistryOptions::default()
        };
        puller.registries.each.insert(origin.host(), options);
        puller.pull_well(&origin.host(), &content);
    };
    pull(&[empty.host(), good.host()]);
    assert!(!empty.seen().is_empty() && origin.seen().is_empty());
    assert!(empty.seen().iter().all(|seen| seen.authorization().is_none()));
    let authorized: Vec<String> = good
        .seen()
        .iter()
        .filter_map(|seen| seen.authorization().map(str::to_owned))
        .collect();
    assert!(!authorized.is_empty() && authorized.iter().all(|text| *text == basic("mirror")));
    // None of them has it: the registry itself has.
    pull(&[dead, empty.host()]);
    let asked = origin.seen().len();
    assert!(asked > 0);
    pull(&[broken.host()]);
    let layers = origin.seen().iter().filter(|seen| content.is_layer(seen)).count();
    assert!(origin.seen().len() > asked && layers > 0);
    assert!(!broken.seen().is_empty());
}

/// A port of this host at which nobody listens.
struct TcpPort;

impl TcpPort {
    fn closed() -> String {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().to_string()
    }
}

#[test]
fn a_client_certificate_is_shown_to_its_registry_only() {
    let authority = Authority::new();
    let content = Content::new(6);
    let served = content.clone();
    let registry = Server::start(Speech::TlsForClients(&authority), move |seen| served.answer(seen));
    let mut puller = Puller::new(&authority);
    let error = puller.pull(&registry.host()).unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    let options = RegistryOptions {
        client_cert: Some(authority.file("client.pem")),
        client_key: Some(authority.file("client.key")),
        ..RegistryOptions::default()
    };
    puller
        .registries
        .each
        .insert("other.example".to_owned(), options.clone());
    assert!(puller.pull(&registry.host()).is_err());
    puller.registries.each = [(registry.host(), options)].into();
    puller.pull_well(&registry.host(), &content);
    // A registry's own authority is enough, too.
    let options = puller.registries.each.get_mut(&registry.host()).unwrap();
    options.ca_file = Some(authority.file("ca.pem"));
    puller.registries.ca_files.clear();
    puller.pull_well(&registry.host(), &content);
    let options = puller.registries.each.get_mut(&registry.host()).unwrap();
    options.client_key = Some(authority.file("client.pem"));
    let error = puller.pull(&registry.host()).unwrap_err();
    assert!(
        matches!(error, Error::ClientCertificate { .. }) && error.to_string().contains("no private key"),
        "{error}"
    );
}

#[test]
fn a_token_is_renewed_before_it_ends() {
    let authority = Authority::new();
    let content = Content::new(7);
    // Half of a second is what is left of a life of one.
    let tokens = token_service(Speech::Tls(&authority), 1);
    let realm = format!("https://{}/token", tokens.host());
    let served = content.clone();
    let registry = Server::start(Speech::Tls(&authority), move |seen| match seen.authorization() {
        Some(text) if text.starts_with("Bearer ") => {
            std::thread::sleep(std::time::Duration::from_millis(600));
            served.answer(seen)
        }
        _ => Answer::status(401).with("www-authenticate", format!(r#"Bearer realm="{realm}""#)),
    });
    let mut puller = Puller::new(&authority);
    puller.registries.private = vec!["127.0.0.0/8".parse().unwrap()];
    puller.pull_well(&registry.host(), &content);
    let seen = registry.seen();
    // Only the very first request was refused, and each of the others had a token of its own.
    assert!(seen[0].authorization().is_none());
    let used: Vec<&str> = seen[1..].iter().filter_map(Seen::authorization).collect();
    assert!(used.len() == seen.len() - 1 && used.len() >= 3, "{used:?}");
    assert_eq!(
        used.iter().collect::<std::collections::BTreeSet<_>>().len(),
        used.len()
    );
}

#[test]
fn an_identity_token_is_traded_for_a_token() {
    let authority = Authority::new();
    let content = Content::new(8);
    let tokens = Server::start(Speech::Tls(&authority), |seen| {
        if seen.method != "POST" {
            return Answer::status(405);
        }
        Answer::ok(r#"{"access_token": "token-1", "refresh_token": "next"}"#)
    });
    let realm = format!("https://{}/oauth2/token", tokens.host());
    let registry = registry_with_realm(Speech::Tls(&authority), &content, realm);
    let mut puller = Puller::new(&authority);
    puller.registries.private = vec!["127.0.0.0/8".parse().unwrap()];
    let config = format!(
        r#"{{"auths": {{"{}": {{"identitytoken": "id/+ "}}}}}}"#,
        registry.host()
    );
    puller.credentials = Credentials::from_docker_config(&config, Origin::JobGiven).unwrap();
    puller.pull_well(&registry.host(), &content);
    let seen = tokens.seen();
    assert_eq!(
        String::from_utf8(seen[0].body.clone()).unwrap(),
        "grant_type=refresh_token&service=here&client_id=cannery&refresh_token=id%2F%2B+&scope=repository%3Avm%3Apull"
    );
    assert_eq!(seen[0].authorization(), None);
}

#[test]
fn a_pause_that_is_asked_for_as_a_date_is_kept() {
    let authority = Authority::new();
    let content = Content::new(9);
    let served = content.clone();
    let refused = AtomicU32::new(0);
    let registry = Server::start(Speech::Tls(&authority), move |seen| {
        if refused.fetch_add(1, Ordering::Relaxed) == 0 {
            let then = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(3);
            let date = then
                .to_zoned(jiff::tz::TimeZone::UTC)
                .strftime("%a, %d %b %Y %H:%M:%S GMT");
            return Answer::status(429).with("retry-after", date.to_string());
        }
        served.answer(seen)
    });
    let start = std::time::Instant::now();
    Puller::new(&authority).pull_well(&registry.host(), &content);
    // The date has whole seconds.
    assert!(
        start.elapsed() >= std::time::Duration::from_secs(2),
        "{:?}",
        start.elapsed()
    );
    let patience = Server::start(Speech::Tls(&authority), |_| {
        Answer::status(429).with("retry-after", "7200")
    });
    let start = std::time::Instant::now();
    let error = Puller::new(&authority).pull(&patience.host()).unwrap_err();
    assert!(error.to_string().contains("7200 s"), "{error}");
    assert!(start.elapsed() < std::time::Duration::from_secs(10));
}

/// A home folder of an operator who logs in.
struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    fn new(settings: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let text = format!("state_dir = \"{}\"\n{settings}", state.display());
        std::fs::write(dir.path().join("cannery.toml"), text).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn cannery(&self, arguments: &[&str], input: &str) -> Output {
        let path = format!("{}:/usr/bin:/bin", self.dir.path().display());
        let mut child = Command::new(env!("CARGO_BIN_EXE_cannery"))
            .env_clear()
            .env("HOME", self.dir.path())
            .env("PATH", path)
            .env("CANNERY_CONFIG", self.path("cannery.toml"))
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Who refuses at once reads nothing.
        drop(child.stdin.take().unwrap().write_all(input.as_bytes()));
        child.wait_with_output().unwrap()
    }

    fn login(&self, host: &str, password: &str) -> Output {
        self.cannery(
            &["login", "--username", "ci", "--password-stdin", host],
            &format!("{password}\n"),
        )
    }
}

fn text(output: &Output) -> String {
    String::from_utf8([&output.stdout[..], &output.stderr[..]].concat()).unwrap()
}

fn with_password() -> Server {
    let right = basic("ci");
    Server::start(Speech::Plain, move |seen| match seen.authorization() {
        Some(given) if given == right => Answer::ok("{}"),
        _ => Answer::status(401).with("www-authenticate", "Basic realm=\"x\""),
    })
}

#[test]
fn a_login_is_tried_kept_and_forgotten() {
    let registry = with_password();
    let host = registry.host();
    let home = Home::new(&format!("[images]\nplain_http = [\"{host}\"]\n"));
    let file = home.path(".docker/config.json");
    let wrong = home.login(&host, "open");
    assert_eq!(wrong.status.code(), Some(1));
    assert!(
        text(&wrong).contains("refuses the login of `ci`") && !file.exists(),
        "{}",
        text(&wrong)
    );
    let right = home.login(&host, "sesame");
    assert!(right.status.success(), "{}", text(&right));
    assert!(text(&right).contains(&format!("Logged in to {host} as ci")));
    assert!(
        text(&right).contains("images.host_credentials"),
        "{}",
        text(&right)
    );
    let kept = std::fs::read_to_string(&file).unwrap();
    assert!(kept.contains(&basic("ci")["Basic ".len()..]), "{kept}");
    assert_eq!(
        std::fs::metadata(&file).unwrap().permissions().mode() & 0o777,
        0o600
    );
    for expected in ["Logged out of", "There is no login for"] {
        let out = home.cannery(&["logout", &host], "");
        assert!(
            out.status.success() && text(&out).contains(expected),
            "{}",
            text(&out)
        );
    }
    let arguments = ["login", "-u", "ci", "--password-stdin", "--format", "json", &host];
    let said = home.cannery(&arguments, "sesame").stdout;
    let kept = json!({"registry": host, "username": "ci", "kept_in": file});
    assert_eq!(serde_json::from_slice::<Value>(&said).unwrap(), kept);
    for forgotten in [true, false] {
        let said = home.cannery(&["logout", "--format", "json", &host], "").stdout;
        let expected = json!({"registry": host, "forgotten": forgotten});
        assert_eq!(serde_json::from_slice::<Value>(&said).unwrap(), expected);
    }
    for (arguments, reason) in [
        (["login", "-u", "ci", "-p", "sesame", &host], "command line"),
        (
            ["login", "-u", "ci", "-u", "ci", &host],
            "cannot be used multiple times",
        ),
    ] {
        let refused = home.cannery(&arguments, "");
        assert!(
            !refused.status.success() && text(&refused).contains(reason),
            "{}",
            text(&refused)
        );
        assert!(!text(&refused).contains("sesame"));
    }
    let silent = home.cannery(&["login", "-u", "ci", &host], "sesame\n");
    assert!(text(&silent).contains("no terminal"), "{}", text(&silent));
}

#[test]
fn a_helper_that_the_file_names_keeps_the_login() {
    let registry = with_password();
    let host = registry.host();
    let home = Home::new(&format!("[images]\nplain_http = [\"{host}\"]\n"));
    std::fs::create_dir(home.path(".docker")).unwrap();
    std::fs::write(home.path(".docker/config.json"), r#"{"credsStore": "box"}"#).unwrap();
    let helper = home.path("docker-credential-box");
    let script = r#"#!/bin/sh
case $1 in
store) cat > "$HOME/kept" ;;
get) test -e "$HOME/kept" && cat "$HOME/kept" || { echo "credentials not found in native keychain"; exit 1; } ;;
erase) rm "$HOME/kept" ;;
esac
"#;
    std::fs::write(&helper, script).unwrap();
    std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
    let out = home.login(&host, "sesame");
    assert!(
        out.status.success() && text(&out).contains("docker-credential-box"),
        "{}",
        text(&out)
    );
    assert!(
        std::fs::read_to_string(home.path("kept"))
            .unwrap()
            .contains("sesame")
    );
    let config = std::fs::read_to_string(home.path(".docker/config.json")).unwrap();
    assert!(
        !config.contains("auth\"") && config.contains("credsStore"),
        "{config}"
    );
    for expected in ["Logged out of", "There is no login for"] {
        let out = home.cannery(&["logout", &host], "");
        assert!(text(&out).contains(expected), "{}", text(&out));
        assert!(!Path::exists(&home.path("kept")));
    }
}
