//! GitLab's side of a sign-in, as far as the console asks: codes, tokens, who somebody is, and roles in projects.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::https::{Answer, Authority, Seen, Server, Speech};

/// The application that the console is, at this GitLab.
pub const APPLICATION: &str = "the-console";
/// Its secret.
pub const SECRET: &str = "the-application's-secret";
/// The one project.
pub const PROJECT: &str = "group/project";

/// A code that was given out, and what it is good for.
#[derive(Debug, Clone)]
struct Code {
    user: u64,
    challenge: String,
    nonce: String,
    back: String,
}

#[derive(Debug, Default)]
struct State {
    codes: HashMap<String, Code>,
    /// By token.
    users: HashMap<String, u64>,
    /// By user, in the project.
    roles: HashMap<u64, u32>,
    given_back: usize,
    asked: usize,
    in_trouble: bool,
}

/// A GitLab with users that are named by their numbers.
pub struct GitLab {
    server: Server,
    state: Arc<Mutex<State>>,
}

impl GitLab {
    pub fn start(authority: &Authority, roles: &[(u64, u32)]) -> Self {
        let state = Arc::new(Mutex::new(State {
            roles: roles.iter().copied().collect(),
            ..State::default()
        }));
        let answers = Arc::clone(&state);
        let server = Server::start(Speech::Tls(authority), move |seen| {
            answers.lock().unwrap().answer(seen)
        });
        Self { server, state }
    }

    pub fn url(&self) -> String {
        format!("https://localhost:{}", self.server.port)
    }

    /// What the user's browser is sent back with after signing in at this address, which is checked as GitLab checks it.
    pub fn sign_in(&self, address: &str, user: u64) -> String {
        let url = reqwest::Url::parse(address).unwrap();
        assert!(
            address.starts_with(&format!("{}/oauth/authorize?", self.url())),
            "{address}"
        );
        let query: HashMap<String, String> = url.query_pairs().into_owned().collect();
        assert_eq!(query["client_id"], APPLICATION);
        assert_eq!(query["response_type"], "code");
        assert_eq!(query["code_challenge_method"], "S256");
        assert_eq!(query["scope"], "openid read_api");
        let mut state = self.state.lock().unwrap();
        let code = format!("code-{}", state.codes.len());
        state.codes.insert(
            code.clone(),
            Code {
                user,
                challenge: query["code_challenge"].clone(),
                nonce: query["nonce"].clone(),
                back: query["redirect_uri"].clone(),
            },
        );
        format!("/oauth/callback?code={code}&state={}", query["state"])
    }

    /// From now on it has troubles of its own.
    pub fn gets_into_trouble(&self) {
        self.state.lock().unwrap().in_trouble = true;
    }

    /// How many questions came.
    pub fn asked(&self) -> usize {
        self.state.lock().unwrap().asked
    }

    /// How many tokens were given back.
    pub fn given_back(&self) -> usize {
        self.state.lock().unwrap().given_back
    }
}

impl State {
    fn answer(&mut self, seen: &Seen) -> Answer {
        self.asked += 1;
        if self.in_trouble {
            return Answer::status(502);
        }
        let form = String::from_utf8(seen.body.clone()).unwrap();
        let form = reqwest::Url::parse(&format!("https://x/?{form}")).unwrap();
        let form: HashMap<String, String> = form.query_pairs().into_owned().collect();
        let user = seen
            .authorization()
            .and_then(|value| value.strip_prefix("Bearer "))
            .and_then(|token| self.users.get(token).copied());
        let members = format!("/api/v4/projects/{}/members/all/", PROJECT.replace('/', "%2F"));
        match (seen.method.as_str(), seen.path.as_str(), user) {
            ("POST", "/oauth/token", _) => self.token(&form),
            ("POST", "/oauth/revoke", _) if form["client_secret"] == SECRET => {
                self.users.remove(&form["token"]);
                self.given_back += 1;
                Answer::ok("{}")
            }
            (_, _, None) => Answer::status(401),
            ("GET", "/api/v4/user", Some(user)) => {
                Answer::ok(json!({"id": user, "username": format!("user{user}")}).to_string())
            }
            ("GET", path, Some(user)) if path == format!("{members}{user}") => match self.roles.get(&user) {
                Some(role) => {
                    Answer::ok(json!({"id": user, "access_level": role, "state": "active"}).to_string())
                }
                None => Answer::status(404),
            },
            _ => Answer::status(404),
        }
    }

    fn token(&mut self, form: &HashMap<String, String>) -> Answer {
        // A code is good once.
        let Some(code) = self.codes.remove(&form["code"]) else {
            return Answer::status(400);
        };
        let proof = BASE64.encode(Sha256::digest(form["code_verifier"].as_bytes()));
        if proof != code.challenge || form["redirect_uri"] != code.back {
            return Answer::status(400);
        }
        if form["client_secret"] != SECRET {
            return Answer::status(401);
        }
        let token = format!("token-{}-of-{}", self.users.len() + self.given_back, code.user);
        self.users.insert(token.clone(), code.user);
        let claims = json!({"aud": form["client_id"], "nonce": code.nonce, "sub": code.user.to_string()});
        let id_token = format!("e30.{}.c2ln", BASE64.encode(claims.to_string()));
        Answer::ok(json!({"access_token": token, "id_token": id_token, "token_type": "Bearer"}).to_string())
    }
}
