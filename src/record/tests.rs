use super::*;

fn record(coordinator: &str, id: u64) -> Record {
    let now = Timestamp::now();
    let key = JobKey::new(coordinator, id, 0);
    Record {
        coordinator: coordinator.into(),
        project: "grp/demo".into(),
        job: "unit".into(),
        phases: vec![Phase {
            name: "image".into(),
            seconds: 0.25,
        }],
        ..Record::new(key, "/tmp/x/response.json".into(), Caller::this(), now, now)
    }
}

#[test]
fn a_record_from_before_stages_were_noted_is_read_and_what_is_not_known_is_passed_over() {
    let text = include_str!("fixtures/record-without-stages.json");
    let state = tempfile::tempdir().unwrap();
    let job = Jobs::open(state.path())
        .unwrap()
        .create(record("https://gitlab.example.com", 1234))
        .unwrap();
    for text in [
        text.to_owned(),
        text.replacen('{', "{\"of_a_later_version\": {\"x\": []},", 1),
    ] {
        std::fs::write(job.file("record.json"), text).unwrap();
        let read = job.read().unwrap().unwrap();
        assert_eq!(read.key, *job.key());
        assert_eq!(
            (read.state, read.stages.len(), &read.outcome),
            (State::Running, 0, &None)
        );
        assert_eq!(read.runs, []);
        // The run that goes was begun by the older cannery and is ended by this one.
        drop(
            job.enter(State::Ready, |r| {
                r.end(
                    "build_script",
                    std::time::Duration::from_secs(1),
                    Ending::Succeeded,
                );
            })
            .unwrap(),
        );
        assert_eq!(job.read().unwrap().unwrap().stages, []);
    }
}

#[test]
fn a_call_that_never_ended_was_killed_once_the_next_begins() {
    let mut record = record("https://a.example.com", 7);
    let now = Timestamp::now();
    let took = std::time::Duration::from_millis(1500);
    record.begin(PREPARE, now);
    assert_eq!(record.open_stage().unwrap().name, PREPARE);
    record.end(PREPARE, took, Ending::Succeeded);
    assert!(record.open_stage().is_none());
    record.begin("step_script", now);
    record.begin("after_script", now);
    // It comes too late to say how it ended.
    record.end(
        "step_script",
        took,
        Ending::Script {
            code: 3,
            hints: Vec::new(),
        },
    );
    record.end("after_script", took, Ending::Succeeded);
    let told: Vec<_> = record
        .stages
        .iter()
        .map(|s| (s.name.as_str(), s.seconds, s.ending.clone().unwrap()))
        .collect();
    assert_eq!(
        told,
        [
            (PREPARE, Some(1.5), Ending::Succeeded),
            ("step_script", None, Ending::Killed),
            ("after_script", Some(1.5), Ending::Succeeded),
        ]
    );
}

#[test]
fn a_note_changes_no_state_and_none_is_taken_once_the_job_is_being_cleaned_up() {
    let state = tempfile::tempdir().unwrap();
    let job = Jobs::open(state.path())
        .unwrap()
        .create(record("https://a.example.com", 7))
        .unwrap();
    job.note(|r| r.image = Some("x".into())).unwrap();
    let read = job.read().unwrap().unwrap();
    assert_eq!((read.image.as_deref(), read.state), (Some("x"), State::Admitted));
    drop(
        job.enter(State::Cleaning, |r| assert_eq!(r.state, State::Admitted))
            .unwrap(),
    );
    assert!(matches!(job.note(|_| ()), Err(Error::Gone(_))));
}

#[test]
fn tries_are_numbered_past_those_that_are_remembered() {
    let state = tempfile::tempdir().unwrap();
    let history = state.path().join(HISTORY);
    for name in [
        JobKey::new("https://a.example.com", 7, 4).to_string(),
        JobKey::new("https://b.example.com", 7, 9).to_string(),
        format!(".{}.1", JobKey::new("https://a.example.com", 7, 8)),
        "something-else".to_owned(),
    ] {
        std::fs::create_dir_all(history.join(name)).unwrap();
    }
    let jobs = Jobs::open(state.path()).unwrap();
    for expected in [5, 6] {
        let job = jobs.create(record("https://a.example.com", 7)).unwrap();
        assert_eq!(job.key().attempt, expected);
    }
    std::fs::remove_dir_all(&history).unwrap();
    std::fs::write(&history, "no folder").unwrap();
    let job = jobs.create(record("https://a.example.com", 7)).unwrap();
    assert_eq!(job.key().attempt, 7);
}

#[test]
fn a_record_comes_back_as_it_was_saved_and_attempts_count_up() {
    let state = tempfile::tempdir().unwrap();
    let jobs = Jobs::open(state.path()).unwrap();
    let first = jobs.create(record("https://a.example.com", 7)).unwrap();
    let second = jobs.create(record("https://a.example.com", 7)).unwrap();
    let other = jobs.create(record("https://b.example.com", 7)).unwrap();
    assert_eq!(
        (first.key().attempt, second.key().attempt, other.key().attempt),
        (1, 2, 1)
    );
    assert_eq!(jobs.list().unwrap().len(), 3);
    let read = first.read().unwrap().unwrap();
    assert_eq!(read.key, *first.key());
    assert_eq!(read.phases, record("", 0).phases);
}

#[test]
fn a_folder_that_a_killed_process_began_is_found_and_a_living_ones_is_not() {
    let state = tempfile::tempdir().unwrap();
    assert!(
        Jobs::look(state.path()).list().unwrap().is_empty(),
        "a missing folder has no jobs"
    );
    let jobs = Jobs::open(state.path()).unwrap();
    let mut child = std::process::Command::new("true").spawn().unwrap();
    child.wait().unwrap();
    let folder = |pid: u32| {
        state
            .path()
            .join("jobs")
            .join(format!(".{}.{pid}", JobKey::new("x", 1, 1)))
    };
    std::fs::create_dir(folder(child.id())).unwrap();
    std::fs::create_dir(folder(1)).unwrap();
    std::fs::create_dir(state.path().join("jobs/.something.7")).unwrap();
    assert_eq!(jobs.unborn().unwrap(), [folder(child.id())]);
    assert!(jobs.list().unwrap().is_empty());
}

#[test]
fn nothing_is_added_to_a_job_that_is_being_cleaned_up() {
    let state = tempfile::tempdir().unwrap();
    let job = Jobs::open(state.path())
        .unwrap()
        .create(record("https://a.example.com", 7))
        .unwrap();
    drop(
        job.enter(State::Fetching, |r| r.image = Some("x".into()))
            .unwrap(),
    );
    assert_eq!(job.read().unwrap().unwrap().image.as_deref(), Some("x"));
    let cleaning = job.enter(State::Cleaning, |_| ()).unwrap();
    drop(cleaning);
    assert!(matches!(job.enter(State::Starting, |_| ()), Err(Error::Gone(_))));
    let again = job.enter(State::Cleaning, |_| ()).unwrap();
    std::fs::create_dir(job.file("keys")).unwrap();
    std::fs::write(job.file("keys").join("user"), "x").unwrap();
    job.remove(Some(again)).unwrap();
    assert!(!job.path().exists());
    job.remove(None).unwrap();
    assert!(matches!(job.enter(State::Cleaning, |_| ()), Err(Error::Gone(_))));
}

#[test]
fn two_processes_cannot_be_in_a_step_of_one_job_at_once() {
    let state = tempfile::tempdir().unwrap();
    let job = Jobs::open(state.path())
        .unwrap()
        .create(record("https://a.example.com", 7))
        .unwrap();
    let step = job.enter(State::Starting, |_| ()).unwrap();
    let other = job.clone();
    let waiting = std::thread::spawn(move || other.enter(State::Cleaning, |_| ()).map(|s| s.record.state));
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert!(!waiting.is_finished());
    drop(step);
    assert_eq!(waiting.join().unwrap().unwrap(), State::Cleaning);
}

#[test]
fn what_was_decided_before_the_lock_is_decided_again_behind_it() {
    let state = tempfile::tempdir().unwrap();
    let job = Jobs::open(state.path())
        .unwrap()
        .create(record("https://a.example.com", 7))
        .unwrap();
    let refused = job
        .enter_if(State::Cleaning, |r| r.project == "other", |_| ())
        .unwrap();
    assert!(refused.is_none());
    assert_eq!(job.read().unwrap().unwrap().state, State::Admitted);
    assert!(
        job.enter_if(State::Cleaning, |r| r.project == "grp/demo", |_| ())
            .unwrap()
            .is_some()
    );
}

#[test]
fn a_folder_is_removed_though_others_look_into_it_meanwhile() {
    let state = tempfile::tempdir().unwrap();
    let jobs = Jobs::open(state.path()).unwrap();
    for id in 0..3 {
        let job = jobs.create(record("https://a.example.com", id)).unwrap();
        std::thread::scope(|scope| {
            let others: Vec<_> = (0..2)
                .map(|_| scope.spawn(|| while job.enter(State::Cleaning, |_| ()).is_ok() {}))
                .collect();
            let step = job.enter(State::Cleaning, |_| ()).unwrap();
            job.remove(Some(step)).unwrap();
            others.into_iter().for_each(|o| o.join().unwrap());
        });
    }
}

#[test]
fn a_newer_or_damaged_record_is_named() {
    let state = tempfile::tempdir().unwrap();
    let job = Jobs::open(state.path())
        .unwrap()
        .create(record("https://a.example.com", 7))
        .unwrap();
    std::fs::write(job.file("record.json"), r#"{"version": 99}"#).unwrap();
    assert!(matches!(job.read(), Err(Error::Newer { version: 99, .. })));
    std::fs::write(job.file("record.json"), "{").unwrap();
    assert!(matches!(job.read(), Err(Error::Damaged { .. })));
    std::fs::remove_file(job.file("record.json")).unwrap();
    assert_eq!(job.read().unwrap(), None);
}

#[test]
fn only_forward_or_to_cleaning() {
    use State::*;
    let all = [
        Admitted, Fetching, Cloning, Starting, Booting, Ready, Running, Cleaning,
    ];
    for from in all {
        assert!(from.may_become(Cleaning));
        assert!(!from.may_become(Admitted), "{from}");
    }
    assert!(Booting.may_become(Cloning) && !Ready.may_become(Cloning));
    assert!(Ready.may_become(Running) && Running.may_become(Ready) && Running.may_become(Running));
    assert!(!Booting.may_become(Starting) && !Cleaning.may_become(Ready) && !Ready.may_become(Booting));
}

proptest::proptest! {
    #[test]
    fn a_key_reads_back_and_nothing_else_reads_as_a_key(url in ".*", id: u64, attempt: u32, junk in "[0-9a-f./-]{0,40}") {
        let key = JobKey::new(&url, id, attempt);
        proptest::prop_assert_eq!(key.to_string().parse(), Ok(key));
        if let Ok(key) = junk.parse::<JobKey>() {
            proptest::prop_assert_eq!(key.to_string(), junk);
        }
    }
}

#[test]
fn only_a_lack_of_room_is_called_full() {
    let error = |kind: std::io::ErrorKind| Error::Io {
        action: "write",
        path: "/x".into(),
        source: kind.into(),
    };
    assert!(error(std::io::ErrorKind::StorageFull).is_full());
    assert!(error(std::io::ErrorKind::QuotaExceeded).is_full());
    assert!(!error(std::io::ErrorKind::PermissionDenied).is_full());
    assert!(!Error::Gone(JobKey::new("https://a.example.com", 7, 1)).is_full());
}
