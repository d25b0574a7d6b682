use super::choose::{by_digest, choose};
use super::{reference, shown};
use crate::cli::{Answer, Context, Patient, print, print_json};
use crate::image::{Asker, Digest, PullPolicy, Reference, Request, Requirements, Sight, Signature, Store};
use crate::outcome::Failure;
use crate::report::{bytes, plain, table};
use crate::stage::images;

/// Say what an image is, without fetching its disk
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// An image as `image:` names it, or the digest of one that is here, or the beginning of one
    image: String,
    /// How to print it
    #[arg(long, value_enum, default_value = "text")]
    format: Answer,
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
    let (reference, wanted) = named(&store, &arguments.image)?;
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
    let sight = store.look(&request, &Patient::new(&context.log)).await?;
    // A folder's tag and a file have no names for what they were.
    if let Some(wanted) = wanted.filter(|wanted| *wanted != sight.digest) {
        return Err(Failure::system(format!(
            "{} is another image by now ({})",
            shown(&sight.reference),
            sight.digest
        ))
        .hint(format!("`cannery image list {wanted}` shows what is here of it")));
    }
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
        Answer::Json => print_json(&sight),
        Answer::Text => {
            print(&text(&sight));
            Ok(())
        }
    }
}

/// What a word names: an image by its reference, or one of the store by its digest, which is asked for where it came from. A name
/// that an image has here is that name.
fn named(store: &Store, word: &str) -> Result<(Reference, Option<Digest>), Failure> {
    let all = store.inventory()?;
    if let Ok(chosen) = choose(&all, word)
        && let Some(name) = chosen.name
    {
        return Ok((name, None));
    }
    if let Some(held) = by_digest(&all, word)? {
        let digest = held.digest;
        let source = store.source_of(&digest)?.ok_or_else(|| {
            Failure::system(format!("nobody knows where the image {digest} came from"))
                .hint("`cannery image rm` removes it")
        })?;
        return Ok((source, Some(digest)));
    }
    if word.starts_with("sha256:") {
        return Err(
            Failure::system(format!("no image with the digest {} is here", plain(word, 80)))
                .hint("Ask with the name of its repository: NAME@DIGEST"),
        );
    }
    Ok((reference(word)?, None))
}

fn text(sight: &Sight) -> String {
    let hints = &sight.hints;
    let mut lines = vec![
        ("Image", shown(&sight.reference)),
        ("Digest", sight.digest.to_string()),
        ("Format", sight.format.clone()),
        (
            "Size",
            match sight.layers.len() {
                1 => format!("{} in one blob", bytes(sight.size)),
                count => format!("{} in {count} blobs", bytes(sight.size)),
            },
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
    let signatures = sight.signatures.iter();
    lines.extend(signatures.map(|one| ("Signature", signature(one, &sight.digest))));
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

/// What a signature of an image, or of the index that led to it, is worth.
fn signature(signature: &Signature, image: &Digest) -> String {
    let of = if signature.of == *image {
        ""
    } else {
        "of its index, "
    };
    let refused = signature.refused.as_ref().map(|reason| plain(reason, 300));
    let worth = match (&signature.key, refused, &signature.repository) {
        (None, Some(reason), _) => reason,
        (None, None, _) => "by no key that the settings name for this image".to_owned(),
        (Some(file), Some(reason), _) => format!("by {}, and does not count: {reason}", file.display()),
        (Some(file), None, Some(name)) => format!("by {}, as {}", file.display(), plain(name, 200)),
        (Some(file), None, None) => format!("by {}", file.display()),
    };
    format!("{of}{worth}")
}

/// More than a screen of blobs tells nobody anything; JSON has them all.
const LAYERS_SHOWN: usize = 24;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_a_signature_is_worth() {
        let image = Digest::of(b"image");
        let line = |of: &[u8], key: Option<&str>, repository: Option<&str>, refused: Option<&str>| {
            let one = Signature {
                of: Digest::of(of),
                key: key.map(Into::into),
                repository: repository.map(Into::into),
                refused: refused.map(Into::into),
            };
            signature(&one, &image)
        };
        let key = Some("/etc/cannery/ci.pub");
        assert_eq!(
            line(b"image", key, Some("r.example.com/vm\u{1b}[1m"), None),
            "by /etc/cannery/ci.pub, as r.example.com/vm[1m"
        );
        assert_eq!(
            line(b"index", key, None, None),
            "of its index, by /etc/cannery/ci.pub"
        );
        assert_eq!(
            line(b"image", key, None, Some("it is signed as `evil`")),
            "by /etc/cannery/ci.pub, and does not count: it is signed as `evil`"
        );
        assert_eq!(
            line(b"image", None, None, None),
            "by no key that the settings name for this image"
        );
        assert_eq!(
            line(b"image", None, None, Some("it cannot be read")),
            "it cannot be read"
        );
    }
}
