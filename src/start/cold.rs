//! The cold way: a new overlay, a new domain, a guest that boots and reads its introduction meanwhile.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::settle::{Needs, settle};
use super::{Phases, helper};
use crate::guest::introduction::Introduction;
use crate::guest::keys::{JobKeys, PublicKey};
use crate::guest::ssh::{Auth, Connection, HostKeyPolicy, Patience, Progress, Target};
use crate::guest::{grow, ready};
use crate::image::{Disk, DiskFormat};
use crate::kill::{self, Point};
use crate::machine::placement::{Backing, Format, FwCfgEntry, Mac, NetworkAttachment, Owner};
use crate::machine::{Description, Libvirt, Placement, libvirt, overlay, render, serial, watch};
use crate::outcome::Failure;
use crate::record::{self, Entry, JobDir, Machine, Slot, State};
use crate::report::JobLog;
use crate::settings::GuestSettings;

/// Everything that a start needs to know.
#[derive(Debug)]
pub struct Plan<'a> {
    /// The job's own folder.
    pub job: &'a JobDir,
    /// The state folder, which the domain's tag names.
    pub state_dir: PathBuf,
    /// One line for `virsh desc`.
    pub title: String,
    /// What the guest is called.
    pub hostname: String,
    /// libvirt's connection URI.
    pub uri: String,
    /// The image.
    pub disk: &'a Disk,
    /// How large the job's disk is to be, in bytes.
    pub disk_size: u64,
    /// Did the job's author ask for that size?
    pub disk_asked: bool,
    /// The place on the network.
    pub slot: Slot,
    /// Whom scripts run as.
    pub user: String,
    /// The way in.
    pub guest: &'a GuestSettings,
    /// Folders that scripts write to.
    pub folders: [&'a str; 2],
    /// Must the `gitlab-runner` binary be in the guest?
    pub needs_helper: bool,
    /// The version of the runner that the binary must fit, as far as it tells.
    pub runner_version: Option<&'a str>,
    /// Lines for the job log, said once: as soon as there is a machine, since one whose boot hangs is the one to look at.
    pub invitation: Mutex<Vec<String>>,
}

/// A guest that is ready for scripts.
#[derive(Debug)]
pub struct Started {
    /// How it is entered from now on.
    pub guest: record::Guest,
    /// What the job's author should know, a sentence each.
    pub remarks: Vec<String>,
}

/// Why there is no such guest.
#[derive(Debug)]
pub enum Unstarted {
    /// The machine was there, and its guest did not answer in time or died: under KVM that may be KVM's doing.
    Unanswered(Failure),
    /// Anything else.
    Failed(Failure),
}

/// Lines of the serial log that a failed start shows.
const SERIAL_LINES: usize = 30;
/// The bytes that these may have: kernels write long lines, and nobody reads more.
const SERIAL_BYTES: usize = 16 << 10;
/// How often libvirt is asked for an address that it alone knows.
const ADDRESS_POLL: Duration = Duration::from_millis(250);

/// Starts the machine and enters its guest.
pub async fn cold(
    plan: &Plan<'_>,
    description: Description,
    patience: Duration,
    libvirt: &Libvirt,
    phases: &mut Phases,
    log: &JobLog,
) -> Result<Started, Unstarted> {
    let (placement, keys, xml) = create(plan, &description, phases)
        .await
        .map_err(Unstarted::Failed)?;
    power_on(plan, libvirt, &placement, xml).await?;
    phases.end("start");
    let invitation = std::mem::take(&mut *plan.invitation.lock().unwrap_or_else(PoisonError::into_inner));
    invitation.iter().for_each(|line| log.line(line));
    let connection = match enter(plan, patience, libvirt, &placement, &keys, phases).await {
        Ok(connection) => connection,
        Err(failure) => {
            show_serial(&placement.serial_log, log);
            return Err(Unstarted::Unanswered(failure));
        }
    };
    kill::point(Point::GuestAnswered);
    let started = make_ready(plan, &connection, phases, log)
        .await
        .map_err(Unstarted::Failed)?;
    kill::point(Point::GuestSettled);
    phases.end("ready");
    Ok(started)
}

/// Makes what the machine is made of, and describes it.
async fn create(
    plan: &Plan<'_>,
    description: &Description,
    phases: &mut Phases,
) -> Result<(Placement, JobKeys, String), Failure> {
    // The step is held while files are made: a cleanup that comes now finds either none of them or all.
    let step = plan.job.enter(State::Cloning, |_| ())?;
    let keys = JobKeys::generate()?;
    keys.save(plan.job.path())?;
    kill::point(Point::KeysWritten);
    let placement = make_files(plan, &keys).await?;
    drop(step);
    phases.end("overlay");

    let xml = render(description, &placement)?;
    Ok((placement, keys, xml))
}

/// Has libvirt start the machine. That QEMU cannot start it with this accelerator counts as a machine that does not answer.
async fn power_on(
    plan: &Plan<'_>,
    libvirt: &Libvirt,
    placement: &Placement,
    xml: String,
) -> Result<(), Unstarted> {
    let failed = |e: record::Error| Unstarted::Failed(e.into());
    let machine = Machine {
        uri: plan.uri.clone(),
        name: placement.name.clone(),
        uuid: placement.uuid,
    };
    let step = plan
        .job
        .enter(State::Starting, |r| r.machine = Some(machine))
        .map_err(failed)?;
    libvirt
        .create(&placement.name, placement.uuid, xml)
        .await
        .map_err(|e| match e {
            e @ libvirt::Error::Refused { .. } => Unstarted::Unanswered(e.into()),
            e => Unstarted::Failed(e.into()),
        })?;
    kill::point(Point::DomainCreated);
    drop(step);
    drop(plan.job.enter(State::Booting, |_| ()).map_err(failed)?);
    Ok(())
}

/// Makes what the machine is made of: overlay, serial log, introduction.
async fn make_files(plan: &Plan<'_>, keys: &JobKeys) -> Result<Placement, Failure> {
    let job = plan.job;
    let uuid = uuid::Uuid::new_v4();
    let backing = Backing {
        path: plan.disk.path.clone(),
        format: match plan.disk.format {
            DiskFormat::Raw => Format::Raw,
            DiskFormat::Qcow2 => Format::Qcow2,
        },
    };
    let overlay = job.file("overlay.qcow2");
    overlay::create(&overlay, &backing, plan.disk_size, plan.disk.virtual_size).await?;
    kill::point(Point::OverlayMade);
    let serial_log = job.file("serial.log");
    serial::create(&serial_log)?;
    kill::point(Point::SerialMade);
    let (mut kernel, mut initrd) = (None, None);
    if let Some(boot) = &plan.disk.boot {
        overlay::private_copy(&boot.kernel, kernel.insert(job.file("kernel")))?;
        kill::point(Point::KernelCopied);
        if let Some(from) = &boot.initrd {
            overlay::private_copy(from, initrd.insert(job.file("initrd")))?;
        }
    }
    let machine_id = uuid.simple().to_string();
    let introduction = Introduction::new(
        &plan.user,
        keys.user.public().clone(),
        keys.host.clone(),
        &plan.hostname,
        &machine_id,
    )?;
    let seed = job.file("seed.img");
    // A start that is tried again without KVM finds the first one's.
    let _ = std::fs::remove_file(&seed);
    introduction.write_seed(&seed)?;
    kill::point(Point::SeedMade);
    let mut credentials = Vec::new();
    for credential in introduction.credentials() {
        let path = job.file(&format!("credential.{}", credential.name));
        write_private(&path, credential.content.reveal())
            .map_err(|e| Failure::system(format!("cannot write {}: {e}", path.display())))?;
        kill::point(Point::CredentialWritten);
        credentials.push(FwCfgEntry {
            name: credential.name.to_owned(),
            path,
        });
    }
    let (mac, network) = match (&plan.slot.mac, &plan.slot.tap) {
        (Some(mac), Some(tap)) => {
            let mac = mac
                .parse()
                .map_err(|e| Failure::system(format!("the slot is damaged: {e}")))?;
            (
                mac,
                NetworkAttachment::Slot {
                    network: plan.slot.network.clone(),
                    tap: tap.clone(),
                },
            )
        }
        _ => (
            Mac::of_machine(uuid),
            NetworkAttachment::Named(plan.slot.network.clone()),
        ),
    };
    let key = job.key();
    Ok(Placement {
        name: key.machine_name(),
        uuid,
        title: Some(plan.title.clone()),
        owner: Owner {
            coordinator: key.coordinator.clone(),
            job_id: key.id,
            attempt: key.attempt,
            state_dir: plan.state_dir.clone(),
        },
        mac,
        network,
        overlay,
        backing: vec![backing],
        kernel,
        initrd,
        nvram: job.file("nvram.fd"),
        serial_log,
        seed: Some(seed),
        credentials,
    })
}

/// Writes a file that only its owner may read; libvirt lends it to QEMU's user while the machine runs.
fn write_private(path: &std::path::Path, content: &str) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(content.as_bytes())
}

/// Waits until the guest lets us in.
async fn enter(
    plan: &Plan<'_>,
    patience: Duration,
    libvirt: &Libvirt,
    placement: &Placement,
    keys: &JobKeys,
    phases: &mut Phases,
) -> Result<Connection, Failure> {
    let begin = Instant::now();
    let address = match plan.slot.address {
        Some(address) => address,
        None => find_address(patience, libvirt, placement).await?,
    };
    let mut auth = vec![Auth::Key(keys.user.clone())];
    auth.extend(plan.guest.key_file.clone().map(Auth::KeyFile));
    auth.extend(plan.guest.password.as_ref().map(|p| Auth::Password(p.clone())));
    // An image that the operator has another way into may not read the introduction: what it shows is believed
    // the first time. Any other shows the key that we gave it, though perhaps not with its first breath.
    let host_key = if auth.len() > 1 {
        HostKeyPolicy::Any
    } else {
        HostKeyPolicy::Await(keys.host.public().clone())
    };
    let target = Target {
        address: SocketAddr::new(address, plan.guest.port),
        user: plan.user.clone(),
        auth,
        host_key,
    };
    let patience = Patience {
        login: patience.saturating_sub(begin.elapsed()),
        silence: plan.guest.lost_after,
    };
    let (name, serial) = (&placement.name, &placement.serial_log);
    let alive = || async move { alive(libvirt, name, serial).await };
    let connection = ready::wait_ready(target, patience, alive, |step: Progress| {
        tracing::debug!(?step, "guest");
    })
    .await?;
    let login = connection.login();
    phases.took(
        "boot",
        begin
            .elapsed()
            .saturating_sub(login.login.saturating_sub(login.banner)),
    );
    phases.took("ssh", login.login.saturating_sub(login.banner));
    phases.skip();
    Ok(connection)
}

/// Asks libvirt for the address of a machine on a network that is not ours.
async fn find_address(
    patience: Duration,
    libvirt: &Libvirt,
    placement: &Placement,
) -> Result<IpAddr, Failure> {
    let begin = Instant::now();
    loop {
        if let Some(address) = libvirt.addresses(&placement.name, placement.mac).await?.first() {
            return Ok(*address);
        }
        alive(libvirt, &placement.name, &placement.serial_log)
            .await
            .map_err(Failure::system)?;
        if begin.elapsed() > patience {
            let network = placement.network.network();
            return Err(Failure::system(format!(
                "the guest got no address on the network {network} within {} s: it was powered on, and no more is known",
                patience.as_secs()
            ))
            .hint("Is there a DHCP server on that network, and does the image ask for an address?"));
        }
        tokio::time::sleep(ADDRESS_POLL).await;
    }
}

/// Says why a machine can no longer answer.
pub async fn alive(libvirt: &Libvirt, name: &str, serial_log: &std::path::Path) -> Result<(), String> {
    // libvirtd that restarts is no reason to give a guest up.
    let Ok(state) = libvirt.state(name).await else {
        return Ok(());
    };
    let because = |why: &str| {
        let words = serial::tail(serial_log, SERIAL_LINES, SERIAL_BYTES).unwrap_or_default();
        match watch::last_words(&words) {
            // libvirt and the log may say the same.
            Some(cause) if !why.ends_with(cause.trim_start_matches("its ")) => format!("{why}: {cause}"),
            None if state == watch::State::Gone => {
                format!("{why}: it was destroyed, or the host's kernel has killed it")
            }
            _ => why.to_owned(),
        }
    };
    match watch::judge(state) {
        watch::Judgement::Dead(why) => Err(because(why)),
        watch::Judgement::Paused { why, waits: false } => Err(because(why)),
        watch::Judgement::Alive | watch::Judgement::Paused { waits: true, .. } => Ok(()),
    }
}

/// Makes a guest that answers ready for scripts.
async fn make_ready(
    plan: &Plan<'_>,
    connection: &Connection,
    phases: &mut Phases,
    log: &JobLog,
) -> Result<Started, Failure> {
    let needs = Needs {
        hostname: &plan.hostname,
        folders: plan.folders,
        shell: plan.guest.shell.as_str(),
        helper: plan.needs_helper,
    };
    let found = settle(connection, &needs).await?;
    let mut remarks = Vec::new();
    if plan.disk_size > plan.disk.virtual_size {
        match grow::grow(connection).await {
            Ok(()) => {}
            Err(e) if plan.disk_asked => {
                return Err(Failure::author(format!("the image's file system cannot fill a disk of the size that CANNERY_DISK asks for: {e}"))
                    .hint("Leave CANNERY_DISK out, or use an image with growpart and its file system's own grow tool"));
            }
            Err(e) => remarks.push(format!(
                "The disk is larger than its file system, which could not grow: {e}."
            )),
        }
    }
    if let Some(found) = found.helper {
        remarks.extend(helper::provide(plan, found, connection, phases, log).await?);
    }
    let login = connection.login();
    let entry = match (login.auth, &plan.guest.key_file) {
        (0, _) => Entry::JobKey,
        (1, Some(_)) => Entry::KeyFile,
        _ => Entry::Password,
    };
    Ok(Started {
        guest: record::Guest {
            address: connection.address().ip(),
            port: connection.address().port(),
            user: plan.user.clone(),
            entry,
            host_key: login.host_key.to_string(),
            shell: plan.guest.shell.as_str().to_owned(),
        },
        remarks,
    })
}

/// Shows the end of what the guest wrote on its serial port.
pub fn show_serial(path: &std::path::Path, log: &JobLog) {
    match serial::tail(path, SERIAL_LINES, SERIAL_BYTES) {
        Ok(tail) if tail.trim().is_empty() => log.line("The guest wrote nothing to its serial port."),
        Ok(tail) => {
            log.line("The end of the guest's serial log:");
            tail.lines().for_each(|line| log.line(format!("  | {line}")));
        }
        Err(e) => log.line(format!("The guest's serial log cannot be read: {e}.")),
    }
}

/// How a guest that was entered before is entered again; `None` where the settings no longer say how.
pub fn target(job: &JobDir, guest: &record::Guest, settings: &GuestSettings) -> Result<Target, Failure> {
    let missing = |what: &str| {
        Failure::system(format!(
            "the guest was entered with {what}, and the settings have none any more"
        ))
        .hint("Leave the settings of running jobs as they are")
    };
    let auth = match guest.entry {
        Entry::JobKey => Auth::Key(JobKeys::load(job.path())?.user),
        Entry::KeyFile => Auth::KeyFile(settings.key_file.clone().ok_or_else(|| missing("a key file"))?),
        Entry::Password => Auth::Password(settings.password.clone().ok_or_else(|| missing("a password"))?),
    };
    let host_key: PublicKey = guest.host_key.parse()?;
    Ok(Target {
        address: SocketAddr::new(guest.address, guest.port),
        user: guest.user.clone(),
        auth: vec![auth],
        host_key: HostKeyPolicy::Expect(host_key),
    })
}
