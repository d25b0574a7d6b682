//! A web server of the test's own, with TLS or without, that answers by a function and remembers who asked.

use std::io::{BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use openssl::asn1::Asn1Time;
use openssl::bn::BigNum;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::ssl::{SslAcceptor, SslFiletype, SslMethod, SslVerifyMode};
use openssl::x509::extension::{BasicConstraints, SubjectAlternativeName};
use openssl::x509::{X509, X509NameBuilder};

/// Certificates of one authority, as files.
pub struct Authority {
    pub dir: tempfile::TempDir,
    certificate: X509,
    key: PKey<Private>,
}

impl Authority {
    pub fn new() -> Self {
        let (certificate, key) = issue("test authority", None);
        let authority = Self {
            dir: tempfile::tempdir().unwrap(),
            certificate,
            key,
        };
        authority.write("ca.pem", &authority.certificate.to_pem().unwrap());
        for name in ["server", "client"] {
            let (certificate, key) = issue(name, Some((&authority.certificate, &authority.key)));
            authority.write(&format!("{name}.pem"), &certificate.to_pem().unwrap());
            // The older form, which not all programs take.
            let key = key.ec_key().unwrap().private_key_to_pem().unwrap();
            authority.write(&format!("{name}.key"), &key);
        }
        authority
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.file(name), bytes).unwrap();
    }

    /// `ca.pem`, `server.pem`, `server.key`, `client.pem`, `client.key`
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

fn issue(name: &str, by: Option<(&X509, &PKey<Private>)>) -> (X509, PKey<Private>) {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
    let key = PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap();
    let mut subject = X509NameBuilder::new().unwrap();
    subject.append_entry_by_text("CN", name).unwrap();
    let subject = subject.build();
    let mut builder = X509::builder().unwrap();
    builder.set_version(2).unwrap();
    let serial = BigNum::from_u32(u32::try_from(name.len()).unwrap()).unwrap();
    builder
        .set_serial_number(&serial.to_asn1_integer().unwrap())
        .unwrap();
    builder.set_subject_name(&subject).unwrap();
    builder
        .set_issuer_name(by.map_or(&subject, |(issuer, _)| issuer.subject_name()))
        .unwrap();
    builder
        .set_not_before(&Asn1Time::days_from_now(0).unwrap())
        .unwrap();
    builder
        .set_not_after(&Asn1Time::days_from_now(2).unwrap())
        .unwrap();
    builder.set_pubkey(&key).unwrap();
    if by.is_none() {
        builder
            .append_extension(BasicConstraints::new().critical().ca().build().unwrap())
            .unwrap();
    } else {
        let names = SubjectAlternativeName::new()
            .ip("127.0.0.1")
            .ip("::1")
            .dns("localhost")
            .build(&builder.x509v3_context(None, None))
            .unwrap();
        builder.append_extension(names).unwrap();
    }
    builder
        .sign(by.map_or(&key, |(_, key)| key), MessageDigest::sha256())
        .unwrap();
    (builder.build(), key)
}

/// One request as it came.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    pub method: String,
    /// With the query.
    pub path: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    pub fn authorization(&self) -> Option<&str> {
        self.header("authorization")
    }
}

/// An answer: status, headers, body.
pub struct Answer(pub u16, pub Vec<(String, String)>, pub Vec<u8>);

impl Answer {
    pub fn ok(body: impl Into<Vec<u8>>) -> Self {
        Self(200, Vec::new(), body.into())
    }

    pub fn status(status: u16) -> Self {
        Self(status, Vec::new(), Vec::new())
    }

    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.1.push((name.to_owned(), value.into()));
        self
    }

    pub fn redirect(to: impl Into<String>) -> Self {
        Self::status(307).with("location", to)
    }
}

/// How a server speaks.
pub enum Speech<'a> {
    Plain,
    Tls(&'a Authority),
    /// And only to who has a certificate of the authority.
    TlsForClients(&'a Authority),
}

/// A running server; its thread ends with the test's process.
pub struct Server {
    pub port: u16,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    pub fn start(speech: Speech<'_>, answer: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Self {
        let acceptor = match speech {
            Speech::Plain => None,
            Speech::Tls(authority) => Some(acceptor(authority).build()),
            Speech::TlsForClients(authority) => {
                let mut builder = acceptor(authority);
                builder.set_ca_file(authority.file("ca.pem")).unwrap();
                builder.set_verify(SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT);
                Some(builder.build())
            }
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (answer, log) = (Arc::new(answer), Arc::clone(&seen));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (acceptor, answer, log) = (acceptor.clone(), Arc::clone(&answer), Arc::clone(&log));
                std::thread::spawn(move || match acceptor {
                    // Who does not get through is no request.
                    Some(acceptor) => {
                        if let Ok(stream) = acceptor.accept(stream) {
                            serve(stream, &*answer, &log);
                        }
                    }
                    None => serve::<TcpStream>(stream, &*answer, &log),
                });
            }
        });
        Self { port, seen }
    }

    /// `127.0.0.1:PORT`
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

fn acceptor(authority: &Authority) -> openssl::ssl::SslAcceptorBuilder {
    let mut builder = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls()).unwrap();
    builder
        .set_private_key_file(authority.file("server.key"), SslFiletype::PEM)
        .unwrap();
    builder
        .set_certificate_chain_file(authority.file("server.pem"))
        .unwrap();
    builder
}

fn serve<S: Read + Write>(stream: S, answer: &dyn Fn(&Seen) -> Answer, log: &Mutex<Vec<Seen>>) {
    let mut stream = BufReader::new(stream);
    while let Some(seen) = request(&mut stream) {
        let head = seen.method == "HEAD";
        let Answer(status, headers, body) = answer(&seen);
        log.lock().unwrap().push(seen);
        let mut text = format!("HTTP/1.1 {status} x\r\n");
        for (name, value) in headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        text.push_str(&format!("content-length: {}\r\n\r\n", body.len()));
        let out = stream.get_mut();
        if out.write_all(text.as_bytes()).is_err() || (!head && out.write_all(&body).is_err()) {
            return;
        }
        // A client that is gone has read enough.
        drop(out.flush());
    }
}

fn request(stream: &mut impl std::io::BufRead) -> Option<Seen> {
    let mut seen = Seen::default();
    let mut line = String::new();
    stream.read_line(&mut line).ok().filter(|count| *count > 0)?;
    let mut words = line.split_whitespace();
    (seen.method, seen.path) = (words.next()?.to_owned(), words.next()?.to_owned());
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        seen.headers
            .push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let length = seen.header("content-length").and_then(|text| text.parse().ok());
    seen.body = vec![0; length.unwrap_or(0)];
    stream.read_exact(&mut seen.body).ok()?;
    Some(seen)
}
