//! Guests that do not come up, or not as they should, and a host that fails around them: the right exit code, a sentence that says
//! how far it came, and nothing left.

#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(clippy::print_stdout, reason = "what is shown is the table of faults")]

#[path = "support/image_fixture.rs"]
#[allow(dead_code, reason = "each suite uses its part of the fixture")]
mod image_fixture;
mod support;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use image_fixture::{Image, Layout, OCI_TAR_GZIP, Tar};
use serde_json::json;
use support::host::{EMULATION, Host};
use support::stages::{SYSTEM_FAILURE, Stages};

/// Lines of the serial log that a failure shows.
const SERIAL_LINES: usize = 30;

fn add_settings(host: &Host, text: &str) {
    host.write_settings(&format!("{}\n{text}\n", host.settings_text()));
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn a_guest_that_never_answers_is_told_by_how_far_it_came() {
    let console = "[console]\nurl = \"https://ci.example.com\"\ncertificate = \"/c\"\nkey = \"/k\"\n";
    let settings = format!("{EMULATION}[guest]\nboot_timeout = \"25 s\"\n{console}");
    let host = Host::new(&[], &settings).with_network();
    let cases = [
        (
            "tiny.sshd=off",
            &["within 25 s", "DHCP", "no SSH server, as asked"][..],
        ),
        (
            "tiny.net=off",
            &["within 25 s", "nothing answered at its address"],
        ),
    ];
    let images: Vec<String> = cases
        .iter()
        .map(|(option, _)| host.images().add_tiny(&option.replace('=', "-"), option))
        .collect();
    std::thread::scope(|scope| {
        for (image, (option, parts)) in images.iter().zip(cases) {
            let host = &host;
            scope.spawn(move || {
                let job = Stages::new(host, image);
                let call = job.prepare().failed(SYSTEM_FAILURE, parts);
                assert!(
                    call.log.contains("The end of the guest's serial log:"),
                    "{}",
                    call.log
                );
                let shown = call.log.lines().filter(|line| line.contains("  | ")).count();
                assert!((1..=SERIAL_LINES).contains(&shown), "{shown} lines: {}", call.log);
                // While it hung, its screen and its serial log could be looked at.
                let (before, _) = call.log.split_once("The end of").unwrap();
                assert_eq!(
                    before.matches("Console: https://ci.example.com/jobs/").count(),
                    1,
                    "{before}"
                );
                println!("{option}: {}", call.last_line());
                job.cleanup().ok();
            });
        }
    });
    Stages::new(&host, "vm").nothing_is_left();
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn a_guest_that_dies_at_boot_fails_at_once_with_its_last_words() {
    // The time-out is the usual one, of five minutes.
    let host = Host::new(&[], EMULATION).with_network();
    // A kernel that panics is in the walk through all failures.
    let option = "tiny.poweroff=0 tiny.sshd=off";
    let image = host.images().add_tiny("ends", option);
    let job = Stages::new(&host, &image);
    let call = job.prepare();
    assert!(call.took < Duration::from_secs(90), "{:?}", call.took);
    let call = call.failed(
        SYSTEM_FAILURE,
        &["guest powered off", "The end of the guest's serial log"],
    );
    println!("{option}: {} s: {}", call.took.as_secs(), call.last_line());
    job.cleans_up();
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn a_guest_that_lets_us_in_neither_by_key_nor_by_password_says_what_was_offered() {
    let host = Host::new(&[], &format!("{EMULATION}[guest]\nboot_timeout = \"45 s\"")).with_network();
    let locked = "tiny.credentials=off tiny.password=sesame";
    let [keyless, wrong, right] =
        ["keyless", "wrong", "right"].map(|tag| host.images().add_tiny(tag, locked));
    for (image, password) in [(&wrong, "not-it"), (&right, "sesame")] {
        add_settings(
            &host,
            &format!("[image.\"{image}\"]\nguest.password = \"{password}\""),
        );
    }
    std::thread::scope(|scope| {
        for (image, parts) in [
            // What it cannot know is not what it shows.
            (&keyless, ["shows host key", "guest.key_file or guest.password"]),
            (&wrong, ["refuses user root", "password"]),
        ] {
            let host = &host;
            scope.spawn(move || {
                let job = Stages::new(host, image);
                let call = job.prepare().failed(SYSTEM_FAILURE, &parts);
                assert!(!call.log.contains("not-it"), "{}", call.log);
                println!("{image}: {}", call.last_line());
                job.cleanup().ok();
            });
        }
    });
    // The right one is all that was missing.
    let job = Stages::new(&host, &right);
    job.prepare().ok();
    assert_eq!(job.script("echo in").ok().text(), "in\n");
    job.cleans_up();
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn a_job_with_an_evil_name_runs_as_any_other_and_its_network_stays_under_it() {
    let host = Host::new(&[], EMULATION).with_network();
    let image = host.images().add_tiny("tiny", "");
    let evil = "a'\"><b>&amp;\u{1}\u{fffe}\n]]>;rm -rf /;$(reboot)`reboot`";
    let job = Stages::new(&host, &image)
        .variable("CUSTOM_ENV_CI_JOB_ID", "../../../etc")
        .variable("CUSTOM_ENV_EVIL", evil.replace('\u{0}', ""));
    let mut payload = job.payload(4711, &image);
    payload["job_info"]["name"] = json!(evil);
    payload["job_info"]["project_full_path"] = json!(format!("../../{evil}"));
    job.response(payload.to_string().as_bytes());
    job.prepare().ok();
    let list = host.expect(&["vm", "list"]);
    assert_eq!(list.lines().count(), 2, "{list}");
    assert!(!list.contains('\u{1}'), "{list}");
    assert_eq!(job.script("hostname").ok().text(), "job-4711\n");

    // The network cannot be pulled away from under it, nor changed, and the job notices nothing.
    let down = host.cannery(&["network", "down"]);
    assert!(!down.status.success());
    let words = String::from_utf8_lossy(&down.stderr).into_owned();
    assert!(words.contains("is in use by"), "{words}");
    let settings = host.settings_text();
    host.write_settings(&settings.replacen("slots = 6", "slots = 5", 1));
    let other = Stages::new(&host, &image);
    other
        .prepare()
        .failed(SYSTEM_FAILURE, &["is not the one in the settings", "slots"]);
    other.cleanup().ok();
    job.script("exit 9").failed_script(9, &job);
    host.write_settings(&settings);
    job.cleans_up();
}

/// A small file system, to be filled.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    fn new(folder: &'a Path, size: &str) -> Self {
        fs::create_dir(folder).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size},mode=0755"), "tmpfs"])
            .arg(folder)
            .status()
            .unwrap();
        assert!(mounted.success());
        Self(folder)
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        Command::new("umount").arg("--lazy").arg(self.0).status().unwrap();
    }
}

#[test]
#[ignore = "needs root, libvirt and a guest"]
fn a_disk_that_fills_up_fails_the_job_that_fills_it_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    support::everybody_may_pass(folder.path());
    let small = folder.path().join("small");
    let _mounted = Small::new(&small, "760M");
    let host = Host::new(&[], EMULATION);
    let state = host.state();
    let text = host.settings_text();
    let text = text.replacen(state.to_str().unwrap(), small.join("state").to_str().unwrap(), 1);
    host.write_settings(&text);
    host.expect(&["network", "up"]);
    let image = host.images().add_tiny("tiny", "");
    let other = Stages::new(&host, &image);
    other.prepare().ok();

    // Compressed it is nothing; unpacked there is no room for it. Its size is told by the archive, not by the manifest.
    let big = Layout::new(&host.folder().join("big"));
    let archive = Tar::new()
        .dir("disk/")
        .file("disk/disk.img", &vec![0x55; 300 << 20])
        .bytes();
    big.add("vm", &Image::container_disk(&archive, OCI_TAR_GZIP));
    let text = text.replacen(
        "layouts = [",
        &format!("layouts = [\"{}\", ", big.dir.display()),
        1,
    );
    host.write_settings(&text);
    let full = Stages::new(&host, &big.reference("vm"));
    let call = full.prepare().failed(
        SYSTEM_FAILURE,
        &["No room for", "bytes are needed", "image prune --all"],
    );
    println!("{}", call.last_line());
    full.cleanup().ok();
    assert_eq!(
        fs::read_dir(small.join("state/store/partial")).unwrap().count(),
        0
    );

    let work =
        other.script("dd if=/dev/urandom of=/root/file bs=1M count=8 2>/dev/null && sync && echo unharmed");
    assert_eq!(work.ok().text(), "unharmed\n");

    // Full to the last byte: cleaning up needs no room.
    let filler = Command::new("dd")
        .args(["if=/dev/zero", "bs=1M", "status=none"])
        .arg(format!("of={}", small.join("filler").display()))
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(!filler.success());
    let late = Stages::new(&host, &image);
    let call = late.prepare().failed(SYSTEM_FAILURE, &["room"]);
    println!("{}", call.last_line());
    late.cleanup().ok();
    other.cleanup().ok();
    assert_eq!(fs::read_dir(small.join("state/jobs")).unwrap().count(), 0);
    assert_eq!(host.machines(), Vec::<String>::new());
    fs::remove_file(small.join("filler")).unwrap();
    host.expect(&["network", "down"]);
}
