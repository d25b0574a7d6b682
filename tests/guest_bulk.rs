//! A gigabyte of output and a large file for the guest, in a process of their own so that its memory can be measured.
//!
//! Needs root and `/usr/sbin/sshd`.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[path = "support/sshd.rs"]
mod sshd;

use std::fs;
use std::future::{pending, ready};
use std::process::Stdio;
use std::time::Duration;

use cannery::guest::helper::{self, Found, Helper};
use cannery::guest::script::{Control, Ending, run_script};
use cannery::guest::shell::{RunId, Shell};
use cannery::guest::ssh::Connection;
use sshd::{Sshd, patience};

/// A gigabyte that looks random and is the same each time.
const SCRIPT: &str = "openssl enc -aes-128-ctr -nosalt -K 00112233445566778899aabbccddeeff -iv 00 </dev/zero 2>/dev/null | head -c 1073741824";
/// What cannery may hold in memory meanwhile, in KiB.
const MOST_MEMORY: u64 = 50 << 10;

/// As large as no helper is, in bytes.
const LARGE: u64 = 300 << 20;

fn most_memory_so_far() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
#[ignore = "needs root and sshd, and a minute"]
async fn a_gigabyte_arrives_whole_in_little_memory() {
    let expected = std::process::Command::new("sh")
        .args(["-c", &format!("{SCRIPT} | sha256sum")])
        .output()
        .unwrap();
    let server = Sshd::start();
    let connection = Connection::open(server.target(), patience(), |_| {})
        .await
        .unwrap();
    let mut sum = tokio::process::Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = sum.stdin.take().unwrap();
    let control = Control {
        cancel: pending(),
        grace: Duration::ZERO,
        alive: || ready(Ok(())),
    };
    let ending = run_script(
        &connection,
        Shell::Sh,
        &RunId::new(),
        SCRIPT.as_bytes(),
        &mut input,
        control,
    )
    .await;
    drop(input);
    assert_eq!(ending.unwrap(), Ending::Exited(0));
    let seen = sum.wait_with_output().await.unwrap();
    assert_eq!(
        String::from_utf8_lossy(&seen.stdout),
        String::from_utf8_lossy(&expected.stdout)
    );
    let memory = most_memory_so_far();
    assert!(memory < MOST_MEMORY, "{memory} KiB");
}

#[tokio::test]
#[ignore = "needs root and sshd"]
async fn a_large_helper_arrives_whole_in_little_memory() {
    let server = Sshd::start_in_busybox();
    let connection = Connection::open(server.target(), patience(), |_| {})
        .await
        .unwrap();
    // The header of a program, and then what compresses badly.
    let large = tempfile::NamedTempFile::new().unwrap();
    let make = format!(
        "{{ head -c 64 /proc/self/exe; openssl enc -aes-128-ctr -nosalt -K 00 -iv 00 </dev/zero 2>/dev/null | head -c {LARGE}; }} >\"$0\""
    );
    let made = std::process::Command::new("sh")
        .args(["-c", &make])
        .arg(large.path())
        .status()
        .unwrap();
    assert!(made.success());
    let begin = std::time::Instant::now();
    let found = helper::bring(&connection, Helper::open(large.path()).unwrap())
        .await
        .unwrap();
    println!("{} MiB in {:?}", LARGE >> 20, begin.elapsed());
    // Half a program does not run.
    assert!(matches!(found, Found::Broken(_)), "{found:?}");
    let arrived = server.folder().join("root/root/.cannery/bin/gitlab-runner");
    let same = std::process::Command::new("cmp")
        .arg(large.path())
        .arg(arrived)
        .status()
        .unwrap();
    assert!(same.success());
    let memory = most_memory_so_far();
    assert!(memory < MOST_MEMORY, "{memory} KiB");
}
