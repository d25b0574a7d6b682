//! Runs a credential helper that a file of the host names.
//!
//! Source of the protocol: docker-credential-helpers (`docker-credential-NAME get`, `store` and `erase`:
//! the server, or a login as JSON, on stdin, JSON on stdout).

use std::io;
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

use super::credentials::{CredentialsError, DOCKER_HUB, Login, Origin};
use crate::children;
use crate::secret::Secret;

/// Time that a helper has to answer. Some ask a cloud's metadata service or a key ring; none waits for a
/// human here.
const DEADLINE: Duration = Duration::from_secs(30);

/// Most that is read of an answer, in bytes.
const ANSWER_MAX: u64 = 64 * 1024;

/// The name under which docker keeps a registry's login.
pub(super) fn server(registry: &str) -> &str {
    if DOCKER_HUB.contains(&registry) {
        "https://index.docker.io/v1/"
    } else {
        registry
    }
}

/// Asks `docker-credential-HELPER` for a registry's login; none when it knows none.
pub(super) async fn ask(helper: &str, registry: &str) -> Result<Option<Login>, CredentialsError> {
    let (success, answer) = called(helper, registry, "get", &format!("{}\n", server(registry))).await?;
    parse(success, &answer).map_err(|reason| failed(helper, registry, reason))
}

/// Has `docker-credential-HELPER` keep a login.
pub(super) async fn store(
    helper: &str,
    registry: &str,
    user: &str,
    password: &Secret,
) -> Result<(), CredentialsError> {
    let login = serde_json::json!({
        "ServerURL": server(registry), "Username": user, "Secret": password.reveal(),
    });
    match called(helper, registry, "store", &login.to_string()).await? {
        (true, _) => Ok(()),
        (false, _) => Err(failed(helper, registry, "it ended with an error")),
    }
}

/// Has `docker-credential-HELPER` forget a login; false when it knew none.
pub(super) async fn erase(helper: &str, registry: &str) -> Result<bool, CredentialsError> {
    if ask(helper, registry).await?.is_none() {
        return Ok(false);
    }
    match called(helper, registry, "erase", server(registry)).await? {
        (true, _) => Ok(true),
        (false, _) => Err(failed(helper, registry, "it ended with an error")),
    }
}

fn failed(helper: &str, registry: &str, reason: impl Into<String>) -> CredentialsError {
    CredentialsError::Helper {
        helper: helper.to_owned(),
        registry: registry.to_owned(),
        reason: reason.into(),
    }
}

async fn called(
    helper: &str,
    registry: &str,
    verb: &'static str,
    input: &str,
) -> Result<(bool, Vec<u8>), CredentialsError> {
    let program = Command::new(format!("docker-credential-{helper}"));
    tokio::time::timeout(DEADLINE, talk(program, verb, input))
        .await
        .map_err(|_| {
            failed(
                helper,
                registry,
                format!("no answer within {} s", DEADLINE.as_secs()),
            )
        })?
        .map_err(|error| failed(helper, registry, error.to_string()))
}

/// Whether the helper ended well, and what it wrote.
async fn talk(mut program: Command, verb: &str, input: &str) -> io::Result<(bool, Vec<u8>)> {
    program
        .arg(verb)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    children::end_with_us(&mut program);
    let mut child = program.spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // A helper that needs no input may be gone already; its answer decides.
        drop(stdin.write_all(input.as_bytes()).await);
    }
    let mut answer = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(ANSWER_MAX).read_to_end(&mut answer).await?;
    }
    Ok((child.wait().await?.success(), answer))
}

/// Reads an answer. "Not found" is a failure with a fixed text on stdout.
fn parse(success: bool, answer: &[u8]) -> Result<Option<Login>, &'static str> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Answer {
        username: String,
        secret: String,
    }
    if !success {
        let text = String::from_utf8_lossy(answer);
        return if text.contains("credentials not found") {
            Ok(None)
        } else {
            Err("it ended with an error")
        };
    }
    let answer: Answer =
        serde_json::from_slice(answer).map_err(|_| "its answer is not the JSON of a credential helper")?;
    if answer.username.is_empty() && answer.secret.is_empty() {
        return Ok(None);
    }
    Ok(Some(Login::new(
        answer.username,
        Secret::new(answer.secret),
        Origin::Host,
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read() {
        let answer = br#"{"ServerURL":"r","Username":"u","Secret":"s"}"#;
        assert_eq!(parse(true, answer).unwrap().unwrap().password.reveal(), "s");
        assert_eq!(
            parse(false, b"credentials not found in native keychain\n"),
            Ok(None)
        );
        assert!(parse(false, b"boom").is_err());
        assert!(parse(true, b"{}").is_err());
    }

    #[tokio::test]
    async fn a_helper_is_asked_for_the_server() {
        let script = r#"read server; echo "{\"ServerURL\":\"\",\"Username\":\"$0\",\"Secret\":\"$server\"}""#;
        let mut shell = Command::new("sh");
        shell.args(["-c", script]);
        let (success, answer) = talk(shell, "get", "r.example.com:5000\n").await.unwrap();
        let login = parse(success, &answer).unwrap().unwrap();
        assert_eq!(
            (login.user.as_str(), login.password.reveal()),
            ("get", "r.example.com:5000")
        );
    }

    #[tokio::test]
    async fn a_helper_that_is_missing_is_named() {
        let error = ask("that-nobody-has", "r.example.com")
            .await
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("docker-credential-that-nobody-has failed for r.example.com"),
            "{error}"
        );
    }
}
