//! Lines from processes in guests to the test: whoever is connected lives, and the kernel hangs up for whoever has ended.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, SystemTime};

use super::until;

/// A server that processes call with `exec 3<>/dev/tcp/ADDRESS/PORT; echo NAME >&3`.
#[derive(Debug, Clone)]
pub struct Lines {
    address: IpAddr,
    port: u16,
    callers: Arc<Mutex<BTreeMap<String, Caller>>>,
}

#[derive(Debug)]
struct Caller {
    stream: TcpStream,
    said: Vec<String>,
    closed: Option<SystemTime>,
}

impl Lines {
    /// Listens until the process ends.
    pub fn listen(address: IpAddr, port: u16) -> Self {
        let listener = TcpListener::bind((address, port)).expect("a port for lines");
        let lines = Self {
            address,
            port,
            callers: Arc::default(),
        };
        let of_thread = lines.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let lines = of_thread.clone();
                thread::spawn(move || lines.serve(&stream));
            }
        });
        lines
    }

    fn serve(&self, stream: &TcpStream) {
        let mut words = BufReader::new(stream).lines().map_while(Result::ok);
        let Some(name) = words.next() else { return };
        let caller = Caller {
            stream: stream.try_clone().expect("a second handle"),
            said: Vec::new(),
            closed: None,
        };
        let before = self.table().insert(name.clone(), caller);
        assert!(before.is_none(), "{name} called twice");
        for word in words {
            self.with(&name, |caller| caller.said.push(word));
        }
        self.with(&name, |caller| caller.closed = Some(SystemTime::now()));
    }

    fn table(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Caller>> {
        self.callers.lock().expect("the callers' lock")
    }

    fn with<T>(&self, name: &str, change: impl FnOnce(&mut Caller) -> T) -> Option<T> {
        self.table().get_mut(name).map(change)
    }

    /// The line of bash that calls, and says who it is.
    pub fn call(&self, name: &str) -> String {
        format!(
            "exec 3<>/dev/tcp/{}/{}; echo '{name}' >&3",
            self.address, self.port
        )
    }

    /// Where bash finds the server.
    pub fn place(&self) -> String {
        format!("/dev/tcp/{}/{}", self.address, self.port)
    }

    /// Waits until this one has called.
    #[track_caller]
    pub fn wait(&self, name: &str, within: Duration) {
        until(&format!("{name} has called"), within, || {
            self.table().contains_key(name)
        });
    }

    /// Sends this one a line.
    pub fn tell(&self, name: &str, word: &str) {
        let sent = self.with(name, |caller| {
            caller.stream.write_all(format!("{word}\n").as_bytes())
        });
        sent.expect("a caller").expect("a line takes a word");
    }

    /// What this one has said after its name.
    pub fn said(&self, name: &str) -> Vec<String> {
        self.with(name, |caller| caller.said.clone()).unwrap_or_default()
    }

    /// When this one's line was closed, if it was: no process holds it any more.
    pub fn closed(&self, name: &str) -> Option<SystemTime> {
        self.with(name, |caller| caller.closed).flatten()
    }
}
