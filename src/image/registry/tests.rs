//! What is written to registries: against a faulty one of our own, and against Debian's docker-registry.

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;

use super::*;
use crate::image::destination::Destination;
use crate::secret::Secret;

#[path = "../../../tests/support/https_fixture.rs"]
#[allow(dead_code, reason = "each suite uses its part of the fixture")]
mod https_fixture;
#[path = "../../../tests/support/registry_fixture.rs"]
#[allow(dead_code, reason = "each suite uses its part of the fixture")]
mod registry_fixture;

use https_fixture::{Answer, Seen, Server, Speech};
use registry_fixture::{PASSWORD, Registry, USER};

/// Data that is different everywhere.
fn noise(length: usize) -> Bytes {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = std::iter::from_fn(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        Some(state.to_le_bytes())
    });
    next.flatten().take(length).collect()
}

fn credentials(host: &str) -> Credentials {
    Credentials::basic(host, USER, Secret::new(PASSWORD))
}

async fn session(host: &str, repository: &str, credentials: &Credentials) -> Session {
    Session::open(Target {
        image: &format!("{host}/{repository}:1"),
        registry: host,
        repository,
        name: "1".to_owned(),
        credentials,
        registries: &Registries::without_tls([host]),
        purpose: Purpose::Write,
    })
    .await
    .unwrap()
}

fn descriptor(bytes: &[u8]) -> Descriptor {
    Descriptor {
        media_type: String::new(),
        digest: Digest::of(bytes),
        size: bytes.len() as u64,
        annotations: std::collections::BTreeMap::new(),
    }
}

async fn read(session: &Session, descriptor: &Descriptor, range: Range<u64>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut part = session.range(descriptor, range);
    while let Some(piece) = part.next().await.unwrap() {
        bytes.extend_from_slice(&piece);
    }
    bytes
}

/// What is wrong with one request of an upload.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trouble {
    /// Nothing.
    None,
    /// Half of it arrives, and the answer is an error.
    HalfThenError,
    /// All of it arrives, and the answer is an error.
    AllThenError,
    /// Half of it arrives, and the answer says so.
    Half,
    /// Nothing arrives.
    Error,
}

#[derive(Default)]
struct Uploads {
    bytes: Vec<u8>,
    /// Only the newest location works.
    place: u32,
    troubles: Vec<Trouble>,
    done: Option<String>,
    /// Uploads that have begun.
    begun: u32,
}

impl Uploads {
    fn location(&mut self, status: u16) -> Answer {
        self.place += 1;
        let mut answer = Answer::status(status).with("location", format!("/upload/{}?s=x", self.place));
        if !self.bytes.is_empty() || status == 204 {
            let last = self.bytes.len().saturating_sub(1);
            answer = answer.with("range", format!("0-{last}"));
        }
        answer
    }

    fn answer(&mut self, seen: &Seen) -> Answer {
        if seen.method == "POST" {
            self.bytes.clear();
            self.begun += 1;
            return self.location(202);
        }
        if seen.path.contains("/blobs/") {
            return Answer::status(if self.done.is_some() { 200 } else { 404 });
        }
        if !seen.path.starts_with(&format!("/upload/{}?s=x", self.place)) {
            return Answer::status(404);
        }
        match seen.method.as_str() {
            "GET" => self.location(204),
            "PATCH" => {
                let range = seen.header("content-range").unwrap();
                let first: usize = range.split('-').next().unwrap().parse().unwrap();
                // As docker-registry does it: wherever it begins, it is taken.
                let wrong = first != self.bytes.len();
                let trouble = self.troubles.pop().unwrap_or(Trouble::None);
                let taken = match trouble {
                    Trouble::Error => 0,
                    Trouble::Half | Trouble::HalfThenError => seen.body.len() / 2,
                    Trouble::None | Trouble::AllThenError => seen.body.len(),
                };
                self.bytes.extend_from_slice(&seen.body[..taken]);
                if wrong {
                    self.bytes.clear();
                }
                match trouble {
                    Trouble::None | Trouble::Half => self.location(202),
                    _ => Answer::status(503),
                }
            }
            "PUT" => {
                let digest = Digest::of(&self.bytes).to_string();
                let asked = seen.path.split("digest=").nth(1).unwrap().replace("%3A", ":");
                if digest != asked {
                    return Answer::status(400);
                }
                // The answer to the first one is lost.
                let first = self.done.replace(digest).is_none();
                Answer::status(if first { 502 } else { 404 })
            }
            _ => Answer::status(405),
        }
    }
}

fn uploads(troubles: &[Trouble]) -> (Server, Arc<Mutex<Uploads>>) {
    let state = Arc::new(Mutex::new(Uploads {
        troubles: troubles.iter().rev().copied().collect(),
        ..Uploads::default()
    }));
    let shared = Arc::clone(&state);
    let server = Server::start(Speech::Plain, move |seen| shared.lock().unwrap().answer(seen));
    (server, state)
}

#[tokio::test]
async fn a_streamed_upload_goes_on_where_the_registry_is() {
    use Trouble::{AllThenError, Error, Half, HalfThenError};
    let data = noise(40 << 20);
    for (troubles, begun) in [
        (vec![], 1),
        (vec![HalfThenError], 1),
        (vec![Trouble::None, AllThenError, Half, Error, HalfThenError], 1),
        // What is left of the very first chunk cannot be told from nothing: it begins again.
        (vec![Error, AllThenError], 2),
    ] {
        let (server, state) = uploads(&troubles);
        let session = session(&server.host(), "vm", &Credentials::none()).await;
        let mut upload = session.upload_stream();
        let mut rest = data.clone();
        while !rest.is_empty() {
            let piece = rest.split_to(rest.len().min(3_333_333));
            upload.write(piece).await.unwrap();
        }
        upload.finish(&Digest::of(&data)).await.unwrap();
        let state = state.lock().unwrap();
        assert!(state.bytes == data && state.troubles.is_empty());
        assert_eq!(state.begun, begun);
    }
}

#[tokio::test]
async fn an_upload_that_never_moves_ends_with_a_reason() {
    let (server, _) = uploads(&[Trouble::Error; 20]);
    let session = session(&server.host(), "vm", &Credentials::none()).await;
    let mut upload = session.upload_stream();
    let error = upload.write(noise(16 << 20)).await.unwrap_err();
    assert!(error.to_string().contains("answered 503"), "{error}");
}

#[tokio::test]
async fn everybody_waits_when_a_registry_asks_for_a_pause() {
    let data = noise(1 << 20);
    let served = data.clone();
    let asked = Mutex::new(0);
    let server = Server::start(Speech::Plain, move |seen| {
        let mut asked = asked.lock().unwrap();
        *asked += 1;
        if *asked == 4 {
            return Answer::status(429).with("retry-after", "2");
        }
        let range = seen.header("range").unwrap().trim_start_matches("bytes=");
        let (first, last) = range.split_once('-').unwrap();
        let first: usize = first.parse().unwrap();
        let last: usize = last.parse().unwrap_or(served.len() - 1);
        let mut answer = Answer::ok(served[first..=last].to_vec());
        answer.0 = 206;
        answer.with("content-range", format!("bytes {first}-{last}/{}", served.len()))
    });
    let session = session(&server.host(), "vm", &Credentials::none()).await;
    let layer = descriptor(&data);
    let width = session.width();
    let read_part = async |number: usize| {
        let begin = number * 1000;
        let range = begin as u64..begin as u64 + 1000;
        assert!(read(&session, &layer, range).await == data[begin..begin + 1000]);
    };
    for number in 0..3 {
        read_part(number).await;
    }
    let start = std::time::Instant::now();
    let ends = join_all((0..3).map(async |late: u32| {
        // The refused one, and two that come while the pause lasts.
        tokio::time::sleep(Duration::from_millis(300) * late).await;
        read_part(3 + late as usize).await;
        start.elapsed()
    }))
    .await;
    assert!(ends.iter().all(|end| *end >= Duration::from_secs(2)), "{ends:?}");
    assert_eq!(session.width(), width / 2);
}

#[tokio::test]
async fn what_a_refusal_names_is_the_missing_right() {
    for (status, challenge) in [(401, "Basic"), (403, "")] {
        let server = Server::start(Speech::Plain, move |_| {
            Answer::status(status).with("www-authenticate", challenge)
        });
        let session = session(&server.host(), "team/vm", &Credentials::none()).await;
        let error = session
            .upload(&Digest::of(b"x"), Bytes::from_static(b"x"))
            .await
            .unwrap_err();
        assert!(
            matches!(error, Error::ScopeMissing { .. })
                && error.to_string().contains("repository:team/vm:pull,push"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_mount_asks_for_both_rights_and_may_fail() {
    let tokens = Server::start(Speech::Plain, |seen| {
        if seen.path.contains("secret") {
            return Answer::status(403);
        }
        Answer::ok(r#"{"token": "t"}"#)
    });
    let realm = format!("http://{}/token", tokens.host());
    let server = Server::start(Speech::Plain, move |seen| match seen.authorization() {
        None => Answer::status(401).with("www-authenticate", format!(r#"Bearer realm="{realm}""#)),
        Some(_) if seen.method == "POST" && seen.path.contains("mount=") => Answer::status(201),
        Some(_) if seen.method == "HEAD" => Answer::ok("12345"),
        Some(_) => Answer::status(400),
    });
    let session = session(&server.host(), "vm", &credentials(&server.host())).await;
    let digest = Digest::of(b"x");
    assert_eq!(session.has_blob(&digest).await.unwrap(), Some(5));
    assert!(session.mount(&digest, "base").await.unwrap());
    assert!(!session.mount(&digest, "secret").await.unwrap());
    // The denied one is not asked for again.
    assert_eq!(session.has_blob(&digest).await.unwrap(), Some(5));
    let scopes: Vec<String> = tokens.seen().into_iter().map(|seen| seen.path).collect();
    assert_eq!(scopes[0], "/token?scope=repository%3Avm%3Apull%2Cpush");
    assert_eq!(
        scopes[1],
        "/token?scope=repository%3Avm%3Apull%2Cpush&scope=repository%3Abase%3Apull"
    );
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// An artifact with one layer; the manifest's bytes.
async fn write_image(destination: &Destination, layer: &Bytes, tag: &str) -> Bytes {
    let config = Bytes::from_static(b"{}");
    for blob in [&config, layer] {
        if destination.has_blob(&Digest::of(blob)).await.unwrap().is_none() {
            destination.upload(&Digest::of(blob), blob.clone()).await.unwrap();
        }
        let size = destination.has_blob(&Digest::of(blob)).await.unwrap();
        assert_eq!(size, Some(blob.len() as u64));
    }
    let entry = |blob: &Bytes, media_type: &str| {
        serde_json::json!({
            "mediaType": media_type, "digest": Digest::of(blob).to_string(), "size": blob.len(),
        })
    };
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": entry(&config, "application/vnd.oci.empty.v1+json"),
        "layers": [entry(layer, "application/octet-stream")],
    });
    let bytes = Bytes::from(serde_json::to_vec(&manifest).unwrap());
    let digest = destination
        .put_manifest(tag, MANIFEST, bytes.clone())
        .await
        .unwrap();
    assert_eq!(digest, Digest::of(&bytes));
    bytes
}

async fn destination(reference: &str, credentials: &Credentials) -> Destination {
    let host = reference.split('/').next().unwrap();
    Destination::open(
        &reference.parse().unwrap(),
        credentials,
        &Registries::without_tls([host]),
    )
    .await
    .unwrap()
}

#[tokio::test]
#[ignore = "needs docker-registry"]
async fn a_real_registry_takes_what_is_written() {
    let registry = Registry::with_password();
    let host = registry.host.clone();
    let right = credentials(&host);
    let to = destination(&format!("{host}/team/vm:1"), &right).await;
    let small = noise(100_000);
    let manifest = write_image(&to, &small, "1").await;
    // A stream of several chunks, in pieces that fit nothing.
    let large = noise((40 << 20) + 7);
    let mut stream = to.stream().await.unwrap();
    let mut rest = large.clone();
    while !rest.is_empty() {
        let piece = rest.split_to(rest.len().min(7_777_777));
        stream.write(piece).await.unwrap();
    }
    stream.finish(&Digest::of(&large)).await.unwrap();
    let mut empty = to.stream().await.unwrap();
    empty.write(Bytes::new()).await.unwrap();
    empty.finish(&Digest::of(b"")).await.unwrap();
    // Eight parts of it at once.
    let session = session(&host, "team/vm", &right).await;
    let layer = descriptor(&large);
    let part = layer.size.div_ceil(8);
    let parts = (0..8).map(|number| {
        let begin = number * part;
        read(&session, &layer, begin..(begin + part).min(layer.size))
    });
    assert!(join_all(parts).await.concat() == large);
    assert!(read(&session, &layer, 0..layer.size).await == large);
    assert_eq!(
        session.root().await.unwrap(),
        (Digest::of(&manifest), manifest.to_vec())
    );
    // Another repository has it without a transfer.
    let other = destination(&format!("{host}/other:1"), &right).await;
    assert!(other.mount(&layer.digest, "team/vm").await.unwrap());
    assert_eq!(other.has_blob(&layer.digest).await.unwrap(), Some(layer.size));
    assert!(!other.mount(&Digest::of(b"nothing"), "team/vm").await.unwrap());
    // What is not true is not taken.
    let wrong = to.upload(&Digest::of(b"other"), small.clone()).await.unwrap_err();
    assert!(
        matches!(wrong, Error::Refused { .. }) && wrong.to_string().contains("DIGEST_INVALID"),
        "{wrong}"
    );
    let mut stream = to.stream().await.unwrap();
    stream.write(small.clone()).await.unwrap();
    let wrong = stream.finish(&Digest::of(b"other")).await.unwrap_err();
    assert!(wrong.to_string().contains("DIGEST_INVALID"), "{wrong}");
    let text = String::from_utf8(manifest.to_vec()).unwrap();
    let lying = text.replace(&Digest::of(&small).hex(), &Digest::of(b"nothing").hex());
    let wrong = to
        .put_manifest("2", MANIFEST, Bytes::from(lying))
        .await
        .unwrap_err();
    assert!(wrong.to_string().contains("MANIFEST_BLOB_UNKNOWN"), "{wrong}");
    let mut given_up = to.stream().await.unwrap();
    given_up.write(noise(17 << 20)).await.unwrap();
    given_up.cancel().await;
    // And who may not write learns which right is missing.
    let nobody = destination(&format!("{host}/team/vm:1"), &Credentials::none()).await;
    let denied = nobody.has_blob(&layer.digest).await.unwrap_err();
    assert!(
        denied
            .to_string()
            .contains("without credentials: the right repository:team/vm:pull,push is missing"),
        "{denied}"
    );
}

#[tokio::test]
#[ignore = "needs docker-registry"]
async fn referrers_are_found_by_the_tag_that_stands_in_for_them() {
    let registry = Registry::open();
    let host = registry.host.clone();
    let to = destination(&format!("{host}/vm:1"), &Credentials::none()).await;
    let image = write_image(&to, &noise(1000), "1").await;
    let session = session(&host, "vm", &Credentials::none()).await;
    let digest = Digest::of(&image);
    assert_eq!(session.referrers(&digest).await.unwrap(), []);
    let signature = write_image(&to, &noise(500), "signature").await;
    let index = serde_json::json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [{
        "mediaType": MANIFEST, "digest": Digest::of(&signature).to_string(), "size": signature.len(),
        "artifactType": "application/x-signature",
    }]});
    let index = Bytes::from(serde_json::to_vec(&index).unwrap());
    to.put_manifest(&format!("sha256-{}", digest.hex()), INDEX, index)
        .await
        .unwrap();
    let found = session.referrers(&digest).await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].descriptor.digest, Digest::of(&signature));
    assert_eq!(found[0].artifact_type.as_deref(), Some("application/x-signature"));
}

#[tokio::test]
#[ignore = "needs docker-registry and skopeo"]
async fn a_layout_that_we_write_is_read_by_skopeo() {
    let skopeo = |arguments: &[&str]| {
        let output = Command::new("skopeo").args(arguments).output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        output.stdout
    };
    let registry = Registry::open();
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("layout");
    let reference = |tag: &str| format!("oci:{}:{tag}", folder.display());
    let to = destination(&reference("1"), &Credentials::none()).await;
    let layer = noise(3 << 20);
    let mut stream = to.stream().await.unwrap();
    stream.write(layer.slice(..1000)).await.unwrap();
    stream.write(layer.slice(1000..)).await.unwrap();
    stream.finish(&Digest::of(&layer)).await.unwrap();
    let first = write_image(&to, &layer, "1").await;
    let second = write_image(&to, &noise(1000), "2").await;
    for (tag, manifest) in [("1", first), ("2", second)] {
        assert_eq!(skopeo(&["inspect", "--raw", &reference(tag)]), manifest);
        let there = format!("docker://{}/vm:{tag}", registry.host);
        skopeo(&["copy", "-q", "--dest-tls-verify=false", &reference(tag), &there]);
        let session = session(&registry.host, "vm", &Credentials::none()).await;
        let digest = Digest::of(&manifest);
        assert_eq!(session.manifest(&digest).await.unwrap(), manifest);
    }
    assert!(Path::new(&folder).join("oci-layout").is_file());
}
