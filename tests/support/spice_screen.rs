//! A machine with a screen, and how it is seen whether viewers hold it up.

// Each test binary uses a part of this.
#![allow(dead_code)]

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cannery::console::backend::{Tcp, Unix};
use cannery::console::link::Caps;
use cannery::console::{Backend, Kind};
use cannery::secret::Secret;

use super::{Viewer, hello};

/// Longest wait for anything here: an emulated machine on a busy host.
pub const PATIENCE: Duration = Duration::from_secs(40);

/// What QEMU's screen asks for, which no viewer is told.
const MACHINES_OWN: &str = "the-machines-own";

/// What makes all kinds of channels but those that each QEMU has.
const DEVICES: [&str; 36] = [
    // A second screen.
    "-device",
    "qxl",
    "-chardev",
    "spiceport,id=port,name=a.port",
    "-device",
    "virtserialport,chardev=port,name=a.port",
    "-chardev",
    "spicevmc,id=agent,name=vdagent",
    "-device",
    "virtserialport,chardev=agent,name=com.redhat.spice.0",
    "-chardev",
    "spiceport,id=webdav,name=org.spice-space.webdav.0",
    "-device",
    "virtserialport,chardev=webdav,name=org.spice-space.webdav.0",
    // Sound, both ways.
    "-audiodev",
    "spice,id=sound",
    "-device",
    "intel-hda",
    "-device",
    "hda-duplex,audiodev=sound",
    "-device",
    "qemu-xhci",
    "-chardev",
    "spicevmc,id=usb,name=usbredir",
    "-device",
    "usb-redir,chardev=usb",
    "-chardev",
    "spicevmc,id=card,name=smartcard",
    "-device",
    "usb-ccid",
    "-device",
    "ccid-card-passthru,chardev=card",
    // No network, and nothing else that nobody asked for.
    "-nic",
    "none",
    "-serial",
    "none",
];

/// A QEMU that has not begun to run its guest, with all kinds of channels.
pub struct Screen {
    child: Child,
    folder: tempfile::TempDir,
}

impl Screen {
    /// One at a socket that only this host reaches, as libvirt gives it to us.
    pub fn start() -> Self {
        let screen = Self::listening(|folder| format!("unix=on,addr={}", folder.join("screen").display()));
        awaits("QEMU's screen", || screen.path().exists());
        screen
    }

    /// The same with a guest that runs and switches for ever between text and graphics, which makes QEMU wait for its screen.
    pub fn switching() -> Self {
        /// A disk's first sector (`modes.s` beside it says what it does), and how large a disk there is firmware for.
        const DISK: &[u8] = include_bytes!("../../src/bench/console/modes.bin");
        const SIZE: usize = 4 << 20;
        let screen = Self::with(
            |folder| {
                let mut disk = DISK.to_vec();
                disk.resize(SIZE, 0);
                std::fs::write(folder.join("disk"), disk).unwrap();
                format!("unix=on,addr={}", folder.join("screen").display())
            },
            |folder| {
                let disk = folder.join("disk").display().to_string();
                vec![
                    "-drive".to_owned(),
                    format!("file={disk},format=raw,if=none,id=disk"),
                    "-device".to_owned(),
                    "ide-hd,drive=disk".to_owned(),
                ]
            },
        );
        awaits("QEMU's screen", || screen.path().exists());
        screen.run_guest();
        screen
    }

    /// One at a port of the loopback device.
    pub fn at_port(port: u16) -> Self {
        let screen = Self::listening(|_| format!("addr=127.0.0.1,port={port}"));
        awaits("QEMU's screen", || {
            TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok()
        });
        screen
    }

    /// One with TLS of its own, and a port without. It takes the main channel over TLS only, and the pointer's only without.
    pub fn at_ports(port: u16, tls_port: u16, [ca, certificate, key]: [&Path; 3]) -> Self {
        let screen = Self::listening(|_| {
            format!(
                "addr=127.0.0.1,port={port},tls-port={tls_port},tls-channel=main,plaintext-channel=cursor,\
                 x509-cacert-file={},x509-cert-file={},x509-key-file={}",
                ca.display(),
                certificate.display(),
                key.display()
            )
        });
        awaits("QEMU's screen", || {
            TcpStream::connect((Ipv4Addr::LOCALHOST, tls_port)).is_ok()
        });
        screen
    }

    fn listening(place: impl FnOnce(&Path) -> String) -> Self {
        Self::with(place, |_| Vec::new())
    }

    fn with(place: impl FnOnce(&Path) -> String, more: impl FnOnce(&Path) -> Vec<String>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let place = place(folder.path());
        let more = more(folder.path());
        let at = |name: &str| folder.path().join(name).display().to_string();
        let child = Command::new("qemu-system-x86_64")
            .args([
                "-M",
                "q35",
                "-accel",
                "tcg",
                "-m",
                "64",
                "-S",
                "-nodefaults",
                "-display",
                "none",
            ])
            .args(["-vga", "virtio", "-device", "virtio-serial"])
            .args(DEVICES)
            .args(["-object", &format!("secret,id=own,data={MACHINES_OWN}")])
            .args(["-spice", &format!("{place},password-secret=own")])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", at("control"))])
            .args(["-trace", "input_event_key_*", "-D", &at("log")])
            .args(more)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let screen = Screen { child, folder };
        awaits("QEMU's control connection", || {
            screen.folder.path().join("control").exists()
        });
        screen
    }

    /// Lets the guest run: its firmware looks for a disk that is not there. Before, it gets no keys.
    pub fn run_guest(&self) {
        self.control().ask("cont");
    }

    /// The keys that QEMU was given, one line for each press and release.
    pub fn keys(&self) -> Vec<String> {
        let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
        log.lines()
            .filter(|line| line.contains("input_event_key"))
            .map(str::to_owned)
            .collect()
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("screen")
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(Unix {
            path: self.path(),
            ticket: Some(Secret::new(MACHINES_OWN)),
            likeness: "qemu".to_owned(),
        })
    }

    /// The way to one at a port.
    pub fn backend_at(port: u16) -> Arc<dyn Backend> {
        Arc::new(Self::tcp(Some(port)))
    }

    /// The same, for what is to be changed about it.
    pub fn tcp(port: Option<u16>) -> Tcp {
        Tcp {
            host: "127.0.0.1".to_owned(),
            port,
            tls: None,
            ticket: Some(Secret::new(MACHINES_OWN)),
            likeness: "qemu".to_owned(),
        }
    }

    /// What the machine itself says it can do on a channel.
    pub fn caps(&self, kind: Kind) -> Caps {
        let mut viewer = Viewer::at(UnixStream::connect(self.path()).unwrap());
        viewer.link(&hello(0, kind)).unwrap().caps
    }

    /// How long the machine's control connection takes to answer.
    pub fn answers_in(&self) -> Duration {
        self.control().answers_in()
    }

    fn control(&self) -> Control {
        Control::open(&self.folder.path().join("control"))
    }

    pub fn kill(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Waits until this is there.
#[track_caller]
fn awaits(what: &str, mut is_there: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is_there() {
        assert!(Instant::now() < end, "waited for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// QEMU's control connection.
struct Control(BufReader<UnixStream>);

impl Control {
    fn open(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut control = Control(BufReader::new(stream));
        control.line();
        control.ask("qmp_capabilities");
        control
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line
    }

    fn ask(&mut self, what: &str) {
        let stream = self.0.get_mut();
        writeln!(stream, "{{\"execute\": \"{what}\"}}").unwrap();
        while !self.line().contains("\"return\"") {}
    }

    fn answers_in(&mut self) -> Duration {
        let begin = Instant::now();
        self.ask("query-status");
        begin.elapsed()
    }
}

/// An answer of QEMU's control connection that took so long was held up by somebody: a viewer does so for a second and more.
/// Without that it takes some hundredths of a second at most, and some tenths only where the host has no processor for it.
pub const HELD_UP: Duration = Duration::from_millis(900);

/// The slowest answer of a machine's control connection, which is asked again and again during some work.
pub fn slowest_beside<T>(screen: &Screen, work: impl FnOnce() -> T) -> (Duration, T) {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut control = screen.control();
            let mut slowest = Duration::ZERO;
            while !over.load(Ordering::Relaxed) {
                slowest = slowest.max(control.answers_in());
                std::thread::sleep(Duration::from_millis(5));
            }
            slowest
        });
        let done = work();
        over.store(true, Ordering::Relaxed);
        (asking.join().unwrap(), done)
    })
}
