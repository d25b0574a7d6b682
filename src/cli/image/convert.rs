use std::path::Path;

use clap::ValueEnum;

use super::progress::Lines;
use super::source::{ImageFormat, Kind, More, Place, Wishes, draft, or_file, place};
use super::{interruptible, push};
use crate::cli::Context;
use crate::image::{Boot, DiskFormat, Progress, Silent};
use crate::outcome::Failure;
use crate::stage::images;

/// What a destination may be written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Target {
    /// An image in cannery's own format: only what changed is sent, and fetched.
    Native,
    /// An image in KubeVirt's format, which many tools read.
    Containerdisk,
    /// An image in sardinecake's format.
    Sardinecake,
    /// A file; or an image of one blob, as ORAS pushes it.
    Qcow2,
    /// A file, sector by sector.
    Raw,
}

impl Target {
    /// As what an image is written.
    fn of_image(self) -> Result<Kind, Failure> {
        Ok(match self {
            Self::Native => Kind::Native,
            Self::Containerdisk => Kind::Containerdisk,
            Self::Sardinecake => Kind::Sardinecake,
            Self::Qcow2 => Kind::Qcow2,
            Self::Raw => {
                return Err(
                    Failure::system("an image is not written as raw: its holes would be sent")
                        .hint("Choose qcow2, or a file as the destination"),
                );
            }
        })
    }
}

/// Write an image or a disk in another format
///
/// The destination is an image of a registry or a layout folder, or a file.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// A qcow2 or raw file (a path that begins with / or ./), or an image
    source: String,
    /// An image, or a new file (a path that begins with / or ./)
    destination: String,
    /// The format to write [default: native; for a file, what its name ends with]; the result is printed as JSON with --json
    #[arg(long, value_parser = ImageFormat::<Target>::new())]
    format: Option<Target>,
    #[command(flatten)]
    more: More,
    #[command(flatten)]
    wishes: Wishes,
    #[command(flatten)]
    telling: push::Telling,
}

pub(super) async fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let source = place(&arguments.source)?;
    let target = place(&arguments.destination)?;
    let quiet = arguments.telling.quiet;
    let settings = context.settings()?;
    let store = images::store(&settings)?;
    interruptible("conversion", async {
        match target {
            Place::Image(target) => {
                let manner = arguments
                    .more
                    .check(arguments.format.unwrap_or(Target::Native).of_image()?)?;
                let draft = draft(context, &settings, &store, &source, &arguments.wishes, quiet)
                    .await
                    .map_err(|failure| or_file(&arguments.source, failure))?;
                let row = push::send(context, &settings, &draft, &manner, &target, quiet).await?;
                arguments.telling.tell(&row)
            }
            Place::File(path) => {
                let format = of_file(arguments.format, &path)?;
                arguments.wishes.check_none("a file holds nothing but the disk")?;
                if path.symlink_metadata().is_ok() {
                    return Err(Failure::system(format!("{} is there already", path.display()))
                        .hint("Remove it, or choose another name"));
                }
                let draft = draft(context, &settings, &store, &source, &arguments.wishes, quiet)
                    .await
                    .map_err(|failure| or_file(&arguments.source, failure))?;
                let name = path.display().to_string();
                let lines = Lines::new(&name, &context.log);
                let progress: &dyn Progress = if quiet { &Silent } else { &lines };
                let size = crate::image::save(&draft, format, &path, progress).await?;
                let left_out = draft.boot_files().map_or_else(Vec::new, parts);
                if !left_out.is_empty() {
                    context.log.line(format!(
                        "cannery: {name} is the disk alone, without the image's {}: a machine that needs them does not start from it. A native image and a containerDisk keep them.",
                        left_out.join(", ")
                    ));
                }
                arguments.telling.tell(&push::Row::File {
                    path,
                    format,
                    size,
                    left_out,
                })
            }
        }
    })
    .await
}

/// What a machine starts from beside its disk.
fn parts(boot: &Boot) -> Vec<&'static str> {
    let parts = [
        ("kernel", true),
        ("initrd", boot.initrd.is_some()),
        ("cmdline", boot.cmdline.is_some()),
    ];
    let there = parts.into_iter().filter(|(_, there)| *there);
    there.map(|(part, _)| part).collect()
}

/// The format of a file: what was asked for, or what its name says.
fn of_file(kind: Option<Target>, path: &Path) -> Result<DiskFormat, Failure> {
    match (kind, path.extension().and_then(|ending| ending.to_str())) {
        (Some(Target::Qcow2), _) | (None, Some("qcow2")) => Ok(DiskFormat::Qcow2),
        (Some(Target::Raw), _) | (None, Some("raw" | "img")) => Ok(DiskFormat::Raw),
        (Some(_), _) => Err(Failure::system("a file can be qcow2 or raw only")
            .hint("For an image in a folder, write oci:/FOLDER:TAG")),
        (None, _) => Err(
            Failure::system(format!("the name {} tells no format", path.display()))
                .hint("Say --format qcow2 or --format raw"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_files_format_is_what_was_asked_for_or_what_its_name_says() {
        let of = |kind, name: &str| of_file(kind, Path::new(name)).ok();
        assert_eq!(of(None, "a.qcow2"), Some(DiskFormat::Qcow2));
        assert_eq!(of(None, "a.img"), Some(DiskFormat::Raw));
        assert_eq!(of(Some(Target::Raw), "a.qcow2"), Some(DiskFormat::Raw));
        assert_eq!(of(Some(Target::Sardinecake), "a.qcow2"), None);
        assert_eq!(of(None, "a"), None);
    }
}
