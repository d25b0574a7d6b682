//! What becomes of a tiny guest and of its host, and how it is noticed.

// A test fails by panicking, in its helpers too, and tells what it saw.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

mod machine_guest;

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use cannery::machine::network::{provide, remove};
use cannery::machine::serial;
use cannery::machine::watch::{Judgement, State, judge, last_words};
use machine_guest::{Net, Site, plan, quietly};

#[tokio::test]
#[ignore = "needs libvirt, QEMU, nft as root and the tiny guest"]
async fn a_guests_end_is_noticed_with_its_reason() {
    let site = Site::new();
    let plan = plan("machine_end", "mend", 3);
    remove(&site.libvirt, &plan, site.folder.path()).await.unwrap();
    let _net = Net { plan: plan.clone() };
    provide(&site.libvirt, &plan, site.folder.path()).await.unwrap();
    let slots = plan.slots();
    let mut seen = Vec::new();
    for (slot, (command, state)) in slots.iter().zip([
        (
            "(sleep 1; echo c >/proc/sysrq-trigger) >/dev/null 2>&1 &",
            State::Crashed,
        ),
        ("(sleep 1; reboot -f) >/dev/null 2>&1 &", State::Gone),
        ("(sleep 1; poweroff -f) >/dev/null 2>&1 &", State::Gone),
    ]) {
        let guest = site
            .start(&format!("machine-end-{}", slot.index), &plan, slot, "")
            .await;
        guest.wait();
        assert!(guest.can(command));
        let asked = Instant::now();
        let mut states = vec![State::Running];
        while judge(states[states.len() - 1]) == Judgement::Alive && asked.elapsed() < Duration::from_secs(15)
        {
            tokio::time::sleep(Duration::from_millis(200)).await;
            states.push(site.libvirt.state(&guest.name).await.unwrap());
            states.dedup();
        }
        // virtlogd may still be writing.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let log = serial::tail(&guest.serial_log, 30, 1 << 16).unwrap();
        println!(
            "{}: {states:?} after {:?}: {:?}",
            guest.name,
            asked.elapsed(),
            last_words(&log)
        );
        site.libvirt.destroy(&guest.name).await.unwrap();
        seen.push((states.pop().unwrap(), state, last_words(&log)));
    }
    remove(&site.libvirt, &plan, site.folder.path()).await.unwrap();
    // A kernel that panics may be stopped before its words are out; the state tells it anyway.
    let words = [None, Some("its guest rebooted"), Some("its guest powered off")];
    for ((now, expected, said), words) in seen.into_iter().zip(words) {
        // Whoever asks at the right moment sees it go down.
        assert!(
            now == expected || (expected == State::Gone && now == State::Ending),
            "{now:?}"
        );
        assert!(words.is_none() || said == words, "{said:?}");
    }
}

/// A small file system, to be filled.
struct Small {
    folder: tempfile::TempDir,
}

impl Small {
    fn mount(megabytes: u32) -> Small {
        let folder = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args([
                "-t",
                "tmpfs",
                "-o",
                &format!("size={megabytes}m,mode=0711"),
                "tmpfs",
            ])
            .arg(folder.path())
            .status()
            .unwrap();
        assert!(mounted.success());
        Small { folder }
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        quietly("umount", &["-l", &self.folder.path().display().to_string()]);
    }
}

#[tokio::test]
#[ignore = "needs libvirt, QEMU, nft and mount as root, and the tiny guest"]
async fn a_full_host_stops_the_machine_and_says_so() {
    let small = Small::mount(80);
    let site = Site::within(tempfile::tempdir_in(small.folder.path()).unwrap());
    let plan = plan("machine_full", "mfull", 4);
    let _net = Net { plan: plan.clone() };
    provide(&site.libvirt, &plan, site.folder.path()).await.unwrap();
    let guest = site.start("machine-full", &plan, &plan.slots()[0], "").await;
    guest.wait();
    assert!(guest.can("(sleep 1; dd if=/dev/urandom of=/root/big bs=1M count=100; sync) >/dev/null 2>&1 &"));
    let asked = Instant::now();
    let mut state = State::Running;
    while state == State::Running && asked.elapsed() < Duration::from_secs(60) {
        tokio::time::sleep(Duration::from_millis(200)).await;
        state = site.libvirt.state(&guest.name).await.unwrap();
    }
    println!("{state:?} after {:?}", asked.elapsed());
    assert!(
        matches!(judge(state), Judgement::Paused { waits: false, .. }),
        "{state:?}"
    );
}

#[tokio::test]
#[ignore = "needs libvirt, QEMU, nft as root and the tiny guest"]
async fn a_chatty_guest_does_not_fill_the_host() {
    let site = Site::new();
    let plan = plan("machine_chat", "mchat", 5);
    let _net = Net { plan: plan.clone() };
    provide(&site.libvirt, &plan, site.folder.path()).await.unwrap();
    let guest = site.start("machine-chat", &plan, &plan.slots()[0], "").await;
    guest.wait();
    let asked = Instant::now();
    assert!(guest.can("yes 'all work and no play makes a dull serial line' | head -c 2500000 >/dev/console; echo the end >/dev/console"));
    println!("written after {:?}", asked.elapsed());
    tokio::time::sleep(Duration::from_secs(2)).await;
    let folder = guest.serial_log.parent().unwrap();
    let logs: Vec<(String, u64)> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| {
            (
                entry.file_name().into_string().unwrap(),
                entry.metadata().unwrap().len(),
            )
        })
        .filter(|(name, _)| name.starts_with("serial.log"))
        .collect();
    assert!(logs.len() > 1, "{logs:?}");
    assert!(logs.iter().all(|(_, size)| *size <= 2 << 20), "{logs:?}");
    let tail = serial::tail(&guest.serial_log, 10, 1 << 16).unwrap();
    assert!(tail.contains("serial line") && tail.contains("the end"), "{tail}");
}
