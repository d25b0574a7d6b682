use super::*;
use crate::record::{Caller, Jobs, Record};
use crate::ticket::Grant;

struct Place {
    _folder: tempfile::TempDir,
    job: JobDir,
    sessions: Sessions,
}

impl Place {
    fn new(most: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let jobs = Jobs::open(folder.path()).unwrap();
        let now = Timestamp::now();
        let key = JobKey::new("https://gitlab.example.com", 1, 0);
        let record = Record::new(key, "/tmp/x".into(), Caller::this(), now, now);
        Self {
            job: jobs.create(record).unwrap(),
            sessions: Sessions::new(most, Arc::default(), Arc::default()),
            _folder: folder,
        }
    }

    fn ticket(&self, viewers: u32) -> Redeemed {
        let now = Timestamp::now();
        let later = now.saturating_add(jiff::SignedDuration::from_mins(1)).unwrap();
        let grant = Grant::new(Mode::Full, now, later, viewers, "root".into());
        let (text, _) = ticket::mint(&self.job, &grant).unwrap();
        ticket::redeem_for(&self.job, text.reveal(), now)
            .unwrap()
            .unwrap()
    }

    fn open(&self, ticket: &Redeemed) -> Result<Secret, Full> {
        self.sessions.open(ticket.clone(), [127, 0, 0, 1].into()).unwrap()
    }
}

#[test]
fn a_ticket_has_no_more_viewers_than_it_allows_and_a_place_that_is_left_is_free() {
    let place = Place::new(10);
    let ticket = place.ticket(2);
    let first = place.open(&ticket).unwrap();
    place.open(&ticket).unwrap();
    assert_eq!(place.open(&ticket).unwrap_err(), Full::Ticket);
    place.open(&place.ticket(1)).unwrap();
    let session = place.sessions.of(first.reveal(), place.job.key()).unwrap();
    place.sessions.end(&session, End::Left);
    assert!(place.sessions.of(first.reveal(), place.job.key()).is_none());
    place.open(&ticket).unwrap();
}

#[test]
fn a_host_has_no_more_sessions_than_it_allows() {
    let place = Place::new(1);
    place.open(&place.ticket(9)).unwrap();
    assert_eq!(place.open(&place.ticket(9)).unwrap_err(), Full::Host);
}

#[test]
fn a_cookie_is_good_for_its_own_machine_only() {
    let place = Place::new(10);
    let cookie = place.open(&place.ticket(1)).unwrap();
    let other = "aaaa1111-7-1".parse().unwrap();
    assert!(place.sessions.of(cookie.reveal(), &other).is_none());
    assert!(place.sessions.of("", place.job.key()).is_none());
}

#[tokio::test]
async fn taking_the_ticket_away_ends_its_sessions_and_no_other() {
    let place = Place::new(10);
    let (one, two) = (place.ticket(1), place.ticket(1));
    let (first, second) = (place.open(&one).unwrap(), place.open(&two).unwrap());
    let session = place.sessions.of(first.reveal(), place.job.key()).unwrap();
    place.sessions.look(Instant::now());
    assert_eq!(place.sessions.size().0, 2);
    ticket::revoke(&place.job, &one.id).unwrap();
    place.sessions.look(Instant::now());
    assert_eq!(session.ended().await, End::Revoked);
    assert!(place.sessions.of(second.reveal(), place.job.key()).is_some());
}

#[test]
fn an_expired_ticket_goes_with_the_last_session_of_it_and_one_that_is_good_stays() {
    let place = Place::new(10);
    let ticket = place.ticket(2);
    let end = |cookie: &Secret| {
        let session = place.sessions.of(cookie.reveal(), place.job.key()).unwrap();
        place.sessions.end(&session, End::Left);
    };
    let holds = || ticket::holds(&place.job, &ticket.id).unwrap();
    end(&place.open(&ticket).unwrap());
    assert!(holds());
    let mut expired = ticket.clone();
    expired.grant.expires = expired.grant.minted;
    let (one, two) = (place.open(&expired).unwrap(), place.open(&expired).unwrap());
    end(&one);
    assert!(holds(), "somebody is there by it");
    end(&two);
    assert!(!holds());
}

#[test]
fn a_sessions_end_is_noted_once_and_with_all_that_its_channels_carried() {
    let mut place = Place::new(10);
    let log = place._folder.path().join("audit.log");
    place.sessions.audit = Arc::new(Audit::open(Some(&log)).unwrap());
    let closed = || {
        let text = std::fs::read_to_string(&log).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
        let closed = lines.filter(|line: &serde_json::Value| line["event"] == "session-closed");
        closed.collect::<Vec<_>>()
    };
    let cookie = place.open(&place.ticket(1)).unwrap();
    let session = place.sessions.of(cookie.reveal(), place.job.key()).unwrap();
    let [mut one, mut two] = ["main", "display"].map(|name| place.sessions.channel(&session, name));
    place.sessions.end(&session, End::Admin);
    place.sessions.end(&session, End::Left);
    // What a screen carried is known when it closes.
    one.sent(1000);
    drop(one);
    two.received(7);
    assert_eq!(closed().len(), 0);
    drop(two);
    let closed = closed();
    assert_eq!(closed.len(), 1);
    assert_eq!(closed[0]["bytes_sent"], 1000);
    assert_eq!(closed[0]["bytes_received"], 7);
    assert_eq!(closed[0]["reason"], End::Admin.to_string());
    assert_eq!(closed[0]["minted_by"], "root");
    assert_eq!(closed[0]["session"], session.number);
}

#[tokio::test]
async fn an_open_channel_keeps_a_session_and_without_one_it_ends_after_a_while() {
    let place = Place::new(10);
    let cookie = place.open(&place.ticket(1)).unwrap();
    let session = place.sessions.of(cookie.reveal(), place.job.key()).unwrap();
    let mut channel = place.sessions.channel(&session, "terminal");
    channel.sent(5);
    let later = Instant::now() + IDLE * 2;
    place.sessions.look(later);
    assert_eq!(place.sessions.size(), (1, 1));
    drop(channel);
    place.sessions.look(later);
    assert_eq!(session.ended().await, End::Time);
}

#[tokio::test]
async fn a_session_outlives_its_page_for_as_long_as_the_file_is_good_that_it_handed_out() {
    let place = Place::new(10);
    let cookie = place.open(&place.ticket(1)).unwrap();
    let session = place.sessions.of(cookie.reveal(), place.job.key()).unwrap();
    let now = Instant::now();
    session.keep(IDLE * 3, now);
    // The page is closed.
    drop(place.sessions.channel(&session, "terminal"));
    place.sessions.look(now + IDLE * 3 - Duration::from_secs(1));
    assert!(session.is_live());
    place.sessions.look(now + IDLE * 3 + Duration::from_secs(1));
    assert_eq!(session.ended().await, End::Time);
}
