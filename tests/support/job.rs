//! A job as GitLab hands it to a runner, built in words of `.gitlab-ci.yml`.

use std::time::Duration;

use serde_json::{Value, json};

use super::coordinator::{Handle, Repository};

/// What a job may not exceed unless it says otherwise; long enough for a slow guest, short enough for a test.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(300);

/// A job that has not been sent yet.
#[derive(Debug, Clone)]
pub struct Job {
    name: String,
    image: Option<Value>,
    script: Vec<String>,
    after_script: Vec<String>,
    variables: Vec<Value>,
    services: Vec<Value>,
    credentials: Vec<Value>,
    artifacts: Vec<Value>,
    cache: Vec<Value>,
    dependencies: Vec<Value>,
    repository: Option<(String, String)>,
    project: String,
    project_id: u64,
    timeout: Duration,
    id: Option<u64>,
}

impl Job {
    /// A job of this name without an image, that clones nothing and does nothing.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            image: None,
            script: Vec::new(),
            after_script: Vec::new(),
            variables: Vec::new(),
            services: Vec::new(),
            credentials: Vec::new(),
            artifacts: Vec::new(),
            cache: Vec::new(),
            dependencies: Vec::new(),
            repository: None,
            project: "grp/demo".to_owned(),
            project_id: 7,
            timeout: DEFAULT_TIMEOUT,
            id: None,
        }
    }

    /// `image: NAME`
    pub fn image(mut self, name: &str) -> Self {
        self.image_object()["name"] = json!(name);
        self
    }

    /// `image: {pull_policy: […]}`
    pub fn pull_policy<const N: usize>(mut self, policies: [&str; N]) -> Self {
        self.image_object()["pull_policy"] = json!(policies.to_vec());
        self
    }

    /// `image: {docker: {user: NAME}}`
    pub fn image_user(mut self, user: &str) -> Self {
        self.image_object()["executor_opts"]["docker"]["user"] = json!(user);
        self
    }

    /// `image: {docker: {platform: OS/ARCH}}`
    pub fn image_platform(mut self, platform: &str) -> Self {
        self.image_object()["executor_opts"]["docker"]["platform"] = json!(platform);
        self
    }

    fn image_object(&mut self) -> &mut Value {
        self.image.get_or_insert_with(|| json!({}))
    }

    /// `script:`
    pub fn script<const N: usize>(mut self, lines: [&str; N]) -> Self {
        self.script = lines.map(str::to_owned).to_vec();
        self
    }

    /// `after_script:`
    pub fn after_script<const N: usize>(mut self, lines: [&str; N]) -> Self {
        self.after_script = lines.map(str::to_owned).to_vec();
        self
    }

    /// One of `variables:`, whose `$NAME`s the runner expands.
    pub fn variable(mut self, key: &str, value: &str) -> Self {
        self.variables
            .push(json!({"key": key, "value": value, "public": true}));
        self
    }

    /// A variable that is taken as it stands.
    pub fn raw_variable(mut self, key: &str, value: &str) -> Self {
        self.variables
            .push(json!({"key": key, "value": value, "public": true, "raw": true}));
        self
    }

    /// A variable that the runner hides from the log.
    pub fn masked_variable(mut self, key: &str, value: &str) -> Self {
        self.variables
            .push(json!({"key": key, "value": value, "masked": true, "raw": true}));
        self
    }

    /// A variable of type file.
    pub fn file_variable(mut self, key: &str, content: &str) -> Self {
        self.variables
            .push(json!({"key": key, "value": content, "file": true, "raw": true}));
        self
    }

    /// One of `services:`
    pub fn service(mut self, name: &str) -> Self {
        self.services.push(json!({"name": name, "alias": ""}));
        self
    }

    /// A registry that GitLab gives the job access to.
    pub fn registry_credential(mut self, registry: &str, user: &str, password: &str) -> Self {
        self.credentials
            .push(json!({"type": "registry", "url": registry, "username": user, "password": password}));
        self
    }

    /// `artifacts: {paths: […], when: always}`
    pub fn artifacts<const N: usize>(mut self, paths: [&str; N]) -> Self {
        self.artifacts.push(json!({
            "name": "artifacts", "untracked": false, "paths": paths.to_vec(), "exclude": [], "when": "always",
            "artifact_type": "archive", "artifact_format": "zip", "expire_in": "1 day",
        }));
        self
    }

    /// `cache: {key, paths}`
    pub fn cache<const N: usize>(mut self, key: &str, paths: [&str; N]) -> Self {
        self.cache.push(json!({
            "key": key, "untracked": false, "policy": "pull-push", "paths": paths.to_vec(),
            "when": "on_success", "fallback_keys": [],
        }));
        self
    }

    /// `needs:` the artifacts of a job that has finished.
    pub fn needs(mut self, other: &Handle) -> Self {
        let size = other.artifacts().map_or(0, |archive| archive.len());
        self.dependencies.push(json!({
            "id": other.id(), "token": other.token(), "name": other.name(),
            "artifacts_file": {"filename": "artifacts.zip", "size": size},
        }));
        self
    }

    /// The job clones this repository; otherwise `GIT_STRATEGY` is `none`.
    pub fn clones(mut self, repository: &Repository) -> Self {
        self.repository = Some((repository.url(), repository.commit().to_owned()));
        self.project = repository.path().to_owned();
        self
    }

    /// The project that the job belongs to, e.g. `grp/demo`, and its number.
    pub fn project(mut self, path: &str, id: u64) -> Self {
        self.project = path.to_owned();
        self.project_id = id;
        self
    }

    /// `timeout:`
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The job's number; otherwise the coordinator counts.
    pub fn id(mut self, id: u64) -> Self {
        self.id = Some(id);
        self
    }

    pub(super) fn wanted_id(&self) -> Option<u64> {
        self.id
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The answer to `POST jobs/request`.
    pub(super) fn payload(&self, id: u64, token: &str, server: &str) -> Value {
        let (repo_url, commit) = self
            .repository
            .clone()
            .unwrap_or_else(|| (format!("{server}/{}.git", self.project), "0".repeat(40)));
        let strategy = if self.repository.is_some() {
            "clone"
        } else {
            "none"
        };
        let timeout = self.timeout.as_secs();
        let mut variables: Vec<Value> = [
            ("CI", "true".to_owned()),
            ("GITLAB_CI", "true".to_owned()),
            ("CI_JOB_ID", id.to_string()),
            ("CI_JOB_NAME", self.name.clone()),
            ("CI_JOB_URL", format!("{server}/{}/-/jobs/{id}", self.project)),
            ("CI_PIPELINE_ID", "5".to_owned()),
            ("CI_PROJECT_ID", self.project_id.to_string()),
            ("CI_PROJECT_PATH", self.project.clone()),
            ("CI_PROJECT_PATH_SLUG", self.project.replace('/', "-")),
            ("CI_COMMIT_SHA", commit.clone()),
            ("CI_COMMIT_REF_PROTECTED", "false".to_owned()),
            ("CI_RUNNER_ID", "1".to_owned()),
            ("CI_SERVER_URL", server.to_owned()),
            ("GIT_STRATEGY", strategy.to_owned()),
        ]
        .into_iter()
        .map(|(key, value)| json!({"key": key, "value": value, "public": true}))
        .collect();
        variables.push(json!({"key": "CI_JOB_TOKEN", "value": token, "masked": true}));
        variables.extend(self.variables.iter().cloned());

        let mut steps = vec![json!({
            "name": "script", "script": self.script, "timeout": timeout, "when": "on_success", "allow_failure": false,
        })];
        if !self.after_script.is_empty() {
            steps.push(json!({
                "name": "after_script", "script": self.after_script, "timeout": timeout, "when": "always",
                "allow_failure": true,
            }));
        }
        json!({
            "id": id, "token": token, "allow_git_fetch": true,
            "job_info": {
                "name": self.name, "stage": "test", "project_id": self.project_id,
                "project_name": self.project.rsplit('/').next(), "project_full_path": self.project, "pipeline_id": 5,
            },
            "git_info": {
                "repo_url": repo_url, "ref": "main", "sha": commit, "before_sha": "0".repeat(40), "ref_type": "branch",
                "refspecs": ["+refs/heads/main:refs/remotes/origin/main"], "depth": 0, "repo_object_format": "sha1",
            },
            "runner_info": {"timeout": timeout},
            "variables": variables, "steps": steps, "image": self.image, "services": self.services,
            "artifacts": self.artifacts, "cache": self.cache, "credentials": self.credentials,
            "dependencies": self.dependencies,
            "features": {"trace_sections": true, "failure_reasons": [
                "script_failure", "runner_system_failure", "job_execution_timeout", "unknown_failure", "job_canceled",
            ]},
        })
    }
}
