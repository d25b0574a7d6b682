//! Answers to requests that get nothing: for programs and our own scripts, and for people before a browser.

use axum::Json;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::site::HTML;
use crate::ticket;

/// The page of a sentence.
const SENTENCE: &str = include_str!("page/sentence.html");

/// A request that is not answered as asked, with the reason.
#[derive(Debug)]
pub(super) struct Refused(pub(super) StatusCode, pub(super) String);

impl Refused {
    pub(super) fn new(status: StatusCode, why: impl Into<String>) -> Self {
        Self(status, why.into())
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        (self.0, Json(serde_json::json!({ "error": self.1 }))).into_response()
    }
}

/// The same for somebody before a browser.
#[derive(Debug)]
pub(super) struct Told(Refused);

impl IntoResponse for Told {
    fn into_response(self) -> Response {
        let Refused(status, why) = self.0;
        // Each sentence is ours, and none has markup.
        let mut sentence: String = why.chars().filter(|c| !matches!(c, '<' | '>' | '&')).collect();
        if let Some(first) = sentence.get_mut(..1) {
            first.make_ascii_uppercase();
        }
        let page = SENTENCE.replace("SENTENCE", &format!("{sentence}."));
        (status, [(header::CONTENT_TYPE, HTML)], page).into_response()
    }
}

impl<T: Into<Refused>> From<T> for Told {
    fn from(refused: T) -> Self {
        Self(refused.into())
    }
}

impl From<ticket::Error> for Refused {
    fn from(e: ticket::Error) -> Self {
        // Paths of this host are the operator's business.
        tracing::error!("{e}");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the host cannot read its own files",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_person_reads_a_sentence_without_markup() {
        let told = Told::from(Refused::new(StatusCode::FORBIDDEN, "this <b>is</b> too late"));
        let answer = told.into_response();
        assert_eq!(answer.status(), 403);
        assert_eq!(answer.headers()[header::CONTENT_TYPE], HTML);
        let page = axum::body::to_bytes(answer.into_body(), 4096).await.unwrap();
        let page = String::from_utf8(page.to_vec()).unwrap();
        assert!(page.contains(">This bis/b too late.</p>"), "{page}");
    }
}
