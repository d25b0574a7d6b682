//! The house's plan, held: who may import whom, and who may print.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};

fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    files
}

/// The first component below `src` of a file: its room.
fn room(file: &Path, src: &Path) -> String {
    let first = file.strip_prefix(src).unwrap().components().next().unwrap();
    first
        .as_os_str()
        .to_str()
        .unwrap()
        .trim_end_matches(".rs")
        .to_owned()
}

#[test]
fn rooms_import_only_what_the_plan_allows() {
    // Leaves of plain values that everyone may use.
    let leaves = ["record", "quantity", "secret", "threads", "children", "kill"];
    let allowed: &[(&str, &[&str])] = &[
        ("record", &[]),
        ("quantity", &[]),
        ("secret", &[]),
        ("threads", &[]),
        ("children", &[]),
        ("kill", &[]),
        ("ticket", &[]),
        ("job", &[]),
        ("image", &[]),
        ("host", &[]),
        ("machine", &[]),
        ("guest", &[]),
        ("console", &[]),
        ("report", &[]),
        ("history", &["report"]),
        ("settings", &["report"]),
        (
            "outcome",
            &["settings", "job", "image", "host", "machine", "guest", "ticket"],
        ),
        (
            "reap",
            &["settings", "image", "host", "machine", "history", "outcome"],
        ),
        (
            "start",
            &[
                "settings", "job", "image", "machine", "guest", "outcome", "report",
            ],
        ),
        (
            "stage",
            &[
                "settings", "job", "image", "host", "machine", "guest", "ticket", "start", "history", "reap",
                "outcome", "report",
            ],
        ),
        (
            "serve",
            &[
                "settings", "ticket", "console", "job", "machine", "guest", "start", "outcome", "report",
            ],
        ),
        (
            "bench",
            &[
                "settings", "image", "machine", "guest", "start", "console", "outcome", "report",
            ],
        ),
        (
            "cli",
            &[
                "bench", "settings", "job", "image", "host", "machine", "guest", "stage", "history", "reap",
                "serve", "ticket", "outcome", "report",
            ],
        ),
    ];
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut seen = 0;
    for file in sources(&src) {
        let room = room(&file, &src);
        if ["lib", "main"].contains(&room.as_str()) {
            continue;
        }
        let (_, may) = allowed
            .iter()
            .find(|(r, _)| *r == room)
            .unwrap_or_else(|| panic!("{room} has no place in the plan"));
        let text = std::fs::read_to_string(&file).unwrap();
        // What tests import is no dependency of the room.
        let text = text.split("#[cfg(test)]").next().unwrap();
        if file.file_name().is_some_and(|n| n == "tests.rs") {
            continue;
        }
        for line in text.lines().filter(|l| !l.trim_start().starts_with("//")) {
            for used in line.split("crate::").skip(1) {
                let name: String = used
                    .chars()
                    .take_while(|c| c.is_alphanumeric() || *c == '_')
                    .collect();
                let fine = name == room || leaves.contains(&name.as_str()) || may.contains(&name.as_str());
                assert!(fine, "{} imports {name}: {line}", file.display());
                seen += 1;
            }
        }
    }
    assert!(
        seen > 20,
        "the search found only {seen} imports: it looks for the wrong thing"
    );
}
