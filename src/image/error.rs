//! What can go wrong between a reference and a disk.

use std::io;
use std::path::PathBuf;

use super::digest::Digest;
use super::inspect;
use super::registry::credentials;

/// Longest piece of a stranger's text that an error repeats, in characters.
const QUOTE_MAX: usize = 120;

/// Why an image could not be provided. Each is one plain sentence that names the thing; which of them is
/// the author's, the operator's or the weather's fault stands at the variant.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The registry or layout answers that there is no such image. Author: the name or the tag is wrong.
    #[error("{image} does not exist{}", where_(.registry))]
    NotFound {
        /// The reference.
        image: String,
        /// Who said so; empty for a layout folder.
        registry: String,
    },
    /// The registry refuses us the image (401, 403), and not the login that it was shown. Author: credentials are missing or not
    /// enough, or there is no such image, which some registries do not tell apart.
    #[error("{registry} denies access to {image} {}", as_whom(.user, *.of_host))]
    Denied {
        /// The reference.
        image: String,
        /// Who said so.
        registry: String,
        /// The account that was refused; none when no credentials were known for this registry.
        user: Option<String>,
        /// The account is one of the host's own.
        of_host: bool,
    },
    /// The registry cannot be reached, breaks off or fails on its side, after retries. Weather.
    #[error("{registry} cannot be reached: {reason}")]
    Unreachable {
        /// `host[:port]`.
        registry: String,
        /// What happened, in a few words.
        reason: String,
    },
    /// Bytes are not what their digest or size says. Weather or operator: the registry's storage, a proxy.
    #[error("{image} arrived damaged: {}{reason}", of_blob(.blob))]
    Corrupt {
        /// The reference.
        image: String,
        /// Which of its blobs, where it is one.
        blob: Option<Digest>,
        /// How; of a blob, the rest of a sentence about it.
        reason: String,
    },
    /// A blob of a layout folder is missing, or not what its name says. Operator: whoever writes the folder.
    #[error("{image} is damaged: {} {reason}", path.display())]
    DamagedLayout {
        /// The reference.
        image: String,
        /// The blob's file.
        path: PathBuf,
        /// The rest of a sentence about it.
        reason: String,
    },
    /// A file of a web server is not the one that the list of checksums beside it names. Weather, or its publisher.
    #[error("{image} does not fit {list}, which says {sum}: it {reason}")]
    NotAsListed {
        /// The reference.
        image: String,
        /// The list's address.
        list: String,
        /// What stands there.
        sum: String,
        /// The rest of a sentence about the file.
        reason: String,
    },
    /// No list of checksums beside a file of a web server names it. Author.
    #[error("no checksum of {image} is known: {reason}")]
    NotListed {
        /// The reference.
        image: String,
        /// Which lists there are, and what they lack.
        reason: String,
    },
    /// A single file is not the one whose digest stands behind its name. Author.
    #[error("{image} is another file than the digest behind its name says: it {reason}")]
    NotAsPinned {
        /// The reference.
        image: String,
        /// The rest of a sentence about the file.
        reason: String,
    },
    /// A file of this host is not what it was when its reading began. Operator.
    #[error("{image} changed while it was read: it {reason}")]
    Changed {
        /// The reference.
        image: String,
        /// The rest of a sentence about the file.
        reason: String,
    },
    /// Authentic bytes that cannot be decoded. Author: the image was built wrongly.
    #[error("{image} cannot be read: {reason}")]
    Malformed {
        /// The reference.
        image: String,
        /// Which part, and how.
        reason: String,
    },
    /// A well-formed image that is none of the formats we read. Author.
    #[error("{image} cannot be used: {reason}")]
    Unsupported {
        /// The reference.
        image: String,
        /// What was found, every media type by name.
        reason: String,
    },
    /// There is no variant for this machine. Author.
    #[error("{image} is not for {wanted}; it is for {found}")]
    WrongPlatform {
        /// The reference.
        image: String,
        /// `linux/amd64` and the like.
        wanted: String,
        /// The platforms that it has, separated by commas.
        found: String,
    },
    /// More bytes than the operator allows. Author, or operator by a higher limit.
    #[error("{image} is too large: its {what} has {size} bytes, and {limit} are allowed")]
    TooLarge {
        /// The reference.
        image: String,
        /// Manifest, virtual disk, …
        what: &'static str,
        /// What it has, in bytes (at least).
        size: u64,
        /// The limit, in bytes.
        limit: u64,
    },
    /// The image tries what no honest image does. Author.
    #[error("{image} is refused: {class}")]
    Hostile {
        /// The reference.
        image: String,
        /// The class of the attack.
        class: inspect::Hostility,
    },
    /// A label of ours has a value that makes no sense. Author.
    #[error("{image} is labelled wrongly: {label} {reason}")]
    Label {
        /// The reference.
        image: String,
        /// The label's name.
        label: &'static str,
        /// What its value should have been.
        reason: &'static str,
    },
    /// The store's file system has no room. Operator.
    #[error("no room for {image} in {}: {needed} bytes are needed{} and {free} are free, which is {} too few", dir.display(), of_them(*claimed), needed.saturating_sub(*free))]
    DiskFull {
        /// The reference.
        image: String,
        /// The store.
        dir: PathBuf,
        /// What the image needs at least, with what must stay free for others, in bytes.
        needed: u64,
        /// How much of that other pulls will still take that began before.
        claimed: u64,
        /// What is free, in bytes.
        free: u64,
    },
    /// The pull policy `never` (or a registry out of reach) and nothing in the store. Author or operator.
    #[error("{image} is not on this host, and its pull policy forbids fetching it")]
    NotCached {
        /// The reference.
        image: String,
    },
    /// It is here, and no more what came. Operator.
    #[error("{image} is damaged on this host ({reason}), and its pull policy forbids fetching it anew")]
    DamagedHere {
        /// The reference.
        image: String,
        /// Its digest.
        digest: Digest,
        /// Which file, and how.
        reason: String,
    },
    /// It is here, and only its registry could say whether this job may have it. Author or operator.
    #[error(
        "{image} is private, and its pull policy forbids asking its registry whether this job may have it"
    )]
    NotGranted {
        /// The reference.
        image: String,
    },
    /// It was asked for by its digest, and is not in the store. Operator.
    #[error("the image {digest} is not on this host")]
    NotHere {
        /// The digest.
        digest: Digest,
    },
    /// A rule of the operator's for this image is not met. Author.
    #[error("{image} is refused by the rule {rule}: {reason}")]
    AgainstRule {
        /// The reference.
        image: String,
        /// The rule, as the settings spell it.
        rule: &'static str,
        /// What is missing.
        reason: String,
    },
    /// A key of the settings cannot be used. Operator.
    #[error("the key {} cannot be used: {reason}", path.display())]
    KeyFile {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Another process fetches the same image and does not come to an end. Weather.
    #[error("{image} is being fetched by another process, which was not done after {seconds} s")]
    WaitedTooLong {
        /// The reference.
        image: String,
        /// How long we waited.
        seconds: u64,
    },
    /// A login that cannot be used; the error says whose it is.
    #[error(transparent)]
    Credentials(#[from] credentials::CredentialsError),
    /// A CA file of the settings cannot be used. Operator.
    #[error("the CA file {} cannot be used: {reason}", path.display())]
    CaFile {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// What is to be written does not fit the format that was asked for. Whoever writes it: another format, or less.
    #[error("{format} cannot hold {what}")]
    CannotHold {
        /// The format, with its article.
        format: &'static str,
        /// What it cannot hold, and what can.
        what: &'static str,
    },
    /// A name that cannot be given to an image, such as a digest. Whoever writes it.
    #[error("{image} cannot be written to; images are written to tags of registries and layouts")]
    Unnameable {
        /// The reference.
        image: String,
    },
    /// The certificate that we should show a registry, or its key, cannot be used. Operator.
    #[error("the client certificate in {} cannot be used: {reason}", path.display())]
    ClientCertificate {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The registry does not let us write (401, 403). Whoever pushes: the account lacks a right.
    #[error("{registry} does not let us write {image} {}: the right {scope} is missing", as_whom(.user, false))]
    ScopeMissing {
        /// The reference.
        image: String,
        /// Who said so.
        registry: String,
        /// The account that was refused; none when no credentials were known for this registry.
        user: Option<String>,
        /// The right, as registries write it: `repository:NAME:pull,push`.
        scope: String,
    },
    /// The registry does not know this account, or not with this password. Whoever logs in.
    #[error("{registry} refuses the login of {}", quoted(.user))]
    LoginRefused {
        /// `host[:port]`.
        registry: String,
        /// The account's name.
        user: String,
    },
    /// The registry does not take what we send. Whoever pushes: the answer says what it does not like.
    #[error("{registry} refuses {what}: {reason}")]
    Refused {
        /// `host[:port]`.
        registry: String,
        /// A blob, the manifest, …
        what: &'static str,
        /// What it answered.
        reason: String,
    },
    /// The store itself cannot be read or written. Operator.
    #[error("{} cannot be used: {source}", path.display())]
    Storage {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

fn of_blob(blob: &Option<Digest>) -> String {
    blob.map_or_else(String::new, |blob| format!("the blob {blob} "))
}

fn where_(registry: &str) -> String {
    if registry.is_empty() {
        String::new()
    } else {
        format!(" (says {registry})")
    }
}

fn as_whom(user: &Option<String>, of_host: bool) -> String {
    match user {
        Some(user) if of_host => format!("to the host's user {}", quoted(user)),
        Some(user) => format!("to the user {}", quoted(user)),
        None => "without credentials".to_owned(),
    }
}

fn of_them(claimed: u64) -> String {
    match claimed {
        0 => String::new(),
        claimed => format!(", {claimed} of them for pulls that began before,"),
    }
}

impl Error {
    /// A failed system call on a file of the store.
    pub(super) fn storage(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Storage { path, source }
    }

    /// Is what was fetched before it good for a later pull?
    pub(super) fn lets_a_later_pull_go_on(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. }
                | Self::Denied { .. }
                | Self::DiskFull { .. }
                | Self::Storage { .. }
                | Self::Corrupt { .. }
                | Self::DamagedLayout { .. }
        )
    }

    /// May the next pull policy of the list be tried?
    ///
    /// Only when the registry was out of reach or this policy does not fetch: after a *denial* a cached copy
    /// would hand a private image to somebody whom its registry refuses.
    pub(super) fn lets_the_next_policy_try(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. }
                | Self::NotCached { .. }
                | Self::DamagedHere { .. }
                | Self::NotGranted { .. }
        )
    }

    /// May another registry be asked, that has the same images?
    ///
    /// Whatever a mirror lacks, refuses or has spoilt, the registry itself may give: it decides with its own credentials.
    pub(super) fn lets_the_next_endpoint_try(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. } | Self::NotFound { .. } | Self::Denied { .. } | Self::Corrupt { .. }
        )
    }
}

/// A stranger's text as an error may repeat it: in backquotes, cut, without control characters.
pub(super) fn quoted(text: &str) -> String {
    let mut out = String::from("`");
    for (count, c) in text.chars().enumerate() {
        if count == QUOTE_MAX {
            out.push('…');
            break;
        }
        // Also the marks that reorder a line's letters on a terminal.
        let hidden = c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        out.push(if hidden { '\u{fffd}' } else { c });
    }
    out.push('`');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strangers_text_cannot_write_lines_or_colours() {
        assert_eq!(
            quoted("a\nb\x1b[31m\u{202e}c"),
            "`a\u{fffd}b\u{fffd}[31m\u{fffd}c`"
        );
        assert_eq!(quoted(&"x".repeat(500)).chars().count(), QUOTE_MAX + 3);
    }

    #[test]
    fn after_a_denial_no_other_policy_is_tried() {
        let image = || "r/vm:1".to_owned();
        assert!(
            Error::Unreachable {
                registry: "r".into(),
                reason: "x".into()
            }
            .lets_the_next_policy_try()
        );
        assert!(Error::NotCached { image: image() }.lets_the_next_policy_try());
        assert!(
            !Error::Denied {
                image: image(),
                registry: "r".into(),
                user: None,
                of_host: false
            }
            .lets_the_next_policy_try()
        );
        assert!(
            !Error::NotFound {
                image: image(),
                registry: "r".into()
            }
            .lets_the_next_policy_try()
        );
    }
}
