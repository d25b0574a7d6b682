//! For programs, which show the secret of `console.api_token_file`: sessions listed and ended, tickets minted, counts read.
//!
//! | request | what |
//! |---|---|
//! | `GET /api/sessions` | those that are open |
//! | `DELETE /api/sessions/NUMBER` | ends one |
//! | `POST /api/tickets` | `{"job": KEY, "mode": "view-only", "seconds": 600, "viewers": 1}` → `{"ticket": …, "page": …, "expires": …}` |
//! | `GET /metrics` | counts, for Prometheus |

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Extension, Json, Router};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::House;
use super::audit::Event;
use super::count::Now;
use super::refused::Refused;
use super::session::{End, Shown};
use super::site::Peer;
use crate::record::JobKey;
use crate::ticket::{self, Grant, Mode};

pub(super) fn router() -> Router<Arc<House>> {
    Router::new()
        .route("/api/sessions", get(sessions))
        .route("/api/sessions/{number}", delete(end))
        .route("/api/tickets", post(mint))
        .route("/metrics", get(metrics))
}

/// Was the API's secret shown? Guesses are counted like those of tickets.
fn check(house: &House, from: IpAddr, headers: &HeaderMap) -> Result<(), Refused> {
    let now = Instant::now();
    let Some(secret) = &house.api_token else {
        return Err(Refused::new(
            StatusCode::NOT_FOUND,
            "the API is off: console.api_token_file opens it",
        ));
    };
    if !house.guesses.may_try(from, now) {
        house.counts.refused_often.add(1);
        return Err(Refused::new(
            StatusCode::TOO_MANY_REQUESTS,
            "too many wrong secrets came from your address",
        ));
    }
    let shown = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes());
    let shown = shown.and_then(|value| value.strip_prefix(b"Bearer "));
    let secret = secret.reveal().as_bytes();
    match shown {
        Some(shown) if shown.len() == secret.len() && openssl::memcmp::eq(shown, secret) => Ok(()),
        _ => {
            house.guesses.wrong(from, now);
            house.counts.refused_ticket.add(1);
            Err(Refused::new(
                StatusCode::UNAUTHORIZED,
                "the API's secret is needed",
            ))
        }
    }
}

async fn sessions(
    State(house): State<Arc<House>>,
    Extension(Peer(from)): Extension<Peer>,
    headers: HeaderMap,
) -> Result<Json<Vec<Shown>>, Refused> {
    check(&house, from, &headers)?;
    Ok(Json(house.sessions.list()))
}

async fn end(
    State(house): State<Arc<House>>,
    Extension(Peer(from)): Extension<Peer>,
    headers: HeaderMap,
    Path(number): Path<u64>,
) -> Result<StatusCode, Refused> {
    check(&house, from, &headers)?;
    if house.sessions.end_number(number, End::Admin) {
        Ok(StatusCode::NO_CONTENT)
    } else {
        Err(Refused::new(StatusCode::NOT_FOUND, "there is no such session"))
    }
}

/// A ticket as it is ordered.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Order {
    job: JobKey,
    #[serde(default)]
    mode: Option<Mode>,
    #[serde(default)]
    seconds: Option<u64>,
    #[serde(default)]
    viewers: Option<u32>,
}

#[derive(Serialize)]
struct Minted {
    ticket: String,
    page: String,
    expires: Timestamp,
}

async fn mint(
    State(house): State<Arc<House>>,
    Extension(Peer(from)): Extension<Peer>,
    headers: HeaderMap,
    order: String,
) -> Result<Response, Refused> {
    check(&house, from, &headers)?;
    let order: Order =
        serde_json::from_str(&order).map_err(|e| Refused::new(StatusCode::BAD_REQUEST, e.to_string()))?;
    let gone = || Refused::new(StatusCode::NOT_FOUND, "no such job has a machine here");
    let job = house.jobs.find(&order.job).ok_or_else(gone)?;
    let ttl = order
        .seconds
        .map_or(house.console.ticket_ttl, Duration::from_secs);
    let now = Timestamp::now();
    let expires = now.saturating_add(ttl).unwrap_or(Timestamp::MAX);
    let mode = order.mode.unwrap_or(Mode::Full);
    let viewers = order.viewers.unwrap_or(house.console.viewers);
    if viewers == 0 {
        return Err(Refused::new(
            StatusCode::BAD_REQUEST,
            "a ticket is for one viewer or more",
        ));
    }
    let by = "api";
    let grant = Grant::new(mode, now, expires, viewers, by.to_owned());
    let (ticket, id) = ticket::mint(&job, &grant).map_err(|e| match e {
        ticket::Error::Gone(_) => gone(),
        e => e.into(),
    })?;
    house.audit.note(&Event::TicketMinted {
        job: job.key(),
        ticket: id.short(),
        minted_by: by,
        mode,
        from: Some(from),
    });
    let minted = Minted {
        ticket: ticket.reveal().to_owned(),
        page: house.console.page(job.key()),
        expires,
    };
    Ok((StatusCode::CREATED, Json(minted)).into_response())
}

async fn metrics(
    State(house): State<Arc<House>>,
    Extension(Peer(from)): Extension<Peer>,
    headers: HeaderMap,
) -> Result<String, Refused> {
    check(&house, from, &headers)?;
    let (sessions, channels) = house.sessions.size();
    Ok(house.counts.text(Now {
        sessions,
        channels,
        connections: house.connections.len(),
        waiting: house.proxy.waiting(),
        keys: house.proxy.keys_ready(),
    }))
}
