use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use super::choose::choose;
use crate::cli::Context;
use crate::guest::keys::JobKeys;
use crate::outcome::Failure;
use crate::record::{self, Entry, Guest, JobDir, JobKey, Jobs};

/// Enter a machine with SSH, as the job's user, whether its job runs or its machine is held
///
/// The exit code is that of ssh: the command's own, or 255 where there was no connection.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// A job as `vm list` shows it, or its number where only one job has it
    #[arg(value_name = "JOB")]
    job: String,
    /// What to run instead of a shell
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// The guest's own key, in the job's folder: it goes with it.
const KNOWN_HOSTS: &str = "known_hosts";
/// Nothing secret is in it.
const KNOWN_HOSTS_MODE: u32 = 0o664;

pub(super) fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let settings = context.settings()?;
    let all = Jobs::look(&settings.state_dir).list()?;
    let job = choose(&all, &arguments.job)?;
    let key = job.key();
    let Some(record) = job.read()? else {
        return Err(Failure::system(format!("job {key} is just being removed")));
    };
    let Some(guest) = record.guest else {
        return Err(Failure::system(format!(
            "the guest of job {key} cannot be entered yet: it is {}",
            record.state
        ))
        .hint("`cannery vm list` shows when it is ready"));
    };
    let identity = match guest.entry {
        Entry::JobKey => Some(JobKeys::user_key_file(job.path())),
        Entry::KeyFile => settings.guest(&record.image.unwrap_or_default()).key_file,
        Entry::Password => {
            context.log.line(
                "cannery: this guest is entered with the password that the settings name (guest.password).",
            );
            None
        }
    };
    if let Some(file) = &identity {
        File::open(file).map_err(|e| unreadable(key, file, &e))?;
    }
    let known_hosts = introduce(job, &guest)?;
    // This process becomes ssh, which then has the terminal and its signals for itself.
    let error = Command::new("ssh")
        .args(options(key, &guest, identity.as_deref(), &known_hosts))
        .args(&arguments.command)
        .exec();
    let failure = Failure::system(format!("cannot start ssh: {error}"));
    Err(match error.kind() {
        io::ErrorKind::NotFound => failure.hint("Install OpenSSH's client (openssh-client)"),
        _ => failure,
    })
}

/// Writes down who the guest is, so that ssh knows it from the first connection.
fn introduce(job: &JobDir, guest: &Guest) -> Result<std::path::PathBuf, Failure> {
    let file = job.file(KNOWN_HOSTS);
    let line = format!("{} {}\n", job.key().machine_name(), guest.host_key);
    match record::write_atomic(&file, line.as_bytes(), KNOWN_HOSTS_MODE) {
        Ok(()) => Ok(file),
        Err(e) => {
            let failure = Failure::system(format!("cannot write {}: {e}", file.display()));
            Err(match e.kind() {
                io::ErrorKind::PermissionDenied => failure.hint(AS_ROOT),
                _ => failure,
            })
        }
    }
}

const AS_ROOT: &str = "Call it as root: sudo cannery vm ssh JOB";

/// Why the key cannot be used, and by whom it can.
fn unreadable(key: &JobKey, file: &Path, error: &io::Error) -> Failure {
    let failure = Failure::system(format!(
        "the key to the guest of job {key}, {}, cannot be read: {error}",
        file.display()
    ));
    if error.kind() != io::ErrorKind::PermissionDenied {
        return failure;
    }
    match file.metadata() {
        Ok(about) => failure.hint(format!(
            "It belongs to the user with the number {}, who runs gitlab-runner's jobs. {AS_ROOT}",
            about.uid()
        )),
        Err(_) => failure.hint(AS_ROOT),
    }
}

/// What ssh is told, up to the guest's name. Pure.
///
/// The user's own configuration, agent and keys stay out of it: the guest is to be entered as the job is, and a guest that was
/// written by strangers is to be offered nothing else.
fn options(key: &JobKey, guest: &Guest, identity: Option<&Path>, known_hosts: &Path) -> Vec<OsString> {
    let mut options: Vec<OsString> = ["-F", "none"].map(OsString::from).to_vec();
    let mut option = |name: &str, value: &dyn AsRef<std::ffi::OsStr>| {
        let mut text = OsString::from(format!("{name}="));
        text.push(value);
        options.extend(["-o".into(), text]);
    };
    option("HostKeyAlias", &key.machine_name());
    option("UserKnownHostsFile", &quoted(known_hosts));
    option("GlobalKnownHostsFile", &"/dev/null");
    option("StrictHostKeyChecking", &"yes");
    option("UpdateHostKeys", &"no");
    option("IdentityAgent", &"none");
    option("ForwardAgent", &"no");
    option("ForwardX11", &"no");
    match identity {
        Some(file) => {
            option("IdentitiesOnly", &"yes");
            option("IdentityFile", &quoted(file));
            option("PreferredAuthentications", &"publickey");
        }
        None => {
            option("PubkeyAuthentication", &"no");
            option("PreferredAuthentications", &"password,keyboard-interactive");
        }
    }
    option("Port", &guest.port.to_string());
    option("User", &guest.user);
    // A name never begins with a dash then, whatever the address is.
    options.extend(["--".into(), guest.address.to_string().into()]);
    options
}

/// A path as ssh_config(5) has it: in quotes, since it may have blanks, and with percent signs that stand for themselves.
fn quoted(path: &Path) -> OsString {
    let text = path.to_string_lossy().replace('%', "%%");
    format!("\"{text}\"").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest() -> Guest {
        Guest {
            address: [192, 168, 177, 5].into(),
            port: 2222,
            user: "ci".into(),
            entry: Entry::JobKey,
            host_key: "ssh-ed25519 AAAA".into(),
            shell: "bash".into(),
        }
    }

    fn text(options: Vec<OsString>) -> String {
        let options: Vec<String> = options.into_iter().map(|o| o.into_string().unwrap()).collect();
        options.join(" ")
    }

    #[test]
    fn ssh_is_told_whom_to_trust_and_nothing_of_the_callers_own() {
        let key: JobKey = "aaaa1111-7-2".parse().unwrap();
        let job = Path::new("/var/lib/can nery/50%");
        let with_key = text(options(
            &key,
            &guest(),
            Some(&job.join("user_key")),
            &job.join("known_hosts"),
        ));
        for part in [
            "-F none",
            "HostKeyAlias=cannery-aaaa1111-7-2",
            "UserKnownHostsFile=\"/var/lib/can nery/50%%/known_hosts\"",
            "IdentityFile=\"/var/lib/can nery/50%%/user_key\"",
            "StrictHostKeyChecking=yes",
            "IdentityAgent=none",
            "Port=2222",
            "User=ci",
        ] {
            assert!(with_key.contains(part), "{part} is not in {with_key}");
        }
        assert!(with_key.ends_with(" -- 192.168.177.5"), "{with_key}");
        let by_password = text(options(&key, &guest(), None, &job.join("known_hosts")));
        assert!(!by_password.contains("IdentityFile"), "{by_password}");
        assert!(by_password.contains("PubkeyAuthentication=no"), "{by_password}");
    }

    #[test]
    fn who_may_not_read_the_key_is_told_who_may() {
        let key: JobKey = "aaaa1111-7-2".parse().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        let told = unreadable(&key, folder.path(), &denied).to_string();
        assert!(
            told.contains("aaaa1111-7-2") && told.contains("sudo cannery vm ssh"),
            "{told}"
        );
        let uid = folder.path().metadata().unwrap().uid().to_string();
        assert!(told.contains(&format!("number {uid},")), "{told}");
    }
}
