use super::login::{file, registry};
use super::{Context, print};
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
}

pub(super) async fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let registry = registry(&arguments.registry)?;
    let settings = context.settings()?;
    let mut forgotten = false;
    // In whichever file it is, it would be used.
    for path in settings.images.auth_files.iter().filter(|path| path.exists()) {
        forgotten |= AuthFile::new(path).forget(&registry).await?;
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
