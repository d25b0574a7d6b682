//! Who we are, as the registry wants it proved: a password, or a token from its token service.
//!
//! Source: the distribution project's token authentication (`spec/auth/token.md`, `spec/auth/oauth.md`). A token is renewed
//! before it expires, and when the registry does not take it any more; requests at the same time share one renewal.

use std::collections::BTreeSet;
use std::time::Duration;

use base64::Engine as _;
use jiff::Timestamp;
use reqwest::header::{DATE, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{StatusCode, Url};
use serde::Deserialize;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::super::error::Error;
use super::challenge::{self, Challenge};
use super::credentials::{CredentialsError, Login, Origin};
use super::endpoint::{Endpoint, Purpose};
use super::weather::Failure;
use crate::secret::Secret;

/// Largest answer of a token service, in bytes.
const TOKEN_MAX: u64 = 1 << 20;

/// How long a token is good when its service does not say (the specification's own default).
const LIFE: Duration = Duration::from_secs(60);

/// A token is renewed so long before its end, but never before half its life is over: a request that takes it along must
/// still arrive.
const MARGIN: Duration = Duration::from_secs(15);

/// The name that we have for a token service.
const CLIENT_ID: &str = "cannery";

/// What proves who we are.
#[derive(Debug)]
pub(super) struct Tokens {
    /// The repository, for everything.
    own_scope: String,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What the registry asked for.
    challenge: Option<Challenge>,
    held: Option<Held>,
    /// Further repositories that blobs are mounted from.
    sources: BTreeSet<String>,
    /// An identity token that replaced the one of the login.
    replaced: Option<Secret>,
}

#[derive(Debug, Clone)]
struct Held {
    header: HeaderValue,
    renew_at: Option<Instant>,
}

impl Tokens {
    pub(super) fn new(repository: &str, purpose: Purpose) -> Self {
        let actions = match purpose {
            Purpose::Read => "pull",
            Purpose::Write => "pull,push",
        };
        Self {
            // Who only logs in asks for no repository.
            own_scope: if repository.is_empty() {
                String::new()
            } else {
                format!("repository:{repository}:{actions}")
            },
            state: Mutex::default(),
        }
    }

    /// Did the registry want to know who we are?
    pub(super) async fn was_challenged(&self) -> bool {
        self.state.lock().await.challenge.is_some()
    }

    /// The right that our token is for, as registries write it.
    pub(super) fn scope(&self) -> &str {
        &self.own_scope
    }

    /// From now on tokens are for reading this repository, too.
    pub(super) async fn also_read(&self, repository: &str) {
        let mut state = self.state.lock().await;
        if state.sources.insert(repository.to_owned())
            && matches!(state.challenge, Some(Challenge::Bearer { .. }))
        {
            state.held = None;
        }
    }

    /// This repository is none of ours to read after all.
    pub(super) async fn no_longer_read(&self, repository: &str) {
        let mut state = self.state.lock().await;
        state.sources.remove(repository);
        state.held = None;
    }

    /// What the next request takes along; nothing before the registry has asked.
    pub(super) async fn current(&self, endpoint: &Endpoint) -> Result<Option<HeaderValue>, Failure> {
        let mut state = self.state.lock().await;
        let fresh = state
            .held
            .as_ref()
            .filter(|held| held.renew_at.is_none_or(|at| Instant::now() < at));
        if let Some(held) = fresh {
            return Ok(Some(held.header.clone()));
        }
        match state.challenge.clone() {
            Some(challenge) => self.renew(&mut state, endpoint, &challenge).await.map(Some),
            None => Ok(None),
        }
    }

    /// The answer to a refusal of `used`.
    pub(super) async fn renewed(
        &self,
        endpoint: &Endpoint,
        headers: &HeaderMap,
        used: Option<HeaderValue>,
    ) -> Result<HeaderValue, Failure> {
        let mut state = self.state.lock().await;
        // Another request was refused at the same time, and has brought a new one.
        if let Some(held) = &state.held
            && Some(&held.header) != used.as_ref()
        {
            return Ok(held.header.clone());
        }
        let challenges: Vec<Challenge> = headers
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(challenge::parse)
            .collect();
        let bearer = challenges
            .iter()
            .find(|challenge| matches!(challenge, Challenge::Bearer { .. }));
        let Some(chosen) = bearer.or(challenges.first()).cloned() else {
            return Err(Failure::Final(endpoint.denied()));
        };
        let header = self.renew(&mut state, endpoint, &chosen).await?;
        state.challenge = Some(chosen);
        Ok(header)
    }

    async fn renew(
        &self,
        state: &mut State,
        endpoint: &Endpoint,
        challenge: &Challenge,
    ) -> Result<HeaderValue, Failure> {
        let (text, renew_at) = match (challenge, &endpoint.login) {
            (Challenge::Bearer { realm, service }, login) => {
                let answer = self
                    .token(state, endpoint, login.as_ref(), realm, service.as_deref())
                    .await?;
                (
                    format!("Bearer {}", answer.token.reveal()),
                    Some(Instant::now() + answer.life),
                )
            }
            (Challenge::Basic, Some(login)) if login.is_identity_token() => {
                return Err(Failure::Final(Error::Credentials(
                    CredentialsError::IdentityToken {
                        registry: endpoint.registry.clone(),
                        origin: login.origin,
                    },
                )));
            }
            (Challenge::Basic, Some(login)) => {
                let pair = format!("{}:{}", login.user, login.password.reveal());
                let pair = base64::engine::general_purpose::STANDARD.encode(pair);
                (format!("Basic {pair}"), None)
            }
            (Challenge::Basic, None) => return Err(Failure::Final(endpoint.denied())),
        };
        let mut header = HeaderValue::from_str(&text)
            .map_err(|_| endpoint.unreachable("its token service sent a token that is none"))?;
        header.set_sensitive(true);
        state.held = Some(Held {
            header: header.clone(),
            renew_at,
        });
        Ok(header)
    }

    /// Fetches a token.
    async fn token(
        &self,
        state: &mut State,
        endpoint: &Endpoint,
        login: Option<&Login>,
        realm: &str,
        service: Option<&str>,
    ) -> Result<Token, Failure> {
        let mut url = Url::parse(realm)
            .map_err(|_| endpoint.unreachable("it asks for a token from an address that is none"))?;
        // The password goes there.
        if !endpoint.is_safe(&url) {
            return Err(endpoint
                .unreachable("it asks for a token from an address without TLS")
                .into());
        }
        let client = if endpoint.is_home(&url) {
            &endpoint.clients.home
        } else {
            endpoint.check(&url)?;
            endpoint.clients.abroad()?
        };
        let more: Vec<String> = state
            .sources
            .iter()
            .map(|repository| format!("repository:{repository}:pull"))
            .collect();
        let scopes = std::iter::once(&self.own_scope)
            .filter(|scope| !scope.is_empty())
            .chain(&more);
        let identity = login.filter(|login| login.is_identity_token());
        let request = if let Some(login) = identity {
            let token = state.replaced.as_ref().unwrap_or(&login.password);
            let form = form_of(
                &url,
                &[
                    ("grant_type", "refresh_token"),
                    ("service", service.unwrap_or_default()),
                    ("client_id", CLIENT_ID),
                    ("refresh_token", token.reveal()),
                    ("scope", &scopes.cloned().collect::<Vec<_>>().join(" ")),
                ],
            );
            client
                .post(url)
                .header(reqwest::header::CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(form)
        } else {
            if let Some(service) = service {
                url.query_pairs_mut().append_pair("service", service);
            }
            for scope in scopes {
                url.query_pairs_mut().append_pair("scope", scope);
            }
            let request = client.get(url);
            match login {
                Some(login) => request.basic_auth(&login.user, Some(login.password.reveal())),
                None => request,
            }
        };
        let response = endpoint.ask_token_service(request).await?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST => {
                return Err(Failure::Final(endpoint.denied()));
            }
            status => return Err(endpoint.refused(status, response.headers(), "its token service")),
        }
        let answered = response
            .headers()
            .get(DATE)
            .and_then(|value| date(value.to_str().ok()?));
        let bytes = endpoint
            .whole(response, "token", TOKEN_MAX)
            .await
            .map_err(|failure| match failure {
                Failure::Final(_) => {
                    Failure::Final(endpoint.unreachable("its token service sent more than 1 MiB"))
                }
                passing @ Failure::Weather { .. } => passing,
            })?;
        let answer =
            parse(&bytes, answered).ok_or_else(|| endpoint.unreachable("its token service sent no token"))?;
        if identity.is_some() && answer.refresh.is_some() {
            state.replaced.clone_from(&answer.refresh);
        }
        Ok(answer)
    }
}

/// Fields as a form is sent.
fn form_of(url: &Url, fields: &[(&str, &str)]) -> String {
    // An address's query is written the same way.
    let mut form = url.clone();
    form.set_query(None);
    form.query_pairs_mut().extend_pairs(fields);
    form.query().unwrap_or_default().to_owned()
}

fn date(text: &str) -> Option<Timestamp> {
    jiff::fmt::rfc2822::DateTimeParser::new()
        .parse_timestamp(text)
        .ok()
}

/// A token, and how long it can be used.
#[derive(Debug)]
struct Token {
    token: Secret,
    life: Duration,
    /// The identity token that is to be used from now on.
    refresh: Option<Secret>,
}

/// Reads a token service's answer; `answered` is when it says to have sent it.
fn parse(bytes: &[u8], answered: Option<Timestamp>) -> Option<Token> {
    #[derive(Deserialize)]
    struct Answer {
        token: Option<Secret>,
        access_token: Option<Secret>,
        refresh_token: Option<Secret>,
        // Of any type: what makes no sense is as good as absent.
        expires_in: Option<serde_json::Value>,
        issued_at: Option<serde_json::Value>,
    }
    let answer: Answer = serde_json::from_slice(bytes).ok()?;
    let life = answer
        .expires_in
        .and_then(|seconds| Duration::try_from_secs_f64(seconds.as_f64()?).ok())
        .filter(|life| !life.is_zero())
        .unwrap_or(LIFE);
    // A service may hand out a token that it made earlier. Both times are by its own clock; what is more than the whole
    // life is no age but a wrong clock.
    let age = answered
        .zip(answer.issued_at.and_then(|at| at.as_str()?.parse().ok()))
        .and_then(|(now, issued): (Timestamp, Timestamp)| Duration::try_from(now.duration_since(issued)).ok())
        .filter(|age| *age < life)
        .unwrap_or_default();
    let left = life.saturating_sub(age).min(Duration::from_secs(86_400));
    Some(Token {
        token: answer
            .token
            .or(answer.access_token)
            .filter(|token| !token.reveal().is_empty())?,
        life: left.saturating_sub(MARGIN.min(left / 2)),
        refresh: answer.refresh_token.filter(|token| !token.reveal().is_empty()),
    })
}

/// The login that an identity token is: docker's helpers write it as this user's password.
pub(super) const IDENTITY_TOKEN_USER: &str = "<token>";

impl Login {
    /// An account by name and password.
    pub(super) fn new(user: impl Into<String>, password: Secret, origin: Origin) -> Self {
        Self {
            user: user.into(),
            password,
            origin,
        }
    }

    /// Is the password an identity token, which only a token service takes?
    pub(super) fn is_identity_token(&self) -> bool {
        self.user == IDENTITY_TOKEN_USER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_used_for_as_long_as_its_service_says() {
        let now: Timestamp = "2026-01-02T03:04:05Z".parse().unwrap();
        for (text, life) in [
            (r#"{"token": "t"}"#, 45),
            (r#"{"access_token": "t", "expires_in": 300}"#, 285),
            (r#"{"token": "t", "expires_in": 10}"#, 5),
            (r#"{"token": "t", "expires_in": 0}"#, 45),
            (r#"{"token": "t", "expires_in": -5}"#, 45),
            (r#"{"token": "t", "expires_in": 1e300}"#, 45),
            (
                r#"{"token": "t", "expires_in": 300, "issued_at": "2026-01-02T03:03:05Z"}"#,
                225,
            ),
            // A clock that is an hour off.
            (
                r#"{"token": "t", "expires_in": 300, "issued_at": "2026-01-02T02:04:05Z"}"#,
                285,
            ),
            (
                r#"{"token": "t", "expires_in": 300, "issued_at": "2026-01-02T04:04:05Z"}"#,
                285,
            ),
        ] {
            let token = parse(text.as_bytes(), Some(now)).unwrap();
            assert_eq!(
                (token.token.reveal(), token.life.as_secs()),
                ("t", life),
                "{text}"
            );
        }
        for text in [
            "",
            "{}",
            "[]",
            r#"{"token": ""}"#,
            r#"{"token": 5}"#,
            r#"{"access_token": null}"#,
        ] {
            assert!(parse(text.as_bytes(), Some(now)).is_none(), "{text}");
        }
    }

    #[test]
    fn a_form_is_written_as_browsers_do() {
        let url = "https://auth.example/token?account=me".parse().unwrap();
        let form = form_of(&url, &[("service", "a b&c"), ("refresh_token", "x+y/z=")]);
        assert_eq!(form, "service=a+b%26c&refresh_token=x%2By%2Fz%3D");
    }
}
