use super::source::{Manner, Wishes};
use super::{interruptible, push, reference};
use crate::cli::Context;
use crate::outcome::Failure;
use crate::stage::kept;

/// Write the disk of a machine that is shut off as an image, and print its digest
///
/// What lies under the disk is taken in. Memory and firmware of the machine become wishes of the image.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// A libvirt domain
    domain: String,
    /// The name that the image gets
    reference: String,
    /// Which disk, as libvirt's target names it, where there are several
    #[arg(long, value_name = "TARGET")]
    disk: Option<String>,
    #[command(flatten)]
    manner: Manner,
    #[command(flatten)]
    wishes: Wishes,
    #[command(flatten)]
    telling: push::Telling,
}

pub(super) async fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let target = reference(&arguments.reference)?;
    let manner = arguments.manner.check()?;
    let settings = context.settings()?;
    interruptible("export", async {
        let mut draft = kept::draft(&settings, &arguments.domain, arguments.disk.as_deref()).await?;
        arguments.wishes.add_to(&mut draft)?;
        let quiet = arguments.telling.quiet;
        let row = push::send(context, &settings, &draft, &manner, &target, quiet).await?;
        arguments.telling.tell(&row)
    })
    .await
}
