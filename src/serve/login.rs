//! The way to GitLab and back.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Extension;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use serde::Deserialize;

use super::House;
use super::gitlab::{GitLab, NotIn};
use super::refused::{Refused, Told};
use super::site::{LONGEST_NAME, Peer, cookie, key_of, machine_cookie, may_try};
use crate::report;
use crate::secret::Secret;
use crate::ticket::{self, Grant, Mode};

/// The cookie of a browser that is under way.
const COOKIE: &str = "__Host-cannery-login";
/// A ticket that is minted for a sign-in is redeemed in the same moment.
const AT_ONCE: Duration = Duration::from_secs(10);

/// `GET /jobs/KEY/login`
pub(super) async fn set_out(
    State(house): State<Arc<House>>,
    Extension(Peer(from)): Extension<Peer>,
    uri: Uri,
) -> Result<Response, Told> {
    let key = key_of(&uri)?;
    let gitlab = house.gitlab.as_ref().ok_or_else(no_gitlab)?;
    let (address, browser) = gitlab.begin(key, from, Instant::now())?;
    // Lax: it must come along when GitLab sends the browser back.
    let cookie = format!(
        "{COOKIE}={}; Path=/; Secure; HttpOnly; SameSite=Lax; Max-Age=600",
        browser.reveal()
    );
    let headers = [(header::LOCATION, address), (header::SET_COOKIE, cookie)];
    Ok((StatusCode::SEE_OTHER, headers).into_response())
}

fn no_gitlab() -> Refused {
    Refused::new(StatusCode::NOT_FOUND, "nobody signs in with GitLab here")
}

/// What GitLab sends back: a code, or none where it was denied.
#[derive(Deserialize)]
pub(super) struct Back {
    state: String,
    code: Option<String>,
}

/// `GET /oauth/callback`
pub(super) async fn come_back(
    State(house): State<Arc<House>>,
    Extension(Peer(from)): Extension<Peer>,
    headers: HeaderMap,
    back: Result<Query<Back>, QueryRejection>,
) -> Result<Response, Told> {
    let gitlab = house.gitlab.as_ref().ok_or_else(no_gitlab)?;
    let stale = || Refused::new(StatusCode::FORBIDDEN, NotIn::Stale.to_string());
    let Query(back) = back.map_err(|_| stale())?;
    let browser = cookie(&headers, COOKIE).next().unwrap_or_default();
    let aim = gitlab.aim(&back.state, browser).ok_or_else(stale)?;
    // Each asks GitLab, and who makes codes up could have it asked without end.
    may_try(&house, from, Instant::now())?;
    let (to, entered) = match let_in(&house, gitlab, &back, browser, from).await? {
        Ok(session) => (format!("/jobs/{aim}"), Some(machine_cookie(&aim, &session))),
        Err(word) => (format!("/jobs/{aim}#refused={word}"), None),
    };
    let mut response = (StatusCode::SEE_OTHER, [(header::LOCATION, to)]).into_response();
    let used_up = format!("{COOKIE}=; Path=/; Secure; HttpOnly; SameSite=Lax; Max-Age=0");
    for cookie in entered.into_iter().chain([used_up]) {
        if let Ok(cookie) = HeaderValue::try_from(cookie) {
            response.headers_mut().append(header::SET_COOKIE, cookie);
        }
    }
    Ok(response)
}

/// The session of whoever came back, or the word by which the page knows why there is none.
async fn let_in(
    house: &House,
    gitlab: &GitLab,
    back: &Back,
    browser: &str,
    from: IpAddr,
) -> Result<Result<Secret, &'static str>, Refused> {
    let refused = |why: NotIn| {
        house.counts.refused_role.add(1);
        if why.is_a_guess() {
            house.guesses.wrong(from, Instant::now());
        }
        if let NotIn::GitLab(why) = &why {
            tracing::error!("GitLab did not answer as expected: {why}");
        }
        Ok(Err(why.word()))
    };
    let who = match gitlab.finish(&back.state, browser, back.code.as_deref()).await {
        Ok(who) => who,
        Err(why) => return refused(why),
    };
    // A job that is not here looks like one of a project that is not theirs.
    let job = house.jobs.find(&who.job);
    let record = job.as_ref().and_then(|job| job.read().ok().flatten());
    let admitted = match &record {
        Some(record) => gitlab.admit(&who, &record.coordinator, &record.project).await,
        None => Err(NotIn::Role),
    };
    gitlab.leave(who).await;
    let (name, job) = match (admitted, job) {
        (Ok(name), Some(job)) => (name, job),
        (Err(why), _) => return refused(why),
        (Ok(_), None) => return refused(NotIn::Role),
    };
    let now = Timestamp::now();
    let expires = now.saturating_add(AT_ONCE).unwrap_or(Timestamp::MAX);
    let by = format!("gitlab:{}", report::line(&name, LONGEST_NAME));
    let redeemed = match ticket::mint(&job, &Grant::new(Mode::Full, now, expires, 1, by)) {
        Ok((text, _)) => ticket::redeem_for(&job, text.reveal(), now)?,
        Err(ticket::Error::Gone(_)) => Err(ticket::Refusal::Unknown),
        Err(e) => return Err(e.into()),
    };
    // The job was cleaned up meanwhile.
    let Ok(redeemed) = redeemed else {
        return refused(NotIn::Role);
    };
    Ok(house.sessions.open(redeemed, from)?.map_err(|_| {
        house.counts.refused_full.add(1);
        "full"
    }))
}
