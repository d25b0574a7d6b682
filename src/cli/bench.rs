use std::path::{Path, PathBuf};

use super::{Context, Format, interruption, print, print_json};
use crate::bench::{Executor, Figure, Row, console, images, stages};
use crate::outcome::Failure;
use crate::quantity::Size;
use crate::report;

/// Measure how fast cannery is on this host
///
/// Times are medians, measured in turns with what they are held against. Exits with 1 where a goal is missed.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    Stages(Stages),
    Images(Images),
    Console(Console),
    #[command(hide = true)]
    ConsoleProxy(ConsoleProxy),
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

/// Pull, push and cache of images, against skopeo, sardinecake and what this machine can do at all
///
/// Makes a disk of real files, a registry on loopback (docker-registry) and a store of its own in a folder that is removed
/// afterwards; some ten times the disk's data must be free there. The settings and images of this host are left alone.
#[derive(Debug, clap::Args)]
pub(super) struct Images {
    /// How much data the disk has
    #[arg(long, value_name = "SIZE", default_value = "2G")]
    size: Size,
    /// The folder whose files it is made of
    #[arg(long, value_name = "DIR", default_value = "/usr")]
    data: PathBuf,
    /// How many rounds count; one more comes before them
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    runs: u16,
    /// sardinecake's `sarde`; needs root, libvirt and port 80 of loopback
    #[arg(long, value_name = "PROGRAM")]
    sarde: Option<PathBuf>,
    /// Two versions of a disk, and how much of the first, in percent, the second may add to a registry
    #[arg(long = "pair", value_name = "NAME=OLD,NEW,PERCENT", value_parser = pair)]
    pairs: Vec<images::Pair>,
    /// Where the folder is made [default: $TMPDIR, /tmp]
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// How to print the figures
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
}

/// The console's SPICE proxy, against socat and against no proxy at all
///
/// Takes no settings and touches no machine: viewers, a machine's screen and attackers are the bench's own, on loopback. Takes a
/// minute or so; socat should be installed.
#[derive(Debug, clap::Args)]
pub(super) struct Console {
    /// How many rounds count; one more comes before them
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    runs: u16,
    /// How much is sent at a time
    #[arg(long, value_name = "SIZE", default_value = "128M")]
    size: Size,
    /// How many sessions come at once; twice as many are idle at once
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=200))]
    sessions: u16,
    /// How many connections that say nothing are made
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u16).range(1..=20_000))]
    connections: u16,
    /// Another SPICE proxy to be measured in turns with this one, called as PROGRAM LISTEN MACHINE SCREEN CERTIFICATE KEY
    #[arg(long, value_name = "NAME=PROGRAM", value_parser = peer)]
    peer: Option<(String, PathBuf)>,
    /// How to print the figures
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
}

/// The proxy that `bench console` measures, in a process of its own
#[derive(Debug, clap::Args)]
pub(super) struct ConsoleProxy {
    /// Keys that are made ahead
    #[arg(long)]
    keys: usize,
    /// The bench's folder
    folder: PathBuf,
}

fn pair(text: &str) -> Result<images::Pair, String> {
    let parse = || {
        let (name, rest) = text.split_once('=')?;
        let [old, new, percent] = rest.split(',').collect::<Vec<_>>().try_into().ok()?;
        let percent: f64 = percent
            .parse()
            .ok()
            .filter(|percent| (0.0..=100.0).contains(percent))?;
        (!name.is_empty()).then(|| images::Pair {
            name: name.to_owned(),
            old: old.into(),
            new: new.into(),
            goal: percent / 100.0,
        })
    };
    parse().ok_or_else(|| "write a name, two files and a number: upgrade=old.raw,new.raw,8".to_owned())
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
    let (figures, format) = match command {
        Command::Stages(arguments) => (stages(context, arguments).await?, arguments.format),
        Command::Images(arguments) => (images(context, arguments).await?, arguments.format),
        Command::Console(arguments) => (console(context, arguments).await?, arguments.format),
        Command::ConsoleProxy(arguments) => return console::serve(&arguments.folder, arguments.keys).await,
    };
    answer(&figures, format)
}

async fn images(context: &Context, arguments: &Images) -> Result<Vec<Figure>, Failure> {
    warn_of_debug_build(context);
    let absolute = |path: &Path| {
        std::path::absolute(path).map_err(|e| Failure::system(format!("cannot find {}: {e}", path.display())))
    };
    let mut pairs = arguments.pairs.clone();
    for pair in &mut pairs {
        (pair.old, pair.new) = (absolute(&pair.old)?, absolute(&pair.new)?);
    }
    let plan = images::Plan {
        cannery: THIS_PROGRAM.into(),
        sarde: arguments.sarde.as_deref().map(absolute).transpose()?,
        runs: arguments.runs.into(),
        size: arguments.size.bytes(),
        data: absolute(&arguments.data)?,
        pairs,
        scratch: scratch(context, arguments.scratch.as_deref()),
    };
    images::measure(&plan, &context.log, interruption()?).await
}

async fn console(context: &Context, arguments: &Console) -> Result<Vec<Figure>, Failure> {
    warn_of_debug_build(context);
    let plan = console::Plan {
        cannery: THIS_PROGRAM.into(),
        runs: arguments.runs.into(),
        size: arguments.size.bytes(),
        sessions: arguments.sessions.into(),
        connections: arguments.connections.into(),
        peer: arguments.peer.clone(),
        scratch: scratch(context, None),
    };
    console::measure(&plan, &context.log, interruption()?).await
}

/// A folder for one bench.
fn scratch(context: &Context, within: Option<&Path>) -> PathBuf {
    let temporary = context.environment.get("TMPDIR").filter(|d| !d.is_empty());
    within
        .unwrap_or(Path::new(temporary.unwrap_or("/tmp".as_ref())))
        .join(format!("cannery-bench-{}", std::process::id()))
}

fn warn_of_debug_build(context: &Context) {
    if cfg!(debug_assertions) {
        context
            .log
            .line("This is a debug build, which is slower: judge a release build by these goals.");
    }
}

async fn stages(context: &Context, arguments: &Stages) -> Result<Vec<Figure>, Failure> {
    let settings = context.settings()?;
    warn_of_debug_build(context);
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
    let plan = stages::Plan {
        settings: &settings,
        ours,
        peer,
        runs: arguments.runs.into(),
        number: FIRST_NUMBER + u64::from(std::process::id()),
        scratch: scratch(context, None),
    };
    stages::measure(&plan, &context.log, interruption()?).await
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
    fn a_pair_is_two_files_and_a_goal() {
        let upgrade = pair("in-place upgrade=/a,/b,8").unwrap();
        assert_eq!((upgrade.name.as_str(), upgrade.goal), ("in-place upgrade", 0.08));
        assert_eq!(
            (upgrade.old, upgrade.new),
            (PathBuf::from("/a"), PathBuf::from("/b"))
        );
        for wrong in [
            "",
            "=/a,/b,8",
            "x=/a,/b",
            "x=/a,/b,8,9",
            "x=/a,/b,many",
            "x=/a,/b,101",
            "x=/a,/b,NaN",
        ] {
            assert!(pair(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_peer_has_a_name_and_a_full_path() {
        assert_eq!(peer("other=/bin/x=y"), Ok(("other".into(), "/bin/x=y".into())));
        for wrong in ["/bin/x", "=/bin/x", "a/b=/bin/x", "other=x", "cannery=/bin/x"] {
            assert!(peer(wrong).is_err(), "{wrong}");
        }
    }
}
