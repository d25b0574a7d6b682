//! An S3-compatible server with one bucket, for the runner's caches.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::guests::checkout;
use super::runner::Cache;
use super::until;

/// The first time it is installed.
const STARTS: Duration = Duration::from_secs(300);
const BUCKET: &str = "cache";

/// A server at work; dropping it ends it.
#[derive(Debug)]
pub struct S3 {
    child: Child,
    address: IpAddr,
    port: u16,
}

impl S3 {
    /// Starts a server, and makes the bucket.
    pub fn start(address: IpAddr, port: u16) -> Self {
        let child = Command::new(checkout().join("tests/support/s3-server"))
            .args([address.to_string(), port.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the S3 server's script can be started");
        let server = Self { child, address, port };
        until("the S3 server answers", STARTS, || {
            TcpStream::connect((address, port)).is_ok()
        });
        let made = server.ask("PUT", &format!("/{BUCKET}"));
        assert!(made.starts_with("HTTP/1.1 200"), "{made}");
        server
    }

    /// For a runner's settings.
    pub fn cache(&self) -> Cache {
        Cache {
            server: format!("{}:{}", self.address, self.port),
            bucket: BUCKET.to_owned(),
        }
    }

    /// The names of all objects of the bucket.
    pub fn objects(&self) -> Vec<String> {
        let list = self.ask("GET", &format!("/{BUCKET}"));
        let keys = list.split("<Key>").skip(1);
        keys.filter_map(|rest| Some(rest.split_once("</Key>")?.0.to_owned()))
            .collect()
    }

    fn ask(&self, method: &str, path: &str) -> String {
        let mut stream = TcpStream::connect((self.address, self.port)).expect("the S3 server listens");
        let host = self.address;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
        .expect("a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        // The script has become the server by then; both may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
