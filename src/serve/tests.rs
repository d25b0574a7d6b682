use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use jiff::{SignedDuration, Timestamp};

use super::*;
use crate::console::{Denied, Refusal};
use crate::record::{Caller, JobDir, JobKey, Record};
use crate::settings::Sources;
use crate::ticket::{Grant, Mode};

const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
const ELSEWHERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));

/// A console that listens nowhere, and a job.
pub(super) struct Place {
    folder: tempfile::TempDir,
    pub(super) house: House,
    job: JobDir,
}

impl Place {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let text = format!(
            "state_dir = \"{}\"\n[console]\nurl = \"https://ci.example.com\"\ncertificate = \"/c\"\nkey = \"/k\"\n\
             audit_log = \"{}\"\n",
            path("state"),
            path("audit.log")
        );
        let file = crate::settings::parse(&text, Path::new("x")).unwrap();
        let settings = Settings::resolve(file, Path::new("x"), &Sources::default()).unwrap();
        let console = settings.console.clone().unwrap();
        let house = House::new(settings, console).unwrap();
        let now = Timestamp::now();
        let key = JobKey::new("https://gitlab.example.com", 1, 0);
        let record = Record::new(key, "/tmp/x".into(), Caller::this(), now, now);
        let job = house.jobs.create(record).unwrap();
        Self { folder, house, job }
    }

    /// A ticket that outlasts every test.
    fn ticket(&self) -> Secret {
        self.ticket_for(Mode::Full)
    }

    fn ticket_for(&self, mode: Mode) -> Secret {
        let now = Timestamp::now();
        let expires = now.saturating_add(SignedDuration::from_hours(1)).unwrap();
        let grant = Grant::new(mode, now, expires, 9, "root".into());
        crate::ticket::mint(&self.job, &grant).unwrap().0
    }

    /// The status that a browser gets for this text.
    fn show(&self, text: &str, from: IpAddr, now: Instant) -> u16 {
        let redeemed = site::redeem(&self.house, self.job.key(), text, from, now);
        match redeemed.and_then(|redeemed| site::begin(&self.house, redeemed, from)) {
            Ok(_) => 204,
            Err(refused) => refused.0.as_u16(),
        }
    }

    /// The session that a ticket opens.
    pub(super) fn session(&self) -> Arc<session::Session> {
        self.session_that(Mode::Full)
    }

    /// The session that a ticket of this mode opens.
    pub(super) fn session_that(&self, mode: Mode) -> Arc<session::Session> {
        let ticket = self.ticket_for(mode);
        let redeemed = site::redeem(&self.house, self.job.key(), ticket.reveal(), HERE, Instant::now());
        let cookie = site::begin(&self.house, redeemed.unwrap(), HERE).unwrap();
        let session = self.house.sessions.of(cookie.reveal(), self.job.key());
        session.unwrap()
    }

    fn audit_log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("audit.log")).unwrap()
    }
}

#[tokio::test]
async fn who_guesses_tickets_waits_a_minute_and_is_counted_but_never_written_down() {
    let place = Place::new();
    let ticket = place.ticket();
    let (begin, second) = (Instant::now(), Duration::from_secs(1));
    let answers: Vec<u16> = (0..22)
        .map(|n| place.show(&format!("{n:040}"), HERE, begin + second * n))
        .collect();
    assert_eq!(answers[..20], [403; 20]);
    assert_eq!(answers[20..], [429; 2]);
    assert_eq!(place.show(ticket.reveal(), HERE, begin + second * 59), 429);
    assert_eq!(place.audit_log(), "");
    assert_eq!(place.show(ticket.reveal(), ELSEWHERE, begin + second * 59), 204);
    assert_eq!(place.show(ticket.reveal(), HERE, begin + second * 60), 204);
    assert_eq!(place.audit_log().lines().count(), 2);
    let counts = &place.house.counts;
    assert_eq!((counts.refused_ticket.get(), counts.refused_often.get()), (20, 3));
}

#[test]
fn each_who_is_refused_a_screen_is_counted_once_and_nobody_is_named() {
    let counts = Counts::default();
    for why in [
        Refusal::Crowded,
        Refusal::Tls(std::io::ErrorKind::UnexpectedEof.into()),
        Refusal::NoTicket,
        Refusal::Denied(Denied::Unknown),
        Refusal::Denied(Denied::Used),
        Refusal::Taken,
    ] {
        counts.refused(&why);
    }
    let refused: Vec<u64> = [
        &counts.refused_connections,
        &counts.refused_handshake,
        &counts.refused_ticket,
        &counts.refused_full,
        &counts.refused_screen,
    ]
    .map(count::Count::get)
    .to_vec();
    assert_eq!(refused, [1, 1, 2, 1, 1]);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_is_held_back_is_given_up_after_a_while() {
    use axum::body::{Body, to_bytes};
    let whole = async |body: Body| {
        let request = axum::http::Request::post("/").body(body).unwrap();
        let whole = site::whole(request).await;
        whole
            .map(|request| request.into_body())
            .map_err(|refused| refused.0.as_u16())
    };
    let half = futures_util::stream::once(async { Ok::<_, std::io::Error>("{\"ticket\":") });
    let half = futures_util::StreamExt::chain(half, futures_util::stream::pending());
    assert_eq!(whole(Body::from_stream(half)).await.unwrap_err(), 408);
    assert_eq!(whole(" ".repeat(5000).into()).await.unwrap_err(), 413);
    let all = to_bytes(whole("{}".into()).await.unwrap(), 9).await.unwrap();
    assert_eq!(all, b"{}"[..]);
}

#[tokio::test]
async fn who_is_refused_a_screen_is_counted_but_never_written_down() {
    let place = Place::new();
    let from = SocketAddr::new(HERE, 1);
    for _ in 0..3 {
        let (near, mut far) = tokio::io::duplex(4096);
        // No handshake of SPICE begins like this.
        tokio::io::AsyncWriteExt::write_all(&mut far, b"GET / HTTP/1.1\r\n\r\n")
            .await
            .unwrap();
        Arc::clone(&place.house.proxy).serve(near, from).await;
    }
    assert_eq!(place.house.counts.refused_handshake.get(), 3);
    assert_eq!(place.audit_log(), "");
}

proptest::proptest! {
    #[test]
    fn a_cookie_is_found_among_whatever_else_a_browser_sends(before in "[^;=]*", after in "[ -~]*", value in "[0-9a-f]{40}") {
        let all = format!("{before}=x; mine={value};{after}");
        let mut headers = axum::http::HeaderMap::new();
        // What is no header never gets so far.
        if let Ok(header) = axum::http::HeaderValue::from_bytes(all.as_bytes()) {
            headers.append(axum::http::header::COOKIE, header);
            let found = site::cookie(&headers, "mine").any(|found| found == value);
            proptest::prop_assert!(found || !all.is_ascii());
        }
    }
}
