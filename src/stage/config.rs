//! config: what gitlab-runner is told about the machine that a job will get.

use std::collections::BTreeMap;

use serde::Serialize;

use super::order::Order;
use crate::job::{Environment, Job};
use crate::machine::libvirt::{self, Libvirt, Versions};
use crate::machine::versions;
use crate::outcome::Failure;
use crate::settings::Settings;

/// The JSON object that config_exec prints; the names are gitlab-runner's (`executors/custom/api`).
#[derive(Debug, Serialize)]
struct Answer {
    driver: Driver,
    hostname: String,
    builds_dir: String,
    cache_dir: String,
    builds_dir_is_shared: bool,
    shell: &'static str,
    job_env: BTreeMap<&'static str, String>,
}

#[derive(Debug, Serialize)]
struct Driver {
    name: &'static str,
    version: String,
}

/// Answers gitlab-runner, as JSON text.
///
/// A job that gets no machine still gets an answer: prepare is where its author is told why, since only
/// prepare's words are sure to be seen beside the reason.
pub async fn config(settings: &Settings, environment: &Environment) -> Result<String, Failure> {
    let job = Job::read(environment)?;
    let shell = Order::new(&job, settings).map_or_else(|_| settings.guest("").shell, |o| o.guest.shell);
    let mut job_env = BTreeMap::new();
    if settings.file.is_absolute() {
        // The other stages then use the very same settings, whatever their own arguments say.
        job_env.insert("CANNERY_CONFIG", settings.file.display().to_string());
    }
    let answer = Answer {
        driver: Driver {
            name: "cannery",
            version: version(settings).await,
        },
        hostname: super::hostname(&job.identity),
        builds_dir: settings.builds_dir.clone(),
        cache_dir: settings.cache_dir.clone(),
        builds_dir_is_shared: false,
        shell: shell.as_str(),
        job_env,
    };
    serde_json::to_string(&answer).map_err(|e| Failure::system(format!("cannot write the answer: {e}")))
}

/// Our version, and the hypervisor's where it answers or has answered before.
async fn version(settings: &Settings) -> String {
    let ours = env!("CARGO_PKG_VERSION");
    match hypervisor(settings).await {
        Ok(v) => format!(
            "{ours} (libvirt {}, {} {})",
            v.libvirt, v.hypervisor, v.hypervisor_version
        ),
        Err(e) => {
            // prepare fails with the sentence that helps; here it would only be repeated.
            tracing::warn!("libvirt does not tell its version: {e}");
            format!("{ours} (libvirt unreachable)")
        }
    }
}

/// libvirt is asked only where nothing is remembered: to load it and to connect takes longer than all else here, and
/// prepare, which must ask, corrects what is remembered.
async fn hypervisor(settings: &Settings) -> Result<Versions, libvirt::Error> {
    let (state_dir, uri) = (&settings.state_dir, &settings.libvirt_uri);
    if let Some(versions) = versions::recall(state_dir, uri) {
        return Ok(versions);
    }
    let versions = Libvirt::open(uri)?.version().await?;
    if let Err(e) = versions::remember(state_dir, uri, &versions) {
        tracing::warn!("{e}");
    }
    Ok(versions)
}
