//! A gigabyte of output, alone in its own process so that its memory can be measured.
//!
//! Needs root and `/usr/sbin/sshd`.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[path = "support/sshd.rs"]
mod sshd;

use std::fs;
use std::future::{pending, ready};
use std::process::Stdio;
use std::time::Duration;

use cannery::guest::script::{Control, Ending, run_script};
use cannery::guest::shell::{RunId, Shell};
use cannery::guest::ssh::Connection;
use sshd::{Sshd, patience};

/// A gigabyte that looks random and is the same each time.
const SCRIPT: &str = "openssl enc -aes-128-ctr -nosalt -K 00112233445566778899aabbccddeeff -iv 00 </dev/zero 2>/dev/null | head -c 1073741824";
/// What cannery may hold in memory meanwhile, in KiB.
const MOST_MEMORY: u64 = 50 << 10;

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
