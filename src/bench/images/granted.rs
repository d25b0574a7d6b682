//! What the image costs a job whose image is here, and private: its registry let the job's own login have it a moment ago.

use std::path::Path;
use std::time::{Duration, Instant};

use super::registry::{PASSWORD, Registry, USER};
use super::{NATIVE, cannery, cannot};
use crate::image::{
    Asker, Credentials, Limits, PullPolicy, Reference, Registries, Request, Requirements, Silent, Store,
};
use crate::outcome::Failure;
use crate::secret::Secret;

/// Bytes of the disk: how large it is plays no part.
const SIZE: u64 = 8 << 20;
/// For how long the registry's word is good: longer than this takes.
const TTL: Duration = Duration::from_secs(3600);

/// Has a small image put into the store of `scratch` for a job, and asks for it so often as `prepare` does, before each of which the
/// store is opened.
pub(super) async fn measure(program: &Path, scratch: &Path, calls: usize) -> Result<Vec<Duration>, Failure> {
    let registry = Registry::start_private(&scratch.join("registry")).await?;
    let mut push = cannery(program, scratch, &registry)?;
    let (disk, logins) = (scratch.join("small.raw"), scratch.join("auth.json"));
    let pair = format!("{USER}:{PASSWORD}");
    let auth = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, pair);
    let auths = serde_json::json!({"auths": {registry.host.as_str(): {"auth": auth}}});
    let written = std::fs::File::create(&disk).and_then(|file| file.set_len(SIZE));
    written.map_err(|e| cannot("write", &disk, &e))?;
    std::fs::write(&logins, auths.to_string()).map_err(|e| cannot("write", &logins, &e))?;
    push.variables = vec![("REGISTRY_AUTH_FILE", logins.into())];
    let image = format!("{}/bench/private:1", registry.host);
    let words = ["image", "push", "--format", NATIVE];
    let words = words
        .into_iter()
        .map(Into::into)
        .chain([disk.into(), image.as_str().into()]);
    push.call(scratch, words.collect::<Vec<std::ffi::OsString>>())
        .await?;
    let reference: Reference = image
        .parse()
        .map_err(|e| Failure::system(format!("the bench's own name of an image is none: {e}")))?;
    let request = Request {
        reference,
        architecture: std::env::consts::ARCH.to_owned(),
        policies: vec![PullPolicy::IfNotPresent],
        credentials: Credentials::basic(&registry.host, USER, Secret::new(PASSWORD)),
        registries: Registries::without_tls([&registry.host]),
        limits: Limits {
            max_disk: SIZE,
            keep_free: 0,
        },
        asker: Asker::Job {
            project: "bench".to_owned(),
            auth_ttl: TTL,
            offline_ttl: TTL,
        },
        requirements: Requirements::default(),
    };
    let store = scratch.join("granted");
    Store::open(&store)?.provide(&request, &Silent).await?;
    // Nobody can be asked any more: what is remembered is what lets the job have it.
    drop(registry);
    let mut times = Vec::with_capacity(calls);
    for _ in 0..calls {
        let begin = Instant::now();
        Store::open(&store)?.provide(&request, &Silent).await?;
        times.push(begin.elapsed());
    }
    Ok(times)
}
