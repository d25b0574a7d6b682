use proptest::prelude::*;

use super::*;

const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

fn gitlab() -> GitLab {
    let settings = GitLabSettings {
        url: "https://gitlab.example.com".into(),
        application: "app".into(),
        secret_file: None,
        ca_file: None,
    };
    GitLab::new(settings, "https://ci.example.com").unwrap()
}

fn of(address: &str, name: &str) -> String {
    let url = Url::parse(address).unwrap();
    url.query_pairs()
        .find(|(key, _)| key == name)
        .unwrap()
        .1
        .into_owned()
}

#[test]
fn a_sign_in_is_good_once_for_a_while_and_in_the_browser_that_began() {
    let gitlab = gitlab();
    let job: JobKey = "aaaa1111-7-1".parse().unwrap();
    let now = Instant::now();
    let (address, browser) = gitlab.begin(job.clone(), HERE, now).unwrap();
    let state = of(&address, "state");
    assert_eq!(gitlab.aim(&state, browser.reveal()), Some(job.clone()));
    assert!(gitlab.aim(&state, "another").is_none());
    let begun = gitlab.take(&state, browser.reveal(), now).unwrap();
    assert_eq!(begun.job, job);
    // GitLab compares the one with the hash that it was given of the other.
    assert_eq!(
        of(&address, "code_challenge"),
        BASE64.encode(hash(begun.verifier.reveal()))
    );
    assert!(begun.verifier.reveal().len() >= 43);
    assert!(gitlab.take(&state, browser.reveal(), now).is_none());

    let (address, browser) = gitlab.begin(job.clone(), HERE, now).unwrap();
    assert!(gitlab.take(&of(&address, "state"), "another", now).is_none());
    assert!(
        gitlab
            .take(&of(&address, "state"), browser.reveal(), now)
            .is_none(),
        "used up"
    );
    let (address, browser) = gitlab.begin(job, HERE, now).unwrap();
    assert!(
        gitlab
            .take(&of(&address, "state"), browser.reveal(), now + SIGN_IN)
            .is_none()
    );
}

#[test]
fn one_address_pushes_out_its_own_sign_ins_and_all_together_are_so_many() {
    let gitlab = gitlab();
    let now = Instant::now();
    let begin = |from: IpAddr| {
        let (address, browser) = gitlab.begin("aaaa1111-7-1".parse().unwrap(), from, now).unwrap();
        (of(&address, "state"), browser)
    };
    let (state, browser) = begin(HERE);
    let first = begin([192, 0, 2, 9].into());
    for _ in 0..MOST_OF_ONE + 5 {
        begin([192, 0, 2, 9].into());
    }
    assert_eq!(gitlab.begun.lock().unwrap().len(), MOST_OF_ONE + 1);
    assert!(gitlab.aim(&first.0, first.1.reveal()).is_none());
    assert!(gitlab.aim(&state, browser.reveal()).is_some());
    for n in 0..MOST {
        let [_, _, high, low] = u32::try_from(n).unwrap().to_be_bytes();
        begin([10, 0, high, low].into());
    }
    assert_eq!(gitlab.begun.lock().unwrap().len(), MOST);
}

#[test]
fn a_projects_path_is_one_part_of_an_address() {
    assert_eq!(
        escaped("group/sub.group/my_project-1"),
        "group%2Fsub%2Egroup%2Fmy_project-1"
    );
    assert_eq!(escaped("a/../../b?c#d"), "a%2F%2E%2E%2F%2E%2E%2Fb%3Fc%23d");
}

#[test]
fn an_instance_is_known_however_its_address_is_written_and_no_other_is() {
    for (settings, coordinator, expected) in [
        ("https://gitlab.example.com", "https://gitlab.example.com", true),
        ("https://GitLab.Example.com", "https://gitlab.example.com", true),
        (
            "https://gitlab.example.com:443",
            "https://gitlab.example.com",
            true,
        ),
        (
            "https://gitlab.example.com",
            "https://gitlab.example.com:443/",
            true,
        ),
        (
            "https://gitlab.example.com:8443",
            "https://gitlab.example.com",
            false,
        ),
        (
            "https://gitlab.example.com/gitlab",
            "https://gitlab.example.com/gitlab/",
            true,
        ),
        (
            "https://gitlab.example.com/gitlab",
            "https://gitlab.example.com",
            false,
        ),
        ("https://gitlab.example.com", "http://gitlab.example.com", false),
        (
            "https://gitlab.example.com",
            "https://gitlab.example.com.evil.net",
            false,
        ),
        ("https://gitlab.example.com", "", false),
    ] {
        assert_eq!(same(coordinator, settings), expected, "{settings} {coordinator}");
    }
}

proptest! {
    #[test]
    fn an_id_token_says_what_its_middle_holds_and_nothing_else_is_one(
        aud in ".*", nonce in ".*", sub in ".*", cut in any::<proptest::sample::Index>(), odd in ".*",
    ) {
        let payload = serde_json::json!({"aud": aud, "nonce": nonce, "sub": sub, "more": 1}).to_string();
        let token = format!("e30.{}.x", BASE64.encode(&payload));
        let read = claims(&token).unwrap();
        prop_assert_eq!((read.aud, read.nonce, read.sub), (aud, nonce, sub));
        // All of it is ASCII.
        let part = &token[..cut.index(token.len() - "..x".len())];
        prop_assert!(claims(part).is_none());
        prop_assert!(claims(&odd).is_none());
        let (inside, encoded) = (format!("a.{odd}.b"), format!("a.{}.b", BASE64.encode(&odd)));
        prop_assert!(claims(&inside).is_none());
        prop_assert!(claims(&encoded).is_none());
    }
}
