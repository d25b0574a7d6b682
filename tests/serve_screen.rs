//! The screen of a machine in a browser and in SPICE viewers, which come in by a ticket and leave when it goes.

#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(clippy::print_stdout, reason = "where the pictures are is shown")]

mod support;

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures_util::SinkExt;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use support::chromium::Chromium;
use support::console::{Place, read_until};
use support::desktop::Desktop;
use support::host::{EMULATION, Host};
use support::job::Job;
use support::picture::Picture;
use support::stages::Stages;
use support::until;
use tokio_tungstenite::tungstenite::Message;

/// Longer than a screen takes to be shown.
const PATIENCE: Duration = Duration::from_secs(45);
/// What is typed.
const TYPED: &str = "from a viewer";
/// Pixels of the only thing that changes by itself: a cursor that blinks.
const CURSOR: usize = 9 * 16;
/// Pixels that a few words have.
const TEXT: usize = 500;

/// The keys of a viewer's file.
fn keys(file: &str) -> HashMap<&str, &str> {
    assert!(file.starts_with("[virt-viewer]\n"), "{file}");
    file.lines().filter_map(|line| line.split_once('=')).collect()
}

/// Has a viewer without a window take a picture; whether it got one of the machine's size.
fn pictured(address: &str, password: &str, authority: &Path, into: &Path) -> bool {
    // A viewer that is refused waits for another password.
    let output = Command::new("timeout")
        .args(["15", "spicy-screenshot", "--uri", address, "-w", password, "-o"])
        .arg(into)
        .env("SSL_CERT_FILE", authority)
        .output()
        .unwrap();
    let picture = std::fs::read(into).unwrap_or_default();
    let _ = std::fs::remove_file(into);
    println!("{}", String::from_utf8_lossy(&output.stderr));
    picture.starts_with(b"P6\n") && picture.len() > 100_000
}

/// remote-viewer opens the file that the page hands out, and what is typed there is in the guest, until another viewer comes.
fn type_in_the_viewer(host: &Host, file: &Path, another: impl FnOnce()) {
    let in_guest = |command: &str| host.expect(&["vm", "ssh", "71", "--", command]);
    in_guest("setsid sh -c 'exec cat </dev/tty1 >/run/typed' >/dev/null 2>&1 &");
    let desktop = Desktop::start();
    let mut viewer = Command::new("remote-viewer");
    let mut viewer = desktop.shows(viewer.arg(file)).spawn().unwrap();
    let window = desktop.window("remote-viewer");
    // What comes before the viewer is connected is lost.
    until("what is typed is in the guest", PATIENCE, || {
        desktop.type_into(&window, TYPED);
        in_guest("cat /run/typed").contains(&format!("{TYPED}\n"))
    });
    assert!(!file.exists(), "the viewer has removed it, as it says");
    another();
    until("the viewer's window is closed", PATIENCE, || {
        desktop.windows("remote-viewer").is_empty()
    });
    let _ = viewer.kill();
    viewer.wait().unwrap();
}

/// Waits until the page shows what the guest's screen shows, pixel by pixel, and that is something; a picture of the page.
async fn shows_the_guest(chromium: &mut Chromium, host: &Host) -> Vec<u8> {
    let canvas = "document.querySelector('#screen canvas')?.toDataURL('image/png') ?? ''";
    let end = Instant::now() + PATIENCE;
    loop {
        let url = chromium.value(canvas).await;
        let seen = url.as_str().unwrap().strip_prefix("data:image/png;base64,");
        let seen = seen.map(|png| Picture::read(&BASE64.decode(png).unwrap()));
        let truth = Picture::of_screen(host, "71");
        let differ = seen
            .filter(|seen| (seen.width, seen.height) == (truth.width, truth.height))
            .map(|seen| seen.differs_in(&truth));
        // A screen of text, and not one black pixel less of it.
        if truth.lit() > TEXT && differ.is_some_and(|differ| differ <= CURSOR) {
            return chromium.picture().await;
        }
        assert!(
            Instant::now() < end,
            "{differ:?} pixels differ, {} are lit",
            truth.lit()
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// The screen's channel that carried most.
fn display<'a>(channels: &[&'a Value]) -> &'a Value {
    let displays = channels.iter().filter(|line| line["channel"] == "display");
    displays.max_by_key(|line| line["bytes_sent"].as_u64()).unwrap()
}

#[tokio::test]
#[ignore = "needs libvirt, a guest, chromium, spice-client-gtk, remote-viewer, xvfb and xdotool"]
async fn a_screen_is_shown_in_a_browser_and_in_viewers_as_long_as_the_ticket_is_there() {
    let place = Place::new();
    let host = Host::new(
        &[],
        &format!(
            "{EMULATION}{}access = \"link\"\n{}",
            place.settings(),
            place.spice_settings()
        ),
    );
    let image = host.images().add_tiny("tiny", "");
    let job = Job::new("unit")
        .image(&image)
        .variable("CI_COMMIT_REF_PROTECTED", "true");
    let stages = Stages::of(&host, &job, 71);
    let prepare = stages.prepare().ok();
    // Whoever reads this job's log gets in nowhere, and is told why, whatever others' logs have.
    assert!(
        prepare.log.contains("no open link: the job's ref is protected"),
        "{}",
        prepare.log
    );
    for word in ["ticket=", "Warning"] {
        assert!(!prepare.log.contains(word), "{}", prepare.log);
    }
    let key = prepare
        .log
        .split_once("/jobs/")
        .unwrap()
        .1
        .split(' ')
        .next()
        .unwrap()
        .to_owned();
    // It warns of such links when it starts.
    let served = place.serve_and_read(&host.settings(), 2);
    let ca = place.authority.file("ca.pem");
    let picture = host.folder().join("picture.ppm");
    let mint = |arguments: &[&str]| {
        let all = [&["console", "ticket", &key], arguments].concat();
        host.expect(&all).trim().to_owned()
    };

    // The file that starts a viewer is good once; a ticket is a password, too.
    let mut browser = place.browser();
    assert_eq!(
        browser.get(&format!("/jobs/{key}/console.vv")).await.status(),
        401
    );
    assert_eq!(browser.enter(&key, &mint(&["--quiet"])).await, 204);
    let viewer_file = async || {
        let answer = browser.get(&format!("/jobs/{key}/console.vv")).await;
        answer.text().await.unwrap()
    };
    let file = viewer_file().await;
    let keys = keys(&file);
    assert_eq!((keys["type"], keys["host"]), ("spice", "localhost"));
    assert!(keys["ca"].starts_with("-----BEGIN CERTIFICATE-----\\n"));
    let address = format!("spice://localhost?tls-port={}", keys["tls-port"]);
    assert!(pictured(&address, keys["password"], &ca, &picture), "{file}");
    assert!(!pictured(&address, keys["password"], &ca, &picture), "good once");
    assert!(pictured(
        &address,
        &mint(&["--quiet", "--view-only"]),
        &ca,
        &picture
    ));

    let path = host.folder().join("console.vv");
    std::fs::write(&path, viewer_file().await).unwrap();
    type_in_the_viewer(&host, &path, || {
        assert!(pictured(&address, &mint(&["--quiet"]), &ca, &picture));
    });

    // A page's socket speaks SPICE to who has the cookie, and to nobody else.
    let screen = format!("/jobs/{key}/screen");
    assert_eq!(place.browser().open(&screen).await.err(), Some(401));
    let mut socket = browser.open(&screen).await.unwrap();
    let mut hello = b"REDQ\x02\0\0\0\x02\0\0\0\x1a\0\0\0".to_vec();
    hello.extend([0; 4]);
    hello.extend([1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 18, 0, 0, 0, 9, 0, 0, 0, 9, 0, 0, 0]);
    socket.send(Message::binary(hello)).await.unwrap();
    let (answer, _) = read_until(&mut socket, "REDQ").await;
    assert!(answer.starts_with("REDQ"));
    drop(socket);

    // For an admin on the host, without the pages.
    let png = host.folder().join("screen.png");
    host.expect(&["console", &key, "--screenshot", png.to_str().unwrap()]);
    assert!(std::fs::read(&png).unwrap().starts_with(b"\x89PNG"));
    host.expect(&["console", &key, "--send-key", "shift-a"]);
    let tickets = || -> Vec<Value> {
        serde_json::from_str(&host.expect(&["console", "list", "--format", "json"])).unwrap()
    };
    let before = tickets().len();
    let pictured_by_command = |before: usize, arguments: &[&str]| {
        let mut local = host
            .command(&[&["console", &key, "--print"], arguments].concat())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut file = vec![0; 4096];
        let count = local.stdout.as_mut().unwrap().read(&mut file).unwrap();
        let file = String::from_utf8(file[..count].to_vec()).unwrap();
        let keys = self::keys(&file);
        let here = format!("spice://{}?port={}", keys["host"], keys["port"]);
        let seen = pictured(&here, keys["password"], &ca, &picture);
        assert_eq!(tickets().len(), before + 1);
        kill_process(Pid::from_child(&local), Signal::INT).unwrap();
        assert!(local.wait().unwrap().success());
        assert_eq!(tickets().len(), before, "its ticket goes with it");
        seen
    };
    assert!(pictured_by_command(before, &[]));
    assert!(pictured_by_command(before, &["--view-only"]));

    // A browser: the ticket goes into the page by its address and is gone from there.
    let mut chromium = Chromium::start().await;
    chromium.open(&mint(&[])).await;
    chromium.until("!document.getElementById('tabs').hidden").await;
    assert_eq!(
        chromium.value("location.href").await,
        format!("{}/jobs/{key}", place.origin())
    );
    chromium
        .until("document.querySelector('#terminal .xterm-rows')?.innerText.includes('#')")
        .await;
    chromium.type_line("echo $((6*7))-from-the-guest").await;
    chromium
        .until("document.querySelector('#terminal .xterm-rows').innerText.includes('42-from-the-guest')")
        .await;
    chromium
        .type_line("printf 'in \\033[31m%s\\033[0m\\n' colour")
        .await;
    chromium
        .until("document.querySelector('#terminal .xterm-rows .xterm-fg-1')?.innerText === 'colour'")
        .await;
    let terminal = chromium.picture().await;
    chromium
        .value("document.getElementById('tab-serial').click()")
        .await;
    chromium
        .until("document.querySelector('#serial .xterm-rows')?.innerText.trim().length > 20")
        .await;
    let serial = chromium.picture().await;
    chromium
        .value("document.getElementById('tab-screen').click()")
        .await;
    let shown = shows_the_guest(&mut chromium, &host).await;
    // The next viewer takes it, the page says so, and takes it back.
    assert!(pictured(&address, &mint(&["--quiet"]), &ca, &picture));
    let taken = "closed: another viewer has taken over this console.";
    chromium
        .until(&format!(
            "document.getElementById('message').innerText.includes('{taken}')"
        ))
        .await;
    chromium
        .value("document.getElementById('tab-screen').click()")
        .await;
    shows_the_guest(&mut chromium, &host).await;
    for (name, picture) in [("terminal", terminal), ("serial", serial), ("screen", shown)] {
        let path = format!("{}/console-{name}.png", env!("CARGO_TARGET_TMPDIR"));
        std::fs::write(&path, picture).unwrap();
        println!("{path}");
    }

    // Another process of this host does not take it for somebody who may only look.
    let before = tickets().len();
    assert!(!pictured_by_command(before, &["--view-only"]));
    shows_the_guest(&mut chromium, &host).await;

    // All of it ends with the ticket, while the machine lives on.
    host.expect(&["console", "end", &key]);
    chromium
        .until("document.getElementById('message').innerText.includes('closed: this console session was ended by the operator.')")
        .await;
    assert_eq!(host.machines().len(), 1);
    assert_eq!(browser.enter(&key, &mint(&["--quiet"])).await, 204);
    let mut socket = browser.open(&format!("/jobs/{key}/terminal")).await.unwrap();
    read_until(&mut socket, "#").await;
    // And with the job.
    stages.cleanup().ok();
    let (text, ended) = read_until(&mut socket, "").await;
    assert!(ended && text.contains("the machine is gone"), "{text}");
    until(
        "each channel that was opened is closed",
        Duration::from_secs(10),
        || {
            let audit = place.audit();
            let count = |event: &str| audit.iter().filter(|line| line["event"] == event).count();
            count("channel-opened") == count("channel-closed")
                && count("session-opened") == count("session-closed")
        },
    );
    let audit = place.audit();
    let channels: Vec<&Value> = audit
        .iter()
        .filter(|line| line["event"] == "channel-closed")
        .collect();
    for name in ["main", "display", "inputs", "terminal", "serial"] {
        assert!(
            channels.iter().any(|line| line["channel"] == name),
            "{name}: {channels:?}"
        );
    }
    // What a screen carried is in the line of its session, too.
    let of_screen = |line: &Value| line["session"] == display(&channels)["session"];
    let session = audit
        .iter()
        .find(|line| line["event"] == "session-closed" && of_screen(line))
        .unwrap();
    let carried = display(&channels)["bytes_sent"].as_u64().unwrap();
    assert!(carried > 4_000, "{channels:?}");
    assert!(session["bytes_sent"].as_u64().unwrap() >= carried, "{session}");
    stages.nothing_is_left();
    drop(served);
}
