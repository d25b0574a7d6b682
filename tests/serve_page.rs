//! The console's page in a browser: how one gets in, and what it shows where things are missing. Jobs without machines do.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use cannery::record::{Caller, JobDir, JobKey, Jobs, Record};
use cannery::ticket::{self, Grant, Mode, TicketId};
use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use support::chromium::Chromium;
use support::console::Place;

fn job(jobs: &Jobs) -> JobDir {
    let now = Timestamp::now();
    let key = JobKey::new("https://gitlab.example.com", 1, 0);
    let mut record = Record::new(key, "/tmp/x".into(), Caller::this(), now, now);
    record.job = "unit".into();
    let job = jobs.create(record).unwrap();
    std::fs::write(job.file("serial.log"), "the \x1b[31mkernel\x1b[0m speaks\n").unwrap();
    job
}

/// A ticket for one viewer.
fn ticket(job: &JobDir) -> (String, TicketId) {
    let now = Timestamp::now();
    let expires = now.saturating_add(SignedDuration::from_mins(5)).unwrap();
    let grant = Grant::new(Mode::Full, now, expires, 1, "root".into());
    let (text, id) = ticket::mint(job, &grant).unwrap();
    (text.reveal().to_owned(), id)
}

const ENTRY: &str = "!document.getElementById('entry').hidden";
const TABS: &str = "!document.getElementById('tabs').hidden";
const CHOOSE_SERIAL: &str = "document.getElementById('tab-serial').click()";

fn says(word: &str) -> String {
    format!("document.getElementById('message').innerText.includes({word:?})")
}

fn serial(word: &str) -> String {
    format!("document.querySelector('#serial pre')?.innerText.includes({word:?})")
}

#[tokio::test]
#[ignore = "needs chromium"]
async fn a_ticket_that_is_pasted_into_an_open_page_opens_it_and_the_serial_log_needs_no_further_program() {
    let folder = tempfile::tempdir().unwrap();
    let place = Place::new();
    let state = folder.path().join("state");
    let settings = folder.path().join("cannery.toml");
    let text = format!("state_dir = \"{}\"\n{}", state.display(), place.settings());
    std::fs::write(&settings, text).unwrap();
    let _served = place.serve(&settings);
    let job = job(&Jobs::open(&state).unwrap());
    let page = format!("{}/jobs/{}", place.origin(), job.key());
    let mut chromium = Chromium::start().await;

    // The address of the job log, and then the one with the ticket, in the same tab.
    chromium.open(&page).await;
    chromium.until(ENTRY).await;
    let paste = |text: &str| format!("location.hash = 'ticket={text}'");
    let (first, id) = ticket(&job);
    chromium.value(&paste(&first)).await;
    chromium.until(TABS).await;
    assert_eq!(chromium.value("location.href").await, json!(page));
    chromium
        .until("document.getElementById('terminal').innerText.includes('is not installed')")
        .await;
    chromium.value(CHOOSE_SERIAL).await;
    chromium.until(&serial("the kernel speaks")).await;
    // A wrong one changes nothing, and the same one opens no second session.
    chromium.value(&paste("x")).await;
    chromium.until(&says("This did not work")).await;
    chromium.value(&paste(&first)).await;
    chromium
        .until("document.getElementById('message').innerText === ''")
        .await;
    assert_eq!(chromium.value("location.href").await, json!(page));
    assert_eq!(chromium.value(&serial("speaks")).await, json!(true));

    // What has ended says why, and leads back to the entry.
    ticket::revoke(&job, &id).unwrap();
    chromium
        .until(&serial("the ticket was taken away; choose the tab again"))
        .await;
    chromium.value(CHOOSE_SERIAL).await;
    chromium.until(&says("This session is over.")).await;
    chromium.until(ENTRY).await;
    let (second, _) = ticket(&job);
    chromium.value(&paste(&second)).await;
    chromium.until(TABS).await;
    // Another ticket is another session, to which all that is open belongs.
    let (third, _) = ticket(&job);
    chromium.value("document.title = 'before'").await;
    chromium.value(&paste(&third)).await;
    chromium
        .until(&format!("document.title !== 'before' && {TABS}"))
        .await;
    let audit = place.audit();
    let opened = audit.iter().filter(|line| line["event"] == "session-opened");
    assert_eq!(opened.count(), 3);
}
