//! The documentation says what the program does.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::path::Path;

use cannery::settings;

fn page(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

/// The keys of a table, from the error about one that does not exist.
fn keys_of(table: &str) -> BTreeSet<String> {
    let header = if table.is_empty() {
        String::new()
    } else {
        format!("[{table}]\n")
    };
    let error = settings::parse(&format!("{header}no_such_key = 1\n"), Path::new("x"))
        .unwrap_err()
        .to_string();
    let (_, expected) = error
        .split_once("expected")
        .unwrap_or_else(|| panic!("{table}: {error}"));
    let names = expected.split('"').skip(1).step_by(2);
    names
        .map(|name| {
            if table.is_empty() {
                name.to_owned()
            } else {
                format!("{table}.{name}")
            }
        })
        .collect()
}

#[test]
fn the_configure_page_lists_every_key_and_no_other() {
    let tables = [
        "libvirt", "host", "images", "machine", "limits", "network", "guest", "history", "console", "hold",
    ];
    let mut real: BTreeSet<String> = keys_of("");
    for table in tables {
        assert!(real.remove(table), "{table}");
        real.extend(keys_of(table));
    }
    assert!(real.remove("image"));
    // A table for each registry: its keys are written with a registry's name.
    assert!(real.remove("registry"));
    real.extend(
        keys_of("registry.\"r\"")
            .into_iter()
            .map(|key| key.replace("\"r\"", "\"HOST\"")),
    );
    let page = page("docs/configure.md");
    let every = page
        .split("## Every key")
        .nth(1)
        .unwrap()
        .split("## What a job may set")
        .next()
        .unwrap();
    let documented: BTreeSet<String> = every
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .map(str::to_owned)
        .collect();
    assert_eq!(documented, real);
}

#[test]
fn every_settings_example_in_the_docs_is_accepted() {
    let mut examples = 0;
    for name in [
        "README.md",
        "docs/configure.md",
        "docs/consoles.md",
        "docs/install.md",
        "docs/operate.md",
        "docs/troubleshoot.md",
    ] {
        let page = page(name);
        for block in page.split("```toml\n").skip(1) {
            let text = block.split("```").next().unwrap();
            if text.contains("[[runners]]") {
                continue;
            }
            let table = settings::parse(text, Path::new(name)).unwrap_or_else(|e| panic!("{e}"));
            settings::Settings::resolve(table, Path::new(name), &settings::Sources::default())
                .unwrap_or_else(|e| panic!("{e}"));
            examples += 1;
        }
    }
    assert!(examples >= 2, "the examples moved");
}

#[test]
#[ignore = "needs systemd-analyze"]
fn systemd_has_no_word_to_say_about_our_units() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/systemd");
    let dir = tempfile::tempdir().unwrap();
    let mut units = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let (name, path) = entry.map(|entry| (entry.file_name(), entry.path())).unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        // It looks whether the program is there.
        let text = text.replace("/usr/local/bin/cannery", env!("CARGO_BIN_EXE_cannery"));
        let unit = dir.path().join(name);
        std::fs::write(&unit, text).unwrap();
        units.push(unit);
    }
    let mut verify = std::process::Command::new("systemd-analyze");
    let output = verify.args(["verify", "--man=no"]).args(&units).output().unwrap();
    // What it does not know, it only warns of.
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && said.is_empty(), "{said}");
}
