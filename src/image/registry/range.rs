//! Bytes of a blob, from one place to another, however often the connection is cut.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use reqwest::header::{ACCEPT, CONTENT_RANGE, HeaderMap, RANGE};
use reqwest::{Method, StatusCode};

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
            match self.step().await {
                Ok(bytes) if bytes.is_empty() => {}
                Ok(bytes) => {
                    self.left.start += bytes.len() as u64;
                    self.patience.progress(self.left.start - self.begin);
                    if self.left.is_empty() {
                        self.open = None;
                        self.endpoint.gate.went_well();
                    }
                    return Ok(Some(bytes));
                }
                Err(failure) => {
                    self.open = None;
                    if let Err(error) = self.endpoint.wait(failure, &mut self.patience).await {
                        self.endpoint = self.session.after(&self.endpoint, error)?;
                        self.patience = self.endpoint.patience();
                    }
                }
            }
        }
        Ok(None)
    }

    async fn step(&mut self) -> Result<Bytes, Failure> {
        let open = match &mut self.open {
            Some(open) => open,
            none => none.insert(connect(&self.endpoint, &self.descriptor, &self.left).await?),
        };
        let Some(mut bytes) = open.body.next().await.map_err(weather)? else {
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

/// Asks for what is left.
async fn connect(endpoint: &Endpoint, descriptor: &Descriptor, wanted: &Range<u64>) -> Result<Open, Failure> {
    let path = format!("blobs/{}", descriptor.digest);
    let mut ask = Ask::new(Method::GET, endpoint.url(&path)?).with(ACCEPT, "*/*");
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
    let known = match answer.response.status() {
        StatusCode::PARTIAL_CONTENT if is_part(answer.response.headers(), wanted, descriptor.size) => 0,
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
        _ => return Err(endpoint.no(&answer, &path)),
    };
    Ok(Open {
        body: Body::new(answer.response),
        known,
    })
}

/// Is the answer exactly the part that was asked for?
fn is_part(headers: &HeaderMap, wanted: &Range<u64>, size: u64) -> bool {
    let parts = |text: &str| -> Option<(u64, u64, Option<u64>)> {
        let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
        let (first, last) = range.split_once('-')?;
        let total = if total == "*" {
            None
        } else {
            Some(total.parse().ok()?)
        };
        Some((first.parse().ok()?, last.parse().ok()?, total))
    };
    headers
        .get(CONTENT_RANGE)
        .and_then(|value| parts(value.to_str().ok()?))
        .is_some_and(|(first, last, total)| {
            first == wanted.start
                && last.checked_add(1) == Some(wanted.end)
                && total.is_none_or(|total| total == size)
        })
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    #[test]
    fn only_the_part_that_was_asked_for_is_taken() {
        let mut headers = HeaderMap::new();
        assert!(!is_part(&headers, &(5..10), 20));
        for (text, expected) in [
            ("bytes 5-9/20", true),
            ("bytes 5-9/*", true),
            ("bytes 5-9/21", false),
            ("bytes 5-8/20", false),
            ("bytes 5-10/20", false),
            ("bytes 4-9/20", false),
            ("bytes */20", false),
            ("bytes 5-18446744073709551615/20", false),
            ("items 5-9/20", false),
            ("bytes 5-9", false),
            ("", false),
        ] {
            headers.insert(CONTENT_RANGE, HeaderValue::from_static(text));
            assert_eq!(is_part(&headers, &(5..10), 20), expected, "{text}");
        }
    }
}
