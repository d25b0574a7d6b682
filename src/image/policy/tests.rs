use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::rsa::Rsa;
use openssl::sign::Signer;

use super::payload::Signed;
use super::signatures::{Judgement, Reasons, judge};
use super::*;

fn ec() -> PKey<Private> {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
    PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap()
}

fn public(key: &PKey<Private>) -> Key {
    Key::parse(&key.public_key_to_pem().unwrap(), "cosign.pub".as_ref()).unwrap()
}

fn sign(key: &PKey<Private>, message: &[u8]) -> Vec<u8> {
    let mut signer = if key.id() == openssl::pkey::Id::ED25519 {
        Signer::new_without_digest(key).unwrap()
    } else {
        Signer::new(MessageDigest::sha256(), key).unwrap()
    };
    signer.sign_oneshot_to_vec(message).unwrap()
}

fn simple(digest: &Digest, repository: &str, kind: &str) -> Vec<u8> {
    let image = serde_json::json!({"docker-manifest-digest": digest.to_string()});
    let identity = serde_json::json!({"docker-reference": repository});
    serde_json::to_vec(&serde_json::json!({
        "critical": {"identity": identity, "image": image, "type": kind}, "optional": null
    }))
    .unwrap()
}

const COSIGN: &str = "cosign container image signature";

fn signed(key: &PKey<Private>, payload: Vec<u8>) -> Signed {
    let signature = STANDARD.encode(sign(key, &payload));
    Signed::simple(payload, &signature).unwrap()
}

fn judged(signed: &Signed, digest: &Digest, keys: &[Key]) -> Result<Option<String>, String> {
    let reference = "r.example/vm/app:1".parse().unwrap();
    match judge(signed, digest, &reference, keys) {
        Judgement::Counts { repository, .. } => Ok(repository),
        other => {
            let mut reasons = Reasons::default();
            reasons.see(Some(other));
            Err(reasons.written())
        }
    }
}

#[test]
fn every_kind_of_key_that_cosign_takes_counts() {
    let digest = Digest::of(b"manifest");
    let payload = simple(&digest, "r.example/vm/app", COSIGN);
    let stranger = ec();
    for key in [
        ec(),
        PKey::from_rsa(Rsa::generate(2048).unwrap()).unwrap(),
        PKey::generate_ed25519().unwrap(),
    ] {
        let signed = signed(&key, payload.clone());
        let ours = [public(&stranger), public(&key)];
        assert_eq!(
            judged(&signed, &digest, &ours),
            Ok(Some("r.example/vm/app".to_owned()))
        );
        let reason = judged(&signed, &digest, &[public(&stranger)]).unwrap_err();
        assert_eq!(reason, "its signature is not by a key of that rule");
    }
    assert!(Key::parse(b"", "cosign.pub".as_ref()).is_err());
    let weak = PKey::from_rsa(Rsa::generate(1024).unwrap()).unwrap();
    let reason = Key::parse(&weak.public_key_to_pem().unwrap(), "cosign.pub".as_ref()).unwrap_err();
    assert!(reason.contains("2048"), "{reason}");
}

#[test]
fn a_signature_counts_for_one_image_under_one_name() {
    let (key, digest, other) = (ec(), Digest::of(b"manifest"), Digest::of(b"other"));
    let ours = [public(&key)];
    for (payload, reason) in [
        (simple(&other, "r.example/vm/app", COSIGN), "another image"),
        (
            simple(&digest, "r.example/vm/nightly", COSIGN),
            "signed as `r.example/vm/nightly`",
        ),
        (simple(&digest, "evil.example/vm/app", COSIGN), "signed as"),
        (simple(&digest, "../../x", COSIGN), "signed as"),
        (
            simple(&digest, "r.example/vm/app", "atomic container signature"),
            "no signature of an image",
        ),
        (b"{}".to_vec(), "no signature of an image"),
        (b"not even JSON".to_vec(), "no signature of an image"),
    ] {
        let found = judged(&signed(&key, payload), &digest, &ours).unwrap_err();
        assert!(found.contains(reason), "{found}");
    }
    // A tag in the name does not matter, and a name that is missing leaves the digest.
    for name in ["r.example/vm/app:7", ""] {
        let signed = signed(&key, simple(&digest, name, COSIGN));
        assert!(judged(&signed, &digest, &ours).is_ok(), "{name}");
    }
    // One changed byte.
    let mut payload = simple(&digest, "r.example/vm/app", COSIGN);
    let signature = STANDARD.encode(sign(&key, &payload));
    payload.push(b' ');
    let reason = judged(&Signed::simple(payload, &signature).unwrap(), &digest, &ours).unwrap_err();
    assert!(reason.contains("not by a key"), "{reason}");
}

fn bundle(key: &PKey<Private>, digest: &Digest, predicate: &str) -> Signed {
    const KIND: &str = "application/vnd.in-toto+json";
    let statement = serde_json::to_vec(&serde_json::json!({
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"digest": {"sha256": digest.hex()}}],
        "predicateType": predicate
    }))
    .unwrap();
    let mut message = format!("DSSEv1 {} {KIND} {} ", KIND.len(), statement.len()).into_bytes();
    message.extend(&statement);
    let bundle = serde_json::json!({
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "dsseEnvelope": {
            "payload": STANDARD.encode(&statement),
            "payloadType": KIND,
            "signatures": [{"sig": STANDARD.encode(sign(key, &message))}]
        }
    });
    Signed::bundle(&serde_json::to_vec(&bundle).unwrap()).unwrap()
}

#[test]
fn a_bundle_counts_when_it_states_a_signature() {
    const SIGN: &str = "https://sigstore.dev/cosign/sign/v1";
    let (key, digest) = (ec(), Digest::of(b"manifest"));
    let ours = [public(&key)];
    assert_eq!(judged(&bundle(&key, &digest, SIGN), &digest, &ours), Ok(None));
    // A statement about an image, such as what a scanner found in it, is no leave to use it.
    let finding = bundle(&key, &digest, "https://cosign.sigstore.dev/attestation/vuln/v1");
    assert!(
        judged(&finding, &digest, &ours)
            .unwrap_err()
            .contains("no signature of an image")
    );
    let other = bundle(&key, &Digest::of(b"other"), SIGN);
    assert!(
        judged(&other, &digest, &ours)
            .unwrap_err()
            .contains("another image")
    );
    assert!(judged(&bundle(&ec(), &digest, SIGN), &digest, &ours).is_err());
}

#[test]
fn a_verdict_counts_for_its_key_and_its_repository() {
    let (key, digest) = (ec(), Digest::of(b"manifest"));
    let dir = tempfile::tempdir().unwrap();
    let pem = dir.path().join("key.pub");
    std::fs::write(&pem, key.public_key_to_pem().unwrap()).unwrap();
    let policy = Requirements {
        require_digest: false,
        signed_by: vec![pem.clone()],
    };
    let verdict = |fingerprint, repository: Option<&str>| {
        Verdict::new(digest, digest, fingerprint, repository.map(str::to_owned))
    };
    let reference: Reference = "r.example/vm/app:1".parse().unwrap();
    let rules = Rules::new(&policy, &reference, "vm").unwrap();
    let ours = public(&key).fingerprint;
    assert!(rules.believes(&verdict(ours, Some("r.example/vm/app"))));
    assert!(rules.believes(&verdict(ours, None)));
    assert!(!rules.believes(&verdict(ours, Some("r.example/vm/nightly"))));
    assert!(!rules.believes(&verdict(public(&ec()).fingerprint, None)));

    let pinned = Requirements {
        require_digest: true,
        ..Requirements::default()
    };
    let refused = Rules::new(&pinned, &reference, "vm").unwrap_err().to_string();
    assert_eq!(
        refused,
        "vm is refused by the rule require_digest: it is named without a digest"
    );
    let by_digest = format!("r.example/vm/app@{digest}").parse().unwrap();
    assert!(Rules::new(&pinned, &by_digest, "vm").is_ok());
    std::fs::remove_file(&pem).unwrap();
    assert!(matches!(
        Rules::new(&policy, &reference, "vm"),
        Err(Error::KeyFile { .. })
    ));
}
