//! The HTTP clients: their time limits, their trust and their manners.

use std::convert::Infallible;
use std::error::Error as _;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::CONTENT_LENGTH;
use reqwest::{Client, ClientBuilder, RequestBuilder, Response, redirect};
use tokio::time::Instant;

use super::super::error::Error;
use super::silence::Silence;
use super::trust::{Reach, Registries, guarded};

/// Time to connect, TLS included. A registry that is up answers within one; the rest is for packet loss.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest wait for an answer to begin. Registries that fetch from their own storage first need some seconds.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest time in which nothing of an upload leaves, or in which the registry says nothing when all has: some move what they
/// got to a storage elsewhere before they answer.
pub(super) const TAKEN_TIMEOUT: Duration = Duration::from_secs(120);

/// An upload is handed to the connection in pieces of so many bytes, so that it shows when nothing moves.
const PIECE: usize = 128 << 10;

/// How long a transfer is watched before it is judged.
const WINDOW: Duration = Duration::from_secs(30);

/// The least that must arrive in a window, in bytes: a transfer that is slower than a telephone line is as good as cut, and
/// another connection may do better.
const FLOOR: u64 = 64 << 10;

/// Most redirects that are followed; registries use one, to their storage.
pub(super) const REDIRECTS_MAX: usize = 5;

/// Why nothing came of a request, or no more of its answer.
#[derive(Debug)]
pub(super) enum Trouble {
    /// For too long nothing was heard, or next to nothing.
    Silence(&'static str),
    /// It was refused or broken off, which another try may mend.
    Broken(String),
    /// The two sides do not fit each other, which no other try mends.
    Lasting(String),
}

/// Why an answer was not read to its end.
#[derive(Debug)]
pub(super) enum TooMuch {
    /// At least so many bytes.
    Size(u64),
    Cut(Trouble),
}

/// An answer's body, read no slower than the floor allows.
#[derive(Debug)]
pub(super) struct Body {
    response: Response,
    floor: Floor,
}

impl Body {
    pub(super) fn new(response: Response) -> Self {
        Self {
            response,
            floor: Floor::default(),
        }
    }

    /// What has arrived; none at the end. The error says how it was cut.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Trouble> {
        loop {
            let start = Instant::now();
            let left = WINDOW.saturating_sub(self.floor.waited);
            let chunk = tokio::time::timeout(left, self.response.chunk()).await;
            let bytes = match &chunk {
                Ok(Ok(Some(bytes))) => bytes.len() as u64,
                _ => 0,
            };
            // Only waiting counts: who reads slowly himself must not blame the sender.
            if !self.floor.stands(start.elapsed(), bytes) {
                return Err(Trouble::Silence("it sends next to nothing"));
            }
            if let Ok(result) = chunk {
                return result.map_err(|error| trouble(&error));
            }
        }
    }

    /// Reads it whole, if it has at most `limit` bytes.
    pub(super) async fn whole(mut self, limit: u64) -> Result<Vec<u8>, TooMuch> {
        let mut bytes = Vec::new();
        while let Some(piece) = self.next().await.map_err(TooMuch::Cut)? {
            bytes.extend_from_slice(&piece);
            if bytes.len() as u64 > limit {
                return Err(TooMuch::Size(bytes.len() as u64));
            }
        }
        Ok(bytes)
    }
}

/// What has arrived since the last judgement.
#[derive(Debug, Default)]
struct Floor {
    waited: Duration,
    bytes: u64,
}

impl Floor {
    /// Adds what one wait gave; false when a window is over that brought too little.
    fn stands(&mut self, waited: Duration, bytes: u64) -> bool {
        self.waited += waited;
        self.bytes += bytes;
        if self.waited < WINDOW {
            return true;
        }
        let enough = self.bytes >= FLOOR;
        *self = Self::default();
        enough
    }
}

/// Waits for an answer to begin.
pub(super) async fn begun(
    answer: impl Future<Output = reqwest::Result<Response>>,
) -> Result<Response, Trouble> {
    match tokio::time::timeout(ANSWER_TIMEOUT, answer).await {
        Ok(Ok(response)) => Ok(response),
        Ok(Err(error)) => Err(trouble(&error)),
        Err(_) => Err(Trouble::Silence(LATE)),
    }
}

/// Sends a request with a body and waits for its answer to begin. However slow the link is, it may take as long as it takes
/// while bytes leave, which ends a silence.
pub(super) async fn sent(
    request: RequestBuilder,
    body: &Bytes,
    silence: &Arc<Silence>,
) -> Result<Response, Trouble> {
    let moved = Arc::new(Mutex::new(Instant::now()));
    let (touch, silence) = (Arc::clone(&moved), Arc::clone(silence));
    let mut rest = body.clone();
    let pieces = std::iter::from_fn(move || {
        *touch.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        silence.heard();
        (!rest.is_empty()).then(|| Ok::<_, Infallible>(rest.split_to(rest.len().min(PIECE))))
    });
    let request = request
        .header(CONTENT_LENGTH, body.len())
        .body(reqwest::Body::wrap_stream(futures_util::stream::iter(pieces)));
    let answer = request.send();
    tokio::pin!(answer);
    loop {
        let last = *moved.lock().unwrap_or_else(PoisonError::into_inner);
        match tokio::time::timeout_at(last + TAKEN_TIMEOUT, &mut answer).await {
            Ok(Ok(response)) => return Ok(response),
            Ok(Err(error)) => return Err(trouble(&error)),
            Err(_) if last < *moved.lock().unwrap_or_else(PoisonError::into_inner) => {}
            Err(_) => return Err(Trouble::Silence("it does not take what is sent to it")),
        }
    }
}

/// What is said of a registry of which nothing is heard.
const LATE: &str = "it does not answer in time";

/// What OpenSSL says where the other side speaks no TLS, or none that we speak, or shows a certificate that we do not trust, or
/// does not trust ours.
const LASTING: [&str; 9] = [
    "wrong version number",
    "http request",
    "packet length too long",
    "unsupported protocol",
    "tlsv1 alert protocol version",
    "certificate verify failed",
    "tlsv1 alert unknown ca",
    "sslv3 alert bad certificate",
    "tlsv13 alert certificate required",
];

/// Why a request failed.
fn trouble(error: &reqwest::Error) -> Trouble {
    let lasting = |reason: &str| LASTING.contains(&reason);
    match cause(error) {
        _ if error.is_timeout() => Trouble::Silence(LATE),
        reason if reason.strip_prefix(TLS_FAILED).is_some_and(lasting) => Trouble::Lasting(reason),
        reason => Trouble::Broken(reason),
    }
}

/// How a reason begins that is OpenSSL's.
const TLS_FAILED: &str = "TLS failed: ";

/// The innermost reason of a failed request, without its address: that may carry a signature.
pub(super) fn cause(error: &reqwest::Error) -> String {
    let mut deepest: Option<&dyn std::error::Error> = error.source();
    while let Some(next) = deepest.and_then(std::error::Error::source) {
        deepest = Some(next);
    }
    let text = deepest.map_or_else(|| "the request failed".to_owned(), ToString::to_string);
    // OpenSSL's form is error:NUMBER:LIBRARY:FUNCTION:REASON:FILE:LINE.
    match text
        .strip_prefix("error:")
        .and_then(|parts| parts.split(':').nth(3))
    {
        Some(reason) => format!("{TLS_FAILED}{reason}"),
        None => text,
    }
}

/// The two clients for one registry.
#[derive(Debug)]
pub(super) struct Clients {
    /// For the registry itself, at whatever address the operator's network has it.
    pub(super) home: Client,
    /// For what the registry names: made when it is needed first, since a client reads all the host's authorities, which takes
    /// a tenth of a second of a processor.
    abroad: OnceLock<Client>,
    registry: String,
    authorities: Vec<reqwest::Certificate>,
    reach: Reach,
}

impl Clients {
    /// For what the registry names.
    pub(super) fn abroad(&self) -> Result<&Client, Error> {
        if let Some(client) = self.abroad.get() {
            return Ok(client);
        }
        let builder = basic(&self.authorities).dns_resolver(guarded(&self.reach));
        let client = built(builder, &self.registry)?;
        Ok(self.abroad.get_or_init(|| client))
    }
}

/// Clients with our time limits and manners. Neither follows a redirect by itself: who is sent where, and with which
/// credentials, is for [`super::endpoint`] to decide.
pub(super) fn clients(registries: &Registries, registry: &str, reach: &Reach) -> Result<Clients, Error> {
    let options = registries.options(registry);
    let mut authorities = Vec::new();
    for path in registries.ca_files.iter().chain(&options.ca_file) {
        authorities.extend(certificates(path)?);
    }
    let identity = match (&options.client_cert, &options.client_key) {
        (Some(certificate), Some(key)) => Some(identity(certificate, key)?),
        _ => None,
    };
    let mut home = basic(&authorities);
    if let Some(identity) = identity {
        home = home.identity(identity);
    }
    Ok(Clients {
        home: built(home, registry)?,
        abroad: OnceLock::new(),
        registry: registry.to_owned(),
        authorities,
        reach: reach.clone(),
    })
}

fn basic(authorities: &[reqwest::Certificate]) -> ClientBuilder {
    let builder = Client::builder()
        .user_agent(concat!("cannery/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        // An address with a signature must not be told to the next host.
        .referer(false)
        .redirect(redirect::Policy::none());
    let trusted = authorities.iter().cloned();
    trusted.fold(builder, ClientBuilder::add_root_certificate)
}

fn built(builder: ClientBuilder, registry: &str) -> Result<Client, Error> {
    builder.build().map_err(|error| Error::Unreachable {
        registry: registry.to_owned(),
        reason: format!("TLS cannot be set up ({})", cause(&error)),
    })
}

/// The certificates of a PEM file.
fn certificates(path: &Path) -> Result<Vec<reqwest::Certificate>, Error> {
    let unusable = |reason: String| Error::CaFile {
        path: path.to_owned(),
        reason,
    };
    let pem = std::fs::read(path).map_err(|error| unusable(error.to_string()))?;
    let stack = openssl::x509::X509::stack_from_pem(&pem).unwrap_or_default();
    if stack.is_empty() {
        return Err(unusable("it holds no PEM certificates".to_owned()));
    }
    let read = |certificate: &openssl::x509::X509| {
        let der = certificate
            .to_der()
            .map_err(|error| unusable(error.to_string()))?;
        reqwest::Certificate::from_der(&der).map_err(|error| unusable(cause(&error)))
    };
    stack.iter().map(read).collect()
}

/// The certificate that we show, and its key.
fn identity(certificate: &Path, key: &Path) -> Result<reqwest::Identity, Error> {
    let unusable = |path: &Path, reason: String| Error::ClientCertificate {
        path: path.to_owned(),
        reason,
    };
    let read = |path: &Path| std::fs::read(path).map_err(|error| unusable(path, error.to_string()));
    let chain = read(certificate)?;
    // Whatever form the key has, it is handed on in the one that is taken.
    let private = openssl::pkey::PKey::private_key_from_pem_callback(&read(key)?, |_| Ok(0))
        .and_then(|private| private.private_key_to_pem_pkcs8())
        .map_err(|_| {
            unusable(
                key,
                "it holds no private key in PEM without a passphrase".to_owned(),
            )
        })?;
    reqwest::Identity::from_pkcs8_pem(&chain, &private).map_err(|error| unusable(certificate, cause(&error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_is_judged_by_what_comes_while_we_wait() {
        let second = Duration::from_secs(1);
        let mut floor = Floor::default();
        // Little, but the window is not over.
        assert!((0..29).all(|_| floor.stands(second, 1)));
        assert!(!floor.stands(second, 1));
        // Just enough, and then a new window begins.
        for _ in 0..3 {
            assert!((0..29).all(|_| floor.stands(second, 0)));
            assert!(floor.stands(second, FLOOR));
        }
        // A reader who is slow himself waits for nobody.
        assert!((0..1000).all(|_| floor.stands(Duration::ZERO, 1)));
        // Silence for a whole window.
        assert!(!floor.stands(WINDOW, 0));
    }
}
