//! The certificate, which may be another one from one connection to the next.

use std::path::PathBuf;
use std::sync::{PoisonError, RwLock};

use openssl::error::ErrorStack;
use openssl::ssl::{AlpnError, Ssl, SslAcceptor, SslFiletype, SslMethod, select_next_proto};

/// The one protocol that is spoken, in the form in which TLS names it (RFC 7301).
const PROTOCOLS: &[u8] = b"\x08http/1.1";

/// Why a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the certificate {} with the key {} cannot be used: {reason}", certificate.display(), key.display())]
pub struct Error {
    certificate: PathBuf,
    key: PathBuf,
    reason: String,
}

/// The certificate in use, and where the next one will be found.
pub(super) struct Certificate {
    certificate: PathBuf,
    key: PathBuf,
    acceptor: RwLock<SslAcceptor>,
}

impl Certificate {
    pub(super) fn load(certificate: PathBuf, key: PathBuf) -> Result<Self, Error> {
        let acceptor = RwLock::new(acceptor(&certificate, &key)?);
        Ok(Self {
            certificate,
            key,
            acceptor,
        })
    }

    /// Reads the files again. Connections that are open keep the certificate that they began with; where the new one is no good,
    /// so do those to come.
    pub(super) fn reload(&self) -> Result<(), Error> {
        let new = acceptor(&self.certificate, &self.key)?;
        *self.acceptor.write().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(())
    }

    /// The server's side of one connection.
    pub(super) fn begin(&self) -> Result<Ssl, ErrorStack> {
        Ssl::new(
            self.acceptor
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .context(),
        )
    }
}

fn acceptor(certificate: &PathBuf, key: &PathBuf) -> Result<SslAcceptor, Error> {
    let build = || {
        let mut builder = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls_server())?;
        builder.set_certificate_chain_file(certificate)?;
        builder.set_private_key_file(key, SslFiletype::PEM)?;
        builder.check_private_key()?;
        builder.set_alpn_select_callback(|_, offered| {
            select_next_proto(PROTOCOLS, offered).ok_or(AlpnError::NOACK)
        });
        Ok(builder.build())
    };
    build().map_err(|e: ErrorStack| Error {
        certificate: certificate.clone(),
        key: key.clone(),
        reason: e
            .errors()
            .first()
            .and_then(|e| e.reason())
            .unwrap_or("OpenSSL does not say why")
            .to_owned(),
    })
}
