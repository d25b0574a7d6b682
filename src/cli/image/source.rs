//! What is to be written: a file of this host or an image, and what the caller wants to be said of it.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use clap::builder::{EnumValueParser, PossibleValue, TypedValueParser};
use clap::error::{ContextKind, ContextValue};

use super::progress::Lines;
use super::{reference, shown};
use crate::cli::Context;
use crate::image::{
    Asker, Boot, Draft, Hints, Native, Packing, Progress, PullPolicy, Reference, Silent, Store, WriteFormat,
};
use crate::outcome::Failure;
use crate::settings::Settings;
use crate::stage::images;

/// A file, or an image by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    File(PathBuf),
    Image(Reference),
}

/// Reads what was written on the command line: paths begin with `/`, `./` or `../`, everything else is an image.
pub(super) fn place(text: &str) -> Result<Place, Failure> {
    if is_path(text) {
        return Ok(Place::File(text.into()));
    }
    match reference(text) {
        Ok(reference) => Ok(Place::Image(reference)),
        Err(failure) => Err(or_file(text, failure)),
    }
}

fn is_path(text: &str) -> bool {
    ["/", "./", "../"].iter().any(|start| text.starts_with(start))
}

/// What failed, and what else may have been meant by the name of an image.
pub(super) fn or_file(text: &str, failure: Failure) -> Failure {
    if !is_path(text) && Path::new(text).is_file() {
        failure.hint(format!("For the file of that name, write ./{text}"))
    } else {
        failure
    }
}

/// How an image is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Kind {
    /// cannery's own: only what changed is sent, and fetched.
    Native,
    /// KubeVirt's, which many tools read.
    Containerdisk,
    /// sardinecake's.
    Sardinecake,
    /// One blob that is a qcow2, as ORAS pushes it.
    Qcow2,
}

/// Reads the format of an image. Who asks for JSON there, as other commands have it, is told which flag that is here.
#[derive(Clone)]
pub(super) struct ImageFormat<T: ValueEnum + Clone + Send + Sync + 'static>(EnumValueParser<T>);

impl<T: ValueEnum + Clone + Send + Sync + 'static> ImageFormat<T> {
    pub(super) fn new() -> Self {
        Self(EnumValueParser::new())
    }
}

impl<T: ValueEnum + Clone + Send + Sync + 'static> TypedValueParser for ImageFormat<T> {
    type Value = T;

    fn parse_ref(
        &self,
        command: &clap::Command,
        argument: Option<&clap::Arg>,
        value: &std::ffi::OsStr,
    ) -> Result<T, clap::Error> {
        self.0.parse_ref(command, argument, value).map_err(|mut error| {
            if value == "json" {
                let tip = "--format is the image's own format here; --json prints the result as JSON";
                error.insert(
                    ContextKind::Suggested,
                    ContextValue::StyledStrs(vec![tip.to_owned().into()]),
                );
            }
            error
        })
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        self.0.possible_values()
    }
}

/// How an image is to be written.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Manner {
    /// The image's format; the result is printed as JSON with --json
    #[arg(long, value_parser = ImageFormat::<Kind>::new(), default_value = "native")]
    format: Kind,
    #[command(flatten)]
    more: More,
}

/// What only some formats ask for.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct More {
    /// The image that a native one builds upon [default: what its name means now]
    #[arg(long, value_name = "REF")]
    base: Option<String>,
    /// How a containerDisk's layer is packed [default: gzip]
    #[arg(long, value_enum)]
    compression: Option<Pack>,
}

/// The same, in values.
#[derive(Debug, Clone)]
pub(super) struct Written {
    kind: Kind,
    base: Option<Reference>,
    compression: Pack,
}

impl Manner {
    /// What cannot be is said before anything is done.
    pub(super) fn check(&self) -> Result<Written, Failure> {
        self.more.check(self.format)
    }
}

impl More {
    pub(super) fn check(&self, kind: Kind) -> Result<Written, Failure> {
        if self.base.is_some() && kind != Kind::Native {
            return Err(Failure::system("only a native image builds upon another")
                .hint("Leave out --base, or choose --format native"));
        }
        if self.compression.is_some() && kind != Kind::Containerdisk {
            return Err(
                Failure::system("only the layer of a containerDisk is packed in one way or another")
                    .hint("Leave out --compression, or choose --format containerdisk"),
            );
        }
        Ok(Written {
            kind,
            base: self.base.as_deref().map(reference).transpose()?,
            compression: self.compression.unwrap_or(Pack::Gzip),
        })
    }
}

impl Written {
    /// The format, as `--format` names it.
    pub(super) fn name(&self) -> String {
        let value = self.kind.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// `scratch` is a folder for what is removed again.
    pub(super) fn format<'a>(&'a self, scratch: &'a Path) -> WriteFormat<'a> {
        match self.kind {
            Kind::Containerdisk => WriteFormat::ContainerDisk(self.compression.into()),
            Kind::Sardinecake => WriteFormat::Sardinecake,
            Kind::Qcow2 => WriteFormat::Qcow2,
            Kind::Native => WriteFormat::Native(Native {
                base: self.base.as_ref(),
                scratch,
            }),
        }
    }
}

/// How a containerDisk's layer is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Pack {
    /// What every tool reads.
    Gzip,
    /// Smaller and quicker to unpack; not for older tools.
    Zstd,
}

impl From<Pack> for Packing {
    fn from(pack: Pack) -> Self {
        match pack {
            Pack::Gzip => Self::Gzip,
            Pack::Zstd => Self::Zstd,
        }
    }
}

/// What the image is to wish for its machine. Nothing that is not given changes what the source already wishes.
#[derive(Debug, Clone, Default, clap::Args)]
pub(super) struct Wishes {
    /// A label; may be given several times
    #[arg(long = "label", value_name = "NAME=VALUE")]
    labels: Vec<String>,
    /// How much memory, as 512M or 4G
    #[arg(long, value_name = "SIZE", value_parser = |text: &str| wish("io.cannery.memory", text))]
    memory: Option<String>,
    /// bios or uefi
    #[arg(long, value_name = "FIRMWARE", value_parser = |text: &str| wish("io.cannery.firmware", text))]
    firmware: Option<String>,
    /// The account that jobs run as
    #[arg(long, value_name = "NAME", value_parser = |text: &str| wish("io.cannery.user", text))]
    user: Option<String>,
    /// A kernel to start without a boot loader (native and containerDisk only)
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Its initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Its command line
    #[arg(long, value_name = "TEXT", value_parser = |text: &str| wish("io.cannery.cmdline", text))]
    cmdline: Option<String>,
}

/// The value of a flag that becomes a label, if it makes sense as one.
fn wish(label: &str, value: &str) -> Result<String, String> {
    match Hints::check(label, value) {
        Ok(()) => Ok(value.to_owned()),
        Err(reason) => Err(format!("it {reason}")),
    }
}

impl Wishes {
    /// What cannot be kept is not asked for; `why` says what keeps none.
    pub(super) fn check_none(&self, why: &str) -> Result<(), Failure> {
        let given = [
            ("--label", !self.labels.is_empty()),
            ("--memory", self.memory.is_some()),
            ("--firmware", self.firmware.is_some()),
            ("--user", self.user.is_some()),
            ("--kernel", self.kernel.is_some()),
            ("--cmdline", self.cmdline.is_some()),
        ];
        match given.iter().find(|(_, given)| *given) {
            Some((flag, _)) => Err(Failure::system(why).hint(format!("Leave out {flag}, or write an image"))),
            None => Ok(()),
        }
    }

    pub(super) fn add_to(&self, draft: &mut Draft) -> Result<(), Failure> {
        for label in &self.labels {
            let (name, value) = label
                .split_once('=')
                .filter(|(name, _)| !name.is_empty())
                .ok_or_else(|| {
                    Failure::system(format!("{:?} is no label", crate::report::plain(label, 60)))
                        .hint("Write it as NAME=VALUE")
                })?;
            draft.label(name, value)?;
        }
        for (name, value) in [
            ("io.cannery.memory", &self.memory),
            ("io.cannery.firmware", &self.firmware),
            ("io.cannery.user", &self.user),
        ] {
            if let Some(value) = value {
                draft.label(name, value)?;
            }
        }
        let old = draft.boot_files().cloned();
        let boot = match (&self.kernel, old) {
            (Some(kernel), _) => Boot {
                kernel: kernel.clone(),
                initrd: self.initrd.clone(),
                cmdline: self.cmdline.clone(),
            },
            (None, Some(old)) if self.cmdline.is_some() => Boot {
                cmdline: self.cmdline.clone(),
                ..old
            },
            (None, None) if self.cmdline.is_some() => {
                return Err(Failure::system("a command line needs a kernel to be for")
                    .hint("Name it with --kernel, or leave --cmdline to the disk's boot loader"));
            }
            (None, _) => return Ok(()),
        };
        draft.boot(boot)?;
        Ok(())
    }
}

/// The disk of a source, with these wishes. An image is fetched first where it is not here.
pub(super) async fn draft(
    context: &Context,
    settings: &Settings,
    store: &Store,
    source: &Place,
    wishes: &Wishes,
    quiet: bool,
) -> Result<Draft, Failure> {
    let machine = images::architecture()?;
    let mut draft = match source {
        Place::File(path) => Draft::of_file(path, machine, settings.images.max_disk)?,
        Place::Image(reference) => {
            let credentials = images::credentials(settings)?;
            let policies = vec![PullPolicy::IfNotPresent, PullPolicy::Always];
            let request = images::request(
                settings,
                reference.clone(),
                policies,
                credentials,
                Asker::Operator,
            )?;
            let name = shown(reference);
            let lines = Lines::new(&name, &context.log);
            let progress: &dyn Progress = if quiet { &Silent } else { &lines };
            let disk = store.provide(&request, progress).await?;
            let mut draft = Draft::of_disk(&disk, machine)?;
            // What it wishes for its machine is in the draft; the rest is for people and other programs.
            let labels = store.labels(&disk.digest);
            let others = labels.iter().filter(|(name, _)| !name.starts_with("io.cannery."));
            for (name, value) in others {
                draft.label(name, value)?;
            }
            draft
        }
    };
    wishes.add_to(&mut draft)?;
    Ok(draft)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_told_from_an_image_by_how_it_begins() {
        assert_eq!(place("./debian").unwrap(), Place::File("./debian".into()));
        assert_eq!(place("/a/b.qcow2").unwrap(), Place::File("/a/b.qcow2".into()));
        assert!(matches!(place("debian").unwrap(), Place::Image(_)));
        assert!(matches!(place("oci:/a/b:1").unwrap(), Place::Image(_)));
        // Cargo's tests run where Cargo.toml is.
        let error = place("Cargo.toml").unwrap_err().to_string();
        assert!(error.contains("./Cargo.toml"), "{error}");
        let hinted = |text: &str| or_file(text, Failure::system("x")).to_string();
        assert!(hinted("Cargo.toml").ends_with("write ./Cargo.toml."));
        // Who wrote that already meant the file.
        assert!(!hinted("./Cargo.toml").contains("write"));
    }
}
