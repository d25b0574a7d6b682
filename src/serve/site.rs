//! Which request gets what.
//!
//! | request | for whom | what |
//! |---|---|---|
//! | `GET /jobs/KEY` | anybody | the page, the same for all: it says nothing about the job |
//! | `POST /jobs/KEY/session` | a ticket, in the body | a cookie for this machine; nothing new (200) where the cookie is of the same ticket |
//! | `GET`, `DELETE /jobs/KEY/session` | the cookie | what may be seen; leaves |
//! | `GET /jobs/KEY/terminal`, `/serial` | the cookie | WebSockets |
//! | `GET /jobs/KEY/login`, `/oauth/callback` | anybody; Developers of the job's project | to GitLab; a cookie for this machine |
//! | `POST /jobs/KEY/pass`, `GET /jobs/KEY/console.vv` | the cookie | a password for the screen, good once; the same in a viewer's file |
//! | `GET /jobs/KEY/screen` | the cookie, and a pass in the SPICE handshake | WebSockets, one a channel |
//! | `GET /assets/…`, `/spice/…`, `/page/…` | anybody | programs for the browser |
//! | `/api/…`, `/metrics` | the API's secret | see [`super::api`] |
//! | `GET /healthz` | anybody | whether it serves |
//!
//! A ticket is in no address: addresses end up in logs, histories and `Referer`. The page takes it from the part of the address that
//! browsers keep to themselves, or from whoever types it. Each request names our host, and each that changes something or opens a
//! WebSocket comes from our own pages: browsers send cookies along with what other sites make them ask.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, to_bytes};
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::limit::Place;
use super::refused::{Refused, Told};
use super::session::{End, Session};
use super::{House, api, login, screen, serial, terminal};
use crate::record::JobKey;
use crate::report;
use crate::secret::Secret;
use crate::ticket::{self, Mode, Redeemed};

/// The cookie's name. With this beginning, browsers take it over TLS only.
const COOKIE: &str = "__Secure-cannery";
/// No request has more to say.
const LONGEST_BODY: usize = 4 << 10;
/// It is here within this.
const BODY: Duration = Duration::from_secs(20);
/// A message from a browser: what somebody types, or a page of text that is pasted.
const LONGEST_MESSAGE: usize = 256 << 10;
/// Terminals and logs of a session, its screen's channels counted too: each terminal is a login in the guest.
const MOST_CHANNELS: usize = 40;
/// Characters of a name that a page shows.
pub(super) const LONGEST_NAME: usize = 120;

const PAGE: &str = include_str!("page/index.html");
const SCRIPT: &str = include_str!("page/page.js");
const STYLE: &str = include_str!("page/page.css");

/// Files of `console.assets` that browsers may have, and what they are.
const ASSETS: [(&str, &str); 3] = [
    ("xterm.js", JAVASCRIPT),
    ("xterm.css", CSS),
    ("addon-fit.js", JAVASCRIPT),
];
pub(super) const HTML: &str = "text/html; charset=utf-8";
const JAVASCRIPT: &str = "text/javascript; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";

/// The address of whoever connected.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer(pub(super) IpAddr);

pub(super) fn router(house: Arc<House>) -> Router {
    Router::new()
        .route(
            "/",
            get(async || {
                Told::from(Refused::new(
                    StatusCode::NOT_FOUND,
                    "the job log has the address of its console",
                ))
            }),
        )
        .route("/jobs/{key}", get(page))
        .route("/jobs/{key}/session", get(shown).post(enter).delete(leave))
        .route("/jobs/{key}/terminal", get(open_terminal))
        .route("/jobs/{key}/serial", get(open_serial))
        .route("/jobs/{key}/login", get(login::set_out))
        .route("/oauth/callback", get(login::come_back))
        .route("/jobs/{key}/pass", post(hand_out))
        .route("/jobs/{key}/screen", get(open_screen))
        .route("/jobs/{key}/console.vv", get(viewer_file))
        .route("/spice/{*name}", get(spice_asset))
        .route("/page/page.js", get(async || typed(JAVASCRIPT, SCRIPT)))
        .route("/page/page.css", get(async || typed(CSS, STYLE)))
        .route("/assets/{name}", get(asset))
        .route("/healthz", get(async || "ok\n"))
        .merge(api::router())
        .layer(middleware::from_fn_with_state(Arc::clone(&house), gate))
        .with_state(house)
}

/// Lets in what names our host and, where it matters, comes from our own pages; sends everything out with the rules for browsers.
async fn gate(State(house): State<Arc<House>>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    // Programs ask by whatever name they know, without cookies.
    let for_programs = path.starts_with("/api/") || matches!(path, "/metrics" | "/healthz");
    let mut response = if for_programs || is_ours(&house, request.method(), request.headers()) {
        match whole(request).await {
            Ok(request) => next.run(request).await,
            Err(refused) => refused.into_response(),
        }
    } else {
        Refused::new(
            StatusCode::FORBIDDEN,
            "this request does not come from a page of this console",
        )
        .into_response()
    };
    let policy = format!(
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; \
         connect-src 'self' wss://{}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        house.console.authority
    );
    let headers = response.headers_mut();
    if let Ok(policy) = HeaderValue::try_from(policy) {
        headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    // Not HSTS: browsers take it for all ports of the name, and what else the host serves is its operator's. Nothing of ours goes without TLS.
    for (name, value) in [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.insert(
        "cross-origin-opener-policy",
        HeaderValue::from_static("same-origin"),
    );
    headers.insert(
        "cross-origin-resource-policy",
        HeaderValue::from_static("same-origin"),
    );
    response
}

/// The request with all of its body: nobody who holds it back holds up anything else.
pub(super) async fn whole(request: Request) -> Result<Request, Refused> {
    let (head, body) = request.into_parts();
    let bytes = tokio::time::timeout(BODY, to_bytes(body, LONGEST_BODY)).await;
    let bytes = bytes.map_err(|_| {
        let why = format!("the request was not here within {} s", BODY.as_secs());
        Refused::new(StatusCode::REQUEST_TIMEOUT, why)
    })?;
    let bytes = bytes.map_err(|_| {
        let why = format!("the request is broken, or longer than {LONGEST_BODY} bytes");
        Refused::new(StatusCode::PAYLOAD_TOO_LARGE, why)
    })?;
    Ok(Request::from_parts(head, Body::from(bytes)))
}

fn is_ours(house: &House, method: &Method, headers: &HeaderMap) -> bool {
    let one = |name: header::HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let host = one(header::HOST).is_some_and(|host| host.eq_ignore_ascii_case(&house.console.authority));
    let changes = !matches!(*method, Method::GET | Method::HEAD) || headers.contains_key(header::UPGRADE);
    let origin = one(header::ORIGIN).is_some_and(|origin| origin == house.console.origin());
    host && (!changes || origin)
}

fn typed(kind: &'static str, text: &'static str) -> Response {
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

async fn page() -> Response {
    typed(HTML, PAGE)
}

async fn asset(State(house): State<Arc<House>>, uri: Uri) -> Result<Response, Refused> {
    let name = uri.path().trim_start_matches("/assets/");
    // Only these, so that no name leads out of the folder.
    let (name, kind) = ASSETS
        .iter()
        .find(|(known, _)| *known == name)
        .ok_or_else(|| Refused::new(StatusCode::NOT_FOUND, "there is no such file"))?;
    let path: &Path = &house.console.assets;
    let text = tokio::fs::read(path.join(name)).await.map_err(|e| {
        tracing::error!("{}: {e}", path.join(name).display());
        Refused::new(
            StatusCode::NOT_FOUND,
            "the operator has not installed the terminal's program",
        )
    })?;
    Ok(([(header::CONTENT_TYPE, *kind)], text).into_response())
}

/// The job that an address names.
pub(super) fn key_of(uri: &Uri) -> Result<JobKey, Refused> {
    let mut parts = uri.path().split('/').skip(2);
    let key = parts.next().and_then(|key| key.parse().ok());
    key.ok_or_else(|| Refused::new(StatusCode::NOT_FOUND, "no job has this name"))
}

/// The session that a request's cookie means.
fn session_of(house: &House, uri: &Uri, headers: &HeaderMap) -> Result<Arc<Session>, Refused> {
    let key = key_of(uri)?;
    cookie(headers, COOKIE)
        .find_map(|value| house.sessions.of(value, &key))
        .ok_or_else(|| Refused::new(StatusCode::UNAUTHORIZED, "a ticket is needed"))
}

/// The values of a request's cookies of this name.
pub(super) fn cookie<'a>(headers: &'a HeaderMap, name: &'a str) -> impl Iterator<Item = &'a str> {
    let cookies = headers.get_all(header::COOKIE).iter();
    cookies
        .filter_map(|cookies| cookies.to_str().ok())
        .flat_map(|cookies| cookies.split(';'))
        .filter_map(|cookie| cookie.trim().split_once('='))
        .filter_map(move |(key, value)| (key == name).then_some(value))
}

/// What somebody who comes in brings.
#[derive(Deserialize)]
struct Shows {
    ticket: Secret,
}

async fn enter(
    State(house): State<Arc<House>>,
    Extension(Peer(from)): Extension<Peer>,
    uri: Uri,
    headers: HeaderMap,
    Json(shows): Json<Shows>,
) -> Result<Response, Refused> {
    let key = key_of(&uri)?;
    let redeemed = redeem(&house, &key, shows.ticket.reveal().trim(), from, Instant::now())?;
    // The same ticket in the same browser is the same viewer, in however many of its tabs.
    if session_of(&house, &uri, &headers).is_ok_and(|session| session.is_by(&redeemed)) {
        return Ok(StatusCode::OK.into_response());
    }
    let cookie = machine_cookie(&key, &begin(&house, redeemed, from)?);
    Ok((StatusCode::NO_CONTENT, [(header::SET_COOKIE, cookie)]).into_response())
}

/// Refuses an address from which too much came that was wrong.
pub(super) fn may_try(house: &House, from: IpAddr, now: Instant) -> Result<(), Refused> {
    if house.guesses.may_try(from, now) {
        return Ok(());
    }
    house.counts.refused_often.add(1);
    Err(Refused::new(
        StatusCode::TOO_MANY_REQUESTS,
        "too many wrong tickets or sign-ins came from your address; try again in a minute",
    ))
}

/// What whoever shows this text at this time may have, unless it is no ticket or too many were not.
pub(super) fn redeem(
    house: &House,
    key: &JobKey,
    text: &str,
    from: IpAddr,
    now: Instant,
) -> Result<Redeemed, Refused> {
    may_try(house, from, now)?;
    let redeemed = match house.jobs.find(key) {
        Some(job) => ticket::redeem_for(&job, text, Timestamp::now())?,
        // No other answer than for a wrong ticket: who has none learns nothing about jobs.
        None => Err(ticket::Refusal::Unknown),
    };
    redeemed.map_err(|refusal| {
        house.guesses.wrong(from, now);
        house.counts.refused_ticket.add(1);
        Refused::new(StatusCode::FORBIDDEN, refusal.to_string())
    })
}

/// The cookie of a new session, unless there are too many.
pub(super) fn begin(house: &House, redeemed: Redeemed, from: IpAddr) -> Result<Secret, Refused> {
    house.sessions.open(redeemed, from)?.map_err(|full| {
        house.counts.refused_full.add(1);
        Refused::new(StatusCode::CONFLICT, full.to_string())
    })
}

/// The cookie by which a session at this machine is known.
pub(super) fn machine_cookie(key: &JobKey, session: &Secret) -> String {
    format!(
        "{COOKIE}={}; Path=/jobs/{key}; Secure; HttpOnly; SameSite=Strict",
        session.reveal()
    )
}

/// What a page shows of a job.
#[derive(Serialize)]
struct Shown {
    job: JobKey,
    project: String,
    name: String,
    image: Option<String>,
    state: String,
    mode: Mode,
    /// Is there a port for viewers?
    viewers: bool,
}

async fn shown(State(house): State<Arc<House>>, uri: Uri, headers: HeaderMap) -> Result<Response, Refused> {
    let session = match session_of(&house, &uri, &headers) {
        Ok(session) => session,
        // The page shows the ways in.
        Err(Refused(StatusCode::UNAUTHORIZED, why)) => {
            let ways = serde_json::json!({ "error": why, "gitlab": house.gitlab.is_some() });
            return Ok((StatusCode::UNAUTHORIZED, Json(ways)).into_response());
        }
        Err(refused) => return Err(refused),
    };
    let record = session.job.read().map_err(ticket::Error::from)?;
    let record = record.ok_or_else(|| Refused::new(StatusCode::GONE, End::Gone.to_string()))?;
    let shown = Shown {
        project: report::line(&record.project, LONGEST_NAME),
        name: report::line(&record.job, LONGEST_NAME),
        image: record.image.map(|image| report::line(&image, LONGEST_NAME)),
        state: record.state.to_string(),
        job: record.key,
        mode: session.mode,
        viewers: house.console.spice_listen.is_some(),
    };
    Ok(Json(shown).into_response())
}

async fn leave(State(house): State<Arc<House>>, uri: Uri, headers: HeaderMap) -> Result<StatusCode, Refused> {
    let session = session_of(&house, &uri, &headers)?;
    house.sessions.end(&session, End::Left);
    Ok(StatusCode::NO_CONTENT)
}

/// The session of a request for one more terminal or log, which each session may have so many of.
fn with_room(house: &House, uri: &Uri, headers: &HeaderMap) -> Result<Arc<Session>, Refused> {
    let session = session_of(house, uri, headers)?;
    if session.channels() >= MOST_CHANNELS {
        return Err(Refused::new(
            StatusCode::TOO_MANY_REQUESTS,
            format!("this session has {MOST_CHANNELS} terminals and logs open already"),
        ));
    }
    Ok(session)
}

/// A WebSocket whose messages from the browser have so many bytes at most.
fn bounded(upgrade: WebSocketUpgrade, most: usize) -> WebSocketUpgrade {
    upgrade.max_message_size(most).max_frame_size(most)
}

async fn open_terminal(
    State(house): State<Arc<House>>,
    Extension(place): Extension<Arc<Place>>,
    uri: Uri,
    headers: HeaderMap,
    upgrade: WebSocketUpgrade,
) -> Result<Response, Refused> {
    let session = with_room(&house, &uri, &headers)?;
    Ok(bounded(upgrade, LONGEST_MESSAGE).on_upgrade(async move |socket| {
        let channel = house.sessions.channel(&session, "terminal");
        match session.mode {
            Mode::Full => terminal::serve(&house.settings, &house.screens, socket, channel).await,
            Mode::ViewOnly => terminal::show(&house.screens, socket, channel).await,
        }
        drop(place);
    }))
}

async fn open_serial(
    State(house): State<Arc<House>>,
    Extension(place): Extension<Arc<Place>>,
    uri: Uri,
    headers: HeaderMap,
    upgrade: WebSocketUpgrade,
) -> Result<Response, Refused> {
    let session = with_room(&house, &uri, &headers)?;
    Ok(bounded(upgrade, LONGEST_BODY).on_upgrade(async move |socket| {
        serial::serve(socket, house.sessions.channel(&session, "serial")).await;
        drop(place);
    }))
}

/// A password for the screen, for the page itself.
async fn hand_out(
    State(house): State<Arc<House>>,
    uri: Uri,
    headers: HeaderMap,
) -> Result<Response, Refused> {
    let session = session_of(&house, &uri, &headers)?;
    let pass = house.passes.hand_out(&session, Instant::now())?;
    Ok(Json(serde_json::json!({ "password": pass.reveal() })).into_response())
}

async fn open_screen(
    State(house): State<Arc<House>>,
    Extension(place): Extension<Arc<Place>>,
    Extension(Peer(from)): Extension<Peer>,
    uri: Uri,
    headers: HeaderMap,
    upgrade: WebSocketUpgrade,
) -> Result<Response, Refused> {
    session_of(&house, &uri, &headers)?;
    let upgrade = bounded(upgrade.protocols(["binary"]), LONGEST_MESSAGE);
    Ok(upgrade.on_upgrade(async move |socket| {
        // The port is of no interest to anybody.
        screen::serve(Arc::clone(&house.proxy), socket, SocketAddr::new(from, 0)).await;
        drop(place);
    }))
}

async fn viewer_file(
    State(house): State<Arc<House>>,
    uri: Uri,
    headers: HeaderMap,
) -> Result<Response, Refused> {
    let session = session_of(&house, &uri, &headers)?;
    let Some(listen) = house.console.spice_listen else {
        return Err(Refused::new(
            StatusCode::NOT_FOUND,
            "there is no port for viewers here",
        ));
    };
    let authority = match &house.console.authority_file {
        Some(path) => Some(tokio::fs::read_to_string(path).await.map_err(|e| {
            tracing::error!("{}: {e}", path.display());
            Refused::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "the host cannot read its own files",
            )
        })?),
        None => None,
    };
    let record = session.job.read().map_err(ticket::Error::from)?;
    let name = record
        .map(|record| report::line(&record.job, LONGEST_NAME))
        .unwrap_or_default();
    let now = Instant::now();
    let pass = house.passes.hand_out(&session, now)?;
    session.keep(screen::GOOD_FOR, now);
    let port = screen::Port::Tls(listen.port());
    let text = screen::viewer_file(house.console.host(), port, &name, &pass, authority.as_deref());
    let kind = [
        (header::CONTENT_TYPE, "application/x-virt-viewer"),
        (header::CONTENT_DISPOSITION, "attachment; filename=\"console.vv\""),
    ];
    Ok((kind, text).into_response())
}

/// A file of spice-html5, as its package has it.
async fn spice_asset(State(house): State<Arc<House>>, uri: Uri) -> Result<Response, Refused> {
    let none = || Refused::new(StatusCode::NOT_FOUND, "there is no such file");
    let name = uri.path().trim_start_matches("/spice/");
    // Plain names only, so that none leads out of the folder.
    let plain = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric());
    let stem = name.strip_suffix(".js").ok_or_else(none)?;
    if !plain(stem.strip_prefix("thirdparty/").unwrap_or(stem)) {
        return Err(none());
    }
    let text = tokio::fs::read(house.console.spice_html5.join(name))
        .await
        .map_err(|_| none())?;
    Ok(([(header::CONTENT_TYPE, JAVASCRIPT)], text).into_response())
}
