//! The job response file: the part of gitlab-runner's `spec.Job` that decides anything here.

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny};

use super::Identity;
use crate::secret::Secret;

/// The file's content; unknown keys are the runner's business.
#[derive(Debug, Deserialize)]
pub struct Response {
    pub(super) id: u64,
    #[serde(default)]
    pub(super) token: Secret,
    #[serde(default)]
    pub(super) job_info: JobInfo,
    #[serde(default)]
    git_info: GitInfo,
    #[serde(default)]
    pub(super) runner_info: RunnerInfo,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(super) image: Image,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(super) services: Vec<Service>,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(super) credentials: Vec<RegistryCredential>,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(super) variables: Vec<Variable>,
    pub(super) artifacts: Option<Vec<IgnoredAny>>,
    pub(super) cache: Option<Vec<IgnoredAny>>,
    pub(super) dependencies: Option<Vec<IgnoredAny>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct JobInfo {
    pub(super) name: String,
    pub(super) project_full_path: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct GitInfo {
    repo_url: String,
    /// GitLab 18.3 and later say so here.
    protected: Option<bool>,
}

impl std::fmt::Debug for GitInfo {
    /// The address carries the job's token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GitInfo(…)")
    }
}

/// One of the job's variables; of interest are those that GitLab masks, and [`PROTECTED`].
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Variable {
    key: String,
    pub(super) value: Secret,
    pub(super) masked: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RunnerInfo {
    pub(super) timeout: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Image {
    pub(super) name: String,
    #[serde(deserialize_with = "null_is_default")]
    pub(super) pull_policy: Vec<String>,
    #[serde(deserialize_with = "null_is_default")]
    pub(super) executor_opts: ExecutorOptions,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ExecutorOptions {
    #[serde(deserialize_with = "null_is_default")]
    pub(super) docker: DockerOptions,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct DockerOptions {
    pub(super) user: String,
    pub(super) platform: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Service {
    pub(super) name: String,
}

/// A registry's credentials, sent by GitLab with the job.
#[derive(Debug, Clone, Deserialize)]
pub struct RegistryCredential {
    #[serde(rename = "type", default)]
    pub(super) kind: String,
    /// The registry's host, and port where it is not the usual one.
    #[serde(default)]
    pub url: String,
    /// The user's name.
    #[serde(default)]
    pub username: String,
    /// The password: the job's token.
    #[serde(default)]
    pub password: Secret,
}

/// The variable by which GitLab says whether a job's ref is protected.
const PROTECTED: &str = "CI_COMMIT_REF_PROTECTED";

/// Go writes an absent list or object as `null`.
fn null_is_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(d: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_default())
}

impl Response {
    /// Parses the file's bytes; the error never quotes a value, since values are secrets.
    pub fn parse(text: &[u8]) -> Result<Response, String> {
        serde_json::from_slice(text).map_err(|e| {
            use serde_json::error::Category;
            let what = match e.classify() {
                Category::Io => "it cannot be read",
                Category::Syntax => "it is no JSON",
                Category::Data => "a value has another type",
                Category::Eof => "it ends too early",
            };
            format!("{what}, at line {} column {}", e.line(), e.column())
        })
    }

    /// Is the job's ref protected? None where GitLab does not say.
    ///
    /// Where only the variable says so, the job's author may have added others of its name; GitLab's own is among them, so that only
    /// if all deny it, it is so.
    pub(super) fn is_protected(&self) -> Option<bool> {
        let said = self.variables.iter().filter(|variable| variable.key == PROTECTED);
        let said = said.map(|variable| variable.value.reveal() != "false");
        // Where one of two says yes, it is yes.
        self.git_info.protected.or_else(|| said.max())
    }

    /// Who the job is. The instance's URL is what remains of the repository's address, which GitLab
    /// made, without its credentials and without the project's path.
    pub fn identity(&self) -> Identity {
        Identity {
            coordinator: coordinator(&self.git_info.repo_url, &self.job_info.project_full_path),
            id: self.id,
        }
    }
}

fn coordinator(repo_url: &str, project: &str) -> String {
    let Some((scheme, rest)) = repo_url.split_once("://") else {
        return repo_url.to_owned();
    };
    let authority_end = rest.find('/').unwrap_or(rest.len());
    let (authority, path) = rest.split_at(authority_end);
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let suffix = format!("/{project}.git");
    // An address of another shape (a mirror, a test) still tells instances apart by its host.
    let root = path.strip_suffix(&suffix).unwrap_or("");
    format!(
        "{}://{}{}",
        scheme.to_ascii_lowercase(),
        host.to_ascii_lowercase(),
        root
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_coordinator_is_the_repository_without_credentials_and_project() {
        for (url, project, expected) in [
            (
                "https://gitlab-ci-token:s3cret@gitlab.example.com/grp/demo.git",
                "grp/demo",
                "https://gitlab.example.com",
            ),
            (
                "https://t:s@Example.com:8443/gitlab/grp/sub/demo.git",
                "grp/sub/demo",
                "https://example.com:8443/gitlab",
            ),
            (
                "https://t:s@example.com/other.git",
                "grp/demo",
                "https://example.com",
            ),
            (
                "https://t:a@b@example.com/grp/demo.git",
                "grp/demo",
                "https://example.com",
            ),
            ("file:///srv/demo.git", "grp/demo", "file://"),
            ("", "", ""),
        ] {
            assert_eq!(coordinator(url, project), expected, "{url}");
        }
    }

    #[test]
    fn a_ref_is_unprotected_only_if_gitlab_says_so_whatever_the_author_adds() {
        let yes = r#"{"key": "CI_COMMIT_REF_PROTECTED", "value": "true"}"#;
        let no = r#"{"key": "CI_COMMIT_REF_PROTECTED", "value": "false"}"#;
        let odd = r#"{"key": "CI_COMMIT_REF_PROTECTED", "value": ""}"#;
        let other = r#"{"key": "PROTECTED", "value": "false"}"#;
        for (git, variables, expected) in [
            ("", vec![], None),
            ("", vec![other], None),
            ("", vec![other, no], Some(false)),
            ("", vec![yes], Some(true)),
            ("", vec![yes, no], Some(true)),
            ("", vec![no, yes], Some(true)),
            ("", vec![odd], Some(true)),
            (r#""protected": null"#, vec![no], Some(false)),
            (r#""protected": true"#, vec![no], Some(true)),
            (r#""protected": false"#, vec![yes], Some(false)),
            (r#""protected": false"#, vec![], Some(false)),
        ] {
            let text = format!(
                r#"{{"id": 1, "git_info": {{{git}}}, "variables": [{}]}}"#,
                variables.join(",")
            );
            let response = Response::parse(text.as_bytes()).unwrap();
            assert_eq!(response.is_protected(), expected, "{text}");
        }
    }

    #[test]
    fn an_error_quotes_no_value() {
        for text in [
            r#"{"id":"../../s3cret"}"#,
            r#"{"id":1,"image":{"name":7}}"#,
            "{\"id\":1",
            "s3cret",
            "",
        ] {
            let error = Response::parse(text.as_bytes()).unwrap_err();
            assert!(!error.contains("s3cret"), "{error}");
        }
    }
}
