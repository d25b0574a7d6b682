//! The variables of a job, and the environment of a call of the driver.

use serde_json::{Value, json};

use super::super::Driver;

/// The runner's version as its variables tell it.
const VERSION: &str = "19.3.0";

/// One variable of a job, expanded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Variable {
    pub(super) key: String,
    pub(super) value: String,
    pub(super) file: bool,
}

/// What the runner itself knows about the job.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) builds_dir: String,
    pub(super) project_dir: String,
    pub(super) number: usize,
    pub(super) status: &'static str,
}

impl Place {
    pub(super) fn temporary_dir(&self) -> String {
        format!("{}.tmp", self.project_dir)
    }
}

/// All variables in the order in which they are given: the runner's own, the job's, the runner's last word.
pub(super) fn variables(job: &Value, place: &Place) -> Vec<Variable> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let own = |key: &str, value: String| Variable {
        key: key.to_owned(),
        value,
        file: false,
    };
    let mut all = Vec::new();
    if let Some(image) = job["image"]["name"].as_str().filter(|name| !name.is_empty()) {
        all.push(own("CI_JOB_IMAGE", image.to_owned()));
    }
    all.extend([
        own("CI_RUNNER_SHORT_TOKEN", "test-toke".to_owned()),
        own("CI_BUILDS_DIR", place.builds_dir.clone()),
        own("CI_PROJECT_DIR", place.project_dir.clone()),
        own("CI_CONCURRENT_ID", place.number.to_string()),
        own("CI_CONCURRENT_PROJECT_ID", place.number.to_string()),
        own("CI_SERVER", "yes".to_owned()),
        own("CI_JOB_STATUS", place.status.to_owned()),
        own("CI_JOB_TIMEOUT", job["runner_info"]["timeout"].to_string()),
    ]);
    let raw: Vec<&Value> = job["variables"].as_array().into_iter().flatten().collect();
    let lookup = |name: &str| {
        let of_job = raw.iter().rev().find(|variable| variable["key"] == name);
        of_job
            .map(|variable| text(&variable["value"]))
            .or_else(|| {
                all.iter()
                    .find(|variable| variable.key == name)
                    .map(|variable| variable.value.clone())
            })
            .unwrap_or_default()
    };
    let of_job: Vec<Variable> = raw
        .iter()
        .map(|variable| {
            let value = text(&variable["value"]);
            Variable {
                key: text(&variable["key"]),
                value: if variable["raw"] == true {
                    value
                } else {
                    expand(&value, lookup)
                },
                file: variable["file"] == true,
            }
        })
        .collect();
    let image = all.iter().position(|variable| variable.key == "CI_JOB_IMAGE");
    if let Some(image) = image {
        all[image].value = expand(&all[image].value, lookup);
    }
    all.extend(of_job);
    all.extend([
        own("CI_SHARED_ENVIRONMENT", "true".to_owned()),
        own("CI_RUNNER_VERSION", VERSION.to_owned()),
        own("CI_RUNNER_REVISION", "double".to_owned()),
        own("CI_RUNNER_EXECUTABLE_ARCH", "linux/amd64".to_owned()),
        own("RUNNER_TEMP_PROJECT_DIR", place.temporary_dir()),
    ]);
    all
}

/// Replaces `$NAME` and `${NAME}`; `$$` is a dollar sign, and a dollar sign before anything else stays.
fn expand(value: &str, lookup: impl Fn(&str) -> String) -> String {
    let mut expanded = String::new();
    let mut rest = value;
    while let Some(at) = rest.find('$') {
        expanded.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            expanded.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix('{').and_then(|braced| braced.split_once('}')) {
            expanded.push_str(&lookup(name));
            rest = after;
        } else {
            let end = rest
                .find(|character: char| !character.is_ascii_alphanumeric() && character != '_')
                .unwrap_or(rest.len());
            if end == 0 {
                expanded.push('$');
            } else {
                expanded.push_str(&lookup(&rest[..end]));
                rest = &rest[end..];
            }
        }
    }
    expanded + rest
}

/// The environment of one call, in order; the last of a name wins. The caller's own environment comes before it.
pub(super) fn of_call(
    driver: &Driver,
    folder: &str,
    job_env: &[(String, String)],
    variables: &[Variable],
    job: &Value,
) -> Vec<(String, String)> {
    let mut pairs = driver.environment.clone();
    let mut add = |key: &str, value: String| pairs.push((key.to_owned(), value));
    add("TMPDIR", folder.to_owned());
    add("BUILD_FAILURE_EXIT_CODE", "1".to_owned());
    add("SYSTEM_FAILURE_EXIT_CODE", "2".to_owned());
    add("BUILD_EXIT_CODE_FILE", format!("{folder}/build_exit_code"));
    add("JOB_RESPONSE_FILE", format!("{folder}/response.json"));
    for (key, value) in job_env {
        add(key, value.clone());
    }
    for variable in variables {
        add(&format!("CUSTOM_ENV_{}", variable.key), variable.value.clone());
    }
    add("CUSTOM_ENV_CI_JOB_SERVICES", services(job));
    pairs
}

fn services(job: &Value) -> String {
    let services: Vec<Value> = job["services"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|service| {
            let alias = service["alias"].as_str().unwrap_or_default();
            json!({
                "name": service["name"], "alias": alias.split([' ', ',']).next().unwrap_or_default(),
                "entrypoint": service["entrypoint"], "command": service["command"], "variables": service["variables"],
            })
        })
        .collect();
    if services.is_empty() {
        String::new()
    } else {
        Value::Array(services).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_expanded_and_other_dollar_signs_stay() {
        let lookup = |name: &str| {
            if name == "A" {
                "1".to_owned()
            } else {
                String::new()
            }
        };
        for (value, expected) in [
            ("$A ${A}b $Ab.", "1 1b ."),
            ("cost: 5$ $$A", "cost: 5$ $A"),
            ("${A", "${A"),
            ("é$A\n", "é1\n"),
        ] {
            assert_eq!(expand(value, lookup), expected, "{value}");
        }
    }
}
