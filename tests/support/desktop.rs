//! A desktop that nobody sees, and whoever types there.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use super::until;

/// Longer than a program takes to show its window on a busy host.
const PATIENCE: Duration = Duration::from_secs(40);

/// An X server without a screen, which ends with this.
#[derive(Debug)]
pub struct Desktop {
    server: Child,
    display: String,
}

impl Desktop {
    pub fn start() -> Self {
        let mut server = Command::new("Xvfb")
            .args(["-displayfd", "1", "-screen", "0", "1280x1024x24"])
            .args(["-nolisten", "tcp", "-noreset"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // It says which number it has when it can be reached.
        let mut number = String::new();
        BufReader::new(server.stdout.take().unwrap())
            .read_line(&mut number)
            .unwrap();
        let display = format!(":{}", number.trim());
        Self { server, display }
    }

    /// Has a program put its windows here.
    pub fn shows<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command
            .env("DISPLAY", &self.display)
            // A session bus of its own would outlive it.
            .env("NO_AT_BRIDGE", "1")
            .env("GSETTINGS_BACKEND", "memory")
    }

    fn xdotool(&self, arguments: &[&str]) -> Output {
        let mut xdotool = Command::new("xdotool");
        self.shows(&mut xdotool).args(arguments).output().unwrap()
    }

    /// The windows of programs of this class that are to be seen.
    pub fn windows(&self, class: &str) -> Vec<String> {
        let found = self.xdotool(&["search", "--onlyvisible", "--class", class]);
        let numbers = String::from_utf8(found.stdout).unwrap();
        numbers.lines().map(str::to_owned).collect()
    }

    /// Waits for the first window of a program of this class.
    pub fn window(&self, class: &str) -> String {
        let mut windows = Vec::new();
        until(&format!("{class} has a window"), PATIENCE, || {
            windows = self.windows(class);
            !windows.is_empty()
        });
        windows.remove(0)
    }

    /// Types a line into a window, as whoever sits before it does.
    pub fn type_into(&self, window: &str, text: &str) {
        for arguments in [
            // Nobody else decides here who gets what is typed.
            &["windowfocus", "--sync", window][..],
            &["type", "--delay", "60", text],
            &["key", "Return"],
        ] {
            let done = self.xdotool(arguments);
            assert!(done.status.success(), "{done:?}");
        }
    }
}

impl Drop for Desktop {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}
