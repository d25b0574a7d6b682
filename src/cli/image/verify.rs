use serde::Serialize;

use super::choose::choose;
use super::progress::Lines;
use super::{shown, step_back};
use crate::cli::{Context, Format, print, print_json};
use crate::image::{Asker, Held, PullPolicy, Verdict};
use crate::outcome::Failure;
use crate::reap::Images;
use crate::report::plain;
use crate::settings::Settings;
use crate::stage::images as requests;

/// Read images again and compare them with what came; fetch anew what is damaged and not in use
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// Images by reference, digest, or the beginning of one [default: all]
    #[arg(value_name = "IMAGE")]
    images: Vec<String>,
    /// Only say what is damaged; no job is given it any more
    #[arg(long)]
    no_mend: bool,
    /// How to print the result
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
}

/// How an image was found, and what became of it; the JSON's keys are these names.
#[derive(Debug, Serialize)]
struct Row {
    digest: String,
    state: &'static str,
    reason: Option<String>,
}

pub(super) async fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let settings = context.settings()?;
    let images = Images::open(&settings)?;
    let all = images.store().inventory()?;
    let chosen: Vec<&Held> = if arguments.images.is_empty() {
        all.iter().collect()
    } else {
        let chosen = arguments.images.iter().map(|word| choose(&all, word));
        chosen
            .map(|chosen| chosen.map(|c| c.held))
            .collect::<Result<_, _>>()?
    };
    step_back();
    let mut rows = Vec::new();
    for held in chosen {
        let (store, digest) = (images.store().clone(), held.digest);
        let verdict = tokio::task::spawn_blocking(move || store.verify(&digest))
            .await
            .map_err(|e| Failure::system(format!("the image {digest} was not read: {e}")))??;
        let (state, reason) = match verdict {
            // Removed meanwhile: nothing to say.
            None => continue,
            Some(Verdict::Whole) => ("whole", None),
            Some(Verdict::Unknown) => ("unknown", Some("it came before sums were recorded".to_owned())),
            Some(Verdict::Damaged { reason }) if arguments.no_mend => ("damaged", Some(reason)),
            Some(Verdict::Damaged { reason }) => match mend(context, &settings, &images, held).await {
                Ok(()) => ("mended", Some(reason)),
                Err(failure) => ("damaged", Some(format!("{reason}; not mended: {failure}"))),
            },
        };
        let row = Row {
            digest: digest.to_string(),
            state,
            reason,
        };
        if arguments.format == Format::Table {
            let reason = row
                .reason
                .as_ref()
                .map_or_else(String::new, |reason| format!(" ({})", plain(reason, 600)));
            print(&format!("{} {}{reason}\n", row.digest, row.state));
        }
        rows.push(row);
    }
    if arguments.format == Format::Json {
        print_json(&rows)?;
    }
    let bad = rows.iter().filter(|row| row.state == "damaged").count();
    if bad > 0 {
        return Err(
            Failure::system(format!("damaged: {bad} of {} images", rows.len())).hint(
                "No job is given them; the next pull fetches them anew, and `cannery image rm` removes them",
            ),
        );
    }
    Ok(())
}

/// Fetches a damaged image from where it came, in place of the damaged one, unless something uses that.
async fn mend(context: &Context, settings: &Settings, images: &Images, held: &Held) -> Result<(), Failure> {
    let store = images.store();
    let users = images.users().await?;
    let busy = crate::reap::in_use(&users.keepers(held));
    if !busy.is_empty() {
        return Err(Failure::system(format!("it is used by {}", busy.join(", "))));
    }
    let named = held.names.first().and_then(|name| name.reference.parse().ok());
    let reference = store
        .source_of(&held.digest)?
        .or(named)
        .ok_or_else(|| Failure::system("nobody knows where it came from"))?;
    let request = requests::request(
        settings,
        reference.clone(),
        vec![PullPolicy::Always],
        requests::credentials(settings)?,
        Asker::Operator,
    )?;
    let name = shown(&reference);
    let known = store.reference(&reference, &request.architecture)?.is_some();
    let disk = store.provide(&request, &Lines::new(&name, &context.log)).await?;
    if !known {
        // It was only needed to fetch it.
        store.forget(&reference, &request.architecture)?;
    }
    if disk.digest != held.digest {
        return Err(Failure::system(format!(
            "{name} is another image by now ({})",
            disk.digest
        )));
    }
    Ok(())
}
