//! The cache by hand: what is listed, kept, pruned, verified and mended, and fetched ahead. Images come from a layout folder, and
//! libvirt's own test driver stands in for the daemon.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on panics"
)]

#[path = "support/faulty_registry.rs"]
#[allow(dead_code, reason = "each suite uses its part of the registry")]
mod faulty_registry;
#[path = "support/image_fixture.rs"]
#[allow(dead_code, reason = "each suite uses its part of the fixture")]
mod image_fixture;

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use cannery::image::{
    Asker, Credentials, Disk, Error, Limits, PullPolicy, Registries, Request, Silent, Store,
};
use cannery::record::{Caller, JobKey, Jobs, Record};
use faulty_registry::{Fault, Registry};
use image_fixture::{Image, Layout, OCI_TAR, OCI_TAR_GZIP, Tar, noise};
use jiff::Timestamp;
use serde_json::{Value, json};

/// A host with a state folder, a layout folder of images, and settings.
struct Host {
    dir: tempfile::TempDir,
    layout: Layout,
    registry: Registry,
}

impl Host {
    fn new(images: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(&dir.path().join("layout"));
        let registry = Registry::new();
        let host = Self {
            dir,
            layout,
            registry,
        };
        host.write_settings("test:///default", images);
        host
    }

    fn write_settings(&self, uri: &str, images: &str) {
        let text = format!(
            "state_dir = \"{}\"\n[libvirt]\nuri = \"{uri}\"\n[images]\nkeep_free = 0\n{images}\n",
            self.state().display()
        );
        fs::write(self.at("cannery.toml"), text).unwrap();
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn state(&self) -> PathBuf {
        self.at("state")
    }

    fn store(&self) -> Store {
        Store::open(&self.state().join("store")).unwrap()
    }

    /// Adds an image to the layout; its reference.
    fn add(&self, tag: &str, seed: u64) -> String {
        let disk = disk(seed);
        let image = Image::container_disk(
            &Tar::new().dir("disk/").file("disk/disk.img", &disk).bytes(),
            if seed.is_multiple_of(2) {
                OCI_TAR
            } else {
                OCI_TAR_GZIP
            },
        );
        self.layout.add(tag, &image);
        self.layout.reference(tag)
    }

    /// Adds an image twice to a registry, with other labels the second time; their references.
    fn add_relabelled(&self, seed: u64) -> [String; 2] {
        let registry = &self.registry;
        self.write_settings(
            "test:///default",
            &format!("plain_http = [\"{}\"]", registry.host),
        );
        let archive = Tar::new().dir("disk/").file("disk/disk.img", &disk(seed)).bytes();
        ["1G", "2G"].map(|memory| {
            let image = Image::container_disk(&archive, OCI_TAR_GZIP).label("io.cannery.memory", memory);
            let digest = self.layout.add(memory, &image);
            registry.add(&self.layout.dir, &digest, memory);
            format!("{}/vm:{memory}", registry.host)
        })
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cannery"));
        command
            .arg("--config")
            .arg(self.at("cannery.toml"))
            .args(arguments)
            .env("HOME", self.dir.path());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// What a call prints that ends well.
    fn says(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a call complains about.
    fn refuses(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:?}");
        format!(
            "{}{}",
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap()
        )
    }

    fn list(&self) -> Vec<Value> {
        serde_json::from_str(&self.says(&["image", "list", "--format", "json"])).unwrap()
    }

    fn pull(&self, reference: &str) -> String {
        self.says(&["image", "pull", "--quiet", reference])
            .trim()
            .to_owned()
    }

    fn disk(&self, digest: &str) -> PathBuf {
        self.state()
            .join("store/disks")
            .join(digest.trim_start_matches("sha256:"))
            .join("disk.raw")
    }

    fn noted_unsynced(&self, digest: &str) -> PathBuf {
        let noted = self.state().join("store/unsynced");
        noted.join(digest.trim_start_matches("sha256:"))
    }

    /// Calls it to be killed; whether it came that far.
    fn killed_at(&self, point: &str, arguments: &[&str]) -> bool {
        let mut command = self.command(arguments);
        let output = command.env("CANNERY_KILL_AT", format!("{point}:1")).output();
        output.unwrap().status.signal() == Some(9)
    }

    fn partial(&self) -> usize {
        fs::read_dir(self.state().join("store/partial")).unwrap().count()
    }

    /// A job that is here and uses an image.
    fn job(&self, id: u64, digest: &str) -> cannery::record::JobDir {
        let now = Timestamp::now();
        let key = JobKey::new("https://gitlab.example.com", id, 0);
        let session = self.at(&format!("response-{id}.json"));
        fs::write(&session, "{}").unwrap();
        let deadline = now.saturating_add(jiff::SignedDuration::from_hours(1)).unwrap();
        let mut record = Record::new(key, session, Caller::of_this_call(), now, deadline);
        record.digest = Some(digest.to_owned());
        Jobs::open(&self.state()).unwrap().create(record).unwrap()
    }
}

/// A raw disk with a hole.
fn disk(seed: u64) -> Vec<u8> {
    let mut disk = noise(seed, 200 * 1024);
    disk[510] = 0x55;
    disk[511] = 0xaa;
    disk.resize(4 << 20, 0);
    disk
}

fn request(reference: &str) -> Request {
    Request {
        requirements: cannery::image::Requirements::default(),
        reference: reference.parse().unwrap(),
        architecture: "x86_64".to_owned(),
        policies: vec![PullPolicy::IfNotPresent],
        credentials: Credentials::none(),
        registries: Registries::without_tls([] as [&str; 0]),
        limits: Limits {
            max_disk: 1 << 30,
            keep_free: 0,
        },
        asker: Asker::Operator,
    }
}

fn provide(store: &Store, reference: &str) -> Result<Disk, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(store.provide(&request(reference), &Silent))
}

/// Changes one byte of a file of the store, as a bad medium would.
fn damage(path: &Path) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 1000).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 1000).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o444)).unwrap();
}

/// Cuts a file to nothing, as a crash may leave one that was never synced.
fn empty(path: &Path) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    fs::File::create(path).unwrap();
}

/// The host has stopped without warning and started again: what is noted was noted in an earlier run.
fn crash(note: &Path) {
    drop(fs::remove_file(note));
    fs::write(note, "an earlier run\n").unwrap();
}

#[test]
fn images_are_listed_named_pinned_and_removed() {
    let host = Host::new("");
    let (one, two) = (host.add("one", 1), host.add("two", 2));
    let digest = host.pull(&one);
    let other = host.pull(&two);
    let alias = "r.example.com/vm:stable";
    assert_eq!(host.says(&["image", "tag", &one, alias]).trim(), digest);
    assert_eq!(
        host.says(&["image", "pin", &digest[7..15], "--name", "release"])
            .trim(),
        digest
    );
    let rows = host.list();
    let row = rows.iter().find(|row| row["digest"] == digest.as_str()).unwrap();
    assert_eq!(row["references"], json!([one, alias]));
    assert_eq!(
        (&row["format"], &row["virtual_size"]),
        (&"raw".into(), &(4 << 20).into())
    );
    assert_eq!(row["pins"], json!(["release"]));
    let size = row["size"].as_u64().unwrap();
    assert!((200 << 10..1 << 20).contains(&size), "holes take no room: {size}");
    let table = host.says(&["image", "ls", "--digests"]);
    assert!(
        table
            .lines()
            .any(|line| line.contains(alias) && line.contains(&digest) && line.ends_with("pinned")),
        "{table}"
    );
    // Of one image, only the names are shown that are asked for.
    for (words, shown) in [
        (&["vm"][..], &[alias][..]),
        (&["*:stable", "layout:two"], &[alias, &two]),
        (&[&digest[..19]], &[&one, alias]),
        (&["nothing/like/it"], &[]),
    ] {
        let list = |option: &str| host.says(&[&["image", "list", option], words].concat());
        let mut names: Vec<String> = list("--digests")
            .lines()
            .skip(1)
            .map(|line| line.split(' ').next().unwrap().to_owned())
            .collect();
        names.sort_unstable();
        let mut expected = shown.to_vec();
        expected.sort_unstable();
        assert_eq!(names, expected, "{words:?}");
        let images = [(&one, &digest), (&two, &other)];
        let wanted =
            |name: &String| shown.contains(&name.as_str()) || (*name == one && shown.contains(&alias));
        let wanted = images.iter().filter(|(name, _)| wanted(name)).count();
        assert_eq!(list("--quiet").lines().count(), wanted, "{words:?}");
        let json: Vec<Value> = serde_json::from_str(&list("--format=json")).unwrap();
        assert_eq!(json.len(), wanted, "{words:?}");
    }
    // What is here can be asked for by its digest, or the beginning of one.
    for word in [&digest[..19], &digest[7..11], &digest, &one] {
        let seen = host.says(&["image", "inspect", "--format", "json", word]);
        let seen: Value = serde_json::from_str(&seen).unwrap();
        assert_eq!(
            (&seen["digest"], &seen["reference"]),
            (&digest.as_str().into(), &one.as_str().into())
        );
    }
    let unknown = host.refuses(&["image", "inspect", "sha256:0123456789ab"]);
    assert!(
        unknown.contains("No image with the digest sha256:0123456789ab is here"),
        "{unknown}"
    );
    // A job that names the alias is given the image without a registry, as its policy says.
    assert_eq!(provide(&host.store(), alias).unwrap().digest.to_string(), digest);

    let why = host.says(&["image", "why", alias]);
    assert!(why.contains("kept by the pin release"), "{why}");
    assert_eq!(host.says(&["image", "rm", alias]), format!("Untagged: {alias}\n"));
    let kept = host.refuses(&["image", "rm", &one]);
    assert!(kept.contains("kept by the pin release"), "{kept}");
    assert!(
        host.refuses(&["image", "unpin", &one, "--name", "other"])
            .contains("not pinned")
    );
    host.says(&["image", "unpin", &one]);
    assert_eq!(
        host.says(&["image", "rm", &one]),
        format!("Untagged: {one}\nDeleted: {digest}\n")
    );
    assert!(!host.disk(&digest).exists());
    assert!(host.refuses(&["image", "rm", &one]).contains("is on this host"));
    assert_eq!(host.list().len(), 1);
    assert!(host.says(&["image", "why", &other]).contains("nothing keeps it"));
    assert_eq!(host.partial(), 0);
}

#[test]
fn prune_takes_what_nothing_keeps_and_says_so() {
    let host = Host::new("");
    let (moved, kept) = (host.add("moved", 1), host.add("kept", 3));
    let old = host.pull(&moved);
    let kept = host.pull(&kept);
    host.add("moved", 5);
    // Where it came from there is another by now.
    let seen = host.refuses(&["image", "inspect", &old]);
    assert!(seen.contains("is another image by now"), "{seen}");
    let new = host.pull(&moved);
    // The old image of a tag that has moved has no name any more.
    let would = host.says(&["image", "prune", "--dry-run"]);
    assert!(
        would.contains(&format!("would delete {old}")) && would.contains("no name"),
        "{would}"
    );
    assert!(host.disk(&old).exists());
    let did = host.says(&["image", "prune"]);
    assert!(
        did.contains(&format!("Deleted: {old}")) && did.ends_with("freed.\n"),
        "{did}"
    );
    assert!(!host.disk(&old).exists() && host.disk(&new).exists() && host.disk(&kept).exists());

    // Of two images the one that was used last stays.
    std::thread::sleep(std::time::Duration::from_millis(20));
    host.pull(&moved);
    let gone: Vec<Value> =
        serde_json::from_str(&host.says(&["image", "prune", "--max-size", "300K", "--format", "json"]))
            .unwrap();
    assert_eq!(gone.len(), 1, "{gone:?}");
    assert_eq!(gone[0]["digest"], kept.as_str());
    // A job and its record keep an image, whatever is asked for.
    let job = host.job(7, &new);
    assert_eq!(host.says(&["image", "prune", "--all"]), "0 B freed.\n");
    let why = host.says(&["image", "why", &new]);
    assert!(why.contains(&format!("kept by the job {}", job.key())), "{why}");
    fs::remove_dir_all(host.state().join("jobs").join(job.key().to_string())).unwrap();
    // So does whoever was given it and has not said so in a record yet.
    let given = provide(&host.store(), &moved).unwrap();
    assert_eq!(host.says(&["image", "prune", "--all"]), "0 B freed.\n");
    let why = host.says(&["image", "why", &new]);
    assert!(
        why.contains(&format!("kept by the process {}", std::process::id())),
        "{why}"
    );
    drop(given);
    assert!(host.says(&["image", "prune", "--all"]).contains(&new));
    assert!(host.list().is_empty());
}

#[test]
fn what_two_images_share_is_freed_and_counted_with_the_second() {
    let host = Host::new("");
    let images = host.add_relabelled(7).map(|reference| host.pull(&reference));
    let inode = |digest: &String| fs::metadata(host.disk(digest)).unwrap().ino();
    assert_eq!(inode(&images[0]), inode(&images[1]));
    let arguments = ["image", "prune", "--max-size", "100K", "--format", "json"];
    let gone: Vec<Value> = serde_json::from_str(&host.says(&arguments)).unwrap();
    let bytes: Vec<u64> = gone.iter().map(|gone| gone["bytes"].as_u64().unwrap()).collect();
    assert_eq!(bytes.len(), 2, "{gone:?}");
    assert!(bytes[0] < 64 << 10 && bytes[1] >= 200 << 10, "{gone:?}");
    assert!(host.list().is_empty());
}

#[test]
fn before_an_image_exceeds_the_budget_the_one_used_least_recently_goes() {
    let host = Host::new("max_size = \"600K\"");
    let names = [1, 3, 5].map(|seed| host.add(&format!("vm-{seed}"), seed));
    let [first, second] = [&names[0], &names[1]].map(|name| {
        std::thread::sleep(std::time::Duration::from_millis(20));
        host.pull(name)
    });
    std::thread::sleep(std::time::Duration::from_millis(20));
    host.pull(&names[0]);
    // What cannot become an image takes the place of none.
    let nothing = |claim: &str, media_type: &str, size: u64, reason: &str| {
        let mut layer = host.layout.blob(b"nothing", media_type);
        layer["size"] = size.into();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": host.layout.blob(b"{}", "application/vnd.oci.empty.v1+json"),
            "layers": [layer],
        });
        let manifest = serde_json::to_vec(&manifest).unwrap();
        let descriptor = host
            .layout
            .blob(&manifest, "application/vnd.oci.image.manifest.v1+json");
        host.layout.tag(claim, descriptor);
        let said = host.refuses(&["image", "pull", "--quiet", &host.layout.reference(claim)]);
        assert!(said.contains(reason), "{said}");
        assert!(
            host.disk(&first).exists() && host.disk(&second).exists(),
            "{claim}"
        );
    };
    nothing(
        "foreign",
        "application/vnd.cncf.helm.chart",
        400_000,
        "a Helm chart",
    );
    nothing(
        "endless",
        OCI_TAR_GZIP,
        1 << 60,
        "is too large: its packed content",
    );
    nothing("beyond", OCI_TAR_GZIP, 700_000, "instead of 700000");

    let third = host.pull(&names[2]);
    assert!(host.disk(&first).exists() && host.disk(&third).exists());
    assert!(!host.disk(&second).exists());
}

#[test]
#[ignore = "needs root, to become another user"]
fn what_another_user_of_a_shared_store_has_begun_or_brought_holds_nobody_up() {
    const NOBODY: u32 = 65534;
    let host = Host::new("");
    let shared = |path: &Path, mode| {
        std::os::unix::fs::chown(path, None, Some(NOBODY)).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let program = host.at("cannery");
    fs::copy(env!("CARGO_BIN_EXE_cannery"), &program).unwrap();
    shared(&program, 0o755);
    shared(host.dir.path(), 0o755);
    fs::create_dir(host.state()).unwrap();
    shared(&host.state(), 0o2775);
    let nobody_pulls = |reference: &str| {
        let output = Command::new("setpriv")
            .args([
                &format!("--reuid={NOBODY}"),
                &format!("--regid={NOBODY}"),
                "--clear-groups",
            ])
            .arg(&program)
            .arg("--config")
            .arg(host.at("cannery.toml"))
            .args(["image", "pull", "--quiet", reference])
            .env("HOME", host.dir.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    // Killed when a layer was done, whose file is root's alone.
    let begun = host.add("begun", 1);
    assert!(host.killed_at("layer-kept", &["image", "pull", &begun]));
    assert_eq!(host.partial(), 2, "a folder and its lock");
    let digest = nobody_pulls(&begun);
    assert_eq!(fs::metadata(host.disk(&digest)).unwrap().uid(), NOBODY);

    // A disk that is root's cannot be linked by others.
    let relabelled = host.add_relabelled(3);
    let first = host.pull(&relabelled[0]);
    let second = nobody_pulls(&relabelled[1]);
    assert!(fs::read(host.disk(&second)).unwrap() == disk(3));
    assert!(first != second && host.disk(&first).exists());
}

#[test]
fn what_a_domain_names_is_kept_down_its_whole_chain() {
    let host = Host::new("");
    let digest = host.pull(&host.add("vm", 1));
    // A domain that is none of ours, on a layer on a layer on the image.
    let base = host.disk(&digest);
    let mut below = base.display().to_string();
    for name in ["lower.qcow2", "upper.qcow2"] {
        let layer = host.at(name);
        let mut file = vec![0; 4096];
        file[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        file[8..16].copy_from_slice(&512_u64.to_be_bytes());
        file[16..20].copy_from_slice(&u32::try_from(below.len()).unwrap().to_be_bytes());
        file[512..512 + below.len()].copy_from_slice(below.as_bytes());
        fs::write(&layer, file).unwrap();
        below = layer.display().to_string();
    }
    let node = format!(
        "<node><domain type='test' xmlns:test='http://libvirt.org/schemas/domain/test/1.0'><name>holder</name><memory>65536</memory>\
         <os><type>hvm</type></os><devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
         <source file='{below}'/><target dev='vda' bus='virtio'/></disk></devices></domain></node>"
    );
    fs::write(host.at("node.xml"), node).unwrap();
    host.write_settings(&format!("test://{}", host.at("node.xml").display()), "");
    assert_eq!(host.says(&["image", "prune", "--all"]), "0 B freed.\n");
    let why = host.says(&["image", "why", &digest]);
    assert!(why.contains("kept by the libvirt domain holder"), "{why}");
    // Where libvirt cannot be asked, nobody knows, and nothing goes.
    host.write_settings("test:///nonexistent/node.xml", "");
    host.refuses(&["image", "prune", "--all"]);
    assert!(base.exists());
}

#[test]
fn a_damaged_image_is_given_to_nobody_and_mended_unless_it_is_in_use() {
    let host = Host::new("");
    let reference = host.add("vm", 1);
    let digest = host.pull(&reference);
    let whole = fs::read(host.disk(&digest)).unwrap();
    assert_eq!(host.says(&["image", "verify"]), format!("{digest} whole\n"));

    damage(&host.disk(&digest));
    let said = host.says(&["image", "verify", &reference]);
    assert!(
        said.starts_with(&format!("{digest} mended (disk.raw has other bytes")),
        "{said}"
    );
    assert_eq!(fs::read(host.disk(&digest)).unwrap(), whole);
    assert_eq!(host.says(&["image", "verify"]), format!("{digest} whole\n"));
    let names: Vec<Value> = host.list().remove(0)["references"].as_array().unwrap().clone();
    assert_eq!(names, [reference.as_str()], "mending leaves no name");

    // Never under a running job; but no other job is given it.
    let job = host.job(7, &digest);
    damage(&host.disk(&digest));
    let said = host.refuses(&["image", "verify"]);
    assert!(
        said.contains("not mended") && said.contains(&format!("the job {}", job.key())),
        "{said}"
    );
    assert_ne!(fs::read(host.disk(&digest)).unwrap(), whole);
    assert_eq!(host.list()[0]["format"], Value::Null);
    let why = host.says(&["image", "why", &reference]);
    assert!(
        why.contains("damaged: disk.raw has other bytes than those that came; no job is given it"),
        "{why}"
    );
    let never = host.refuses(&["image", "pull", "--policy", "never", &reference]);
    for part in [
        "is damaged on this host (disk.raw has other bytes",
        &format!("`cannery image verify {digest}`"),
    ] {
        assert!(never.contains(part), "{part}: {never}");
    }
    assert!(host.store().find(&digest.parse().unwrap()).unwrap().is_none());
    // The next that asks has it fetched anew; what the job has open stays as it is.
    let open = fs::File::open(host.disk(&digest)).unwrap();
    assert!(!provide(&host.store(), &reference).unwrap().from_cache);
    assert_eq!(fs::read(host.disk(&digest)).unwrap(), whole);
    let mut byte = [0];
    open.read_exact_at(&mut byte, 1000).unwrap();
    assert_ne!(byte[0], whole[1000]);
    assert_eq!(host.says(&["image", "verify"]), format!("{digest} whole\n"));

    // What is missing or cut is damage as well, and what cannot be fetched is said.
    fs::remove_dir_all(host.state().join("jobs").join(job.key().to_string())).unwrap();
    fs::remove_file(host.disk(&digest)).unwrap();
    let why = host.says(&["image", "why", "--format", "json", &reference]);
    let why: Value = serde_json::from_str(&why).unwrap();
    assert_eq!(why["damaged"], "disk.raw is missing");
    assert!(
        host.says(&["image", "verify"])
            .contains("mended (disk.raw is missing)")
    );
    fs::remove_dir_all(&host.layout.dir).unwrap();
    damage(&host.disk(&digest));
    let said = host.refuses(&["image", "verify", "--format", "json"]);
    assert!(
        said.contains("\"damaged\"") && said.contains("damaged: 1 of 1 images"),
        "{said}"
    );
    // What a medium could not give back for a while is whole again when it can.
    damage(&host.disk(&digest));
    assert_eq!(host.says(&["image", "verify"]), format!("{digest} whole\n"));
    assert_eq!(host.list()[0]["format"], "raw");
}

#[test]
fn an_image_that_came_just_before_the_host_crashed_is_compared_with_what_came() {
    let host = Host::new("");
    let reference = host.add("vm", 1);
    let digest = host.pull(&reference);
    let whole = fs::read(host.disk(&digest)).unwrap();
    let record = host.disk(&digest).with_file_name("image.json");
    let note = host.noted_unsynced(&digest);
    assert!(note.exists());
    assert!(provide(&host.store(), &reference).unwrap().from_cache);

    // Nothing was lost: it is read, and given.
    crash(&note);
    assert!(host.store().find(&digest.parse().unwrap()).unwrap().is_none());
    assert_eq!(host.list()[0]["unverified"], true);
    assert!(host.says(&["image", "list"]).contains(" unverified "));
    assert_eq!(host.says(&["image", "list", "-q"]), format!("{digest}\n"));
    assert!(provide(&host.store(), &reference).unwrap().from_cache);
    assert_eq!(host.list()[0]["unverified"], false);
    assert!(!note.exists(), "it was synced");

    // Some of it was.
    let disk: PathBuf = host.disk(&digest);
    for (lose, file) in [(damage as fn(&Path), &disk), (empty, &disk), (empty, &record)] {
        crash(&note);
        lose(file);
        assert!(!provide(&host.store(), &reference).unwrap().from_cache);
        assert_eq!(fs::read(&disk).unwrap(), whole);
    }
    assert_eq!(host.says(&["image", "verify"]), format!("{digest} whole\n"));
    assert_eq!(host.partial(), 0);
}

#[test]
fn what_was_only_begun_when_the_host_crashed_is_begun_anew() {
    let host = Host::new("");
    let reference = host.add("vm", 2);
    let killed = host.killed_at("layer-kept", &["image", "pull", &reference]);
    assert!(killed, "there is one layer");
    let digest = fs::read_dir(host.state().join("store/unsynced")).unwrap();
    let digest = digest.last().unwrap().unwrap().file_name().into_string().unwrap();
    let begun = host.state().join("store/partial").join(&digest);
    let mut lost = 0;
    for entry in fs::read_dir(&begun).unwrap() {
        let path = entry.unwrap().path();
        if path.metadata().unwrap().len() == 4 << 20 {
            damage(&path);
            lost += 1;
        }
    }
    assert_eq!(lost, 1, "the disk is unpacked");
    crash(&host.noted_unsynced(&digest));
    host.pull(&reference);
    assert_eq!(fs::read(host.disk(&digest)).unwrap(), disk(2));
}

#[test]
fn minutes_later_an_image_is_synced_by_whoever_comes() {
    let host = Host::new("");
    let reference = host.add("vm", 1);
    let digest = host.pull(&reference);
    let note = host.noted_unsynced(&digest);
    host.list();
    assert!(note.exists(), "the system may still be writing it");
    let folder = fs::File::open(host.disk(&digest).parent().unwrap()).unwrap();
    folder
        .set_modified(std::time::SystemTime::now() - std::time::Duration::from_secs(600))
        .unwrap();
    assert!(host.killed_at("image-settled", &["image", "list"]));
    assert!(note.exists());
    host.list();
    assert!(!note.exists());
    // Of one that goes before that, nothing is left either.
    let other = host.add("other", 3);
    let digest = host.pull(&other);
    host.says(&["image", "rm", &digest]);
    host.list();
    assert!(!host.noted_unsynced(&digest).exists());
    crash(&host.noted_unsynced(&digest));
    host.list();
    assert!(!host.noted_unsynced(&digest).exists());
    assert_eq!(host.partial(), 0);
}

#[test]
fn prewarm_fetches_what_lists_settings_and_pipelines_name_and_tries_all() {
    let host = Host::new("");
    let [a, b, c] = [("a", 1), ("b", 3), ("c", 5)].map(|(tag, seed)| host.add(tag, seed));
    host.write_settings("test:///default", &format!("prewarm = [\"{a}\"]"));
    host.says(&["image", "prewarm"]);
    assert_eq!(host.list().len(), 1);
    fs::write(host.at("list"), format!("# ours\n{b}\n\noci:/nowhere/at/all:1\n")).unwrap();
    let pipeline = format!(
        "variables: {{ DIR: \"{}\" }}\nbuild: {{ image: \"oci:$DIR:c\" }}\nother: {{ image: $CI_REGISTRY_IMAGE }}\n",
        host.layout.dir.display()
    );
    fs::write(host.at("ci.yml"), pipeline).unwrap();
    let (list, ci) = (
        host.at("list").display().to_string(),
        host.at("ci.yml").display().to_string(),
    );
    let said = host.refuses(&["image", "prewarm", "--file", &list, "--gitlab-ci", &ci]);
    for part in [
        "oci:/nowhere/at/all:1",
        "1 of 3 images could not be fetched",
        "passed over: $CI_REGISTRY_IMAGE",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let mut names: Vec<String> = host
        .list()
        .iter()
        .map(|row| row["references"][0].as_str().unwrap().to_owned())
        .collect();
    names.sort_unstable();
    assert_eq!(names, [a, b, c]);
}

#[test]
fn programs_are_told_what_came_and_what_went() {
    let host = Host::new("");
    let (one, two) = (host.add("one", 1), host.add("two", 2));
    let nowhere = "oci:/nowhere/at/all:1";
    // What a call says on stdout, and whether it ended well.
    let said = |arguments: &[&str]| {
        let output = host.run(&[arguments, &["--format", "json"]].concat());
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        (json, output.status.success())
    };
    let (pulled, well) = said(&["image", "pull", &one, nowhere]);
    assert!(!well);
    let row = &pulled[0];
    let digest = row["digest"].as_str().unwrap();
    assert_eq!(pulled.as_array().unwrap().len(), 1);
    assert_eq!(
        (&row["reference"], &row["format"]),
        (&one.as_str().into(), &"raw".into())
    );
    assert_eq!(row["path"], host.disk(digest).display().to_string());
    assert_eq!(
        (&row["virtual_size"], &row["from_cache"]),
        (&(4 << 20).into(), &false.into())
    );
    assert!(row["fetched_bytes"].as_u64().unwrap() > 0);

    let (warmed, well) = said(&["image", "prewarm", &one, &two, nowhere]);
    assert!(!well);
    let rows = warmed.as_array().unwrap();
    let failed: Vec<&str> = rows
        .iter()
        .filter(|row| row["error"].is_string())
        .map(|row| row["reference"].as_str().unwrap())
        .collect();
    assert_eq!((rows.len(), failed), (3, vec![nowhere]));
    let row = rows.iter().find(|row| row["reference"] == one.as_str()).unwrap();
    assert_eq!(
        (&row["digest"], &row["fetched_bytes"]),
        (&digest.into(), &0.into())
    );

    let other = host.pull(&two);
    let alias = "r.example.com/vm:stable";
    let table: [(&[&str], Value); 4] = [
        (
            &["image", "tag", &one, alias],
            json!({"reference": alias, "digest": digest}),
        ),
        (
            &["image", "pin", &two, alias, "--name", "team"],
            json!([{"digest": other, "pin": "team"}, {"digest": digest, "pin": "team"}]),
        ),
        (
            &["image", "pin", &two],
            json!([{"digest": other, "pin": "operator"}]),
        ),
        (
            &["image", "unpin", alias],
            json!([{"digest": digest, "pins": ["team"]}]),
        ),
    ];
    for (arguments, expected) in table {
        assert_eq!(said(arguments), (expected, true), "{arguments:?}");
    }
    let (unpinned, well) = said(&["image", "unpin", "--name", "team", &two, &one]);
    assert!(!well, "the second has none of that name");
    assert_eq!(unpinned, json!([{"digest": other, "pins": ["team"]}]));

    host.says(&["image", "rm", alias]);
    let (gone, well) = said(&["image", "rm", &one, &two]);
    assert!(!well, "the second is pinned");
    let expected = json!([{"untagged": one}, {"deleted": digest}]);
    assert_eq!(gone, expected);
}

#[test]
fn who_waits_for_a_registry_that_does_not_answer_is_told_so() {
    // One says nothing at all, the other stops in the middle of a layer.
    let (mute, halting) = (Host::new(""), Host::new(""));
    let mut calls = Vec::new();
    for (host, command) in [(&mute, "pull"), (&mute, "inspect"), (&halting, "pull")] {
        let [image, _] = host.add_relabelled(1);
        mute.registry.be_mute(true);
        halting.registry.hold_after(Some(0));
        let mut call = host.command(&["image", command, &image]);
        let call = call.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        calls.push((&host.registry.host, call));
    }
    for (registry, call) in &mut calls {
        let waiting = format!("waiting for {registry}, which has not answered for 5.");
        let said = BufReader::new(call.stderr.as_mut().unwrap()).lines();
        let mut lines = said.map(Result::unwrap);
        let line = lines.find(|line| line.contains(&waiting)).unwrap();
        assert!(line.contains("given up after about 2 min 6 s"), "{line}");
    }
    mute.registry.be_mute(false);
    halting.registry.hold_after(None);
    for (_, call) in calls {
        let output = call.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
}

#[test]
fn a_pull_that_is_interrupted_on_a_slow_link_keeps_most_of_what_came() {
    const SIZE: usize = 96 << 20;
    const INTERRUPTED: u64 = 60 << 20;
    for media_type in [OCI_TAR, OCI_TAR_GZIP] {
        let host = Host::new("");
        let registry = &host.registry;
        host.write_settings(
            "test:///default",
            &format!("plain_http = [\"{}\"]", registry.host),
        );
        let archive = Tar::new().file("disk/disk.img", &noise(11, SIZE)).bytes();
        let digest = host
            .layout
            .add("slow", &Image::container_disk(&archive, media_type));
        registry.add(&host.layout.dir, &digest, "slow");
        registry.misbehave(1, 100, &[Fault::Slow]);
        let reference = format!("{}/vm:slow", registry.host);
        let mut pull = host.command(&["image", "pull", &reference]);
        let pull = pull.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let begin = std::time::Instant::now();
        while registry.sent() < INTERRUPTED {
            assert!(begin.elapsed().as_secs() < 60, "nothing comes");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        rustix::process::kill_process(
            rustix::process::Pid::from_child(&pull),
            rustix::process::Signal::INT,
        )
        .unwrap();
        let output = pull.wait_with_output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(
            output.status.code() == Some(1) && said.contains("was interrupted"),
            "{said}"
        );

        registry.misbehave(0, 0, &[]);
        let before = registry.sent();
        host.pull(&reference);
        let again = registry.sent() - before;
        let most = SIZE as u64 - INTERRUPTED / 3;
        assert!(
            again <= most,
            "{media_type}: {before} had come, and {again} were sent again"
        );
    }
}

#[test]
fn nobody_loses_an_image_that_was_given_while_others_prune() {
    let host = Host::new("");
    let reference = host.add("vm", 2);
    host.pull(&reference);
    let expected = disk(2);
    let store = host.store();
    let (removed, given) = std::thread::scope(|scope| {
        let jobs: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut given = 0;
                    for _ in 0..40 {
                        let disk = provide(&store, &reference).unwrap();
                        assert_eq!(fs::read(&disk.path).unwrap(), expected);
                        given += 1;
                        drop(disk);
                        // Somebody else's turn.
                        std::thread::sleep(std::time::Duration::from_millis(5));
                    }
                    given
                })
            })
            .collect();
        let pruner = scope.spawn(|| {
            let mut removed = 0;
            while !jobs.iter().all(std::thread::ScopedJoinHandle::is_finished) {
                for held in store.inventory().unwrap() {
                    let gone = store.collect(&held.digest, || Ok::<_, Error>(false)).unwrap();
                    removed += u32::from(gone);
                }
            }
            (removed, jobs)
        });
        let (removed, jobs) = pruner.join().unwrap();
        let given: u32 = jobs.into_iter().map(|job| job.join().unwrap()).sum();
        (removed, given)
    });
    assert_eq!(given, 80);
    assert!(removed > 0, "the pruner never got in");
    drop(Store::open(&host.state().join("store")).unwrap());
    assert_eq!(host.partial(), 0);
}

#[cfg(debug_assertions)]
#[test]
fn a_kill_in_any_command_leaves_each_image_whole_or_gone() {
    let host = Host::new("");
    let reference = host.add("vm", 1);
    let again = "r.example.com/vm:again";
    for (point, nth, arguments) in [
        ("blob-begun", 1, &["image", "tag", &reference, again][..]),
        ("reference-kept", 1, &["image", "tag", &reference, again]),
        ("blob-begun", 1, &["image", "pin", &reference]),
        ("pin-kept", 1, &["image", "pin", &reference]),
        ("pin-removed", 1, &["image", "unpin", &reference]),
        ("reference-forgotten", 1, &["image", "rm", again]),
        ("image-hidden", 1, &["image", "rm", &reference]),
        ("reference-forgotten", 1, &["image", "rm", &reference]),
        ("image-removed", 1, &["image", "rm", &reference]),
        ("image-hidden", 1, &["image", "prune", "--all"]),
        ("reference-forgotten", 1, &["image", "prune", "--all"]),
        ("image-removed", 1, &["image", "prune", "--all"]),
    ] {
        let digest = host.pull(&reference);
        if point == "pin-removed" {
            host.says(&["image", "pin", &reference]);
        }
        if arguments.contains(&"rm") && arguments.contains(&again) {
            host.says(&["image", "tag", &reference, again]);
        }
        let status = host
            .command(arguments)
            .env("CANNERY_KILL_AT", format!("{point}:{nth}"))
            .output()
            .unwrap()
            .status;
        assert_eq!(status.signal(), Some(9), "{point} {arguments:?}: {status:?}");
        // Whoever comes next sweeps.
        let rows = host.list();
        assert_eq!(host.partial(), 0, "{point} {arguments:?}");
        match rows.as_slice() {
            [] => assert!(!host.disk(&digest).exists()),
            [row] => {
                assert_eq!(row["format"], "raw");
                assert_eq!(host.says(&["image", "verify"]), format!("{digest} whole\n"));
                // It can be let go and removed without more ado.
                drop(host.run(&["image", "unpin", &reference]));
                host.says(&["image", "rm", &digest]);
            }
            rows => panic!("{rows:?}"),
        }
        // Names of what is gone are gone after the next prune.
        host.says(&["image", "prune"]);
        assert!(host.store().names().unwrap().is_empty(), "{point} {arguments:?}");
    }
}
