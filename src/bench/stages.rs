//! `cannery bench stages`: the four stages of a job, against the same machine and the same login without us, and against
//! another custom executor.
//!
//! One round is one job of each executor and one boot of the very machine by libvirt's own client:
//!
//! ```text
//! config ▶ prepare ▶ run, ssh … ▶ virsh destroy ▶ virsh create ▶ banner ▶ first login ▶ run, ssh … ▶ cleanup
//! config ▶ prepare ▶ run …                                                                       ▶ cleanup   (the other's)
//! ```
//!
//! The first round fills caches and does not count. Whatever interrupts it, what was begun is cleaned up by the executors' own
//! cleanup.

use std::fs::File;
use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::boot::Virsh;
use super::executor::{Executor, Try, make_folder};
use super::figure::{Figure, Goal, Peer};
use super::openssh::{Entry, OpenSsh};
use crate::guest::keys::JobKeys;
use crate::guest::ssh::{Connection, Patience};
use crate::machine::placement::{Backing, Format};
use crate::machine::xml::Node;
use crate::machine::{Libvirt, overlay};
use crate::outcome::Failure;
use crate::record::{self, Claim, JobDir, Jobs, Record};
use crate::report::JobLog;
use crate::settings::Settings;
use crate::start;

/// How often a script is run on each machine: a machine is dear, and scripts are cheap.
const SCRIPTS_PER_MACHINE: usize = 2;
/// The name of the overlay in a job's folder.
const OVERLAY: &str = "overlay.qcow2";

/// config: gitlab-runner asks before each job, and nothing is done yet.
const CONFIG_GOAL: Goal = Goal::Under(Duration::from_millis(15));
/// run: what the wrapper around a script may cost.
const RUN_GOAL: Goal = Goal::Times(1.05);
/// prepare: what all but the guest's own boot and a login may cost.
const PREPARE_GOAL: Goal = Goal::Beyond(Duration::from_millis(300));
/// Another executor is to be no faster.
const PEER_GOAL: Goal = Goal::Times(1.0);
/// cleanup does what the floor does, and a little more.
const FLOOR_GOAL: Goal = Goal::Times(1.05);
/// Why nothing is known about another executor.
const NOT_INSTALLED: &str = "not installed";

/// What is to be measured.
#[derive(Debug)]
pub struct Plan<'a> {
    /// cannery's settings.
    pub settings: &'a Settings,
    /// cannery itself.
    pub ours: Executor,
    /// Another executor's name, and how it is called where it is installed.
    pub peer: (String, Option<Executor>),
    /// How many rounds count.
    pub runs: usize,
    /// A job number that no other job on this host has.
    pub number: u64,
    /// A folder for the bench's own files; it must not be there yet.
    pub scratch: PathBuf,
}

/// Measures, and says on `log` how far it is. Whatever comes between, such as the end of `interrupted`, nothing is left behind.
///
/// # Errors
/// What went wrong with a stage, or that it was interrupted.
pub async fn measure(
    plan: &Plan<'_>,
    log: &JobLog,
    interrupted: impl Future<Output = ()>,
) -> Result<Vec<Figure>, Failure> {
    let scratch = &plan.scratch;
    let cannot =
        |e: std::io::Error| Failure::system(format!("cannot use the folder {}: {e}", scratch.display()));
    make_folder(scratch).map_err(cannot)?;
    let mut bench = Bench {
        plan,
        virsh: Virsh {
            uri: plan.settings.libvirt_uri.clone(),
        },
        begun: Vec::new(),
        figures: Figures::new(plan),
    };
    // A call that is under way when this ends is killed, and so is what it was doing.
    let result = tokio::select! {
        result = bench.rounds(log) => result,
        () = interrupted => Err(Failure::system("the bench was interrupted; nothing of it is left")),
    };
    let tidied = bench.tidy().await;
    let figures = bench.figures;
    let removed = std::fs::remove_dir_all(scratch).map_err(cannot);
    result.and(tidied).and(removed)?;
    Ok(figures.list())
}

struct Bench<'a> {
    plan: &'a Plan<'a>,
    virsh: Virsh,
    /// What cleanup was not called for yet.
    begun: Vec<Try>,
    figures: Figures,
}

/// A job that is prepared, as its record has it.
struct Prepared {
    folder: JobDir,
    record: Record,
    guest: record::Guest,
    machine: record::Machine,
}

impl Bench<'_> {
    async fn rounds(&mut self, log: &JobLog) -> Result<(), Failure> {
        let mut counting = Figures::new(self.plan);
        for round in 0..=self.plan.runs {
            match round {
                0 => log.line("The first round fills caches and does not count."),
                n => log.line(format!("Round {n} of {}.", self.plan.runs)),
            }
            self.our_round(log).await?;
            self.peer_round(log).await?;
            if round == 0 {
                std::mem::swap(&mut self.figures, &mut counting);
            }
        }
        Ok(())
    }

    /// One job of ours, and its machine once more without us.
    async fn our_round(&mut self, log: &JobLog) -> Result<(), Failure> {
        let mut job = Try::new(&self.plan.ours, &self.plan.scratch, self.plan.number)?;
        let config = job.config().await?;
        self.figures.config.took(config);
        self.figures.config_peer.took(config);

        self.begun.push(job);
        let Some(job) = self.begun.last() else {
            return Ok(());
        };
        let prepare = job.prepare().await?;
        log.line(format!("  prepare {}", crate::report::seconds(prepare)));
        self.figures.prepare.took(prepare);
        self.figures.prepare_peer.took(prepare);
        let prepared = self.prepared(job)?;
        self.figures.phases_took(&prepared.record);

        let ssh = self.openssh(&prepared).await?;
        let mut scripts = scripts(job, &ssh).await?;
        let (destroyed, boot, login) = self.without_us(&prepared, &ssh).await?;
        log.line(format!(
            "  the guest's own boot {}, a login {}",
            crate::report::seconds(boot),
            crate::report::seconds(login)
        ));
        self.figures.cleanup.peer_took(destroyed);
        self.figures.own_boot.took(boot);
        self.figures.first_login.took(login);
        self.figures.prepare.peer_took(boot + login);
        // Whoever ends a machine ends one that has booted and run as many scripts.
        scripts.extend(self::scripts(job, &ssh).await?);
        for (run, other) in scripts {
            self.figures.run.took(run);
            self.figures.run.peer_took(other);
            self.figures.run_peer.took(run);
        }

        let cleanup = self.clean_up_last().await?;
        self.figures.cleanup.took(cleanup);
        self.figures.cleanup_peer.took(cleanup);
        Ok(())
    }

    /// One job of the other executor, where there is one.
    async fn peer_round(&mut self, log: &JobLog) -> Result<(), Failure> {
        let (name, Some(executor)) = &self.plan.peer else {
            return Ok(());
        };
        let mut job = Try::new(executor, &self.plan.scratch, self.plan.number)?;
        let config = job.config().await?;
        self.figures.config_peer.peer_took(config);
        self.begun.push(job);
        let Some(job) = self.begun.last() else {
            return Ok(());
        };
        let prepare = job.prepare().await?;
        log.line(format!("  {name}'s prepare {}", crate::report::seconds(prepare)));
        self.figures.prepare_peer.peer_took(prepare);
        for _ in 0..SCRIPTS_PER_MACHINE {
            let run = job.run().await?;
            self.figures.run_peer.peer_took(run);
        }
        let cleanup = self.clean_up_last().await?;
        self.figures.cleanup_peer.peer_took(cleanup);
        Ok(())
    }

    /// The job's record.
    fn prepared(&self, job: &Try) -> Result<Prepared, Failure> {
        let found =
            Jobs::look(&self.plan.settings.state_dir).claimed(&Claim::Session(job.response_file()))?;
        let lost = || Failure::system("prepare succeeded, and its job is not in the state folder");
        let (folder, record) = found.into_iter().next_back().ok_or_else(lost)?;
        match (record.guest.clone(), record.machine.clone()) {
            (Some(guest), Some(machine)) => Ok(Prepared {
                folder,
                record,
                guest,
                machine,
            }),
            _ => Err(lost()),
        }
    }

    /// A client that has no other choice than what our own connection has come to.
    async fn openssh(&self, job: &Prepared) -> Result<OpenSsh, Failure> {
        let image = job.record.image.clone().unwrap_or_default();
        let way = self.plan.settings.guest(&image);
        let target = start::target(&job.folder, &job.guest, &way)?;
        let identity = match job.guest.entry {
            record::Entry::JobKey => JobKeys::user_key_file(job.folder.path()),
            record::Entry::KeyFile => way.key_file.clone().unwrap_or_default(),
            record::Entry::Password => {
                return Err(Failure::system(
                    "the guest is entered with a password, which the OpenSSH client asks a person for",
                )
                .hint("Measure with an image that is entered with a key"));
            }
        };
        let patience = Patience {
            login: way.lost_after,
            silence: way.lost_after,
        };
        let connection = Connection::open(target, patience, |_| ()).await?;
        let entry = Entry {
            address: connection.address(),
            user: connection.user(),
            host_key: &connection.login().host_key,
            identity: &identity,
            agreed: &connection.login().agreed,
        };
        OpenSsh::new(&entry, &self.plan.scratch)
    }

    /// Ends the job's machine, and starts the very same one on a fresh overlay: how long its end, its boot and the first login took.
    async fn without_us(
        &self,
        job: &Prepared,
        ssh: &OpenSsh,
    ) -> Result<(Duration, Duration, Duration), Failure> {
        let name = &job.machine.name;
        let xml = Libvirt::open(&job.machine.uri)?.migratable_xml(name).await?;
        let overlay = job.folder.file(OVERLAY);
        let size = qcow2_size(&overlay)
            .map_err(|e| Failure::system(format!("cannot read {}: {e}", overlay.display())))?;
        let backing = backing_of(&xml, &overlay)
            .ok_or_else(|| Failure::system(format!("the XML of machine {name} names no disk")))?;
        let file = self.plan.scratch.join("machine.xml");
        std::fs::write(&file, xml)
            .map_err(|e| Failure::system(format!("cannot write {}: {e}", file.display())))?;

        let begin = Instant::now();
        self.virsh.destroy(name).await?;
        // What cannot be removed is replaced below, or told there.
        let _ = std::fs::remove_file(&overlay);
        let destroyed = begin.elapsed();

        overlay::create(&overlay, &backing, size, size).await?;
        let address = SocketAddr::new(job.guest.address, job.guest.port);
        let image = job.record.image.clone().unwrap_or_default();
        let patience = self.plan.settings.guest(&image).boot_timeout;
        let boot = self.virsh.boot(&file, address, patience).await?;
        let login = ssh.login().await?;
        Ok((destroyed, boot, login))
    }

    /// The end of the job that was begun last.
    async fn clean_up_last(&mut self) -> Result<Duration, Failure> {
        let Some(job) = self.begun.last() else {
            return Ok(Duration::ZERO);
        };
        let took = job.cleanup().await?;
        job.forget()?;
        self.begun.pop();
        Ok(took)
    }

    /// Cleans up what was begun; one that fails does not keep the others.
    async fn tidy(&mut self) -> Result<(), Failure> {
        let mut result = Ok(());
        for job in self.begun.drain(..) {
            let cleaned = job.cleanup().await.map(drop);
            result = result.and(cleaned);
        }
        result
    }
}

/// How long a script takes by us and by the client, some times in turns; each of both begins as often as the other.
async fn scripts(job: &Try, ssh: &OpenSsh) -> Result<Vec<(Duration, Duration)>, Failure> {
    let mut times = Vec::new();
    for number in 0..SCRIPTS_PER_MACHINE {
        times.push(if number % 2 == 0 {
            let run = job.run().await?;
            (run, ssh.script(&job.script()).await?)
        } else {
            let other = ssh.script(&job.script()).await?;
            (job.run().await?, other)
        });
    }
    Ok(times)
}

/// All figures of the bench.
#[derive(Debug)]
struct Figures {
    config: Figure,
    config_peer: Figure,
    prepare: Figure,
    prepare_peer: Figure,
    own_boot: Figure,
    first_login: Figure,
    run: Figure,
    run_peer: Figure,
    cleanup: Figure,
    cleanup_peer: Figure,
    phases: Vec<Figure>,
}

impl Figures {
    fn new(plan: &Plan<'_>) -> Self {
        let (name, executor) = &plan.peer;
        let none = || Figure::new("", Peer::None, Goal::None);
        let against_peer = |stage: &str| {
            let peer = match executor {
                Some(_) => Peer::Numbers(Vec::new()),
                None => Peer::Missing(NOT_INSTALLED),
            };
            Figure::new(format!("{stage}, against {name}"), peer, PEER_GOAL)
        };
        Figures {
            config: Figure::new("config", Peer::None, CONFIG_GOAL),
            prepare: Figure::new(
                "prepare, against the guest's own boot and a login",
                Peer::None,
                PREPARE_GOAL,
            ),
            run: Figure::new("run of `true`, against ssh HOST sh -s", Peer::None, RUN_GOAL),
            cleanup: Figure::new(
                "cleanup, against virsh destroy and rm of the overlay",
                Peer::None,
                FLOOR_GOAL,
            ),
            own_boot: Figure {
                name: "the guest's own boot: virsh create to the SSH banner".to_owned(),
                ..none()
            },
            first_login: Figure {
                name: "the first login after it: ssh HOST true".to_owned(),
                ..none()
            },
            config_peer: against_peer("config"),
            prepare_peer: against_peer("prepare"),
            run_peer: against_peer("run of `true`"),
            cleanup_peer: against_peer("cleanup"),
            phases: Vec::new(),
        }
    }

    /// Takes in where prepare's time went.
    fn phases_took(&mut self, record: &Record) {
        for phase in &record.phases {
            let name = format!("prepare: {}", phase.name);
            let time = Duration::try_from_secs_f64(phase.seconds).unwrap_or_default();
            match self.phases.iter_mut().find(|f| f.name == name) {
                Some(figure) => figure.took(time),
                None => {
                    let mut figure = Figure::new(name, Peer::None, Goal::None);
                    figure.took(time);
                    self.phases.push(figure);
                }
            }
        }
    }

    fn list(self) -> Vec<Figure> {
        let mut all = vec![self.config, self.config_peer, self.prepare, self.prepare_peer];
        all.extend([self.own_boot, self.first_login]);
        all.extend(self.phases);
        all.extend([self.run, self.run_peer, self.cleanup, self.cleanup_peer]);
        all
    }
}

/// How large the guest sees a qcow2 file, in bytes (docs/interop/qcow2.txt: big-endian, at 24).
fn qcow2_size(path: &Path) -> std::io::Result<u64> {
    let mut header = [0; 32];
    File::open(path)?.read_exact(&mut header)?;
    let mut size = [0; 8];
    size.copy_from_slice(&header[24..]);
    Ok(u64::from_be_bytes(size))
}

/// What the overlay lies on, from the machine's XML.
fn backing_of(xml: &str, overlay: &Path) -> Option<Backing> {
    let tree = Node::parse(xml).ok()?;
    let overlay = overlay.to_str()?;
    let file = |node: &Node| Some(node.first("source")?.attribute("file")?.to_owned());
    let disks = tree.first("devices")?;
    let disk = disks
        .all("disk")
        .find(|disk| file(disk).as_deref() == Some(overlay))?;
    let below = disk.first("backingStore")?;
    let format = match below.first("format")?.attribute("type")? {
        "raw" => Format::Raw,
        "qcow2" => Format::Qcow2,
        _ => return None,
    };
    Some(Backing {
        path: file(below)?.into(),
        format,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_under_an_overlay_is_read_from_the_machines_xml() {
        let xml = "<domain><devices><disk device='disk'><source file='/job/seed.img'/></disk><disk>
            <source file='/job/overlay.qcow2'/><backingStore type='file'><format type='raw'/><source file='/store/disk.raw'/>
            <backingStore/></backingStore></disk></devices></domain>";
        let backing = backing_of(xml, Path::new("/job/overlay.qcow2")).unwrap();
        assert_eq!(
            (backing.path, backing.format),
            ("/store/disk.raw".into(), Format::Raw)
        );
        assert!(backing_of(xml, Path::new("/job/other.qcow2")).is_none());
    }
}
