use std::path::{Path, PathBuf};

use tokio::signal::unix::{SignalKind, signal};

use super::{Context, Format, print, print_json};
use crate::bench::{Executor, Figure, Row, stages};
use crate::outcome::Failure;
use crate::report;

/// Measure how fast cannery is on this host
///
/// Times are medians, measured in turns with what they are held against. Exits with 1 where a goal is missed.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    Stages(Stages),
}

/// config, prepare, run and cleanup, against the same guest and login without cannery, and against another executor
///
/// Takes jobs of its own through all stages, with the settings as they are, and removes them again.
#[derive(Debug, clap::Args)]
pub(super) struct Stages {
    /// The image, which the settings must allow jobs to use [default: the settings' images.default]
    #[arg(long, value_name = "REF")]
    image: Option<String>,
    /// How many rounds count; one more comes before them
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..))]
    runs: u16,
    /// Another custom executor to be measured in turns with this one, called as PROGRAM config, prepare, run and cleanup
    #[arg(long, value_name = "NAME=PROGRAM", value_parser = peer)]
    peer: Option<(String, PathBuf)>,
    /// What the image is called by that executor [default: the same]
    #[arg(long, value_name = "REF", requires = "peer")]
    peer_image: Option<String>,
    /// How to print the figures
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
}

/// The executor that is named where none is installed.
const USUAL_PEER: &str = "sardinecake";
/// Whoever runs, whatever was installed over it meanwhile.
const THIS_PROGRAM: &str = "/proc/self/exe";
/// Jobs of benches are numbered from here: no GitLab has come so far.
const FIRST_NUMBER: u64 = 9_000_000_000;

fn peer(text: &str) -> Result<(String, PathBuf), String> {
    let plain = |name: &str| {
        !name.is_empty() && name != "cannery" && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    match text.split_once('=') {
        Some((name, program)) if plain(name) && Path::new(program).is_absolute() => {
            Ok((name.to_owned(), program.into()))
        }
        _ => Err("write a name of letters, digits and hyphens, and the program's full path: sardinecake=/usr/local/bin/gitlab-sardinecake-executor".to_owned()),
    }
}

pub(super) async fn run(context: &Context, command: &Command) -> Result<(), Failure> {
    let Command::Stages(arguments) = command;
    let figures = stages(context, arguments).await?;
    answer(&figures, arguments.format)
}

async fn stages(context: &Context, arguments: &Stages) -> Result<Vec<Figure>, Failure> {
    let settings = context.settings()?;
    if cfg!(debug_assertions) {
        context
            .log
            .line("This is a debug build, which is slower: judge a release build by these goals.");
    }
    let mut ours = Executor {
        name: "cannery".to_owned(),
        program: THIS_PROGRAM.into(),
        arguments: Vec::new(),
        image: arguments.image.clone(),
    };
    if let Some(file) = context.sources.file() {
        // The stages are called in another folder.
        let file = std::path::absolute(&file)
            .map_err(|e| Failure::system(format!("cannot find {}: {e}", file.display())))?;
        ours.arguments = vec!["--config".into(), file.into()];
    }
    let image = arguments.peer_image.clone();
    let peer = match &arguments.peer {
        Some((name, program)) => (
            name.clone(),
            Some(Executor {
                name: name.clone(),
                program: program.clone(),
                arguments: Vec::new(),
                image: image
                    .or(arguments.image.clone())
                    .or(settings.images.default.clone()),
            }),
        ),
        None => (USUAL_PEER.to_owned(), None),
    };
    let process = std::process::id();
    let temporary = context.environment.get("TMPDIR").filter(|d| !d.is_empty());
    let plan = stages::Plan {
        settings: &settings,
        ours,
        peer,
        runs: arguments.runs.into(),
        number: FIRST_NUMBER + u64::from(process),
        scratch: Path::new(temporary.unwrap_or("/tmp".as_ref())).join(format!("cannery-bench-{process}")),
    };
    stages::measure(&plan, &context.log, interruption()?).await
}

/// Ends when someone wants the bench to end.
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

/// Prints what came out. A goal that is missed is a failure.
fn answer(figures: &[Figure], format: Format) -> Result<(), Failure> {
    let rows: Vec<Row> = figures.iter().filter_map(Figure::row).collect();
    match format {
        Format::Json => print_json(&rows)?,
        Format::Table => {
            let cells: Vec<_> = rows.iter().map(Row::cells).collect();
            print(&report::table(&Row::HEADING, &cells));
        }
    }
    let missed: Vec<&str> = rows
        .iter()
        .filter(|row| !row.ok)
        .map(|row| row.figure.as_str())
        .collect();
    if missed.is_empty() {
        return Ok(());
    }
    Err(Failure::system(format!("missed: {}", missed.join("; "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_has_a_name_and_a_full_path() {
        assert_eq!(peer("other=/bin/x=y"), Ok(("other".into(), "/bin/x=y".into())));
        for wrong in ["/bin/x", "=/bin/x", "a/b=/bin/x", "other=x", "cannery=/bin/x"] {
            assert!(peer(wrong).is_err(), "{wrong}");
        }
    }
}
