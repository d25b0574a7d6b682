//! The name of an image, as it stands behind `image:`.

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use super::digest::Digest;
use super::error::quoted;

/// Longest text that is looked at, in bytes. Docker allows 255 for the repository and 128 for the tag; a
/// folder's path may be longer.
const TEXT_MAX: usize = 4096;

/// Longest repository, in bytes, as registries have it.
const REPOSITORY_MAX: usize = 255;

/// The registry of a name without one, and what its index is called.
const DOCKER_HUB: &str = "docker.io";
const DOCKER_HUB_INDEX: &str = "index.docker.io";

/// Where an image is to be found.
///
/// Written as docker writes it (`registry[:port]/repository[:tag][@sha256:…]`; without a registry it is
/// Docker Hub, without a tag `latest`), as skopeo writes an OCI layout folder (`oci:/DIR:TAG`), or as the address of a single disk
/// (`https://HOST/PATH`, `file:///PATH`), behind which `#sha256=HEX` may say what it must be.
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
    /// A disk in a file of this host.
    File {
        /// Absolute, without `.` and `..`.
        path: PathBuf,
        /// The digest of the file's bytes.
        digest: Option<Digest>,
    },
    /// A disk on a web server.
    Web {
        /// Without TLS?
        plain: bool,
        /// `host[:port]`, in small letters.
        host: String,
        /// From the slash on, with no query and no `..`.
        path: String,
        /// The digest of the file's bytes.
        digest: Option<Digest>,
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
        } else if let Some(file) = text.strip_prefix("file://") {
            parse_file(file)
        } else if let Some(address) = text.strip_prefix("https://") {
            parse_web(address, false)
        } else if let Some(address) = text.strip_prefix("http://") {
            parse_web(address, true)
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
            Self::Registry { digest, .. } | Self::File { digest, .. } | Self::Web { digest, .. } => {
                digest.as_ref()
            }
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
            Self::File { digest, .. } | Self::Web { digest, .. } => {
                digest.map_or_else(String::new, |digest| digest.to_string())
            }
        }
    }

    /// Where its images are: the name without tag and digest.
    pub fn place(&self) -> String {
        match self {
            Self::Registry {
                registry, repository, ..
            } => format!("{registry}/{repository}"),
            Self::Layout { dir, .. } => format!("oci:{}", dir.display()),
            Self::File { path, .. } => format!("file://{}", path.display()),
            Self::Web {
                plain, host, path, ..
            } => format!("{}://{host}{path}", if *plain { "http" } else { "https" }),
        }
    }
}

/// Takes `#sha256=HEX` from the end.
fn parse_sum(text: &str) -> Result<(&str, Option<Digest>), &'static str> {
    let Some((rest, sum)) = text.rsplit_once('#') else {
        return Ok((text, None));
    };
    let digest = sum.strip_prefix("sha256=").map(Digest::from_hex);
    match digest {
        Some(Ok(digest)) => Ok((rest, Some(digest))),
        _ => Err("behind `#` stands `sha256=` and 64 lower-case hexadecimal digits"),
    }
}

fn parse_file(text: &str) -> Result<Reference, &'static str> {
    let (path, digest) = parse_sum(text)?;
    let path = Path::new(path);
    if !path.is_absolute() {
        return Err("a file is written file:///FOLDER/NAME");
    }
    if path.components().any(|part| part == Component::ParentDir) || path.file_name().is_none() {
        return Err("the path of a file must not contain `..`");
    }
    if text.bytes().any(|b| b.is_ascii_control()) {
        return Err("it contains a control character");
    }
    Ok(Reference::File {
        path: path.components().collect(),
        digest,
    })
}

/// Only what can be compared with a pattern byte by byte is taken: no user, no query, no escapes that hide a slash or a dot.
fn parse_web(text: &str, plain: bool) -> Result<Reference, &'static str> {
    const WRITTEN: &str = "a disk on a web server is written https://HOST/PATH";
    let (address, digest) = parse_sum(text)?;
    let slash = address.find('/').ok_or(WRITTEN)?;
    let (host, path) = address.split_at(slash);
    let good_host = !host.is_empty()
        && host
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b".-:[]".contains(&b));
    let good_path = path
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"/._~!$&'()*+,;=:@-".contains(&b));
    if !good_host || !good_path {
        return Err(
            "the address of a disk has a host and a path of letters, digits and `._~!$&'()*+,;=:@-/`",
        );
    }
    let mut parts = path.split('/').skip(1);
    if parts.any(|part| matches!(part, "" | "." | "..")) {
        return Err("the address of a disk has no empty part and no `..`");
    }
    Ok(Reference::Web {
        plain,
        host: host.to_ascii_lowercase(),
        path: path.to_owned(),
        digest,
    })
}

fn parse_layout(text: &str) -> Result<Reference, &'static str> {
    let (dir, tag) = text
        .rsplit_once(':')
        .filter(|(_, tag)| !tag.contains('/'))
        .ok_or("a layout is written oci:/FOLDER:TAG, and the tag is missing")?;
    // Else the digits would be a tag in a folder whose name ends so.
    if dir.ends_with("@sha256") {
        return Err("an image of a layout is named by its tag alone, oci:/FOLDER:TAG, without a digest");
    }
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

/// Docker's own grammar (the distribution project's `reference` package), read by hand: the library's pattern for it takes tens of
/// milliseconds to compile in each process. A property test holds the two together.
fn parse_registry(text: &str) -> Result<Reference, &'static str> {
    const WRITTEN: &str = "an image is written [registry[:port]/]repository[:tag][@sha256:digest]";
    const DIGEST: &str = "a digest is `sha256:` and 64 lower-case hexadecimal digits";
    if text.is_empty() {
        return Err("it is empty");
    }
    let (name, digest) = match text.split_once('@') {
        Some((name, digest)) => (name, Some(digest.parse::<Digest>().map_err(|_| DIGEST)?)),
        None => (text, None),
    };
    // A colon in front of a slash belongs to a port.
    let (name, tag) = match name.rsplit_once(':').filter(|(_, tag)| !tag.contains('/')) {
        Some((name, tag)) => (name, Some(tag)),
        None => (name, None),
    };
    if tag.is_some_and(|tag| !is_tag(tag)) {
        return Err(WRITTEN);
    }
    let (registry, repository) = match name.split_once('/') {
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => (
            if first == DOCKER_HUB_INDEX {
                DOCKER_HUB
            } else {
                first
            },
            rest,
        ),
        _ => (DOCKER_HUB, name),
    };
    if repository.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err("a repository has no capital letters");
    }
    if !is_host(registry) || !repository.split('/').all(is_component) {
        return Err(WRITTEN);
    }
    let library = registry == DOCKER_HUB && !repository.contains('/');
    let repository = if library {
        format!("library/{repository}")
    } else {
        repository.to_owned()
    };
    if repository.len() > REPOSITORY_MAX {
        return Err("the repository is longer than 255 characters");
    }
    let tag = match (tag, digest) {
        (None, None) => Some("latest".to_owned()),
        (tag, _) => tag.map(str::to_owned),
    };
    Ok(Reference::Registry {
        registry: registry.to_owned(),
        repository,
        tag,
        digest,
    })
}

/// `host[:port]`: names of letters, digits and inner dashes with dots between them.
fn is_host(text: &str) -> bool {
    let (host, port) = match text.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (text, None),
    };
    let is_name = |name: &str| {
        !name.is_empty()
            && !name.starts_with('-')
            && !name.ends_with('-')
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    host.split('.').all(is_name)
        && port.is_none_or(|port| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()))
}

/// A part of a repository: runs of small letters and digits, between which stands a dot, one or two underscores, or dashes.
fn is_component(text: &str) -> bool {
    let is_run = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let ends = |end: Option<u8>| end.is_some_and(is_run);
    let separators = text.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    ends(text.bytes().next())
        && ends(text.bytes().last())
        && separators
            .filter(|between| !between.is_empty())
            .all(|between| matches!(between, "." | "_" | "__") || between.bytes().all(|b| b == b'-'))
}

/// A letter, digit or underscore, and up to 127 of these, dots and dashes.
fn is_tag(text: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    text.len() <= 128
        && text.bytes().next().is_some_and(is_word)
        && text.bytes().all(|b| is_word(b) || b".-".contains(&b))
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
            Self::File { digest, .. } | Self::Web { digest, .. } => {
                f.write_str(&self.place())?;
                match digest {
                    Some(digest) => write!(f, "#sha256={}", digest.hex()),
                    None => Ok(()),
                }
            }
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
    fn the_address_of_a_disk_may_carry_its_sum() {
        for (text, place, sum) in [
            (
                "file:///srv//vms/./debian.qcow2",
                "file:///srv/vms/debian.qcow2",
                None,
            ),
            (
                "https://Cloud.Example.com/images/debian.qcow2",
                "https://cloud.example.com/images/debian.qcow2",
                None,
            ),
            ("http://127.0.0.1:8080/d.img", "http://127.0.0.1:8080/d.img", None),
            (
                &format!("https://cloud.example.com/d.img#sha256={HEX}"),
                "https://cloud.example.com/d.img",
                Some(HEX),
            ),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!(reference.place(), place);
            assert_eq!(reference.digest().map(Digest::hex).as_deref(), sum);
            assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
        }
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
            ("r.example.com/vm@sha256:abc", "digest"),
            (
                "r.example.com/vm@sha256:ABCDEFABCDEFABCDEFABCDEFABCDEFAB",
                "digest",
            ),
            ("r.example.com/vm;rm -rf /", "written"),
            ("https://r.example.com", "written"),
            ("https:///vm", "host"),
            ("https://user:pw@r.example.com/vm", "host"),
            ("https://r.example.com/vm?a=b", "host"),
            ("https://r.example.com/a/%2e%2e/vm", "host"),
            ("https://r.example.com/a/../vm", "`..`"),
            ("https://r.example.com/a//vm", "empty"),
            ("https://r.example.com/vm#sha256=abc", "sha256="),
            ("https://r.example.com/vm#md5=abc", "sha256="),
            ("ftp://r.example.com/vm", "written"),
            ("file://vm.qcow2", "file:///"),
            ("file:///srv/../etc/shadow", "`..`"),
            ("file:///", "`..`"),
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

    /// What the library makes of a text, as far as we would take it: its tags may have letters of all alphabets.
    fn by_the_library(text: &str) -> Option<(String, String, Option<String>, Option<String>)> {
        let parsed: oci_client::Reference = text.parse().ok()?;
        let owned = |text: Option<&str>| text.map(str::to_owned);
        let small = !parsed.repository().bytes().any(|b| b.is_ascii_uppercase());
        small.then(|| {
            let (registry, repository) = (parsed.registry().to_owned(), parsed.repository().to_owned());
            (registry, repository, owned(parsed.tag()), owned(parsed.digest()))
        })
    }

    proptest! {
        #[test]
        fn names_are_read_as_the_library_reads_them(
            name in prop_oneof!["[aB0._:/-]{1,12}", "[a-z]{1,3}([._-]{1,3}[a-z0-9]{1,2}){0,3}", "(index[.])?docker[.]io/[a-z/]{1,5}",
                "[aB]{0,2}[.:-]{0,2}[a0]{0,2}(:[0-9a]{0,3})?/[a-z0-9._/-]{1,8}"],
            tag in prop_oneof![Just(String::new()), "(:[aB0_.-]{0,4}){1,2}", ":[a-z]{127,130}"],
            digest in prop_oneof![3 => Just(String::new()), 1 => "@sha256:[0-9a-f]{64}"],
        ) {
            let text = format!("{name}{tag}{digest}");
            let ours = match text.parse::<Reference>() {
                Ok(Reference::Registry { registry, repository, tag, digest }) => {
                    Some((registry, repository, tag, digest.map(|digest| digest.to_string())))
                }
                Ok(other) => panic!("{other} is no name"),
                Err(_) => None,
            };
            prop_assert_eq!(ours, by_the_library(&text), "{}", text);
        }

        #[test]
        fn a_reference_reads_what_it_writes(text in "(oci:/|file:///|https?://)?[a-z0-9.:/@_#-]{1,60}") {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(reference.to_string().parse::<Reference>(), Ok(reference));
            }
        }
    }
}
