//! A registry on a bad day: cut transfers, overload, redirects, expiring tokens.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

#[path = "support/image_fixture.rs"]
#[allow(dead_code, reason = "each suite uses its part of the fixture")]
mod image_fixture;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, Response, StatusCode, Uri, header};
use axum::routing::get;
use cannery::image::{
    Credentials, Disk, Error, Event, Limits, Progress, PullPolicy, Registries, Request, Requirements, Silent,
    Store,
};
use cannery::secret::Secret;
use image_fixture::{Image, Layout, OCI_TAR_GZIP, Tar, noise};

/// What the registry does wrong, and what it saw.
#[derive(Default)]
struct Weather {
    /// Documents and layers by digest, and the manifest by its tag.
    content: HashMap<String, Vec<u8>>,
    /// A layer's answer ends after so many bytes.
    cut_after: Option<usize>,
    /// Ranges are ignored: always the whole.
    no_ranges: bool,
    /// The first so many requests for layers get this status.
    failures: Vec<StatusCode>,
    retry_after: Option<u64>,
    /// Layers are redirected to this host.
    storage: Option<String>,
    /// Requests need a token from here; each is good for so many requests.
    realm: Option<String>,
    token_life: u32,
    tokens: u32,
    uses: u32,
    /// Answers of the token service.
    token_status: Option<StatusCode>,
    /// Authorization of every request, by path.
    seen: Vec<(String, Option<String>)>,
    ranges: Vec<Option<String>>,
}

type Shared = Arc<Mutex<Weather>>;

fn answer(status: StatusCode, body: impl Into<Body>) -> Response<Body> {
    Response::builder().status(status).body(body.into()).unwrap()
}

async fn token(State(weather): State<Shared>, uri: Uri, headers: HeaderMap) -> Response<Body> {
    let mut weather = weather.lock().unwrap();
    let authorization = headers
        .get(header::AUTHORIZATION)
        .map(|value| value.to_str().unwrap().to_owned());
    weather.seen.push((uri.to_string(), authorization));
    if let Some(status) = weather.token_status {
        return answer(status, "{}");
    }
    weather.tokens += 1;
    weather.uses = 0;
    answer(
        StatusCode::OK,
        format!(r#"{{"token": "token-{}"}}"#, weather.tokens),
    )
}

async fn content(
    State(weather): State<Shared>,
    Path((kind, name)): Path<(String, String)>,
    headers: HeaderMap,
) -> Response<Body> {
    let mut weather = weather.lock().unwrap();
    let authorization = headers
        .get(header::AUTHORIZATION)
        .map(|value| value.to_str().unwrap().to_owned());
    weather
        .seen
        .push((format!("{kind}/{name}"), authorization.clone()));
    if let Some(realm) = weather.realm.clone() {
        weather.uses += 1;
        let good = authorization == Some(format!("Bearer token-{}", weather.tokens));
        if !good || weather.uses > weather.token_life {
            let challenge = format!(r#"Bearer realm="{realm}",service="here",scope="repository:vm:pull""#);
            return Response::builder()
                .status(401)
                .header(header::WWW_AUTHENTICATE, challenge)
                .body(Body::empty())
                .unwrap();
        }
    }
    let Some(bytes) = weather.content.get(&name).cloned() else {
        return answer(StatusCode::NOT_FOUND, "{}");
    };
    let layer = kind == "blobs" && bytes.len() > 4096;
    if !layer {
        return answer(StatusCode::OK, bytes);
    }
    if let Some(storage) = &weather.storage {
        let target = format!("http://{storage}/v2/vm/blobs/{name}");
        return Response::builder()
            .status(307)
            .header(header::LOCATION, target)
            .body(Body::empty())
            .unwrap();
    }
    if !weather.failures.is_empty() {
        let mut response = answer(weather.failures.remove(0), "");
        if let Some(seconds) = weather.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        return response;
    }
    let range = headers
        .get(header::RANGE)
        .map(|value| value.to_str().unwrap().to_owned());
    weather.ranges.push(range.clone());
    let asked = range.filter(|_| !weather.no_ranges);
    let (start, end) = asked.as_deref().map_or((0, bytes.len()), |range| {
        let (start, last) = range.trim_start_matches("bytes=").split_once('-').unwrap();
        let end = last.parse::<usize>().map_or(bytes.len(), |last| last + 1);
        (start.parse().unwrap(), end)
    });
    let mut response = Response::builder();
    if asked.is_some() {
        let part = format!("bytes {start}-{}/{}", end - 1, bytes.len());
        response = response.status(206).header(header::CONTENT_RANGE, part);
    }
    let rest = bytes[start..end].to_vec();
    let length = weather.cut_after.unwrap_or(rest.len()).min(rest.len());
    let whole = length == rest.len();
    let pieces: Vec<Result<Bytes, std::io::Error>> = rest[..length]
        .chunks(16 * 1024)
        .map(|piece| Ok(Bytes::copy_from_slice(piece)))
        .chain((!whole).then(|| Err(std::io::Error::other("cut"))))
        .collect();
    response
        .header(header::CONTENT_LENGTH, rest.len())
        .body(Body::from_stream(futures_util::stream::iter(pieces)))
        .unwrap()
}

/// Serves from a thread of its own for as long as the test runs; its `host:port`.
fn serve(weather: &Shared) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let weather = Arc::clone(weather);
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let app = axum::Router::new()
                .route("/token", get(token))
                .route("/v2/vm/{kind}/{name}", get(content))
                .with_state(weather);
            axum::serve(tokio::net::TcpListener::from_std(listener).unwrap(), app)
                .await
                .unwrap();
        });
    });
    host
}

struct Bench {
    _dir: tempfile::TempDir,
    store: Store,
    weather: Shared,
    host: String,
    disk: Vec<u8>,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(&dir.path().join("layout"));
        let disk = noise(1, 1 << 20);
        let archive = Tar::new().file("disk/disk.img", &disk).bytes();
        let digest = layout.add("vm", &Image::container_disk(&archive, OCI_TAR_GZIP));
        let mut content: HashMap<String, Vec<u8>> = std::fs::read_dir(layout.dir.join("blobs/sha256"))
            .unwrap()
            .map(|entry| {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_str().unwrap();
                (format!("sha256:{name}"), std::fs::read(&path).unwrap())
            })
            .collect();
        content.insert("1".to_owned(), content[&digest].clone());
        let weather = Arc::new(Mutex::new(Weather {
            content,
            token_life: u32::MAX,
            ..Weather::default()
        }));
        let host = serve(&weather);
        let store = Store::open(&dir.path().join("store")).unwrap();
        Self {
            _dir: dir,
            store,
            weather,
            host,
            disk,
        }
    }

    fn change(&self, change: impl FnOnce(&mut Weather)) {
        change(&mut self.weather.lock().unwrap());
    }

    fn request(&self) -> Request {
        Request {
            reference: format!("{}/vm:1", self.host).parse().unwrap(),
            architecture: "x86_64".to_owned(),
            policies: vec![PullPolicy::Always],
            credentials: Credentials::basic(&self.host, "ci", Secret::new("sesame")),
            registries: Registries::without_tls([&self.host]),
            requirements: Requirements::default(),
            limits: Limits {
                max_disk: 64 << 20,
                keep_free: 0,
            },
            asker: cannery::image::Asker::Operator,
        }
    }

    fn pull(&self) -> Result<Disk, Error> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(self.store.provide(&self.request(), &Silent))
    }

    fn pull_well(&self) {
        let disk = self.pull().unwrap();
        assert!(std::fs::read(disk.path).unwrap() == self.disk);
    }
}

#[test]
fn a_cut_transfer_goes_on_where_it_was_cut() {
    let bench = Bench::new();
    bench.change(|weather| weather.cut_after = Some(600_000));
    bench.pull_well();
    let ranges = bench.weather.lock().unwrap().ranges.clone();
    assert!(ranges.len() >= 2 && ranges[0].is_none(), "{ranges:?}");
    // What had arrived is not asked for again.
    let starts: Vec<u64> = ranges[1..]
        .iter()
        .map(|range| {
            let range = range.as_deref().unwrap().trim_start_matches("bytes=");
            range.split_once('-').unwrap().0.parse().unwrap()
        })
        .collect();
    assert!(
        starts[0] > 100_000 && starts.is_sorted_by(|a, b| a < b),
        "{ranges:?}"
    );
}

#[test]
fn a_registry_without_ranges_sends_the_whole_again() {
    let bench = Bench::new();
    bench.change(|weather| (weather.cut_after, weather.no_ranges) = (Some(400_000), true));
    let start = Instant::now();
    // It never gets further: that ends, and says why.
    let error = bench.pull().unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert!(start.elapsed() < Duration::from_secs(20));
    bench.change(|weather| weather.cut_after = None);
    bench.pull_well();
}

/// Hears how long which registry was waited for, and for how long it will be.
#[derive(Default)]
struct Unanswered(Mutex<Vec<(String, Duration, Duration)>>);

impl Progress for Unanswered {
    fn event(&self, event: Event<'_>) {
        if let Event::Unanswered {
            registry,
            waited,
            most,
        } = event
        {
            self.0.lock().unwrap().push((registry.to_owned(), waited, most));
        }
    }
}

#[test]
fn a_registry_that_never_answers_is_named_while_it_is_waited_for_and_when_it_is_given_up() {
    // The kernel takes the connections, and nobody reads what comes.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let bench = Bench {
        host: listener.local_addr().unwrap().to_string(),
        ..Bench::new()
    };
    let heard = Unanswered::default();
    // Its clock goes to the next moment at which something is due.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    let start = Instant::now();
    let error = runtime.block_on(bench.store.provide(&bench.request(), &heard));
    let error = error.unwrap_err().to_string();
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    let begin = format!("{} cannot be reached: it does not answer in time", bench.host);
    assert!(
        error.starts_with(&begin)
            && error.contains("(asked 4 times in ")
            && error.ends_with(" s for /v2/vm/manifests/1)"),
        "{error}"
    );
    let heard = heard.0.into_inner().unwrap();
    let (first, last) = (&heard[0], heard.last().unwrap());
    assert!(
        first.1 >= Duration::from_secs(5) && first.1 < Duration::from_secs(6),
        "{first:?}"
    );
    assert!(last.1 > Duration::from_secs(40), "{last:?}");
    assert!(heard.is_sorted_by_key(|(_, waited, _)| *waited), "{heard:?}");
    assert!(heard.iter().all(|(registry, waited, most)| {
        *registry == bench.host && waited <= most && *most == Duration::from_millis(126_750)
    }));
}

#[test]
fn a_registry_that_says_no_is_not_silent_and_without_tls_in_common_it_is_asked_once() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = listener.local_addr().unwrap().to_string();
    drop(listener);
    let pull = |change: &dyn Fn(&mut Bench), tls: bool| {
        let mut bench = Bench::new();
        change(&mut bench);
        let mut request = bench.request();
        if tls {
            request.registries = Registries::default();
        }
        let heard = Unanswered::default();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let error = runtime
            .block_on(bench.store.provide(&request, &heard))
            .unwrap_err();
        assert!(heard.0.into_inner().unwrap().is_empty(), "{error}");
        error.to_string()
    };
    let refused = pull(&|bench| bench.host.clone_from(&nobody), false);
    assert!(refused.contains("(asked 4 times in "), "{refused}");
    let overloaded = pull(
        &|bench| bench.change(|weather| weather.failures = vec![StatusCode::SERVICE_UNAVAILABLE; 4]),
        false,
    );
    assert!(
        overloaded.contains("it answered 503 (asked 4 times in "),
        "{overloaded}"
    );
    let unlike = pull(&|_| {}, true);
    assert!(unlike.ends_with("TLS failed: wrong version number"), "{unlike}");
}

/// Hears how much was left of a pause.
#[derive(Default)]
struct Pauses(Mutex<Vec<(String, Duration)>>);

impl Progress for Pauses {
    fn event(&self, event: Event<'_>) {
        if let Event::Paused { registry, left } = event {
            self.0.lock().unwrap().push((registry.to_owned(), left));
        }
    }
}

#[test]
fn who_waits_for_a_long_pause_is_told_how_much_is_left() {
    let bench = Bench::new();
    bench.change(|weather| {
        weather.failures = vec![StatusCode::TOO_MANY_REQUESTS];
        weather.retry_after = Some(7);
    });
    let heard = Pauses::default();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime
        .block_on(bench.store.provide(&bench.request(), &heard))
        .unwrap();
    let heard = heard.0.into_inner().unwrap();
    // Nobody hears of the first five seconds.
    assert!(
        !heard.is_empty()
            && heard.iter().all(|(registry, left)| {
                *registry == bench.host && *left > Duration::ZERO && *left < Duration::from_secs(6)
            }),
        "{heard:?}"
    );
}

#[test]
fn an_overloaded_registry_is_asked_again_and_not_too_soon() {
    let bench = Bench::new();
    bench.change(|weather| {
        weather.failures = vec![StatusCode::SERVICE_UNAVAILABLE, StatusCode::TOO_MANY_REQUESTS];
        weather.retry_after = Some(2);
    });
    let start = Instant::now();
    bench.pull_well();
    assert!(start.elapsed() >= Duration::from_secs(4), "{:?}", start.elapsed());
}

#[test]
fn an_answer_that_is_no_weather_is_not_asked_for_twice() {
    let bench = Bench::new();
    bench.change(|weather| weather.failures = vec![StatusCode::IM_A_TEAPOT]);
    let error = bench.pull().unwrap_err();
    assert!(error.to_string().contains("418"), "{error}");
    bench.change(|weather| weather.failures = vec![StatusCode::FORBIDDEN]);
    assert!(matches!(bench.pull(), Err(Error::Denied { .. })));
    bench.pull_well();
}

#[test]
fn a_token_is_fetched_for_the_repository_and_again_when_it_expires() {
    let bench = Bench::new();
    // Manifest and config use it up; the layer needs another one, in three parts.
    bench.change(|weather| {
        weather.realm = Some(format!("http://{}/token", bench.host));
        weather.token_life = 2;
        weather.cut_after = Some(400_000);
    });
    bench.pull_well();
    let weather = bench.weather.lock().unwrap();
    assert!(weather.tokens >= 2, "{}", weather.tokens);
    let (path, authorization) = weather
        .seen
        .iter()
        .find(|(path, _)| path.starts_with("/token"))
        .unwrap();
    assert_eq!(path, "/token?service=here&scope=repository%3Avm%3Apull");
    assert_eq!(authorization.as_deref(), Some("Basic Y2k6c2VzYW1l"));
    for (path, authorization) in weather
        .seen
        .iter()
        .filter(|(path, _)| !path.starts_with("/token"))
    {
        assert!(
            authorization
                .as_deref()
                .is_none_or(|text| text.starts_with("Bearer ")),
            "{path}"
        );
    }
}

#[test]
fn a_token_service_says_no_or_is_down() {
    let bench = Bench::new();
    bench.change(|weather| weather.realm = Some(format!("http://{}/token", bench.host)));
    for status in [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN] {
        bench.change(|weather| weather.token_status = Some(status));
        let error = bench.pull().unwrap_err();
        assert!(
            matches!(&error, Error::Denied { user: Some(user), .. } if user == "ci"),
            "{error}"
        );
    }
    bench.change(|weather| weather.token_status = Some(StatusCode::BAD_GATEWAY));
    let error = bench.pull().unwrap_err();
    assert!(
        error.to_string().contains("token service answered 502"),
        "{error}"
    );
    bench.change(|weather| {
        weather.token_status = None;
        weather.realm = Some("ftp://example.com/token".to_owned());
    });
    let error = bench.pull().unwrap_err();
    assert!(error.to_string().contains("without TLS"), "{error}");
}

#[test]
fn a_redirect_takes_no_credentials_along() {
    let bench = Bench::new();
    let content = bench.weather.lock().unwrap().content.clone();
    let storage = Arc::new(Mutex::new(Weather {
        content,
        token_life: u32::MAX,
        ..Weather::default()
    }));
    let storage_host = serve(&storage);
    bench.change(|weather| {
        weather.realm = Some(format!("http://{}/token", bench.host));
        weather.storage = Some(storage_host.clone());
    });
    bench.pull_well();
    let seen = storage.lock().unwrap().seen.clone();
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].1, None, "the storage saw a credential");
    // Storage that refuses is the storage's weather, not the job's missing right.
    let other = Bench::new();
    let refusing = Arc::new(Mutex::new(Weather {
        realm: Some("http://127.0.0.1/".into()),
        ..Weather::default()
    }));
    let refusing_host = serve(&refusing);
    other.change(|weather| weather.storage = Some(refusing_host));
    let error = other.pull().unwrap_err();
    assert!(error.to_string().contains("storage answered 401"), "{error}");
    assert!(
        refusing
            .lock()
            .unwrap()
            .seen
            .iter()
            .all(|(_, authorization)| authorization.is_none())
    );
}

#[test]
fn a_manifest_without_end_is_not_read_to_its_end() {
    let bench = Bench::new();
    bench.change(|weather| {
        weather.content.insert("1".to_owned(), vec![b' '; 5 << 20]);
    });
    assert!(matches!(
        bench.pull(),
        Err(Error::TooLarge { what: "manifest", .. })
    ));
}

#[test]
fn a_server_that_is_no_registry_is_named() {
    let bench = Bench::new();
    bench.change(|weather| {
        weather
            .content
            .insert("1".to_owned(), b"<html>It works!</html>".to_vec());
    });
    let error = bench.pull().unwrap_err();
    assert!(matches!(error, Error::Malformed { .. }), "{error}");
}
