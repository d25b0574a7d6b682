//! The scripts that the double feeds to the driver: the same shape as the runner's own, and the same duties.

use std::fmt::Write as _;

use serde_json::Value;

use super::environment::{Place, Variable};

/// What a script is made for.
#[derive(Debug)]
pub(super) struct Context<'a> {
    pub(super) job: &'a Value,
    pub(super) place: &'a Place,
    pub(super) variables: &'a [Variable],
    pub(super) shell: &'a str,
}

/// The script of a stage; `None` where the stage has nothing to do.
pub(super) fn of_stage(stage: &str, context: &Context<'_>) -> Option<String> {
    let body = match stage {
        "prepare_script" => "echo \"Running on $(hostname)...\"\n".to_owned(),
        "get_sources" => variables(context) + &get_sources(context),
        "download_artifacts" => variables(context) + &download_artifacts(context)?,
        "step_script" => user_step("script", context)?,
        "after_script" => user_step("after_script", context)?,
        "upload_artifacts_on_success" => variables(context) + &upload_artifacts("on_success", context)?,
        "upload_artifacts_on_failure" => variables(context) + &upload_artifacts("on_failure", context)?,
        "cleanup_file_variables" => variables(context) + &cleanup(context),
        _ => return None,
    };
    Some(wrap(&body, context.shell))
}

/// Around every body: errors end the script, a TERM ends it at once, and nothing is read from stdin.
fn wrap(body: &str, shell: &str) -> String {
    let mut script = format!("#!/usr/bin/env {shell}\n\ntrap 'exit 1' TERM\n\nset -o errexit\n");
    if shell == "bash" {
        script.push_str("set -o pipefail\n");
    }
    writeln!(script, "(trap 'exit 1' TERM; eval {}) < /dev/null", quote(body)).expect("text grows");
    script.push_str("exit 0\n");
    script
}

/// One word for a POSIX shell.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

fn green(text: &str) -> String {
    format!("echo {}\n", quote(&format!("\x1b[32;1m{text}\x1b[0;m")))
}

fn variables(context: &Context<'_>) -> String {
    let folder = quote(&context.place.temporary_dir());
    let mut body = format!("mkdir -p {folder}\n");
    for variable in context.variables {
        let (key, value) = (&variable.key, quote(&variable.value));
        if variable.file {
            let path = quote(&format!("{}/{key}", context.place.temporary_dir()));
            writeln!(body, "printf '%s' {value} > {path}\nexport {key}={path}").expect("text grows");
        } else {
            writeln!(body, "export {key}={value}").expect("text grows");
        }
    }
    body
}

fn get_sources(context: &Context<'_>) -> String {
    let project = quote(&context.place.project_dir);
    let strategy = context
        .variables
        .iter()
        .rev()
        .find(|variable| variable.key == "GIT_STRATEGY");
    if strategy.is_none_or(|strategy| strategy.value == "none") {
        return green("Skipping Git repository setup") + &format!("mkdir -p {project}\n");
    }
    let info = &context.job["git_info"];
    let text = |key: &str| info[key].as_str().unwrap_or_default();
    let refspecs: Vec<String> = info["refspecs"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(quote)
        .collect();
    let url = text("repo_url");
    let token = context.job["token"].as_str().unwrap_or_default();
    let with_token = url.replacen("://", &format!("://gitlab-ci-token:{token}@"), 1);
    let mut body = green("Fetching changes...");
    writeln!(
        body,
        "export GIT_TERMINAL_PROMPT=0\nrm -rf {project}\ngit -c init.defaultBranch=none init {project}\ncd {project}\n\
         git remote add origin {}\ngit -c {} fetch origin --prune --quiet {}",
        quote(url),
        quote(&format!("url.{with_token}.insteadOf={url}")),
        refspecs.join(" "),
    )
    .expect("text grows");
    body += &green(&format!(
        "Checking out {:.8} as detached HEAD (ref is {})...",
        text("sha"),
        text("ref")
    ));
    writeln!(body, "git checkout -f -q {}\ngit clean -ffdx", quote(text("sha"))).expect("text grows");
    body
}

fn user_step(name: &str, context: &Context<'_>) -> Option<String> {
    let steps = context.job["steps"].as_array()?;
    let step = steps.iter().find(|step| step["name"] == name)?;
    let mut body = variables(context);
    writeln!(body, "cd {}", quote(&context.place.project_dir)).expect("text grows");
    if name == "after_script" {
        body += &green("Running after script...");
    }
    for line in step["script"].as_array()?.iter().filter_map(Value::as_str) {
        body += &green(&format!("$ {line}"));
        body.push_str(line);
        body.push('\n');
    }
    Some(body)
}

/// The helper's commands run only where the guest has the helper: without it the job goes on, and says so.
fn guarded(commands: &str, what: &str) -> String {
    format!(
        "if gitlab-runner --version >/dev/null 2>&1; then\n{commands}else\n{}fi\n",
        format_args!("echo 'Missing gitlab-runner. {what} is disabled.'\n")
    )
}

fn download_artifacts(context: &Context<'_>) -> Option<String> {
    let dependencies = context.job["dependencies"]
        .as_array()
        .filter(|list| !list.is_empty())?;
    let mut body = format!("cd {}\n", quote(&context.place.project_dir));
    for dependency in dependencies {
        let commands = format!(
            "gitlab-runner artifacts-downloader --url {} --token {} --id {}\n",
            quote(&server(context)),
            quote(dependency["token"].as_str().unwrap_or_default()),
            dependency["id"]
        );
        body += &guarded(&commands, "Artifacts downloading");
    }
    Some(body)
}

fn upload_artifacts(when: &str, context: &Context<'_>) -> Option<String> {
    let wanted = |artifact: &&Value| matches!(artifact["when"].as_str(), Some(value) if value == "always" || value == when);
    let artifacts: Vec<&Value> = context.job["artifacts"]
        .as_array()?
        .iter()
        .filter(wanted)
        .collect();
    if artifacts.is_empty() {
        return None;
    }
    let mut body = format!("cd {}\n", quote(&context.place.project_dir));
    for artifact in artifacts {
        let mut command = format!(
            "gitlab-runner artifacts-uploader --url {} --token {} --id {} --name {} --artifact-format zip --artifact-type archive",
            quote(&server(context)),
            quote(context.job["token"].as_str().unwrap_or_default()),
            context.job["id"],
            quote(artifact["name"].as_str().unwrap_or_default()),
        );
        for path in artifact["paths"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
        {
            write!(command, " --path {}", quote(path)).expect("text grows");
        }
        command.push('\n');
        body += &guarded(&command, "Uploading artifacts");
    }
    Some(body)
}

fn server(context: &Context<'_>) -> String {
    let url = context
        .variables
        .iter()
        .find(|variable| variable.key == "CI_SERVER_URL");
    url.map(|url| url.value.clone()).unwrap_or_default()
}

fn cleanup(context: &Context<'_>) -> String {
    let mut body = String::new();
    for variable in context.variables.iter().filter(|variable| variable.file) {
        let path = format!("{}/{}", context.place.temporary_dir(), variable.key);
        writeln!(body, "rm -f {}", quote(&path)).expect("text grows");
    }
    body
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn what_is_quoted_arrives_as_it_was() {
        for text in ["it's", "a\nb", "'; rm -rf '", "$HOME `id` \\", ""] {
            let script = wrap(&format!("printf '%s' {}", quote(text)), "sh");
            let output = Command::new("sh").arg("-c").arg(script).output().unwrap();
            assert!(output.status.success());
            assert_eq!(String::from_utf8(output.stdout).unwrap(), text);
        }
    }

    #[test]
    fn the_first_failing_command_ends_a_script() {
        for shell in ["sh", "bash"] {
            let script = wrap("true\n(exit 7)\necho not reached\n", shell);
            let output = Command::new(shell).arg("-c").arg(script).output().unwrap();
            assert_eq!(output.status.code(), Some(7), "{shell}");
            assert!(output.stdout.is_empty(), "{shell}");
        }
    }
}
