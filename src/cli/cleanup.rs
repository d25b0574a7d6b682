use super::Context;
use crate::outcome::Failure;
use crate::stage;

/// Remove a job's machine with all that belongs to it (cleanup_exec)
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {}

pub(super) async fn run(context: &Context, _: &Arguments) -> Result<(), Failure> {
    let settings = context.settings()?;
    stage::cleanup(&settings, &context.environment, &context.log).await
}
