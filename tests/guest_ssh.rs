//! The guest room against Debian's own sshd on loopback: what a script prints, how it ends, and what ends it.
//!
//! These tests need root and `/usr/sbin/sshd`.

#![allow(clippy::unwrap_used)]

#[path = "support/sshd.rs"]
mod sshd;

use std::fs;
use std::future::{Ready, pending, ready};
use std::io::Write as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use cannery::guest::keys::KeyPair;
use cannery::guest::ready::wait_ready;
use cannery::guest::script::{Control, Ending, Error, run_script};
use cannery::guest::shell::{RunId, Shell, preamble, wrapper};
use cannery::guest::ssh::{self, Auth, Connection, HostKeyPolicy, Patience, Progress};
use cannery::secret::Secret;
use sshd::{Sshd, children, patience, signal};

type Alive = fn() -> Ready<Result<(), String>>;

fn alive() -> Ready<Result<(), String>> {
    ready(Ok(()))
}

/// Nobody cancels, the machine lives.
fn calm() -> Control<std::future::Pending<()>, Alive> {
    Control {
        cancel: pending(),
        grace: Duration::from_secs(5),
        alive,
    }
}

async fn connect(server: &Sshd) -> Connection {
    Connection::open(server.target(), patience(), |_| {})
        .await
        .unwrap_or_else(|e| panic!("{e}\n{}", server.log()))
}

async fn run_on(connection: &Connection, shell: Shell, script: &[u8]) -> (Vec<u8>, Result<Ending, Error>) {
    let mut output = Vec::new();
    let ending = run_script(connection, shell, &RunId::new(), script, &mut output, calm()).await;
    (output, ending)
}

async fn run(server: &Sshd, shell: Shell, script: &[u8]) -> (Vec<u8>, Result<Ending, Error>) {
    run_on(&connect(server).await, shell, script).await
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(10), "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn lives(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn pid_in(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

#[tokio::test]
#[ignore = "needs root and sshd"]
async fn stdout_and_stderr_keep_their_order() {
    let server = Sshd::start();
    let script = b"i=0; while [ $i -lt 500 ]; do echo out $i; echo err $i >&2; i=$((i+1)); done; printf end";
    let (output, ending) = run(&server, Shell::Bash, script).await;
    let expected: String = (0..500).map(|i| format!("out {i}\nerr {i}\n")).collect();
    assert_eq!(String::from_utf8(output).unwrap(), expected + "end");
    assert_eq!(ending.unwrap(), Ending::Exited(0));
}

#[tokio::test]
#[ignore = "needs root and sshd"]
async fn every_exit_code_comes_back_on_one_connection() {
    let server = Sshd::start();
    let connection = connect(&server).await;
    for code in (0..=255).step_by(5).chain([1, 2, 3, 126, 127, 128, 129, 254]) {
        let (output, ending) = run_on(&connection, Shell::Sh, format!("exit {code}").as_bytes()).await;
        assert_eq!(
            (output.as_slice(), ending.unwrap()),
            (&b""[..], Ending::Exited(code))
        );
    }
    let (_, ending) = run_on(&connection, Shell::Bash, b"kill -SEGV $$").await;
    assert_eq!(ending.unwrap(), Ending::Exited(139));
}

#[tokio::test]
#[ignore = "needs root and sshd"]
async fn a_large_script_with_any_bytes_arrives_unchanged() {
    let server = Sshd::start();
    // A value as large as the kernel lets a variable be, with newlines and all bytes that no shell interprets.
    let value: Vec<u8> = (0..127 << 10)
        .map(|i: u32| match u8::try_from(i * 7 % 251).unwrap() {
            0 | b'\'' => b'\n',
            byte => byte,
        })
        .collect();
    let mut script = b"VALUE='".to_vec();
    script.extend_from_slice(&value);
    script.extend_from_slice(b"'\nexport VALUE\n");
    // Several megabytes, more than any window.
    script.extend(b"# comment comment comment comment comment comment\n".repeat(80_000));
    script.extend_from_slice(b"printf '%s' \"$VALUE\"; exec env -0 >/dev/null");
    for shell in [Shell::Bash, Shell::Sh] {
        let (output, ending) = run(&server, shell, &script).await;
        assert_eq!(ending.unwrap(), Ending::Exited(0));
        assert!(
            output == value,
            "{shell}: {} bytes of {}",
            output.len(),
            value.len()
        );
    }
}

#[tokio::test]
#[ignore = "needs root and sshd"]
async fn binary_output_without_a_last_newline_is_exact() {
    let server = Sshd::start();
    let file = server.folder().join("noise");
    let noise: Vec<u8> = (0..3_000_000_u64)
        .map(|i| u8::try_from(i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56).unwrap())
        .collect();
    fs::write(&file, &noise).unwrap();
    let (output, ending) = run(&server, Shell::Sh, format!("cat {}", file.display()).as_bytes()).await;
    assert_eq!(ending.unwrap(), Ending::Exited(0));
    assert!(output == noise);
}

#[tokio::test]
#[ignore = "needs root and sshd"]
async fn what_is_left_in_the_background_holds_nobody_up_and_lives_on() {
    let server = Sshd::start();
    let trace = server.folder().join("trace");
    let pid = server.folder().join("pid");
    let script = format!(
        "(sleep 1; i=0; while [ $i -lt 20000 ]; do echo still here $i; i=$((i+1)); done; echo wrote >{}; exec sleep 1000) &\n\
         echo $! >{}; echo done",
        trace.display(),
        pid.display()
    );
    let connection = connect(&server).await;
    let start = Instant::now();
    let (output, ending) = run_on(&connection, Shell::Bash, script.as_bytes()).await;
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert_eq!(
        (output.as_slice(), ending.unwrap()),
        (&b"done\n"[..], Ending::Exited(0))
    );
    drop(connection);
    eventually("the child wrote to its end", || trace.exists()).await;
    assert!(lives(&pid_in(&pid)));
    signal("KILL", pid_in(&pid).parse().unwrap());
}

#[tokio::test]
#[ignore = "needs root and sshd"]
async fn the_script_is_gone_from_the_guest_afterwards() {
    let server = Sshd::start();
    let (output, _) = run(&server, Shell::Bash, b"printf '%s' \"$0\"; stat -c ' %a' \"$0\"").await;
    let output = String::from_utf8(output).unwrap();
    let (path, mode) = output.trim().split_once(' ').unwrap();
    assert_eq!(mode, "600");
    eventually("the script is removed", || !Path::new(path).exists()).await;
}

#[tokio::test]
#[ignore = "needs root and sshd"]
async fn cancel_ends_all_processes_wherever_they_went() {
    let server = Sshd::start();
    let at = server.folder();
    cancel_everything(&server, &at, &at, Shell::Bash).await;
}

#[tokio::test]
#[ignore = "needs root, sshd and a static busybox"]
async fn busybox_alone_is_enough() {
    let server = Sshd::start_in_busybox();
    let script = b"printf out; printf err >&2; env | grep -c COREUTILS; exit 9";
    let (output, ending) = run(&server, Shell::Sh, script).await;
    assert_eq!(
        (output.as_slice(), ending.unwrap()),
        (&b"outerr0\n"[..], Ending::Exited(9))
    );
    let (_, ending) = run(&server, Shell::Sh, b"trap 'kill -TERM 0' EXIT; true").await;
    assert_eq!(ending.unwrap(), Ending::Exited(143));
    cancel_everything(
        &server,
        Path::new("/tmp"),
        &server.folder().join("root/tmp"),
        Shell::Sh,
    )
    .await;
}

/// Starts children in all ways that leave a script's own group, and cancels. `inside` and `outside` name the same folder.
async fn cancel_everything(server: &Sshd, inside: &Path, outside: &Path, shell: Shell) {
    let at = inside.display();
    let stubborn = "trap \"\" TERM; echo $$ >";
    let script = format!(
        "trap 'echo obeyed; exit 1' TERM\n\
         setsid sh -c '{stubborn}{at}/1; while :; do sleep 1; done' &\n\
         n=nohup; command -v nohup >/dev/null || n=\n\
         $n sh -c '{stubborn}{at}/2; while :; do sleep 1; done' >/dev/null 2>&1 &\n\
         ( ( sh -c '{stubborn}{at}/3; while :; do sleep 1; done' & ) & )\n\
         env -i PATH=$PATH sh -c '{stubborn}{at}/4; while :; do sleep 1; done' &\n\
         sh -c 'echo $$ >{at}/5; kill -STOP $$; sleep 1000' &\n\
         echo begun\n\
         while :; do sleep 0.1; done"
    );
    let connection = connect(server).await;
    let files: Vec<_> = (1..=5).map(|i| outside.join(i.to_string())).collect();
    let all = files.clone();
    let grace = Duration::from_secs(2);
    let started = std::sync::Arc::new(std::sync::Mutex::new(None));
    let moment = std::sync::Arc::clone(&started);
    let cancel = async move {
        eventually("all children run", || all.iter().all(|f| !pid_in(f).is_empty())).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        *moment.lock().unwrap() = Some(Instant::now());
    };
    let mut output = Vec::new();
    let control = Control {
        cancel,
        grace,
        alive: alive as Alive,
    };
    let run = RunId::new();
    let ending = run_script(&connection, shell, &run, script.as_bytes(), &mut output, control).await;
    let took = started.lock().unwrap().unwrap().elapsed();
    assert_eq!(ending.unwrap(), Ending::Cancelled);
    for file in &files {
        assert!(!lives(&pid_in(file)), "{file:?} {}", pid_in(file));
    }
    assert!(took >= grace && took < grace + Duration::from_secs(2), "{took:?}");
    // In between bash may remark that its `sleep` was terminated.
    let output = String::from_utf8(output).unwrap();
    assert!(
        output.starts_with("begun\n") && output.ends_with("obeyed\n"),
        "{output}"
    );
    // The machine goes on: after_script runs on the same connection.
    assert_eq!(
        run_on(&connection, shell, b"exit 0").await.1.unwrap(),
        Ending::Exited(0)
    );
}

#[tokio::test]
#[ignore = "needs root and sshd"]
async fn what_is_forked_while_all_are_being_ended_does_not_get_away() {
    let server = Sshd::start();
    let connection = connect(&server).await;
    let all = server.folder().join("all");
    // Every child lives long, knows nothing of the run, and has lost its parent as soon as that is killed.
    let script = format!(
        "env -i PATH=$PATH setsid sh -c 'trap \"\" TERM; \
         while :; do sh -c \"echo \\$\\$ >>{}; exec sleep 60\" & sleep 0.01; done'",
        all.display()
    );
    let seen = all.clone();
    let control = Control {
        cancel: async move { eventually("children run", || !pid_in(&seen).is_empty()).await },
        grace: Duration::from_secs(1),
        alive: alive as Alive,
    };
    let (run, mut output) = (RunId::new(), Vec::new());
    let ending = run_script(
        &connection,
        Shell::Bash,
        &run,
        script.as_bytes(),
        &mut output,
        control,
    )
    .await;
    assert_eq!(ending.unwrap(), Ending::Cancelled);
    let pids = std::fs::read_to_string(&all).unwrap();
    let left: Vec<&str> = pids.lines().filter(|pid| lives(pid)).collect();
    assert!(pids.lines().count() > 10, "{pids}");
    assert_eq!(left, Vec::<&str>::new());
}

#[tokio::test]
#[ignore = "needs root and sshd"]
async fn a_script_that_obeys_is_gone_at_once_and_so_is_its_text() {
    let server = Sshd::start_with("MaxSessions 1");
    let connection = connect(&server).await;
    let mut output = Vec::new();
    let path = server.folder().join("path");
    let script = format!("echo $0 >{}; exec sleep 1000", path.display());
    let (seen, moment) = (path.clone(), Instant::now());
    let cancel = async move { eventually("it runs", || !pid_in(&seen).is_empty()).await };
    let control = Control {
        cancel,
        grace: Duration::from_secs(60),
        alive: alive as Alive,
    };
    let run = RunId::new();
    let ending = run_script(
        &connection,
        Shell::Sh,
        &run,
        script.as_bytes(),
        &mut output,
        control,
    )
    .await;
    assert_eq!(ending.unwrap(), Ending::Cancelled);
    assert!(
        moment.elapsed() < Duration::from_secs(3),
        "{:?}",
        moment.elapsed()
    );
    let script = pid_in(&path);
    eventually("the script's text is removed", || !Path::new(&script).exists()).await;
}

#[tokio::test]
#[ignore = "needs root and sshd"]
async fn cancel_works_while_nobody_reads_the_output() {
    let server = Sshd::start();
    let connection = connect(&server).await;
    let (mut output, _unread) = tokio::io::duplex(1024);
    let cancel = tokio::time::sleep(Duration::from_secs(1));
    let control = Control {
        cancel,
        grace: Duration::from_secs(5),
        alive: alive as Alive,
    };
    let start = Instant::now();
    let ending = run_script(
        &connection,
        Shell::Sh,
        &RunId::new(),
        b"exec yes",
        &mut output,
        control,
    )
    .await;
    assert_eq!(ending.unwrap(), Ending::Cancelled);
    assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
}

#[tokio::test]
#[ignore = "needs root and sshd"]
async fn a_killed_server_is_a_lost_connection_and_no_exit_code() {
    let server = Sshd::start();
    let connection = connect(&server).await;
    let script = run_on(&connection, Shell::Bash, b"echo before; sleep 1000");
    let fault = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        for session in server.sessions() {
            for child in children(session) {
                if fs::read_to_string(format!("/proc/{child}/comm")).is_ok_and(|c| c.trim() == "sshd") {
                    signal("KILL", child);
                }
            }
            signal("KILL", session);
        }
        pending::<()>().await;
    };
    let (output, ending) = tokio::select! { r = script => r, () = fault => unreachable!() };
    assert_eq!(output, b"before\n");
    assert!(
        matches!(ending, Err(Error::Ssh(ssh::Error::Lost(_)))),
        "{ending:?}"
    );
}

#[tokio::test]
#[ignore = "needs root and sshd"]
async fn a_server_that_runs_something_else_is_quoted_however_large_the_script() {
    let server = Sshd::start_with("ForceCommand echo no thanks; exit 3");
    let script = b"# comment\n".repeat(800_000);
    for script in [&b"true"[..], &script] {
        let ending = tokio::time::timeout(Duration::from_secs(10), run(&server, Shell::Sh, script));
        let (output, ending) = ending.await.unwrap();
        assert!(output.is_empty());
        assert_eq!(
            ending.unwrap_err().to_string(),
            "the guest did not start the script; it said: no thanks"
        );
    }
}

#[tokio::test]
#[ignore = "needs root and sshd"]
async fn a_killed_guardian_is_no_exit_code_either() {
    let server = Sshd::start();
    let script = b"echo before; kill -KILL $PPID; sleep 0.2; echo after";
    let (output, ending) = run(&server, Shell::Bash, script).await;
    assert_eq!(output, b"before\nafter\n");
    assert!(matches!(ending, Err(Error::Cut)), "{ending:?}");
}

async fn with_server_stopped(stop: Duration, silence: Duration) -> Result<Ending, Error> {
    let server = Sshd::start();
    let patience = Patience {
        silence,
        ..patience()
    };
    let connection = Connection::open(server.target(), patience, |_| {}).await.unwrap();
    let script = run_on(&connection, Shell::Bash, b"sleep 1; exit 5");
    let fault = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let sessions = server.sessions();
        sessions.iter().for_each(|&s| signal("STOP", s));
        tokio::time::sleep(stop).await;
        sessions.iter().for_each(|&s| signal("CONT", s));
        pending::<()>().await;
    };
    tokio::select! { (_, ending) = script => ending, () = fault => unreachable!() }
}

#[tokio::test]
#[ignore = "needs root and sshd"]
async fn a_silent_guest_is_lost_after_the_time_allowed_and_not_before() {
    let start = Instant::now();
    let ending = with_server_stopped(Duration::from_secs(30), Duration::from_secs(6)).await;
    assert!(
        matches!(ending, Err(Error::Ssh(ssh::Error::Silent(_)))),
        "{ending:?}"
    );
    let took = start.elapsed();
    assert!(
        took > Duration::from_secs(5) && took < Duration::from_secs(9),
        "{took:?}"
    );
    let ending = with_server_stopped(Duration::from_secs(4), Duration::from_secs(8)).await;
    assert_eq!(ending.unwrap(), Ending::Exited(5));
}

#[tokio::test]
#[ignore = "needs root and sshd"]
async fn a_script_that_is_quiet_for_longer_than_a_guest_may_be_silent_goes_on() {
    let server = Sshd::start();
    let patience = Patience {
        silence: Duration::from_secs(4),
        ..patience()
    };
    let connection = Connection::open(server.target(), patience, |_| {}).await.unwrap();
    let (_, ending) = run_on(&connection, Shell::Sh, b"sleep 7; exit 3").await;
    assert_eq!(ending.unwrap(), Ending::Exited(3));
}

#[tokio::test]
#[ignore = "needs root and sshd"]
async fn a_dead_machine_ends_the_run() {
    let server = Sshd::start();
    let connection = connect(&server).await;
    let start = Instant::now();
    let control = Control {
        cancel: pending(),
        grace: Duration::ZERO,
        alive: || {
            ready(if start.elapsed() > Duration::from_millis(1500) {
                Err("the machine was destroyed".to_owned())
            } else {
                Ok(())
            })
        },
    };
    let mut output = Vec::new();
    let ending = run_script(
        &connection,
        Shell::Sh,
        &RunId::new(),
        b"sleep 100",
        &mut output,
        control,
    )
    .await;
    assert_eq!(ending.unwrap_err().to_string(), "the machine was destroyed");
}

#[tokio::test]
#[ignore = "needs root and sshd"]
async fn a_server_that_starts_late_is_noticed_at_once() {
    let sleeping = Sshd::sleeping();
    let target = ssh::Target {
        address: sleeping.address,
        user: "root".into(),
        auth: vec![Auth::Key(sleeping.keys.user.clone())],
        host_key: HostKeyPolicy::Expect(sleeping.keys.host.public().clone()),
    };
    let starter = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        sleeping.wake()
    };
    let mut steps = Vec::new();
    let ready = wait_ready(target, patience(), alive, |step| steps.push(step));
    let (connection, _server) = tokio::join!(ready, starter);
    let login = connection.unwrap().login().clone();
    assert!(login.login < Duration::from_millis(2500), "{login:?}");
    assert!(
        login.tcp <= login.banner && login.banner <= login.login,
        "{login:?}"
    );
    assert_eq!(steps.last(), Some(&Progress::Login));
    assert!(steps.is_sorted());
}

#[tokio::test]
#[ignore = "needs root and sshd"]
async fn time_outs_say_how_far_it_came() {
    let short = Patience {
        login: Duration::from_millis(1500),
        ..patience()
    };
    let server = Sshd::start();
    let mut target = server.target();

    target.address = sshd::free_address();
    let error = wait_ready(target.clone(), short, alive, |_| {})
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("nothing listened on the SSH port"),
        "{error}"
    );

    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    target.address = silent.local_addr().unwrap();
    let error = wait_ready(target, short, alive, |_| {}).await.unwrap_err();
    assert!(
        error.to_string().contains("no SSH server said its name"),
        "{error}"
    );
}

#[tokio::test]
#[ignore = "needs root and sshd"]
async fn wrong_keys_and_passwords_are_recognised() {
    let server = Sshd::start();
    let mut target = server.target();
    target.auth = vec![
        Auth::Key(KeyPair::generate().unwrap()),
        Auth::Password(Secret::new("wrong")),
    ];
    let start = Instant::now();
    let error = wait_ready(target, patience(), alive, |_| {}).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the guest's SSH server refuses user root with the job's key, a password"
    );
    assert!(start.elapsed() > Duration::from_secs(9), "{:?}", start.elapsed());
}

#[tokio::test]
#[ignore = "needs root and sshd"]
async fn a_key_that_comes_late_is_waited_for_and_the_way_that_worked_is_told() {
    let server = Sshd::start();
    server.forbid();
    let mut target = server.target();
    target.auth.insert(0, Auth::Key(KeyPair::generate().unwrap()));
    target.host_key = HostKeyPolicy::Any;
    let late = async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        server.permit();
    };
    let (connection, ()) = tokio::join!(Connection::open(target, patience(), |_| {}), late);
    let connection = connection.unwrap();
    assert_eq!(connection.login().auth, 1);
    assert_eq!(connection.login().host_key, *server.keys.host.public());
    let again = connection.again().await.unwrap();
    assert_eq!(again.login().auth, 0);
}

#[tokio::test]
#[ignore = "needs root and sshd"]
async fn a_foreign_host_key_is_an_error() {
    let server = Sshd::start();
    let other = KeyPair::generate().unwrap();
    let mut target = server.target();
    target.host_key = HostKeyPolicy::Expect(other.public().clone());
    let start = Instant::now();
    let error = Connection::open(target.clone(), patience(), |_| {})
        .await
        .unwrap_err();
    assert!(matches!(error, ssh::Error::HostKey { .. }), "{error}");
    assert!(start.elapsed() < Duration::from_secs(2));

    target.host_key = HostKeyPolicy::Await(other.public().clone());
    let short = Patience {
        login: Duration::from_secs(2),
        ..patience()
    };
    // What was waited for until the time was over is the reason, not the time; also where the last attempt was cut off by it.
    for address in [target.address, speaks_once(target.address)] {
        target.address = address;
        let error = Connection::open(target.clone(), short, |_| {}).await.unwrap_err();
        assert!(matches!(error, ssh::Error::HostKey { .. }), "{error}");
    }
}

/// A way to a server by which the first who comes reaches it, and all others hear no more than a greeting.
fn speaks_once(server: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let mut here = listener.incoming().map(Result::unwrap);
        let (first, server) = (here.next().unwrap(), TcpStream::connect(server).unwrap());
        for (mut from, mut to) in [
            (first.try_clone().unwrap(), server.try_clone().unwrap()),
            (server, first),
        ] {
            thread::spawn(move || std::io::copy(&mut from, &mut to));
        }
        let mut silent = Vec::new();
        for mut stream in here {
            stream.write_all(b"SSH-2.0-busy\r\n").unwrap();
            silent.push(stream);
        }
    });
    address
}

#[tokio::test]
#[ignore = "needs root and sshd"]
async fn small_commands_give_their_output_and_code() {
    let server = Sshd::start();
    let connection = connect(&server).await;
    let output = connection
        .exec("echo out; echo err >&2; exit 3", Duration::from_secs(5))
        .await
        .unwrap();
    assert_eq!(
        (output.code, output.stdout.as_str(), output.stderr.as_str()),
        (Some(3), "out\n", "err\n")
    );
    let output = connection
        .sh("kill -KILL $$", Duration::from_secs(5))
        .await
        .unwrap();
    assert_eq!(output.code, None);
    let slow = connection
        .exec("sleep 10", Duration::from_millis(300))
        .await
        .unwrap_err();
    assert!(matches!(slow, ssh::Error::TooSlow(_)), "{slow}");
}

#[tokio::test]
#[ignore = "needs dash, tcsh and fish"]
async fn any_login_shell_passes_the_wrapper_on() {
    let nonce = "00112233445566778899aabbccddeeff";
    for login in ["bash", "dash", "tcsh", "fish"] {
        let mut child = std::process::Command::new(login)
            .arg("-c")
            .arg(wrapper(Shell::Sh, &RunId::new()))
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let token = RunId::new();
        let script = "echo \"it's $((1+1))!\"; exit 7";
        let input = preamble(nonce, token.as_str(), script.len()) + script;
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), input.as_bytes()).unwrap();
        let output = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        let expected = format!("\x1e{nonce} start\nit's 2!\n\x1e{nonce} exit 7\n");
        assert_eq!(output, expected, "{login}");
    }
}
