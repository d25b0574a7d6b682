use std::path::PathBuf;

use super::Context;
use crate::outcome::Failure;
use crate::stage;

/// Run one of a job's scripts in its machine (run_exec)
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The script, a file on the host
    script: PathBuf,
    /// gitlab-runner's name for what the script is: any name will do
    #[arg(allow_hyphen_values = true)]
    stage: String,
}

pub(super) async fn run(
    context: &Context,
    arguments: &Arguments,
    cancel: impl Future<Output = ()>,
) -> Result<(), Failure> {
    let settings = context.settings()?;
    stage::run(
        &settings,
        &context.environment,
        &context.log,
        &arguments.script,
        &arguments.stage,
        cancel,
    )
    .await
}
