//! A real OpenSSH server on loopback, with keys and configuration of its own.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
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
        let child = Self::spawn(folder.path(), address, configuration);
        let server = Self {
            child,
            address,
            keys,
            folder,
        };
        server.wait_until_it_listens();
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

    fn spawn(folder: &Path, address: SocketAddr, configuration: &str) -> Child {
        fs::create_dir_all("/run/sshd").unwrap();
        let at = folder.display();
        let text = format!(
            "{configuration}\nListenAddress {address}\nHostKey {at}/host_key\nAuthorizedKeysFile {at}/authorized_keys\n\
             UsePAM no\nStrictModes no\nPidFile none\nPermitRootLogin yes\nLogLevel VERBOSE\n"
        );
        let file = folder.join("sshd_config");
        fs::write(&file, text).unwrap();
        let log = fs::File::create(folder.join("log")).unwrap();
        Command::new("/usr/sbin/sshd")
            .args(["-D", "-e", "-f"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    fn wait_until_it_listens(&self) {
        let start = Instant::now();
        while TcpStream::connect(self.address).is_err() {
            assert!(start.elapsed() < Duration::from_secs(10), "{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
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
        for session in self.sessions() {
            signal("KILL", session);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
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
        let child = Sshd::spawn(self.folder.path(), self.address, "");
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
