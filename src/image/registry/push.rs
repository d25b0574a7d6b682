//! Writes to a registry: blobs from memory or as a stream, manifests, tags.
//!
//! Source: OCI distribution specification 1.1, "Push". What Debian's docker-registry 2.8.2 was seen to do beside it: a `PATCH`
//! at a wrong offset is taken with 202 and spoils the upload, which shows only at the end; so what has arrived is always
//! compared with what was sent. Only the newest `Location` of an upload works.

use bytes::{Bytes, BytesMut};
use reqwest::header::{
    ACCEPT, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, LINK, LOCATION, RANGE,
};
use reqwest::{Method, StatusCode, Url};
use serde::Deserialize;

use super::super::digest::Digest;
use super::super::error::{Error, quoted};
use super::super::source::DOCUMENT_MAX;
use super::Session;
use super::endpoint::{Answer, Ask, Endpoint};
use super::transport::Body;
use super::weather::{Failure, weather};

/// How much of a stream is sent at a time, in bytes, and kept in memory until the registry has it. More is sent where the
/// registry asks for more.
const CHUNK: usize = 16 << 20;

/// Most that a registry may ask for at a time, in bytes: it is kept in memory.
const CHUNK_MAX: usize = 64 << 20;

/// How a registry says that it wants larger chunks.
const CHUNK_MIN_LENGTH: &str = "oci-chunk-min-length";

/// Largest refusal that is read for its reason, in bytes.
const REFUSAL_MAX: u64 = 64 << 10;

/// What blobs are sent as.
const OCTETS: &str = "application/octet-stream";

impl Session {
    /// The size of a blob in bytes, if the repository has it.
    pub(in crate::image) async fn has_blob(&self, digest: &Digest) -> Result<Option<u64>, Error> {
        let endpoint = self.endpoint();
        let ask = Ask::new(Method::HEAD, endpoint.url(&format!("blobs/{digest}"))?).with(ACCEPT, "*/*");
        endpoint
            .persistently(ask.url.path(), async || {
                let answer = endpoint.ask(&ask).await?;
                match answer.response.status() {
                    StatusCode::OK => {
                        let length = answer.response.headers().get(CONTENT_LENGTH);
                        let size = length.and_then(|value| value.to_str().ok()?.parse().ok());
                        Ok(Some(size.unwrap_or_default()))
                    }
                    StatusCode::NOT_FOUND => Ok(None),
                    _ => Err(endpoint.refusal(answer, "a blob").await),
                }
            })
            .await
    }

    /// Has the registry take a blob over from another of its repositories. False when it does not: then it must be uploaded.
    pub(in crate::image) async fn mount(&self, digest: &Digest, from: &str) -> Result<bool, Error> {
        let endpoint = self.endpoint();
        endpoint.tokens().also_read(from).await;
        let mut url = endpoint.uploads()?;
        url.query_pairs_mut()
            .append_pair("mount", &digest.to_string())
            .append_pair("from", from);
        let ask = Ask::new(Method::POST, url).with(CONTENT_LENGTH, "0");
        let asked = endpoint
            .persistently(ask.url.path(), async || endpoint.ask(&ask).await)
            .await;
        let answer = match asked {
            // No token for both: from now on only for our own again, which the upload needs.
            Err(Error::ScopeMissing { .. }) => {
                endpoint.tokens().no_longer_read(from).await;
                return Ok(false);
            }
            asked => asked?,
        };
        match answer.response.status() {
            StatusCode::CREATED => Ok(true),
            // It has begun an upload instead, which nobody wants.
            StatusCode::ACCEPTED => {
                if let Ok(url) = endpoint.location(&ask.url, answer.response.headers()) {
                    drop(endpoint.ask(&Ask::new(Method::DELETE, url)).await);
                }
                Ok(false)
            }
            // Whether we may write at all, the upload will tell.
            _ => Ok(false),
        }
    }

    /// Uploads a blob that is in memory. Whether the repository has it already is not asked.
    pub(in crate::image) async fn upload(&self, digest: &Digest, bytes: Bytes) -> Result<(), Error> {
        let endpoint = self.endpoint();
        let uploads = endpoint.uploads()?;
        endpoint
            .persistently(uploads.path(), async || {
                let (mut url, _) = endpoint.begin_upload().await?;
                url.query_pairs_mut().append_pair("digest", &digest.to_string());
                let mut ask = Ask::new(Method::PUT, url).with(CONTENT_TYPE, OCTETS);
                ask.body = Some(bytes.clone());
                let answer = endpoint.ask(&ask).await?;
                match answer.response.status() {
                    StatusCode::CREATED | StatusCode::NO_CONTENT => Ok(()),
                    // The upload was lost, as by a registry that was restarted.
                    StatusCode::NOT_FOUND => Err(weather("it lost an upload")),
                    _ => Err(endpoint.refusal(answer, "a blob").await),
                }
            })
            .await
    }

    /// Begins to upload a blob whose size and digest are not known yet.
    pub(in crate::image) fn upload_stream(&self) -> Upload {
        Upload {
            endpoint: self.endpoint(),
            url: None,
            sent: 0,
            chunk: CHUNK,
            held: BytesMut::new(),
        }
    }

    /// Stores a manifest or an index under a tag, or under its own digest. Its blobs must be there.
    pub(in crate::image) async fn put_manifest(
        &self,
        name: &str,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<Digest, Error> {
        let endpoint = self.endpoint();
        let digest = Digest::of(&bytes);
        let url = endpoint.url(&format!("manifests/{name}"))?;
        let mut ask = Ask::new(Method::PUT, url).with(CONTENT_TYPE, media_type);
        ask.body = Some(bytes);
        endpoint
            .persistently(ask.url.path(), async || {
                let answer = endpoint.ask(&ask).await?;
                match answer.response.status() {
                    status if status.is_success() => Ok(()),
                    _ => Err(endpoint.refusal(answer, "the manifest").await),
                }
            })
            .await?;
        Ok(digest)
    }
}

/// A blob on its way to a registry, of which at most a chunk is in memory.
#[derive(Debug)]
pub(in crate::image) struct Upload {
    endpoint: std::sync::Arc<Endpoint>,
    /// Where the next request goes; none before the first.
    url: Option<Url>,
    /// Bytes that the registry has.
    sent: u64,
    chunk: usize,
    /// What it does not have yet.
    held: BytesMut,
}

impl Upload {
    /// Adds bytes. They are sent when a chunk is full.
    pub(in crate::image) async fn write(&mut self, mut bytes: Bytes) -> Result<(), Error> {
        while !bytes.is_empty() {
            let room = self.chunk.saturating_sub(self.held.len()).max(1);
            self.held
                .extend_from_slice(&bytes.split_to(room.min(bytes.len())));
            if self.held.len() >= self.chunk {
                self.flush().await?;
            }
        }
        Ok(())
    }

    /// Sends what is left; from then on the repository has the blob. The registry verifies the digest.
    pub(in crate::image) async fn finish(mut self, digest: &Digest) -> Result<(), Error> {
        self.flush().await?;
        let endpoint = std::sync::Arc::clone(&self.endpoint);
        let uploads = endpoint.uploads()?;
        let mut ended = false;
        endpoint
            .persistently(uploads.path(), async || {
                // The answer to the last try may have been lost, and not what it asked for.
                if ended && self.arrived(digest).await? {
                    return Ok(());
                }
                ended = true;
                let mut url = self.place().await?;
                url.query_pairs_mut().append_pair("digest", &digest.to_string());
                let mut ask = Ask::new(Method::PUT, url).with(CONTENT_TYPE, OCTETS);
                ask.body = Some(Bytes::new());
                let answer = endpoint.ask(&ask).await?;
                match answer.response.status() {
                    StatusCode::CREATED | StatusCode::NO_CONTENT => Ok(()),
                    _ => Err(endpoint.refusal(answer, "a blob").await),
                }
            })
            .await
    }

    /// Gives the upload up, and tells the registry.
    pub(in crate::image) async fn cancel(self) {
        if let Some(url) = self.url {
            drop(self.endpoint.ask(&Ask::new(Method::DELETE, url)).await);
        }
    }

    async fn arrived(&self, digest: &Digest) -> Result<bool, Failure> {
        let url = self.endpoint.url(&format!("blobs/{digest}"))?;
        let answer = self.endpoint.ask(&Ask::new(Method::HEAD, url)).await?;
        Ok(answer.response.status() == StatusCode::OK)
    }

    /// Where the next request goes.
    async fn place(&mut self) -> Result<Url, Failure> {
        if let Some(url) = &self.url {
            return Ok(url.clone());
        }
        let (url, least) = self.endpoint.begin_upload().await?;
        self.chunk = self.chunk.max(least.min(CHUNK_MAX));
        self.url = Some(url.clone());
        Ok(url)
    }

    /// Sends what is held, until the registry has it all.
    async fn flush(&mut self) -> Result<(), Error> {
        let held = std::mem::take(&mut self.held).freeze();
        let begin = self.sent;
        let end = begin + held.len() as u64;
        let endpoint = std::sync::Arc::clone(&self.endpoint);
        let uploads = endpoint.uploads()?;
        let mut unsure = false;
        endpoint
            .persistently(uploads.path(), async || {
                while self.sent < end {
                    if unsure {
                        self.ask_what_arrived(begin, end).await?;
                        unsure = false;
                        continue;
                    }
                    // Whatever goes wrong from here on, how far it went is for the registry to say.
                    unsure = true;
                    let before = self.sent;
                    let rest = usize::try_from(before - begin).unwrap_or(usize::MAX);
                    self.patch(held.slice(rest.min(held.len())..), begin, end).await?;
                    unsure = false;
                    if self.sent <= before {
                        return Err(weather("it took nothing of what was sent"));
                    }
                }
                Ok(())
            })
            .await
    }

    async fn patch(&mut self, bytes: Bytes, begin: u64, end: u64) -> Result<(), Failure> {
        let url = self.place().await?;
        let range = format!("{}-{}", self.sent, end - 1);
        let mut ask = Ask::new(Method::PATCH, url.clone())
            .with(CONTENT_TYPE, OCTETS)
            .with(CONTENT_RANGE, &range);
        ask.body = Some(bytes);
        let answer = self.endpoint.ask(&ask).await?;
        match answer.response.status() {
            StatusCode::ACCEPTED | StatusCode::NO_CONTENT | StatusCode::CREATED => {
                let headers = answer.response.headers();
                self.url = Some(self.endpoint.location(&url, headers)?);
                self.note(has(headers), begin, end)
            }
            // It does not begin where the registry is.
            StatusCode::RANGE_NOT_SATISFIABLE => Err(weather("it has another part of the upload")),
            _ => Err(self.endpoint.refusal(answer, "a blob").await),
        }
    }

    /// After trouble: how far is it, and where does it go on?
    async fn ask_what_arrived(&mut self, begin: u64, end: u64) -> Result<(), Failure> {
        let Some(url) = self.url.clone() else {
            return Ok(());
        };
        let answer = self.endpoint.ask(&Ask::new(Method::GET, url.clone())).await?;
        match answer.response.status() {
            StatusCode::NO_CONTENT | StatusCode::ACCEPTED | StatusCode::OK => {
                let headers = answer.response.headers();
                if headers.contains_key(LOCATION) {
                    self.url = Some(self.endpoint.location(&url, headers)?);
                }
                self.note(has(headers), begin, end)
            }
            StatusCode::NOT_FOUND if begin == 0 => {
                // Nothing is lost that we do not hold.
                (self.url, self.sent) = (None, 0);
                Ok(())
            }
            _ => Err(self.endpoint.refusal(answer, "an upload").await),
        }
    }

    /// What the registry says that it has must lie in what we hold.
    fn note(&mut self, has: Option<u64>, begin: u64, end: u64) -> Result<(), Failure> {
        match has {
            // Registries that say nothing took it all.
            None => self.sent = end,
            // `0-0` stands for one byte and for none: begin again.
            Some(0 | 1) if begin == 0 && end > 1 => (self.url, self.sent) = (None, 0),
            Some(count) if (begin..=end).contains(&count) => self.sent = count,
            Some(count) => {
                let reason =
                    format!("it has {count} bytes of an upload, of which {begin} to {end} were sent");
                return Err(self.endpoint.unreachable(reason).into());
            }
        }
        Ok(())
    }
}

/// How many bytes of an upload a registry says that it has: `Range: 0-LAST`.
fn has(headers: &HeaderMap) -> Option<u64> {
    let text = headers.get(RANGE)?.to_str().ok()?;
    let text = text.strip_prefix("bytes=").unwrap_or(text);
    let (first, last) = text.split_once('-')?;
    if first != "0" {
        return None;
    }
    last.parse::<u64>().ok()?.checked_add(1)
}

impl Endpoint {
    /// Where uploads begin.
    fn uploads(&self) -> Result<Url, Error> {
        self.url("blobs/uploads/")
    }

    /// Begins an upload: where its bytes go, and how many at least at a time.
    async fn begin_upload(&self) -> Result<(Url, usize), Failure> {
        let ask = Ask::new(Method::POST, self.uploads()?).with(CONTENT_LENGTH, "0");
        let answer = self.ask(&ask).await?;
        if answer.response.status() != StatusCode::ACCEPTED {
            return Err(self.refusal(answer, "an upload").await);
        }
        let headers = answer.response.headers();
        let least = headers
            .get(CHUNK_MIN_LENGTH)
            .and_then(|value| value.to_str().ok()?.parse().ok())
            .unwrap_or(0);
        Ok((self.location(&ask.url, headers)?, least))
    }

    fn location(&self, from: &Url, headers: &HeaderMap) -> Result<Url, Error> {
        let location = headers.get(LOCATION).and_then(|value| value.to_str().ok());
        let location = location.ok_or_else(|| self.unreachable("it does not say where an upload goes"))?;
        self.resolve(from, location)
    }

    /// A page of a list, and the address of the next one. None when there is no such list.
    pub(super) async fn page(&self, url: Url, accept: &str) -> Result<Option<(Vec<u8>, Option<Url>)>, Error> {
        let ask = Ask::new(Method::GET, url).with(ACCEPT, accept);
        self.persistently(ask.url.path(), async || {
            let answer = self.ask(&ask).await?;
            match answer.response.status() {
                StatusCode::OK => {
                    let link = answer
                        .response
                        .headers()
                        .get(LINK)
                        .and_then(|value| next_page(value.to_str().ok()?));
                    let next = link.map(|link| self.resolve(&ask.url, link)).transpose()?;
                    let bytes = self.whole(answer.response, "list", DOCUMENT_MAX).await?;
                    Ok(Some((bytes, next)))
                }
                StatusCode::NOT_FOUND => Ok(None),
                _ => Err(self.refusal(answer, "a list").await),
            }
        })
        .await
    }

    /// Why the registry refuses something.
    async fn refusal(&self, answer: Answer, what: &'static str) -> Failure {
        let status = answer.response.status();
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if answer.home => Failure::Final(self.denied()),
            _ => {
                let told = Body::new(answer.response).whole(REFUSAL_MAX).await;
                let told = told.ok().and_then(|bytes| told_reason(&bytes));
                let code = status.as_u16();
                Failure::Final(Error::Refused {
                    registry: self.registry.clone(),
                    what,
                    reason: match told {
                        Some(told) => format!("it answered {code}, {}", quoted(&told)),
                        None => format!("it answered {code}"),
                    },
                })
            }
        }
    }
}

/// The target of a `Link` header whose relation is `next` (RFC 8288).
fn next_page(header: &str) -> Option<&str> {
    let (target, parameters) = header.trim().strip_prefix('<')?.split_once('>')?;
    parameters
        .split([';', ','])
        .any(|parameter| parameter.trim().trim_matches('"').replace('"', "") == "rel=next")
        .then_some(target)
}

/// What a refusal says (the specification's "Error Codes").
fn told_reason(bytes: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Told {
        errors: Vec<One>,
    }
    #[derive(Deserialize)]
    struct One {
        code: Option<String>,
        message: Option<String>,
    }
    let told: Told = serde_json::from_slice(bytes).ok()?;
    let one = told.errors.into_iter().next()?;
    match (one.code, one.message.filter(|message| !message.is_empty())) {
        (Some(code), Some(message)) => Some(format!("{code}: {message}")),
        (code, message) => code.or(message),
    }
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    #[test]
    fn what_a_registry_has_is_read() {
        let mut headers = HeaderMap::new();
        assert_eq!(has(&headers), None);
        for (text, expected) in [
            ("0-0", Some(1)),
            ("0-16777215", Some(16 << 20)),
            ("bytes=0-9", Some(10)),
            ("5-9", None),
            ("0-", None),
            ("0-18446744073709551615", None),
            ("x", None),
        ] {
            headers.insert(RANGE, HeaderValue::from_static(text));
            assert_eq!(has(&headers), expected, "{text}");
        }
    }

    #[test]
    fn the_next_page_is_found() {
        for (header, expected) in [
            (
                r#"</v2/a/tags/list?last=x&n=2>; rel="next""#,
                Some("/v2/a/tags/list?last=x&n=2"),
            ),
            ("<https://r/x>;rel=next", Some("https://r/x")),
            (r#"</x>; rel="prev""#, None),
            ("", None),
            ("</x", None),
        ] {
            assert_eq!(next_page(header), expected, "{header}");
        }
    }

    #[test]
    fn a_refusal_tells_its_reason() {
        let told = br#"{"errors":[{"code":"MANIFEST_INVALID","message":"manifest invalid","detail":{}}]}"#;
        assert_eq!(told_reason(told).unwrap(), "MANIFEST_INVALID: manifest invalid");
        assert_eq!(
            told_reason(br#"{"errors":[{"code":"DENIED"}]}"#).unwrap(),
            "DENIED"
        );
        for nothing in ["", "{}", "<html>", r#"{"errors":[]}"#, r#"{"errors":[{}]}"#] {
            assert_eq!(told_reason(nothing.as_bytes()), None, "{nothing}");
        }
    }
}
