use super::progress::Lines;
use super::source::{Manner, Wishes, Written, draft, or_file, place};
use super::{interruptible, reference, shown};
use crate::cli::{Context, print};
use crate::image::{Addressee, Digest, Draft, Progress, Reference, Silent};
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
    #[command(flatten)]
    manner: Manner,
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
    let manner = arguments.manner.check()?;
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
        .await
        .map_err(|failure| or_file(&arguments.source, failure))?;
        let digest = send(context, &settings, &draft, &manner, &target, arguments.quiet).await?;
        print(&format!("{digest}\n"));
        Ok(())
    })
    .await
}

/// Writes a draft under a name.
pub(super) async fn send(
    context: &Context,
    settings: &Settings,
    draft: &Draft,
    manner: &Written,
    target: &Reference,
    quiet: bool,
) -> Result<Digest, Failure> {
    let name = shown(target);
    let lines = Lines::new(&name, &context.log);
    let progress: &dyn Progress = if quiet { &Silent } else { &lines };
    let credentials = images::credentials(settings)?;
    let registries = images::registries(settings)?;
    let to = Addressee {
        reference: target,
        credentials: &credentials,
        registries: &registries,
    };
    let format = manner.format(&settings.state_dir);
    let written = crate::image::write(draft, format, to, progress).await?;
    Ok(written.digest)
}
