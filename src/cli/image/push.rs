use super::progress::Lines;
use super::source::{Kind, Pack, Wishes, draft, place};
use super::{interruptible, reference, shown};
use crate::cli::{Context, print};
use crate::image::{Addressee, Draft, Progress, Reference, Silent, WriteFormat, Written};
use crate::outcome::Failure;
use crate::settings::Settings;
use crate::stage::images;

/// Write a disk as an image into a registry or an OCI layout folder, and print its digest
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// A qcow2 or raw file (a path that begins with / or ./), or an image
    source: String,
    /// The name that it gets
    reference: String,
    /// The format to write
    #[arg(long, value_enum, default_value = "containerdisk")]
    format: Kind,
    /// How a containerDisk's layer is packed
    #[arg(long, value_enum, default_value = "gzip")]
    compression: Pack,
    #[command(flatten)]
    wishes: Wishes,
    /// Print nothing but the digest
    #[arg(long, short)]
    quiet: bool,
}

pub(super) async fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    // What cannot be is said before anything is fetched.
    let source = place(&arguments.source)?;
    let target = reference(&arguments.reference)?;
    let format = arguments.format.of_image(arguments.compression)?;
    let settings = context.settings()?;
    let store = images::store(&settings)?;
    interruptible("push", async {
        let draft = draft(
            context,
            &settings,
            &store,
            &source,
            &arguments.wishes,
            arguments.quiet,
        )
        .await?;
        let written = send(context, &settings, &draft, format, &target, arguments.quiet).await?;
        print(&format!("{}\n", written.digest));
        Ok(())
    })
    .await
}

/// Writes a draft under a name.
pub(super) async fn send(
    context: &Context,
    settings: &Settings,
    draft: &Draft,
    format: WriteFormat,
    target: &Reference,
    quiet: bool,
) -> Result<Written, Failure> {
    let name = shown(target);
    let lines = Lines::new(&name, &context.log);
    let progress: &dyn Progress = if quiet { &Silent } else { &lines };
    let credentials = images::credentials(settings)?;
    let registries = crate::stage::registries(&settings.images)?;
    let to = Addressee {
        reference: target,
        credentials: &credentials,
        registries: &registries,
    };
    Ok(crate::image::write(draft, format, to, progress).await?)
}
