//! `cannery serve`, and a browser that asks it.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use openssl::ssl::{SslConnector, SslMethod};
use reqwest::{Method, Response};
use tokio::net::TcpStream;
use tokio_openssl::SslStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};

use super::host::cannery;
use super::https::Authority;

/// Longer than anything takes that a test waits for.
const PATIENCE: Duration = Duration::from_secs(60);
/// The secret of the API.
pub const API_TOKEN: &str = "0123456789abcdef0123456789abcdef";

/// Where a console will be served: its settings come before it.
pub struct Place {
    pub authority: Authority,
    pub port: u16,
}

impl Place {
    pub fn new() -> Self {
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let authority = Authority::new();
        std::fs::write(authority.file("api"), format!("{API_TOKEN}\n")).unwrap();
        std::fs::write(authority.file("xterm.js"), "// a terminal").unwrap();
        Self { authority, port }
    }

    /// The lines of the settings.
    pub fn settings(&self) -> String {
        let file = |name: &str| self.authority.file(name).display().to_string();
        format!(
            "[console]\nurl = \"https://localhost:{port}\"\nlisten = \"127.0.0.1:{port}\"\n\
             certificate = \"{}\"\nkey = \"{}\"\nassets = \"{}\"\napi_token_file = \"{}\"\naudit_log = \"{}\"\n",
            file("server.pem"),
            file("server.key"),
            self.authority.dir.path().display(),
            file("api"),
            file("audit.log"),
            port = self.port,
        )
    }

    /// Further lines, with which viewers may come.
    pub fn spice_settings(&self) -> String {
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let authority = self.authority.file("ca.pem");
        // The terminal's program comes from where the host has it.
        let assets = self.authority.dir.path().display().to_string();
        install_assets(&assets);
        format!(
            "spice_listen = \"127.0.0.1:{port}\"\nauthority_file = \"{}\"\n",
            authority.display()
        )
    }

    /// What pages call themselves.
    pub fn origin(&self) -> String {
        format!("https://localhost:{}", self.port)
    }

    /// The audit log's lines.
    pub fn audit(&self) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(self.authority.file("audit.log")).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// Starts `cannery serve` and waits until it listens.
    pub fn serve(&self, settings: &Path) -> Served {
        self.serve_and_read(settings, 1)
    }

    /// The same, and reads so many lines of what it says.
    pub fn serve_and_read(&self, settings: &Path, lines: usize) -> Served {
        let mut child = Command::new(cannery())
            .arg("--config")
            .arg(settings)
            .arg("serve")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        let mut errors = BufReader::new(child.stderr.take().unwrap());
        for _ in 0..lines {
            errors.read_line(&mut said).unwrap();
        }
        assert!(said.contains("is served on"), "{said}");
        Served { child, said }
    }

    /// A browser that has not been here yet.
    pub fn browser(&self) -> Browser {
        let ca = std::fs::read(self.authority.file("ca.pem")).unwrap();
        let client = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .add_root_certificate(reqwest::Certificate::from_pem(&ca).unwrap())
            .build()
            .unwrap();
        Browser {
            client,
            ca: self.authority.file("ca.pem"),
            port: self.port,
            cookie: None,
        }
    }
}

/// Fetches the terminal's program, as an operator does.
fn install_assets(folder: &str) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/console-assets");
    let output = Command::new(script).arg(folder).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// A console that runs until it is dropped.
pub struct Served {
    child: Child,
    /// What it has said first.
    pub said: String,
}

impl Served {
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits until it has ended by itself, well.
    pub fn ends(mut self) {
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Somebody's browser, with at most one cookie.
pub struct Browser {
    client: reqwest::Client,
    ca: PathBuf,
    port: u16,
    pub cookie: Option<String>,
}

pub type Socket = WebSocketStream<SslStream<TcpStream>>;

impl Browser {
    /// A request as one of our own pages makes it, with these further headers, which replace the usual ones.
    pub async fn ask(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<String>,
    ) -> Response {
        let origin = format!("https://localhost:{}", self.port);
        let mut request = self.client.request(method, format!("{origin}{path}"));
        let cookie = self.cookie.clone().unwrap_or_default();
        let usual = [("origin", origin.as_str()), ("cookie", cookie.as_str())];
        let usual = usual
            .iter()
            .filter(|(name, value)| !value.is_empty() && !headers.iter().any(|(other, _)| other == name));
        for (name, value) in usual.chain(headers) {
            request = request.header(*name, *value);
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body);
        }
        request.send().await.unwrap()
    }

    pub async fn get(&self, path: &str) -> Response {
        self.ask(Method::GET, path, &[], None).await
    }

    /// Shows a ticket; the status, and the cookie is kept.
    pub async fn enter(&mut self, key: &str, ticket: &str) -> u16 {
        let body = serde_json::json!({ "ticket": ticket }).to_string();
        let answer = self
            .ask(Method::POST, &format!("/jobs/{key}/session"), &[], Some(body))
            .await;
        if let Some(cookie) = answer.headers().get("set-cookie") {
            let cookie = cookie.to_str().unwrap();
            for rule in [
                "Secure",
                "HttpOnly",
                "SameSite=Strict",
                &format!("Path=/jobs/{key}"),
            ] {
                assert!(cookie.contains(rule), "{cookie}");
            }
            self.cookie = Some(cookie.split(';').next().unwrap().to_owned());
        }
        answer.status().as_u16()
    }

    /// Opens a WebSocket as a page of this origin; the status where it is refused.
    pub async fn open_from(&self, origin: &str, path: &str) -> Result<Socket, u16> {
        let mut connector = SslConnector::builder(SslMethod::tls_client()).unwrap();
        connector.set_ca_file(&self.ca).unwrap();
        let ssl = connector
            .build()
            .configure()
            .unwrap()
            .into_ssl("localhost")
            .unwrap();
        let tcp = TcpStream::connect(("127.0.0.1", self.port)).await.unwrap();
        let mut stream = SslStream::new(ssl, tcp).unwrap();
        Pin::new(&mut stream).connect().await.unwrap();
        let mut request = format!("wss://localhost:{}{path}", self.port)
            .into_client_request()
            .unwrap();
        request.headers_mut().insert("origin", origin.parse().unwrap());
        if let Some(cookie) = &self.cookie {
            request.headers_mut().insert("cookie", cookie.parse().unwrap());
        }
        match tokio_tungstenite::client_async(request, stream).await {
            Ok((socket, _)) => Ok(socket),
            Err(Error::Http(answer)) => Err(answer.status().as_u16()),
            Err(e) => panic!("{e}"),
        }
    }

    /// Opens a WebSocket as our own pages do.
    pub async fn open(&self, path: &str) -> Result<Socket, u16> {
        self.open_from(&format!("https://localhost:{}", self.port), path)
            .await
    }
}

/// Reads what a WebSocket brings until that ends it or this is in it; all of it as text, and whether it has ended.
pub async fn read_until(socket: &mut Socket, awaited: &str) -> (String, bool) {
    let mut all = String::new();
    let reading = async {
        loop {
            match socket.next().await {
                Some(Ok(Message::Binary(bytes))) => all.push_str(&String::from_utf8_lossy(&bytes)),
                Some(Ok(Message::Text(text))) => all.push_str(&text),
                Some(Ok(Message::Close(_)) | Err(_)) | None => return true,
                Some(Ok(_)) => {}
            }
            if !awaited.is_empty() && all.contains(awaited) {
                return false;
            }
        }
    };
    let ended = tokio::time::timeout(PATIENCE, reading).await;
    let ended = ended.unwrap_or_else(|_| panic!("waited for {awaited:?} in {all:?}"));
    (all, ended)
}

/// Types.
pub async fn type_in(socket: &mut Socket, keys: &str) {
    socket
        .send(Message::binary(keys.as_bytes().to_vec()))
        .await
        .unwrap();
}
