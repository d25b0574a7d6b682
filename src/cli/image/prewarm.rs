use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::progress::Lines;
use super::{Format, pipeline, reference, shown, step_back};
use crate::cli::{Context, print, print_json};
use crate::image::{Asker, PullPolicy};
use crate::outcome::Failure;
use crate::record::{self, Jobs, State};
use crate::report::plain;
use crate::settings::Settings;
use crate::stage::images;

/// How often it is looked whether a job is fetching.
const TURN_POLL: Duration = Duration::from_secs(1);
/// Longest wait for jobs that fetch, before each image. Where there is always one, prewarming must get on all the same.
const TURN_MAX: Duration = Duration::from_secs(600);

/// Fetch images before a job asks for them, with the least priority and one at a time
///
/// Without arguments these are the images of `images.prewarm` in the settings. All are tried; the exit code is 1 if one failed.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// Images as `image:` names them
    #[arg(value_name = "REF")]
    references: Vec<String>,
    /// A file of references, one a line; lines that begin with # are remarks
    #[arg(long, value_name = "LIST")]
    file: Vec<PathBuf>,
    /// Files whose `image:` keys name the images
    #[arg(long, value_name = "FILE", num_args = 1..)]
    gitlab_ci: Vec<PathBuf>,
    /// How to print what was fetched
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
}

/// An image that was wanted, and what came of it; the JSON's keys are these names.
#[derive(Debug, Serialize)]
struct Row {
    reference: String,
    digest: Option<String>,
    fetched_bytes: u64,
    error: Option<String>,
}

pub(super) async fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let settings = context.settings()?;
    step_back();
    let wanted = wanted(context, arguments, &settings)?;
    if wanted.is_empty() && arguments.format == Format::Text {
        context.log.line(
            "Nothing to fetch: images.prewarm in the settings names no images, and no others were asked for.",
        );
    }
    // One of these at a time; what a second would fetch, the first may have brought by then.
    let lock = record::open_lock(&settings.state_dir.join("prewarm.lock"))
        .map_err(|e| Failure::system(format!("cannot lock prewarm.lock in the state folder: {e}")))?;
    let mut told = false;
    while lock.try_lock().is_err() {
        if !std::mem::replace(&mut told, true) {
            context.log.line("Another prewarm is at work; waiting for it.");
        }
        tokio::time::sleep(TURN_POLL).await;
    }
    let store = images::store(&settings)?;
    let credentials = images::credentials(&settings)?;
    let mut rows = Vec::new();
    for name in &wanted {
        wait_for_jobs(&settings).await?;
        let fetch = async {
            let reference = reference(name)?;
            let request = images::request(
                &settings,
                reference,
                vec![PullPolicy::Always],
                credentials.clone(),
                Asker::Operator,
            )?;
            let shown = shown(name);
            Ok::<_, Failure>(store.provide(&request, &Lines::new(&shown, &context.log)).await?)
        };
        let (mut digest, mut fetched_bytes, mut error) = (None, 0, None);
        match fetch.await {
            Ok(disk) => {
                if arguments.format == Format::Text {
                    print(&format!("{} {}\n", disk.digest, shown(name)));
                }
                (digest, fetched_bytes) = (Some(disk.digest.to_string()), disk.fetched_bytes);
            }
            Err(failure) => {
                context.log.line(format!("cannery: {}: {failure}", shown(name)));
                error = Some(failure.to_string());
            }
        }
        rows.push(Row {
            reference: name.clone(),
            digest,
            fetched_bytes,
            error,
        });
    }
    if arguments.format == Format::Json {
        print_json(&rows)?;
    }
    let failed = rows.iter().filter(|row| row.error.is_some()).count();
    if failed > 0 {
        return Err(Failure::system(format!(
            "{failed} of {} images could not be fetched",
            wanted.len()
        )));
    }
    Ok(())
}

/// All references that are asked for, each once, by their names.
fn wanted(
    context: &Context,
    arguments: &Arguments,
    settings: &Settings,
) -> Result<BTreeSet<String>, Failure> {
    let mut wanted: BTreeSet<String> = arguments.references.iter().cloned().collect();
    for file in &arguments.file {
        wanted.extend(listed(&read(file)?));
    }
    for file in &arguments.gitlab_ci {
        let found = pipeline::images(&read(file)?)
            .map_err(|e| Failure::system(format!("{} cannot be used: {e}", file.display())))?;
        for unknown in found.unknown {
            context.log.line(format!(
                "cannery: {}: passed over: {}",
                file.display(),
                plain(&unknown, 200)
            ));
        }
        wanted.extend(found.names);
    }
    if arguments.references.is_empty() && arguments.file.is_empty() && arguments.gitlab_ci.is_empty() {
        wanted.extend(settings.images.prewarm.iter().cloned());
    }
    Ok(wanted)
}

fn read(file: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(file).map_err(|e| Failure::system(format!("cannot read {}: {e}", file.display())))
}

/// The references of a list.
fn listed(text: &str) -> impl Iterator<Item = String> + '_ {
    let lines = text.lines().map(str::trim);
    lines
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
}

/// Waits while a job is fetching its image: it needs the network and the disk more.
async fn wait_for_jobs(settings: &Settings) -> Result<(), Failure> {
    let begin = Instant::now();
    while begin.elapsed() < TURN_MAX {
        let jobs = Jobs::look(&settings.state_dir).list()?;
        let fetching = |job: &record::JobDir| matches!(job.read(), Ok(Some(record)) if record.state == State::Fetching && record.digest.is_none() && record.caller.is_alive());
        if !jobs.iter().any(fetching) {
            break;
        }
        tokio::time::sleep(TURN_POLL).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_has_remarks_and_blank_lines() {
        let text = "# ours\n\nr.example.com/vm:1\n  r.example.com/vm:2  \n#r.example.com/vm:3\n";
        assert_eq!(
            listed(text).collect::<Vec<_>>(),
            ["r.example.com/vm:1", "r.example.com/vm:2"]
        );
    }
}
