//! The images that a `.gitlab-ci.yml` names, as far as its text tells.
//!
//! `image:` stands at the top level, in `default:`, and in jobs, hidden ones included; it is a name, or a table with a `name`.
//! Aliases and merge keys are YAML's and are resolved. Variables are filled in where the file itself gives them a value
//! (`variables:` of the file and of the job). What only GitLab knows is listed as unknown: other variables, `include:`,
//! `!reference`.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

/// What a file names.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Images {
    /// Names as `image:` has them, with variables filled in.
    pub(super) names: BTreeSet<String>,
    /// What could not be found out, in words.
    pub(super) unknown: BTreeSet<String>,
}

/// Top-level keys that are no jobs.
const NO_JOBS: [&str; 7] = [
    "default",
    "include",
    "spec",
    "stages",
    "variables",
    "workflow",
    "cache",
];

/// Variables in variables are filled in so often; one that names itself does not end.
const DEPTH_MAX: usize = 10;

/// Reads a file. The error is a sentence without a stop.
pub(super) fn images(text: &str) -> Result<Images, String> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).map_err(|error| {
        let message = error.to_string();
        format!("it is no YAML: {}", message.lines().next().unwrap_or_default())
    })?;
    let mut found = Images::default();
    // A header (`spec:`) may stand before the pipeline as a document of its own.
    for document in &documents {
        let Value::Object(pipeline) = document else {
            continue;
        };
        let global = variables(pipeline, &BTreeMap::new());
        found.take(pipeline, &global);
        if pipeline.contains_key("include") {
            found.unknown.insert("what its include: brings in".to_owned());
        }
        for (key, value) in pipeline {
            let Value::Object(table) = value else { continue };
            if key == "default" {
                found.take(table, &global);
            } else if !NO_JOBS.contains(&key.as_str()) {
                found.take(table, &variables(table, &global));
            }
        }
    }
    Ok(found)
}

impl Images {
    fn take(&mut self, table: &Map<String, Value>, variables: &BTreeMap<String, String>) {
        let name = match table.get("image") {
            None | Some(Value::Null) => return,
            Some(Value::String(name)) => Some(name),
            Some(Value::Object(image)) => match image.get("name") {
                Some(Value::String(name)) => Some(name),
                _ => None,
            },
            Some(_) => None,
        };
        match name {
            Some(name) => match filled_in(name, variables) {
                Ok(name) => drop(self.names.insert(name)),
                Err(variable) => drop(
                    self.unknown
                        .insert(format!("{name} (${variable} has no value in the file)")),
                ),
            },
            None => drop(self.unknown.insert("an image: that is no name".to_owned())),
        }
    }
}

/// The variables of a table, and those of the file where the table has none of that name.
fn variables(table: &Map<String, Value>, outer: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut variables = outer.clone();
    if let Some(Value::Object(own)) = table.get("variables") {
        for (name, value) in own {
            let value = match value {
                Value::Object(described) => described.get("value"),
                value => Some(value),
            };
            match value {
                Some(Value::String(text)) => drop(variables.insert(name.clone(), text.clone())),
                Some(value @ (Value::Number(_) | Value::Bool(_))) => {
                    variables.insert(name.clone(), value.to_string());
                }
                _ => {}
            }
        }
    }
    variables
}

/// A name with its variables' values; else the first variable that has none.
fn filled_in(name: &str, variables: &BTreeMap<String, String>) -> Result<String, String> {
    let mut text = name.to_owned();
    for _ in 0..DEPTH_MAX {
        if !text.contains('$') {
            return Ok(text);
        }
        text = once(&text, variables)?;
    }
    Err(name.trim_start_matches('$').to_owned())
}

/// Replaces each `$NAME` and `${NAME}` once.
fn once(text: &str, variables: &BTreeMap<String, String>) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        let braced = after.strip_prefix('{');
        let inner = braced.unwrap_or(after);
        let length = inner
            .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .unwrap_or(inner.len());
        let (variable, behind) = inner.split_at(length);
        rest = match braced {
            Some(_) => behind.strip_prefix('}').ok_or_else(|| variable.to_owned())?,
            None => behind,
        };
        out.push_str(variables.get(variable).ok_or_else(|| variable.to_owned())?);
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Vec<String>, Vec<String>) {
        let found = images(text).unwrap();
        (
            found.names.into_iter().collect(),
            found.unknown.into_iter().collect(),
        )
    }

    #[test]
    fn images_are_found_where_gitlab_looks_for_them() {
        let (names, unknown) = read(
            r#"
image: top:1
default:
  image: { name: default:2, pull_policy: always }
stages: [build, test]
variables:
  image: not/an/image
cache: { image: neither }
build:
  stage: build
  image:
    name: job:3
    entrypoint: [""]
  script: ["make"]
.hidden: { image: "hidden:4", script: x }
test:
  extends: .hidden
  services: [{ name: "postgres:16" }]
pages:
  script: echo no image
"#,
        );
        assert_eq!(names, ["default:2", "hidden:4", "job:3", "top:1"]);
        assert!(unknown.is_empty(), "{unknown:?}");
    }

    #[test]
    fn variables_with_a_value_in_the_file_are_filled_in_and_others_listed() {
        let (names, unknown) = read(
            r#"
variables:
  REGISTRY: r.example.com
  IMAGE: "$REGISTRY/vm"
  TAG: { value: 12, description: which }
  LOOP: "$LOOP"
a: { image: "${IMAGE}:$TAG" }
b: { image: "$IMAGE:$TAG", variables: { TAG: trixie } }
c: { image: "$CI_REGISTRY_IMAGE/vm:1" }
d: { image: "${IMAGE" }
e: { image: "$LOOP" }
"#,
        );
        assert_eq!(names, ["r.example.com/vm:12", "r.example.com/vm:trixie"]);
        assert_eq!(
            unknown,
            [
                "$CI_REGISTRY_IMAGE/vm:1 ($CI_REGISTRY_IMAGE has no value in the file)",
                "$LOOP ($LOOP has no value in the file)",
                "${IMAGE ($IMAGE has no value in the file)",
            ]
        );
    }

    #[test]
    fn aliases_merges_and_headers_are_understood_and_what_only_gitlab_knows_is_listed() {
        let (names, unknown) = read(
            r#"
spec:
  inputs: { x: {} }
---
include:
  - local: other.yml
.base: &base
  image: base:1
  tags: [vm]
.name: &name
  name: aliased:2
a:
  <<: *base
  script: x
b: { image: *name }
c: { image: !reference [.base, image] }
"#,
        );
        assert_eq!(names, ["aliased:2", "base:1"]);
        assert_eq!(
            unknown,
            ["an image: that is no name", "what its include: brings in"]
        );
    }

    #[test]
    fn what_is_no_pipeline_is_an_error_or_names_nothing() {
        assert!(images("a: [").unwrap_err().starts_with("it is no YAML"));
        for text in ["", "just text", "- a\n- b", "image:"] {
            assert_eq!(read(text), (vec![], vec![]), "{text}");
        }
        // A bomb of aliases ends early.
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for n in 1..12 {
            let before = format!("*a{}", n - 1);
            bomb.push_str(&format!("a{n}: &a{n} [{}]\n", [before.as_str(); 9].join(", ")));
        }
        assert!(images(&bomb).is_err());
    }
}
