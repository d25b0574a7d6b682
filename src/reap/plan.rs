//! What is left behind, decided from facts alone.

use std::fmt;
use std::path::PathBuf;

use jiff::Timestamp;

use crate::host::Lease;
use crate::record::{JobKey, Record, State};

/// What there is.
#[derive(Debug, Default)]
pub struct World {
    /// Every job's folder.
    pub jobs: Vec<Found>,
    /// Every domain that carries this state folder's tag, by name and job.
    pub domains: Vec<(String, JobKey)>,
    /// Every leased slot.
    pub leases: Vec<Lease>,
    /// Folders that killed processes began to make for jobs.
    pub unborn: Vec<PathBuf>,
}

/// A job's folder, and what is known of those who may want it.
#[derive(Debug)]
pub struct Found {
    /// The job.
    pub key: JobKey,
    /// Its record; none where the folder has none, or a damaged one.
    pub record: Option<Record>,
    /// Is the gitlab-runner process that called there?
    pub caller_alive: bool,
    /// Was the host rebooted since?
    pub rebooted: bool,
    /// Did the runner remove the try that the job belongs to?
    pub session_over: bool,
    /// Does libvirt not know its machine any more?
    pub machine_gone: bool,
    /// Is the record a newer cannery's, or out of reach? Then it is not ours to judge.
    pub foreign: bool,
}

impl Found {
    /// A folder of which nothing more is known.
    pub fn unknown(key: JobKey) -> Self {
        Found {
            key,
            record: None,
            caller_alive: false,
            rebooted: false,
            session_over: false,
            machine_gone: false,
            foreign: false,
        }
    }
}

/// Why something is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// Its folder has no readable record: a kill in the middle of a removal.
    NoRecord,
    /// Its removal was begun and not ended.
    HalfRemoved,
    /// The host was rebooted.
    Rebooted,
    /// The gitlab-runner that began it is gone.
    RunnerGone,
    /// gitlab-runner ended its try and did not clean up.
    TryOver,
    /// The job's time and an hour have passed.
    Expired,
    /// The time is over for which its machine was held.
    LeaseOver,
    /// Its machine was held, and has ended.
    MachineGone,
    /// No job's folder belongs to it.
    NoJob,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Why::NoRecord => "its folder has no readable record",
            Why::HalfRemoved => "its removal was begun and not ended",
            Why::Rebooted => "the host was rebooted",
            Why::RunnerGone => "the gitlab-runner that began it is gone",
            Why::TryOver => "gitlab-runner ended it without cleaning up",
            Why::Expired => "its time-out has passed by an hour",
            Why::LeaseOver => "the time for which it was held is over",
            Why::MachineGone => "its machine was held and has ended",
            Why::NoJob => "no job belongs to it",
        })
    }
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Remove a job with all that it has.
    RemoveJob(JobKey, Why),
    /// Remove a domain whose job is gone.
    DestroyDomain(String, JobKey, Why),
    /// Free a slot whose job is gone.
    FreeSlot(Lease, Why),
    /// Remove a folder that never became a job's.
    RemoveFolder(PathBuf, Why),
}

/// What to do about what there is. Whatever a live runner may still want is left alone.
pub fn plan(world: &World, now: Timestamp) -> Vec<Action> {
    let mut actions: Vec<Action> = world
        .jobs
        .iter()
        .filter_map(|job| judge(job, now).map(|why| Action::RemoveJob(job.key.clone(), why)))
        .collect();
    let known = |key: &JobKey| world.jobs.iter().any(|j| j.key == *key);
    actions.extend(
        world
            .domains
            .iter()
            .filter(|(_, key)| !known(key))
            .map(|(name, key)| Action::DestroyDomain(name.clone(), key.clone(), Why::NoJob)),
    );
    actions.extend(
        world
            .leases
            .iter()
            .filter(|lease| !lease.job.as_ref().is_some_and(known))
            .map(|lease| Action::FreeSlot(lease.clone(), Why::NoJob)),
    );
    actions.extend(
        world
            .unborn
            .iter()
            .map(|path| Action::RemoveFolder(path.clone(), Why::NoJob)),
    );
    actions
}

/// Why nobody will come back for a job, if so.
pub(super) fn judge(job: &Found, now: Timestamp) -> Option<Why> {
    if job.foreign {
        return None;
    }
    let Some(record) = &job.record else {
        return Some(Why::NoRecord);
    };
    if record.state == State::Cleaning {
        Some(Why::HalfRemoved)
    } else if job.rebooted {
        Some(Why::Rebooted)
    } else if record.held_until(now).is_some() {
        // Whoever began the job has no say any more, nor has its time-out.
        (record.state == State::Held && job.machine_gone).then_some(Why::MachineGone)
    } else if record.state == State::Held {
        Some(Why::LeaseOver)
    } else if !job.caller_alive {
        Some(Why::RunnerGone)
    } else if job.session_over {
        Some(Why::TryOver)
    } else if now > record.deadline {
        Some(Why::Expired)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Caller, Held, Holder};

    fn found(id: u64) -> Found {
        let now = Timestamp::now();
        let key = JobKey::new("https://gitlab.example.com", id, 1);
        let deadline = now + jiff::SignedDuration::from_hours(2);
        let record = Record {
            state: State::Running,
            ..Record::new(key.clone(), "/x".into(), Caller::this(), now, deadline)
        };
        Found {
            key,
            record: Some(record),
            caller_alive: true,
            rebooted: false,
            session_over: false,
            machine_gone: false,
            foreign: false,
        }
    }

    /// A job that is over, and whose machine is held for an hour.
    fn held(now: Timestamp) -> Found {
        let mut job = found(1);
        let record = job.record.as_mut().unwrap();
        record.state = State::Held;
        record.held = Some(Held {
            until: now + jiff::SignedDuration::from_hours(1),
            by: Holder::Failure,
        });
        job
    }

    #[test]
    fn a_held_machine_stays_until_its_lease_is_over_or_it_ends() {
        let now = Timestamp::now();
        type Change = fn(&mut Found);
        // The runner has long forgotten the job.
        let cases: [(Change, &[Why]); 5] = [
            (|_| (), &[]),
            (|f| (f.caller_alive, f.session_over) = (false, true), &[]),
            (
                |f| f.record.as_mut().unwrap().deadline = Timestamp::UNIX_EPOCH,
                &[],
            ),
            (|f| f.rebooted = true, &[Why::Rebooted]),
            (|f| f.machine_gone = true, &[Why::MachineGone]),
        ];
        for (change, expected) in cases {
            let mut job = held(now);
            change(&mut job);
            let world = World {
                jobs: vec![job],
                ..World::default()
            };
            assert_eq!(whys(&world, now), expected);
            let later = now + jiff::SignedDuration::from_mins(61);
            assert_eq!(whys(&world, later).len(), 1, "{expected:?}");
        }
        let world = World {
            jobs: vec![held(now)],
            ..World::default()
        };
        let later = now + jiff::SignedDuration::from_mins(61);
        assert_eq!(whys(&world, later), [Why::LeaseOver]);
    }

    #[test]
    fn a_machine_that_is_to_be_held_outlives_its_runner_and_not_its_lease() {
        let now = Timestamp::now();
        let mut job = held(now);
        job.record.as_mut().unwrap().state = State::Ready;
        job.caller_alive = false;
        // Nobody looks yet whether it has ended: its own calls notice that.
        job.machine_gone = true;
        let world = World {
            jobs: vec![job],
            ..World::default()
        };
        assert!(whys(&world, now).is_empty());
        let later = now + jiff::SignedDuration::from_mins(61);
        assert_eq!(whys(&world, later), [Why::RunnerGone]);
    }

    fn whys(world: &World, now: Timestamp) -> Vec<Why> {
        let why = |action: &Action| match action {
            Action::RemoveJob(_, why)
            | Action::DestroyDomain(_, _, why)
            | Action::FreeSlot(_, why)
            | Action::RemoveFolder(_, why) => *why,
        };
        plan(world, now).iter().map(why).collect()
    }

    #[test]
    fn what_a_live_runner_may_want_is_left_alone() {
        let job = found(1);
        let domains = vec![("cannery-x".to_owned(), job.key.clone())];
        let world = World {
            jobs: vec![job],
            domains,
            leases: Vec::new(),
            unborn: Vec::new(),
        };
        assert!(plan(&world, Timestamp::now()).is_empty());
    }

    #[test]
    fn what_a_newer_version_wrote_is_left_alone() {
        let job = Found {
            record: None,
            foreign: true,
            ..found(1)
        };
        assert!(
            plan(
                &World {
                    jobs: vec![job],
                    ..World::default()
                },
                Timestamp::now()
            )
            .is_empty()
        );
    }

    #[test]
    fn each_reason_alone_is_enough() {
        let now = Timestamp::now();
        type Change = fn(&mut Found);
        let cases: [(Why, Change); 5] = [
            (Why::NoRecord, |f| f.record = None),
            (Why::HalfRemoved, |f| {
                f.record.as_mut().unwrap().state = State::Cleaning
            }),
            (Why::Rebooted, |f| f.rebooted = true),
            (Why::RunnerGone, |f| f.caller_alive = false),
            (Why::TryOver, |f| f.session_over = true),
        ];
        for (why, change) in cases {
            let mut job = found(1);
            change(&mut job);
            assert_eq!(
                whys(
                    &World {
                        jobs: vec![job],
                        ..World::default()
                    },
                    now
                ),
                [why]
            );
        }
        let world = World {
            jobs: vec![found(1)],
            ..World::default()
        };
        assert_eq!(
            whys(&world, now + jiff::SignedDuration::from_hours(3)),
            [Why::Expired]
        );
    }

    #[test]
    fn domains_and_slots_without_a_job_go() {
        let state = tempfile::tempdir().unwrap();
        let slots = crate::host::Slots::open(state.path()).unwrap();
        let (mine, gone) = (found(1), JobKey::new("https://gitlab.example.com", 2, 1));
        let room = crate::host::Capacity {
            machines: 9,
            network: "n",
            slots: 9,
        };
        slots.admit(&room, &mine.key).unwrap();
        slots.admit(&room, &gone).unwrap();
        let domains = vec![("a".to_owned(), mine.key.clone()), ("b".to_owned(), gone.clone())];
        let world = World {
            jobs: vec![mine],
            domains,
            leases: slots.leases().unwrap(),
            unborn: vec!["/x/jobs/.y".into()],
        };
        let actions = plan(&world, Timestamp::now());
        assert_eq!(actions.len(), 3);
        assert_eq!(actions[2], Action::RemoveFolder("/x/jobs/.y".into(), Why::NoJob));
        assert_eq!(
            actions[0],
            Action::DestroyDomain("b".into(), gone.clone(), Why::NoJob)
        );
        assert!(matches!(&actions[1], Action::FreeSlot(lease, Why::NoJob) if lease.job == Some(gone)));
    }
}
