//! The real gitlab-runner, as a process of its own.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::super::coordinator::{Coordinator, RUNNER_TOKEN};
use super::Driver;

/// How long a runner that was told to end may take: its jobs' clean-up included.
const END: Duration = Duration::from_secs(120);

#[derive(Debug)]
pub(super) struct Real {
    child: Child,
    folder: TempDir,
}

impl Real {
    pub(super) fn start(
        binary: &Path,
        coordinator: &Coordinator,
        driver: &Driver,
        concurrent: usize,
    ) -> Self {
        let folder = tempfile::tempdir().expect("a folder for the runner");
        let config = folder.path().join("config.toml");
        fs::write(&config, settings(coordinator.url(), driver, concurrent)).expect("the runner's settings");
        let log = File::create(folder.path().join("runner.log")).expect("the runner's log");
        let child = Command::new(binary)
            .arg("run")
            .arg("--config")
            .arg(&config)
            .arg("--working-directory")
            .arg(folder.path())
            .env("HOME", folder.path())
            .envs(driver.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the log's second handle"))
            .stderr(log)
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("{} cannot be started: {error}", binary.display()));
        Self { child, folder }
    }

    /// SIGQUIT: jobs end, then the runner does.
    pub(super) fn finish(mut self) {
        self.end(Signal::QUIT);
    }

    fn end(&mut self, signal: Signal) {
        if self.child.try_wait().is_ok_and(|status| status.is_some()) {
            return;
        }
        let pid = Pid::from_child(&self.child);
        // It may have ended in this moment.
        let _ = kill_process(pid, signal);
        let end = Instant::now() + END;
        while self.child.try_wait().is_ok_and(|status| status.is_none()) {
            if Instant::now() > end {
                let _ = self.child.kill();
                let _ = self.child.wait();
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        self.end(Signal::TERM);
        if thread::panicking() {
            let log = fs::read_to_string(self.folder.path().join("runner.log")).unwrap_or_default();
            show("the real runner's log", &log);
        }
    }
}

/// For whoever reads why a test failed.
fn show(title: &str, text: &str) {
    eprintln!("--- {title}\n{text}---");
}

fn settings(url: &str, driver: &Driver, concurrent: usize) -> String {
    let mut text = format!(
        "concurrent = {concurrent}\ncheck_interval = 1\nshutdown_timeout = 60\n\n[[runners]]\nname = \"test\"\nurl = {}\n\
         token = {}\nexecutor = \"custom\"\nlimit = {concurrent}\nrequest_concurrency = {concurrent}\noutput_limit = {}\nshell = {}\n",
        string(url),
        string(RUNNER_TOKEN),
        driver.output_limit,
        string(&driver.shell),
    );
    for (key, value) in [
        ("builds_dir", &driver.builds_dir),
        ("cache_dir", &driver.cache_dir),
    ] {
        if let Some(value) = value {
            writeln!(text, "{key} = {}", string(value)).expect("text grows");
        }
    }
    text.push_str("[runners.custom]\n");
    for stage in ["config", "prepare", "run", "cleanup"] {
        let program = driver.program.to_str().expect("the driver's path is text");
        let arguments: Vec<String> = driver.arguments.iter().map(|argument| string(argument)).collect();
        let comma = if arguments.is_empty() { "" } else { ", " };
        writeln!(
            text,
            "{stage}_exec = {}\n{stage}_args = [{}{comma}{}]",
            string(program),
            arguments.join(", "),
            string(stage)
        )
        .expect("text grows");
    }
    writeln!(
        text,
        "graceful_kill_timeout = {}\nforce_kill_timeout = {}",
        driver.graceful_kill.as_secs(),
        driver.force_kill.as_secs()
    )
    .expect("text grows");
    if let Some(cache) = &driver.cache {
        write!(
            text,
            "[runners.cache]\nType = \"s3\"\nShared = true\n[runners.cache.s3]\nServerAddress = {}\nAccessKey = \"key\"\n\
             SecretKey = \"secret\"\nBucketName = {}\nBucketLocation = \"us-east-1\"\nInsecure = true\n",
            string(&cache.server),
            string(&cache.bucket)
        )
        .expect("text grows");
    }
    text
}

/// A TOML string.
fn string(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}
