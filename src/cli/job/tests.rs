use std::path::Path;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::seen::Seen;
use super::show::page;
use crate::history::Entry;
use crate::record::{Caller, Ending, JobKey, Outcome, PREPARE, Phase, Reason, Record, State};

const EVIL: &str = "a\u{1b}[2J\r\nb\u{7}\u{9b}1A";

fn record(now: Timestamp) -> Record {
    let created = now - SignedDuration::from_secs(130);
    let phase = |name: &str, seconds| Phase {
        name: name.into(),
        seconds,
    };
    let key = "aaaa1111-7-2".parse().unwrap();
    let session = "/tmp/custom-executor1/response.json".into();
    let mut record = Record {
        coordinator: "https://gitlab.example.com".into(),
        project: "grp/demo".into(),
        job: "unit".into(),
        state: State::Ready,
        since: now - SignedDuration::from_secs(12),
        image: Some("registry.example.com/vm:1".into()),
        digest: Some("sha256:00ff".into()),
        phases: vec![phase("image", 0.02), phase("boot", 2.98)],
        ..Record::new(key, session, Caller::this(), created, now)
    };
    record.begin(PREPARE, created);
    record.end(PREPARE, Duration::from_secs(3), Ending::Succeeded);
    record
}

fn shown(record: &Record, outcome: Option<Outcome>, now: Timestamp) -> String {
    let path = Path::new("/x").to_owned();
    let seen = match outcome {
        None => Seen::live(record.clone(), path),
        Some(outcome) => Seen::remembered(Entry::of(record.clone(), outcome, now), path),
    };
    page(&seen, Some("first\nlast"), now)
}

#[test]
fn a_page_answers_first_and_then_tells_all() {
    let now = "2026-01-02T03:04:05Z".parse().unwrap();
    let mut record = record(now);
    record.begin("step_script", now - SignedDuration::from_secs(100));
    record.end(
        "step_script",
        Duration::from_secs(99),
        Ending::Script {
            code: 3,
            hints: Vec::new(),
        },
    );
    record.begin("after_script", now - SignedDuration::from_secs(1));
    record.end("after_script", Duration::from_millis(500), Ending::Succeeded);
    let outcome = Outcome::ScriptFailed {
        stage: "step_script".into(),
        code: 3,
        hints: Vec::new(),
    };
    assert_eq!(
        shown(&record, Some(outcome), now),
        "\
Failed: the script ended with exit code 3 in step_script.

Job      aaaa1111-7-2
Name     unit
Project  grp/demo
GitLab   https://gitlab.example.com
Image    registry.example.com/vm:1
Digest   sha256:00ff
Started  2026-01-02 03:01:55 UTC, 2m ago
Removed  2026-01-02 03:04:05 UTC

PHASE   TOOK     SHARE
image   0.02 s     1 %
boot    3.0 s     99 %   ##############################

STAGE          TOOK     ENDED
prepare        3.0 s    succeeded
step_script    99.0 s   exit code 3
after_script   0.5 s    succeeded

The end of the guest's serial log:
  | first
  | last
"
    );
}

#[test]
fn the_first_line_of_a_job_that_is_here_says_what_it_does_or_why_it_failed() {
    let now = Timestamp::now();
    let ready = record(now);
    let mut preparing = record(now);
    preparing.stages.clear();
    preparing.state = State::Booting;
    preparing.begin(PREPARE, now);
    let mut running = record(now);
    running.state = State::Running;
    running.begin("step_script", now);
    let mut failed = record(now);
    failed.state = State::Running;
    failed.begin("step_script", now);
    failed.end(
        "step_script",
        Duration::from_secs(1),
        Ending::Script {
            code: 3,
            hints: Vec::new(),
        },
    );
    failed.begin("after_script", now);
    let mut left = record(now);
    left.caller.started += 1;
    let mut cleaning = record(now);
    cleaning.state = State::Cleaning;
    for (record, lines) in [
        (&preparing, &["Preparing: booting since 12.0 s."][..]),
        (&ready, &["Ready since 12.0 s, and no script runs."]),
        (&running, &["Running step_script since 12.0 s."]),
        (
            &failed,
            &[
                "Failed: the script ended with exit code 3 in step_script.",
                "Running after_script since 12.0 s.",
            ],
        ),
        (
            &left,
            &[
                "Ready since 12.0 s, and no script runs; the gitlab-runner that began it is gone, and `cannery reap` removes it.",
            ],
        ),
        (&cleaning, &["Being removed since 12.0 s."]),
    ] {
        let page = shown(record, None, now);
        let top: Vec<&str> = page.lines().take_while(|line| !line.is_empty()).collect();
        assert_eq!(top, lines);
    }
}

#[test]
fn what_strangers_wrote_stays_on_its_line() {
    let now = Timestamp::now();
    let mut record = record(now);
    let key: JobKey = record.key.clone();
    for text in [&mut record.project, &mut record.job, &mut record.coordinator] {
        *text = EVIL.to_owned();
    }
    record.image = Some(EVIL.into());
    record.phases[0].name = EVIL.into();
    record.begin(EVIL, now);
    let reason = Reason {
        message: EVIL.into(),
        hints: vec![EVIL.into()],
    };
    record.end(EVIL, Duration::ZERO, Ending::System(reason.clone()));
    let outcome = Outcome::SystemFailed {
        stage: EVIL.into(),
        reason,
    };
    let page = shown(&record, Some(outcome.clone()), now);
    assert!(!page.contains(|c: char| c.is_control() && c != '\n'), "{page:?}");
    assert_eq!(
        page.lines().filter(|line| line.starts_with('b')).count(),
        1,
        "only the phase boot:\n{page}"
    );
    let seen = Seen::remembered(Entry::of(record, outcome, now), "/x".into());
    let cells = super::list::cells(&seen, now).join("|");
    assert!(!cells.contains(char::is_control), "{cells:?}");
    assert!(cells.starts_with(&key.to_string()));
}
