//! The command line: one file a command, whose doc comment is its help text.
//!
//! This is the only part that reads the process's environment, and with [`crate::report`] the only one that prints.

use std::ffi::OsString;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};

use patient::Patient;

use crate::job::Environment;
#[cfg(debug_assertions)]
use crate::kill;
use crate::outcome::{ExitCodes, Failure, Fault};
use crate::record;
use crate::report::{self, JobLog};
use crate::settings::{self, Settings};
use crate::threads;

mod bench;
mod cleanup;
mod config;
mod console;
mod image;
mod job;
mod login;
mod logout;
mod network;
mod patient;
mod prepare;
mod reap;
mod run;
mod serve;
mod vm;

/// Run every GitLab CI job in a virtual machine of its own.
///
/// gitlab-runner calls config, prepare, run and cleanup; the other commands are for people.
#[derive(Debug, Parser)]
#[command(
    name = "cannery",
    version,
    disable_help_subcommand = true,
    max_term_width = 100
)]
struct Cli {
    /// The settings file [default: $CANNERY_CONFIG, ~/.config/cannery/cannery.toml, /etc/cannery/cannery.toml]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(display_order = 10)]
    Config(config::Arguments),
    #[command(display_order = 11)]
    Prepare(prepare::Arguments),
    #[command(display_order = 12)]
    Run(run::Arguments),
    #[command(display_order = 13)]
    Cleanup(cleanup::Arguments),
    #[command(subcommand, display_order = 20)]
    Vm(vm::Command),
    #[command(subcommand, display_order = 20)]
    Job(job::Command),
    #[command(display_order = 20)]
    Console(console::Arguments),
    #[command(subcommand, display_order = 20)]
    Image(image::Command),
    #[command(display_order = 21)]
    Reap(reap::Arguments),
    #[command(display_order = 21)]
    Serve(serve::Arguments),
    #[command(subcommand, display_order = 22)]
    Network(network::Command),
    #[command(display_order = 24)]
    Login(login::Arguments),
    #[command(display_order = 24)]
    Logout(logout::Arguments),
    #[command(subcommand, display_order = 23)]
    Bench(bench::Command),
}

impl Command {
    /// Is it one of the four that gitlab-runner calls?
    fn is_stage(&self) -> bool {
        matches!(
            self,
            Command::Config(_) | Command::Prepare(_) | Command::Run(_) | Command::Cleanup(_)
        )
    }
}

/// How a list is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Columns, for people.
    Table,
    /// An array of objects, for programs.
    Json,
}

/// How what a command came to is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Answer {
    /// Lines, for people.
    Text,
    /// JSON, for programs.
    Json,
}

/// Things that a command comes to one after the other. As text each is printed at once; as JSON all of them at the end, also those that came
/// before one that did not.
struct Results<T> {
    answer: Answer,
    rows: Vec<T>,
}

impl<T: serde::Serialize> Results<T> {
    fn new(answer: Answer) -> Self {
        let rows = Vec::new();
        Self { answer, rows }
    }

    /// One more, with its line.
    fn add(&mut self, row: T, line: impl FnOnce(&T) -> String) {
        match self.answer {
            Answer::Text => print(&format!("{}\n", line(&row))),
            Answer::Json => self.rows.push(row),
        }
    }

    /// All that there were. What failed is handed on.
    fn end(self, result: Result<(), Failure>) -> Result<(), Failure> {
        if self.answer == Answer::Json {
            print_json(&self.rows)?;
        }
        result
    }
}

/// What every command is given.
struct Context {
    environment: Environment,
    sources: settings::Sources,
    log: JobLog,
}

impl Context {
    /// Reads the settings, makes the state folder that they name, and starts the operator's log if they name one.
    fn settings(&self) -> Result<Settings, Failure> {
        let settings = self.sources.load()?;
        record::open_state(&settings.state_dir)?;
        if let Some(log) = &settings.log {
            report::start_operator_log(log, &settings.state_dir).map_err(|e| {
                Failure::system(format!("cannot write the log file {}: {e}", log.file.display()))
                    .hint("Correct log_file and log_filter in the settings; a log that root began is for the state folder's group to write")
            })?;
        }
        Ok(settings)
    }
}

/// How long connections may take to be closed at the end: each is one message to a daemon or a guest.
const LAST_WORDS: std::time::Duration = std::time::Duration::from_secs(2);
/// Exit code of a command that people call, when it failed.
const FAILED: u8 = 1;
/// Exit code of a command that people call, when its arguments make no sense.
const USAGE: u8 = 2;

/// The variables by which a test has a debug build killed, or fail by an error of its own. What a job's author sets comes as
/// `CUSTOM_ENV_…`, and so never here.
#[cfg(debug_assertions)]
const ENDS: [(&str, kill::Manner); 2] = [
    ("CANNERY_KILL_AT", kill::Manner::Kill),
    ("CANNERY_PANIC_AT", kill::Manner::Panic),
];

/// Runs the command that the arguments name and returns the process's exit code.
pub fn main(
    arguments: impl IntoIterator<Item = OsString>,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> ExitCode {
    let environment: Environment = environment.into_iter().collect();
    let codes = exit_codes(&environment);
    #[cfg(debug_assertions)]
    for (variable, manner) in ENDS {
        if let Some(at) = environment.text(variable)
            && let Err(e) = kill::arm(at, manner)
        {
            JobLog::stderr().line(format!("{variable}: {e}."));
            return ExitCode::from(USAGE);
        }
    }
    let called_by_runner = environment.get("JOB_RESPONSE_FILE").is_some();
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(e) => {
            // Nothing can be done about a closed terminal.
            let _ = e.print();
            // A wrong `*_args` is the operator's to mend: it must not pass for a build failure.
            let wrong = if called_by_runner { codes.system } else { USAGE };
            return ExitCode::from(if e.use_stderr() { wrong } else { 0 });
        }
    };
    let is_stage = cli.command.is_stage();
    let variables = environment.clone();
    let sources = settings::sources(cli.config.clone(), |name| {
        variables.get(name).map(ToOwned::to_owned)
    });
    let context = Context {
        environment,
        sources,
        log: JobLog::stderr(),
    };
    // The message of a panic is for us, not for the job log; the sentence below says where to look.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(place, "panic: {panic}");
    }));
    let result = catch_unwind(AssertUnwindSafe(|| dispatch(cli.command, &context))).unwrap_or_else(|panic| {
        let what = panic
            .downcast_ref::<&str>()
            .map(|s| (*s).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_default();
        Err(Failure::system(format!(
            "cannery met an error of its own: {}",
            report::plain(&what, 200)
        ))
        .hint("Please report it with the command and what came before"))
    });
    if !threads::wait(LAST_WORDS) {
        tracing::warn!("a library's thread hangs and is left to its fate");
    }
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if matches!(failure.fault, Fault::Script(_)) {
                // gitlab-runner names the exit code itself.
                failure
                    .advice()
                    .for_each(|advice| context.log.line(format!("cannery: {advice}")));
            } else {
                context.log.line(format!(
                    "{}: {failure}",
                    if is_stage { "ERROR" } else { "cannery" }
                ));
            }
            tracing::warn!(fault = ?failure.fault, "{failure}");
            ExitCode::from(if is_stage {
                codes.code(failure.fault)
            } else {
                FAILED
            })
        }
    }
}

fn dispatch(command: Command, context: &Context) -> Result<(), Failure> {
    // The work is waiting: for a registry, for a guest. Blocking libraries have threads of their own.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::system(format!("cannot start: {e}")))?;
    let result = runtime.block_on(async {
        match command {
            Command::Config(arguments) => unless_terminated(config::run(context, &arguments)).await,
            Command::Prepare(arguments) => unless_terminated(prepare::run(context, &arguments)).await,
            // A script that is cancelled has to be ended in its guest.
            Command::Run(arguments) => run::run(context, &arguments, terminated()?).await,
            Command::Cleanup(arguments) => unless_terminated(cleanup::run(context, &arguments)).await,
            Command::Vm(command) => vm::run(context, &command).await,
            Command::Job(command) => job::run(context, &command),
            Command::Console(arguments) => console::run(context, &arguments).await,
            Command::Image(command) => image::run(context, command).await,
            Command::Reap(arguments) => reap::run(context, &arguments).await,
            Command::Serve(arguments) => serve::run(context, &arguments).await,
            Command::Network(command) => network::run(context, &command).await,
            Command::Login(arguments) => login::run(context, arguments).await,
            Command::Logout(arguments) => logout::run(context, &arguments).await,
            Command::Bench(command) => bench::run(context, &command).await,
        }
    });
    // A blocking call that hangs in a library must not keep the process.
    runtime.shutdown_background();
    result
}

/// Ends when gitlab-runner sends SIGTERM, from now on.
fn terminated() -> Result<impl Future<Output = ()>, Failure> {
    let mut signals = signal(SignalKind::terminate())
        .map_err(|e| Failure::system(format!("cannot listen for SIGTERM: {e}")))?;
    Ok(async move {
        signals.recv().await;
    })
}

/// A stage that gitlab-runner gives up ends with a code that it knows, not by the signal. What the stage has begun is
/// in the job's record, for cleanup.
async fn unless_terminated(stage: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let terminated = terminated()?;
    tokio::select! {
        result = stage => result,
        () = terminated => Err(Failure::system("gitlab-runner gave this up before it was done: the job was cancelled, or its time was over")),
    }
}

fn exit_codes(environment: &Environment) -> ExitCodes {
    let usual = ExitCodes::default();
    let code = |name, usual| {
        environment
            .text(name)
            .and_then(|v| v.parse().ok())
            .unwrap_or(usual)
    };
    ExitCodes {
        build: code("BUILD_FAILURE_EXIT_CODE", usual.build),
        system: code("SYSTEM_FAILURE_EXIT_CODE", usual.system),
    }
}

/// Prints a command's result.
fn print(text: &str) {
    use std::io::Write;
    // A closed pipe (`| head`) is no failure.
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Prints a value as JSON.
fn print_json<T: serde::Serialize>(value: &T) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Failure::system(format!("cannot write JSON: {e}")))?;
    print(&format!("{text}\n"));
    Ok(())
}

/// Ends when somebody wants what goes on from now to end: Ctrl-C and its like.
fn interruption() -> Result<impl Future<Output = ()>, Failure> {
    let listen = |kind| signal(kind).map_err(|e| Failure::system(format!("cannot listen for signals: {e}")));
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let mut hangup = listen(SignalKind::hangup())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_takes_any_stage_name_and_config_stands_anywhere() {
        for arguments in [
            ["cannery", "--config", "/x", "run", "/tmp/script", "step_anything"],
            [
                "cannery",
                "run",
                "--config",
                "/x",
                "/tmp/script",
                "some-new-stage",
            ],
        ] {
            let cli = Cli::try_parse_from(arguments).unwrap();
            assert_eq!(cli.config, Some("/x".into()));
            assert!(cli.command.is_stage());
        }
    }

    /// The commands of a page: between backticks, and in blocks of code.
    fn commands(page: &str) -> Vec<String> {
        let mut commands = Vec::new();
        let mut code = false;
        for line in page.lines() {
            if line.starts_with("```") {
                code = !code;
            } else if code {
                let line = line.trim_start().trim_start_matches("$ ");
                let line = line.split(" #").next().unwrap_or_default();
                commands.push(line.trim_end().to_owned());
            } else {
                commands.extend(line.split('`').skip(1).step_by(2).map(str::to_owned));
            }
        }
        commands.retain(|text| text.starts_with("cannery "));
        commands
    }

    #[test]
    fn every_command_in_the_docs_is_one() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut pages = vec![root.join("README.md")];
        pages.extend(
            std::fs::read_dir(root.join("docs"))
                .unwrap()
                .map(|e| e.unwrap().path()),
        );
        let mut seen = 0;
        for page in pages {
            for command in commands(&std::fs::read_to_string(&page).unwrap()) {
                seen += 1;
                match Cli::try_parse_from(command.split_whitespace()) {
                    Ok(_) => {}
                    // A command that is only named, in a sentence.
                    Err(e) if e.kind() == clap::error::ErrorKind::MissingRequiredArgument => {}
                    Err(e) => panic!("{}: `{command}`: {e}", page.display()),
                }
            }
        }
        assert!(seen > 20, "{seen}");
    }
}
