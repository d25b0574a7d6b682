//! What was asked, by whom, and what they may have.
//!
//! A job's identity comes from the job response file, which GitLab wrote and gitlab-runner handed over.
//! `CUSTOM_ENV_*` was written by the job's author and only says what the author wants.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::record::Claim;
use crate::secret::Secret;

mod masked;
mod response;
mod variables;
mod wants;

pub use masked::Masked;
pub use response::{RegistryCredential, Response};
pub use variables::Variables;
pub use wants::{Bounds, Granted, Wants};

/// Why a job cannot be understood.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not called by gitlab-runner, or by one that is too old.
    #[error(
        "the environment variable {0} is missing: this command is for gitlab-runner's custom executor to call."
    )]
    NotARunner(&'static str),
    /// The response file cannot be read.
    #[error("cannot read the job response file {path}: {source}.")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The response file is not what gitlab-runner writes.
    #[error("the job response file {path} is not what gitlab-runner writes: {message}.")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A variable of the job's author cannot be used.
    #[error("{variable}={value}: {message}.")]
    Variable {
        /// The variable, without `CUSTOM_ENV_`.
        variable: &'static str,
        /// Its value, shortened.
        value: String,
        /// What is wrong with it.
        message: String,
    },
}

/// The environment of one call, as a value.
#[derive(Clone, Default)]
pub struct Environment(Vec<(OsString, OsString)>);

impl std::fmt::Debug for Environment {
    /// Names only: the values hold the job's secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.0.iter().map(|(name, _)| name))
            .finish()
    }
}

impl FromIterator<(OsString, OsString)> for Environment {
    fn from_iter<I: IntoIterator<Item = (OsString, OsString)>>(iter: I) -> Self {
        Environment(iter.into_iter().collect())
    }
}

impl Environment {
    /// A variable's value, whatever bytes it has.
    pub fn get(&self, name: &str) -> Option<&OsStr> {
        // Of two of the same name the last one counts, as in the runner's own list.
        self.0
            .iter()
            .rev()
            .find(|(n, _)| n == name)
            .map(|(_, v)| v.as_os_str())
    }

    /// A variable's value if it is there, not empty, and UTF-8.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.get(name).and_then(OsStr::to_str).filter(|v| !v.is_empty())
    }

    /// A job variable, as the runner passes it on.
    pub fn variable(&self, name: &str) -> Option<&str> {
        self.text(&format!("CUSTOM_ENV_{name}"))
    }

    /// A path that the runner must have given.
    pub fn path(&self, name: &'static str) -> Result<PathBuf, Error> {
        self.get(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
            .ok_or(Error::NotARunner(name))
    }
}

/// Who a job is: two coordinators may use the same numbers.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The GitLab instance's URL, without credentials.
    pub coordinator: String,
    /// The job's number there.
    pub id: u64,
}

/// One job, as it was asked for.
#[derive(Debug, Clone)]
pub struct Job {
    /// Who it is.
    pub identity: Identity,
    /// This run of it: the response file's path, new for every try that the runner makes.
    pub session: PathBuf,
    /// What proves a call without a response file to be this job's; none where the job has no token.
    pub token: Option<String>,
    /// The project's full path.
    pub project: String,
    /// The job's name in `.gitlab-ci.yml`.
    pub name: String,
    /// Is its ref protected, by GitLab's own word? None where that does not say.
    pub protected: Option<bool>,
    /// `image:`, with its variables filled in; none where the job names none.
    pub image: Option<String>,
    /// `image:pull_policy`.
    pub pull_policy: Vec<String>,
    /// `image:docker:user`.
    pub user: Option<String>,
    /// `image:docker:platform`.
    pub platform: Option<String>,
    /// The names of `services:`.
    pub services: Vec<String>,
    /// Registry credentials that GitLab itself sent with the job.
    pub credentials: Vec<RegistryCredential>,
    /// `DOCKER_AUTH_CONFIG`, as the job's author or project set it.
    pub auth_config: Option<Secret>,
    /// What GitLab hides from the job's log.
    pub masked: Masked,
    /// How long the job may take.
    pub timeout: Duration,
    /// Does the job move caches or artifacts, for which the guest needs the `gitlab-runner` binary?
    pub needs_helper: bool,
    /// The version of the gitlab-runner that writes the job's scripts, as far as it tells.
    pub runner_version: Option<String>,
}

/// By what a call after prepare finds its job: the response file, wherever the runner hands one over.
///
/// Without one, the variables say which job it is. Their author may have made them up, but does not know another job's token.
pub fn claim(environment: &Environment) -> Result<Claim, Error> {
    let missing = match environment.path("JOB_RESPONSE_FILE") {
        Ok(session) => return Ok(Claim::Session(session)),
        Err(missing) => missing,
    };
    let id = environment.variable("CI_JOB_ID").and_then(|id| id.parse().ok());
    let token = environment.variable("CI_JOB_TOKEN").unwrap_or_default();
    match (id, token_hash(environment, token)) {
        (Some(id), Some(hash)) => Ok(Claim::Token { id, hash }),
        _ => Err(missing),
    }
}

/// A hash over the runner's short token and the job's own.
fn token_hash(environment: &Environment, token: &str) -> Option<String> {
    let runner = environment.variable("CI_RUNNER_SHORT_TOKEN").unwrap_or_default();
    (!token.is_empty()).then(|| hex::encode(Sha256::digest(format!("{runner}\n{token}"))))
}

/// GitLab's own limit where a job sets none.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(7200);
/// Far more than GitLab sends; a file of this size is no job.
const RESPONSE_LIMIT: u64 = 64 << 20;

impl Job {
    /// Reads the job from the environment of a call and the response file that it names.
    pub fn read(environment: &Environment) -> Result<Job, Error> {
        let session = environment.path("JOB_RESPONSE_FILE")?;
        let unreadable = |source| Error::Unreadable {
            path: session.clone(),
            source,
        };
        let size = std::fs::metadata(&session).map_err(unreadable)?.len();
        if size > RESPONSE_LIMIT {
            return Err(Error::Malformed {
                path: session,
                message: format!("it has {size} bytes"),
            });
        }
        let text = std::fs::read(&session).map_err(unreadable)?;
        let response = Response::parse(&text).map_err(|message| Error::Malformed {
            path: session.clone(),
            message,
        })?;
        Ok(Job::new(response, environment, &session))
    }

    /// The job that a response asks for, with the variables that the runner filled in.
    pub fn new(response: Response, environment: &Environment, session: &Path) -> Job {
        let identity = response.identity();
        let protected = response.is_protected();
        let named = Some(response.image.name.clone()).filter(|n| !n.is_empty());
        // The response has the name as it was written; the runner's variable has it expanded.
        let image = named.map(|name| environment.variable("CI_JOB_IMAGE").map_or(name, str::to_owned));
        let docker = response.image.executor_opts.docker;
        let passwords = response.credentials.iter().map(|c| &c.password);
        let hidden = response.variables.iter().filter(|v| v.masked).map(|v| &v.value);
        let masked = passwords
            .chain(hidden)
            .chain([&response.token])
            .cloned()
            .collect();
        Job {
            identity,
            session: session.to_owned(),
            token: token_hash(environment, response.token.reveal()),
            project: response.job_info.project_full_path,
            name: response.job_info.name,
            protected,
            image,
            pull_policy: response.image.pull_policy,
            user: Some(docker.user).filter(|u| !u.is_empty()),
            platform: Some(docker.platform).filter(|p| !p.is_empty()),
            services: response
                .services
                .into_iter()
                .map(|s| s.name)
                .filter(|n| !n.is_empty())
                .collect(),
            credentials: response
                .credentials
                .into_iter()
                .filter(|c| c.kind == "registry")
                .collect(),
            masked,
            auth_config: environment.variable("DOCKER_AUTH_CONFIG").map(Secret::new),
            timeout: match response.runner_info.timeout {
                0 => DEFAULT_TIMEOUT,
                seconds => Duration::from_secs(seconds),
            },
            needs_helper: response.artifacts.is_some_and(|a| !a.is_empty())
                || response.cache.is_some_and(|c| !c.is_empty())
                || response.dependencies.is_some_and(|d| !d.is_empty()),
            runner_version: environment.variable("CI_RUNNER_VERSION").map(str::to_owned),
        }
    }
}

#[cfg(test)]
mod tests;
