//! A look at a machine: while its job runs, and after the job failed.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::os::unix::fs::MetadataExt;
use std::process::Command;

use support::host::{EMULATION, Host};
use support::job::Job;
use support::stages::Stages;

/// The state folder's name of the only job.
fn only_job(host: &Host) -> String {
    let list: serde_json::Value =
        serde_json::from_str(&host.expect(&["vm", "list", "--format", "json"])).unwrap();
    let jobs = list.as_array().unwrap();
    assert_eq!(jobs.len(), 1, "{list}");
    jobs[0]["key"].as_str().unwrap().to_owned()
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn an_operator_enters_a_machine_and_sees_its_screen() {
    let host = Host::new(&[], EMULATION);
    let image = host.images().add_tiny("tiny", "");
    let job = Stages::of(&host, &Job::new("unit").image(&image), 7);
    job.prepare().ok();
    let key = only_job(&host);

    let ssh = |command: &[&str]| {
        let mut arguments = vec!["vm", "ssh", "7", "--"];
        arguments.extend(command);
        host.cannery(&arguments)
    };
    let entered = ssh(&["hostname; id -un"]);
    assert_eq!(
        String::from_utf8_lossy(&entered.stdout),
        "job-7\nroot\n",
        "{entered:?}"
    );
    assert_eq!(entered.status.code(), Some(0));
    // Nothing was learned on the way: the guest was known before.
    assert_eq!(String::from_utf8_lossy(&entered.stderr), "");
    assert_eq!(ssh(&["exit 7"]).status.code(), Some(7));

    // A guest that is another's is not entered.
    let record = host.state().join("jobs").join(&key).join("record.json");
    let truth = std::fs::read_to_string(&record).unwrap();
    let mut forged: serde_json::Value = serde_json::from_str(&truth).unwrap();
    forged["guest"]["host_key"] =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA".into();
    std::fs::write(&record, forged.to_string()).unwrap();
    let refused = ssh(&["true"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(255), "{said}");
    assert!(said.contains("Host key verification failed"), "{said}");
    std::fs::write(&record, truth).unwrap();

    let picture = host.folder().join("screen.png");
    host.expect(&["vm", "screenshot", "7", "-o", picture.to_str().unwrap()]);
    assert!(std::fs::read(&picture).unwrap().starts_with(b"\x89PNG\r\n\x1a\n"));
    // One of the group sees the job, and is told who may enter it.
    let unlogged = host.folder().join("unlogged.toml");
    let text = host.settings_text();
    let lines = text.lines().filter(|line| !line.starts_with("log_"));
    std::fs::write(&unlogged, lines.collect::<Vec<_>>().join("\n")).unwrap();
    let group = std::fs::metadata(host.state()).unwrap().gid();
    let nobody = Command::new("setpriv")
        .args(["--reuid=65534", "--clear-groups", &format!("--regid={group}")])
        .arg(host.program_for_all())
        .args(["--config", unlogged.to_str().unwrap(), "vm", "ssh", "7"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&nobody.stderr).into_owned();
    assert!(said.contains("sudo cannery vm ssh"), "{said}");
    job.cleans_up();
}
