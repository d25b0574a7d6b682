//! What was signed, and in which envelope.
//!
//! Sources: containers/image's `docs/containers-signature.5.md` and cosign's `specs/SIGNATURE_SPEC.md` (simple signing);
//! sigstore's protobuf-specs (`Bundle` v0.3), secure-systems-lab/dsse's `protocol.md` and in-toto's Statement v1.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::super::digest::Digest;
use super::super::reference::Reference;

/// What a payload of cosign says that it is; others of the same form (atomic's) are another promise.
const SIMPLE_TYPE: &str = "cosign container image signature";
const STATEMENT_TYPES: [&str; 2] = [
    "https://in-toto.io/Statement/v1",
    "https://in-toto.io/Statement/v0.1",
];
/// The one statement that means "this is mine". Others (a list of parts, a scan's findings) say something *about* an image.
const SIGN_PREDICATE: &str = "https://sigstore.dev/cosign/sign/v1";
const STATEMENT_PAYLOAD: &str = "application/vnd.in-toto+json";

/// A message with its signatures: nothing in it is to be believed before one of them is verified.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Signed {
    /// The bytes that were signed.
    pub(super) message: Vec<u8>,
    pub(super) signatures: Vec<Vec<u8>>,
    payload: Vec<u8>,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Simple,
    Statement,
}

/// What a signature promises.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Claim {
    /// The manifests that are signed.
    pub(super) digests: Vec<Digest>,
    /// The repository that it is signed as.
    pub(super) repository: Option<String>,
}

impl Signed {
    /// A simple signing payload with the signature from its layer's annotation.
    pub(super) fn simple(payload: Vec<u8>, annotation: &str) -> Option<Self> {
        Some(Self {
            message: payload.clone(),
            signatures: vec![STANDARD.decode(annotation).ok()?],
            payload,
            kind: Kind::Simple,
        })
    }

    /// A sigstore bundle with a DSSE envelope.
    pub(super) fn bundle(bytes: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Bundle {
            dsse_envelope: Envelope,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Envelope {
            payload: String,
            payload_type: String,
            signatures: Vec<Signature>,
        }
        #[derive(Deserialize)]
        struct Signature {
            sig: String,
        }
        let envelope = serde_json::from_slice::<Bundle>(bytes).ok()?.dsse_envelope;
        if envelope.payload_type != STATEMENT_PAYLOAD {
            return None;
        }
        let payload = STANDARD.decode(envelope.payload).ok()?;
        // DSSE's pre-authentication encoding.
        let mut message = format!(
            "DSSEv1 {} {STATEMENT_PAYLOAD} {} ",
            STATEMENT_PAYLOAD.len(),
            payload.len()
        )
        .into_bytes();
        message.extend(&payload);
        Some(Self {
            message,
            signatures: envelope
                .signatures
                .iter()
                .filter_map(|signature| STANDARD.decode(&signature.sig).ok())
                .collect(),
            payload,
            kind: Kind::Statement,
        })
    }

    /// What is promised; none when it is no signature of an image at all.
    pub(super) fn claim(&self) -> Option<Claim> {
        match self.kind {
            Kind::Simple => simple_claim(&self.payload),
            Kind::Statement => statement_claim(&self.payload),
        }
    }
}

fn simple_claim(payload: &[u8]) -> Option<Claim> {
    #[derive(Deserialize)]
    struct Payload {
        critical: Critical,
    }
    #[derive(Deserialize)]
    struct Critical {
        #[serde(rename = "type")]
        kind: String,
        image: Image,
        identity: Option<Identity>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Image {
        docker_manifest_digest: Digest,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Identity {
        docker_reference: Option<String>,
    }
    let critical = serde_json::from_slice::<Payload>(payload).ok()?.critical;
    (critical.kind == SIMPLE_TYPE).then(|| Claim {
        digests: vec![critical.image.docker_manifest_digest],
        repository: critical
            .identity
            .and_then(|identity| identity.docker_reference)
            .filter(|name| !name.is_empty()),
    })
}

fn statement_claim(payload: &[u8]) -> Option<Claim> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Statement {
        #[serde(rename = "_type")]
        kind: String,
        predicate_type: String,
        subject: Vec<Subject>,
    }
    #[derive(Deserialize)]
    struct Subject {
        digest: Digests,
    }
    #[derive(Deserialize)]
    struct Digests {
        sha256: String,
    }
    let statement: Statement = serde_json::from_slice(payload).ok()?;
    if !STATEMENT_TYPES.contains(&statement.kind.as_str()) || statement.predicate_type != SIGN_PREDICATE {
        return None;
    }
    let digest = |subject: &Subject| Digest::from_hex(&subject.digest.sha256).ok();
    Some(Claim {
        digests: statement.subject.iter().filter_map(digest).collect(),
        // cosign 3 names none.
        repository: None,
    })
}

/// Is this the repository of the reference? A tag or digest behind the name does not matter.
///
/// A layout folder has no name that a signature could carry, so there every name is as good.
pub(super) fn names(name: &str, reference: &Reference) -> bool {
    let Reference::Registry {
        registry, repository, ..
    } = reference
    else {
        return true;
    };
    match name.parse() {
        Ok(Reference::Registry {
            registry: named_registry,
            repository: named_repository,
            ..
        }) => *registry == named_registry && *repository == named_repository,
        _ => false,
    }
}

/// Reads bytes as both kinds of payload; for fuzzers.
#[cfg(any(test, fuzzing))]
pub(in crate::image) fn fuzz_payload(bytes: &[u8]) {
    if let Some(signed) = Signed::simple(bytes.to_vec(), "") {
        assert_eq!(signed.message, bytes);
        signed.claim();
    }
    if let Some(signed) = Signed::bundle(bytes) {
        signed.claim();
    }
}
