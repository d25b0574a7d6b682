//! TLS on either side, with OpenSSL.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use openssl::error::ErrorStack;
use openssl::nid::Nid;
use openssl::ssl::{Ssl, SslAcceptor, SslConnector, SslFiletype, SslMethod, SslVerifyMode, SslVersion};
use openssl::x509::{X509, X509NameRef};
use tokio::time::timeout;
use tokio_openssl::SslStream;

use super::wire::{Stream, Wire};

/// For the handshake of TLS, by either side.
pub const TLS_TIME: Duration = Duration::from_secs(10);

/// What a listener shows to viewers. It can be changed while sessions run: they keep what they began with.
pub struct Certificate {
    chain: PathBuf,
    key: PathBuf,
    acceptor: RwLock<SslAcceptor>,
}

/// Why a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the certificate {} with the key {} cannot be used: {reason}", chain.display(), key.display())]
pub struct CertificateError {
    chain: PathBuf,
    key: PathBuf,
    reason: String,
}

impl std::fmt::Debug for Certificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificate")
            .field("chain", &self.chain)
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

impl Certificate {
    /// Reads a chain and its key, both PEM files.
    ///
    /// # Errors
    /// A file cannot be read, or the two do not belong together.
    pub fn load(chain: &Path, key: &Path) -> Result<Self, CertificateError> {
        Ok(Certificate {
            acceptor: RwLock::new(acceptor(chain, key)?),
            chain: chain.to_owned(),
            key: key.to_owned(),
        })
    }

    /// Reads the same files again. When that fails, what was read before stays in use.
    ///
    /// # Errors
    /// As for [`load`](Self::load).
    pub fn reload(&self) -> Result<(), CertificateError> {
        let new = acceptor(&self.chain, &self.key)?;
        *self.acceptor.write().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(())
    }

    /// Speaks TLS with a viewer that has just connected.
    ///
    /// # Errors
    /// What OpenSSL says about the viewer, or that it took longer than [`TLS_TIME`].
    pub async fn accept<S: Stream>(&self, stream: S) -> io::Result<SslStream<S>> {
        let ssl = {
            let acceptor = self.acceptor.read().unwrap_or_else(PoisonError::into_inner);
            Ssl::new(acceptor.context())?
        };
        let mut stream = SslStream::new(ssl, stream)?;
        match timeout(TLS_TIME, Pin::new(&mut stream).accept()).await {
            Ok(done) => done.map_err(io::Error::other)?,
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
        }
        Ok(stream)
    }
}

fn acceptor(chain: &Path, key: &Path) -> Result<SslAcceptor, CertificateError> {
    let build = || {
        // TLS 1.2 and newer: viewers of old distributions have nothing newer.
        let mut builder = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls_server())?;
        builder.set_certificate_chain_file(chain)?;
        builder.set_private_key_file(key, SslFiletype::PEM)?;
        builder.check_private_key()?;
        Ok(builder.build())
    };
    build().map_err(|e: ErrorStack| CertificateError {
        chain: chain.to_owned(),
        key: key.to_owned(),
        reason: e
            .errors()
            .first()
            .and_then(|e| e.reason())
            .unwrap_or("OpenSSL does not say why")
            .to_owned(),
    })
}

/// How a machine's server is known over TLS.
#[derive(Clone)]
pub struct MachineTls {
    connector: SslConnector,
    subject: Option<Vec<(Nid, String)>>,
}

impl std::fmt::Debug for MachineTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MachineTls")
            .field("subject", &self.subject)
            .finish_non_exhaustive()
    }
}

/// Why a description of a machine's certificate is refused.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// OpenSSL does not take the certificates.
    #[error("the certificates for the machine's screen cannot be used: {0}")]
    Certificates(#[from] ErrorStack),
    /// The subject is not written as `C=…,O=…,CN=…`.
    #[error("\"{0}\" is no subject of a certificate; write for example \"O=Example,CN=host\"")]
    Subject(String),
}

impl MachineTls {
    /// Trusts certificates that `authorities` (PEM) have signed. With a `subject`, as viewers' `host-subject` has it, the
    /// certificate must name exactly that, and its host name is not looked at; without, it must name the host.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn new(authorities: &[u8], subject: Option<&str>) -> Result<Self, TlsError> {
        let mut builder = SslConnector::builder(SslMethod::tls_client())?;
        builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
        builder.set_verify(SslVerifyMode::PEER);
        // Only these: not whatever else the host trusts.
        let mut store = openssl::x509::store::X509StoreBuilder::new()?;
        for authority in X509::stack_from_pem(authorities)? {
            store.add_cert(authority)?;
        }
        builder.set_cert_store(store.build());
        let subject = match subject {
            Some(text) => Some(read_subject(text).ok_or_else(|| TlsError::Subject(text.to_owned()))?),
            None => None,
        };
        Ok(MachineTls {
            connector: builder.build(),
            subject,
        })
    }

    /// Speaks TLS with the server at `host`.
    pub(super) async fn connect<S: Stream + 'static>(&self, host: &str, stream: S) -> io::Result<Wire> {
        let mut ssl = self.connector.configure()?;
        ssl.set_verify_hostname(self.subject.is_none());
        let mut stream = SslStream::new(ssl.into_ssl(host)?, stream)?;
        match timeout(TLS_TIME, Pin::new(&mut stream).connect()).await {
            Ok(done) => done.map_err(io::Error::other)?,
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
        }
        let shown = stream.ssl().peer_certificate();
        let is_it = match (&self.subject, shown) {
            (None, _) => true,
            (Some(wanted), Some(shown)) => names(shown.subject_name()).as_ref() == Some(wanted),
            (Some(_), None) => false,
        };
        if is_it {
            Ok(Box::new(stream))
        } else {
            Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "its certificate has another subject than the one that is expected",
            ))
        }
    }
}

/// The parts of a certificate's subject, in their order. `None` where one is no text.
fn names(subject: &X509NameRef) -> Option<Vec<(Nid, String)>> {
    subject
        .entries()
        .map(|entry| {
            let text = entry.data().to_string().ok()?;
            Some((entry.object().nid(), text))
        })
        .collect()
}

/// Reads `C=…, O=…, CN=…`: parts divided by commas, a backslash before one that belongs to the text.
fn read_subject(text: &str) -> Option<Vec<(Nid, String)>> {
    let mut parts = vec![String::new()];
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => parts.last_mut()?.push(characters.next()?),
            ',' => parts.push(String::new()),
            other => parts.last_mut()?.push(other),
        }
    }
    parts
        .iter()
        .map(|part| {
            let (key, value) = part.trim_start().split_once('=')?;
            Some((key_of(key)?, value.to_owned()))
        })
        .collect()
}

/// The keys that spice's tools write into subjects.
fn key_of(name: &str) -> Option<Nid> {
    Some(match name {
        "C" => Nid::COUNTRYNAME,
        "ST" => Nid::STATEORPROVINCENAME,
        "L" => Nid::LOCALITYNAME,
        "O" => Nid::ORGANIZATIONNAME,
        "OU" => Nid::ORGANIZATIONALUNITNAME,
        "CN" => Nid::COMMONNAME,
        "DC" => Nid::DOMAINCOMPONENT,
        "emailAddress" => Nid::PKCS9_EMAILADDRESS,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_are_read_as_viewers_read_them() {
        let read =
            |text| read_subject(text).map(|parts| parts.into_iter().map(|(_, v)| v).collect::<Vec<_>>());
        assert_eq!(
            read("C=DE, O=Acme\\, Inc,CN=host"),
            Some(vec!["DE".into(), "Acme, Inc".into(), "host".into()])
        );
        for wrong in ["", "CN", "X=1", "CN=a\\", "CN=a,"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }
}
