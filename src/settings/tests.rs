use std::path::Path;

use super::file::{Accelerator, PullPolicy};
use super::*;
use crate::quantity::Size;
use crate::secret::Secret;

fn settings(text: &str) -> Result<Settings, String> {
    let path = Path::new("/etc/cannery/cannery.toml");
    let table = parse(text, path).map_err(|e| e.to_string())?;
    Settings::resolve(table, path, &Sources::default()).map_err(|e| e.to_string())
}

#[test]
fn an_empty_file_gives_the_defaults() {
    let s = settings("").unwrap();
    assert_eq!(s.state_dir, Path::new("/var/lib/cannery"));
    assert_eq!(s.libvirt_uri, "qemu:///system");
    assert_eq!(s.images.pull_policy, [PullPolicy::IfNotPresent]);
    assert_eq!((s.history_keep.as_secs(), s.history_size), (604_800, 200 << 20));
    assert!(s.hold_on_failure.is_zero() && s.hold_max.is_zero());
    let held = settings("[hold]\non_failure = \"5m\"").unwrap();
    assert_eq!(
        (held.hold_on_failure.as_secs(), held.hold_max.as_secs()),
        (300, 300)
    );
    let off = settings("[history]\nkeep = 0\nmax_size = \"1G\"").unwrap();
    assert_eq!((off.history_keep.as_secs(), off.history_size), (0, 1 << 30));
    let m = s.machine("registry.example.com/vm/debian:12");
    assert_eq!((m.cpus, m.max_cpus, m.accelerator), (None, 2, Accelerator::Auto));
    assert_eq!(m.max_memory, MachineSettings::DEFAULT_MEMORY);
}

#[test]
fn of_the_tables_that_fit_the_longest_wins_key_by_key() {
    let s = settings(
        r#"
        [machine]
        cpus = 1
        memory = "1G"
        [limits]
        cpus = 8
        [image."registry.example.com/**".machine]
        cpus = 2
        memory = "2G"
        [image."registry.example.com/vm/big*"]
        machine.cpus = 4
        guest.user = "ci"
        "#,
    )
    .unwrap();
    let big = s.machine("registry.example.com/vm/big:1");
    assert_eq!(
        (big.cpus, big.memory, big.max_cpus),
        (Some(4), Some(Size::gib(2)), 8)
    );
    let small = s.machine("registry.example.com/vm/small:1");
    assert_eq!((small.cpus, small.memory), (Some(2), Some(Size::gib(2))));
    let other = s.machine("other.example.com/x:1");
    assert_eq!((other.cpus, other.memory), (Some(1), Some(Size::gib(1))));
    assert_eq!(
        s.guest("registry.example.com/vm/big:1").user.as_deref(),
        Some("ci")
    );
    assert_eq!(s.guest("registry.example.com/vm/small:1").user, None);
}

#[test]
fn an_error_names_file_line_and_key() {
    for (text, expected) in [
        (
            "state_dir = \"/x\"\nstate_dri = 1\n",
            "/etc/cannery/cannery.toml:2:1: unknown field \"state_dri\"",
        ),
        ("[machine]\ncpus = \"many\"\n", "/etc/cannery/cannery.toml:2:8: "),
        (
            "[machine]\nmemory = \"lots\"\n",
            "/etc/cannery/cannery.toml:2:10: \"lots\" is not a size",
        ),
        (
            "[network]\nsubnet = \"10.0.0.1/24\"\n",
            "/etc/cannery/cannery.toml:2:10: \"10.0.0.1/24\" is not a network",
        ),
        (
            "[images]\nallow = [\"a[\"]\n",
            "/etc/cannery/cannery.toml:2:9: \"a[\" is not a pattern",
        ),
        (
            "[image.\"x\".machine]\nspeed = 1\n",
            "/etc/cannery/cannery.toml:2:1: unknown field \"speed\"",
        ),
        (
            "[network]\nhost_ports = [\"http\"]\n",
            "/etc/cannery/cannery.toml:2:14: \"http\" is not a port",
        ),
        ("x = \n", "/etc/cannery/cannery.toml:1:"),
    ] {
        let error = settings(text).unwrap_err();
        assert!(error.starts_with(expected), "{text}: {error}");
    }
}

#[test]
fn values_that_do_not_fit_together_are_refused() {
    for (text, expected) in [
        ("state_dir = \"relative\"", "not an absolute path"),
        ("[network]\nsubnet = \"10.0.0.0/29\"\nslots = 32", "which has 5"),
        (
            "[network]\nslots = 4\n[host]\nmax_machines = 5",
            "more than network.slots",
        ),
        (
            "[network]\nname = \"a\"\nlibvirt_network = \"b\"",
            "exclude each other",
        ),
        (
            "[network]\nname = \"much-too-long-for-a-bridge\"",
            "must be a letter",
        ),
        ("[machine]\ncpus = 0", "machine.cpus = 0"),
        (
            "[image.\"a/b\".machine]\ncpus = 0",
            "image.\"a/b\".machine.cpus = 0",
        ),
        ("[images]\npull_policy = []", "names no policy"),
        ("report_dir = \"/etc\"", "report_dir \"/etc\" is not a path below"),
        ("report_dir = \"a/../..\"", "is not a path below"),
        ("report_dir = \"\"", "is not a path below"),
        (
            "[hold]\non_failure = \"2h\"\nmax = \"1h\"",
            "hold.on_failure is longer than hold.max",
        ),
        ("[hold]\nmax = \"31 days\"", "longer than 30 days"),
    ] {
        let error = settings(text).unwrap_err();
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn a_named_file_must_exist_and_others_need_not() {
    let missing = sources(Some("/nonexistent/cannery.toml".into()), |_| None);
    assert!(matches!(missing.load(), Err(Error::Unreadable { .. })));
    let by_variable = sources(None, |name| {
        (name == "CANNERY_CONFIG").then(|| "/nonexistent/from-variable.toml".into())
    });
    assert!(
        by_variable
            .load()
            .unwrap_err()
            .to_string()
            .contains("from-variable.toml")
    );
}

#[test]
fn the_password_is_not_in_the_debug_text() {
    let s = settings("[guest]\npassword = \"hunter2\"").unwrap();
    assert_eq!(
        s.guest("x").password.as_ref().map(Secret::reveal),
        Some("hunter2")
    );
    assert!(!format!("{s:?}").contains("hunter2"));
}

#[test]
fn a_registry_has_a_table_of_its_own() {
    let s = settings(
        r#"
        [images]
        private_registries = ["*.corp.example", "10.0.0.0/8", "fd00::/8"]
        [registry."docker.io"]
        mirrors = ["mirror.example:5000", "[::1]:5000"]
        [registry."r.example:5000"]
        plain_http = true
        ca_file = "/ca.pem"
        client_cert = "/c.pem"
        client_key = "/c.key"
        "#,
    )
    .unwrap();
    assert_eq!(
        (s.images.registries.len(), s.images.private_registries.len()),
        (2, 3)
    );
    for (text, expected) in [
        ("[registry.\"https://r\"]", "is not a registry"),
        ("[registry.\"r\"]\nmirrors = [\"r/team\"]", "is not a registry"),
        ("[registry.\"r\"]\nclient_key = \"/k\"", "belong together"),
        ("[registry.\"r\"]\nmirror = \"m\"", "unknown field"),
        (
            "[images]\nprivate_registries = [\"10.0.0.0/40\"]",
            "prefix of 0 to 32",
        ),
        (
            "[images]\nprivate_registries = [\"r.example/team\"]",
            "neither host[:port] nor a network",
        ),
        ("[images]\nprivate_registries = [\"a[\"]", "is not a pattern"),
    ] {
        let error = settings(text).unwrap_err();
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn logins_are_looked_for_where_docker_and_podman_keep_them() {
    let files = |text: &str, variables: &[(&str, &str)]| {
        let sources = sources(None, |name| {
            let value = variables.iter().find(|(key, _)| *key == name)?.1;
            Some(value.into())
        });
        let path = Path::new("/etc/cannery/cannery.toml");
        let settings = Settings::resolve(parse(text, path).unwrap(), path, &sources).unwrap();
        settings.images.auth_files
    };
    let home = ("HOME", "/h");
    assert_eq!(
        files("", &[home]),
        [
            Path::new("/h/.docker/config.json"),
            Path::new("/h/.config/containers/auth.json")
        ]
    );
    let docker = ("DOCKER_CONFIG", "/d");
    assert_eq!(files("", &[home, docker])[0], Path::new("/d/config.json"));
    let podman = ("REGISTRY_AUTH_FILE", "/p.json");
    assert_eq!(files("", &[home, docker, podman]), [Path::new("/p.json")]);
    let named = files("[images]\nauth_files = [\"/a\"]", &[home, podman]);
    assert_eq!(named, [Path::new("/a")]);
}
