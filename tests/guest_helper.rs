//! The binary that caches and artifacts need, copied into a guest that lacks it.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::fs;

use sha2::{Digest, Sha256};
use support::host::Host;
use support::job::Job;
use support::stages::Stages;

/// A static program of every host that runs these tests; that it is no gitlab-runner is to be noticed.
const PROGRAM: &str = "/bin/busybox";

#[test]
#[ignore = "needs libvirt and a guest"]
fn a_helper_comes_whole_to_a_user_without_rights_and_one_that_does_not_run_is_remarked() {
    let settings = format!(
        "[machine]\naccelerator = \"emulation\"\n[guest]\nhelper = \"{PROGRAM}\"\nallow_users = [\"ci\"]\n"
    );
    let host = Host::new(&[], &settings);
    let image = host.images().add_tiny("tiny", "");
    let job = Job::new("unit")
        .image(&image)
        .image_user("ci")
        .artifacts(["result"]);
    let stages = Stages::of(&host, &job, 1);
    let prepared = stages.prepare().ok();
    for part in [
        "This job's caches and artifacts need gitlab-runner, which the image lacks",
        "This host's gitlab-runner does not run in the guest (gitlab-runner: applet not found)",
        "helper ",
    ] {
        assert!(
            prepared.log.contains(part),
            "{part:?} is not in\n{}",
            prepared.log
        );
    }
    let script = "h=$(command -v gitlab-runner); echo \"$h\"; stat -c '%a %U' \"$h\"; sha256sum <\"$h\"; ls -A \"${h%/*}\"\n";
    let seen = stages.script(script).ok().text();
    let sum = hex::encode(Sha256::digest(fs::read(PROGRAM).unwrap()));
    assert_eq!(
        seen,
        format!("/home/ci/.cannery/bin/gitlab-runner\n755 ci\n{sum}  -\ngitlab-runner\n")
    );
    stages.cleans_up();
}
