//! Talks to a registry (OCI distribution specification 1.1; Docker's token authentication).
//!
//! Manifests, configs and layers all come through [`Session::get`], one function of ours: it bounds what is
//! read, keeps time, sends credentials to nobody but the registry and its token service, and tells the
//! weather (worth another try) from an answer.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{
    ACCEPT, AUTHORIZATION, CONTENT_RANGE, HeaderMap, HeaderValue, RANGE, RETRY_AFTER, WWW_AUTHENTICATE,
};
use reqwest::{Client, Response, StatusCode, Url};
use serde::Deserialize;
use tokio::sync::Mutex;

use super::challenge::{self, Challenge};
use super::credentials::Login;
use super::digest::Digest;
use super::error::Error;
use super::manifest::{
    Descriptor, IMAGE_MANIFEST_LIST_MEDIA_TYPE, IMAGE_MANIFEST_MEDIA_TYPE, OCI_IMAGE_INDEX_MEDIA_TYPE,
    OCI_IMAGE_MEDIA_TYPE,
};
use super::source::DOCUMENT_MAX;
use super::transport::{TooMuch, cause, client, read_bounded};

/// Pauses before the second, third and fourth try. Long enough for a load balancer to notice a dead server,
/// short enough that a job's author who looks at the log does not give up.
const PAUSES: [Duration; 3] = [
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(3),
];

/// Longest pause that a registry may ask for (`Retry-After`).
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// Progress in a layer that makes up for an earlier failure, in bytes: a transfer that is cut now and then
/// arrives, one that is cut all the time ends.
const PROGRESS_THAT_COUNTS: u64 = 4 << 20;

/// Largest answer of a token service, in bytes.
const TOKEN_MAX: u64 = 1 << 20;

/// Where Docker Hub really answers.
const DOCKER_HUB_API: &str = "registry-1.docker.io";

/// All kinds of manifests that can be read.
const MANIFESTS: [&str; 4] = [
    OCI_IMAGE_MEDIA_TYPE,
    OCI_IMAGE_INDEX_MEDIA_TYPE,
    IMAGE_MANIFEST_MEDIA_TYPE,
    IMAGE_MANIFEST_LIST_MEDIA_TYPE,
];

/// Which image, and how to get there.
#[derive(Debug)]
pub(super) struct Target<'a> {
    /// The reference, for errors.
    pub(super) image: &'a str,
    pub(super) registry: &'a str,
    pub(super) repository: &'a str,
    /// What the reference names: a tag or a digest.
    pub(super) name: String,
    pub(super) login: Option<Login>,
    pub(super) plain_http: bool,
    pub(super) ca_files: &'a [PathBuf],
}

/// A conversation about one repository.
#[derive(Debug)]
pub(super) struct Session {
    client: Client,
    image: String,
    registry: String,
    repository: String,
    name: String,
    /// `https://host/v2/repository`
    base: String,
    plain_http: bool,
    login: Option<Login>,
    /// What is sent along, once the registry has asked for it.
    authorization: Mutex<Option<HeaderValue>>,
}

/// Why a request gave nothing.
enum Failure {
    /// Try again; not before the pause, if the registry named one.
    Weather { reason: String, pause: Option<Duration> },
    /// Another try gives the same.
    Final(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

fn weather(reason: impl Into<String>) -> Failure {
    Failure::Weather {
        reason: reason.into(),
        pause: None,
    }
}

impl Session {
    pub(super) fn new(target: Target<'_>) -> Result<Self, Error> {
        let scheme = if target.plain_http { "http" } else { "https" };
        let host = if target.registry == "docker.io" {
            DOCKER_HUB_API
        } else {
            target.registry
        };
        Ok(Self {
            client: client(target.ca_files)?,
            image: target.image.to_owned(),
            registry: target.registry.to_owned(),
            repository: target.repository.to_owned(),
            name: target.name,
            base: format!("{scheme}://{host}/v2/{}", target.repository),
            plain_http: target.plain_http,
            login: target.login,
            authorization: Mutex::new(None),
        })
    }

    pub(super) fn image(&self) -> &str {
        &self.image
    }

    /// The manifest or index that the reference names.
    pub(super) async fn root(&self) -> Result<(Digest, Vec<u8>), Error> {
        let bytes = self
            .small(
                &format!("manifests/{}", self.name),
                "manifest",
                &MANIFESTS.join(", "),
            )
            .await?;
        let found = Digest::of(&bytes);
        if let Ok(asked) = self.name.parse::<Digest>()
            && asked != found
        {
            let reason = format!("{} sent the manifest {found} for {asked}", self.registry);
            return Err(Error::Corrupt {
                image: self.image.clone(),
                reason,
            });
        }
        Ok((found, bytes))
    }

    /// A manifest by digest; the caller verifies it.
    pub(super) async fn manifest(&self, digest: &Digest) -> Result<Vec<u8>, Error> {
        self.small(&format!("manifests/{digest}"), "manifest", &MANIFESTS.join(", "))
            .await
    }

    /// A small blob, whole; the caller verifies it.
    pub(super) async fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, Error> {
        self.small(&format!("blobs/{}", descriptor.digest), "config", "*/*")
            .await
    }

    async fn small(&self, path: &str, what: &'static str, accept: &str) -> Result<Vec<u8>, Error> {
        let mut tries = PAUSES.iter();
        loop {
            let result = async {
                let response = self.get(path, accept, 0..u64::MAX).await?;
                read_bounded(response, DOCUMENT_MAX)
                    .await
                    .map_err(|failure| match failure {
                        TooMuch::Size(size) => Failure::Final(Error::TooLarge {
                            image: self.image.clone(),
                            what,
                            size,
                            limit: DOCUMENT_MAX,
                        }),
                        TooMuch::Cut(reason) => weather(reason),
                    })
            };
            match result.await {
                Ok(bytes) => return Ok(bytes),
                Err(failure) => self.pause(failure, tries.next()).await?,
            }
        }
    }

    /// A part of a blob. Many parts may be on their way at once; what comes is not verified.
    pub(super) fn range(&self, descriptor: &Descriptor, range: Range<u64>) -> Ranged<'_> {
        Ranged {
            session: self,
            descriptor: descriptor.clone(),
            begin: range.start,
            left: range,
            open: None,
            counted: 0,
            tries: PAUSES.iter(),
        }
    }

    /// Waits before the next try, or gives up.
    async fn pause(&self, failure: Failure, next: Option<&Duration>) -> Result<(), Error> {
        match (failure, next) {
            (Failure::Final(error), _) => Err(error),
            (Failure::Weather { reason, .. }, None) => Err(self.unreachable(reason)),
            (Failure::Weather { reason, pause }, Some(next)) => {
                tracing::debug!(registry = self.registry, reason, "trying again");
                tokio::time::sleep(pause.unwrap_or_default().clamp(*next, PAUSE_MAX)).await;
                Ok(())
            }
        }
    }

    /// One request under our repository; `from` is the part that is asked for.
    async fn get(&self, path: &str, accept: &str, from: Range<u64>) -> Result<Response, Failure> {
        let url = format!("{}/{path}", self.base);
        let known = self.authorization.lock().await.clone();
        let mut response = self.send(&url, accept, &from, known).await?;
        if response.status() == StatusCode::UNAUTHORIZED && self.is_registry(response.url()) {
            // Asked for the first time, or a token has expired.
            let header = self.authorize(response.headers()).await?;
            *self.authorization.lock().await = Some(header.clone());
            response = self.send(&url, accept, &from, Some(header)).await?;
        }
        let status = response.status();
        match status {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(response),
            // Storage behind a registry answers so when the address that it was asked at has expired.
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if !self.is_registry(response.url()) => {
                Err(weather(format!("its storage answered {}", status.as_u16())))
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(Failure::Final(self.denied())),
            StatusCode::NOT_FOUND if path == format!("manifests/{}", self.name) => {
                let (image, registry) = (self.image.clone(), self.registry.clone());
                Err(Failure::Final(Error::NotFound { image, registry }))
            }
            StatusCode::NOT_FOUND => Err(Failure::Final(Error::Corrupt {
                image: self.image.clone(),
                reason: format!("{} has lost {path}", self.registry),
            })),
            _ => Err(self.refused(status, response.headers(), "it")),
        }
    }

    async fn send(
        &self,
        url: &str,
        accept: &str,
        from: &Range<u64>,
        authorization: Option<HeaderValue>,
    ) -> Result<Response, Failure> {
        let mut request = self.client.get(url).header(ACCEPT, accept);
        if *from != (0..u64::MAX) {
            request = request.header(RANGE, format!("bytes={}-{}", from.start, from.end - 1));
        }
        if let Some(authorization) = authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        request.send().await.map_err(|error| weather(cause(&error)))
    }

    /// Does an answer come from the registry itself, and not from where it redirected us?
    fn is_registry(&self, url: &Url) -> bool {
        Url::parse(&self.base).is_ok_and(|base| base.origin() == url.origin())
    }

    /// An answer that is neither yes nor a clear no.
    fn refused(&self, status: StatusCode, headers: &HeaderMap, who: &str) -> Failure {
        let reason = format!("{who} answered {}", status.as_u16());
        let passing = status.is_server_error()
            || [StatusCode::TOO_MANY_REQUESTS, StatusCode::REQUEST_TIMEOUT].contains(&status);
        if passing {
            let seconds = headers
                .get(RETRY_AFTER)
                .and_then(|value| value.to_str().ok()?.parse().ok());
            Failure::Weather {
                reason,
                pause: seconds.map(Duration::from_secs),
            }
        } else {
            Failure::Final(self.unreachable(reason))
        }
    }

    fn unreachable(&self, reason: String) -> Error {
        Error::Unreachable {
            registry: self.registry.clone(),
            reason,
        }
    }

    fn denied(&self) -> Error {
        Error::Denied {
            image: self.image.clone(),
            registry: self.registry.clone(),
            user: self.login.as_ref().map(|login| login.user.clone()),
        }
    }

    /// Answers a challenge with a header for the next request.
    async fn authorize(&self, headers: &HeaderMap) -> Result<HeaderValue, Failure> {
        let challenges: Vec<Challenge> = headers
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(challenge::parse)
            .collect();
        let bearer = challenges.iter().find_map(|challenge| match challenge {
            Challenge::Bearer { realm, service } => Some((realm, service)),
            Challenge::Basic => None,
        });
        let text = match (bearer, &self.login) {
            (Some((realm, service)), _) => format!("Bearer {}", self.token(realm, service.as_deref()).await?),
            (None, Some(login)) if challenges.contains(&Challenge::Basic) => {
                use base64::Engine as _;
                let pair = format!("{}:{}", login.user, login.password.reveal());
                format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair))
            }
            _ => return Err(Failure::Final(self.denied())),
        };
        let mut header = HeaderValue::from_str(&text)
            .map_err(|_| self.unreachable("its token service sent a token that is none".to_owned()))?;
        header.set_sensitive(true);
        Ok(header)
    }

    /// Fetches a token for pulling from our repository.
    async fn token(&self, realm: &str, service: Option<&str>) -> Result<String, Failure> {
        #[derive(Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
        }
        let mut url = Url::parse(realm)
            .map_err(|_| self.unreachable("it asks for a token from an address that is none".to_owned()))?;
        // The password goes there: only encrypted, unless the operator said otherwise for this registry.
        if url.scheme() != "https" && !(self.plain_http && url.scheme() == "http") {
            return Err(self
                .unreachable("it asks for a token from an address without TLS".to_owned())
                .into());
        }
        if let Some(service) = service {
            url.query_pairs_mut().append_pair("service", service);
        }
        url.query_pairs_mut()
            .append_pair("scope", &format!("repository:{}:pull", self.repository));
        let mut request = self.client.get(url);
        if let Some(login) = &self.login {
            request = request.basic_auth(&login.user, Some(login.password.reveal()));
        }
        let response = request.send().await.map_err(|error| weather(cause(&error)))?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST => {
                return Err(Failure::Final(self.denied()));
            }
            status => return Err(self.refused(status, response.headers(), "its token service")),
        }
        let bytes = read_bounded(response, TOKEN_MAX)
            .await
            .map_err(|failure| match failure {
                TooMuch::Size(_) => self
                    .unreachable("its token service sent more than 1 MiB".to_owned())
                    .into(),
                TooMuch::Cut(reason) => weather(reason),
            })?;
        serde_json::from_slice(&bytes)
            .ok()
            .and_then(|answer: Answer| answer.token.or(answer.access_token))
            .ok_or_else(|| {
                self.unreachable("its token service sent no token".to_owned())
                    .into()
            })
    }
}

/// A part of a blob on its way.
#[derive(Debug)]
pub(super) struct Ranged<'a> {
    session: &'a Session,
    descriptor: Descriptor,
    begin: u64,
    /// What is still to come.
    left: Range<u64>,
    /// The answer, and bytes that come in it before those that were asked for.
    open: Option<(Response, u64)>,
    counted: u64,
    tries: std::slice::Iter<'static, Duration>,
}

impl Ranged<'_> {
    /// The next bytes; none after the last. Exactly the bytes of the range come, or an error.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        while !self.left.is_empty() {
            match self.step().await {
                Ok(bytes) if bytes.is_empty() => {}
                Ok(bytes) => {
                    self.left.start += bytes.len() as u64;
                    return Ok(Some(bytes));
                }
                Err(failure) => {
                    self.open = None;
                    let sent = self.left.start - self.begin;
                    if sent - self.counted >= PROGRESS_THAT_COUNTS {
                        self.tries = PAUSES.iter();
                        self.counted = sent;
                    }
                    self.session.pause(failure, self.tries.next()).await?;
                }
            }
        }
        Ok(None)
    }

    async fn step(&mut self) -> Result<Bytes, Failure> {
        if self.open.is_none() {
            let whole = self.left == (0..self.descriptor.size);
            let part = if whole { 0..u64::MAX } else { self.left.clone() };
            let path = format!("blobs/{}", self.descriptor.digest);
            let response = self.session.get(&path, "*/*", part).await?;
            // A registry may answer with the whole again; then its beginning is known already.
            let known = match response.status() {
                StatusCode::PARTIAL_CONTENT if self.left.start == range_start(response.headers()) => 0,
                StatusCode::PARTIAL_CONTENT => {
                    return Err(weather("it sent another part of a layer than asked for"));
                }
                _ => self.left.start,
            };
            self.open = Some((response, known));
        }
        let Some((response, known)) = &mut self.open else {
            return Ok(Bytes::new());
        };
        let chunk = response.chunk().await.map_err(|error| weather(cause(&error)))?;
        let mut bytes = chunk.ok_or_else(|| weather("it ended a layer early"))?;
        let skipped = usize::try_from(*known).unwrap_or(usize::MAX).min(bytes.len());
        drop(bytes.split_to(skipped));
        *known -= skipped as u64;
        bytes.truncate(usize::try_from(self.left.end - self.left.start).unwrap_or(usize::MAX));
        Ok(bytes)
    }
}

/// Where a partial answer begins; past every file when it does not say.
fn range_start(headers: &HeaderMap) -> u64 {
    headers
        .get(CONTENT_RANGE)
        .and_then(|value| {
            value
                .to_str()
                .ok()?
                .strip_prefix("bytes ")?
                .split_once('-')?
                .0
                .parse()
                .ok()
        })
        .unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_of_a_part_is_read() {
        let mut headers = HeaderMap::new();
        assert_eq!(range_start(&headers), u64::MAX);
        for (text, start) in [
            ("bytes 5-9/10", 5),
            ("bytes 0-0/*", 0),
            ("bytes */10", u64::MAX),
            ("x", u64::MAX),
        ] {
            headers.insert(CONTENT_RANGE, HeaderValue::from_static(text));
            assert_eq!(range_start(&headers), start, "{text}");
        }
    }
}
