//! What went wrong, whose fault it is, and what to do about it.
//!
//! | fault | who mends it | exit code for gitlab-runner | does the runner try again? |
//! |---|---|---|---|
//! | [`Fault::Script`] | the job's author, in the script | `BUILD_FAILURE_EXIT_CODE`, the true code in `BUILD_EXIT_CODE_FILE` | no |
//! | [`Fault::Author`] | the job's author, in `.gitlab-ci.yml` | `BUILD_FAILURE_EXIT_CODE` | no |
//! | [`Fault::System`] | the operator, or time | `SYSTEM_FAILURE_EXIT_CODE` | yes, while preparing |
//!
//! Every module has its own error type; this is the one place where they become a [`Failure`].

use std::fmt;

use crate::guest;
use crate::image::{self, CredentialsError, Hostility, Origin};
use crate::machine;
use crate::record::{Ending, Reason};

/// Whose fault a failure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The user's script ended with this code, which is not 0.
    Script(i32),
    /// Only the job's author can mend it.
    Author,
    /// The operator must mend it, or it passes.
    System,
}

/// One failure, in words for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Whose fault it is.
    pub fault: Fault,
    /// What happened, to which thing: one sentence.
    pub message: String,
    /// What to do next, a sentence each.
    pub hints: Vec<String>,
}

impl Failure {
    /// The operator must mend it, or it passes.
    pub fn system(message: impl Into<String>) -> Self {
        Failure {
            fault: Fault::System,
            message: message.into(),
            hints: Vec::new(),
        }
    }

    /// Only the job's author can mend it.
    pub fn author(message: impl Into<String>) -> Self {
        Failure {
            fault: Fault::Author,
            message: message.into(),
            hints: Vec::new(),
        }
    }

    /// The user's script ended with this code.
    pub fn script(code: i32) -> Self {
        let message = format!("The script ended with exit code {code}.");
        Failure {
            fault: Fault::Script(code),
            message,
            hints: Vec::new(),
        }
    }

    /// What the author would have to mend, had the operator not chosen it: then it is the operator's.
    #[must_use]
    pub fn of_operator(mut self) -> Self {
        if self.fault == Fault::Author {
            self.fault = Fault::System;
        }
        self
    }

    /// What to do next, as whole sentences.
    pub fn advice(&self) -> impl Iterator<Item = String> + '_ {
        self.hints.iter().map(|hint| sentence(hint))
    }

    /// Adds what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&sentence(&self.message))?;
        for advice in self.advice() {
            write!(f, " {advice}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}

/// A text as a sentence: a capital first, unless it begins with a name, and a full stop.
fn sentence(text: &str) -> String {
    let text = text.trim_end();
    let first_word: &str = text.split(' ').next().unwrap_or_default();
    let plain = first_word.bytes().all(|b| b.is_ascii_lowercase() || b == b'\'');
    let keeps_its_case = !plain
        || matches!(
            first_word.trim_end_matches("'s"),
            "libvirt" | "gitlab-runner" | "sshd" | "cannery" | "qemu-img"
        );
    let mut out = String::with_capacity(text.len() + 1);
    let mut chars = text.chars();
    if let Some(first) = chars.next() {
        if keeps_its_case {
            out.push(first);
        } else {
            out.extend(first.to_uppercase());
        }
    }
    out.push_str(chars.as_str());
    if !out.ends_with(['.', '!', '?', ':']) {
        out.push('.');
    }
    out
}

impl From<&Failure> for Ending {
    fn from(failure: &Failure) -> Self {
        let reason = || Reason {
            message: failure.message.clone(),
            hints: failure.hints.clone(),
        };
        match failure.fault {
            Fault::Script(code) => Ending::Script {
                code,
                hints: failure.hints.clone(),
            },
            Fault::Author => Ending::Author(reason()),
            Fault::System => Ending::System(reason()),
        }
    }
}

/// The exit codes that gitlab-runner asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitCodes {
    /// `BUILD_FAILURE_EXIT_CODE`
    pub build: u8,
    /// `SYSTEM_FAILURE_EXIT_CODE`
    pub system: u8,
}

impl Default for ExitCodes {
    /// gitlab-runner's own values.
    fn default() -> Self {
        ExitCodes { build: 1, system: 2 }
    }
}

impl ExitCodes {
    /// The code for a failure.
    pub fn code(self, fault: Fault) -> u8 {
        match fault {
            Fault::Script(_) | Fault::Author => self.build,
            Fault::System => self.system,
        }
    }
}

impl From<crate::settings::Error> for Failure {
    fn from(e: crate::settings::Error) -> Self {
        Failure::system(e.to_string()).hint("docs/configure.md lists every key")
    }
}

impl From<crate::record::Error> for Failure {
    fn from(e: crate::record::Error) -> Self {
        use crate::record::Error as E;
        let failure = Failure::system(e.to_string());
        match e {
            E::Io { source, .. } => permission_hint(failure, &source),
            E::Damaged { .. } => failure.hint("`cannery reap` removes what it belonged to"),
            E::Newer { .. } => failure.hint("Install that version again, or wait until its jobs are done"),
            E::Gone(_) => failure.hint("Someone cancelled the job, or its runner gave it up"),
            E::Locked(..) => failure.hint("`cannery vm list` shows the job; the process that holds it hangs"),
        }
    }
}

impl From<crate::ticket::Error> for Failure {
    fn from(e: crate::ticket::Error) -> Self {
        use crate::ticket::Error as E;
        match e {
            E::Record(e) => e.into(),
            E::Gone(_) => Failure::system(e.to_string()).hint("`cannery vm list` shows those that have one"),
            E::Random(_) => Failure::system(e.to_string()),
        }
    }
}

impl From<crate::host::Error> for Failure {
    fn from(e: crate::host::Error) -> Self {
        use crate::host::Error as E;
        let failure = Failure::system(e.to_string());
        match e {
            E::Full { .. } | E::NoSlot { .. } => failure.hint(
                "Give gitlab-runner a `concurrent` no greater than host.max_machines and network.slots; `cannery vm list` shows who has them",
            ),
            E::Io { source, .. } => permission_hint(failure, &source),
        }
    }
}

impl From<guest::helper::Error> for Failure {
    fn from(e: guest::helper::Error) -> Self {
        use guest::helper::Error as E;
        match e {
            E::Ssh(e) => e.into(),
            E::Unreadable { .. } | E::NoProgram { .. } | E::NoPlace(_) => {
                Failure::system(e.to_string()).hint("Correct guest.helper in the settings, or leave it out")
            }
        }
    }
}

impl From<crate::job::Error> for Failure {
    fn from(e: crate::job::Error) -> Self {
        use crate::job::Error as E;
        match &e {
            E::Variable { .. } => {
                Failure::author(e.to_string()).hint("Correct the variable in .gitlab-ci.yml")
            }
            E::NotARunner(_) => {
                Failure::system(e.to_string()).hint("docs/install.md shows how to point gitlab-runner at it")
            }
            E::Unreadable { .. } | E::Malformed { .. } => {
                Failure::system(e.to_string()).hint("gitlab-runner 15.0 or newer is needed")
            }
        }
    }
}

impl From<image::Error> for Failure {
    fn from(e: image::Error) -> Self {
        use image::Error as E;
        let message = e.to_string();
        let (system, author) = (Failure::system(&message), Failure::author(&message));
        match e {
            E::NotFound { image, .. } if image.contains("://") => author.hint("Is its address right?"),
            E::NotFound { .. } => author.hint("Is the name right, and was the tag pushed?"),
            E::NotListed { .. } => author.hint("Write #sha256=HEX behind its address, or have it added to the list"),
            E::NotAsPinned { .. } => author.hint("Write the digest of the file that is meant"),
            E::Denied { of_host: true, .. } => {
                author.hint("Is the name right? If it is, ask the runner's operator to give this account access to it")
            }
            E::Denied { .. } => {
                author.hint("Give the job credentials for it in DOCKER_AUTH_CONFIG, log in with `cannery login` on the runner's host, or ask for access to its project")
            }
            E::Malformed { .. } | E::Unsupported { .. } => {
                author.hint("docs/images.md lists the formats that are read")
            }
            E::WrongPlatform { .. } => author.hint("Build the image for this platform, or choose another runner by its tags"),
            E::TooLarge { what: "kernel or initrd", .. } => author.hint("Build the image with a smaller one"),
            E::TooLarge { .. } => author.hint("Build a smaller image, or ask the runner's operator to raise images.max_disk"),
            E::Hostile { class: Hostility::ForeignFormat(format), .. } => author.hint(as_qcow2(format)),
            E::Hostile { .. } => author.hint("Build the image anew, from a disk that you trust"),
            E::Label { .. } => author.hint("Correct the label where the image is built"),
            E::AgainstRule { rule: "require_digest", .. } => author.hint("Name the image as repository@sha256:…"),
            E::AgainstRule { .. } => author.hint("Use an image that the runner's operator has signed, or ask for its signature"),
            E::KeyFile { .. } => system.hint("Correct signed_by in the settings"),
            E::NotCached { .. } | E::NotGranted { .. } => author.hint("Use the pull policy if-not-present or always"),
            E::DamagedHere { digest, .. } => system.hint(format!("`cannery image verify {digest}` fetches it anew, as does a pull by another policy")),
            E::NotHere { .. } => system.hint("`cannery image list` shows those that are"),
            E::Credentials(CredentialsError::Refused { registry, origin, .. }) => match origin {
                Origin::JobGiven => author.hint("Give the job a login in DOCKER_AUTH_CONFIG whose password or token is still good"),
                Origin::Host => system.hint(format!("Its password or token is no longer good: call `cannery login {registry}` on the host, as the user who runs the jobs")),
            },
            E::Credentials(e) => match e.origin() {
                Origin::JobGiven => author.hint("It must be a docker config.json with plain \"auths\""),
                Origin::Host => system.hint("Correct the file in images.auth_files, or what its credential helper needs"),
            },
            E::Unreachable { .. } => system.hint("Is it up, and does images.plain_http, images.ca_files or images.private_registries need an entry for it?"),
            E::Corrupt { .. } => system.hint("Something between the registry's storage and this host changes data; push the image again if it stays so"),
            E::DamagedLayout { .. } => system.hint("Remove that file if it is there, and write the image into the folder again, with `cannery image push` or `skopeo copy`"),
            E::NotAsListed { .. } => system.hint("The file or the list is out of date, or something on the way changes data; #sha256=HEX behind the address says which file is meant, whatever the list says"),
            E::Changed { .. } => system.hint("Put a new version in its place by renaming it, and never write into the one that is there"),
            E::DiskFull { .. } => system.hint("`cannery image prune --all` removes the images that nothing uses; images.keep_free says what must stay free"),
            E::WaitedTooLong { .. } => system.hint("Look at the other job; the next try begins anew"),
            E::CaFile { .. } => system.hint("Correct the file, or its name in images.ca_files or the registry's ca_file"),
            E::ClientCertificate { .. } => system.hint("Correct client_cert and client_key in the settings' table for this registry"),
            E::ScopeMissing { .. } => author.hint("Log in with cannery login as somebody who may push there"),
            E::LoginRefused { .. } => author.hint("Is the password right? Some registries want a token instead"),
            E::Refused { .. } => author.hint("The registry's own log says more"),
            E::CannotHold { .. } => system.hint("Choose another --format"),
            E::Unnameable { .. } => system.hint("Name a tag"),
            E::Storage { source, .. } => permission_hint(system, &source),
        }
    }
}

/// How a disk of another format becomes one that is taken.
fn as_qcow2(format: &str) -> String {
    // By qemu-img's own names.
    let driver = match format {
        "vhd" => "vpc",
        "vmdk" | "vhdx" | "qed" | "vdi" | "parallels" | "bochs" | "cloop" | "dmg" => format,
        "lz4" | "Apple's lz4" | "7z" | "zip" | "bzip2" | "gzip" | "zstd" | "xz" => {
            return "Unpack it first".to_owned();
        }
        _ => return "Write it as qcow2 with the program that made it".to_owned(),
    };
    format!("`qemu-img convert -f {driver} -O qcow2 DISK NEW.qcow2` makes a qcow2 of it")
}

impl From<machine::libvirt::Error> for Failure {
    fn from(e: machine::libvirt::Error) -> Self {
        use machine::libvirt::Error as E;
        let failure = Failure::system(e.to_string());
        match e {
            E::Unreachable { .. } => {
                failure.hint("Is libvirtd running, and is libvirt.uri in the settings right?")
            }
            E::Denied { .. } => failure.hint("Run it as root, or put the user into the group libvirt"),
            E::Late { .. } => failure.hint(
                "Is the host overloaded, or /dev/kvm not root:kvm 0660? docs/troubleshoot.md knows more",
            ),
            E::Refused { .. } => failure.hint("libvirt's own log says more: journalctl -u libvirtd"),
            E::NoMachine(_) => failure.hint("`cannery vm list` shows the machines that there are"),
            E::NoScreen(_) => failure.hint("Its serial log shows what its guest said: `cannery job show`"),
            E::Panicked(_) | E::Answer(_) => failure.hint("Please report it with libvirt's version"),
        }
    }
}

impl From<machine::network::Error> for Failure {
    fn from(e: machine::network::Error) -> Self {
        use machine::network::{Error as E, firewall};
        match e {
            E::Libvirt(e) => e.into(),
            e @ E::Firewall(firewall::Error::Tool(_)) => {
                Failure::system(e.to_string()).hint("Install nftables")
            }
            e => Failure::system(e.to_string()),
        }
    }
}

impl From<machine::overlay::Error> for Failure {
    fn from(e: machine::overlay::Error) -> Self {
        use machine::overlay::Error as E;
        let failure = Failure::system(e.to_string());
        match e {
            E::Full(_) => failure.hint("Make room on the state folder's file system"),
            E::Missing { source, .. } | E::Write { source, .. } => permission_hint(failure, &source),
            E::Tool(_) => failure.hint("Install qemu-utils"),
            E::TooSmall { .. } | E::Late | E::Failed(_) => failure,
        }
    }
}

impl From<machine::xml::domain::Error> for Failure {
    fn from(e: machine::xml::domain::Error) -> Self {
        Failure::system(e.to_string())
    }
}

impl From<guest::ssh::Error> for Failure {
    fn from(e: guest::ssh::Error) -> Self {
        use guest::ssh::Error as E;
        let failure = Failure::system(e.to_string());
        match e {
            E::TimedOut { .. } => failure.hint("The image must start an SSH server and ask for its address by DHCP; a slow host needs a longer guest.boot_timeout"),
            E::Denied { .. } => failure.hint("Check guest.user; an image that reads neither systemd credentials nor a cloud-init seed needs guest.key_file or guest.password"),
            E::HostKey { .. } => failure.hint("The image did not take the job's host key: give guest.key_file or guest.password for it"),
            E::KeyUnusable { .. } => failure.hint("It must be an OpenSSH private key without a passphrase"),
            E::Lost(_) | E::Silent(_) => failure.hint("The guest or its network stopped answering; its serial log may say why"),
            E::Refused(_) | E::TooSlow(_) | E::Host { .. } | E::Stopped => failure,
        }
    }
}

impl From<guest::ready::Error> for Failure {
    fn from(e: guest::ready::Error) -> Self {
        match e {
            guest::ready::Error::Machine(why) => Failure::system(why).hint(
                "The image must boot on this hardware and stay up; the serial log shows how far it came",
            ),
            guest::ready::Error::Ssh(e) => e.into(),
        }
    }
}

impl From<guest::script::Error> for Failure {
    fn from(e: guest::script::Error) -> Self {
        use guest::script::Error as E;
        let message = e.to_string();
        match e {
            E::NoShell(_) => Failure::author(message).hint("Use an image that has it"),
            E::NoRoom(_) => Failure::system(message)
                .hint("The guest's disk or memory is full: ask for more with CANNERY_DISK or CANNERY_MEMORY"),
            E::NotStarted(_) => {
                Failure::system(message).hint("The image needs /bin/sh and a login shell that runs commands")
            }
            E::Cut => Failure::system(message)
                .hint("The guest may have run out of memory: CANNERY_MEMORY asks for more"),
            E::Machine(_) => {
                Failure::system(message).hint("The job's machine ended under it; nothing more can run there")
            }
            E::Ssh(e) => e.into(),
            E::Cancel(_) | E::Output(_) => Failure::system(message),
        }
    }
}

impl From<machine::accelerator::Error> for Failure {
    fn from(e: machine::accelerator::Error) -> Self {
        Failure::system(e.to_string())
    }
}

impl From<guest::introduction::IntroductionError> for Failure {
    fn from(e: guest::introduction::IntroductionError) -> Self {
        use guest::introduction::IntroductionError as E;
        match e {
            E::User(_) => Failure::author(e.to_string())
                .hint("Correct image:docker:user, or the image's io.cannery.user label"),
            E::Hostname(_) | E::MachineId(_) => Failure::system(e.to_string()),
        }
    }
}

impl From<guest::introduction::SeedError> for Failure {
    fn from(e: guest::introduction::SeedError) -> Self {
        permission_hint(Failure::system(e.to_string()), &e.source)
    }
}

impl From<guest::keys::KeyError> for Failure {
    fn from(e: guest::keys::KeyError) -> Self {
        Failure::system(e.to_string())
    }
}

/// What helps when the system refused or had no room.
fn permission_hint(failure: Failure, error: &std::io::Error) -> Failure {
    match error.kind() {
        std::io::ErrorKind::PermissionDenied => failure.hint(
            "Run it as root or as a member of the groups cannery and libvirt; the first call as root makes the state folder",
        ),
        std::io::ErrorKind::StorageFull => failure.hint("Make room on that file system"),
        _ => failure,
    }
}

#[cfg(test)]
mod tests;
