use std::path::Path;

use super::*;
use crate::quantity::{Size, Span};

fn environment(variables: &[(&str, &str)]) -> Environment {
    variables
        .iter()
        .map(|(n, v)| (OsString::from(n), OsString::from(v)))
        .collect()
}

const RESPONSE: &str = r#"{
  "id": 101, "token": "s3cret-token",
  "job_info": {"name": "unit", "project_id": 7, "project_full_path": "grp/demo"},
  "git_info": {"repo_url": "https://gitlab-ci-token:s3cret-token@gitlab.example.com/grp/demo.git"},
  "runner_info": {"timeout": 120},
  "image": {"name": "$BASE/vm:1", "pull_policy": ["always"], "executor_opts": {"docker": {"user": "ci"}}},
  "variables": [{"key": "A", "value": "pass-phrase", "masked": true}, {"key": "B", "value": "word"}, {"key": "C"}],
  "services": null, "artifacts": [], "cache": [{}],
  "credentials": [{"type": "registry", "url": "registry.example.com", "username": "u", "password": "s3cret"},
                  {"type": "other", "url": "x", "username": "u", "password": "p"}]
}"#;

fn job(variables: &[(&str, &str)]) -> Job {
    let response = Response::parse(RESPONSE.as_bytes()).unwrap();
    Job::new(
        response,
        &environment(variables),
        Path::new("/tmp/x/response.json"),
    )
}

#[test]
fn the_response_decides_who_the_job_is_and_the_author_what_it_wants() {
    let job = job(&[
        ("CUSTOM_ENV_CI_JOB_ID", "999"),
        ("CUSTOM_ENV_CI_PROJECT_PATH", "evil/project"),
        ("CUSTOM_ENV_CI_JOB_IMAGE", "registry.example.com/vm:1"),
    ]);
    assert_eq!(
        job.identity,
        Identity {
            coordinator: "https://gitlab.example.com".into(),
            id: 101
        }
    );
    assert_eq!(job.project, "grp/demo");
    assert_eq!(job.image.as_deref(), Some("registry.example.com/vm:1"));
    assert_eq!(job.pull_policy, ["always"]);
    assert_eq!(job.user.as_deref(), Some("ci"));
    assert_eq!(job.timeout, Duration::from_secs(120));
    assert_eq!(job.credentials.len(), 1);
    assert!(job.needs_helper);
    assert!(!format!("{job:?}").contains("s3cret"));
}

#[test]
fn a_response_file_says_which_job_a_call_is_for_and_a_token_only_where_there_is_none() {
    let mine = [
        ("CUSTOM_ENV_CI_JOB_ID", "101"),
        ("CUSTOM_ENV_CI_JOB_TOKEN", "s3cret-token"),
        ("CUSTOM_ENV_CI_RUNNER_SHORT_TOKEN", "abcd"),
    ];
    let prepared = job(&mine[2..]).token.unwrap();
    assert!(!prepared.contains("s3cret"));
    let of = |variables: &[(&str, &str)]| claim(&environment(variables));
    let expected = Claim::Token {
        id: 101,
        hash: prepared.clone(),
    };
    assert_eq!(of(&mine).unwrap(), expected);
    let with_file = [&mine[..], &[("JOB_RESPONSE_FILE", "/tmp/x/response.json")]].concat();
    assert_eq!(
        of(&with_file).unwrap(),
        Claim::Session("/tmp/x/response.json".into())
    );
    for (name, value) in [
        ("CUSTOM_ENV_CI_JOB_TOKEN", "other"),
        ("CUSTOM_ENV_CI_RUNNER_SHORT_TOKEN", "other"),
    ] {
        let claimed = of(&[&mine[..], &[(name, value)]].concat()).unwrap();
        assert!(
            matches!(claimed, Claim::Token { hash, .. } if hash != prepared),
            "{name}"
        );
    }
    for (name, value) in [("CUSTOM_ENV_CI_JOB_TOKEN", ""), ("CUSTOM_ENV_CI_JOB_ID", "../1")] {
        let claimed = of(&[&mine[..], &[(name, value)]].concat());
        assert!(
            matches!(claimed, Err(Error::NotARunner("JOB_RESPONSE_FILE"))),
            "{name}"
        );
    }
}

#[test]
fn an_author_wishes_by_variables() {
    let env = environment(&[
        ("CUSTOM_ENV_CANNERY_CPUS", "4"),
        ("CUSTOM_ENV_CANNERY_MEMORY", "3G"),
        ("CUSTOM_ENV_CANNERY_HOLD", "1h30m"),
    ]);
    assert_eq!(
        Wants::read(&env).unwrap(),
        Wants {
            cpus: Some(4),
            memory: Some(Size::gib(3)),
            disk: None,
            hold: Some(Span::secs(5400)),
        }
    );
}

#[test]
fn a_job_without_an_image_has_none_whatever_the_author_calls_a_variable() {
    let mut text = RESPONSE.replace("$BASE/vm:1", "");
    text = text.replace("\"services\": null", "\"services\": []");
    let response = Response::parse(text.as_bytes()).unwrap();
    let env = environment(&[("CUSTOM_ENV_CI_JOB_IMAGE", "evil")]);
    assert_eq!(Job::new(response, &env, Path::new("/r")).image, None);
}

#[test]
fn wishes_that_make_no_sense_are_refused_by_name() {
    for (name, value) in [
        ("CANNERY_HOLD", "a while"),
        ("CANNERY_HOLD", "-5m"),
        ("CANNERY_CPUS", "0"),
        ("CANNERY_CPUS", "-1"),
        ("CANNERY_CPUS", "two"),
        ("CANNERY_MEMORY", "lots"),
        ("CANNERY_DISK", "10G;rm -rf /"),
        ("CANNERY_DISK", "0"),
    ] {
        let error = Wants::read(&environment(&[(&format!("CUSTOM_ENV_{name}"), value)]))
            .unwrap_err()
            .to_string();
        assert!(error.starts_with(&format!("{name}={value}: ")), "{error}");
    }
}

#[test]
fn a_wish_that_may_be_a_secret_is_not_shown_in_part() {
    for value in ["x".repeat(41), "two\nlines".to_owned()] {
        let error = Wants::read(&environment(&[("CUSTOM_ENV_CANNERY_CPUS", &value)])).unwrap_err();
        assert!(error.to_string().starts_with("CANNERY_CPUS=…: "), "{error}");
    }
}

#[test]
fn what_gitlab_masks_is_known() {
    let masked = job(&[]).masked;
    assert_eq!(
        masked.hide("pass-phrase s3cret-token s3cret word"),
        "[MASKED] [MASKED] [MASKED] word"
    );
}

#[test]
fn wishes_are_granted_up_to_the_operators_bounds() {
    let bounds = Bounds {
        cpus: (2, 4),
        memory: (Size::gib(2), Size::gib(8)),
        disk: (Size::gib(10), Size::gib(40)),
    };
    let nothing = Wants::default().within(&bounds).unwrap();
    assert_eq!(
        nothing,
        Granted {
            cpus: 2,
            memory: Size::gib(2),
            disk: Size::gib(10)
        }
    );
    let less = Wants {
        cpus: Some(1),
        memory: Some(Size::gib(1)),
        disk: Some(Size::gib(5)),
        hold: None,
    };
    assert_eq!(
        less.within(&bounds).unwrap(),
        Granted {
            cpus: 1,
            memory: Size::gib(1),
            disk: Size::gib(10)
        },
        "a disk is never smaller than its image"
    );
    for wants in [
        Wants {
            cpus: Some(5),
            ..Wants::default()
        },
        Wants {
            memory: Some(Size::gib(9)),
            ..Wants::default()
        },
        Wants {
            disk: Some(Size::gib(41)),
            ..Wants::default()
        },
        Wants {
            memory: Some(Size::mib(1)),
            ..Wants::default()
        },
    ] {
        let error = wants.within(&bounds).unwrap_err().to_string();
        assert!(error.starts_with("CANNERY_"), "{error}");
    }
}

#[test]
fn where_no_job_may_choose_its_disk_the_sentence_says_so() {
    let bounds = Bounds {
        cpus: (1, 1),
        memory: (Size::gib(1), Size::gib(1)),
        disk: (Size::gib(1), Size::from_bytes(0)),
    };
    let wants = Wants {
        disk: Some(Size::gib(2)),
        ..Wants::default()
    };
    let error = wants.within(&bounds).unwrap_err().to_string();
    assert!(error.contains("limits.disk is not set"), "{error}");
}

#[test]
fn a_machine_is_held_for_as_long_as_the_operator_lets_it() {
    let minutes = |n: u64| std::time::Duration::from_secs(n * 60);
    let asks = |n: u64| Wants {
        hold: Some(Span(minutes(n))),
        ..Wants::default()
    };
    let nothing = Wants::default();
    assert_eq!(
        nothing.hold_within(minutes(10), minutes(60)).unwrap(),
        minutes(10)
    );
    for asked in [0, 5, 60] {
        let held = asks(asked).hold_within(minutes(10), minutes(60)).unwrap();
        assert_eq!(held, minutes(asked));
    }
    let error = asks(61).hold_within(minutes(10), minutes(60)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "CANNERY_HOLD=61m: the operator of this runner allows at most 1h."
    );
    let error = asks(1)
        .hold_within(minutes(0), minutes(0))
        .unwrap_err()
        .to_string();
    assert!(error.contains("hold.max is not set"), "{error}");
    // It may always be declined.
    assert_eq!(asks(0).hold_within(minutes(0), minutes(0)).unwrap(), minutes(0));
}

#[test]
fn a_call_without_the_runner_says_so() {
    let error = Job::read(&environment(&[])).unwrap_err().to_string();
    assert!(error.contains("JOB_RESPONSE_FILE"), "{error}");
}
