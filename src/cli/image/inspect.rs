use super::{Format, reference, shown};
use crate::cli::{Context, print, print_json};
use crate::image::{Asker, Digest, PullPolicy, Reference, Request, Requirements, Sight, Signature, Store};
use crate::outcome::Failure;
use crate::report::{bytes, plain, table};
use crate::stage::images;

/// Say what an image is, without fetching its disk
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// An image as `image:` names it, or the digest of one that is here
    image: String,
    /// How to print it
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
    /// Print the manifest as it is
    #[arg(long, conflicts_with = "image_config")]
    raw: bool,
    /// Print the image's own configuration as it is
    #[arg(long)]
    image_config: bool,
}

pub(super) async fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let settings = context.settings()?;
    let store = images::store(&settings)?;
    let reference = named(&store, &arguments.image)?;
    let credentials = images::credentials(&settings)?;
    let policies = vec![PullPolicy::Always];
    let request = images::request(&settings, reference, policies, credentials, Asker::Operator)?;
    // Whoever is to name a digest must be able to learn it.
    let request = Request {
        requirements: Requirements {
            require_digest: false,
            ..request.requirements
        },
        ..request
    };
    let sight = store.look(&request).await?;
    if arguments.raw || arguments.image_config {
        let text = if arguments.raw {
            &sight.manifest
        } else {
            &sight.config
        };
        print(&format!("{}\n", String::from_utf8_lossy(text)));
        return Ok(());
    }
    match arguments.format {
        Format::Json => print_json(&sight),
        Format::Text => {
            print(&text(&sight));
            Ok(())
        }
    }
}

/// A reference, or the place that an image of the store came from.
fn named(store: &Store, text: &str) -> Result<Reference, Failure> {
    let Ok(wanted) = text.parse::<Digest>() else {
        return reference(text);
    };
    let disk = store.find(&wanted)?.ok_or_else(|| {
        Failure::system(format!("no image with the digest {wanted} is here"))
            .hint("Ask with the name of its repository: NAME@DIGEST")
    })?;
    Ok(match reference(&disk.reference)? {
        Reference::Registry {
            registry, repository, ..
        } => Reference::Registry {
            registry,
            repository,
            tag: None,
            digest: Some(wanted),
        },
        other => other,
    })
}

fn text(sight: &Sight) -> String {
    let hints = &sight.hints;
    let mut lines = vec![
        ("Image", shown(&sight.reference)),
        ("Digest", sight.digest.to_string()),
        ("Format", sight.format.clone()),
        (
            "Size",
            format!("{} in {} blobs", bytes(sight.size), sight.layers.len()),
        ),
    ];
    if !sight.platform.is_empty() {
        lines.push(("Platform", plain(&sight.platform, 60)));
    }
    if let Some(memory) = hints.memory {
        lines.push(("Memory", bytes(memory)));
    }
    if let Some(firmware) = hints.firmware {
        lines.push(("Firmware", format!("{firmware:?}").to_lowercase()));
    }
    if let Some(user) = &hints.user {
        lines.push(("User", plain(user, 40)));
    }
    lines.extend(sight.signatures.iter().map(|one| ("Signature", signature(one))));
    if sight.signatures.is_empty() {
        lines.push(("Signature", "none".to_owned()));
    }
    let mut text: String = lines
        .iter()
        .map(|(name, value)| format!("{:<11}{value}\n", format!("{name}:")))
        .collect();
    let both = [("Label", &sight.labels), ("Annotation", &sight.annotations)];
    for (name, values) in both {
        for (key, value) in values {
            text += &format!("{name}: {} = {}\n", plain(key, 100), plain(value, 200));
        }
    }
    let rows: Vec<Vec<String>> = sight
        .layers
        .iter()
        .take(LAYERS_SHOWN)
        .map(|layer| {
            vec![
                plain(&layer.media_type, 80),
                bytes(layer.size),
                layer.digest.to_string().chars().take(19).collect(),
                layer
                    .title
                    .as_deref()
                    .map_or(String::new(), |title| plain(title, 60)),
            ]
        })
        .collect();
    text.push('\n');
    text += &table(&["TYPE", "SIZE", "DIGEST", "FILE"], &rows);
    if sight.layers.len() > LAYERS_SHOWN {
        text += &format!("and {} more\n", sight.layers.len() - LAYERS_SHOWN);
    }
    text
}

/// What a signature is worth.
fn signature(signature: &Signature) -> String {
    let by = signature.key.as_ref().map_or_else(
        || "by no key that the settings name for this image".to_owned(),
        |file| format!("by {}", file.display()),
    );
    match (&signature.refused, &signature.repository) {
        (Some(reason), _) => format!("{by}, and does not count: {}", plain(reason, 300)),
        (None, Some(name)) => format!("{by}, as {}", plain(name, 200)),
        (None, None) => by,
    }
}

/// More than a screen of blobs tells nobody anything; JSON has them all.
const LAYERS_SHOWN: usize = 24;
