//! Signing in to the console with GitLab: Developers of the job's project and above, and nobody else.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use cannery::record::{Caller, JobDir, JobKey, Jobs, Record};
use jiff::Timestamp;
use reqwest::{Method, Response};
use support::console::{Browser, Place, Served, read_until};
use support::gitlab::{APPLICATION, GitLab, PROJECT, SECRET};

/// Roles, as GitLab's API numbers them.
const REPORTER: u32 = 20;
const DEVELOPER: u32 = 30;
const OWNER: u32 = 50;

struct Scene {
    _folder: tempfile::TempDir,
    place: Place,
    gitlab: GitLab,
    jobs: Jobs,
    _served: Served,
}

impl Scene {
    fn new(roles: &[(u64, u32)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        let place = Place::new();
        let gitlab = GitLab::start(&place.authority, roles);
        let secret = place.authority.file("secret");
        std::fs::write(&secret, format!("{SECRET}\n")).unwrap();
        let text = format!(
            "state_dir = \"{}\"\n{}gitlab_url = \"{}/\"\ngitlab_application = \"{APPLICATION}\"\n\
             gitlab_secret_file = \"{}\"\ngitlab_ca_file = \"{}\"\n",
            state.display(),
            place.settings(),
            gitlab.url(),
            secret.display(),
            place.authority.file("ca.pem").display(),
        );
        let settings = folder.path().join("cannery.toml");
        std::fs::write(&settings, text).unwrap();
        Self {
            _served: place.serve(&settings),
            jobs: Jobs::open(&state).unwrap(),
            gitlab,
            place,
            _folder: folder,
        }
    }

    fn job(&self, coordinator: &str, project: &str) -> JobDir {
        let now = Timestamp::now();
        let mut record = Record::new(
            JobKey::new(coordinator, 1, 0),
            "/tmp/x".into(),
            Caller::this(),
            now,
            now,
        );
        record.coordinator = coordinator.to_owned();
        record.project = project.to_owned();
        let job = self.jobs.create(record).unwrap();
        std::fs::write(job.file("serial.log"), "the kernel speaks\n").unwrap();
        job
    }
}

fn header(answer: &Response, name: &str) -> String {
    answer.headers()[name].to_str().unwrap().to_owned()
}

/// The first cookie that an answer sets.
fn cookie(answer: &Response) -> String {
    header(answer, "set-cookie").split(';').next().unwrap().to_owned()
}

/// Sets out for GitLab: where to, and the browser has its cookie.
async fn set_out(browser: &mut Browser, key: &str) -> String {
    let answer = browser.get(&format!("/jobs/{key}/login")).await;
    assert_eq!(answer.status(), 303);
    browser.cookie = Some(cookie(&answer));
    header(&answer, "location")
}

/// Comes back as GitLab sends it: with no `Origin` of ours.
async fn come_back(browser: &Browser, path: &str) -> Response {
    browser.ask(Method::GET, path, &[("origin", "null")], None).await
}

#[tokio::test]
async fn a_developer_gets_in_and_a_reporter_a_stranger_and_another_projects_owner_do_not() {
    let scene = Scene::new(&[(1, DEVELOPER), (2, REPORTER), (4, OWNER)]);
    let job = scene.job(&scene.gitlab.url(), PROJECT);
    let key = job.key().to_string();
    for (user, role_is_enough) in [(1, true), (2, false), (3, false), (4, true)] {
        let mut browser = scene.place.browser();
        let address = set_out(&mut browser, &key).await;
        let back = scene.gitlab.sign_in(&address, user);
        let answer = come_back(&browser, &back).await;
        assert_eq!(answer.status(), 303);
        let location = header(&answer, "location");
        if !role_is_enough {
            assert_eq!(location, format!("/jobs/{key}#refused=role"), "{user}");
            continue;
        }
        assert_eq!(location, format!("/jobs/{key}"), "{user}");
        browser.cookie = Some(cookie(&answer));
        let mut socket = browser.open(&format!("/jobs/{key}/serial")).await.unwrap();
        read_until(&mut socket, "speaks").await;
        // The code, the state and the way back are used up, which a person reads.
        let again = come_back(&browser, &back).await;
        assert_eq!(again.status(), 403);
        assert!(header(&again, "content-type").starts_with("text/html"));
        assert!(again.text().await.unwrap().contains("This sign-in was not begun"));
    }
    assert_eq!(scene.gitlab.given_back(), 4);

    // A role in this project says nothing about another one, and one at this GitLab nothing about another.
    let other = scene.job("https://gitlab.example.com", PROJECT);
    let mut browser = scene.place.browser();
    for key in [other.key().to_string(), "aaaa1111-9-9".to_owned()] {
        let address = set_out(&mut browser, &key).await;
        let answer = come_back(&browser, &scene.gitlab.sign_in(&address, 4)).await;
        assert_eq!(header(&answer, "location"), format!("/jobs/{key}#refused=role"));
    }
    let audit = scene.place.audit();
    let who: Vec<&str> = audit
        .iter()
        .filter(|line| line["event"] == "session-opened")
        .filter_map(|line| line["minted_by"].as_str())
        .collect();
    assert_eq!(who, ["gitlab:user1", "gitlab:user4"]);
}

#[tokio::test]
async fn who_makes_codes_up_is_not_passed_on_to_gitlab_without_end() {
    let scene = Scene::new(&[(1, DEVELOPER)]);
    let key = scene.job(&scene.gitlab.url(), PROJECT).key().to_string();
    let mut statuses = Vec::new();
    for _ in 0..21 {
        let mut browser = scene.place.browser();
        let address = set_out(&mut browser, &key).await;
        let back = scene.gitlab.sign_in(&address, 1);
        let (path, query) = back.split_once('?').unwrap();
        let state = query.split('&').nth(1).unwrap();
        let answer = come_back(&browser, &format!("{path}?code=made-up&{state}")).await;
        statuses.push(answer.status().as_u16());
    }
    assert_eq!(statuses[..20], [303; 20]);
    assert_eq!(statuses[20], 429);
}

#[tokio::test]
async fn who_denies_is_told_so_and_gitlabs_own_troubles_are_nobodys_guesses() {
    let scene = Scene::new(&[(1, DEVELOPER)]);
    let key = scene.job(&scene.gitlab.url(), PROJECT).key().to_string();
    let mut browser = scene.place.browser();
    // GitLab sends them back without a code, and is not asked about it.
    let address = set_out(&mut browser, &key).await;
    let back = scene.gitlab.sign_in(&address, 1);
    let state = back.split('&').nth(1).unwrap();
    let denied = format!("/oauth/callback?error=access_denied&{state}");
    let answer = come_back(&browser, &denied).await;
    assert_eq!(header(&answer, "location"), format!("/jobs/{key}#refused=denied"));
    assert_eq!(scene.gitlab.asked(), 0);
    assert_eq!(come_back(&browser, &denied).await.status(), 403);

    scene.gitlab.gets_into_trouble();
    for _ in 0..21 {
        let address = set_out(&mut browser, &key).await;
        let answer = come_back(&browser, &scene.gitlab.sign_in(&address, 1)).await;
        assert_eq!(header(&answer, "location"), format!("/jobs/{key}#refused=gitlab"));
    }
}

#[tokio::test]
async fn a_sign_in_that_another_browser_began_or_that_was_tampered_with_opens_nothing() {
    let scene = Scene::new(&[(1, DEVELOPER)]);
    let job = scene.job(&scene.gitlab.url(), "another/project");
    let key = job.key().to_string();
    // Whoever lures somebody to the end of a sign-in of their own.
    let (mut mine, mut theirs) = (scene.place.browser(), scene.place.browser());
    let address = set_out(&mut mine, &key).await;
    set_out(&mut theirs, &key).await;
    let back = scene.gitlab.sign_in(&address, 1);
    assert_eq!(come_back(&theirs, &back).await.status(), 403);
    assert_eq!(come_back(&scene.place.browser(), &back).await.status(), 403);
    // With a code that was made for another sign-in, PKCE's proof is missing.
    let other = set_out(&mut theirs, &key).await;
    let (path, query) = back.split_once('?').unwrap();
    let code = query.split('&').next().unwrap();
    let state = scene.gitlab.sign_in(&other, 1);
    let state = state.split('&').nth(1).unwrap().to_owned();
    let answer = come_back(&theirs, &format!("{path}?{code}&{state}")).await;
    assert_eq!(header(&answer, "location"), format!("/jobs/{key}#refused=code"));
    // And the role is asked in the job's own project.
    let address = set_out(&mut mine, &key).await;
    let answer = come_back(&mine, &scene.gitlab.sign_in(&address, 1)).await;
    assert_eq!(header(&answer, "location"), format!("/jobs/{key}#refused=role"));
}
