//! A real OpenSSH server on loopback, with keys and configuration of its own.

// Each test binary uses a part of this.
#![allow(dead_code)]

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cannery::guest::keys::{JobKeys, PublicKey};
use cannery::guest::ssh::{Auth, HostKeyPolicy, Patience, Target};

/// A server that ends when it is dropped.
pub struct Sshd {
    child: Child,
    pub address: SocketAddr,
    pub keys: JobKeys,
    folder: tempfile::TempDir,
}

impl Sshd {
    /// Starts a server that lets the job's key in as root.
    pub fn start() -> Self {
        Self::start_with("")
    }

    /// The same with further lines of configuration, which win over the usual ones.
    pub fn start_with(configuration: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let keys = JobKeys::generate().unwrap();
        keys.save(folder.path()).unwrap();
        Self::allow(folder.path(), keys.user.public());
        let address = free_address();
        let environment = home(folder.path());
        let child = Self::spawn(folder.path(), address, configuration, &environment, "true");
        Self::listening(child, address, keys, folder)
    }

    /// A server whose sessions see nothing but busybox and `/proc`, as in the smallest guests.
    pub fn start_in_busybox() -> Self {
        // sshd chroots only where nobody else could change a folder on the way: not below /tmp.
        fs::create_dir_all("/run/sshd").unwrap();
        let folder = tempfile::tempdir_in("/run/sshd").unwrap();
        let keys = JobKeys::generate().unwrap();
        keys.save(folder.path()).unwrap();
        Self::allow(folder.path(), keys.user.public());
        let root = folder.path().join("root");
        for name in ["bin", "proc", "dev", "tmp", "root"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).unwrap();
        fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        let install = Command::new("chroot")
            .arg(&root)
            .args(["/bin/busybox", "--install", "-s", "/bin"])
            .status()
            .unwrap();
        assert!(install.success());
        // The login shell that the host's /etc/passwd names.
        fs::write(root.join("bin/bash"), "#!/bin/sh\nexec sh \"$@\"\n").unwrap();
        fs::set_permissions(root.join("bin/bash"), fs::Permissions::from_mode(0o755)).unwrap();
        let address = free_address();
        let at = root.display();
        // The mounts are those of the server alone and go with it.
        let prelude = format!(
            "mount -t proc proc {at}/proc && touch {at}/dev/null && mount --bind /dev/null {at}/dev/null"
        );
        let configuration = format!("ChrootDirectory {at}");
        let child = Self::spawn(
            folder.path(),
            address,
            &configuration,
            "PATH=/bin HOME=/root",
            &prelude,
        );
        Self::listening(child, address, keys, folder)
    }

    fn listening(child: Child, address: SocketAddr, keys: JobKeys, folder: tempfile::TempDir) -> Self {
        let server = Self {
            child,
            address,
            keys,
            folder,
        };
        let start = Instant::now();
        while TcpStream::connect(server.address).is_err() {
            assert!(start.elapsed() < Duration::from_secs(10), "{}", server.log());
            std::thread::sleep(Duration::from_millis(10));
        }
        server
    }

    /// A server that does not run yet, and keys for it. [`Sleeping::wake`] starts it.
    pub fn sleeping() -> Sleeping {
        let folder = tempfile::tempdir().unwrap();
        let keys = JobKeys::generate().unwrap();
        keys.save(folder.path()).unwrap();
        Self::allow(folder.path(), keys.user.public());
        Sleeping {
            address: free_address(),
            keys,
            folder,
        }
    }

    fn allow(folder: &Path, key: &PublicKey) {
        fs::write(folder.join("authorized_keys"), format!("{key}\n")).unwrap();
    }

    fn spawn(
        folder: &Path,
        address: SocketAddr,
        configuration: &str,
        environment: &str,
        prelude: &str,
    ) -> Child {
        fs::create_dir_all("/run/sshd").unwrap();
        let at = folder.display();
        let text = format!(
            "{configuration}\nListenAddress {address}\nHostKey {at}/host_key\nAuthorizedKeysFile {at}/authorized_keys\n\
             SetEnv {MARK}={} {environment}\n\
             UsePAM no\nStrictModes no\nPidFile none\nPermitRootLogin yes\nLogLevel VERBOSE\n",
            address.port()
        );
        let file = folder.join("sshd_config");
        fs::write(&file, text).unwrap();
        let log = fs::File::create(folder.join("log")).unwrap();
        Command::new("unshare")
            .args(["--mount", "sh", "-c"])
            .arg(format!(
                "{prelude} && exec /usr/sbin/sshd -D -e -f {}",
                file.display()
            ))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    /// Login as root by the job's key, the host key known.
    pub fn target(&self) -> Target {
        Target {
            address: self.address,
            user: "root".into(),
            auth: vec![Auth::Key(self.keys.user.clone())],
            host_key: HostKeyPolicy::Expect(self.keys.host.public().clone()),
        }
    }

    /// What the server has logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    /// A folder that lives as long as the server.
    pub fn folder(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    /// Takes the key out of the server's list.
    pub fn forbid(&self) {
        fs::write(self.folder.path().join("authorized_keys"), "").unwrap();
    }

    /// Puts the key back.
    pub fn permit(&self) {
        Self::allow(self.folder.path(), self.keys.user.public());
    }

    /// The processes that serve sessions now.
    pub fn sessions(&self) -> Vec<u32> {
        children(self.child.id())
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        // Sessions first: a stopped one would otherwise stay, and nobody would know whose it was.
        for session in self.sessions() {
            for inner in children(session) {
                signal("KILL", inner);
            }
            signal("KILL", session);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        // What a failed test has left may have gone into sessions of its own; its environment tells, or its parent's.
        let mark = format!("{MARK}={}", self.address.port());
        let mut ours: Vec<u32> = processes()
            .filter(|pid| {
                let path = format!("/proc/{pid}/environ");
                let environment = fs::read(path).unwrap_or_default();
                environment.split(|&b| b == 0).any(|v| v == mark.as_bytes())
            })
            .collect();
        let mut next = 0;
        while let Some(&parent) = ours.get(next) {
            ours.extend(children(parent));
            next += 1;
        }
        ours.into_iter().for_each(|pid| signal("KILL", pid));
    }
}

/// A home of its own: what the developer's login scripts do is none of the tests' business.
fn home(folder: &Path) -> String {
    format!("HOME={}", folder.display())
}

/// Marks everything that runs under a server of ours, by the server's port.
const MARK: &str = "CANNERY_TEST_SERVER";

fn processes() -> impl Iterator<Item = u32> {
    let folders = fs::read_dir("/proc").unwrap();
    folders.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

/// A server that is still to be started.
pub struct Sleeping {
    pub address: SocketAddr,
    pub keys: JobKeys,
    folder: tempfile::TempDir,
}

impl Sleeping {
    /// Starts it.
    pub fn wake(self) -> Sshd {
        let environment = home(self.folder.path());
        let child = Sshd::spawn(self.folder.path(), self.address, "", &environment, "true");
        Sshd {
            child,
            address: self.address,
            keys: self.keys,
            folder: self.folder,
        }
    }
}

/// A port that nobody listens on.
pub fn free_address() -> SocketAddr {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .unwrap()
        .local_addr()
        .unwrap()
}

/// Long enough for a busy machine, short enough for a test.
pub fn patience() -> Patience {
    Patience {
        login: Duration::from_secs(20),
        silence: Duration::from_secs(60),
    }
}

/// The children of a process.
pub fn children(parent: u32) -> Vec<u32> {
    let path = format!("/proc/{parent}/task/{parent}/children");
    fs::read_to_string(path)
        .unwrap_or_default()
        .split_whitespace()
        .map(|pid| pid.parse().unwrap())
        .collect()
}

/// Sends a signal by its name.
pub fn signal(name: &str, pid: u32) {
    Command::new("kill")
        .arg(format!("-{name}"))
        .arg(pid.to_string())
        .stderr(Stdio::null())
        .status()
        .unwrap();
}
