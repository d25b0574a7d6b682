use std::path::PathBuf;

use serde::Serialize;

use super::progress::Lines;
use super::{interruptible, reference, shown};
use crate::cli::{Answer, Context, print, print_json};
use crate::image::{Asker, Progress, PullPolicy, Reference, Silent};
use crate::outcome::Failure;
use crate::stage::images;
use crate::stage::kept::{self, Import};

/// Define a libvirt machine with a copy of an image's disk, and print its name
///
/// The machine is yours to keep, and is not started. Its description is cannery's own, whatever the image holds.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// An image as `image:` names it
    reference: String,
    /// The machine's name [default: made of the image's]
    #[arg(long, short)]
    name: Option<String>,
    /// The folder for its disk [default: libvirt's own]
    #[arg(long, short, value_name = "FOLDER")]
    dir: Option<PathBuf>,
    /// The libvirt network that it is on
    #[arg(long, default_value = "default")]
    network: String,
    /// Print nothing but the name
    #[arg(long, short)]
    quiet: bool,
    /// How to print what was made; as text, the name
    #[arg(long, value_enum, default_value = "text")]
    format: Answer,
}

/// A machine that was made; the JSON's keys are these names.
#[derive(Debug, Serialize)]
struct Row<'a> {
    name: &'a str,
    disk: PathBuf,
    image: &'a str,
    digest: String,
}

pub(super) async fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let reference = reference(&arguments.reference)?;
    let name = arguments.name.clone().unwrap_or_else(|| usual_name(&reference));
    let settings = context.settings()?;
    let store = images::store(&settings)?;
    interruptible("import", async {
        let image = shown(&reference);
        let lines = Lines::new(&image, &context.log);
        let progress: &dyn Progress = if arguments.quiet { &Silent } else { &lines };
        let credentials = images::credentials(&settings)?;
        let policies = vec![PullPolicy::Always];
        let request = images::request(&settings, reference, policies, credentials, Asker::Operator)?;
        let disk = store.provide(&request, progress).await?;
        let import = Import {
            disk: &disk,
            name: &name,
            dir: arguments.dir.as_deref(),
            network: &arguments.network,
        };
        let file = kept::import(&settings, &import, progress).await?;
        if arguments.format == Answer::Json {
            return print_json(&Row {
                name: &name,
                disk: file,
                image: &disk.reference,
                digest: disk.digest.to_string(),
            });
        }
        print(&format!("{name}\n"));
        if !arguments.quiet {
            context.log.line(format!("Its disk is {}.", file.display()));
        }
        Ok(())
    })
    .await
}

/// The last part of the image's name and its tag: `debian-12`.
fn usual_name(reference: &Reference) -> String {
    let text = reference.to_string();
    let text = text.split('@').next().unwrap_or_default();
    text.rsplit('/').next().unwrap_or_default().replace(':', "-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_called_like_its_image() {
        for (reference, name) in [
            ("registry.example.com:5000/group/debian:12", "debian-12"),
            ("debian", "debian-latest"),
            ("oci:/srv/images:web", "images-web"),
        ] {
            assert_eq!(usual_name(&reference.parse().unwrap()), name);
        }
    }
}
