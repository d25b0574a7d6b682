use std::path::PathBuf;

use serde::Serialize;

use super::progress::Lines;
use super::source::{Manner, Wishes, Written, draft, or_file, place};
use super::{interruptible, reference, shown};
use crate::cli::{Context, print, print_json};
use crate::image::{Addressee, DiskFormat, Draft, Progress, Reference, Silent};
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
    #[command(flatten)]
    telling: Telling,
}

/// How it is said what was written: `--format` is the image's own here, as with podman and skopeo.
#[derive(Debug, clap::Args)]
pub(super) struct Telling {
    /// Print nothing but the digest
    #[arg(long, short)]
    pub(super) quiet: bool,
    /// Print what was written as JSON
    #[arg(long)]
    json: bool,
}

impl Telling {
    /// Prints what was written: as text, its digest, which a file has none of.
    pub(super) fn tell(&self, row: &Row) -> Result<(), Failure> {
        match row {
            _ if self.json => print_json(row)?,
            Row::Image { digest, .. } => print(&format!("{digest}\n")),
            Row::File { .. } => {}
        }
        Ok(())
    }
}

/// What was written; the JSON's keys are these names.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(super) enum Row {
    Image {
        reference: String,
        digest: String,
        /// As `--format` names it.
        format: String,
        /// Packed, in bytes.
        size: u64,
    },
    File {
        path: PathBuf,
        format: DiskFormat,
        /// In bytes, with holes.
        size: u64,
        /// What the image has that no file can hold.
        left_out: Vec<&'static str>,
    },
}

pub(super) async fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    // What cannot be is said before anything is fetched.
    let source = place(&arguments.source)?;
    let target = reference(&arguments.reference)?;
    let manner = arguments.manner.check()?;
    let settings = context.settings()?;
    let store = images::store(&settings)?;
    let quiet = arguments.telling.quiet;
    interruptible("push", async {
        let draft = draft(context, &settings, &store, &source, &arguments.wishes, quiet)
            .await
            .map_err(|failure| or_file(&arguments.source, failure))?;
        let row = send(context, &settings, &draft, &manner, &target, quiet).await?;
        arguments.telling.tell(&row)
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
) -> Result<Row, Failure> {
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
    Ok(Row::Image {
        reference: target.to_string(),
        digest: written.digest.to_string(),
        format: manner.name(),
        size: written.size,
    })
}
