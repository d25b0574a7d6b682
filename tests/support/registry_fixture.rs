//! Debian's docker-registry on loopback, with a storage of its own.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Time for the registry to listen. It takes some tenths of a second on an idle machine.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// The account of a registry with passwords, and its line of an htpasswd file.
pub const USER: &str = "ci";
pub const PASSWORD: &str = "sesame";
const HTPASSWD: &str = "ci:$2b$05$abcdefghijklmnopqrstuuKcS.CYWVYVaLiiCKrrc0A5s3mGesJ9O\n";

/// A running registry; it ends with this value.
pub struct Registry {
    child: Child,
    dir: tempfile::TempDir,
    /// `127.0.0.1:PORT`
    pub host: String,
    password: bool,
}

/// What a registry asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Open,
    Password,
    Tls,
}

impl Registry {
    /// Everybody may pull and push.
    pub fn open() -> Self {
        Self::start(Kind::Open)
    }

    /// Only [`USER`] with [`PASSWORD`] may.
    pub fn with_password() -> Self {
        Self::start(Kind::Password)
    }

    /// Speaks TLS with a certificate of its own, which [`Registry::certificate`] holds.
    pub fn with_tls() -> Self {
        Self::start(Kind::Tls)
    }

    /// The file of the registry's certificate.
    pub fn certificate(&self) -> PathBuf {
        self.dir.path().join("cert.pem")
    }

    fn start(kind: Kind) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("htpasswd"), HTPASSWD).unwrap();
        let tls = if kind == Kind::Tls {
            let status = Command::new("openssl")
                .args([
                    "req",
                    "-x509",
                    "-newkey",
                    "rsa:2048",
                    "-nodes",
                    "-days",
                    "2",
                    "-subj",
                    "/CN=registry",
                ])
                .args(["-addext", "subjectAltName=IP:127.0.0.1", "-keyout"])
                .arg(at("key.pem"))
                .arg("-out")
                .arg(at("cert.pem"))
                .stderr(Stdio::null())
                .status()
                .expect("openssl is installed");
            assert!(status.success());
            format!(
                ", tls: {{certificate: {}, key: {}}}",
                at("cert.pem").display(),
                at("key.pem").display()
            )
        } else {
            String::new()
        };
        let auth = if kind == Kind::Password {
            format!(
                "auth: {{htpasswd: {{realm: test, path: {}}}}}\n",
                at("htpasswd").display()
            )
        } else {
            String::new()
        };
        // Port 0: the kernel chooses, and the log tells.
        let config = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"127.0.0.1:0\"{tls}}}\n{auth}",
            at("data").display()
        );
        std::fs::write(at("config.yml"), config).unwrap();
        let log = File::create(at("log")).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(at("config.yml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("docker-registry is installed");
        let mut registry = Self {
            child,
            dir,
            host: String::new(),
            password: kind == Kind::Password,
        };
        let start = Instant::now();
        while registry.host.is_empty() {
            assert!(start.elapsed() < START_TIMEOUT, "{:?}", registry.log());
            std::thread::sleep(Duration::from_millis(20));
            let listening = registry.log().into_iter().find_map(|line| {
                let (_, rest) = line.split_once("listening on ")?;
                // `127.0.0.1:PORT"`, or `127.0.0.1:PORT, tls"`.
                Some(rest.split(['"', ',']).next()?.to_owned())
            });
            registry.host = listening.unwrap_or_default();
        }
        registry
    }

    /// Copies an image of a layout into a repository.
    pub fn push(&self, layout: &str, name: &str) {
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["copy", "--quiet", "--dest-tls-verify=false", "--all"]);
        if self.password {
            skopeo.arg(format!("--dest-creds={USER}:{PASSWORD}"));
        }
        let output = skopeo
            .args([layout, &format!("docker://{}/{name}", self.host)])
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// How often a blob was asked for.
    pub fn downloads(&self, digest: &str) -> usize {
        let request = format!("/blobs/{digest} HTTP/1.1\" 20");
        self.log()
            .iter()
            .filter(|line| line.contains("\"GET ") && line.contains(&request))
            .count()
    }

    /// How many bytes of a blob were sent, in however many parts.
    pub fn sent(&self, digest: &str) -> u64 {
        let request = format!("/blobs/{digest} HTTP/1.1\" 20");
        self.log()
            .iter()
            .filter(|line| line.contains("\"GET "))
            .filter_map(|line| {
                line.split_once(&request)?
                    .1
                    .split(' ')
                    .nth(1)?
                    .parse::<u64>()
                    .ok()
            })
            .sum()
    }

    /// All requests so far.
    pub fn requests(&self) -> usize {
        self.log()
            .iter()
            .filter(|line| line.contains(" HTTP/1.1\" "))
            .count()
    }

    /// Where the registry keeps a blob.
    pub fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.trim_start_matches("sha256:");
        let blobs = Path::new("data/docker/registry/v2/blobs/sha256");
        self.dir.path().join(blobs).join(&hex[..2]).join(hex).join("data")
    }

    /// Ends it; its address stays, and nobody answers there.
    pub fn stop(&mut self) {
        // Ended already is as good.
        drop(self.child.kill());
        self.child.wait().unwrap();
    }

    fn log(&self) -> Vec<String> {
        let log = File::open(self.dir.path().join("log")).unwrap();
        BufReader::new(log).lines().map(Result::unwrap).collect()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.stop();
    }
}
