//! A registry that fails as its seed says, and counts what it sends.

use std::collections::HashMap;
use std::path::Path as FilePath;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, Response, header};
use axum::routing::get;

/// Bytes that are sent at once.
const CHUNK: usize = 64 << 10;

/// Larger blobs are layers; only those meet faults.
const LAYER: usize = 64 << 10;

/// What can be wrong with one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fault {
    /// The connection breaks after some bytes.
    Cut,
    /// The answer ends well, and early.
    Truncated,
    /// One bit is another.
    Damaged,
    Status500,
    Status503,
    /// With a wish to wait.
    Status429,
    /// The part is another one than it says.
    WrongRange,
    /// The whole instead of a part.
    Whole,
    /// Bytes come slowly.
    Slow,
}

impl Fault {
    pub const ALL: [Fault; 9] = [
        Self::Cut,
        Self::Truncated,
        Self::Damaged,
        Self::Status500,
        Self::Status503,
        Self::Status429,
        Self::WrongRange,
        Self::Whole,
        Self::Slow,
    ];
}

#[derive(Default)]
struct Inner {
    /// By digest, and manifests by tag.
    content: HashMap<String, Arc<Vec<u8>>>,
    /// State of the random numbers.
    seed: u64,
    /// Faults in a hundred answers.
    rate: u64,
    faults: Vec<Fault>,
    /// The next answer is one, whatever the numbers say.
    surely: bool,
    met: Vec<Fault>,
    /// Nothing more is sent of layers after so many bytes.
    hold_after: Option<u64>,
    /// Requests are taken, and not answered.
    mute: bool,
    /// How often each name was asked for.
    asked: HashMap<String, usize>,
}

/// The registry. It serves until the test ends.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Mutex<Inner>>,
    /// Bytes of layers that were sent.
    sent: Arc<AtomicU64>,
    pub host: String,
}

impl Registry {
    pub fn new() -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let registry = Self {
            inner: Arc::default(),
            sent: Arc::default(),
            host: listener.local_addr().unwrap().to_string(),
        };
        let state = registry.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let app = axum::Router::new()
                    .route("/v2/{repository}/{kind}/{name}", get(answer))
                    .with_state(state);
                axum::serve(tokio::net::TcpListener::from_std(listener).unwrap(), app)
                    .await
                    .unwrap();
            });
        });
        registry
    }

    /// Takes an image of a layout folder in.
    pub fn add(&self, layout: &FilePath, digest: &str, tag: &str) {
        let mut inner = self.inner.lock().unwrap();
        for entry in std::fs::read_dir(layout.join("blobs/sha256")).unwrap() {
            let path = entry.unwrap().path();
            let name = format!("sha256:{}", path.file_name().unwrap().to_str().unwrap());
            inner
                .content
                .entry(name)
                .or_insert_with(|| Arc::new(std::fs::read(&path).unwrap()));
        }
        let manifest = Arc::clone(&inner.content[digest]);
        inner.content.insert(tag.to_owned(), manifest);
    }

    /// From now on, the first and so many of a hundred answers for layers are one of these faults.
    pub fn misbehave(&self, seed: u64, rate: u64, faults: &[Fault]) {
        let mut inner = self.inner.lock().unwrap();
        (inner.seed, inner.rate, inner.faults) = (seed | 1, rate, faults.to_vec());
        inner.surely = true;
    }

    /// Stops in the middle of a layer after so many bytes from now, until it is told otherwise.
    pub fn hold_after(&self, bytes: Option<u64>) {
        self.inner.lock().unwrap().hold_after = bytes.map(|bytes| self.sent() + bytes);
    }

    /// From now on it takes requests and answers none, until it is told otherwise.
    pub fn be_mute(&self, mute: bool) {
        self.inner.lock().unwrap().mute = mute;
    }

    /// Bytes of layers that were sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(SeqCst)
    }

    /// How often a tag or a digest was asked for.
    pub fn asked(&self, name: &str) -> usize {
        self.inner
            .lock()
            .unwrap()
            .asked
            .get(name)
            .copied()
            .unwrap_or_default()
    }

    /// The faults that were met, each with its number.
    pub fn met(&self) -> Vec<(Fault, usize)> {
        let met = &self.inner.lock().unwrap().met;
        let mut counts: Vec<(Fault, usize)> = Fault::ALL
            .iter()
            .map(|fault| (*fault, met.iter().filter(|other| *other == fault).count()))
            .collect();
        counts.retain(|(_, count)| *count > 0);
        counts
    }
}

impl Inner {
    fn random(&mut self) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed >> 8
    }

    fn fault(&mut self, part: bool) -> Option<Fault> {
        let chosen = self.random() % 100 < self.rate || std::mem::take(&mut self.surely);
        if self.faults.is_empty() || !chosen {
            return None;
        }
        let number = usize::try_from(self.random()).unwrap() % self.faults.len();
        let fault = self.faults[number];
        if matches!(fault, Fault::WrongRange | Fault::Whole) && !part {
            return None;
        }
        self.met.push(fault);
        Some(fault)
    }
}

async fn answer(
    State(registry): State<Registry>,
    Path((_, kind, name)): Path<(String, String, String)>,
    headers: HeaderMap,
) -> Response<Body> {
    while registry.inner.lock().unwrap().mute {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (bytes, fault, random) = {
        let mut inner = registry.inner.lock().unwrap();
        *inner.asked.entry(name.clone()).or_default() += 1;
        let known = inner.content.get(&name).cloned();
        let Some(bytes) = known.filter(|_| kind != "referrers") else {
            return Response::builder().status(404).body("{}".into()).unwrap();
        };
        if bytes.len() <= LAYER {
            return Response::new(bytes.to_vec().into());
        }
        let fault = inner.fault(headers.contains_key(header::RANGE));
        (bytes, fault, usize::try_from(inner.random()).unwrap())
    };
    let asked = headers.get(header::RANGE).map(|range| {
        let text = range.to_str().unwrap().trim_start_matches("bytes=");
        let (first, last) = text.split_once('-').unwrap();
        (
            first.parse::<usize>().unwrap(),
            last.parse::<usize>().map_or(bytes.len(), |last| last + 1),
        )
    });
    let status = match fault {
        Some(Fault::Status500) => Some(500),
        Some(Fault::Status503) => Some(503),
        Some(Fault::Status429) => Some(429),
        _ => None,
    };
    if let Some(status) = status {
        let refusal = Response::builder()
            .status(status)
            .header(header::RETRY_AFTER, "0");
        return refusal.body(Body::empty()).unwrap();
    }
    let asked = asked.filter(|_| fault != Some(Fault::Whole));
    let (begin, end) = asked.unwrap_or((0, bytes.len()));
    let mut response = Response::builder();
    if asked.is_some() {
        let shift = usize::from(fault == Some(Fault::WrongRange));
        let part = format!("bytes {}-{}/{}", begin + shift, end - 1, bytes.len());
        response = response.status(206).header(header::CONTENT_RANGE, part);
    }
    let mut body = bytes[begin..end].to_vec();
    let place = random % body.len();
    match fault {
        Some(Fault::Damaged) => body[place] ^= 1,
        Some(Fault::Cut | Fault::Truncated) => body.truncate(place),
        _ => {}
    }
    if fault != Some(Fault::Truncated) {
        response = response.header(header::CONTENT_LENGTH, end - begin);
    }
    let slow = fault == Some(Fault::Slow);
    let cut = fault == Some(Fault::Cut);
    let stream = futures_util::stream::unfold(
        (registry, Bytes::from(body), cut),
        move |(registry, mut rest, cut)| async move {
            if rest.is_empty() {
                let end = cut.then(|| Err(std::io::Error::other("cut")));
                return end.map(|end| (end, (registry, rest, false)));
            }
            if slow {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            loop {
                let limit = registry.inner.lock().unwrap().hold_after;
                if limit.is_none_or(|limit| registry.sent() < limit) {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let chunk = rest.split_to(CHUNK.min(rest.len()));
            registry.sent.fetch_add(chunk.len() as u64, SeqCst);
            Some((Ok(chunk), (registry, rest, cut)))
        },
    );
    response.body(Body::from_stream(stream)).unwrap()
}
