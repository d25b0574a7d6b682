use serde::Serialize;

use super::login::{file, registry};
use super::{Answer, Context, print, print_json};
use crate::image::AuthFile;
use crate::outcome::Failure;

/// Forget the login for a registry
///
/// A login that only parts of a registry have, such as registry.example.com/team, stays.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The registry, as references name it
    #[arg(value_name = "REGISTRY")]
    registry: String,
    /// How to print what was forgotten
    #[arg(long, value_enum, default_value = "text")]
    format: Answer,
}

/// What came of it; the JSON's keys are these names.
#[derive(Debug, Serialize)]
struct Left {
    registry: String,
    /// False where there was no login.
    forgotten: bool,
}

pub(super) async fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let registry = registry(&arguments.registry)?;
    let settings = context.settings()?;
    let mut forgotten = false;
    // In whichever file it is, it would be used.
    for path in settings.images.auth_files.iter().filter(|path| path.exists()) {
        forgotten |= AuthFile::new(path).forget(&registry).await?;
    }
    if arguments.format == Answer::Json {
        return print_json(&Left { registry, forgotten });
    }
    print(&if forgotten {
        format!("Logged out of {registry}.\n")
    } else {
        format!(
            "There is no login for {registry} in {}.\n",
            file(&settings)?.display()
        )
    });
    Ok(())
}
