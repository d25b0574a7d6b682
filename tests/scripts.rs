//! What a job's scripts see and do on a real guest, and what the runner hears of it: the stage `run`, called by hand.

// What was measured is shown to whoever runs the tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

mod support;

use std::fs;
use std::io::Read;
use std::process::Stdio;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use support::host::{EMULATION, Host};
use support::stages::{BUILD_FAILURE, SYSTEM_FAILURE, Stages, ended};

/// A call that only asks libvirt or the guest a few questions, on a busy machine.
const SOON: Duration = Duration::from_secs(30);

#[test]
#[ignore = "needs libvirt and a guest"]
fn scripts_run_exactly_as_they_were_written() {
    let host = Host::new(&[], EMULATION);
    let image = host.images().add_tiny("tiny", "");
    let job = Stages::new(&host, &image);
    job.prepare().ok();

    the_exit_code_is_the_scripts_own(&job);
    an_exit_code_of_an_earlier_stage_is_not_taken_for_this_ones(&job);
    any_stage_name_will_do(&job);
    output_and_errors_keep_their_order(&job);
    a_variable_of_127_kib_with_odd_bytes_arrives_unchanged(&job);
    a_variable_that_looks_like_a_command_stays_text(&job);
    what_a_script_leaves_in_the_background_holds_nobody_up_and_lives_on(&job);
    a_call_that_is_told_to_end_ends_the_script_and_its_children(&job);

    job.cleans_up();
}

fn the_exit_code_is_the_scripts_own(job: &Stages<'_>) {
    for code in [0, 1, 2, 42, 255] {
        let done = job.script(format!("exit {code}\n"));
        let expected = if code == 0 { 0 } else { BUILD_FAILURE };
        assert_eq!(done.code, expected, "exit {code}: {}", done.log);
        let written = (code != 0).then(|| code.to_string());
        assert_eq!(job.exit_code(), written, "exit {code}");
        assert!(done.stdout.is_empty(), "exit {code}: {}", done.text());
    }
    for (name, number) in [("KILL", 9), ("TERM", 15)] {
        job.script(format!("kill -{name} $$\n"))
            .failed_script(128 + number, job);
    }
    job.script("no-such-command\n").failed_script(127, job);
}

fn an_exit_code_of_an_earlier_stage_is_not_taken_for_this_ones(job: &Stages<'_>) {
    fs::write(job.exit_code_file(), "7").unwrap();
    job.script("true\n").ok();
    assert_eq!(job.exit_code(), None);
    fs::write(job.exit_code_file(), "7").unwrap();
    let missing = job.file("no-such-script");
    job.call(&["run", missing.to_str().unwrap(), "step_script"])
        .failed(SYSTEM_FAILURE, &["no-such-script"]);
    assert_eq!(job.exit_code(), None);
}

fn any_stage_name_will_do(job: &Stages<'_>) {
    for stage in [
        "prepare_script",
        "get_sources",
        "step_script",
        "step_release",
        "after_script",
        "cleanup_file_variables",
        "a stage of a later runner",
        "../../etc/passwd",
        "'; exit 9; '",
        "--dry-run",
    ] {
        let done = job.run(stage, "echo done\n");
        assert_eq!(
            (done.code, done.text().as_str()),
            (0, "done\n"),
            "{stage}: {}",
            done.log
        );
    }
}

fn output_and_errors_keep_their_order(job: &Stages<'_>) {
    let script =
        "for i in $(seq 500); do echo out $i; echo err $i >&2; done; printf 'no newline at the end'\n";
    let mut expected: String = (1..=500).map(|i| format!("out {i}\nerr {i}\n")).collect();
    expected.push_str("no newline at the end");
    let done = job.script(script).ok();
    assert!(done.text() == expected, "{}", done.text());
    assert_eq!(done.log, "");
    // Bytes that mean something to terminals, to shells or to nobody.
    let done = job.script(r"printf '\000\001\033[2J\377\376\r\n\036'").ok();
    assert_eq!(done.stdout, b"\0\x01\x1b[2J\xff\xfe\r\n\x1e");
}

/// Quotes bytes as gitlab-runner's bash scripts do: `$'…'`.
fn quoted(bytes: &[u8]) -> Vec<u8> {
    let mut text = b"$'".to_vec();
    for byte in bytes {
        match byte {
            b'\n' => text.extend(b"\\n"),
            b'\'' => text.extend(b"\\'"),
            b'\\' => text.extend(b"\\\\"),
            other => text.push(*other),
        }
    }
    text.push(b'\'');
    text
}

fn a_variable_of_127_kib_with_odd_bytes_arrives_unchanged(job: &Stages<'_>) {
    // Everything but NUL, which no variable can hold; just under what the kernel passes to a program in one piece.
    let value: Vec<u8> = (0..127 * 1024u32)
        .map(|i| u8::try_from(i % 255 + 1).unwrap())
        .collect();
    let mut script = b"export VALUE=".to_vec();
    script.extend(quoted(&value));
    script.extend(b"\nprintf %s \"$VALUE\" | sha256sum | cut -d' ' -f1\nawk 'BEGIN { exit 0 }' || exit 9\n");
    let done = job.script(&script).ok();
    assert_eq!(done.text().trim(), hex::encode(Sha256::digest(&value)));
}

fn a_variable_that_looks_like_a_command_stays_text(job: &Stages<'_>) {
    let value = br#";rm -rf /; $(touch /tmp/gone) `touch /tmp/gone` "' | touch /tmp/gone & \"#;
    let mut script = b"export VALUE=".to_vec();
    script.extend(quoted(value));
    script.extend(b"\nprintf %s \"$VALUE\"; [ ! -e /tmp/gone ] && [ -e /bin/bash ]\n");
    assert_eq!(job.script(&script).ok().stdout, value);
}

fn what_a_script_leaves_in_the_background_holds_nobody_up_and_lives_on(job: &Stages<'_>) {
    let usual = job.script("echo begun\n").ok().took;
    let done = job
        .script("sleep 1000 & echo $! >/tmp/sleeper; yes >/dev/stderr & echo $! >/tmp/writer; echo begun\n")
        .ok();
    assert!(done.text().contains("begun\n"), "{}", done.text());
    assert!(
        done.took < usual + Duration::from_secs(1),
        "{:?}, and {usual:?} with nothing in the background",
        done.took
    );
    std::thread::sleep(Duration::from_secs(2));
    job.script("kill -0 $(cat /tmp/sleeper) && kill -0 $(cat /tmp/writer)\n")
        .ok();
    job.script("kill $(cat /tmp/sleeper) $(cat /tmp/writer)\n").ok();
}

fn a_call_that_is_told_to_end_ends_the_script_and_its_children(job: &Stages<'_>) {
    let mut child =
        job.start("trap 'echo caught' TERM; sleep 1000 & echo $! >/tmp/child; echo begun; wait; wait\n");
    let mut stdout = child.stdout.take().unwrap();
    let mut first = [0; 6];
    stdout.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"begun\n");
    let begin = Instant::now();
    signal(child.id(), "TERM");
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    let done = ended(child, begin).failed(SYSTEM_FAILURE, &["cancelled"]);
    assert!(rest.contains("caught"), "{rest}");
    assert!(done.took < SOON, "{:?}", done.took);
    job.script("! kill -0 $(cat /tmp/child) 2>/dev/null\n").ok();
}

fn signal(pid: u32, name: &str) {
    let status = std::process::Command::new("kill")
        .arg(format!("-{name}"))
        .arg(pid.to_string())
        .status()
        .unwrap();
    assert!(status.success());
}

/// The most memory that a process has had so far, in bytes; 0 once it is gone.
fn peak_memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .map_or(0, |kib| kib << 10)
}

/// How much a script prints in bulk: what a guest under emulation encrypts in a minute. A full gigabyte goes through
/// the same code in `guest_bulk`, from a server on loopback.
const BULK: u64 = 256 << 20;

#[test]
#[ignore = "needs libvirt and a guest"]
fn a_quarter_of_a_gigabyte_of_output_arrives_whole_and_takes_little_memory() {
    let host = Host::new(&[], EMULATION);
    let image = host.images().add_tiny("tiny", "");
    let job = Stages::new(&host, &image);
    job.prepare().ok();
    let mut child = job
        .run_command("step_script", format!("head -c {BULK} /dev/zero | tr '\\0' x\n"))
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let (mut sum, mut length, mut peak) = (Sha256::new(), 0, 0);
    let mut buffer = vec![0; 1 << 20];
    let begin = Instant::now();
    loop {
        let n = stdout.read(&mut buffer).unwrap();
        peak = peak.max(peak_memory(child.id()));
        if n == 0 {
            break;
        }
        sum.update(&buffer[..n]);
        length += n as u64;
    }
    assert!(child.wait().unwrap().success());
    eprintln!(
        "{} MiB in {:?}, cannery's peak {} MiB",
        length >> 20,
        begin.elapsed(),
        peak >> 20
    );
    assert_eq!(length, BULK);
    let mut expected = Sha256::new();
    let piece = vec![b'x'; 1 << 20];
    (0..BULK >> 20).for_each(|_| expected.update(&piece));
    assert_eq!(sum.finalize(), expected.finalize());
    assert!(peak > 0 && peak < 50 << 20, "{peak} bytes");
    job.cleanup().ok();
}
