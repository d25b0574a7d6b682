//! prepare: a machine that answers.

use std::path::Path;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};

use super::order::Order;
use super::pull_log::PullLog;
use crate::history::{self, Entry, Removal};
use crate::host::{self, Capacity, Slots};
use crate::image::{Asker, Disk};
use crate::job::{Bounds, Environment, Granted, Identity, Job, Masked, Variables, Wants};
use crate::machine::{Libvirt, network};
use crate::outcome::Failure;
use crate::quantity::Size;
use crate::reap::{self, Reaper};
use crate::record::{self, Caller, Ending, JobDir, JobKey, Jobs, PREPARE, Record, Slot, State};
use crate::report::{self, JobLog, bytes, plain};
use crate::settings::{MachineSettings, Network, Settings};
use crate::start::{self, Hardware, Phases, Plan};

/// No runner wants a job back so long after its time-out: its own clean-up has an hour.
pub(super) const AFTER_TIMEOUT: SignedDuration = SignedDuration::from_hours(1);
/// How often a job asks again for a place.
const PLACE_POLL: Duration = Duration::from_secs(1);
/// A line of `virsh desc`, in characters.
const TITLE_LENGTH: usize = 120;

/// Starts a machine for the job and waits until it answers. What it leaves behind when it fails is cleanup's.
pub async fn prepare(settings: &Settings, environment: &Environment, log: &JobLog) -> Result<(), Failure> {
    let begin = Instant::now();
    let job = Job::read(environment)?;
    let mut course = Course {
        begin,
        phases: Phases::default(),
        record: record(&job),
        folder: None,
    };
    let result = get_ready(settings, environment, &job, log, &mut course).await;
    result.map_err(|failure| {
        let failure = masked(failure, &job.masked);
        if let Err(e) = note_failure(settings, course, &failure) {
            // The job's author is told all the same.
            tracing::warn!("the failure is not noted: {e}");
        }
        failure
    })
}

/// The failure as it may be noted, and as the operator may read it: what GitLab hides from the job's log is hidden here too.
fn masked(failure: Failure, masked: &Masked) -> Failure {
    Failure {
        fault: failure.fault,
        message: masked.hide(&failure.message),
        hints: failure.hints.iter().map(|hint| masked.hide(hint)).collect(),
    }
}

/// How far prepare is, for whoever asks later why it failed.
struct Course {
    begin: Instant,
    phases: Phases,
    /// The record that the job begins with.
    record: Record,
    /// The job's folder, where it has come so far.
    folder: Option<JobDir>,
}

/// Notes why prepare failed: in the job's record, else in the history, since a job without a folder has nothing that is removed.
fn note_failure(settings: &Settings, course: Course, failure: &Failure) -> Result<(), record::Error> {
    let end = |record: &mut Record| {
        record.phases = course.phases.record();
        record.end(PREPARE, course.begin.elapsed(), failure.into());
    };
    let Some(folder) = course.folder else {
        let mut record = course.record;
        end(&mut record);
        let outcome = history::outcome(&record, &Removal::Cleanup, false);
        let entry = Entry::of(record, outcome, Timestamp::now());
        return reap::history(settings).add_without_folder(&Jobs::open(&settings.state_dir)?, entry);
    };
    match folder.note(end) {
        // Somebody removed it meanwhile, and has noted that.
        Err(record::Error::Gone(_)) => Ok(()),
        noted => noted,
    }
}

async fn get_ready(
    settings: &Settings,
    environment: &Environment,
    job: &Job,
    log: &JobLog,
    course: &mut Course,
) -> Result<(), Failure> {
    let wants = Wants::read(environment)?;
    let order = Order::new(job, settings)?;
    course.record.image = Some(order.image.clone());
    if !job.services.is_empty() {
        // The operator wants them ignored, else there were no order; the author must not wait for them.
        let names: Vec<String> = job.services.iter().map(|s| plain(s, 80)).collect();
        log.line(format!(
            "Services are not started on this runner: the job runs without {}.",
            names.join(", ")
        ));
    }
    // What is beyond the operator's limits is refused before an image is fetched for it.
    wants.within(&bounds(&order.machine, None))?;
    course.record.hold = wants
        .hold_within(settings.hold_on_failure, settings.hold_max)?
        .as_secs();
    let credentials = order.credentials(job, &settings.images)?;
    let libvirt = Libvirt::open(&settings.libvirt_uri)?;

    let reaper = Reaper::open(settings)?;
    if let Err(e) = reaper.sweep().await {
        // Others' leftovers are no reason to fail this job; what is wrong with libvirt shows below.
        tracing::warn!("the sweep failed: {e}");
    }
    reaper
        .remove_tries(&job.identity.coordinator, job.identity.id)
        .await?;

    let folder = Jobs::open(&settings.state_dir)?.create(course.record.clone())?;
    course.folder = Some(folder.clone());
    let phases = &mut course.phases;
    let index = admit(settings, &folder, job, &reaper, log).await?;
    let slot = place(settings, &libvirt, index).await?;
    drop(folder.enter(State::Fetching, |r| r.slot = Some(slot.clone()))?);
    let request = super::images::request(
        settings,
        order.reference.clone(),
        order.policies.clone(),
        credentials,
        asker(job, settings),
    )?;
    let store = super::images::store(settings)?;
    let disk = store
        .provide(&request, &PullLog::new(&order.image, log))
        .await
        .map_err(|e| match &job.image {
            Some(_) => Failure::from(e),
            None => Failure::from(e)
                .of_operator()
                .hint("images.default in the settings names it"),
        })?;
    drop(folder.enter(State::Fetching, |r| r.digest = Some(disk.digest.to_string()))?);
    log.line(format!(
        "Image {} ({}{}).",
        order.image,
        short(&disk.digest.to_string()),
        if disk.from_cache {
            ", in the cache".to_owned()
        } else {
            format!(", {} fetched", bytes(disk.fetched_bytes))
        }
    ));
    phases.end("image");

    let granted = grant(&wants, &order.machine, &disk)?;
    let invitation = settings
        .console
        .as_ref()
        .map(|console| super::invite::lines(console, &folder, job.protected));
    let plan = Plan {
        job: &folder,
        state_dir: settings.state_dir.clone(),
        title: plain(&format!("{} {}", job.project, job.name), TITLE_LENGTH),
        hostname: super::hostname(&job.identity),
        uri: settings.libvirt_uri.clone(),
        disk: &disk,
        disk_size: granted.disk.bytes(),
        disk_asked: wants.disk.is_some(),
        slot,
        user: whom(&order, &disk),
        guest: &order.guest,
        folders: [&settings.builds_dir, &settings.cache_dir],
        needs_helper: job.needs_helper,
        runner_version: job.runner_version.as_deref(),
        invitation: invitation.unwrap_or_default().into(),
    };
    let hardware = Hardware {
        libvirt: &libvirt,
        settings: &order.machine,
        granted: &granted,
        disk: &disk,
    };
    let started = start::start(&plan, &hardware, phases, log).await?;
    started.remarks.iter().for_each(|remark| log.line(remark));
    if settings.console.is_some() {
        keep_variables(environment, &folder)?;
    }
    drop(folder.enter(State::Ready, |r| {
        r.guest = Some(started.guest);
        r.phases = phases.record();
        r.end(PREPARE, course.begin.elapsed(), Ending::Succeeded);
    })?);
    log.line(format!("Ready: {}", phases.line()));
    Ok(())
}

/// Keeps the job's variables for the console's terminal. Its keys, beside them, open the guest that knows them anyway.
fn keep_variables(environment: &Environment, folder: &JobDir) -> Result<(), Failure> {
    let path = folder.file(record::VARIABLES);
    Variables::of(environment)
        .save(&path)
        .map_err(|e| Failure::system(format!("cannot write {}: {e}", path.display())))
}

/// For whom the image is asked: what a registry allows one project, another still has to ask for.
fn asker(job: &Job, settings: &Settings) -> Asker {
    Asker::Job {
        project: format!("{} {}", job.identity.coordinator, job.project),
        auth_ttl: settings.images.auth_ttl,
        offline_ttl: settings.images.offline_ttl,
    }
}

/// The record of a job that begins; its attempt's number is given by the folder of jobs.
fn record(job: &Job) -> Record {
    let now = Timestamp::now();
    // A time-out beyond all calendars is as good as none.
    let timeout = SignedDuration::try_from(job.timeout).unwrap_or(SignedDuration::from_hours(24 * 365));
    let deadline = now
        .saturating_add(timeout)
        .unwrap_or(Timestamp::MAX)
        .saturating_add(AFTER_TIMEOUT)
        .unwrap_or(Timestamp::MAX);
    let key = JobKey::new(&job.identity.coordinator, job.identity.id, 0);
    let mut record = Record {
        coordinator: job.identity.coordinator.clone(),
        project: job.project.clone(),
        job: job.name.clone(),
        token: job.token.clone(),
        // What is no image yet may be anything.
        image: job.image.as_ref().map(|image| job.masked.hide(image)),
        ..Record::new(key, job.session.clone(), Caller::of_this_call(), now, deadline)
    };
    record.begin(PREPARE, now);
    record
}

/// Leases a slot, and waits for one where all are in use. An earlier try of the job whose machine is held makes room first.
async fn admit(
    settings: &Settings,
    folder: &JobDir,
    job: &Job,
    reaper: &Reaper,
    log: &JobLog,
) -> Result<u32, Failure> {
    let slots = Slots::open(&settings.state_dir)?;
    let (network, room) = match &settings.network {
        Network::Own(own) => (own.name.clone(), own.slots),
        Network::Libvirt(name) => (name.clone(), settings.max_machines),
    };
    let capacity = Capacity {
        machines: settings.max_machines,
        network: &network,
        slots: room,
    };
    let begin = Instant::now();
    let mut said = false;
    loop {
        let full = match slots.admit(&capacity, folder.key()) {
            Ok(index) => return Ok(index),
            Err(full @ (host::Error::Full { .. } | host::Error::NoSlot { .. })) => full,
            Err(e) => return Err(e.into()),
        };
        let Identity { coordinator, id } = &job.identity;
        if reaper.remove_held_tries(coordinator, *id).await? > 0 {
            log.line("The machine of an earlier try of this job, which was held, makes room for it.");
            continue;
        }
        let held = held_machines(&settings.state_dir);
        if begin.elapsed() >= settings.wait {
            return Err(held.into_iter().fold(full.into(), Failure::hint));
        }
        if !said {
            let places: Vec<String> = held.iter().map(|held| format!(" {held}.")).collect();
            log.line(format!("Waiting for a place: {full}{}", places.concat()));
            said = true;
        }
        // One whose time is over frees its place.
        if !held.is_empty()
            && let Err(e) = reaper.sweep().await
        {
            tracing::warn!("the sweep failed: {e}");
        }
        tokio::time::sleep(PLACE_POLL).await;
    }
}

/// How many held machines a sentence names.
const MOST_HELD: usize = 4;

/// Which machines take places though their jobs are over, each as half a sentence; for whoever waits for a place.
fn held_machines(state_dir: &Path) -> Vec<String> {
    // What cannot be read is in nobody's way here.
    let jobs = Jobs::look(state_dir).list().unwrap_or_default();
    jobs.iter()
        .filter_map(|job| job.read().ok().flatten())
        .filter(|record| record.state == State::Held)
        .filter_map(|record| Some((record.held?.until, record.key)))
        .map(|(until, key)| {
            format!(
                "The machine of job {key} is held until {}: `cannery vm release {key}` frees its place",
                report::minute(until)
            )
        })
        .take(MOST_HELD)
        .collect()
}

/// Makes sure that the network is there, and finds the place on it that goes with a slot's number.
async fn place(settings: &Settings, libvirt: &Libvirt, index: u32) -> Result<Slot, Failure> {
    match &settings.network {
        Network::Own(own) => {
            let plan = super::network_plan(own);
            network::provide(libvirt, &plan, &settings.state_dir).await?;
            let slot = plan.slots().into_iter().find(|s| s.index == index);
            let slot =
                slot.ok_or_else(|| Failure::system(format!("the network {} has no slot {index}", own.name)))?;
            Ok(Slot {
                network: own.name.clone(),
                index,
                mac: Some(slot.mac.to_string()),
                address: Some(slot.address.into()),
                tap: Some(slot.tap),
            })
        }
        Network::Libvirt(name) => {
            if !libvirt.network(name).await?.is_some_and(|n| n.active) {
                return Err(
                    Failure::system(format!("libvirt has no network {name} that is up")).hint(format!(
                        "`virsh net-list --all` shows what there is; `virsh net-start {name}` starts it"
                    )),
                );
            }
            Ok(Slot {
                network: name.clone(),
                index,
                mac: None,
                address: None,
                tap: None,
            })
        }
    }
}

/// What the job gets: what its variables ask for within the operator's bounds, else what the settings or the image say.
fn grant(wants: &Wants, settings: &MachineSettings, disk: &Disk) -> Result<Granted, Failure> {
    Ok(wants.within(&bounds(settings, Some(disk)))?)
}

/// What a job gets that asks for nothing, and the most that it may ask for: the latter is the operator's word alone.
fn bounds(settings: &MachineSettings, disk: Option<&Disk>) -> Bounds {
    let hinted = disk.and_then(|d| d.hints.memory).map(Size::from_bytes);
    let memory = settings.memory.or(hinted.map(|h| h.min(settings.max_memory)));
    let cpus = disk
        .and_then(|d| d.hints.cpus)
        .map(|hinted| hinted.min(settings.max_cpus));
    let virtual_size = Size::from_bytes(disk.map_or(0, |d| d.virtual_size));
    Bounds {
        cpus: (
            settings.cpus.or(cpus).unwrap_or(MachineSettings::DEFAULT_CPUS),
            settings.max_cpus,
        ),
        memory: (
            memory.unwrap_or(MachineSettings::DEFAULT_MEMORY),
            settings.max_memory,
        ),
        disk: (
            settings.disk.unwrap_or(virtual_size).max(virtual_size),
            settings.max_disk,
        ),
    }
}

/// Whom scripts run as: the job's word, where it is allowed, before the operator's, before the image's.
fn whom(order: &Order, disk: &Disk) -> String {
    let candidates = [&order.user, &order.guest.user, &disk.hints.user];
    candidates
        .into_iter()
        .flatten()
        .next()
        .cloned()
        .unwrap_or_else(|| "root".to_owned())
}

/// A digest as people compare it.
fn short(digest: &str) -> &str {
    digest.get(..SHORT_DIGEST).unwrap_or(digest)
}

/// `sha256:` and twelve digits, as docker and podman show them.
const SHORT_DIGEST: usize = 19;
