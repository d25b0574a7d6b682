use super::super::backend::Unix;
use super::*;

fn admission(machine: &str, ticket: &str) -> Admission {
    Admission {
        ticket: ticket.to_owned(),
        viewer: "someone".to_owned(),
        machine: machine.to_owned(),
        mode: Mode::Full,
        kinds: Kinds::default(),
        backend: Arc::new(Unix {
            path: "/nowhere".into(),
            ticket: None,
            likeness: "none".to_owned(),
        }),
    }
}

fn registry(sessions: usize) -> Arc<Registry> {
    Arc::new(Registry::new(&Limits {
        sessions,
        ..Limits::default()
    }))
}

pub(super) fn open(registry: &Arc<Registry>, machine: &str, ticket: &str) -> Result<Live, NotNow> {
    let from = "192.0.2.1:1".parse().unwrap();
    registry.open(
        admission(machine, ticket),
        &Secret::new(ticket),
        from,
        registry.now(),
    )
}

#[test]
fn a_later_channel_belongs_to_the_session_with_its_number_and_its_ticket() {
    let registry = registry(9);
    let one = open(&registry, "a", "first").unwrap();
    let other = open(&registry, "b", "second").unwrap();
    let find = |ticket: &str, id| match registry.find(&Secret::new(ticket), id) {
        Found::Session(session) => session.machine.clone(),
        other => format!("{other:?}"),
    };
    assert_eq!(
        find("first", 7),
        "NoSuchSession",
        "before the machine gave it a number"
    );
    one.session.id.set(7).unwrap();
    other.session.id.set(8).unwrap();
    assert_eq!(find("first", 7), "a");
    assert_eq!(find("second", 8), "b");
    assert_eq!(find("second", 7), "NoSuchSession", "someone else's number");
    assert_eq!(find("third", 7), "NoSuchTicket");
    one.session.finish(End::Revoked);
    assert_eq!(find("first", 7), "NoSuchSession", "ended, though not gone yet");
    drop(one);
    assert_eq!(find("first", 7), "NoSuchTicket");
}

#[test]
fn ends_reach_those_that_are_meant_and_the_first_reason_counts() {
    let registry = registry(9);
    let [one, two, three] = [("a", "x"), ("b", "y"), ("b", "z")]
        .map(|(machine, ticket)| open(&registry, machine, ticket).unwrap());
    assert_eq!(registry.end(Whose::Machine("b"), &End::MachineGone), 2);
    assert_eq!(registry.end(Whose::Ticket("z"), &End::Revoked), 1);
    assert_eq!(two.session.ended(), Some(End::MachineGone));
    assert_eq!(three.session.ended(), Some(End::MachineGone));
    assert_eq!(one.session.ended(), None);
    assert_eq!(registry.end(Whose::Number(one.session.number), &End::Revoked), 1);
    assert_eq!(one.session.ended(), Some(End::Revoked));
}

#[test]
fn a_session_that_was_admitted_before_its_machine_ended_does_not_begin_after() {
    let registry = registry(9);
    let from = "192.0.2.1:1".parse().unwrap();
    let since = registry.now();
    registry.end(Whose::Machine("a"), &End::MachineGone);
    let begin = |machine: &str, since| {
        registry
            .open(admission(machine, "t"), &Secret::new("t"), from, since)
            .map(|_| ())
    };
    assert_eq!(begin("a", since), Err(NotNow::Over));
    assert_eq!(begin("b", since), Ok(()));
    assert_eq!(
        begin("a", registry.now()),
        Ok(()),
        "a new machine of the same name"
    );
}

#[test]
fn there_are_no_more_sessions_than_allowed_and_no_more_channels() {
    let registry = registry(1);
    let one = open(&registry, "a", "x").unwrap();
    assert_eq!(open(&registry, "b", "y").map(|_| ()), Err(NotNow::Full));
    let seats = [one.session.seat(2), one.session.seat(2)];
    assert!(seats.iter().all(Option::is_some) && one.session.seat(2).is_none());
    drop(seats);
    assert_eq!(one.session.channels(), 0);
    drop(one);
    assert!(open(&registry, "b", "y").is_ok());
}

#[test]
fn where_too_much_waits_the_slowest_goes_and_those_who_go_already_count_for_nothing() {
    let registry = Arc::new(Registry::new(&Limits {
        untaken_by_all: 100,
        ..Limits::default()
    }));
    let [one, two, three] = [("a", "x"), ("b", "y"), ("c", "z")]
        .map(|(machine, ticket)| open(&registry, machine, ticket).unwrap());
    one.session.owes(30);
    two.session.owes(70);
    registry.relieve();
    assert!(registry.live().iter().all(|session| session.ended().is_none()));
    three.session.owes(40);
    registry.relieve();
    // It has not gone yet, and nobody else has to.
    registry.relieve();
    let ends = [&one, &two, &three].map(|live| live.session.ended());
    assert_eq!(ends, [None, Some(End::Stalled), None]);
}
