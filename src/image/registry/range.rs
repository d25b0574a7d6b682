//! Bytes of a blob, from one place to another, however often the connection is cut.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use reqwest::header::{ACCEPT, CONTENT_LENGTH, CONTENT_RANGE, HeaderMap, RANGE};
use reqwest::{Method, StatusCode, Url};

use super::super::error::Error;
use super::super::manifest::Descriptor;
use super::Session;
use super::endpoint::{Ask, Endpoint};
use super::transport::Body;
use super::weather::{Failure, Patience, weather};

/// A part of a blob on its way. What comes is not verified.
#[derive(Debug)]
pub(in crate::image) struct Ranged<'a> {
    session: &'a Session,
    descriptor: Descriptor,
    /// What is still to come.
    left: Range<u64>,
    begin: u64,
    open: Option<Open>,
    endpoint: Arc<Endpoint>,
    patience: Patience,
}

/// A connection that delivers.
#[derive(Debug)]
struct Open {
    body: Body,
    /// Bytes that come before those that were asked for.
    known: u64,
}

impl<'a> Ranged<'a> {
    pub(super) fn new(session: &'a Session, descriptor: &Descriptor, range: Range<u64>) -> Self {
        let endpoint = session.endpoint();
        Self {
            session,
            descriptor: descriptor.clone(),
            begin: range.start,
            left: range.start..range.end.max(range.start),
            open: None,
            patience: endpoint.patience(),
            endpoint,
        }
    }

    /// The next bytes; none after the last. Exactly the bytes of the range come, or an error.
    pub(in crate::image) async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        while !self.left.is_empty() {
            let endpoint = Arc::clone(&self.endpoint);
            match self.next_of(&endpoint).await {
                Ok(bytes) => {
                    self.left.start += bytes.len() as u64;
                    self.patience.progress(self.left.start - self.begin);
                    if self.left.is_empty() {
                        self.open = None;
                        endpoint.gate.went_well();
                    }
                    return Ok(Some(bytes));
                }
                Err(error) => {
                    self.endpoint = self.session.after(&endpoint, error)?;
                    self.patience = self.endpoint.patience();
                }
            }
        }
        Ok(None)
    }

    /// The next bytes from one endpoint, or why it was given up.
    async fn next_of(&mut self, endpoint: &Endpoint) -> Result<Bytes, Error> {
        let _waiting = endpoint.silence.wait();
        loop {
            match self.step().await {
                Ok(bytes) if bytes.is_empty() => {}
                Ok(bytes) => return Ok(bytes),
                Err(failure) => {
                    self.open = None;
                    let asked_for = blob_url(endpoint, &self.descriptor)?;
                    endpoint
                        .wait(failure, &mut self.patience, asked_for.path())
                        .await?;
                }
            }
        }
    }

    async fn step(&mut self) -> Result<Bytes, Failure> {
        let open = match &mut self.open {
            Some(open) => open,
            none => none.insert(connect(&self.endpoint, &self.descriptor, &self.left).await?),
        };
        let came = open.body.next().await;
        let Some(mut bytes) = self.endpoint.came(came)? else {
            return Err(weather("it ended a layer early"));
        };
        let skipped = usize::try_from(open.known).unwrap_or(usize::MAX).min(bytes.len());
        drop(bytes.split_to(skipped));
        open.known -= skipped as u64;
        let left = usize::try_from(self.left.end - self.left.start).unwrap_or(usize::MAX);
        bytes.truncate(left);
        Ok(bytes)
    }
}

fn blob_url(endpoint: &Endpoint, descriptor: &Descriptor) -> Result<Url, Error> {
    endpoint.url(&format!("blobs/{}", descriptor.digest))
}

/// Asks for what is left.
async fn connect(endpoint: &Endpoint, descriptor: &Descriptor, wanted: &Range<u64>) -> Result<Open, Failure> {
    let url = blob_url(endpoint, descriptor)?;
    let mut ask = Ask::new(Method::GET, url).with(ACCEPT, "*/*");
    let whole = wanted.start == 0 && wanted.end >= descriptor.size;
    if !whole {
        let range = if wanted.end >= descriptor.size {
            format!("bytes={}-", wanted.start)
        } else {
            format!("bytes={}-{}", wanted.start, wanted.end - 1)
        };
        ask = ask.with(RANGE, &range);
    }
    let answer = endpoint.ask(&ask).await?;
    let (status, headers) = (answer.response.status(), answer.response.headers());
    if let Some(size) = told_size(status, headers, wanted.start)
        && size != descriptor.size
    {
        return Err(Failure::Final(Error::Corrupt {
            image: endpoint.image().to_owned(),
            blob: Some(descriptor.digest),
            reason: format!(
                "has {size} bytes there, and its manifest says {}",
                descriptor.size
            ),
        }));
    }
    let known = match status {
        StatusCode::PARTIAL_CONTENT if is_part(headers, wanted) => 0,
        StatusCode::PARTIAL_CONTENT => {
            return Err(weather("it sent another part of a layer than asked for"));
        }
        // A registry may answer with the whole again; then its beginning is known already.
        StatusCode::OK => {
            if !whole {
                endpoint.note_ignored_range();
            }
            wanted.start
        }
        _ => return Err(endpoint.no(&answer, &format!("blobs/{}", descriptor.digest))),
    };
    Ok(Open {
        body: Body::new(answer.response),
        known,
    })
}

/// Is the answer exactly the part that was asked for?
fn is_part(headers: &HeaderMap, wanted: &Range<u64>) -> bool {
    let part = ContentRange::of(headers).and_then(|range| range.part);
    part.is_some_and(|(first, last)| first == wanted.start && last.checked_add(1) == Some(wanted.end))
}

/// How large the whole is, by an answer to who asked for what begins at `start`; none where it does not say, or may speak of
/// something else.
fn told_size(status: StatusCode, headers: &HeaderMap, start: u64) -> Option<u64> {
    let range = ContentRange::of(headers).unwrap_or_default();
    match (status, range.part) {
        (StatusCode::PARTIAL_CONTENT, Some((first, _))) if first == start => range.total,
        (StatusCode::RANGE_NOT_SATISFIABLE, None) => range.total,
        (StatusCode::OK, _) => headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok(),
        _ => None,
    }
}

/// What a `Content-Range` says (RFC 9110 §14.4), each none where it is `*`.
#[derive(Debug, Default)]
struct ContentRange {
    /// The first and the last byte.
    part: Option<(u64, u64)>,
    /// How many bytes the whole has.
    total: Option<u64>,
}

impl ContentRange {
    /// None where there is none, or it is broken.
    fn of(headers: &HeaderMap) -> Option<Self> {
        let text = headers.get(CONTENT_RANGE)?.to_str().ok()?;
        let (part, total) = text.strip_prefix("bytes ")?.split_once('/')?;
        let part = match part {
            "*" => None,
            part => {
                let (first, last) = part.split_once('-')?;
                Some((first.parse().ok()?, last.parse().ok()?))
            }
        };
        let total = match total {
            "*" => None,
            total => Some(total.parse().ok()?),
        };
        Some(Self { part, total })
    }
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    #[test]
    fn only_the_part_that_was_asked_for_is_taken() {
        let mut headers = HeaderMap::new();
        assert!(!is_part(&headers, &(5..10)));
        for (text, expected) in [
            ("bytes 5-9/20", true),
            ("bytes 5-9/*", true),
            ("bytes 5-8/20", false),
            ("bytes 5-10/20", false),
            ("bytes 4-9/20", false),
            ("bytes */20", false),
            ("bytes 5-18446744073709551615/20", false),
            ("items 5-9/20", false),
            ("bytes 5-9", false),
            ("bytes 5-9/x", false),
            ("", false),
        ] {
            headers.insert(CONTENT_RANGE, HeaderValue::from_static(text));
            assert_eq!(is_part(&headers, &(5..10)), expected, "{text}");
        }
    }

    #[test]
    fn how_large_the_whole_is_is_heard_where_it_is_said_of_what_was_asked_for() {
        const PART: StatusCode = StatusCode::PARTIAL_CONTENT;
        for (status, text, expected) in [
            (PART, "bytes 5-9/20", Some(20)),
            (PART, "bytes 5-7/8", Some(8)),
            (PART, "bytes 5-9/*", None),
            // Of another part: who mixes up one number may mix up the other.
            (PART, "bytes 6-9/20", None),
            (PART, "bytes */20", None),
            (StatusCode::RANGE_NOT_SATISFIABLE, "bytes */4", Some(4)),
            (StatusCode::RANGE_NOT_SATISFIABLE, "bytes 5-9/20", None),
            (StatusCode::OK, "bytes 5-9/20", Some(77)),
            (StatusCode::NOT_FOUND, "bytes 5-9/20", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_RANGE, HeaderValue::from_static(text));
            headers.insert(CONTENT_LENGTH, HeaderValue::from_static("77"));
            assert_eq!(told_size(status, &headers, 5), expected, "{status} {text}");
        }
        assert_eq!(told_size(StatusCode::OK, &HeaderMap::new(), 0), None);
    }
}
