//! What is wrong before a machine starts: settings, what the runner hands over, registries, images, libvirt, networks. Each case
//! ends with the right exit code and a sentence that helps, and leaves nothing.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "support/image_fixture.rs"]
#[allow(dead_code, reason = "each suite uses its part of the fixture")]
mod image_fixture;
#[path = "support/registry_fixture.rs"]
#[allow(dead_code, reason = "each suite uses its part of the fixture")]
mod registry_fixture;
mod support;

use std::fs;
use std::process::Command;

use image_fixture::{Image, Layout, OCI_TAR, OCI_TAR_GZIP, Tar, qcow2_disk, raw_disk, sha256};
use registry_fixture::{PASSWORD, Registry, USER};
use serde_json::json;
use support::host::Host;
use support::stages::{BUILD_FAILURE, SYSTEM_FAILURE, Stages, finished};

/// A machine that cannot be described, which is said after the image was fetched and before a machine starts.
const NO_FURTHER: &str = "[machine]\naccelerator = \"emulation\"\nmachine_type = \"pc-i440fx-7.2\"";
const WENT_SO_FAR: &str = "machine type \"pc-i440fx-7.2\"";

fn replaced(host: &Host, from: &str, to: &str) {
    let text = host.settings_text();
    assert!(text.contains(from), "{text}");
    host.write_settings(&text.replacen(from, to, 1));
}

/// A host whose jobs may use this registry.
fn host_with(registry: &Registry, settings: &str) -> Host {
    let host = Host::new(&[], settings);
    let name = &registry.host;
    replaced(
        &host,
        "[images]\n",
        &format!("[images]\nallow = [\"{name}/**\"]\nplain_http = [\"{name}\"]\n"),
    );
    host
}

fn pushed(host: &Host, registry: &Registry, image: &Image) -> String {
    let layout = Layout::new(&host.folder().join("pushed"));
    layout.add("vm", image);
    registry.push(&layout.reference("vm"), "team/vm:1");
    format!("{}/team/vm:1", registry.host)
}

fn container_disk(name: &str, disk: &[u8]) -> Image {
    Image::container_disk(&Tar::new().dir("disk/").file(name, disk).bytes(), OCI_TAR_GZIP)
}

/// The four calls with what is wrong in the settings or the environment: each says so.
fn every_stage(stages: &Stages<'_>, parts: &[&str]) {
    for call in [
        stages.config(),
        stages.prepare(),
        stages.script("true"),
        stages.cleanup(),
    ] {
        assert_eq!(call.failed(SYSTEM_FAILURE, parts).text(), "");
    }
    stages.nothing_is_left();
}

#[test]
fn a_mistake_in_the_settings_is_shown_with_its_place() {
    let host = Host::new(&[], "slotz = 7");
    let line = host.settings_text().lines().count();
    every_stage(
        &Stages::new(&host, "vm"),
        &[&format!("cannery.toml:{line}:1"), "slotz", "docs/configure.md"],
    );
    for (text, part) in [
        ("state_dir = 7\n", "cannery.toml:1:13"),
        ("[network]\nslots = \"many\"\n", "cannery.toml:2:9"),
        ("state_dir = \"/x\n", "cannery.toml:1:"),
        ("[network]\nslots = 0\n", "network.slots"),
    ] {
        host.write_settings(text);
        let call = Stages::new(&host, "vm").prepare();
        call.failed(SYSTEM_FAILURE, &[part]);
    }
    fs::remove_file(host.settings()).unwrap();
    Stages::new(&host, "vm")
        .prepare()
        .failed(SYSTEM_FAILURE, &["cannery.toml"]);
}

#[test]
fn wrong_arguments_of_a_stage_are_the_operators() {
    let host = Host::new(&[], "");
    let stages = Stages::new(&host, "vm");
    for arguments in [
        &["run"][..],
        &["run", "/script"],
        &["prepare", "--nonsense"],
        &["preparee"],
        &[],
    ] {
        let call = stages.call(arguments);
        assert_eq!(call.code, SYSTEM_FAILURE, "{arguments:?}: {}", call.log);
        assert_ne!(call.log, "", "{arguments:?}");
    }
    let nobody = stages
        .without("JOB_RESPONSE_FILE")
        .without("SYSTEM_FAILURE_EXIT_CODE");
    assert_eq!(nobody.call(&["preparee"]).code, 2);
}

#[test]
fn a_response_file_that_is_none_is_refused_and_never_quoted() {
    let host = Host::new(&[], "");
    let stages = Stages::new(&host, "vm");
    let mut huge = br#"{"id": 1, "token": ""#.to_vec();
    huge.resize(65 << 20, b'x');
    let good = stages.payload(1, "vm");
    let with = |key: &str, value: serde_json::Value| {
        let mut payload = good.clone();
        payload[key] = value;
        payload.to_string().into_bytes()
    };
    let mut without_id = good.clone();
    without_id.as_object_mut().unwrap().remove("id");
    for (name, text) in [
        ("a path for an id", with("id", json!("../../s3cret"))),
        ("a negative id", with("id", json!(-1))),
        ("no id", without_id.to_string().into_bytes()),
        ("an image that is text", with("image", json!("s3cret"))),
        ("no JSON", b"s3cret: {".to_vec()),
        ("half", good.to_string().into_bytes()[..100].to_vec()),
        ("nothing", Vec::new()),
        ("bytes", vec![0xff; 4096]),
        ("a huge one", huge),
    ] {
        stages.response(&text);
        let call = stages.prepare().failed(
            SYSTEM_FAILURE,
            &["response.json", "is not what gitlab-runner writes"],
        );
        assert!(!call.log.contains("s3cret"), "{name}: {}", call.log);
        stages.cleans_up();
    }
    fs::remove_file(stages.file("response.json")).unwrap();
    stages
        .prepare()
        .failed(SYSTEM_FAILURE, &["Cannot read the job response file"]);
    stages.cleans_up();
}

#[test]
fn without_a_runner_every_stage_but_config_says_who_should_call() {
    let host = Host::new(&[], "");
    let stages = Stages::new(&host, "vm")
        .without("JOB_RESPONSE_FILE")
        .without("CUSTOM_ENV_CI_JOB_TOKEN");
    for call in [stages.prepare(), stages.script("true"), stages.cleanup()] {
        call.failed(SYSTEM_FAILURE, &["JOB_RESPONSE_FILE", "gitlab-runner"]);
    }
    stages.nothing_is_left();
}

#[test]
fn what_a_job_says_about_itself_leads_nowhere_else() {
    let host = Host::new(&[], "");
    let outside = host.folder().join("outside");
    fs::create_dir(&outside).unwrap();
    let shell = "x;rm -rf /;$(reboot)`reboot`";
    // Numbers in the environment are the author's word; the response file is GitLab's.
    let stages = Stages::new(&host, "vm; rm -rf /")
        .variable("CUSTOM_ENV_CI_JOB_ID", "../../../outside")
        .variable("CUSTOM_ENV_CI_PROJECT_PATH", shell)
        .variable("CUSTOM_ENV_CI_JOB_NAME", shell);
    stages
        .prepare()
        .failed(BUILD_FAILURE, &["`vm; rm -rf /` names no image"]);
    stages.cleans_up();
    for (name, value, part) in [
        ("CANNERY_MEMORY", "1G;rm -rf /", "CANNERY_MEMORY=1G;rm -rf /"),
        ("CANNERY_DISK", "$(reboot)", "CANNERY_DISK"),
        ("CANNERY_CPUS", "-1", "CANNERY_CPUS=-1"),
        ("CANNERY_CPUS", "1\n2", "CANNERY_CPUS"),
    ] {
        let stages = Stages::new(&host, "vm").variable(&format!("CUSTOM_ENV_{name}"), value);
        stages.prepare().failed(BUILD_FAILURE, &[part, ".gitlab-ci.yml"]);
        stages.cleans_up();
    }
    let image = "registry.example.com/vm:1";
    let stages = Stages::new(&host, image);
    let mut payload = stages.payload(9, image);
    payload["image"]["executor_opts"] = json!({"docker": {"user": "root; rm -rf /"}});
    replaced(&host, "[images]\n", "[images]\nallow = [\"**\"]\n");
    stages.response(payload.to_string().as_bytes());
    stages
        .prepare()
        .failed(BUILD_FAILURE, &["may not run as the user root; rm -rf /"]);
    stages.cleans_up();
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}

#[test]
#[ignore = "needs libvirt and docker-registry"]
fn a_registry_that_denies_says_whom_and_the_right_login_goes_through() {
    let registry = Registry::with_password();
    let host = host_with(&registry, NO_FURTHER);
    let image = pushed(&host, &registry, &container_disk("disk/disk.img", &raw_disk()));
    let config = |password: &str| {
        let auth = json!({"username": USER, "password": password});
        json!({"auths": {registry.host.as_str(): auth}}).to_string()
    };
    let job = || Stages::new(&host, &image);

    let nobody = job();
    nobody
        .prepare()
        .failed(BUILD_FAILURE, &["denies access to", &image, "DOCKER_AUTH_CONFIG"]);
    nobody.cleans_up();
    let wrong = job().variable("CUSTOM_ENV_DOCKER_AUTH_CONFIG", config("not-it"));
    let call = wrong
        .prepare()
        .failed(BUILD_FAILURE, &["refuses the login of", USER, "given by the job"]);
    assert!(!call.log.contains("not-it"), "{}", call.log);
    wrong.cleans_up();
    for (key, value) in [
        ("credHelpers", json!({registry.host.as_str(): "evil"})),
        ("credsStore", json!("evil")),
    ] {
        let helper = job().variable("CUSTOM_ENV_DOCKER_AUTH_CONFIG", json!({key: value}).to_string());
        helper
            .prepare()
            .failed(BUILD_FAILURE, &["DOCKER_AUTH_CONFIG", "helper"]);
        helper.cleans_up();
    }
    let broken = job().variable("CUSTOM_ENV_DOCKER_AUTH_CONFIG", "{\"auths\": s3cret");
    let call = broken
        .prepare()
        .failed(BUILD_FAILURE, &["DOCKER_AUTH_CONFIG cannot be used"]);
    assert!(!call.log.contains("s3cret"), "{}", call.log);
    broken.cleans_up();

    // From GitLab with the job.
    let given = job();
    let mut payload = given.payload(77, &image);
    payload["credentials"] = json!([
        {"type": "registry", "url": registry.host, "username": USER, "password": PASSWORD}
    ]);
    given.response(payload.to_string().as_bytes());
    given.prepare().failed(SYSTEM_FAILURE, &[WENT_SO_FAR, "fetched"]);
    given.cleans_up();
    // From the author; the image is here by now, and who may not have it is told so as before.
    let own = job().variable("CUSTOM_ENV_DOCKER_AUTH_CONFIG", config(PASSWORD));
    own.prepare().failed(SYSTEM_FAILURE, &[WENT_SO_FAR]);
    own.cleans_up();
}

#[test]
#[ignore = "needs libvirt and docker-registry"]
fn a_registry_that_is_down_or_has_no_such_image_is_told_apart() {
    let mut registry = Registry::open();
    let host = host_with(&registry, "");
    let image = pushed(&host, &registry, &container_disk("disk/disk.img", &raw_disk()));
    let missing = Stages::new(&host, &format!("{}/team/other:1", registry.host));
    missing
        .prepare()
        .failed(BUILD_FAILURE, &["team/other:1", "does not exist", "tag"]);
    missing.cleans_up();
    registry.stop();
    let down = Stages::new(&host, &image);
    down.prepare()
        .failed(SYSTEM_FAILURE, &[&registry.host, "cannot be reached", "Is it up"]);
    down.cleans_up();
}

#[test]
#[ignore = "needs libvirt and docker-registry"]
fn data_that_is_not_what_its_digest_says_is_never_used() {
    let registry = Registry::open();
    let host = host_with(&registry, "");
    let image = container_disk("disk/disk.img", &raw_disk());
    let name = pushed(&host, &registry, &image);
    let blob = registry.blob(&sha256(&image.layers[0].0));
    let mut bytes = fs::read(&blob).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&blob, &bytes).unwrap();
    let job = Stages::new(&host, &name);
    job.prepare()
        .failed(SYSTEM_FAILURE, &[&name, "arrived damaged", "changes data"]);
    job.cleans_up();
    assert_eq!(fs::read_dir(host.state().join("store/disks")).unwrap().count(), 0);
}

#[test]
#[ignore = "needs libvirt"]
fn what_is_no_image_of_a_machine_is_refused() {
    let host = Host::new(&[], "");
    let layout = Layout::new(host.images().folder());
    let hostile = {
        let mut disk = qcow2_disk();
        let name = b"/etc/passwd";
        disk[8..16].copy_from_slice(&400_u64.to_be_bytes());
        disk[16..20].copy_from_slice(&u32::try_from(name.len()).unwrap().to_be_bytes());
        disk[400..400 + name.len()].copy_from_slice(name);
        disk
    };
    let ordinary = Tar::new()
        .dir("etc/")
        .file("etc/passwd", b"root")
        .dir("bin/")
        .file("bin/sh", b"\x7fELF");
    let outside = Tar::new()
        .dir("disk/")
        .file("disk/../../../outside.img", &raw_disk());
    for (tag, image, parts) in [
        (
            "container",
            Image::container_disk(&ordinary.bytes(), OCI_TAR),
            &["docs/images.md"][..],
        ),
        (
            "hostile",
            container_disk("disk/disk.qcow2", &hostile),
            &["is refused", "backing file"],
        ),
        (
            "outside",
            Image::container_disk(&outside.bytes(), OCI_TAR),
            &["is refused", "climbs out"],
        ),
        (
            "text",
            container_disk("disk/disk.qcow2", b"this is no qcow2 file"),
            &["text"],
        ),
    ] {
        layout.add(tag, &image);
        let job = Stages::new(&host, &layout.reference(tag));
        let call = job.prepare().failed(BUILD_FAILURE, parts);
        assert!(!call.log.contains("root:"), "{}", call.log);
        job.cleans_up();
    }
    assert!(!host.folder().join("outside.img").exists());
    let job = Stages::new(&host, &layout.reference("absent"));
    job.prepare().failed(BUILD_FAILURE, &["absent", "does not exist"]);
    job.cleans_up();
}

/// As where a runner is in a container, and what started its call is not.
#[test]
#[ignore = "needs libvirt and root"]
fn a_call_whose_process_group_was_made_outside_of_its_container_is_its_parents() {
    let host = Host::new(&[], "");
    let layout = Layout::new(host.images().folder());
    layout.add("vm", &container_disk("disk/disk.qcow2", b"this is no qcow2 file"));
    let job = Stages::new(&host, &layout.reference("vm"));
    let prepare = job.command(&["prepare"]);
    let mut inside = Command::new("unshare");
    inside.args(["--pid", "--fork", "--mount-proc", "--"]);
    inside.arg(prepare.get_program()).args(prepare.get_args());
    job.surround(&mut inside);
    finished(&mut inside).failed(BUILD_FAILURE, &["is refused: its disk has an impossible size"]);
    job.cleans_up();
}

#[test]
fn a_libvirt_that_is_down_is_named() {
    let host = Host::new(
        &[],
        "[libvirt]\nuri = \"qemu+unix:///system?socket=/run/cannery-none\"",
    );
    let job = Stages::new(&host, &image_of(&host));
    job.prepare().failed(
        SYSTEM_FAILURE,
        &[
            "libvirt at",
            "/run/cannery-none",
            "cannot be reached",
            "Is libvirtd running",
        ],
    );
    // Its machine was never asked for: cleaning up needs no libvirt.
    job.cleanup().ok();
    assert_eq!(
        fs::read_dir(host.state().join("jobs")).unwrap().count(),
        0,
        "{:?}",
        host.leftovers()
    );
}

#[test]
#[ignore = "needs libvirt"]
fn a_network_of_the_operators_that_is_not_there_is_named() {
    let host = Host::new(&[], "");
    let text = host.settings_text();
    let (before, _) = text.split_once("[network]").unwrap();
    host.write_settings(&format!(
        "{before}[network]\nlibvirt_network = \"cannery-none\"\n"
    ));
    let job = Stages::new(&host, &image_of(&host));
    job.prepare().failed(
        SYSTEM_FAILURE,
        &[
            "no network cannery-none that is up",
            "virsh net-start cannery-none",
        ],
    );
    job.cleans_up();
    host.write_settings(&text);
}

fn image_of(host: &Host) -> String {
    let layout = Layout::new(host.images().folder());
    layout.add("vm", &container_disk("disk/disk.img", &raw_disk()));
    layout.reference("vm")
}

/// A network device of the test's own, with an address.
struct Device(&'static str);

impl Device {
    fn new(name: &'static str, address: &str) -> Self {
        let ip = |arguments: &[&str]| Command::new("ip").args(arguments).status().unwrap();
        assert!(ip(&["link", "add", name, "type", "bridge"]).success());
        let device = Self(name);
        assert!(ip(&["address", "add", address, "dev", name]).success());
        assert!(ip(&["link", "set", name, "up"]).success());
        device
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        Command::new("ip")
            .args(["link", "delete", self.0])
            .status()
            .unwrap();
    }
}

#[test]
#[ignore = "needs libvirt and root"]
fn a_network_that_does_not_fit_the_host_or_its_past_is_left_alone() {
    let host = Host::new(&[], "");
    let settings = host.settings_text();
    let subnet = settings
        .lines()
        .find(|line| line.starts_with("subnet"))
        .unwrap()
        .to_owned();
    {
        let _device = Device::new("cnfault0", "10.232.9.1/24");
        replaced(&host, &subnet, "subnet = \"10.232.9.64/28\"");
        let job = Stages::new(&host, &image_of(&host));
        job.prepare().failed(
            SYSTEM_FAILURE,
            &[
                "10.232.9.64/28",
                "route to 10.232.9.0/24 on cnfault0",
                "choose another",
            ],
        );
        job.cleans_up();
    }
    host.write_settings(&settings);
    host.expect(&["network", "up"]);
    // Changed under a network that is there: refused, and the network stays as it was.
    replaced(&host, "slots = 6", "slots = 5");
    let job = Stages::new(&host, &image_of(&host));
    job.prepare().failed(
        SYSTEM_FAILURE,
        &[
            "is not the one in the settings",
            "cannery network down",
            "while no job runs",
        ],
    );
    job.cleans_up();
    host.write_settings(&settings);
    assert!(host.expect(&["network", "up"]).contains("was up already"));
}
