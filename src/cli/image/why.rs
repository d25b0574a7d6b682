use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use super::choose::choose;
use super::shown;
use crate::cli::{Answer, Context, print, print_json};
use crate::image::{Going, Held, Policy};
use crate::outcome::Failure;
use crate::reap::{Images, standing_policy};
use crate::report::{age, bytes, plain};
use crate::settings::Settings;

/// Say what keeps an image, or when it would go
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// An image by reference, digest, or the beginning of one
    image: String,
    /// How to print it
    #[arg(long, value_enum, default_value = "text")]
    format: Answer,
}

/// What there is to say; the JSON's keys are these names.
#[derive(Debug, Serialize)]
struct Reasons {
    digest: String,
    references: Vec<String>,
    size: u64,
    last_used: Timestamp,
    /// How; none of one that is not known to be.
    damaged: Option<String>,
    kept_by: Vec<String>,
    goes: Vec<String>,
}

pub(super) async fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let settings = context.settings()?;
    let images = Images::open(&settings)?;
    let all = images.store().inventory()?;
    let held = choose(&all, &arguments.image)?.held;
    let keepers = images.users().await?.keepers(held);
    let mut reasons = Reasons {
        digest: held.digest.to_string(),
        references: held.names.iter().map(|name| name.reference.clone()).collect(),
        size: held.size,
        last_used: held.used,
        damaged: images.store().damage(&held.digest)?,
        kept_by: keepers.iter().map(ToString::to_string).collect(),
        goes: Vec::new(),
    };
    if keepers.is_empty() {
        reasons.goes = fate(&images, &settings, held).await?;
    }
    if arguments.format == Answer::Json {
        return print_json(&reasons);
    }
    let idle = Duration::try_from(Timestamp::now().duration_since(held.used)).unwrap_or_default();
    print(&format!(
        "{} takes {} and was last used {} ago.\n",
        reasons.digest,
        bytes(reasons.size),
        age(idle)
    ));
    for name in &reasons.references {
        print(&format!("  named {}\n", shown(name)));
    }
    if let Some(how) = &reasons.damaged {
        print(&format!(
            "  damaged: {}; no job is given it; `cannery image verify {}` fetches it anew, as does the next pull\n",
            plain(how, 300),
            reasons.digest
        ));
    }
    for keeper in &reasons.kept_by {
        print(&format!("  kept by {keeper}\n"));
    }
    for sentence in &reasons.goes {
        print(&format!("  {sentence}\n"));
    }
    Ok(())
}

/// When an image goes that nothing keeps.
async fn fate(images: &Images, settings: &Settings, held: &Held) -> Result<Vec<String>, Failure> {
    let mut fate = vec!["nothing keeps it".to_owned()];
    let takes = |going: Vec<Going>| going.iter().any(|going| going.digest == held.digest);
    if takes(images.plan(&Policy::default()).await?) {
        fate.push("`cannery image prune` would take it now, since no name leads to it".to_owned());
    } else {
        fate.push("`cannery image prune --all` would take it now".to_owned());
    }
    match standing_policy(settings) {
        Some(policy) if takes(images.plan(&policy).await?) => {
            fate.push(
                "`cannery reap` would take it now, by images.prune_after or images.max_size".to_owned(),
            );
        }
        _ => {
            if let Some(after) = settings.images.prune_after {
                let at = held
                    .used
                    .saturating_add(jiff::SignedDuration::try_from(after).unwrap_or_default());
                if let Ok(at) = at {
                    fate.push(format!(
                        "by images.prune_after it goes on {}, if nobody uses it until then",
                        at.strftime("%Y-%m-%d %H:%M UTC")
                    ));
                }
            }
        }
    }
    fate.push("a pull that has no room takes what was used least recently".to_owned());
    Ok(fate)
}
