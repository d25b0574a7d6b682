use std::os::unix::fs::MetadataExt;

use super::*;
use crate::record::{Caller, Ending, PREPARE, State};

fn record(id: u64) -> Record {
    let now = Timestamp::now();
    let key = JobKey::new("https://gitlab.example.com", id, 1);
    let session = "/tmp/custom-executor1/response.json".into();
    Record {
        coordinator: "https://gitlab.example.com".into(),
        project: "grp/demo".into(),
        job: "unit".into(),
        state: State::Ready,
        image: Some("registry.example.com/vm:1".into()),
        ..Record::new(key, session, Caller::this(), now, now)
    }
}

/// A guest that showed nothing but this on its serial port.
fn said(serial: &[u8]) -> Seen {
    Seen {
        serial: serial.to_vec(),
        screen: None,
    }
}

#[test]
fn a_picture_is_kept_and_weighed_with_its_job_unless_it_is_too_large() {
    let state = tempfile::tempdir().unwrap();
    let history = history(state.path(), 60, 1 << 30);
    let showed = |bytes: usize| Seen {
        serial: Vec::new(),
        screen: Some(vec![7; bytes]),
    };
    history.add(&entry(1), &showed(SCREEN_BYTES)).unwrap();
    history.add(&entry(2), &showed(SCREEN_BYTES + 1)).unwrap();
    history.add(&entry(3), &said(b"")).unwrap();
    let file = history.screen(&entry(1).key).unwrap();
    assert_eq!(fs::read(&file).unwrap(), [7; SCREEN_BYTES]);
    assert_eq!(history.screen(&entry(2).key), None);
    assert_eq!(history.screen(&entry(3).key), None);
    let weight = |id| {
        weigh(entry(id).key, &history.entry_dir(&entry(id).key))
            .unwrap()
            .bytes
    };
    assert!(weight(1) > SCREEN_BYTES as u64);
    assert!(weight(2) < SCREEN_BYTES as u64);
}

fn entry(id: u64) -> Entry {
    Entry::of(record(id), Outcome::Succeeded, Timestamp::now())
}

fn history(state: &Path, keep: u64, bytes: u64) -> History {
    let bounds = Bounds {
        keep: Duration::from_secs(keep),
        bytes,
    };
    History::at(state, bounds)
}

/// The names in the folder, in order.
fn names(state: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(state.join(HISTORY))
        .into_iter()
        .flatten()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn made_older(state: &Path, key: &JobKey, age: u64) {
    let dir = File::open(state.join(HISTORY).join(key.to_string())).unwrap();
    dir.set_modified(SystemTime::now() - Duration::from_secs(age))
        .unwrap();
}

#[test]
fn a_job_is_remembered_whole_once_and_for_all_of_the_group() {
    let state = tempfile::tempdir().unwrap();
    let history = history(state.path(), 60, 1 << 20);
    assert_eq!(history.list().unwrap(), []);
    history.tidy().unwrap();
    assert!(names(state.path()).is_empty());

    let first = entry(7);
    history.add(&first, &said(b"booted\x1b[2J\n")).unwrap();
    assert_eq!(history.list().unwrap(), std::slice::from_ref(&first));
    assert_eq!(
        fs::read(history.serial_log(&first.key)).unwrap(),
        b"booted\x1b[2J\n"
    );
    let mode = |path: &Path| path.metadata().unwrap().mode() & 0o7777;
    let dir = state.path().join(HISTORY).join(first.key.to_string());
    assert_eq!(
        (mode(&dir), mode(&dir.join(ENTRY)), mode(&dir.join(SERIAL))),
        (DIR_MODE, ENTRY_MODE, SEEN_MODE)
    );

    // A removal that was killed and is done again says the same; what says something else comes too late.
    let late = Entry {
        outcome: Outcome::Unknown { state: State::Ready },
        ..entry(7)
    };
    history.add(&late, &said(b"")).unwrap();
    assert_eq!(history.list().unwrap(), [first]);
    assert_eq!(names(state.path()).len(), 1);
}

#[test]
fn a_job_without_a_folder_gets_the_next_number() {
    let state = tempfile::tempdir().unwrap();
    let history = history(state.path(), 60, 1 << 20);
    let jobs = Jobs::open(state.path()).unwrap();
    let here = jobs.create(record(7)).unwrap();
    for _ in 0..2 {
        history.add_without_folder(&jobs, entry(7)).unwrap();
    }
    let mut tries: Vec<u32> = history.list().unwrap().iter().map(|e| e.key.attempt).collect();
    tries.sort_unstable();
    assert_eq!((here.key().attempt, tries), (1, vec![2, 3]));
}

#[test]
fn nothing_is_remembered_where_that_is_turned_off_and_what_there_was_goes() {
    let state = tempfile::tempdir().unwrap();
    history(state.path(), 60, 1 << 20)
        .add(&entry(1), &said(b""))
        .unwrap();
    for (keep, bytes) in [(0, 1 << 20), (60, 0)] {
        let off = history(state.path(), keep, bytes);
        off.add(&entry(2), &said(b"")).unwrap();
        off.add_without_folder(&Jobs::open(state.path()).unwrap(), entry(3))
            .unwrap();
        assert_eq!(history(state.path(), 60, 1 << 20).list().unwrap().len(), 1);
    }
    history(state.path(), 0, 1 << 20).tidy().unwrap();
    assert_eq!(names(state.path()), [TIDIED]);
}

#[test]
fn old_entries_go_at_most_once_a_minute_and_at_once_when_told() {
    let state = tempfile::tempdir().unwrap();
    let history = history(state.path(), 60, 1 << 20);
    history.add(&entry(1), &said(b"")).unwrap();
    made_older(state.path(), &entry(1).key, 61);
    history.add(&entry(2), &said(b"")).unwrap();
    history.tidy_if_due().unwrap();
    assert_eq!(names(state.path()), [TIDIED.to_owned(), entry(2).key.to_string()]);
    history.add(&entry(1), &said(b"")).unwrap();
    made_older(state.path(), &entry(1).key, 61);
    history.tidy_if_due().unwrap();
    assert_eq!(history.list().unwrap().len(), 2);
    history.tidy().unwrap();
    assert_eq!(history.list().unwrap().len(), 1);
}

#[test]
fn a_full_history_forgets_the_oldest() {
    let state = tempfile::tempdir().unwrap();
    let serial = vec![b'x'; SERIAL_BYTES];
    let size = |n: u64| n * (OVERHEAD + SERIAL_BYTES as u64 + 1000);
    let history = history(state.path(), 1000, size(3));
    for id in 1..=5 {
        history.add(&entry(id), &said(&serial)).unwrap();
        made_older(state.path(), &entry(id).key, 100 - id);
    }
    history.tidy().unwrap();
    let mut left: Vec<u64> = history.list().unwrap().iter().map(|e| e.key.id).collect();
    left.sort_unstable();
    assert_eq!(left, [3, 4, 5]);
}

#[test]
fn what_a_kill_left_half_written_goes_and_what_is_being_written_stays() {
    let state = tempfile::tempdir().unwrap();
    let history = history(state.path(), 60, 1 << 20);
    history.add(&entry(1), &said(b"")).unwrap();
    let mut child = std::process::Command::new("true").spawn().unwrap();
    child.wait().unwrap();
    let folder = |pid: u32| {
        state
            .path()
            .join(HISTORY)
            .join(format!(".{}.{pid}", entry(2).key))
    };
    for pid in [child.id(), 1] {
        fs::create_dir(folder(pid)).unwrap();
        fs::write(folder(pid).join(ENTRY), "{").unwrap();
    }
    assert_eq!(history.list().unwrap().len(), 1);
    for tidied_just_now in [false, true] {
        history.tidy_if_due().unwrap();
        assert!(
            !folder(child.id()).exists() && folder(1).exists(),
            "{tidied_just_now}"
        );
        fs::create_dir(folder(child.id())).unwrap();
    }
    history.tidy().unwrap();
    assert!(!folder(child.id()).exists() && folder(1).exists());
    // One of this process's own number, from before.
    fs::create_dir(folder(std::process::id())).unwrap();
    fs::write(folder(std::process::id()).join("junk"), "").unwrap();
    history.add(&entry(2), &said(b"")).unwrap();
    assert_eq!(history.list().unwrap().len(), 2);
    assert!(
        !state
            .path()
            .join(HISTORY)
            .join(entry(2).key.to_string())
            .join("junk")
            .exists()
    );
}

#[test]
fn a_damaged_entry_and_a_newer_ones_are_passed_over_and_go_with_time() {
    let state = tempfile::tempdir().unwrap();
    let history = history(state.path(), 60, 1 << 20);
    for (id, text) in [(1, ""), (2, r#"{"version": 99}"#)] {
        history.add(&entry(id), &said(b"")).unwrap();
        let dir = state.path().join(HISTORY).join(entry(id).key.to_string());
        fs::write(dir.join(ENTRY), text).unwrap();
        made_older(state.path(), &entry(id).key, 61);
    }
    history.add(&entry(3), &said(b"")).unwrap();
    assert_eq!(history.list().unwrap().len(), 1);
    history.tidy().unwrap();
    assert_eq!(names(state.path()), [TIDIED.to_owned(), entry(3).key.to_string()]);
}

#[test]
fn a_job_took_until_its_last_call_ended() {
    let mut record = record(1);
    let after = |seconds: i64| record.created + jiff::SignedDuration::from_secs(seconds);
    let (one, two, ten) = (after(1), after(2), after(10));
    assert_eq!(took(&record, &Outcome::Succeeded, ten), None);
    record.begin(PREPARE, one);
    let killed = Outcome::Killed {
        stage: PREPARE.into(),
        state: State::Booting,
    };
    assert_eq!(took(&record, &killed, ten), None);
    assert_eq!(
        took(&record, &Outcome::Cancelled { stage: None }, ten),
        Some(10.0)
    );
    record.end(PREPARE, Duration::from_millis(500), Ending::Succeeded);
    assert_eq!(took(&record, &Outcome::Succeeded, ten), Some(1.5));
    record.begin("step_script", two);
    record.end(
        "step_script",
        Duration::from_secs(3),
        Ending::Script {
            code: 3,
            hints: Vec::new(),
        },
    );
    assert_eq!(took(&record, &Outcome::Succeeded, ten), Some(5.0));
}
