//! The part of GitLab's API that runners and the helper in the guest call.

use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{patch, post, put};
use serde_json::{Value, json};

use super::{Desk, Outcome, RUNNER_TOKEN, git};

/// How often a runner is asked to send the log and to look at `Job-Status`, in seconds: as often as it can.
const TRACE_UPDATE_INTERVAL: &str = "1";

/// The largest archive that is taken, in bytes.
const BODY_LIMIT: usize = 256 * 1024 * 1024;

pub(super) fn router(desk: Arc<Desk>, repositories: PathBuf) -> Router {
    Router::new()
        .route("/api/v4/jobs/request", post(request_job))
        .route("/api/v4/jobs/{id}", put(update_job))
        .route("/api/v4/jobs/{id}/trace", patch(append_trace))
        .route("/api/v4/jobs/{id}/artifacts", post(upload).get(download))
        .route("/api/v4/runners/verify", post(verify))
        .fallback(move |request: Request| git::serve(repositories.clone(), request))
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(desk)
}

fn json_body(body: &[u8]) -> Value {
    serde_json::from_slice(body).unwrap_or(Value::Null)
}

async fn request_job(State(desk): State<Arc<Desk>>, body: Bytes) -> Response {
    if json_body(&body)["token"] != RUNNER_TOKEN {
        return StatusCode::FORBIDDEN.into_response();
    }
    match desk.take() {
        Some(job) => (StatusCode::CREATED, axum::Json(job)).into_response(),
        None => StatusCode::NO_CONTENT.into_response(),
    }
}

async fn verify(body: Bytes) -> Response {
    if json_body(&body)["token"] != RUNNER_TOKEN {
        return StatusCode::FORBIDDEN.into_response();
    }
    axum::Json(json!({"id": 1, "token": RUNNER_TOKEN, "token_expires_at": null})).into_response()
}

fn denied(desk: &Desk, id: u64, headers: &HeaderMap) -> bool {
    let token = headers.get("JOB-TOKEN").and_then(|value| value.to_str().ok());
    !desk.knows(id, token.unwrap_or_default())
}

async fn update_job(
    State(desk): State<Arc<Desk>>,
    Path(id): Path<u64>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    if denied(&desk, id, &headers) {
        return StatusCode::FORBIDDEN.into_response();
    }
    let update = json_body(&body);
    if let Some(state @ ("success" | "failed")) = update["state"].as_str() {
        desk.finish(
            id,
            Outcome {
                success: state == "success",
                failure_reason: update["failure_reason"].as_str().unwrap_or_default().to_owned(),
                exit_code: update["exit_code"].as_i64(),
            },
        );
    }
    answer(StatusCode::OK, &desk, id)
}

/// `Content-Range: START-END`, both ends included.
fn range_start(headers: &HeaderMap) -> Option<usize> {
    let range = headers.get(header::CONTENT_RANGE)?.to_str().ok()?;
    range.split_once('-')?.0.parse().ok()
}

async fn append_trace(
    State(desk): State<Arc<Desk>>,
    Path(id): Path<u64>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    if denied(&desk, id, &headers) {
        return StatusCode::FORBIDDEN.into_response();
    }
    let Some(start) = range_start(&headers) else {
        return StatusCode::BAD_REQUEST.into_response();
    };
    match desk.append_log(id, start, &body) {
        Ok(_) => answer(StatusCode::ACCEPTED, &desk, id),
        Err(length) => {
            let mut response = answer(StatusCode::RANGE_NOT_SATISFIABLE, &desk, id);
            let range = format!("0-{length}").parse().expect("a range is a header value");
            response.headers_mut().insert(header::RANGE, range);
            response
        }
    }
}

fn answer(status: StatusCode, desk: &Desk, id: u64) -> Response {
    let headers = [
        ("Job-Status", desk.wish(id).header()),
        ("X-GitLab-Trace-Update-Interval", TRACE_UPDATE_INTERVAL),
    ];
    (status, headers).into_response()
}

async fn upload(
    State(desk): State<Arc<Desk>>,
    Path(id): Path<u64>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    if denied(&desk, id, &headers) {
        return StatusCode::FORBIDDEN.into_response();
    }
    match multipart_file(&headers, &body) {
        Some(archive) => {
            desk.store_artifacts(id, archive.to_vec());
            StatusCode::CREATED.into_response()
        }
        None => StatusCode::BAD_REQUEST.into_response(),
    }
}

/// The content of the only field of a multipart form.
fn multipart_file<'a>(headers: &HeaderMap, body: &'a [u8]) -> Option<&'a [u8]> {
    let kind = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    let boundary = kind.split_once("boundary=")?.1.trim_matches('"');
    let start = find(body, b"\r\n\r\n")? + 4;
    let length = find(&body[start..], format!("\r\n--{boundary}").as_bytes())?;
    Some(&body[start..start + length])
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

async fn download(State(desk): State<Arc<Desk>>, Path(id): Path<u64>, headers: HeaderMap) -> Response {
    if denied(&desk, id, &headers) {
        return StatusCode::FORBIDDEN.into_response();
    }
    match desk.artifacts(id) {
        Some(archive) => ([(header::CONTENT_TYPE, "application/zip")], archive).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_multipart_form_gives_its_file_byte_for_byte() {
        let mut headers = HeaderMap::new();
        headers.insert(
            header::CONTENT_TYPE,
            "multipart/form-data; boundary=xyz".parse().unwrap(),
        );
        let body =
            b"--xyz\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\nPK\r\n--x\0\r\n--xyz--\r\n";
        assert_eq!(multipart_file(&headers, body), Some(&b"PK\r\n--x\0"[..]));
        assert_eq!(multipart_file(&headers, b"--xyz\r\n\r\nno end"), None);
    }
}
