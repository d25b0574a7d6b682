use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::progress::Lines;
use super::{pipeline, reference, shown, step_back};
use crate::cli::{Answer, Context, print, print_json};
use crate::image::{Asker, PullPolicy};
use crate::outcome::Failure;
use crate::record::{self, Jobs, State};
use crate::report::plain;
use crate::settings::Settings;
use crate::stage::images;

/// How often it is looked whether a job is fetching.
const TURN_POLL: Duration = Duration::from_secs(1);
/// Looks in a row that must find one before a pull steps aside: a job whose image is in the cache is through in between.
const LOOKS: u32 = 2;
/// Longest time for which each image waits for jobs that fetch. Where there is always one, prewarming must get on all the same.
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
    format: Answer,
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
    if wanted.is_empty() && arguments.format == Answer::Text {
        let asked = arguments.file.iter().chain(&arguments.gitlab_ci);
        let asked: Vec<_> = asked.map(|file| file.display().to_string()).collect();
        context.log.line(if asked.is_empty() {
            "Nothing to fetch: images.prewarm in the settings names no images, and no others were asked for."
                .to_owned()
        } else {
            format!("Nothing to fetch: no image is named in {}.", asked.join(", "))
        });
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
        let fetch = async || {
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
        let jobs_fetch = || any_job_fetches(&settings);
        let stepped_aside = || {
            context.log.line(format!(
                "{}: a job fetches its image; this one goes on afterwards.",
                shown(name)
            ));
        };
        match politely(stepped_aside, jobs_fetch, fetch).await {
            Ok(disk) => {
                if arguments.format == Answer::Text {
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
    if arguments.format == Answer::Json {
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

/// Fetches while no job does: jobs need the network and the disk more. A pull that has begun steps aside for one, and goes on with
/// what it has brought; where that job wants the same image, it goes on with it itself.
async fn politely<T>(
    stepped_aside: impl Fn(),
    jobs_fetch: impl Fn() -> Result<bool, Failure>,
    fetch: impl AsyncFn() -> Result<T, Failure>,
) -> Result<T, Failure> {
    let mut waited = Duration::ZERO;
    loop {
        while waited < TURN_MAX && jobs_fetch()? {
            tokio::time::sleep(TURN_POLL).await;
            waited += TURN_POLL;
        }
        if waited >= TURN_MAX {
            return fetch().await;
        }
        let disturbed = async {
            let mut seen = 0;
            while seen < LOOKS {
                tokio::time::sleep(TURN_POLL).await;
                seen = if jobs_fetch()? { seen + 1 } else { 0 };
            }
            Ok::<_, Failure>(())
        };
        tokio::select! {
            fetched = fetch() => return fetched,
            seen = disturbed => seen?,
        }
        stepped_aside();
    }
}

/// Is a job fetching its image now, or about to find that it has it?
fn any_job_fetches(settings: &Settings) -> Result<bool, Failure> {
    let fetches = |record: &record::Record| {
        record.state == State::Fetching && record.digest.is_none() && record.caller.is_alive()
    };
    let jobs = Jobs::look(&settings.state_dir).list()?;
    Ok(jobs
        .iter()
        .any(|job| matches!(job.read(), Ok(Some(record)) if fetches(&record))))
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

    /// A pull that needs ten seconds in one go, and jobs that fetch as the clock says.
    async fn prewarm(jobs_fetch: impl Fn(u64) -> bool) -> (u64, usize) {
        let begin = tokio::time::Instant::now();
        let tries = std::cell::Cell::new(0);
        let now = || begin.elapsed().as_secs();
        let fetch = async || {
            tries.set(tries.get() + 1);
            tokio::time::sleep(Duration::from_secs(10)).await;
            Ok(now())
        };
        let ended = politely(|| {}, || Ok(jobs_fetch(now())), fetch).await.unwrap();
        (ended, tries.get())
    }

    #[tokio::test(start_paused = true)]
    async fn a_pull_steps_aside_for_jobs_and_comes_to_an_end_all_the_same() {
        assert_eq!(prewarm(|_| false).await, (10, 1));
        // It waits for who is there, and for who comes.
        assert_eq!(prewarm(|now| now < 30).await, (40, 1));
        assert_eq!(prewarm(|now| (5..30).contains(&now)).await, (40, 2));
        // A job whose image is in the cache disturbs nobody.
        assert_eq!(prewarm(|now| now == 5).await, (10, 1));
        // Where there is always one.
        assert_eq!(prewarm(|_| true).await, (TURN_MAX.as_secs() + 10, 1));
    }
}
