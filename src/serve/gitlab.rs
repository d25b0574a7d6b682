//! Signing in with GitLab: whoever is Developer or above in the job's project gets a ticket of their own.
//!
//! ```text
//! browser ─▶ /jobs/KEY/login ─▶ GitLab: who are you? ─▶ /oauth/callback?code&state
//!                                     code + verifier ─▶ token ─▶ who, and which role in the job's project
//! ```
//!
//! This is OAuth 2.0 with PKCE (RFC 7636) and an OpenID Connect nonce. `state` is good once, for ten minutes, and only in the browser that
//! began. The token is used for two questions and then given back; nothing of it is kept. The role is asked when a console is opened, not
//! later.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use reqwest::{Client, Method, StatusCode, Url};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use crate::console::limits::owner;
use crate::record::JobKey;
use crate::secret::Secret;
use crate::settings::GitLabSettings;
use crate::ticket;

/// Developer, as GitLab's API numbers the roles.
const DEVELOPER: u32 = 30;
/// Who signs in takes less than this, with a second factor too.
const SIGN_IN: Duration = Duration::from_secs(600);
/// Sign-ins that are under way; more push the oldest out.
const MOST: usize = 10_000;
/// The same from one address: they push out that address's own first.
const MOST_OF_ONE: usize = 100;
/// GitLab answers a question within this.
const ANSWER: Duration = Duration::from_secs(10);
/// No answer is longer.
const LONGEST: usize = 256 << 10;
/// What the token is for: who somebody is (`openid`), and what they are in a project.
const SCOPE: &str = "openid read_api";

/// Why somebody is not let in.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotIn {
    #[error("this sign-in was not begun in this browser, or too long ago")]
    Stale,
    #[error("the sign-in was denied at GitLab")]
    Denied,
    #[error("GitLab does not know the code that the browser brought")]
    Code,
    #[error("only Developers of the job's project and above may open its console")]
    Role,
    #[error("GitLab did not answer as expected")]
    GitLab(String),
}

impl NotIn {
    /// The word by which the page knows it.
    pub(super) fn word(&self) -> &'static str {
        match self {
            NotIn::Stale => "stale",
            NotIn::Denied => "denied",
            NotIn::Code => "code",
            NotIn::Role => "role",
            NotIn::GitLab(_) => "gitlab",
        }
    }

    /// Whether whoever came back may have guessed or made something up: nobody answers for GitLab's own troubles.
    pub(super) fn is_a_guess(&self) -> bool {
        match self {
            NotIn::Stale | NotIn::Code | NotIn::Role => true,
            NotIn::Denied | NotIn::GitLab(_) => false,
        }
    }
}

/// A sign-in that was begun.
#[derive(Debug)]
struct Begun {
    state: [u8; 32],
    browser: [u8; 32],
    verifier: Secret,
    nonce: String,
    job: JobKey,
    from: IpAddr,
    since: Instant,
}

/// Somebody who has signed in, and may be let in if the role is right.
#[derive(Debug)]
pub(super) struct SignedIn {
    /// For which job.
    pub(super) job: JobKey,
    token: Secret,
    user: User,
}

#[derive(Debug, Deserialize)]
struct User {
    id: u64,
    username: String,
}

#[derive(Deserialize)]
struct Member {
    id: u64,
    access_level: u32,
    #[serde(default)]
    state: Option<String>,
}

#[derive(Deserialize)]
struct Token {
    access_token: Secret,
    id_token: Secret,
}

#[derive(Deserialize)]
struct Claims {
    aud: String,
    nonce: String,
    sub: String,
}

/// The GitLab that people sign in with.
#[derive(Debug)]
pub(super) struct GitLab {
    settings: GitLabSettings,
    secret: Option<Secret>,
    /// Where GitLab sends people back to.
    back: String,
    client: Client,
    begun: Mutex<VecDeque<Begun>>,
}

fn hash(text: &str) -> [u8; 32] {
    Sha256::digest(text.as_bytes()).into()
}

impl GitLab {
    /// Reads the files that the settings name.
    pub(super) fn new(settings: GitLabSettings, origin: &str) -> Result<Self, String> {
        let read = |path: &std::path::Path| {
            std::fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display()))
        };
        let secret = settings.secret_file.as_deref().map(|path| {
            let text =
                String::from_utf8(read(path)?).map_err(|_| format!("{} is no text", path.display()))?;
            Ok::<_, String>(Secret::new(text.trim()))
        });
        let mut builder = Client::builder()
            .timeout(ANSWER)
            // An answer that leads elsewhere would take the token there.
            .redirect(reqwest::redirect::Policy::none());
        if let Some(path) = &settings.ca_file {
            let certificates = reqwest::Certificate::from_pem_bundle(&read(path)?)
                .map_err(|_| format!("{} holds no certificates in PEM", path.display()))?;
            for certificate in certificates {
                builder = builder.add_root_certificate(certificate);
            }
        }
        Ok(Self {
            secret: secret.transpose()?,
            client: builder.build().map_err(|e| format!("cannot speak TLS: {e}"))?,
            back: format!("{origin}/oauth/callback"),
            settings,
            begun: Mutex::default(),
        })
    }

    /// Where a browser goes to sign in, and the cookie by which it is known when it comes back.
    pub(super) fn begin(
        &self,
        job: JobKey,
        from: IpAddr,
        now: Instant,
    ) -> Result<(String, Secret), ticket::Error> {
        let [state, browser, nonce] = [
            ticket::random_text()?,
            ticket::random_text()?,
            ticket::random_text()?,
        ];
        // 43 characters at least, says RFC 7636.
        let verifier = format!(
            "{}{}",
            ticket::random_text()?.reveal(),
            ticket::random_text()?.reveal()
        );
        let query = query(&[
            ("client_id", &self.settings.application),
            ("redirect_uri", &self.back),
            ("response_type", "code"),
            ("scope", SCOPE),
            ("state", state.reveal()),
            ("nonce", nonce.reveal()),
            ("code_challenge", &BASE64.encode(hash(&verifier))),
            ("code_challenge_method", "S256"),
        ]);
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        begun.retain(|b| now.saturating_duration_since(b.since) < SIGN_IN);
        let from = owner(from);
        let mut same = begun.iter().enumerate().filter(|(_, b)| b.from == from);
        let oldest = same.next().map(|(at, _)| at);
        if same.count() + 1 >= MOST_OF_ONE
            && let Some(oldest) = oldest
        {
            begun.remove(oldest);
        } else if begun.len() >= MOST {
            begun.pop_front();
        }
        begun.push_back(Begun {
            state: hash(state.reveal()),
            browser: hash(browser.reveal()),
            verifier: Secret::new(verifier),
            nonce: nonce.reveal().to_owned(),
            job,
            from,
            since: now,
        });
        Ok((format!("{}/oauth/authorize?{query}", self.settings.url), browser))
    }

    /// The sign-in of this state, if this browser began it; it is not there a second time.
    fn take(&self, state: &str, browser: &str, now: Instant) -> Option<Begun> {
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        let at = begun.iter().position(|b| b.state == hash(state))?;
        let begun = begun.remove(at)?;
        let fresh = now.saturating_duration_since(begun.since) < SIGN_IN;
        (fresh && begun.browser == hash(browser)).then_some(begun)
    }

    /// Which job a browser that comes back was on its way to, as long as that is not used up: for a refusal to lead there.
    pub(super) fn aim(&self, state: &str, browser: &str) -> Option<JobKey> {
        let begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = begun
            .iter()
            .find(|b| b.state == hash(state) && b.browser == hash(browser))?;
        Some(begun.job.clone())
    }

    /// Finds out who came back. Without a code it is somebody who denied it.
    pub(super) async fn finish(
        &self,
        state: &str,
        browser: &str,
        code: Option<&str>,
    ) -> Result<SignedIn, NotIn> {
        let begun = self.take(state, browser, Instant::now()).ok_or(NotIn::Stale)?;
        let code = code.ok_or(NotIn::Denied)?;
        let mut form = vec![
            ("client_id", self.settings.application.as_str()),
            ("grant_type", "authorization_code"),
            ("code", code),
            ("redirect_uri", &self.back),
            ("code_verifier", begun.verifier.reveal()),
        ];
        if let Some(secret) = &self.secret {
            form.push(("client_secret", secret.reveal()));
        }
        let token = self
            .ask::<Token>(Method::POST, "/oauth/token", None, Some(query(&form)))
            .await;
        let token = match token {
            // The answer to a wrong code or proof; a wrong secret of ours is another one (RFC 6749, 5.2).
            Err(NotIn::GitLab(why)) if why == StatusCode::BAD_REQUEST.as_str() => return Err(NotIn::Code),
            token => token?,
        };
        let claims = claims(token.id_token.reveal())
            .ok_or_else(|| NotIn::GitLab("its ID token cannot be read".into()))?;
        // It came from GitLab itself, over TLS, so its signature says nothing more (OpenID Connect Core, 3.1.3.7).
        if claims.nonce != begun.nonce || claims.aud != self.settings.application {
            return Err(NotIn::Stale);
        }
        let user: User = self
            .ask(Method::GET, "/api/v4/user", Some(&token.access_token), None)
            .await?;
        if claims.sub != user.id.to_string() {
            return Err(NotIn::GitLab("its ID token is for somebody else".into()));
        }
        Ok(SignedIn {
            job: begun.job,
            token: token.access_token,
            user,
        })
    }

    /// The name of whoever signed in, if they may open consoles of this project, which is one of `coordinator`.
    pub(super) async fn admit(
        &self,
        who: &SignedIn,
        coordinator: &str,
        project: &str,
    ) -> Result<String, NotIn> {
        if !same(coordinator, &self.settings.url) {
            return Err(NotIn::Role);
        }
        let path = format!(
            "/api/v4/projects/{}/members/all/{}",
            escaped(project),
            who.user.id
        );
        let member = self
            .ask::<Member>(Method::GET, &path, Some(&who.token), None)
            .await;
        let member = match member {
            Err(NotIn::GitLab(why)) if why == StatusCode::NOT_FOUND.as_str() => return Err(NotIn::Role),
            member => member?,
        };
        let active = member.state.is_none_or(|state| state == "active");
        if member.id == who.user.id && active && member.access_level >= DEVELOPER {
            Ok(who.user.username.clone())
        } else {
            Err(NotIn::Role)
        }
    }

    /// Gives the token back.
    pub(super) async fn leave(&self, who: SignedIn) {
        let mut form = vec![
            ("client_id", self.settings.application.as_str()),
            ("token", who.token.reveal()),
        ];
        if let Some(secret) = &self.secret {
            form.push(("client_secret", secret.reveal()));
        }
        // It ends by itself, too.
        if let Err(e) = self
            .answer(Method::POST, "/oauth/revoke", None, Some(query(&form)))
            .await
        {
            tracing::info!("a token was not given back: {e:?}");
        }
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        token: Option<&Secret>,
        form: Option<String>,
    ) -> Result<T, NotIn> {
        let bytes = self.answer(method, path, token, form).await?;
        // No part of it is quoted: it may hold the token.
        serde_json::from_slice(&bytes)
            .map_err(|_| NotIn::GitLab(format!("no such answer was expected from {path}")))
    }

    async fn answer(
        &self,
        method: Method,
        path: &str,
        token: Option<&Secret>,
        form: Option<String>,
    ) -> Result<Vec<u8>, NotIn> {
        let failed = |e: reqwest::Error| NotIn::GitLab(e.without_url().to_string());
        let mut request = self
            .client
            .request(method, format!("{}{path}", self.settings.url));
        if let Some(token) = token {
            request = request.bearer_auth(token.reveal());
        }
        if let Some(form) = form {
            request = request
                .header("content-type", "application/x-www-form-urlencoded")
                .body(form);
        }
        let mut answer = request.send().await.map_err(failed)?;
        if !answer.status().is_success() {
            return Err(NotIn::GitLab(answer.status().as_str().to_owned()));
        }
        let mut bytes = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(failed)? {
            bytes.extend_from_slice(&chunk);
            if bytes.len() > LONGEST {
                return Err(NotIn::GitLab("its answer has no end".into()));
            }
        }
        Ok(bytes)
    }
}

/// Do two addresses mean the same instance? Neither the host's capitals nor a port that is the usual one makes another of it.
fn same(one: &str, other: &str) -> bool {
    let parsed = |address: &str| {
        Url::parse(address)
            .ok()
            .map(|url| url.as_str().trim_end_matches('/').to_owned())
    };
    parsed(one).is_some_and(|one| parsed(other) == Some(one))
}

/// Pairs as a query or a form.
fn query(pairs: &[(&str, &str)]) -> String {
    let url = Url::parse_with_params("https://x/", pairs);
    url.ok()
        .and_then(|url| url.query().map(str::to_owned))
        .unwrap_or_default()
}

/// A project's path as one part of an address.
fn escaped(project: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    project
        .bytes()
        .map(|b| {
            if plain(b) {
                char::from(b).to_string()
            } else {
                format!("%{b:02X}")
            }
        })
        .collect()
}

/// What an ID token says.
fn claims(token: &str) -> Option<Claims> {
    let payload = token.split('.').nth(1)?;
    serde_json::from_slice(&BASE64.decode(payload).ok()?).ok()
}

#[cfg(test)]
mod tests;
