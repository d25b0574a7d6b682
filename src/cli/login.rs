use std::io::{BufRead as _, IsTerminal as _, Read as _, Write as _};
use std::path::PathBuf;

use rustix::termios::{self, LocalModes, OptionalActions, Termios};
use serde::Serialize;

use super::{Answer, Context, Patient, print, print_json};
use crate::image::{AuthFile, Keeper, verify_login};
use crate::outcome::Failure;
use crate::report::plain;
use crate::secret::Secret;
use crate::settings::Settings;
use crate::stage::images;

/// Longest password or token that is read, in bytes. Tokens of clouds have a few KiB.
const PASSWORD_MAX: u64 = 64 << 10;

/// Log in to a registry, and keep the login for this host
///
/// The registry is asked first. The login is kept where docker or podman would keep it, or in images.auth_files of the
/// settings; jobs use it for the images that images.host_credentials lists.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The account's name; asked for on a terminal
    #[arg(short, long, value_name = "NAME")]
    username: Option<String>,
    /// Read the password from stdin, whole
    #[arg(long)]
    password_stdin: bool,
    /// Refused: everybody on the host could read it
    #[arg(short, long, hide = true, value_name = "PASSWORD")]
    password: Option<String>,
    /// The registry, as references name it
    #[arg(value_name = "REGISTRY")]
    registry: String,
    /// How to print what was kept
    #[arg(long, value_enum, default_value = "text")]
    format: Answer,
}

/// A login that is kept; the JSON's keys are these names.
#[derive(Debug, Serialize)]
struct Kept {
    registry: String,
    username: String,
    /// The file, or the credential helper.
    kept_in: String,
}

pub(super) async fn run(context: &Context, arguments: Arguments) -> Result<(), Failure> {
    if arguments.password.is_some() {
        return Err(Failure::system(
            "a password on the command line is read by everybody on this host who lists processes",
        )
        .hint("Pipe it in with --password-stdin, or let cannery ask for it"));
    }
    let registry = registry(&arguments.registry)?;
    let settings = context.settings()?;
    let file = file(&settings)?;
    let shown = Shown::now();
    let (user, password) = tokio::select! {
        asked = account(arguments.username, arguments.password_stdin, &registry) => asked?,
        _ = tokio::signal::ctrl_c() => {
            // The thread that asks sleeps on, and cannot do it.
            drop(shown);
            say("\n");
            return Err(Failure::system("nobody was logged in"));
        }
    };
    let registries = images::registries(&settings)?;
    let progress = Patient::new(&context.log);
    verify_login(&registry, &user, &password, &registries, &progress).await?;
    let keeper = AuthFile::new(&file).keep(&registry, &user, &password).await?;
    let kept = Kept {
        registry,
        username: user,
        kept_in: match keeper {
            Keeper::File => file.display().to_string(),
            Keeper::Helper(helper) => format!("docker-credential-{helper}"),
        },
    };
    match arguments.format {
        Answer::Json => print_json(&kept)?,
        Answer::Text => print(&format!(
            "Logged in to {} as {}; the login is kept in {}.\n",
            kept.registry,
            plain(&kept.username, 100),
            kept.kept_in
        )),
    }
    if settings.images.host_credentials.is_empty() {
        context.log.line(
            "cannery: jobs do not use it: images.host_credentials lists no images that are fetched with the host's logins.",
        );
    }
    Ok(())
}

/// The name that logins are kept under.
pub(super) fn registry(text: &str) -> Result<String, Failure> {
    let bare = text
        .strip_prefix("https://")
        .or_else(|| text.strip_prefix("http://"))
        .unwrap_or(text)
        .trim_end_matches('/');
    let plain_byte = |b: u8| b.is_ascii_alphanumeric() || b"-._:[]".contains(&b);
    if bare.is_empty() || !bare.bytes().all(plain_byte) {
        return Err(Failure::system(format!("{} is no registry", plain(text, 100)))
            .hint("Write host or host:port, as in registry.example.com:5000"));
    }
    Ok(match bare {
        "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
        other => other.to_owned(),
    })
}

/// The file that logins are kept in: of those that are read, the first that exists, else the first.
pub(super) fn file(settings: &Settings) -> Result<PathBuf, Failure> {
    let files = &settings.images.auth_files;
    files
        .iter()
        .find(|file| file.exists())
        .or(files.first())
        .cloned()
        .ok_or_else(|| {
            Failure::system("there is no file to keep logins in").hint("Set images.auth_files, or HOME")
        })
}

/// Who logs in, from the arguments, stdin and the terminal.
async fn account(
    user: Option<String>,
    password_on_stdin: bool,
    registry: &str,
) -> Result<(String, Secret), Failure> {
    let registry = registry.to_owned();
    let reading = tokio::task::spawn_blocking(move || {
        if password_on_stdin {
            let user = user
                .ok_or_else(|| Failure::system("--password-stdin needs --username, since stdin is taken"))?;
            return Ok((user, whole_stdin()?));
        }
        if !std::io::stdin().is_terminal() {
            return Err(Failure::system("there is no terminal to ask for a password on")
                .hint("Pipe it in with --password-stdin"));
        }
        let user = match user {
            Some(user) => user,
            None => ask(&format!("Username for {registry}: "))?,
        };
        let password = {
            let _shown = Shown::now();
            hide();
            let password = ask(&format!("Password for {}: ", plain(&user, 100)));
            say("\n");
            password?
        };
        Ok((user, Secret::new(password)))
    });
    let (user, password) = reading
        .await
        .map_err(|e| Failure::system(format!("nothing could be read: {e}")))??;
    if user.is_empty() || password.reveal().is_empty() {
        return Err(Failure::system("a login needs a name and a password"));
    }
    Ok((user, password))
}

fn unreadable(error: std::io::Error) -> Failure {
    Failure::system(format!("stdin cannot be read: {error}"))
}

/// The password that is piped in. The newline that `echo` adds is none of it.
fn whole_stdin() -> Result<Secret, Failure> {
    let mut text = String::new();
    std::io::stdin()
        .lock()
        .take(PASSWORD_MAX)
        .read_to_string(&mut text)
        .map_err(unreadable)?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    Ok(Secret::new(text.strip_suffix('\r').unwrap_or(text)))
}

fn ask(question: &str) -> Result<String, Failure> {
    say(question);
    let mut line = String::new();
    std::io::stdin()
        .lock()
        .take(PASSWORD_MAX)
        .read_line(&mut line)
        .map_err(unreadable)?;
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

fn say(text: &str) {
    let mut terminal = std::io::stderr();
    // Nothing can be done about a closed terminal.
    drop(terminal.write_all(text.as_bytes()));
    drop(terminal.flush());
}

/// Has the terminal not show what is typed.
fn hide() {
    let stdin = std::io::stdin();
    if let Ok(mut modes) = termios::tcgetattr(&stdin) {
        modes.local_modes -= LocalModes::ECHO;
        // A terminal that cannot do it shows what is typed, as it always does.
        let _ = termios::tcsetattr(&stdin, OptionalActions::Flush, &modes);
    }
}

/// What the terminal was like, and is again when this value goes.
struct Shown(Option<Termios>);

impl Shown {
    fn now() -> Self {
        Self(termios::tcgetattr(std::io::stdin()).ok())
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = termios::tcsetattr(std::io::stdin(), OptionalActions::Now, before);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registry_is_named_as_in_references() {
        for (text, expected) in [
            ("registry.example.com", Some("registry.example.com")),
            ("https://r.example:5000/", Some("r.example:5000")),
            ("index.docker.io", Some("docker.io")),
            ("[::1]:5000", Some("[::1]:5000")),
            ("r.example/team", None),
            ("", None),
            ("a b", None),
        ] {
            assert_eq!(registry(text).ok().as_deref(), expected, "{text}");
        }
    }
}
