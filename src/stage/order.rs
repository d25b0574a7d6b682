//! What a job gets: what it asked for, within what the operator's settings allow. No effects.

use crate::image::{Credentials, Origin, PullPolicy, Reference};
use crate::job::Job;
use crate::outcome::Failure;
use crate::report::plain;
use crate::settings::file::{self, Services};
use crate::settings::{GuestSettings, ImageSettings, MachineSettings, Settings};

/// A job's image, and the hardware and the way in that go with it.
#[derive(Debug)]
pub struct Order {
    /// The image.
    pub reference: Reference,
    /// Its full name, which the settings' patterns were matched with.
    pub image: String,
    /// When the registry is asked, one after the other until one works.
    pub policies: Vec<PullPolicy>,
    /// The hardware.
    pub machine: MachineSettings,
    /// The way in.
    pub guest: GuestSettings,
    /// Whom the job runs as, where the job itself says so.
    pub user: Option<String>,
}

impl Order {
    /// Decides what a job gets, or why it gets nothing.
    pub fn new(job: &Job, settings: &Settings) -> Result<Order, Failure> {
        if settings.services == Services::Refuse && !job.services.is_empty() {
            let names: Vec<String> = job.services.iter().map(|s| plain(s, 80)).collect();
            return Err(Failure::author(format!("the job asks for services ({}), and a virtual machine has none beside it", names.join(", ")))
                .hint("Start what the job needs in its script, or ask the runner's operator to set services = \"ignore\""));
        }
        let reference = reference(job, &settings.images)?;
        let image = reference.to_string();
        allowed(&reference, &image, job, settings)?;
        platform(job)?;
        let guest = settings.guest(&image);
        let user = user(job, &guest)?;
        Ok(Order {
            policies: policies(job, &settings.images)?,
            machine: settings.machine(&image),
            guest,
            user,
            reference,
            image,
        })
    }

    /// The credentials that may be shown to the image's registry, the job's own before the host's.
    pub fn credentials(&self, job: &Job, settings: &ImageSettings) -> Result<Credentials, Failure> {
        let mut credentials = Credentials::none();
        if let Some(config) = &job.auth_config {
            let own = Credentials::from_docker_config(config.reveal(), Origin::JobGiven).map_err(|e| {
                Failure::author(format!("DOCKER_AUTH_CONFIG cannot be used: {e}")).hint(
                    "It must be the text of a docker config.json with the logins themselves under \"auths\"",
                )
            })?;
            credentials = credentials.or(own);
        }
        for given in &job.credentials {
            credentials = credentials.or(Credentials::basic(
                &given.url,
                &given.username,
                given.password.clone(),
            ));
        }
        if settings
            .host_credentials
            .iter()
            .any(|pattern| pattern.fits(&self.image))
        {
            credentials = credentials.or(host_credentials(settings)?);
        }
        Ok(credentials)
    }
}

/// The logins in the host's own auth files; files that do not exist are passed over.
pub(super) fn host_credentials(settings: &ImageSettings) -> Result<Credentials, Failure> {
    let mut credentials = Credentials::none();
    for file in settings.auth_files.iter().filter(|f| f.exists()) {
        let cannot = |e: &dyn std::fmt::Display| {
            Failure::system(format!("the auth file {} cannot be used: {e}", file.display()))
                .hint("Correct it, or name another in images.auth_files")
        };
        let text = std::fs::read_to_string(file).map_err(|e| cannot(&e))?;
        let of_host = Credentials::from_docker_config(&text, Origin::Host).map_err(|e| cannot(&e))?;
        credentials = credentials.or(of_host);
    }
    Ok(credentials)
}

/// The image that the job names, else the operator's default.
fn reference(job: &Job, settings: &ImageSettings) -> Result<Reference, Failure> {
    match (&job.image, &settings.default) {
        (Some(name), _) => name.parse().map_err(|e| {
            Failure::author(format!("image: {e}")).hint("Write registry.example.com/group/image:tag")
        }),
        (None, Some(name)) => name
            .parse()
            .map_err(|e| Failure::system(format!("images.default: {e}")).hint("Correct it in the settings")),
        (None, None) => Err(
            Failure::author("the job names no image, and this runner has no default image")
                .hint("Add image: to the job in .gitlab-ci.yml"),
        ),
    }
}

/// May a job use this image?
fn allowed(reference: &Reference, name: &str, job: &Job, settings: &Settings) -> Result<(), Failure> {
    let shown = plain(name, 200);
    let images = &settings.images;
    // What the operator chose needs no further leave.
    if job.image.is_none()
        || images.default.as_deref().and_then(|d| d.parse().ok()).as_ref() == Some(reference)
    {
        return Ok(());
    }
    let (registry, repository) = match reference {
        Reference::Registry { registry, .. } => (Some(registry), reference.place()),
        Reference::Web { .. } => (None, reference.place()),
        Reference::File { path, .. } => {
            let real = |p: &std::path::Path| p.canonicalize().ok();
            let below = |path: std::path::PathBuf| {
                let folders = images.files.iter().filter_map(|folder| real(folder));
                folders.into_iter().any(|folder| path.starts_with(folder))
            };
            return if real(path).is_some_and(below) {
                Ok(())
            } else {
                Err(Failure::author(format!(
                    "the image {shown} is not allowed on this runner: its folder is not listed"
                ))
                .hint("Ask the runner's operator to add the folder to images.files"))
            };
        }
        Reference::Layout { dir, .. } => {
            // Both are resolved: a link in a listed folder leads out of it otherwise.
            let real = |p: &std::path::Path| p.canonicalize().ok();
            let listed = |dir| images.layouts.iter().any(|l| real(l).as_ref() == Some(&dir));
            return if real(dir).is_some_and(listed) {
                Ok(())
            } else {
                Err(Failure::author(format!(
                    "the image {shown} is not allowed on this runner: its folder is not listed"
                ))
                .hint("Ask the runner's operator to add the folder to images.layouts"))
            };
        }
    };
    let fits = |pattern: &crate::settings::Pattern| pattern.fits(name) || pattern.fits(&repository);
    let ok = match &images.allow {
        Some(patterns) => patterns.iter().any(fits),
        None => {
            settings.names_image(name)
                || registry.is_some_and(|registry| job.credentials.iter().any(|c| c.url == *registry))
        }
    };
    if ok {
        return Ok(());
    }
    let failure = Failure::author(format!("the image {shown} is not allowed on this runner"));
    Err(match &images.allow {
        Some(patterns) if !patterns.is_empty() => {
            let list: Vec<&str> = patterns.iter().map(|p| p.as_str()).collect();
            failure.hint(format!("images.allow allows {}", list.join(", ")))
        }
        _ => failure.hint("Ask the runner's operator to add it to images.allow"),
    })
}

/// Is the platform that the job names this host's?
fn platform(job: &Job) -> Result<(), Failure> {
    let Some(platform) = &job.platform else {
        return Ok(());
    };
    let ours = match std::env::consts::ARCH {
        "x86_64" => "linux/amd64",
        "aarch64" => "linux/arm64",
        other => other,
    };
    let same = platform == ours || platform.strip_prefix("linux/") == ours.strip_prefix("linux/");
    if same {
        return Ok(());
    }
    Err(Failure::author(format!(
        "the job asks for the platform {}, and this runner has {ours}",
        plain(platform, 40)
    ))
    .hint("Leave image:docker:platform out, or choose another runner by its tags"))
}

/// The user that the job names, if the operator lets it.
fn user(job: &Job, guest: &GuestSettings) -> Result<Option<String>, Failure> {
    let Some(user) = &job.user else { return Ok(None) };
    if guest.user.as_ref() == Some(user) || guest.allow_users.contains(user) {
        return Ok(Some(user.clone()));
    }
    let failure = Failure::author(format!("the job may not run as the user {}", plain(user, 40)));
    Err(match guest.allow_users.as_slice() {
        [] => failure
            .hint("Leave image:docker:user out, or ask the runner's operator to add it to guest.allow_users"),
        users => failure.hint(format!("image:docker:user may be {}", users.join(", "))),
    })
}

/// When the registry is asked: as the job says where it may, else as the operator says.
fn policies(job: &Job, settings: &ImageSettings) -> Result<Vec<PullPolicy>, Failure> {
    let ours = |policy: &file::PullPolicy| match policy {
        file::PullPolicy::Always => PullPolicy::Always,
        file::PullPolicy::IfNotPresent => PullPolicy::IfNotPresent,
        file::PullPolicy::Never => PullPolicy::Never,
    };
    if job.pull_policy.is_empty() {
        return Ok(settings.pull_policy.iter().map(ours).collect());
    }
    let wanted =
        |text: &String| {
            let policy = match text.as_str() {
                "always" => file::PullPolicy::Always,
                "if-not-present" => file::PullPolicy::IfNotPresent,
                "never" => file::PullPolicy::Never,
                other => {
                    return Err(Failure::author(format!(
                        "image:pull_policy \"{}\" is none that there is",
                        plain(other, 40)
                    ))
                    .hint("Write always, if-not-present or never"));
                }
            };
            if settings.allowed_pull_policies.contains(&policy) {
                Ok(ours(&policy))
            } else {
                Err(Failure::author(format!("image:pull_policy {text} is not allowed on this runner"))
                .hint("Leave it out, or ask the runner's operator to add it to images.allowed_pull_policies"))
            }
        };
    job.pull_policy.iter().map(wanted).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::job::{Environment, Response};
    use crate::outcome::Fault;
    use crate::settings::{self, Sources};

    fn settings(text: &str) -> Settings {
        let path = Path::new("/etc/cannery/cannery.toml");
        Settings::resolve(settings::parse(text, path).unwrap(), path, &Sources::default()).unwrap()
    }

    fn job(image: &str) -> Job {
        let text = format!(
            r#"{{"id": 1, "image": {image}, "credentials":
              [{{"type": "registry", "url": "registry.gitlab.example.com", "username": "u", "password": "p"}}]}}"#
        );
        Job::new(
            Response::parse(text.as_bytes()).unwrap(),
            &Environment::default(),
            Path::new("/r"),
        )
    }

    fn order(image: &str, text: &str) -> Result<Order, Failure> {
        Order::new(&job(&format!(r#"{{"name": "{image}"}}"#)), &settings(text))
    }

    #[test]
    fn without_a_list_only_what_the_operator_or_gitlab_named_is_allowed() {
        let text = r#"
            [images]
            default = "registry.example.com/vm/default:1"
            [image."registry.example.com/vm/special*"]
            machine.cpus = 4
        "#;
        for image in [
            "registry.example.com/vm/default:1",
            "registry.example.com/vm/special:2",
            "registry.gitlab.example.com/grp/demo/vm:1",
        ] {
            order(image, text).unwrap();
        }
        for image in [
            "registry.example.com/vm/other:1",
            "registry.gitlab.example.com.evil.example/vm:1",
            "registry.gitlab.example.com:5000/vm:1",
            "oci:/etc:tag",
        ] {
            let failure = order(image, text).unwrap_err();
            assert_eq!(failure.fault, Fault::Author, "{image}");
            assert!(failure.to_string().contains("not allowed"), "{failure}");
        }
        let nothing = Order::new(&job("null"), &settings(text)).unwrap();
        assert_eq!(nothing.image, "registry.example.com/vm/default:1");
    }

    #[test]
    fn a_list_decides_alone_and_is_named() {
        let text = "[images]\nallow = [\"registry.example.com/vm/*\"]";
        let digest = "registry.example.com/vm/a@sha256:0000000000000000000000000000000000000000000000000000000000000000";
        for image in ["registry.example.com/vm/a:1", digest] {
            order(image, text).unwrap();
        }
        for image in [
            "registry.example.com/vm/team/a:1",
            "registry.gitlab.example.com/grp/vm:1",
        ] {
            let failure = order(image, text).unwrap_err();
            assert!(
                failure
                    .to_string()
                    .contains("images.allow allows registry.example.com/vm/*"),
                "{failure}"
            );
        }
    }

    #[test]
    fn a_folder_must_be_listed_itself() {
        let dir = tempfile::tempdir().unwrap();
        let (listed, other) = (dir.path().join("listed"), dir.path().join("other"));
        std::fs::create_dir_all(&listed).unwrap();
        std::fs::create_dir_all(&other).unwrap();
        let text = format!("[images]\nlayouts = [\"{}\"]", listed.display());
        order(&format!("oci:{}:x", listed.display()), &text).unwrap();
        for bad in [
            other.display().to_string(),
            format!("{}/../other", listed.display()),
        ] {
            assert!(order(&format!("oci:{bad}:x"), &text).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_file_must_lie_below_a_listed_folder_whatever_way_leads_there() {
        let dir = tempfile::tempdir().unwrap();
        let (listed, other) = (dir.path().join("listed"), dir.path().join("other"));
        std::fs::create_dir_all(listed.join("deep")).unwrap();
        std::fs::create_dir_all(&other).unwrap();
        for file in [
            listed.join("a.img"),
            listed.join("deep/b.img"),
            other.join("c.img"),
        ] {
            std::fs::write(file, b"x").unwrap();
        }
        std::os::unix::fs::symlink(other.join("c.img"), listed.join("c.img")).unwrap();
        let text = format!("[images]\nfiles = [\"{}\"]\nallow = [\"**\"]", listed.display());
        for good in ["a.img", "deep/b.img"] {
            order(&format!("file://{}/{good}", listed.display()), &text).unwrap();
        }
        for bad in [listed.join("c.img"), listed.join("none.img"), other.join("c.img")] {
            let failure = order(&format!("file://{}", bad.display()), &text).unwrap_err();
            assert!(failure.to_string().contains("folder is not listed"), "{failure}");
        }
    }

    #[test]
    fn a_disk_on_a_web_server_must_be_allowed_by_its_address() {
        let text = "[images]\nallow = [\"https://cloud.example.com/images/**\"]";
        order("https://cloud.example.com/images/12/debian.qcow2", text).unwrap();
        for bad in [
            "https://cloud.example.com/other/debian.qcow2",
            "http://cloud.example.com/images/12/debian.qcow2",
            "https://cloud.example.com.evil.org/images/12/debian.qcow2",
        ] {
            assert!(
                order(bad, text).unwrap_err().to_string().contains("not allowed"),
                "{bad}"
            );
        }
        assert!(order("https://cloud.example.com/images/debian.qcow2", "").is_err());
    }

    #[test]
    fn what_only_the_author_can_mend_is_the_authors() {
        let text = r#"
            [images]
            allow = ["**"]
            allowed_pull_policies = ["always"]
            [guest]
            allow_users = ["ci"]
        "#;
        let named = |rest: &str| format!(r#"{{"name": "registry.example.com/vm:1", {rest}}}"#);
        for (rest, part) in [
            (r#""pull_policy": ["never"]"#, "pull_policy never is not allowed"),
            (r#""pull_policy": ["sometimes"]"#, "none that there is"),
            (r#""executor_opts": {"docker": {"user": "root"}}"#, "may be ci"),
            (
                r#""executor_opts": {"docker": {"platform": "windows/s390x"}}"#,
                "platform windows/s390x",
            ),
        ] {
            let failure = Order::new(&job(&named(rest)), &settings(text)).unwrap_err();
            assert_eq!(failure.fault, Fault::Author, "{rest}");
            assert!(failure.to_string().contains(part), "{failure}");
        }
        let fine = named(r#""pull_policy": ["always"], "executor_opts": {"docker": {"user": "ci"}}"#);
        let order = Order::new(&job(&fine), &settings(text)).unwrap();
        assert_eq!(order.user.as_deref(), Some("ci"));
    }

    #[test]
    fn a_job_without_an_image_on_a_runner_without_a_default_is_told_so() {
        let failure = Order::new(&job("null"), &settings("")).unwrap_err();
        assert_eq!(failure.fault, Fault::Author);
        assert!(failure.to_string().contains("names no image"), "{failure}");
    }

    #[test]
    fn the_hosts_logins_serve_only_the_images_that_are_listed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("auth.json");
        // base64 of host:secret
        let logins = r#"{"auths": {"registry.example.com": {"auth": "aG9zdDpzZWNyZXQ="}}}"#;
        std::fs::write(&file, logins).unwrap();
        let text = format!(
            "[images]\nallow = [\"**\"]\nhost_credentials = [\"registry.example.com/vm/*\"]\nauth_files = [\"{}\"]",
            file.display()
        );
        for (image, expected) in [
            ("registry.example.com/vm/a:1", true),
            ("registry.example.com/other/a:1", false),
            ("registry.example.com/vm/team/a:1", false),
            ("registry.example.com.evil.example/vm/a:1", false),
        ] {
            let job = job(&format!(r#"{{"name": "{image}"}}"#));
            let settings = settings(&text);
            let order = Order::new(&job, &settings).unwrap();
            let credentials = order.credentials(&job, &settings.images).unwrap();
            assert_eq!(
                format!("{credentials:?}").contains("\"host\""),
                expected,
                "{image}"
            );
        }
    }
}
