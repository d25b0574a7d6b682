//! The console's pages: who gets in, who does not, and when it ends. Jobs without machines do, except for the last test.

#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(clippy::print_stdout, reason = "what a terminal showed is shown")]

mod support;

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::time::Duration;

use cannery::record::{Caller, JobDir, JobKey, Jobs, Record, State};
use cannery::ticket::{self, Grant, Mode};
use futures_util::SinkExt;
use jiff::{SignedDuration, Timestamp};
use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};
use support::console::{API_TOKEN, Browser, Place, Served, read_until, type_in};
use support::host::{EMULATION, Host};
use support::kills::KILL_AT;
use support::stages::Stages;
use support::until;
use tokio_tungstenite::tungstenite::Message;

/// A console with two jobs that have no machines.
struct Scene {
    folder: tempfile::TempDir,
    place: Place,
    served: Served,
    jobs: Jobs,
}

impl Scene {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        let place = Place::new();
        let settings = folder.path().join("cannery.toml");
        let text = format!("state_dir = \"{}\"\n{}", state.display(), place.settings());
        std::fs::write(&settings, text).unwrap();
        Self {
            served: place.serve(&settings),
            jobs: Jobs::open(&state).unwrap(),
            place,
            folder,
        }
    }

    fn settings(&self) -> PathBuf {
        self.folder.path().join("cannery.toml")
    }

    fn job(&self, id: u64) -> JobDir {
        let now = Timestamp::now();
        let key = JobKey::new("https://gitlab.example.com", id, 0);
        let mut record = Record::new(key, "/tmp/x".into(), Caller::this(), now, now);
        record.project = "group/project".into();
        record.job = "unit".into();
        let job = self.jobs.create(record).unwrap();
        std::fs::write(job.file("serial.log"), "the kernel speaks\n").unwrap();
        job
    }
}

fn ticket(job: &JobDir, mode: Mode, minutes: i64, viewers: u32) -> String {
    let now = Timestamp::now();
    let expires = now.saturating_add(SignedDuration::from_mins(minutes)).unwrap();
    let grant = Grant::new(mode, now, expires, viewers, "root".into());
    ticket::mint(job, &grant).unwrap().0.reveal().to_owned()
}

fn session(job: &JobDir) -> String {
    format!("/jobs/{}/session", job.key())
}

fn serial(job: &JobDir) -> String {
    format!("/jobs/{}/serial", job.key())
}

async fn status(browser: &Browser, path: &str) -> u16 {
    browser.get(path).await.status().as_u16()
}

#[tokio::test]
async fn only_the_right_ticket_opens_a_machine_and_nothing_else_says_anything_about_it() {
    let scene = Scene::new();
    let (job, other) = (scene.job(1), scene.job(2));
    let key = job.key().to_string();
    let mut browser = scene.place.browser();

    // The page is the same for a job that is here and for one that is not.
    let page = browser.get(&format!("/jobs/{key}")).await;
    let policy = page.headers()["content-security-policy"]
        .to_str()
        .unwrap()
        .to_owned();
    assert!(
        policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"),
        "{policy}"
    );
    let none = browser.get("/jobs/aaaa1111-9-9").await;
    assert_eq!(
        (page.status(), page.text().await.unwrap()),
        (none.status(), none.text().await.unwrap())
    );
    assert_eq!(status(&browser, &session(&job)).await, 401);
    assert_eq!(browser.open(&serial(&job)).await.err(), Some(401));
    assert_eq!(
        browser.open(&format!("/jobs/{key}/terminal")).await.err(),
        Some(401)
    );

    let expired = ticket(&job, Mode::Full, -1, 1);
    let foreign = ticket(&other, Mode::Full, 5, 1);
    let taken = ticket(&job, Mode::Full, 5, 1);
    let id = ticket::list(&job).unwrap().pop().unwrap().0;
    ticket::revoke(&job, &id).unwrap();
    for wrong in ["", "x", &key, &expired, &foreign, &taken] {
        assert_eq!(browser.enter(&key, wrong).await, 403, "{wrong}");
    }
    assert_eq!(browser.enter("aaaa1111-9-9", &foreign).await, 403);
    assert!(browser.cookie.is_none());

    let right = ticket(&job, Mode::Full, 5, 1);
    assert_eq!(browser.enter(&key, &right).await, 204);
    let shown: Value = browser.get(&session(&job)).await.json().await.unwrap();
    assert_eq!(
        (&shown["project"], &shown["mode"]),
        (&json!("group/project"), &json!("full"))
    );
    // Once more than it allows; but the same browser is in already.
    assert_eq!(scene.place.browser().enter(&key, &right).await, 409);
    assert_eq!(browser.enter(&key, &right).await, 200);
    // The cookie is this machine's.
    assert_eq!(status(&browser, &session(&other)).await, 401);
    let answer = browser.ask(Method::DELETE, &session(&job), &[], None).await;
    assert_eq!(answer.status(), 204);
    assert_eq!(status(&browser, &session(&job)).await, 401);
}

#[tokio::test]
async fn a_link_opens_the_page_until_cleanup_and_the_console_warns_of_it_when_it_starts() {
    let scene = Scene::new();
    let job = scene.job(1);
    let key = job.key().to_string();
    let now = Timestamp::now();
    // As old as no job gets.
    let minted = now.saturating_sub(SignedDuration::from_hours(1000)).unwrap();
    let grant = Grant::new(Mode::Full, minted, ticket::WITH_THE_JOB, 1, "the job log".into());
    let (text, _) = ticket::mint(&job, &grant).unwrap();
    let mut browser = scene.place.browser();
    assert_eq!(browser.enter(&key, text.reveal()).await, 204);
    let mut socket = browser.open(&serial(&job)).await.unwrap();
    read_until(&mut socket, "speaks").await;
    drop(job.enter(State::Cleaning, |_| ()).unwrap());
    let (said, ended) = read_until(&mut socket, "").await;
    assert!(ended && said.contains("the machine is gone"), "{said}");
    assert_eq!(scene.place.browser().enter(&key, text.reveal()).await, 403);

    let other = Place::new();
    let settings = scene.folder.path().join("link.toml");
    let state = scene.folder.path().join("other");
    let text = format!(
        "state_dir = \"{}\"\n{}access = \"link\"\n",
        state.display(),
        other.settings()
    );
    std::fs::write(&settings, text).unwrap();
    let served = other.serve_and_read(&settings, 2);
    let warning = served.said.lines().nth(1).unwrap();
    assert!(
        warning.contains("warning: console.access is \"link\""),
        "{warning}"
    );
}

#[tokio::test]
async fn other_sites_and_other_names_get_nothing() {
    let scene = Scene::new();
    let job = scene.job(1);
    let mut browser = scene.place.browser();
    assert_eq!(
        browser
            .enter(&job.key().to_string(), &ticket(&job, Mode::Full, 5, 5))
            .await,
        204
    );
    for evil in [
        "https://evil.example.com",
        "null",
        "https://localhost",
        "http://localhost",
    ] {
        let leave = browser
            .ask(Method::DELETE, &session(&job), &[("origin", evil)], None)
            .await;
        assert_eq!(leave.status(), 403, "{evil}");
        assert_eq!(
            browser.open_from(evil, &serial(&job)).await.err(),
            Some(403),
            "{evil}"
        );
    }
    // A name that leads here without being ours, as a site that rebinds its own does.
    let page = browser
        .ask(Method::GET, &session(&job), &[("host", "evil.example.com")], None)
        .await;
    assert_eq!(page.status(), 403);
    assert_eq!(status(&browser, &session(&job)).await, 200);
    for path in [
        "/assets/..%2fserver.key",
        "/assets/server.key",
        "/assets/",
        "/assets/api",
    ] {
        assert_eq!(status(&browser, path).await, 404, "{path}");
    }
    assert_eq!(status(&browser, "/assets/xterm.js").await, 200);
}

#[tokio::test]
async fn sockets_close_when_the_ticket_goes_or_the_job_is_cleaned_up() {
    let scene = Scene::new();
    let (one, two) = (scene.job(1), scene.job(2));
    let mut sockets = Vec::new();
    for job in [&one, &two] {
        let mut browser = scene.place.browser();
        let text = ticket(job, Mode::ViewOnly, 5, 1);
        assert_eq!(browser.enter(&job.key().to_string(), &text).await, 204);
        let mut socket = browser.open(&serial(job)).await.unwrap();
        let (text, ended) = read_until(&mut socket, "speaks").await;
        assert!(!ended, "{text}");
        sockets.push((browser, socket));
    }
    // A log that grows is followed, and what a viewer sends is not looked at.
    let (browser, mut socket) = sockets.remove(0);
    socket.send(Message::text("x")).await.unwrap();
    std::fs::write(one.file("serial.log"), "the kernel speaks\nand speaks on\n").unwrap();
    read_until(&mut socket, "speaks on").await;

    let id = ticket::list(&one).unwrap().pop().unwrap().0;
    ticket::revoke(&one, &id).unwrap();
    let (text, ended) = read_until(&mut socket, "").await;
    assert!(ended && text.contains("taken away"), "{text}");
    assert_eq!(status(&browser, &session(&one)).await, 401);

    let (_browser, mut socket) = sockets.remove(0);
    drop(two.enter(State::Cleaning, |_| ()).unwrap());
    let (text, ended) = read_until(&mut socket, "").await;
    assert!(ended && text.contains("the machine is gone"), "{text}");

    // The last lines are written after the viewers were told.
    let events = [
        "session-opened",
        "channel-opened",
        "channel-closed",
        "session-closed",
    ];
    until("each has come and gone twice", Duration::from_secs(10), || {
        let audit = scene.place.audit();
        let count = |event: &str| audit.iter().filter(|line| line["event"] == event).count();
        events.iter().all(|event| count(event) == 2)
    });
    let audit = scene.place.audit();
    let closed = audit
        .iter()
        .find(|line| line["event"] == "channel-closed")
        .unwrap();
    assert!(closed["bytes_sent"].as_u64().unwrap() > 10, "{closed}");
}

#[tokio::test]
async fn a_session_has_so_many_terminals_and_logs_and_a_place_that_is_left_is_free() {
    let scene = Scene::new();
    let job = scene.job(1);
    let mut browser = scene.place.browser();
    let text = ticket(&job, Mode::Full, 5, 1);
    assert_eq!(browser.enter(&job.key().to_string(), &text).await, 204);
    let mut sockets = Vec::new();
    for _ in 0..40 {
        let mut socket = browser.open(&serial(&job)).await.unwrap();
        read_until(&mut socket, "speaks").await;
        sockets.push(socket);
    }
    assert_eq!(browser.open(&serial(&job)).await.err(), Some(429));
    drop(sockets.pop());
    let mut tries = 0;
    while browser.open(&serial(&job)).await.is_err() {
        tries += 1;
        assert!(tries < 100, "its place stays taken");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn the_api_wants_its_secret_and_lists_ends_mints_and_counts() {
    let scene = Scene::new();
    let job = scene.job(1);
    let key = job.key().to_string();
    let mut browser = scene.place.browser();
    let secret = format!("Bearer {API_TOKEN}");
    let wrong = format!("Bearer {}", "x".repeat(API_TOKEN.len()));
    for path in ["/api/sessions", "/metrics"] {
        assert_eq!(status(&browser, path).await, 401);
        let answer = browser
            .ask(Method::GET, path, &[("authorization", &wrong)], None)
            .await;
        assert_eq!(answer.status(), 401);
    }
    assert_eq!(browser.get("/healthz").await.text().await.unwrap(), "ok\n");
    let api = [("authorization", secret.as_str())];
    let order = json!({"job": key, "mode": "view-only", "seconds": 60, "viewers": 1});
    let minted = browser
        .ask(Method::POST, "/api/tickets", &api, Some(order.to_string()))
        .await;
    assert_eq!(minted.status(), 201);
    let minted: Value = minted.json().await.unwrap();
    assert_eq!(
        minted["page"],
        json!(format!("{}/jobs/{key}", scene.place.origin()))
    );
    let absent = json!({"job": "aaaa1111-9-9"}).to_string();
    let answer = browser
        .ask(Method::POST, "/api/tickets", &api, Some(absent))
        .await;
    assert_eq!(answer.status(), 404);

    assert_eq!(browser.enter(&key, minted["ticket"].as_str().unwrap()).await, 204);
    let mut socket = browser.open(&serial(&job)).await.unwrap();
    read_until(&mut socket, "speaks").await;
    let list: Value = browser
        .ask(Method::GET, "/api/sessions", &api, None)
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(
        (&list[0]["job"], &list[0]["mode"], &list[0]["channels"]),
        (&json!(key), &json!("view-only"), &json!(1))
    );
    let counts = browser
        .ask(Method::GET, "/metrics", &api, None)
        .await
        .text()
        .await
        .unwrap();
    for line in [
        "cannery_console_sessions 1",
        "cannery_console_channels 1",
        "cannery_console_screen_connections_waiting 0",
        "cannery_console_refused_total{reason=\"ticket\"} 4",
    ] {
        assert!(counts.lines().any(|l| l == line), "{line} in {counts}");
    }
    assert!(!counts.contains(&key));
    let path = format!("/api/sessions/{}", list[0]["session"]);
    assert_eq!(browser.ask(Method::DELETE, &path, &api, None).await.status(), 204);
    let (text, ended) = read_until(&mut socket, "").await;
    assert!(ended && text.contains("the host's operator"), "{text}");
    assert_eq!(browser.ask(Method::DELETE, &path, &api, None).await.status(), 404);
}

#[tokio::test]
async fn a_new_certificate_is_used_without_ending_sessions_and_a_stop_says_good_bye() {
    let scene = Scene::new();
    let job = scene.job(1);
    let mut browser = scene.place.browser();
    assert_eq!(
        browser
            .enter(&job.key().to_string(), &ticket(&job, Mode::Full, 5, 1))
            .await,
        204
    );
    let mut socket = browser.open(&serial(&job)).await.unwrap();
    read_until(&mut socket, "speaks").await;

    // One that is no good changes nothing.
    let authority = &scene.place.authority;
    std::fs::write(authority.file("server.pem"), "no certificate").unwrap();
    scene.served.signal(Signal::HUP);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(status(&scene.place.browser(), "/healthz").await, 200);
    // Another authority's: who knows only the first does not trust it.
    let new = Place::new();
    for file in ["server.pem", "server.key"] {
        std::fs::copy(new.authority.file(file), authority.file(file)).unwrap();
    }
    scene.served.signal(Signal::HUP);
    let ca = std::fs::read(new.authority.file("ca.pem")).unwrap();
    let client = reqwest::Client::builder()
        .no_proxy()
        .pool_max_idle_per_host(0)
        .add_root_certificate(reqwest::Certificate::from_pem(&ca).unwrap())
        .build()
        .unwrap();
    let health = format!("{}/healthz", scene.place.origin());
    let mut tries = 0;
    while client.get(&health).send().await.is_err() {
        tries += 1;
        assert!(tries < 100, "the new certificate is not used");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    std::fs::write(job.file("serial.log"), "the kernel speaks\nand speaks on\n").unwrap();
    read_until(&mut socket, "speaks on").await;

    scene.served.signal(Signal::TERM);
    let (text, ended) = read_until(&mut socket, "").await;
    assert!(ended && text.contains("restarted"), "{text}");
    scene.served.ends();
}

#[tokio::test]
async fn the_command_line_mints_lists_and_ends() {
    let scene = Scene::new();
    let job = scene.job(1);
    let key = job.key().to_string();
    let cannery = |arguments: &[&str]| {
        let output = std::process::Command::new(support::host::cannery())
            .arg("--config")
            .arg(scene.settings())
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let address = cannery(&[
        "console",
        "ticket",
        "1",
        "--view-only",
        "--ttl",
        "5m",
        "--viewers",
        "3",
    ]);
    let (page, text) = address.trim().split_once("#ticket=").unwrap();
    assert_eq!(page, format!("{}/jobs/{key}", scene.place.origin()));
    let mut browser = scene.place.browser();
    assert_eq!(browser.enter(&key, text).await, 204);
    let noted = scene.place.audit();
    assert_eq!(
        (&noted[0]["event"], &noted[0]["job"]),
        (&json!("ticket-minted"), &json!(key))
    );
    assert!(!noted[0]["minted_by"].as_str().unwrap().is_empty());
    let list: Value = serde_json::from_str(&cannery(&["console", "list", "--format", "json"])).unwrap();
    assert_eq!(
        (&list[0]["mode"], &list[0]["viewers"]),
        (&json!("view-only"), &json!(3))
    );
    assert!(!list.to_string().contains(text));
    let mut socket = browser.open(&serial(&job)).await.unwrap();
    let ended: Value = serde_json::from_str(&cannery(&["console", "end", "1", "--format", "json"])).unwrap();
    assert_eq!(ended, json!([{"job": key, "ticket": list[0]["ticket"]}]));
    let (said, over) = read_until(&mut socket, "").await;
    assert!(over && said.contains("taken away"), "{said}");
    assert_eq!(cannery(&["console", "list", "--format", "json"]).trim(), "[]");
}

#[test]
#[cfg(debug_assertions)]
fn a_kill_while_a_ticket_is_minted_or_taken_away_leaves_a_ticket_or_none() {
    let scene = Scene::new();
    let job = scene.job(1);
    let call = |arguments: &[&str], at: &str| {
        let mut command = std::process::Command::new(support::host::cannery());
        command
            .arg("--config")
            .arg(scene.settings())
            .args(arguments)
            .env(KILL_AT, at);
        command.output().unwrap()
    };
    for (arguments, at, left) in [
        (&["console", "ticket", "1"][..], "folder-begun", 0),
        (&["console", "ticket", "1"], "file-begun", 0),
        (&["console", "ticket", "1"], "ticket-kept", 1),
        // Nobody was told its text, and it is taken away like any other.
        (&["console", "end", "1"], "ticket-revoked", 0),
    ] {
        let output = call(arguments, at);
        assert_eq!(output.status.signal(), Some(9), "{at}: {output:?}");
        assert!(output.stdout.is_empty(), "{at}");
        assert_eq!(ticket::list(&job).unwrap().len(), left, "{at}");
    }
    // What a kill left half-made is in nobody's way, and goes with the job.
    ticket(&job, Mode::Full, 5, 1);
    let step = job.enter(State::Cleaning, |_| ()).unwrap();
    job.remove(Some(step)).unwrap();
    assert!(!job.path().exists());
}

#[tokio::test]
#[ignore = "needs libvirt and a guest"]
async fn a_terminal_is_the_jobs_user_in_its_project_with_its_variables_until_cleanup() {
    let place = Place::new();
    let host = Host::new(&[], &format!("{EMULATION}{}", place.settings()));
    let image = host.images().add_tiny("tiny", "");
    let project = "/builds/group/project";
    let stages = Stages::new(&host, &image)
        .variable("CUSTOM_ENV_CI_PROJECT_DIR", project)
        .variable("CUSTOM_ENV_SAYING", "it's a \"word\"");
    let served = place.serve(&host.settings());
    let prepare = stages.prepare().ok();
    let page = prepare
        .log
        .lines()
        .find_map(|line| line.split_once(&format!("Console: {}/jobs/", place.origin())))
        .unwrap_or_else(|| panic!("{}", prepare.log));
    let key = page.1.split(' ').next().unwrap().to_owned();
    stages.script(format!("mkdir -p {project}")).ok();

    // Whoever has the whole job log has no ticket.
    let mut stranger = place.browser();
    for word in prepare.log.split_whitespace() {
        assert_ne!(stranger.enter(&key, word).await, 204, "{word}");
    }
    // Those were guesses.
    drop(served);
    let served = place.serve(&host.settings());

    let mint = |arguments: &[&str]| {
        let all = [&["console", "ticket", &key, "--quiet"], arguments].concat();
        host.expect(&all).trim().to_owned()
    };
    let mut author = place.browser();
    assert_eq!(author.enter(&key, &mint(&[])).await, 204);
    let terminal = format!("/jobs/{key}/terminal");
    let mut socket = author.open(&terminal).await.unwrap();
    socket
        .send(Message::text(r#"{"columns":101,"rows":33}"#))
        .await
        .unwrap();
    type_in(
        &mut socket,
        "id -un; pwd; echo \"<$SAYING>\"; tty; stty size; ls -a /dev/shm; echo e\"\"nd\n",
    )
    .await;
    let (seen, ended) = read_until(&mut socket, "\nend").await;
    println!("{seen}");
    assert!(!ended);
    for part in [
        "\nroot\r\n",
        &format!("\n{project}\r\n"),
        "<it's a \"word\">",
        "/dev/pts/",
        "\n33 101\r\n",
    ] {
        assert!(seen.contains(part), "{part:?} in {seen}");
    }
    assert!(!seen.contains(".cannery-"), "{seen}");
    socket
        .send(Message::text(r#"{"columns":60,"rows":20}"#))
        .await
        .unwrap();
    type_in(&mut socket, "stty size; echo e\"\"nd2\n").await;
    let (seen, _) = read_until(&mut socket, "\nend2").await;
    assert!(seen.contains("\n20 60\r\n"), "{seen}");

    // A viewer who may only see is shown this terminal, and types in vain.
    let mut viewer = place.browser();
    assert_eq!(viewer.enter(&key, &mint(&["--view-only"])).await, 204);
    let mut view = viewer.open(&terminal).await.unwrap();
    let (seen, _) = read_until(&mut view, "\nend2").await;
    assert!(seen.contains(project), "{seen}");
    assert!(seen.contains(r#"{"size":{"columns":60,"rows":20}}"#), "{seen}");
    // A newer one is shown as long as it is there.
    let mut newer = author.open(&terminal).await.unwrap();
    newer
        .send(Message::text(r#"{"columns":90,"rows":25}"#))
        .await
        .unwrap();
    type_in(&mut newer, "echo n\"\"ewer; echo e\"\"nd\n").await;
    let (seen, _) = read_until(&mut view, "\nend\r").await;
    assert!(
        seen.contains("newer") && seen.contains(r#""columns":90"#),
        "{seen}"
    );
    drop(newer);
    let (seen, _) = read_until(&mut view, "\nend2").await;
    assert!(seen.contains(project), "{seen}");
    type_in(&mut view, "touch /tmp/typed\n").await;
    type_in(
        &mut socket,
        "for i in 1 2 3; do sleep 1; done; ls /tmp/typed; echo e\"\"nd3\n",
    )
    .await;
    let (seen, _) = read_until(&mut view, "\nend3").await;
    assert!(seen.contains("No such file"), "{seen}");

    // Much output comes whole, and Ctrl-C gets through while it comes.
    type_in(&mut socket, "seq 1 20000; echo e\"\"nd4\n").await;
    let (seen, _) = read_until(&mut socket, "\nend4").await;
    assert!((1..=20_000).all(|n| seen.contains(&format!("\n{n}\r\n"))));
    type_in(&mut socket, "yes\n").await;
    read_until(&mut socket, "y\r\ny\r\n").await;
    type_in(&mut socket, "\u{3}").await;
    type_in(&mut socket, "echo e\"\"nd5\n").await;
    read_until(&mut socket, "\nend5").await;

    // A script beside it does not mind it, and cleanup closes everything.
    stages.script("true").ok();
    let cleaned = stages.cleanup();
    let (text, over) = read_until(&mut socket, "").await;
    assert!(over && text.contains("the machine is gone"), "{text}");
    let (_, over) = read_until(&mut view, "").await;
    assert!(over);
    cleaned.ok();
    stages.nothing_is_left();
    let audit = place.audit();
    let closed = audit.iter().filter(|line| line["event"] == "channel-closed");
    closed.for_each(|line| println!("{line}"));
    drop(served);
}
