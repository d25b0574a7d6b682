use super::Context;
use crate::outcome::Failure;
use crate::stage;

/// Start a machine for a job and wait until it answers (prepare_exec)
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {}

pub(super) async fn run(context: &Context, _: &Arguments) -> Result<(), Failure> {
    let settings = context.settings()?;
    stage::prepare(&settings, &context.environment, &context.log).await
}
