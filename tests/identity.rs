//! Who a job is, is GitLab's word and the runner's: whatever a job's variables say, it has its own machine and no other.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use support::coordinator::Handle;
use support::host::{EMULATION, Host};
use support::job::Job;
use support::lines::Lines;
use support::scene::{SOON, Scene, port};
use support::table;

/// The session that cannery has noted for a job: the path of its response file.
fn session(host: &Host, job: &Handle) -> PathBuf {
    let folders = fs::read_dir(host.state().join("jobs")).unwrap();
    let of_job = format!("-{}-1", job.id());
    let folder = folders
        .map(|folder| folder.unwrap().path())
        .find(|folder| folder.to_str().unwrap().ends_with(&of_job))
        .unwrap();
    let record: serde_json::Value =
        serde_json::from_slice(&fs::read(folder.join("record.json")).unwrap()).unwrap();
    PathBuf::from(record["session"].as_str().unwrap())
}

/// A line of bash that calls `name`, and waits for a word.
fn waits(lines: &Lines, name: &str) -> String {
    format!("{}; read -r word <&3; echo \"told: $word\"", lines.call(name))
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn a_job_that_calls_itself_another_running_job_gets_its_own_machine_and_leaves_that_one_alone() {
    let (of_coordinator, of_lines) = (port(), port());
    let host = Host::new(&[of_coordinator, of_lines], EMULATION).with_network();
    let image = host.images().add_tiny("tiny", "");
    let lines = Lines::listen(host.address(), of_lines);
    let scene = Scene::new(host, of_coordinator, 2);

    let job = Job::new("victim").image(&image).project("grp/victim", 11);
    let script = [
        "echo mine >/tmp/mark",
        &waits(&lines, "victim"),
        "cat /tmp/mark; hostname",
    ];
    let victim = scene.coordinator.enqueue(&job.script(script));
    lines.wait("victim", SOON);
    let machine = scene.host.machines();
    let session = session(&scene.host, &victim);
    let text = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let folder = text(session.parent().unwrap());

    let lies = [
        ("CI_JOB_ID", victim.id().to_string()),
        ("CI_JOB_TOKEN", victim.token().to_owned()),
        ("CI_JOB_NAME", victim.name().to_owned()),
        ("CI_PROJECT_ID", "11".to_owned()),
        ("CI_PROJECT_PATH", "grp/victim".to_owned()),
        ("CI_RUNNER_SHORT_TOKEN", "another".to_owned()),
        ("CI_CONCURRENT_ID", "0".to_owned()),
        ("CI_CONCURRENT_PROJECT_ID", "0".to_owned()),
        ("TMPDIR", folder.clone()),
        ("JOB_RESPONSE_FILE", text(&session)),
        ("BUILD_EXIT_CODE_FILE", format!("{folder}/build_exit_code")),
        ("CANNERY_CONFIG", format!("{folder}/cannery.toml")),
    ];
    let job = Job::new("liar").image(&image).project("grp/liar", 12);
    let job = lies
        .iter()
        .fold(job, |job, (key, value)| job.raw_variable(key, value));
    let script = ["echo \"on $(hostname)\"; test ! -e /tmp/mark || echo stolen; exit 5"];
    let (liar, outcome) = scene.run(&job.script(script).after_script(["echo \"after on $(hostname)\""]));
    let log = liar.log();
    let seen = (
        outcome.success,
        outcome.failure_reason.as_str(),
        outcome.exit_code,
    );
    assert_eq!(seen, (false, "script_failure", Some(5)), "{log}");
    for text in ["on", "after on"].map(|on| format!("{on} job-{}\n", liar.id())) {
        assert!(log.contains(&text), "{text:?} is not in\n{log}");
    }
    assert!(!log.lines().any(|line| line == "stolen"), "{log}");

    // The liar's cleanup may still go on; the victim's machine is none of its business.
    support::until("the liar's machine is gone", SOON, || {
        scene.host.machines().len() == 1
    });
    assert_eq!(scene.host.machines(), machine);
    assert!(!PathBuf::from(folder).join("build_exit_code").exists());
    lines.tell("victim", "go on");
    let outcome = victim.wait(SOON);
    let log = victim.log();
    assert!(outcome.success, "{log}");
    let expected = format!("told: go on\nmine\njob-{}\n", victim.id());
    assert!(
        log.replace("$ cat /tmp/mark; hostname\n", "").contains(&expected),
        "{log}"
    );
    let rows: Vec<Vec<String>> = lies
        .iter()
        .map(|(key, value)| vec![(*key).to_owned(), value.clone()])
        .collect();
    table::show(
        &format!("job {} said of itself, and got a machine of its own", liar.id()),
        &["variable", "value: the victim's"],
        &rows,
    );
    scene.is_clean_soon();
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn jobs_of_two_coordinators_with_the_same_number_run_at_once() {
    const NUMBER: u64 = 4711;
    let (first, second, of_lines) = (port(), port(), port());
    let host = Arc::new(Host::new(&[first, second, of_lines], EMULATION).with_network());
    let image = host.images().add_tiny("tiny", "");
    let lines = Lines::listen(host.address(), of_lines);
    let scenes = [first, second].map(|port| Scene::with(Arc::clone(&host), &host.driver(), port, 1));
    let names = ["of the first", "of the second"];
    let jobs = [0, 1].map(|at| {
        let job = Job::new(names[at]).id(NUMBER).image(&image);
        let script = [
            waits(&lines, names[at]),
            "cat /proc/sys/kernel/random/boot_id".to_owned(),
        ];
        let script = [script[0].as_str(), script[1].as_str()];
        scenes[at].coordinator.enqueue(&job.script(script))
    });
    names.iter().for_each(|name| lines.wait(name, SOON));
    let machines = host.machines();
    assert_eq!(machines.len(), 2);
    let of_number = format!("-{NUMBER}-1");
    assert!(
        machines.iter().all(|name| name.ends_with(&of_number)),
        "{machines:?}"
    );
    // One ends, with all that belongs to it, while the other one runs.
    lines.tell(names[0], "one");
    assert!(jobs[0].wait(SOON).success, "{}", jobs[0].log());
    support::until("its machine is gone", SOON, || host.machines().len() == 1);
    lines.tell(names[1], "two");
    assert!(jobs[1].wait(SOON).success, "{}", jobs[1].log());
    for (job, word) in jobs.iter().zip(["told: one", "told: two"]) {
        assert!(job.log().contains(word), "{}", job.log());
    }
    scenes[0].is_clean_soon();
}
