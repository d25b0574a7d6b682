//! Which image a word on the command line means: a reference, a digest, or the beginning of one.

use crate::image::{Digest, Held, Reference};
use crate::outcome::Failure;
use crate::report::plain;

/// Fewer digits would mean an image by accident.
const PREFIX_MIN: usize = 4;

/// An image that was chosen.
#[derive(Debug)]
pub(super) struct Chosen<'a> {
    pub(super) held: &'a Held,
    /// By which of its names, if not by its digest.
    pub(super) name: Option<Reference>,
}

/// The image of the store that a word means.
pub(super) fn choose<'a>(all: &'a [Held], word: &str) -> Result<Chosen<'a>, Failure> {
    let none = || {
        Failure::system(format!("no image \"{}\" is on this host", plain(word, 120)))
            .hint("`cannery image list` shows those that are")
    };
    let named = word.parse::<Reference>().ok();
    if let Some(reference) = named {
        let text = reference.to_string();
        let by_name = all
            .iter()
            .find(|held| held.names.iter().any(|name| name.reference == text));
        if let Some(held) = by_name {
            return Ok(Chosen {
                held,
                name: Some(reference),
            });
        }
        if let Some(digest) = reference.digest() {
            let held = all.iter().find(|held| held.digest == *digest).ok_or_else(none)?;
            return Ok(Chosen { held, name: None });
        }
    }
    let held = by_digest(all, word)?.ok_or_else(none)?;
    Ok(Chosen { held, name: None })
}

/// The image of the store whose digest is a word, or begins with it; none where there is none.
pub(super) fn by_digest<'a>(all: &'a [Held], word: &str) -> Result<Option<&'a Held>, Failure> {
    let found: Vec<&Held> = all.iter().filter(|held| begins(&held.digest, word)).collect();
    match found.as_slice() {
        [] => Ok(None),
        [held] => Ok(Some(held)),
        several => {
            let digests: Vec<String> = several.iter().map(|held| held.digest.to_string()).collect();
            Err(Failure::system(format!(
                "the image {word} is ambiguous: it may be {}",
                digests.join(", ")
            ))
            .hint("Give more digits of the digest"))
        }
    }
}

/// Is a word the beginning of this digest, with `sha256:` or without?
pub(super) fn begins(digest: &Digest, word: &str) -> bool {
    let hex = word.strip_prefix("sha256:").unwrap_or(word);
    let digits = hex.len() >= PREFIX_MIN && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    digits && digest.hex().starts_with(hex)
}

#[cfg(test)]
pub(super) mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::image::Name;

    pub(in crate::cli::image) fn held(digest: &str, names: &[&str]) -> Held {
        let digest: Digest = format!("sha256:{digest:0<64}").parse().unwrap();
        let name = |reference: &&str| Name {
            reference: (*reference).to_owned(),
            architecture: "x86_64".to_owned(),
            digest,
            asked: Timestamp::UNIX_EPOCH,
        };
        Held {
            digest,
            disk: None,
            unverified: false,
            names: names.iter().map(name).collect(),
            size: 0,
            own: 0,
            shared: Vec::new(),
            created: Timestamp::UNIX_EPOCH,
            used: Timestamp::UNIX_EPOCH,
            pins: Vec::new(),
            leases: Vec::new(),
        }
    }

    #[test]
    fn an_image_is_meant_by_a_name_a_digest_or_its_beginning() {
        let all = [
            held(
                "abcd1",
                &["docker.io/library/debian:latest", "r.example.com/vm:1"],
            ),
            held("abcd2", &[]),
            // Whose name looks like a digest's beginning.
            held("ffff", &["docker.io/library/abcd:latest"]),
        ];
        for (word, expected) in [
            ("debian", 0),
            ("r.example.com/vm:1", 0),
            ("abcd1", 0),
            ("sha256:abcd2", 1),
            ("abcd", 2),
            ("ffff", 2),
        ] {
            let chosen = choose(&all, word).unwrap();
            assert_eq!(chosen.held.digest, all[expected].digest, "{word}");
        }
        let pinned = format!("any.example.com/x@{}", all[1].digest);
        assert_eq!(choose(&all, &pinned).unwrap().held.digest, all[1].digest);
        assert!(choose(&all, "debian").unwrap().name.is_some());
        assert!(choose(&all, "abcd1").unwrap().name.is_none());
        for (word, part) in [
            ("sha256:abcd", "is ambiguous"),
            ("r.example.com/vm:2", "no image"),
            ("abc", "no image"),
            ("", "no image"),
            ("a\x1bb", "no image"),
        ] {
            let error = choose(&all, word).unwrap_err();
            assert!(error.message.contains(part), "{word}: {error}");
        }
    }
}
