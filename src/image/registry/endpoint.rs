//! One registry, and what is said to it: requests that prove who we are, follow redirects and keep the registry's pauses.
//!
//! Credentials go to the registry itself and to the token service that it names, and nowhere else: not along a redirect, not
//! to an upload's location on another host, and not back to the registry once a redirect has left it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use jiff::Timestamp;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue, LOCATION};
use reqwest::{Method, Response, StatusCode, Url};

use super::super::error::Error;
use super::credentials::{Login, Origin};
use super::silence::{Silence, Unanswered};
use super::token::Tokens;
use super::transport::{
    ANSWER_TIMEOUT, Body, Clients, REDIRECTS_MAX, TAKEN_TIMEOUT, TooMuch, Trouble, begun, clients, sent,
};
use super::trust::{Reach, Registries, api_host};
use super::weather::{Failure, Gate, Patience, asked_pause, weather};

/// What a conversation is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::image) enum Purpose {
    Read,
    Write,
}

/// A registry, and one of its repositories.
#[derive(Debug)]
pub(super) struct Endpoint {
    /// The reference, for errors.
    pub(super) image: String,
    /// The registry's name, as the reference or the settings spell it.
    pub(super) registry: String,
    pub(super) repository: String,
    /// `https://host/`
    base: Url,
    pub(super) clients: Clients,
    pub(super) reach: Reach,
    pub(super) login: Option<Login>,
    tokens: Tokens,
    purpose: Purpose,
    pub(super) gate: Arc<Gate>,
    pub(super) silence: Arc<Silence>,
    /// Others can stand in for it.
    spare: bool,
    /// It has sent a whole blob where a part was asked for.
    ignores_ranges: AtomicBool,
    /// The path of the one file that is asked for, where this is no registry but a web server.
    file: Option<String>,
}

/// One request.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) headers: HeaderMap,
    /// Sent again as often as it takes.
    pub(super) body: Option<Bytes>,
}

impl Ask {
    pub(super) fn new(method: Method, url: Url) -> Self {
        Self {
            method,
            url,
            headers: HeaderMap::new(),
            body: None,
        }
    }

    /// With a header. A value that cannot stand in one is left out.
    pub(super) fn with(mut self, name: HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.insert(name, value);
        }
        self
    }
}

/// An answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) response: Response,
    /// Does it come from the registry itself, and not from where it sent us?
    pub(super) home: bool,
}

impl Endpoint {
    pub(super) fn new(
        image: &str,
        registry: &str,
        repository: &str,
        login: Option<Login>,
        registries: &Registries,
        purpose: Purpose,
        spare: bool,
    ) -> Result<Self, Error> {
        let plain = registries.is_plain_http(registry);
        let scheme = if plain { "http" } else { "https" };
        let unreachable = |reason: &str| Error::Unreachable {
            registry: registry.to_owned(),
            reason: reason.to_owned(),
        };
        let base: Url = format!("{scheme}://{}/", api_host(registry))
            .parse()
            .map_err(|_| unreachable("its name cannot stand in an address"))?;
        let reach = registries.reach(registry, base.host_str().unwrap_or_default());
        Ok(Self {
            image: image.to_owned(),
            registry: registry.to_owned(),
            repository: repository.to_owned(),
            clients: clients(registries, registry, &reach)?,
            gate: Gate::of(base.as_str()),
            silence: Arc::default(),
            tokens: Tokens::new(repository, purpose),
            purpose,
            base,
            reach,
            login,
            spare,
            ignores_ranges: AtomicBool::new(false),
            file: None,
        })
    }

    /// A web server and a file on it. It is shown no login.
    pub(super) fn web(
        image: &str,
        plain: bool,
        host: &str,
        path: &str,
        registries: &Registries,
    ) -> Result<Self, Error> {
        let mut endpoint = Self::new(image, host, "", None, registries, Purpose::Read, false)?;
        let scheme = if plain { "http" } else { "https" };
        let base = format!("{scheme}://{host}/").parse();
        endpoint.base = base.map_err(|_| endpoint.unreachable("its name cannot stand in an address"))?;
        endpoint.file = Some(path.to_owned());
        Ok(endpoint)
    }

    /// The address of another file on the same server.
    pub(super) fn at(&self, path: &str) -> Result<Url, Error> {
        self.resolve(&self.base, path)
    }

    /// The address of something under our repository, such as `blobs/sha256:…`; on a web server, of the file.
    pub(super) fn url(&self, path: &str) -> Result<Url, Error> {
        if let Some(file) = &self.file {
            return self.at(file);
        }
        self.resolve(&self.base, &format!("/v2/{}/{path}", self.repository))
    }

    /// What the registry itself is asked first, by whoever logs in.
    pub(super) fn root_url(&self) -> Result<Url, Error> {
        self.resolve(&self.base, "/v2/")
    }

    /// The address that an answer to `from` names.
    pub(super) fn resolve(&self, from: &Url, location: &str) -> Result<Url, Error> {
        from.join(location)
            .map_err(|_| self.unreachable("it sends us to an address that is none"))
    }

    pub(super) fn patience(&self) -> Patience {
        if self.spare {
            Patience::short()
        } else {
            Patience::new()
        }
    }

    pub(super) fn ignores_ranges(&self) -> bool {
        self.ignores_ranges.load(Ordering::Relaxed)
    }

    pub(super) fn note_ignored_range(&self) {
        self.ignores_ranges.store(true, Ordering::Relaxed);
    }

    pub(super) fn tokens(&self) -> &Tokens {
        &self.tokens
    }

    pub(super) fn is_home(&self, url: &Url) -> bool {
        url.origin() == self.base.origin()
    }

    /// The reference that is asked for, for errors.
    pub(super) fn image(&self) -> &str {
        &self.image
    }

    /// May what is secret go to this address? Only encrypted, unless the operator said otherwise for this registry.
    pub(super) fn is_safe(&self, url: &Url) -> bool {
        url.scheme() == "https" || (self.base.scheme() == "http" && url.scheme() == "http")
    }

    /// Is it waited for, and for how long?
    pub(super) fn unanswered(&self) -> Option<Unanswered> {
        let each = match self.purpose {
            Purpose::Read => ANSWER_TIMEOUT,
            Purpose::Write => TAKEN_TIMEOUT,
        };
        Some(Unanswered {
            waited: self.silence.lasts()?,
            registry: self.registry.clone(),
            most: self.patience().longest(each),
            // Ours is the longer one; who has not asked yet keeps the registry's.
            pause: self.silence.rests().or_else(|| self.gate.closed_for()),
        })
    }

    /// Does `work` until it gives something, as long as there is patience. It asks for the path `asked_for`.
    pub(super) async fn persistently<T>(
        &self,
        asked_for: &str,
        mut work: impl AsyncFnMut() -> Result<T, Failure>,
    ) -> Result<T, Error> {
        let _waiting = self.silence.wait();
        let mut patience = self.patience();
        loop {
            match work().await {
                Ok(done) => {
                    self.silence.heard();
                    return Ok(done);
                }
                Err(failure) => self.wait(failure, &mut patience, asked_for).await?,
            }
        }
    }

    /// Waits before the next try, or gives up.
    pub(super) async fn wait(
        &self,
        failure: Failure,
        patience: &mut Patience,
        asked_for: &str,
    ) -> Result<(), Error> {
        let (reason, asked) = match failure {
            Failure::Final(error) => return Err(error),
            Failure::Weather { reason, pause } => (reason, pause),
        };
        let Some(pause) = patience.pause(asked) else {
            let wish = match asked {
                Some(asked) if !asked.is_zero() => {
                    format!(" and asks for a pause of {} s", asked.as_secs())
                }
                _ => String::new(),
            };
            let in_vain = patience.in_vain(asked_for);
            return Err(self.unreachable(format!("{reason}{wish} ({in_vain})")));
        };
        tracing::debug!(registry = self.registry, reason, "trying again");
        if asked.is_some() {
            self.silence.rest(pause);
        }
        tokio::time::sleep(pause).await;
        Ok(())
    }

    /// Asks, and proves who we are where the registry wants to know. What comes back is whatever was answered but for
    /// passing trouble, which is a failure that another try may mend.
    pub(super) async fn ask(&self, ask: &Ask) -> Result<Answer, Failure> {
        self.gate.pass().await;
        let known = self.tokens.current(self).await?;
        let mut answer = self.follow(ask, known.clone()).await?;
        if answer.home && answer.response.status() == StatusCode::UNAUTHORIZED {
            // Asked for the first time, or a token was not good for as long as it said.
            let header = self
                .tokens
                .renewed(self, answer.response.headers(), known)
                .await?;
            answer = self.follow(ask, Some(header)).await?;
        }
        let status = answer.response.status();
        if is_passing(status) {
            let who = if answer.home { "it" } else { "its storage" };
            return Err(self.refused(status, answer.response.headers(), who));
        }
        Ok(answer)
    }

    /// Asks, and goes where redirects lead.
    async fn follow(&self, ask: &Ask, authorization: Option<HeaderValue>) -> Result<Answer, Failure> {
        let mut url = ask.url.clone();
        let mut home = true;
        for _ in 0..=REDIRECTS_MAX {
            home = home && self.is_home(&url);
            let response = self
                .send(ask, &url, home, authorization.clone().filter(|_| home))
                .await?;
            let status = response.status();
            let location = response.headers().get(LOCATION);
            let may_follow = ask.method == Method::GET || ask.method == Method::HEAD;
            let (Some(location), true, true) = (location, status.is_redirection(), may_follow) else {
                return Ok(Answer { response, home });
            };
            let location = location.to_str().unwrap_or_default();
            url = self.resolve(&url, location)?;
        }
        Err(self.unreachable("it redirects in circles").into())
    }

    async fn send(
        &self,
        ask: &Ask,
        url: &Url,
        home: bool,
        authorization: Option<HeaderValue>,
    ) -> Result<Response, Failure> {
        let client = if home {
            &self.clients.home
        } else {
            if !self.is_safe(url) {
                return Err(self.unreachable("it redirects to an address without TLS").into());
            }
            self.check(url)?;
            self.clients.abroad()?
        };
        let mut request = client
            .request(ask.method.clone(), url.clone())
            .headers(ask.headers.clone());
        if let Some(authorization) = authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        let answer = match &ask.body {
            Some(body) => sent(request, body, &self.silence).await,
            None => begun(request.send()).await,
        };
        self.came(answer)
    }

    /// What came of a request, or of a part of its answer. Whatever is said, and be it a refusal to listen, ends a silence.
    pub(super) fn came<T>(&self, result: Result<T, Trouble>) -> Result<T, Failure> {
        if !matches!(result, Err(Trouble::Silence(_))) {
            self.silence.heard();
        }
        result.map_err(|trouble| match trouble {
            Trouble::Silence(reason) => weather(reason),
            Trouble::Broken(reason) => weather(reason),
            Trouble::Lasting(reason) => self.unreachable(reason).into(),
        })
    }

    /// Refuses an address that the registry may not name. Names are checked by the client, when it connects.
    pub(super) fn check(&self, url: &Url) -> Result<(), Error> {
        self.reach
            .check_literal(url)
            .map_err(|error| self.unreachable(error.to_string()))
    }

    /// An answer that is neither yes nor a clear no.
    pub(super) fn refused(&self, status: StatusCode, headers: &HeaderMap, who: &str) -> Failure {
        let reason = format!("{who} answered {}", status.as_u16());
        if !is_passing(status) {
            return Failure::Final(self.unreachable(reason));
        }
        let pause = asked_pause(headers, Timestamp::now());
        if status == StatusCode::TOO_MANY_REQUESTS || pause.is_some() {
            self.gate.close(pause.unwrap_or_default());
        }
        Failure::Weather { reason, pause }
    }

    pub(super) fn unreachable(&self, reason: impl Into<String>) -> Error {
        Error::Unreachable {
            registry: self.registry.clone(),
            reason: reason.into(),
        }
    }

    pub(super) fn denied(&self) -> Error {
        let (image, registry) = (self.image.clone(), self.registry.clone());
        let login = self.login.as_ref();
        let user = login.map(|login| login.user.clone());
        match self.purpose {
            Purpose::Read => Error::Denied {
                image,
                registry,
                user,
                of_host: login.is_some_and(|login| login.origin == Origin::Host),
            },
            Purpose::Write => Error::ScopeMissing {
                image,
                registry,
                user,
                scope: self.tokens.scope().to_owned(),
            },
        }
    }

    /// A short answer, whole.
    pub(super) async fn whole(
        &self,
        response: Response,
        what: &'static str,
        limit: u64,
    ) -> Result<Vec<u8>, Failure> {
        match Body::new(response).whole(limit).await {
            Ok(bytes) => Ok(bytes),
            Err(TooMuch::Size(size)) => Err(Failure::Final(Error::TooLarge {
                image: self.image.clone(),
                what,
                size,
                limit,
            })),
            Err(TooMuch::Cut(trouble)) => self.came(Err(trouble)),
        }
    }

    /// Sends a request to the token service, which is trusted with a login and with nothing else.
    pub(super) async fn ask_token_service(
        &self,
        request: reqwest::RequestBuilder,
    ) -> Result<Response, Failure> {
        self.came(begun(request.send()).await)
    }
}

/// May another try be answered differently?
fn is_passing(status: StatusCode) -> bool {
    status.is_server_error() || [StatusCode::TOO_MANY_REQUESTS, StatusCode::REQUEST_TIMEOUT].contains(&status)
}
