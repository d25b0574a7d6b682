use std::collections::BTreeSet;

use jiff::SignedDuration;

use super::*;
use crate::record::{Caller, Record};

const COORDINATOR: &str = "https://gitlab.example.com";

struct Place {
    _folder: tempfile::TempDir,
    jobs: Jobs,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let jobs = Jobs::open(folder.path()).unwrap();
        Self {
            _folder: folder,
            jobs,
        }
    }

    fn job(&self, id: u64) -> JobDir {
        let now = Timestamp::now();
        let key = JobKey::new(COORDINATOR, id, 0);
        let record = Record::new(key, "/tmp/x".into(), Caller::this(), now, now);
        self.jobs.create(record).unwrap()
    }
}

fn grant() -> Grant {
    let now = Timestamp::now();
    Grant::new(
        Mode::Full,
        now,
        now.saturating_add(SignedDuration::from_mins(5)).unwrap(),
        2,
        "root".into(),
    )
}

#[test]
fn a_ticket_opens_its_machine_and_no_other() {
    let place = Place::new();
    let (one, other) = (place.job(1), place.job(2));
    let (text, id) = mint(&one, &grant()).unwrap();
    let now = Timestamp::now();
    let redeemed = redeem(&place.jobs, text.reveal(), now).unwrap().unwrap();
    assert_eq!((&redeemed.job, &redeemed.id), (&one, &id));
    assert_eq!(redeemed.grant.viewers, 2);
    assert_eq!(
        redeem_for(&other, text.reveal(), now).unwrap(),
        Err(Refusal::Unknown)
    );
    for wrong in ["", "x", &text.reveal()[1..], "../record", &id.0, &"a".repeat(61)] {
        assert_eq!(
            redeem(&place.jobs, wrong, now).unwrap(),
            Err(Refusal::Unknown),
            "{wrong}"
        );
    }
}

#[test]
fn nothing_on_disk_tells_the_ticket() {
    let place = Place::new();
    let job = place.job(1);
    let (text, _) = mint(&job, &grant()).unwrap();
    let mut files = 0;
    for entry in fs::read_dir(job.file(FOLDER)).unwrap() {
        let path = entry.unwrap().path();
        let all = format!("{} {}", path.display(), fs::read_to_string(&path).unwrap());
        assert!(!all.contains(text.reveal()));
        files += 1;
    }
    assert_eq!(files, 1);
}

#[test]
fn a_ticket_ends_with_its_time_but_what_it_opened_holds() {
    let place = Place::new();
    let job = place.job(1);
    let grant = grant();
    let (text, id) = mint(&job, &grant).unwrap();
    assert!(redeem_for(&job, text.reveal(), grant.minted).unwrap().is_ok());
    assert_eq!(
        redeem_for(&job, text.reveal(), grant.expires).unwrap(),
        Err(Refusal::Expired)
    );
    assert!(holds(&job, &id).unwrap());
}

#[test]
fn a_ticket_that_is_taken_away_opens_nothing_and_its_sessions_end() {
    let place = Place::new();
    let job = place.job(1);
    let (text, id) = mint(&job, &grant()).unwrap();
    let (_, kept) = mint(&job, &grant()).unwrap();
    assert!(revoke(&job, &id).unwrap());
    assert!(!revoke(&job, &id).unwrap());
    assert_eq!(
        redeem_for(&job, text.reveal(), Timestamp::now()).unwrap(),
        Err(Refusal::Unknown)
    );
    assert!(!holds(&job, &id).unwrap());
    let left: Vec<TicketId> = list(&job).unwrap().into_iter().map(|(id, _)| id).collect();
    assert_eq!(left, [kept]);
}

#[test]
fn tickets_that_opened_what_is_long_over_go_when_another_is_minted() {
    let place = Place::new();
    let job = place.job(1);
    let now = Timestamp::now();
    let ended = |ago: SignedDuration| {
        let expires = now.saturating_sub(ago).unwrap();
        mint(&job, &Grant { expires, ..grant() }).unwrap().1
    };
    let day = SignedDuration::try_from(LONGEST_SESSION).unwrap();
    let second = SignedDuration::from_secs(1);
    let gone = ended(day + second);
    // Somebody may be there by it still.
    let kept = ended(day - second * 60);
    let endless = Grant {
        expires: WITH_THE_JOB,
        ..grant()
    };
    let (_, endless) = mint(&job, &endless).unwrap();
    let last = mint(&job, &grant()).unwrap().1;
    let left: BTreeSet<TicketId> = list(&job).unwrap().into_iter().map(|(id, _)| id).collect();
    assert_eq!(left, BTreeSet::from([kept, endless, last]));
    assert!(!left.contains(&gone));
}

#[test]
fn an_expired_ticket_that_cannot_be_read_keeps_nobody_from_minting() {
    let place = Place::new();
    let job = place.job(1);
    let (_, id) = mint(&job, &grant()).unwrap();
    fs::write(path(&job, &id), "no ticket").unwrap();
    let (text, _) = mint(&job, &grant()).unwrap();
    assert!(redeem_for(&job, text.reveal(), Timestamp::now()).unwrap().is_ok());
}

#[test]
fn a_job_that_is_cleaned_up_has_no_tickets_though_its_folder_is_there() {
    let place = Place::new();
    let job = place.job(1);
    let (text, id) = mint(&job, &grant()).unwrap();
    let step = job.enter(State::Cleaning, |_| ()).unwrap();
    let now = Timestamp::now();
    assert_eq!(
        redeem(&place.jobs, text.reveal(), now).unwrap(),
        Err(Refusal::Unknown)
    );
    assert!(!holds(&job, &id).unwrap());
    assert!(matches!(mint(&job, &grant()), Err(Error::Gone(_))));
    job.remove(Some(step)).unwrap();
    assert!(matches!(mint(&job, &grant()), Err(Error::Gone(_))));
    assert!(!job.path().exists());
}

#[test]
fn tickets_fit_a_spice_password_and_are_all_different() {
    let texts: BTreeSet<String> = (0..100)
        .map(|_| random_text().unwrap().reveal().to_owned())
        .collect();
    assert_eq!(texts.len(), 100);
    for text in texts {
        assert_eq!(text.len(), 40);
        assert!(text.len() <= LONGEST && text.bytes().all(|b| b.is_ascii_alphanumeric()));
    }
}

#[test]
fn a_ticket_of_a_newer_cannery_opens_nothing() {
    let place = Place::new();
    let job = place.job(1);
    let newer = Grant {
        version: VERSION + 1,
        ..grant()
    };
    let (text, _) = mint(&job, &newer).unwrap();
    assert_eq!(
        redeem_for(&job, text.reveal(), Timestamp::now()).unwrap(),
        Err(Refusal::Unknown)
    );
}
