//! A cancelled script is gone from the guest, with all that it began, before `after_script` begins; the machine stays.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::{Duration, SystemTime};

use support::coordinator::{Handle, Wish};
use support::host::{EMULATION, Host};
use support::job::Job;
use support::lines::Lines;
use support::notes::Notes;
use support::scene::{SOON, Scene, port};
use support::{table, until};

/// `guest.cancel_grace`.
const GRACE: Duration = Duration::from_secs(4);
/// What the product may take beyond that, or beyond nothing where TERM is obeyed.
const BOUND: Duration = Duration::from_secs(2);
/// How long one of the processes takes to tidy up after TERM.
const TIDY: Duration = Duration::from_secs(2);

/// A program in the guest that stays connected until it is gone: `actor NAME MANNER`.
fn actor(lines: &Lines) -> String {
    let place = lines.place();
    let tidy = TIDY.as_secs();
    format!(
        "cat >/tmp/actor <<'END'\n\
         #!/bin/bash\n\
         exec 3<>{place}\n\
         case $2 in\n\
         obeys) ;;\n\
         tidies) trap 'sleep {tidy}; echo tidy >&3; exit' TERM ;;\n\
         ignores) trap '' TERM HUP INT ;;\n\
         esac\n\
         echo \"$1\" >&3\n\
         while :; do sleep 1; done\n\
         END\n\
         chmod +x /tmp/actor"
    )
}

/// What a script does, the line of the script that begins it, and how long it may live after SIGTERM.
type Act = (&'static str, &'static str, Duration);

const OBEYING: [Act; 3] = [
    (
        "obeys, in a session of its own",
        "setsid /tmp/actor \"$NAME\" obeys &",
        BOUND,
    ),
    (
        "obeys, forked twice",
        "( ( setsid /tmp/actor \"$NAME\" obeys & ) & )",
        BOUND,
    ),
    ("obeys: the script itself", "/tmp/actor \"$NAME\" obeys", BOUND),
];

const IGNORING: [Act; 8] = [
    (
        "ignores, a child",
        "/tmp/actor \"$NAME\" ignores &",
        GRACE.saturating_add(BOUND),
    ),
    (
        "ignores, setsid",
        "setsid /tmp/actor \"$NAME\" ignores &",
        GRACE.saturating_add(BOUND),
    ),
    (
        "ignores, nohup",
        "nohup /tmp/actor \"$NAME\" ignores &",
        GRACE.saturating_add(BOUND),
    ),
    (
        "ignores, forked twice",
        "( ( /tmp/actor \"$NAME\" ignores & ) & )",
        GRACE.saturating_add(BOUND),
    ),
    (
        "ignores, forked twice, setsid",
        "( ( setsid /tmp/actor \"$NAME\" ignores & ) & )",
        GRACE.saturating_add(BOUND),
    ),
    (
        "ignores, env -i, setsid",
        "env -i PATH=/usr/bin:/bin setsid /tmp/actor \"$NAME\" ignores &",
        GRACE.saturating_add(BOUND),
    ),
    (
        "tidies up",
        "/tmp/actor \"$NAME\" tidies &",
        GRACE.saturating_add(BOUND),
    ),
    (
        "ignores: the script itself",
        "trap '' TERM; /tmp/actor \"$NAME\" ignores",
        GRACE.saturating_add(BOUND),
    ),
];

/// The first thing of `after_script` is the guest's list of processes.
const AFTER: [&str; 2] = [
    "ps -o pid,stat,args",
    "echo \"after: $CI_JOB_STATUS, on $(hostname)\"",
];

fn job(name: &str, image: &str, lines: &Lines, acts: &[Act]) -> Job {
    let mut script = actor(lines);
    // A silent job learns only twice a minute what GitLab wants.
    script.push_str("\n( while sleep 0.5; do echo tick; done ) &");
    for (name, line, _) in acts {
        script.push_str(&format!("\nNAME='{name}'; {line}"));
    }
    Job::new(name)
        .image(image)
        .artifacts(["result"])
        .script([script.as_str()])
        .after_script(AFTER)
}

/// Does this line of the list tell of a process of the cancelled script? A zombie has ended, and waits for init to look.
fn is_left(line: &str) -> bool {
    let mut words = line.split_whitespace().skip(1);
    !words.next().is_some_and(|state| state.starts_with('Z')) && line.contains("actor")
}

/// When the runner told the script of a job to end, and when the call ended.
fn told(notes: &Notes, job: &Handle) -> (SystemTime, SystemTime) {
    let notes = notes.of(job.id(), "build_script");
    let at = |what: &str| notes.iter().find(|note| note.what.starts_with(what)).unwrap().at;
    (at("told"), at("ended"))
}

#[test]
fn a_zombie_is_no_process_that_is_left() {
    for (line, left) in [
        ("  235 S    /bin/bash /tmp/actor forked twice ignores", true),
        ("  235 R    {actor} /bin/bash /tmp/actor x ignores", true),
        ("  235 Z    [actor]", false),
        ("  182 S    dropbear -E -s", false),
    ] {
        assert_eq!(is_left(line), left, "{line}");
    }
}

#[test]
#[ignore = "needs libvirt and a guest"]
fn a_cancelled_script_is_gone_with_all_that_it_began_and_the_machine_stays() {
    let (of_coordinator, of_lines) = (port(), port());
    let grace = GRACE.as_secs();
    let settings = format!("{EMULATION}[guest]\ncancel_grace = \"{grace}s\"\n");
    let host = Host::new(&[of_coordinator, of_lines], &settings).with_network();
    let image = host.images().add_tiny("tiny", "");
    let lines = Lines::listen(host.address(), of_lines);
    let (mut driver, notes) = Notes::driver(&host);
    driver.graceful_kill = Duration::from_secs(30);
    let scene = Scene::with(host.into(), &driver, of_coordinator, 2);

    let cases: [(&str, &[Act]); 2] = [("obeys", &OBEYING), ("ignores", &IGNORING)];
    let jobs = cases.map(|(name, acts)| {
        let handle = scene.coordinator.enqueue(&job(name, &image, &lines, acts));
        (handle, acts)
    });
    for (handle, acts) in &jobs {
        acts.iter().for_each(|(name, ..)| lines.wait(name, SOON));
        handle.cancel(Wish::CancelGracefully);
    }

    let mut rows = Vec::new();
    let mut late = Vec::new();
    for (handle, acts) in &jobs {
        assert!(!handle.wait(SOON).success, "{}", handle.log());
        let log = handle.log();
        let (term, ended) = told(&notes, handle);
        let mut row = |what: &str, gone: SystemTime, allowed: Duration| {
            let after = gone.duration_since(term).unwrap();
            rows.push(vec![
                what.to_owned(),
                format!("{:.2} s", after.as_secs_f64()),
                format!("{} s", allowed.as_secs()),
            ]);
            if after > allowed {
                late.push(what.to_owned());
            }
        };
        for (name, _, allowed) in *acts {
            until(&format!("{name} has hung up"), Duration::from_secs(1), || {
                lines.closed(name).is_some()
            });
            row(name, lines.closed(name).unwrap(), *allowed);
        }
        // The call itself looks once more whether all are gone.
        row(
            &format!("`cannery run` of \"{}\"", handle.name()),
            ended,
            GRACE + BOUND,
        );

        // The list of processes as after_script's first line saw it: from its header to the next line's echo.
        let (_, list) = log.split_once("PID").expect("a list of processes");
        let (list, rest) = list.split_once("\nafter: ").expect("the line after it");
        assert!(list.contains("dropbear"), "{log}");
        let left: Vec<&str> = list.lines().filter(|line| is_left(line)).collect();
        assert_eq!(left, Vec::<&str>::new(), "{log}");
        let stays = format!("canceled, on job-{}\n", handle.id());
        assert!(rest.starts_with(&stays), "{log}");
        assert!(rest.contains("Uploading artifacts for failed job"), "{log}");
        assert_eq!(notes.calls(handle.id(), "upload_artifacts_on_failure"), 1);
    }
    table::show(
        &format!("cancelled with a grace of {grace} s"),
        &["what the script does", "gone after", "allowed"],
        &rows,
    );
    assert_eq!(late, Vec::<String>::new());
    assert_eq!(lines.said("tidies up"), ["tidy"]);
    scene.is_clean_soon();
}
