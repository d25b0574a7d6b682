//! Git repositories over smart HTTP, served by `git http-backend`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use tokio::io::AsyncWriteExt;

/// The largest request that git may send, in bytes: a fetch asks with a list of commits.
const REQUEST_LIMIT: usize = 1024 * 1024;

/// A repository that jobs can clone.
#[derive(Debug, Clone)]
pub struct Repository {
    url: String,
    path: String,
    commit: String,
}

impl Repository {
    /// Where it is cloned from.
    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// Its project, e.g. `grp/demo`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The newest commit of `main`.
    pub fn commit(&self) -> &str {
        &self.commit
    }

    pub(super) fn make(root: &Path, server: &str, path: &str, files: &[(&str, &str)]) -> Self {
        let bare = root.join(format!("{path}.git"));
        let work = tempfile::tempdir().expect("a folder to commit in");
        git(work.path(), &["init", "--quiet", "--initial-branch=main"]);
        for (name, content) in files {
            let file = work.path().join(name);
            std::fs::create_dir_all(file.parent().expect("a file has a folder"))
                .expect("a folder for the file");
            std::fs::write(&file, content).expect("a file of the repository");
        }
        git(work.path(), &["add", "--all"]);
        git(
            work.path(),
            &["commit", "--quiet", "--allow-empty", "--message=Begin"],
        );
        let bare_name = bare.to_str().expect("the repository's path is text");
        git(work.path(), &["clone", "--quiet", "--bare", ".", bare_name]);
        Self {
            url: format!("{server}/{path}.git"),
            path: path.to_owned(),
            commit: git(work.path(), &["rev-parse", "HEAD"]),
        }
    }
}

/// Runs git with nobody's settings but ours; returns its trimmed output.
fn git(folder: &Path, arguments: &[&str]) -> String {
    let output = Command::new("git")
        .current_dir(folder)
        .args(["-c", "user.name=Test", "-c", "user.email=test@example.org"])
        .args(arguments)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_SYSTEM", "/dev/null")
        .stderr(Stdio::inherit())
        .output()
        .expect("git can be started");
    assert!(output.status.success(), "git {} failed", arguments.join(" "));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Answers what is none of the API's routes: `/grp/demo.git/…`.
pub(super) async fn serve(root: PathBuf, request: Request) -> Response {
    match backend(root, request).await {
        Ok(response) => response,
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn backend(root: PathBuf, request: Request) -> std::io::Result<Response> {
    let (parts, body) = request.into_parts();
    let body = to_bytes(body, REQUEST_LIMIT)
        .await
        .map_err(std::io::Error::other)?;
    let header = |name: header::HeaderName| text(&parts.headers, &name);
    let mut child = tokio::process::Command::new("git")
        .arg("http-backend")
        .env("GIT_PROJECT_ROOT", root)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("PATH_INFO", parts.uri.path())
        .env("QUERY_STRING", parts.uri.query().unwrap_or_default())
        .env("REQUEST_METHOD", parts.method.as_str())
        .env("CONTENT_TYPE", header(header::CONTENT_TYPE))
        .env("CONTENT_LENGTH", body.len().to_string())
        .env("HTTP_CONTENT_ENCODING", header(header::CONTENT_ENCODING))
        .env(
            "GIT_PROTOCOL",
            text(&parts.headers, &header::HeaderName::from_static("git-protocol")),
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut stdin = child.stdin.take().expect("stdin is a pipe");
    stdin.write_all(&body).await?;
    drop(stdin);
    let output = child.wait_with_output().await?;
    Ok(from_cgi(&output.stdout))
}

fn text(headers: &HeaderMap, name: &header::HeaderName) -> String {
    let value = headers.get(name).and_then(|value| value.to_str().ok());
    value.unwrap_or_default().to_owned()
}

/// The response of a CGI program: header lines, an empty line, the body.
fn from_cgi(output: &[u8]) -> Response {
    let end = output.windows(4).position(|window| window == b"\r\n\r\n");
    let Some(end) = end else {
        return (StatusCode::BAD_GATEWAY, "git http-backend sent no header").into_response();
    };
    let mut response = Response::builder();
    for line in String::from_utf8_lossy(&output[..end]).lines() {
        match line.split_once(": ") {
            Some(("Status", status)) => response = response.status(status.split(' ').next().unwrap_or("500")),
            Some((name, value)) => response = response.header(name, value),
            None => {}
        }
    }
    response
        .body(Body::from(output[end + 4..].to_vec()))
        .unwrap_or_else(|_| StatusCode::BAD_GATEWAY.into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_line_of_a_cgi_program_becomes_the_status() {
        let response = from_cgi(b"Status: 404 Not Found\r\nExpires: never\r\n\r\nbody");
        assert_eq!(response.status(), StatusCode::NOT_FOUND);
        assert_eq!(response.headers()["Expires"], "never");
        assert_eq!(from_cgi(b"rubbish").status(), StatusCode::BAD_GATEWAY);
    }
}
