//! The HTTP client: its time limits, its trust and its manners.

use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::{Client, Response, redirect};

use super::error::Error;

/// Time to connect, TLS included. A registry that is up answers within one; the rest is for packet loss.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest silence on a connection. Registries that fetch from their own storage first need some seconds.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(30);

/// Most redirects that are followed; registries use one, to their storage.
const REDIRECTS_MAX: usize = 5;

/// Why an answer was not read to its end.
pub(super) enum TooMuch {
    /// At least so many bytes.
    Size(u64),
    Cut(String),
}

/// Reads an answer of at most `limit` bytes.
pub(super) async fn read_bounded(mut response: Response, limit: u64) -> Result<Vec<u8>, TooMuch> {
    let mut bytes = Vec::new();
    while let Some(piece) = response
        .chunk()
        .await
        .map_err(|error| TooMuch::Cut(cause(&error)))?
    {
        bytes.extend_from_slice(&piece);
        if bytes.len() as u64 > limit {
            return Err(TooMuch::Size(bytes.len() as u64));
        }
    }
    Ok(bytes)
}

/// The innermost reason of a failed request, without its address: that may carry a signature.
pub(super) fn cause(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return "it does not answer in time".to_owned();
    }
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
        Some(reason) => format!("TLS failed: {reason}"),
        None => text,
    }
}

/// A client with our time limits and manners.
pub(super) fn client(ca_files: &[PathBuf]) -> Result<Client, Error> {
    let mut builder = Client::builder()
        .user_agent(concat!("cannery/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(SILENCE_TIMEOUT)
        // An address with a signature must not be told to the next host.
        .referer(false)
        // reqwest itself drops the authorization when a redirect leads to another host.
        .redirect(redirect::Policy::custom(|attempt| {
            let was_encrypted = attempt
                .previous()
                .last()
                .is_some_and(|url| url.scheme() == "https");
            if attempt.previous().len() > REDIRECTS_MAX {
                attempt.error("it redirects in circles")
            } else if was_encrypted && attempt.url().scheme() != "https" {
                attempt.error("it redirects to an address without TLS")
            } else {
                attempt.follow()
            }
        }));
    for path in ca_files {
        for certificate in authorities(path)? {
            builder = builder.add_root_certificate(certificate);
        }
    }
    builder.build().map_err(|error| Error::Unreachable {
        registry: "the registry".to_owned(),
        reason: format!("TLS cannot be set up ({})", cause(&error)),
    })
}

/// The certificates of a PEM file.
fn authorities(path: &Path) -> Result<Vec<reqwest::Certificate>, Error> {
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
