use super::{Context, print};
use crate::kill::{self, Point};
use crate::outcome::Failure;
use crate::stage;

/// Tell gitlab-runner about the machine that a job will get (config_exec)
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {}

pub(super) async fn run(context: &Context, _: &Arguments) -> Result<(), Failure> {
    let settings = context.settings()?;
    let answer = stage::config(&settings, &context.environment).await?;
    print(&format!("{answer}\n"));
    kill::point(Point::ConfigAnswered);
    Ok(())
}
