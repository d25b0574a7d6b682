//! `cannery bench images`: how fast images are pulled and pushed, and what they take, against skopeo, sardinecake and what
//! this machine can do at all.
//!
//! ```text
//! data ─▶ a disk of real files ─▶ registry, in each format ─▶ rounds: ours, skopeo's and sardinecake's pull, in turns
//! floor ─▶ hashing, unpacking and writing as many bytes, each alone on all processors
//! pairs ─▶ what a new version of a disk adds to the registry
//! ```
//!
//! All of it happens in one folder and on loopback; both are gone afterwards.

mod data;
mod figures;
mod floor;
mod granted;
mod registry;
mod tool;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use tool::Tool;

use super::figure::{Figure, Goal, Peer};
use super::scratch::{cannot, in_folder, remove};
use crate::outcome::Failure;
use crate::report::{JobLog, bytes, seconds};
use figures::Figures;
use registry::Registry;
use tool::Cost;

/// How often a cached image is asked for in each round: it is cheap.
const CACHED_CALLS: usize = 10;

/// Two versions of a disk.
#[derive(Debug, Clone)]
pub struct Pair {
    /// What was done to the first.
    pub name: String,
    /// The first, as a raw or qcow2 file.
    pub old: PathBuf,
    /// The second.
    pub new: PathBuf,
    /// How much of a whole image the second may add to the registry.
    pub goal: f64,
}

/// What is to be measured.
#[derive(Debug)]
pub struct Plan {
    /// cannery itself.
    pub cannery: PathBuf,
    /// sardinecake's `sarde`, where it is installed.
    pub sarde: Option<PathBuf>,
    /// How many rounds count.
    pub runs: usize,
    /// Bytes of data on the disk.
    pub size: u64,
    /// Where they are taken from.
    pub data: PathBuf,
    /// Versions of disks.
    pub pairs: Vec<Pair>,
    /// A folder for all that is made; it must not be there yet.
    pub scratch: PathBuf,
}

/// Measures, and says on `log` how far it is. Whatever comes between, such as the end of `interrupted`, nothing is left behind.
///
/// # Errors
/// What failed, or that it was interrupted.
pub async fn measure(
    plan: &Plan,
    log: &JobLog,
    interrupted: impl Future<Output = ()>,
) -> Result<Vec<Figure>, Failure> {
    let figures = in_folder(&plan.scratch, interrupted, Bench::run(plan, log)).await;
    if plan.sarde.is_some() {
        // What it imported last; there is nothing where it imported nothing.
        let _ = Tool::new("virsh")
            .call(Path::new("/"), ["-q", "undefine", IMPORTED])
            .await;
    }
    figures
}

/// The domain as which sardinecake imports the image.
const IMPORTED: &str = "cannery-bench-imported";
/// sardinecake reads no port in a reference.
const SARDE_PORT: u16 = 80;
const SARDE_IMAGE: &str = "localhost/bench/disk:sardinecake";

/// The formats in which the disk is pushed, by the names that `image push --format` has for them, which are its tags, too.
const CONTAINER_DISK: &str = "containerdisk";
const NATIVE: &str = "native";
const SARDINECAKE: &str = "sardinecake";

struct Bench<'a> {
    plan: &'a Plan,
    log: &'a JobLog,
    cannery: Tool,
    skopeo: Tool,
    registry: Registry,
    /// With sardinecake's image, where it is installed.
    second: Option<(Tool, Registry)>,
    disk: PathBuf,
}

impl<'a> Bench<'a> {
    async fn run(plan: &'a Plan, log: &'a JobLog) -> Result<Vec<Figure>, Failure> {
        log.line(format!("Making a disk with {} of data.", bytes(plan.size)));
        let bench = Self::prepare(plan, log).await?;
        let mut figures = Figures::new(plan, bench.skopeo.is_there());
        bench.push(&mut figures).await?;
        log.line("Measuring what this machine can do.");
        let (raw, size, scratch) = (bench.raw(), plan.size, plan.scratch.join("written"));
        let floor = tokio::task::spawn_blocking(move || floor::measure(&raw, size, &scratch)).await;
        let floor = floor.map_err(|e| Failure::system(format!("a measurement did not end: {e}")))??;
        figures.floor(floor);
        for round in 0..=plan.runs {
            match round {
                0 => log.line("The first round fills caches and does not count."),
                n => log.line(format!("Round {n} of {}.", plan.runs)),
            }
            let mut counting = Figures::new(plan, bench.skopeo.is_there());
            bench.pull(&mut counting).await?;
            if round > 0 {
                figures.add(counting);
            }
        }
        let granted = granted::measure(
            &plan.cannery,
            &plan.scratch.join("private"),
            CACHED_CALLS * plan.runs,
        )
        .await?;
        granted.into_iter().for_each(|time| figures.granted.took(time));
        for pair in &plan.pairs {
            figures.pairs.push(bench.pair(pair).await?);
        }
        Ok(figures.list())
    }

    async fn prepare(plan: &'a Plan, log: &'a JobLog) -> Result<Self, Failure> {
        let scratch = &plan.scratch;
        let registry = Registry::start(&scratch.join("registry"), 0).await?;
        let second = match &plan.sarde {
            None => None,
            Some(program) => Some((
                sarde(program, scratch)?,
                Registry::start(&scratch.join("registry-80"), SARDE_PORT).await?,
            )),
        };
        let cannery = cannery(&plan.cannery, scratch, &registry)?;
        let bench = Self {
            plan,
            log,
            cannery,
            skopeo: Tool::new("skopeo"),
            registry,
            second,
            disk: scratch.join("disk.qcow2"),
        };
        let (from, size, raw) = (plan.data.clone(), plan.size, bench.raw());
        let written = tokio::task::spawn_blocking(move || data::write(&from, size, &raw)).await;
        written.map_err(|e| Failure::system(format!("the disk was not made: {e}")))??;
        let convert: [OsString; 7] = [
            "convert".into(),
            "-f".into(),
            "raw".into(),
            "-O".into(),
            "qcow2".into(),
            bench.raw().into(),
            bench.disk.clone().into(),
        ];
        Tool::new("qemu-img").call(scratch, convert).await?;
        Ok(bench)
    }

    fn raw(&self) -> PathBuf {
        self.plan.scratch.join("disk.raw")
    }

    fn image(&self, format: &str) -> String {
        format!("{}/bench/disk:{format}", self.registry.host)
    }

    /// Pushes the disk in each format, and by sardinecake.
    async fn push(&self, figures: &mut Figures) -> Result<(), Failure> {
        for format in [CONTAINER_DISK, NATIVE] {
            let before = self.registry.holds();
            let cost = self.push_as(&self.disk, &self.image(format), format).await?;
            let added = self.registry.holds() - before;
            self.log.line(format!(
                "Pushed as {format}: {} in {}.",
                bytes(added),
                seconds(cost.time)
            ));
            match format {
                NATIVE => {
                    figures.push_native.took(cost.time);
                    figures.push_memory.counted(cost.memory);
                    figures.size.counted(added);
                }
                _ => {
                    figures.push_native.peer_took(cost.time);
                    figures.size.peer_counted(added);
                }
            }
        }
        let Some((sarde, _)) = &self.second else {
            return Ok(());
        };
        let cost = self
            .push_as(&self.disk, "localhost/bench/ours:sardinecake", SARDINECAKE)
            .await?;
        figures.push_sarde.took(cost.time);
        let scratch = &self.plan.scratch;
        let machine = scratch.join("machine.xml");
        std::fs::write(&machine, domain(&self.disk)).map_err(|e| cannot("write", &machine, &e))?;
        let layout = scratch.join("sarde/exported");
        let words = |text: &str| OsString::from(text);
        let export = [
            words("export"),
            words("-q"),
            words("--libvirtconfig"),
            machine.into(),
            words("-d"),
            layout.clone().into(),
            words("cannery-bench"),
            words(SARDE_IMAGE),
        ];
        let exported = sarde.call(scratch, export).await?;
        let push = [
            words("push"),
            words("-q"),
            words("-d"),
            layout.clone().into(),
            words(SARDE_IMAGE),
        ];
        let pushed = sarde.call(scratch, push).await?;
        let both = exported.time + pushed.time;
        self.log.line(format!(
            "sardinecake's export and push: {}, ours: {}.",
            seconds(both),
            seconds(cost.time)
        ));
        figures.push_sarde.peer_took(both);
        remove(&layout)
    }

    async fn push_as(&self, disk: &Path, image: &str, format: &str) -> Result<Cost, Failure> {
        let arguments: [OsString; 6] = [
            "image".into(),
            "push".into(),
            "--format".into(),
            format.into(),
            disk.into(),
            image.into(),
        ];
        self.cannery.call(&self.plan.scratch, arguments).await
    }

    /// One round: each image into an empty store, ours and the others' in turns.
    async fn pull(&self, figures: &mut Figures) -> Result<(), Failure> {
        self.registry.warm().await?;
        let gzip = self.fetch(&self.image(CONTAINER_DISK)).await?;
        figures.pull_skopeo.took(gzip.time);
        figures.native_gzip.peer_took(gzip.time);
        figures.gzip_memory.counted(gzip.memory);
        self.log.line(format!("  containerDisk {}", seconds(gzip.time)));
        if self.skopeo.is_there() {
            self.registry.warm().await?;
            let other = self.skopeo_and_tar().await?;
            figures.pull_skopeo.peer_took(other);
            figures.native_skopeo.peer_took(other);
            self.log.line(format!("  by skopeo and tar {}", seconds(other)));
        }
        self.registry.warm().await?;
        let native = self.fetch(&self.image(NATIVE)).await?;
        for figure in [
            &mut figures.native_skopeo,
            &mut figures.native_gzip,
            &mut figures.native_floor,
            &mut figures.native_slowest,
        ] {
            figure.took(native.time);
        }
        figures.native_memory.counted(native.memory);
        self.log.line(format!("  native {}", seconds(native.time)));
        for _ in 0..CACHED_CALLS {
            figures.cached.took(self.ask(&self.image(NATIVE)).await?.time);
        }
        if let Some((sarde, registry)) = &self.second {
            registry.warm().await?;
            let ours = self.fetch(SARDE_IMAGE).await?;
            figures.pull_sarde.took(ours.time);
            registry.warm().await?;
            let other = self.sarde_pull(sarde).await?;
            figures.pull_sarde.peer_took(other);
            self.log.line(format!(
                "  sardinecake's image {}, by sarde {}",
                seconds(ours.time),
                seconds(other)
            ));
        }
        Ok(())
    }

    /// Pulls into an empty store.
    async fn fetch(&self, image: &str) -> Result<Cost, Failure> {
        remove(&self.plan.scratch.join("state/store"))?;
        self.cannery
            .call(&self.plan.scratch, ["image", "pull", "--quiet", image])
            .await
    }

    /// Asks for what is here.
    async fn ask(&self, image: &str) -> Result<Cost, Failure> {
        let arguments = ["image", "pull", "--quiet", "--policy", "if-not-present", image];
        self.cannery.call(&self.plan.scratch, arguments).await
    }

    /// What one does without us: a copy into a layout, and its layer unpacked.
    async fn skopeo_and_tar(&self) -> Result<Duration, Failure> {
        let scratch = self.plan.scratch.join("skopeo");
        std::fs::create_dir(&scratch).map_err(|e| cannot("make", &scratch, &e))?;
        let from = format!("docker://{}", self.image(CONTAINER_DISK));
        let copy = [
            "copy",
            "-q",
            "--src-tls-verify=false",
            from.as_str(),
            "oci:layout:disk",
        ];
        let copied = self.skopeo.call(&scratch, copy).await?;
        // The layer is the largest blob by far.
        let unpack = "tar -xzf layout/blobs/sha256/$(ls -S layout/blobs/sha256 | head -n 1)";
        let unpacked = Tool::new("sh").call(&scratch, ["-c", unpack]).await?;
        remove(&scratch)?;
        Ok(copied.time + unpacked.time)
    }

    async fn sarde_pull(&self, sarde: &Tool) -> Result<Duration, Failure> {
        let scratch = &self.plan.scratch;
        let (layout, machines) = (scratch.join("sarde/pulled"), scratch.join("sarde/machines"));
        let words = |text: &str| OsString::from(text);
        let pull = [
            words("pull"),
            words("-q"),
            words("-d"),
            layout.clone().into(),
            words("-o"),
            machines.clone().into(),
            words("-n"),
            words(IMPORTED),
            words(SARDE_IMAGE),
        ];
        let cost = sarde.call(scratch, pull).await?;
        Tool::new("virsh")
            .call(scratch, ["-q", "undefine", IMPORTED])
            .await?;
        remove(&layout)?;
        remove(&machines)?;
        Ok(cost.time)
    }

    /// What the second of two disks adds to a registry that has the first, and nothing else.
    async fn pair(&self, pair: &Pair) -> Result<Figure, Failure> {
        let scratch = self.plan.scratch.join(tag_of(&pair.name));
        let registry = Registry::start(&scratch, 0).await?;
        let cannery = cannery(&self.plan.cannery, &scratch, &registry)?;
        let image = |tag| format!("{}/bench/disk:{tag}", registry.host);
        let mut held = vec![registry.holds()];
        for (disk, tag) in [(&pair.old, "old"), (&pair.new, "new")] {
            let mut arguments: Vec<OsString> = ["image", "push", "--format", NATIVE]
                .into_iter()
                .map(Into::into)
                .collect();
            if tag == "new" {
                arguments.extend(["--base".into(), image("old").into()]);
            }
            arguments.extend([disk.into(), image(tag).into()]);
            cannery.call(&scratch, arguments).await?;
            held.push(registry.holds());
        }
        let name = format!("{}: what it adds to the registry, against the whole", pair.name);
        let mut figure = Figure::of_bytes(name, Peer::None, Goal::Times(pair.goal));
        if let [before, old, new] = held[..] {
            figure.peer_counted(old - before);
            figure.counted(new - old);
        }
        remove(&scratch)?;
        Ok(figure)
    }
}

/// cannery with a state of its own in `folder`, and this registry.
fn cannery(program: &Path, folder: &Path, registry: &Registry) -> Result<Tool, Failure> {
    let config = folder.join("cannery.toml");
    let text = format!(
        "state_dir = {:?}\n[images]\nplain_http = [{:?}, \"localhost\"]\n",
        folder.join("state"),
        registry.host
    );
    std::fs::write(&config, text).map_err(|e| cannot("write", &config, &e))?;
    let mut cannery = Tool::new(program);
    cannery.arguments = vec!["--config".into(), config.into()];
    Ok(cannery)
}

/// sardinecake's tool, which finds a registry without TLS on port 80 of loopback.
fn sarde(program: &Path, scratch: &Path) -> Result<Tool, Failure> {
    let home = scratch.join("sarde");
    let folder = home.join(".config/containers");
    std::fs::create_dir_all(&folder).map_err(|e| cannot("make", &folder, &e))?;
    let file = folder.join("registries.conf");
    std::fs::write(&file, "[[registry]]\nlocation = \"localhost\"\ninsecure = true\n")
        .map_err(|e| cannot("write", &file, &e))?;
    let mut tool = Tool::new(program);
    tool.variables = vec![("HOME", home.into())];
    Ok(tool)
}

/// A machine with one disk, as sardinecake reads it; it is never started.
fn domain(disk: &Path) -> String {
    format!(
        "<domain type='qemu'><name>cannery-bench</name><memory unit='MiB'>256</memory><os><type arch='x86_64'>hvm</type></os>\
         <devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/><target dev='vda' bus='virtio'/></disk></devices></domain>\n",
        disk.display()
    )
}

/// A name as part of a repository's.
fn tag_of(name: &str) -> String {
    name.chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() {
                c.to_ascii_lowercase()
            } else {
                '-'
            }
        })
        .collect()
}
