//! The name of an image, as it stands behind `image:`.

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use super::digest::Digest;
use super::error::quoted;

/// Longest text that is looked at, in bytes. Docker allows 255 for the repository and 128 for the tag; a
/// folder's path may be longer.
const TEXT_MAX: usize = 4096;

/// Where an image is to be found.
///
/// Written as docker writes it (`registry[:port]/repository[:tag][@sha256:…]`; without a registry it is
/// Docker Hub, without a tag `latest`), or as skopeo writes an OCI layout folder (`oci:/DIR:TAG`).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Reference {
    /// In a registry.
    Registry {
        /// `host[:port]`; Docker Hub is always `docker.io`.
        registry: String,
        /// The path in the registry, without a leading slash.
        repository: String,
        /// The tag. Absent only when there is a digest.
        tag: Option<String>,
        /// The digest, which outranks the tag.
        digest: Option<Digest>,
    },
    /// In an OCI layout folder of this host.
    Layout {
        /// The folder: absolute, without `.` and `..`, so that a list of allowed folders can be compared by
        /// prefix.
        dir: PathBuf,
        /// The name in the folder's index (`org.opencontainers.image.ref.name`).
        tag: String,
    },
}

/// A text that names no image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} names no image: {reason}", quoted(text))]
pub struct InvalidReference {
    /// What was given.
    pub text: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl FromStr for Reference {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        let parsed = if text.len() > TEXT_MAX {
            Err("it is longer than 4096 bytes")
        } else if let Some(layout) = text.strip_prefix("oci:") {
            parse_layout(layout)
        } else {
            parse_registry(text)
        };
        parsed.map_err(|reason| InvalidReference {
            text: text.to_owned(),
            reason,
        })
    }
}

impl Reference {
    /// The digest that it names, if it names one.
    pub fn digest(&self) -> Option<&Digest> {
        match self {
            Self::Registry { digest, .. } => digest.as_ref(),
            Self::Layout { .. } => None,
        }
    }

    /// Which of the images of its repository or folder it names: by the digest, else by the tag.
    pub fn version(&self) -> String {
        match self {
            Self::Registry { tag, digest, .. } => match (digest, tag) {
                (Some(digest), _) => digest.to_string(),
                (None, Some(tag)) => tag.clone(),
                (None, None) => "latest".to_owned(),
            },
            Self::Layout { tag, .. } => tag.clone(),
        }
    }

    /// Where its images are: the name without tag and digest.
    pub fn place(&self) -> String {
        match self {
            Self::Registry {
                registry, repository, ..
            } => format!("{registry}/{repository}"),
            Self::Layout { dir, .. } => format!("oci:{}", dir.display()),
        }
    }
}

fn parse_layout(text: &str) -> Result<Reference, &'static str> {
    let (dir, tag) = text
        .rsplit_once(':')
        .filter(|(_, tag)| !tag.contains('/'))
        .ok_or("a layout is written oci:/FOLDER:TAG, and the tag is missing")?;
    if tag.is_empty()
        || tag.len() > 128
        || !tag
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    {
        return Err("a tag is 1 to 128 letters, digits, dots, dashes and underscores");
    }
    let dir = Path::new(dir);
    if !dir.is_absolute() {
        return Err("the folder of a layout must be an absolute path");
    }
    if dir.components().any(|part| part == Component::ParentDir) {
        return Err("the folder of a layout must not contain `..`");
    }
    if text.bytes().any(|b| b.is_ascii_control()) {
        return Err("it contains a control character");
    }
    // Rebuilt from its components: no `.`, no doubled and no trailing slash.
    Ok(Reference::Layout {
        dir: dir.components().collect(),
        tag: tag.to_owned(),
    })
}

fn parse_registry(text: &str) -> Result<Reference, &'static str> {
    use oci_client::ParseError;
    let parsed: oci_client::Reference = text.parse().map_err(|error| match error {
        ParseError::NameEmpty => "it is empty",
        // The parser reports capital letters as any other wrong character.
        ParseError::ReferenceInvalidFormat
            if oci_client::Reference::try_from(text.to_lowercase()).is_ok() =>
        {
            "a repository has no capital letters"
        }
        ParseError::NameContainsUppercase => "a repository has no capital letters",
        ParseError::NameTooLong => "the repository is longer than 255 characters",
        ParseError::DigestInvalidLength | ParseError::DigestInvalidFormat | ParseError::DigestUnsupported => {
            "a digest is `sha256:` and 64 lower-case hexadecimal digits"
        }
        ParseError::TagInvalidFormat | ParseError::ReferenceInvalidFormat => {
            "an image is written [registry[:port]/]repository[:tag][@sha256:digest]"
        }
    })?;
    // The parser takes a first part without a dot for a registry while it looks for capitals, and for a repository then.
    if parsed.repository().bytes().any(|b| b.is_ascii_uppercase()) {
        return Err("a repository has no capital letters");
    }
    let digest = match parsed.digest() {
        Some(digest) => Some(
            digest
                .parse()
                .map_err(|_| "a digest is `sha256:` and 64 lower-case hexadecimal digits")?,
        ),
        None => None,
    };
    Ok(Reference::Registry {
        registry: parsed.registry().to_owned(),
        repository: parsed.repository().to_owned(),
        tag: parsed.tag().map(str::to_owned),
        digest,
    })
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry {
                registry,
                repository,
                tag,
                digest,
            } => {
                write!(f, "{registry}/{repository}")?;
                if let Some(tag) = tag {
                    write!(f, ":{tag}")?;
                }
                if let Some(digest) = digest {
                    write!(f, "@{digest}")?;
                }
                Ok(())
            }
            Self::Layout { dir, tag } => write!(f, "oci:{}:{tag}", dir.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn names_are_read_as_docker_reads_them() {
        for (text, full) in [
            ("debian", "docker.io/library/debian:latest"),
            ("debian:12", "docker.io/library/debian:12"),
            ("me/vm:1", "docker.io/me/vm:1"),
            ("index.docker.io/me/vm:1", "docker.io/me/vm:1"),
            ("localhost/vm", "localhost/vm:latest"),
            ("localhost:5000/vm:12", "localhost:5000/vm:12"),
            ("127.0.0.1:5000/a/b/c", "127.0.0.1:5000/a/b/c:latest"),
            (
                "registry.example.com/g/p/vm:v1.2_3-x",
                "registry.example.com/g/p/vm:v1.2_3-x",
            ),
        ] {
            assert_eq!(text.parse::<Reference>().unwrap().to_string(), full, "{text}");
        }
        let pinned: Reference = format!("r.example.com/vm:1@sha256:{HEX}").parse().unwrap();
        assert_eq!(pinned.to_string(), format!("r.example.com/vm:1@sha256:{HEX}"));
        let Reference::Registry { tag, digest, .. } =
            format!("r.example.com/vm@sha256:{HEX}").parse().unwrap()
        else {
            panic!("a registry reference")
        };
        assert_eq!((tag, digest.map(|d| d.hex())), (None, Some(HEX.to_owned())));
    }

    #[test]
    fn a_layout_is_read_as_skopeo_writes_it() {
        let layout: Reference = "oci:/srv//images/./vms/:debian-12".parse().unwrap();
        assert_eq!(
            layout,
            Reference::Layout {
                dir: "/srv/images/vms".into(),
                tag: "debian-12".into()
            }
        );
        assert_eq!(layout.to_string(), "oci:/srv/images/vms:debian-12");
    }

    #[test]
    fn what_names_no_image_is_refused_with_the_reason() {
        for (text, reason) in [
            ("", "empty"),
            ("Debian", "capital"),
            ("debian:", "written"),
            (":12", "written"),
            ("a b", "written"),
            ("r.example.com/../etc", "written"),
            ("r.example.com/vm@sha256:abc", "written"),
            (
                "r.example.com/vm@sha256:ABCDEFABCDEFABCDEFABCDEFABCDEFAB",
                "digest",
            ),
            ("r.example.com/vm;rm -rf /", "written"),
            ("https://r.example.com/vm", "written"),
            ("oci:/srv/images", "tag is missing"),
            ("oci:/srv:8/images", "tag is missing"),
            ("oci:images:1", "absolute"),
            ("oci:/srv/../etc:1", "`..`"),
            ("oci:/srv:", "tag is 1"),
            ("oci:/s\nrv:1", "control"),
        ] {
            let error = text.parse::<Reference>().unwrap_err();
            assert!(error.to_string().contains(reason), "{text}: {error}");
            assert!(!error.to_string().contains('\n'), "{error}");
        }
        let long = format!("r.example.com/{}", "a".repeat(5000));
        assert!(long.parse::<Reference>().unwrap_err().to_string().len() < 300);
    }

    proptest! {
        #[test]
        fn a_reference_reads_what_it_writes(text in "([a-z0-9.:/@_-]|oci:/){1,60}") {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(reference.to_string().parse::<Reference>(), Ok(reference));
            }
        }
    }
}
